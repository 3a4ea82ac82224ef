"""The compiled decode step: what is compiled when the mix of adapters changes, and what the graphs read."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.adapters import patch_with_mixed, random_adapter
from support.models import batch_of, make_model
from transformers import CompileConfig

import reft_kernels as rk

pytestmark = pytest.mark.models
STEPS = 4
LENGTHS = [6, 3, 5, 4, 6, 2, 5, 3]
BATCH = len(LENGTHS)
BASE = "__base__"

fusing = pytest.mark.parametrize("fuse_norm", [False, True], ids=["norms apart", "norms fused"])


class Recorder:
    """Remembers the graphs that its backend is given, which runs them as they are."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.Graph] = []

        def backend(module, inputs):  # a function, since transformers copies the config that holds it
            self.graphs.append(module.graph)
            return module

        self.backend = backend

    def edits(self, which: int = -1) -> int:
        """How many of our ops are in a graph."""
        return sum("reft_kernels" in str(node.target) for node in self.graphs[which].nodes)

    def tables(self, which: int = -1) -> dict[str, bool]:
        """What a graph takes of a plan: names of inputs, and whether they are known to stay."""
        found = {}
        for node in self.graphs[which].nodes:
            if node.op == "placeholder" and ("plan" in node.name or "workspace" in node.name):
                kind = node.meta["tensor_dict"].get("_dynamo_static_input_type")
                found[node.name] = kind is not None
        return found


class Model:
    """A patched model with adapters a0 to a7 beside the mixed ones, and its compiled decode step."""

    def __init__(self, fuse_norm: bool, capacity: int | None = 400) -> None:
        torch._dynamo.reset()
        self.model = make_model()
        self.reft = patch_with_mixed(self.model, fuse_norm=fuse_norm, capacity=capacity)
        for seed in range(BATCH):
            config = rk.ReftConfig(r=1 + seed % 3, layers="all", positions="all")
            self.reft.add_adapter(f"a{seed}", random_adapter(config, 32, 3, 0.5, 100 + seed))
        self.reft.set_adapter(None)
        self.recorder = Recorder()
        self.config = CompileConfig(fullgraph=True, mode=None, backend=self.recorder.backend)
        self.config._compile_all_devices = True

    def check(self, names: list[str], lengths: list[int] = LENGTHS, **options) -> int:
        """Compares with the eager path, and returns how many graphs were made."""
        before = len(self.recorder.graphs)
        call = {
            **batch_of(lengths),
            "adapter_names": names,
            "max_new_tokens": STEPS,
            "do_sample": False,
            **options,
        }
        got = self.model.generate(**call, cache_implementation="static", compile_config=self.config)
        assert torch.equal(got, self.model.generate(**call))
        return len(self.recorder.graphs) - before


EIGHT = [f"a{row}" for row in range(BATCH)]
ONE = ["a3"] * BATCH
TWO = ["a1", "a6"] * (BATCH // 2)


@fusing
def test_a_mix_of_adapters_is_no_reason_to_compile(fuse_norm):
    step = Model(fuse_norm)
    assert step.check(EIGHT) == 1
    edits = step.recorder.edits()
    assert edits == 3
    mixed = ["generated", "untied", BASE, "everywhere", "tied", "a0", "a0", "generated"]
    for names in (ONE, TWO, EIGHT[::-1], mixed, [BASE] * 7 + ["generated"]):
        assert step.check(names) == 0, names

    # Nothing to do after the prompt: the bare graph, or one whose norms are fused all the same.
    for names in (["tied", "untied"] * 4, [BASE] * BATCH):
        step.check(names)
    assert len(step.recorder.graphs) == (1 if fuse_norm else 2)
    assert step.recorder.edits() == (3 if fuse_norm else 0)
    assert step.check(TWO) == 0

    # Adapters come and go, as long as the sites and the room are what they were.
    step.reft.delete_adapter("a6")
    step.reft.add_adapter("new", random_adapter(rk.ReftConfig(r=2, layers=[1]), 32, 3, 0.5, 7))
    assert step.check(["new", "a1", "generated", BASE] * 2) == 0


@fusing
def test_a_graph_reads_nothing_of_a_plan_that_could_move(fuse_norm):
    step = Model(fuse_norm)
    step.check(TWO)
    tables = step.recorder.tables()
    assert all(tables.values()), tables
    # down, up, bias and kind of the one pool; rows, tiles and spans.
    assert len(tables) == 7, tables


def test_layers_without_adapters_have_fused_norms_too():
    step = Model(fuse_norm=True)
    for name in list(step.reft.adapters):
        if name != "untied":
            step.reft.delete_adapter(name)
    step.reft.add_adapter("late", random_adapter(rk.ReftConfig(r=2, layers=[1], positions="all"), 32, 3))
    assert step.check(["late", BASE] * 4) == 1
    assert step.recorder.edits() == 3 and all(step.recorder.tables().values())
    assert step.check(["untied", BASE] * 4) == 0


def test_beams_and_other_batches():
    step = Model(fuse_norm=False)
    step.check(["a0", "generated", BASE, "a2"], LENGTHS[:4], num_beams=2)
    first = len(step.recorder.graphs)  # transformers compiles no beam search yet
    assert step.check(EIGHT) == 1 - first
    step.check(["a4", "a4", "everywhere", "a2"], LENGTHS[:4], num_beams=2)
    assert step.check(["a1", "generated"], LENGTHS[:2]) == 1
    assert step.check(TWO) == 0
    assert len(step.recorder.graphs) == 2


def test_a_pool_that_grows_and_a_layer_that_is_new():
    step = Model(fuse_norm=False, capacity=None)
    assert step.check(TWO) == 1
    step.reft.add_adapter("wide", random_adapter(rk.ReftConfig(r=31, layers="all", positions="all"), 32))
    assert step.check(["wide", "a1"] * 4) == 1
    config = rk.ReftConfig(r=2, layers=[1], positions="all", site="mlp_output")
    step.reft.add_adapter("other", random_adapter(config, 32, 3, 0.5, 3))
    assert step.check(["other", "a1"] * 4) == 1
    assert step.recorder.edits() == 4


def test_the_backend_may_change_between_calls():
    step = Model(fuse_norm=True)
    assert step.check(TWO) == 1
    with rk.backend("reference"):
        assert step.check(TWO) == 1
    assert any("reference" in str(node.target) for node in step.recorder.graphs[-1].nodes)
    assert step.check(EIGHT) == 0


@pytest.mark.skipif(
    transformers.__version__.startswith("4."), reason="transformers 4 keeps one static cache on the model"
)
def test_two_calls_of_one_batch_size_take_turns_in_a_workspace():
    """A generate inside a generate refills the tables; the outer's next step finds its own again."""
    step = Model(fuse_norm=False)
    step.check(EIGHT)
    inner: list[torch.Tensor] = []

    def between(ids, scores):
        if not inner:
            inner.append(
                step.model.generate(
                    **batch_of(LENGTHS),
                    adapter_names=TWO,
                    max_new_tokens=STEPS,
                    do_sample=False,
                    cache_implementation="static",
                    compile_config=step.config,
                )
            )
        return scores

    def later(ids, scores):
        return between(ids, scores) if ids.shape[1] == max(LENGTHS) + 2 else scores

    for processor in (between, later):
        inner.clear()
        assert step.check(EIGHT, logits_processor=[processor]) == 0
        assert inner
