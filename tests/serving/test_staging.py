"""`Staging`: what the front end asks the engine's core (a stand-in here), and what the core answers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from reft_kernels import __version__
from reft_kernels.positions import Positions
from reft_kernels.serving.config import Source
from reft_kernels.serving.ticket import Part, Ticket
from reft_kernels.serving.vllm import staging
from reft_kernels.serving.vllm.engine import states_of
from reft_kernels.serving.vllm.staging import Staging


def ticket(name: str) -> Ticket:
    return Ticket((Part(Source(name), name),), 1.0, (Positions.parse("all"),))


class Core:
    """Answers a question when the step under way is over; an adapter is read after `questions` of them."""

    def __init__(self, questions: int = 1, version: str = __version__) -> None:
        self.asked: list[list[str]] = []
        self.questions, self.version = questions, version

    async def call_utility_async(self, method: str, tickets: dict[str, Any]) -> Any:
        assert method == "reft_stage"
        paths = [Ticket.from_dict(given).parts[0].source.path for given in tickets.values()]
        self.asked.append(paths)
        await asyncio.sleep(0.01)
        return self.version, {key: self.state(path) for key, path in zip(tickets, paths)}

    def state(self, path: str) -> str | None:
        if "bad" in path:
            return f"{path} is torn"
        often = sum(path in paths for paths in self.asked)
        return "" if often >= self.questions else None


@pytest.fixture(autouse=True)
def errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "wrong_request", ValueError)


def run(core: Core, most: int, *waves: list[str]) -> list[Any]:
    async def all_waves() -> list[Any]:
        one = Staging(core, most)
        found: list[Any] = []
        for wave in waves:
            found += await asyncio.gather(*(one.have(ticket(name)) for name in wave), return_exceptions=True)
        return found

    return asyncio.run(all_waves())


def test_many_are_asked_for_at_once_and_never_again() -> None:
    core = Core()
    names = [f"a{n}" for n in range(20)]
    assert run(core, 100, [*names, "a3"], names, ["b", "a0"]) == [None] * 43
    assert core.asked == [names, ["b"]]


def test_those_that_are_being_read_are_asked_for_again_with_those_that_came() -> None:
    core = Core(questions=3)

    async def late() -> None:
        one = Staging(core, 100)
        first = asyncio.create_task(one.have(ticket("a")))
        await asyncio.sleep(0.005)
        await asyncio.gather(first, one.have(ticket("b")))

    asyncio.run(late())
    assert core.asked[0] == ["a"] and core.asked[1] == ["a", "b"] and core.asked[-1] == ["b"]


def test_one_that_can_not_be_read_is_its_own_requests_error_and_may_be_put_right() -> None:
    core = Core()
    found = run(core, 100, ["a", "bad", "b"], ["bad", "a"])
    assert [str(one) for one in found] == ["None", "bad is torn", "None", "bad is torn", "None"]
    assert core.asked == [["a", "bad", "b"], ["bad"]]


def test_more_than_the_workers_keep_are_asked_for_again() -> None:
    core = Core()
    run(core, 2, ["a"], ["b"], ["a"], ["c"], ["a"], ["b"])
    assert core.asked == [["a"], ["b"], ["c"], ["b"]]


def test_a_core_without_the_plugin_is_an_error_of_all_who_wait() -> None:
    found = run(Core(version="another"), 100, ["a", "b"])
    assert all("answers 'another'" in str(one) for one in found)


def test_who_gives_up_takes_nothing_from_others() -> None:
    core = Core(questions=2)

    async def one_gives_up() -> None:
        one = Staging(core, 100)
        first, second = (asyncio.create_task(one.have(ticket("a"))) for _ in range(2))
        await asyncio.sleep(0.005)
        first.cancel()
        await second
        assert first.cancelled()

    asyncio.run(one_gives_up())


def test_an_adapter_is_there_when_all_workers_have_it() -> None:
    workers = [{"a": "", "b": None, "c": None}, {"a": "", "b": "", "c": "torn"}]
    assert states_of(workers) == {"a": "", "b": None, "c": "torn"}  # type: ignore[arg-type]
