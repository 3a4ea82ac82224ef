"""Two threads generate at once; a streamer reads in another."""

from __future__ import annotations

import threading

import pytest
import transformers
from support.adapters import patched
from support.models import batch_of, row_alone

pytestmark = pytest.mark.models


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_two_threads_generate_at_once(cache):
    if cache == "static" and transformers.__version__.startswith("4."):
        pytest.skip("transformers 4 keeps one static cache on the model, whichever thread it is for")
    model = patched()
    jobs = {"everywhere": batch_of([7, 3], seed=3), "generated": batch_of([4, 5], seed=4)}

    def run(name):
        return model.generate(
            **jobs[name],
            adapter_names=[name, "__base__"],
            max_new_tokens=12,
            do_sample=False,
            cache_implementation=cache,
        ).tolist()

    want = {name: run(name) for name in jobs}
    for _ in range(3):
        got: dict = {}
        threads = [threading.Thread(target=lambda n=n, got=got: got.update({n: run(n)})) for n in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert got == want


def test_a_streamer_in_another_thread(model, batch):
    from transformers import TextIteratorStreamer

    class Tokenizer:
        def decode(self, ids, **kwargs):
            return " ".join(map(str, ids)) + "\n"

    streamer = TextIteratorStreamer(Tokenizer())
    one = row_alone(batch, 0)
    want = model.generate(**one, adapter_names=["everywhere"], max_new_tokens=4, do_sample=False)
    thread = threading.Thread(
        target=model.generate,
        kwargs={
            **one,
            "adapter_names": ["everywhere"],
            "max_new_tokens": 4,
            "do_sample": False,
            "streamer": streamer,
        },
    )
    thread.start()
    text = "".join(streamer).split()
    thread.join()
    assert [int(t) for t in text][-4:] == want[0, -4:].tolist()
