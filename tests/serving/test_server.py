"""The HTTP server: many clients at once, adapters that come and go, errors that are one request's alone."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.server import Server, running

from .conftest import CONFIGS, Tiny, prompt_of

pytestmark = pytest.mark.serving

NEW = 8


@pytest.fixture(scope="module")
def server(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("server")
    shutil.copytree(tiny.adapter("last"), folder / "many" / "found")
    with running(tiny.folder, folder, {"reft": {**tiny.reft, "directory": str(folder / "many")}}) as server:
        yield server


def test_every_way_to_ask_for_an_adapter(tiny: Tiny, server: Server) -> None:
    prompt = prompt_of(21)
    wanted = tiny.tokens(prompt, "everywhere", NEW)
    ways = ({"vllm_xargs": {"reft_adapter": "everywhere"}}, {"vllm_xargs": {"reft_adapter": ["everywhere"]}})
    for way in (*ways, {"model": "everywhere"}, {"model": "everywhere", "vllm_xargs": {"reft_scale": 1.0}}):
        assert server.complete(prompt, NEW, **way) == (200, wanted)
    found = server.complete(prompt, NEW, vllm_xargs={"reft_adapter": "found"})
    assert found == (200, tiny.tokens(prompt, "last", NEW))
    assert server.complete(prompt, NEW) == (200, tiny.tokens(prompt, None, NEW))
    half = server.complete(prompt, NEW, vllm_xargs={"reft_adapter": "everywhere", "reft_scale": 0.0})
    assert half == (200, tiny.tokens(prompt, None, NEW))


def test_wrong_requests_are_answered_with_400(tiny: Tiny, server: Server) -> None:
    prompt = prompt_of(21)
    beams = {"use_beam_search": True, "n": 2}
    for body, text in (
        ({"vllm_xargs": {"reft_adapter": "nobody"}}, "no adapter 'nobody'"),
        ({"vllm_xargs": {"reft_scale": 2}}, "reft_adapter is not given"),
        ({"vllm_xargs": {"reft_adapter": "tied"}, "model": "everywhere"}, "adapter itself"),
        ({"vllm_xargs": {"reft_adapter": "tied"}, **beams}, "use_beam_search"),
        ({"model": "tied", **beams}, "use_beam_search"),
    ):
        status, error = server.complete(prompt, NEW, **body)
        assert status == 400 and text in error, (status, error)
    status, _ = server.complete(prompt, NEW, model="nobody")
    assert status == 404


def test_adapters_come_and_go_under_load(tiny: Tiny, server: Server, tmp_path: Path) -> None:
    """No request is lost, and none is answered with another's adapter."""
    names = [*CONFIGS, None]
    prompts = [prompt_of(length) for length in (7, 19, 33, 45)]

    def ask(number: int) -> None:
        name, prompt = names[number % len(names)], prompts[number % len(prompts)]
        more = {"vllm_xargs": {"reft_adapter": name}} if name else {}
        assert server.complete(prompt, NEW, **more) == (200, tiny.tokens(prompt, name, NEW)), name

    def load_and_ask(number: int) -> None:
        name = list(CONFIGS)[number % len(CONFIGS)]
        own, prompt = f"own-{number}", prompts[number % len(prompts)]
        body = {"lora_name": own, "lora_path": tiny.adapter(name)}
        status, answer = server.post("/v1/load_lora_adapter", body)
        assert status == 200, answer
        wanted = 200, tiny.tokens(prompt, name, NEW)
        assert server.complete(prompt, NEW, model=own) == wanted
        assert server.complete(prompt, NEW, vllm_xargs={"reft_adapter": own}) == wanted
        assert server.post("/v1/unload_lora_adapter", {"lora_name": own})[0] == 200
        assert server.complete(prompt, NEW, model=own)[0] == 404
        assert server.complete(prompt, NEW, vllm_xargs={"reft_adapter": own})[0] == 400

    for number in range(len(names) * len(prompts)):  # what is wanted, by one thread
        tiny.tokens(prompts[number % len(prompts)], names[number % len(names)], NEW)
    with ThreadPoolExecutor(12) as pool:
        jobs = [pool.submit(ask, number) for number in range(48)]
        jobs += [pool.submit(load_and_ask, number) for number in range(8)]
        for job in jobs:
            job.result()


def test_a_bad_folder_is_an_error_of_its_request_alone(tiny: Tiny, server: Server, tmp_path: Path) -> None:
    shutil.copytree(tiny.adapter("tied"), tmp_path / "bad")
    (tmp_path / "bad" / "reft_model.safetensors").write_bytes(b"nothing")
    body = {"lora_name": "bad", "lora_path": str(tmp_path / "bad")}
    status, answer = server.post("/v1/load_lora_adapter", body)
    assert status == 400 and "truncated" in str(answer)
    assert server.complete(prompt_of(9), NEW, model="bad")[0] == 404
    prompt = prompt_of(9)
    assert server.complete(prompt, NEW, model="tied") == (200, tiny.tokens(prompt, "tied", NEW))
