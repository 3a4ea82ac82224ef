"""What works where: every method at telling sites and two methods at every site, tried, and the page of it.

`python tests/support/matrix.py` tries all of them and writes the tables of docs/support.md anew; a test
compares the two. All cases are rows of one batch, so that a mixed batch is what is tried.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")
    sys.path[:0] = [str(Path(__file__).resolve().parents[level]) for level in (1, 2)]

import torch
from torch import Tensor

import reft_kernels as rk
from reft_kernels import ops, sites
from reft_kernels.adapter import Intervention
from reft_kernels.adapter.method import METHODS
from reft_kernels.adapter.orthonormal import orthonormal_rows
from support import formulas
from support import site_oracle as oracle
from support.models import batch_of, make_model, row_alone

PAGE = Path(__file__).resolve().parents[2] / "docs" / "support.md"
COMMAND = "python tests/support/matrix.py"
LAYER, TOKENS, YES = 1, 4, "yes"
#: Behind a linear layer, the residual stream, one head's part of an input, and in no layer.
TELLING = ("mlp_output", "block_output", "head_attention_value_output", "lm_head_input")
EVERYWHERE = ("loreft", "vector")
WHAT = ("runs", "saves", "merges", "trains")
ALL = rk.Positions.parse("all")


class Case(NamedTuple):
    """A row of the batch. how: the method's mode, or its act_fn, as rows of the table name it."""

    method: str
    how: str
    site: str

    @property
    def label(self) -> str:
        how = "with `act_fn`" if self.how == "act_fn" else self.how
        return f"`{self.method}`" + (f", {how}" if how else "")

    @property
    def options(self) -> dict[str, Any]:
        return {"mode": self.how} if self.how and self.how != "act_fn" else {}

    @property
    def act_fn(self) -> str | None:
        return "silu" if self.how == "act_fn" else None


def _hows(method: str) -> Iterator[str]:
    for options in formulas.VARIANTS.get(method, [{}]):
        yield options.get("mode", "")
    if METHODS[method].takes_activation:
        yield "act_fn"


METHOD_CASES = [Case(m, how, site) for m in METHODS for how in _hows(m) for site in TELLING]
SITE_CASES = [Case(m, next(_hows(m)), site) for site in sites.SITES for m in EVERYWHERE]
CASES = tuple(dict.fromkeys([*METHOD_CASES, *SITE_CASES]))


def fresh_model() -> Any:
    return make_model("llama", gain=1.0)


def make(case: Case, seed: int) -> rk.Adapter:
    """Random parameters. Raises ValueError where the method means nothing at the site."""
    if case.method == "folded":  # what a composition leaves
        parts = [make(case._replace(method=m), seed) for m in ("vector", "direft")]
        return rk.Adapter.compose(parts)
    head = 1 if sites.takes_heads(case.site) else None
    layer = LAYER if sites.has_layers(case.site) else 0
    width = _width(case.site)
    p = formulas.parameters(case.method, 2, width, torch.float32, seed, case.options)
    p = {name: 0.5 * tensor / width**0.5 if tensor.dim() == 2 else tensor for name, tensor in p.items()}
    for name in METHODS[case.method].orthonormal:
        p[name] = orthonormal_rows(p[name])
    return rk.Adapter(
        [
            Intervention(
                case.method, layer, case.site, ALL, p, act_fn=case.act_fn, head=head, options=case.options
            )
        ]
    )


_widths: dict[str, int] = {}


def _width(site: str) -> int:
    if site not in _widths:
        _widths[site] = oracle.width_of(fresh_model(), "llama", oracle.sites_of("llama")[site])
    return _widths[site]


def formula(case: Case, adapter: rk.Adapter) -> Callable[[Tensor], Tensor]:
    """h [n, d] edited, as the method's source writes it."""
    if case.method == "folded":
        parts = [case._replace(method=m) for m in ("vector", "direft")]
        return lambda h: h + sum(formula(part, make(part, seed_of(case)))(h) - h for part in parts)
    one = adapter.interventions[0]
    p = {name: getattr(one, name).detach().to(torch.float64) for name in one.names}
    act = torch.nn.functional.silu if case.act_fn else (lambda z: z)
    return lambda h: formulas.written_out(case.method, p, act, h, case.options)


def seed_of(case: Case) -> int:
    return CASES.index(case)


def expected(model: Any, case: Case, adapter: rk.Adapter, row: dict[str, Tensor]) -> Tensor:
    """Logits of one row by a plain hook."""
    at, edit = oracle.sites_of("llama")[case.site], formula(case, adapter)
    module = oracle.module_at(model, "llama", at, LAYER)
    first, last = at.stretch or (None, None)

    def edited(h: Tensor) -> Tensor:
        h = h.clone()
        part = h[..., first:last]
        h[..., first:last] = edit(part.reshape(-1, part.shape[-1]).double()).reshape(part.shape).to(h.dtype)
        return h

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (edited(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edited(kwargs["hidden_states"])}

    def after(module: Any, args: Any, output: Any) -> Any:
        return (edited(output[0]), *output[1:]) if isinstance(output, tuple) else edited(output)

    if at.side == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        with torch.no_grad():
            return model(**row).logits[0]
    finally:
        handle.remove()


# What is tried ------------------------------------------------------------------------------------------


def reason(case: Case, error: Exception) -> str:
    """What an error says, without the place that it was tried at."""
    text = re.sub(r"^\w+: ", "", str(error)).partition(";")[0]
    for place in (f"{case.method} at {case.site} of layer", f"{case.site} of layer"):
        text = re.sub(rf"{re.escape(place)} \d+", "it", text)
    return re.sub(r", was .*", "", text)


class Tried:
    """All cases in one batch of one model. found: case → what was tried → "yes" or why not."""

    def __init__(self) -> None:
        self.found: dict[Case, dict[str, str]] = {}
        self.adapters: dict[Case, rk.Adapter] = {}
        for case in CASES:
            try:
                self.adapters[case] = make(case, seed_of(case))
                self.found[case] = dict.fromkeys(WHAT, YES)
            except ValueError as error:
                self.found[case] = dict.fromkeys(WHAT, reason(case, error))
        self.names = {case: str(number) for number, case in enumerate(self.adapters)}
        self.batch = batch_of([TOKENS] * len(self.names))
        self.model = fresh_model().requires_grad_(False)
        self.bare = fresh_model()
        self.reft = rk.patch(self.model)
        self.runs()
        self.merges()
        self.trains()

    def logits(self, model: Any, backend: str) -> Tensor:
        with torch.no_grad(), rk.backend(backend):
            return model(**self.batch, adapter_names=list(self.names.values())).logits

    def runs(self) -> None:
        """Each row is its formula's, on every backend; and to the bit after saving and loading."""
        loaded = fresh_model()
        others = rk.patch(loaded)
        with tempfile.TemporaryDirectory() as folder:
            for case, name in self.names.items():
                self.reft.add_adapter(name, self.adapters[case])
                self.reft.save_pretrained(f"{folder}/{name}", name)
                others.load_adapter(f"{folder}/{name}", name)
        with torch.no_grad():
            plain = self.bare(**self.batch).logits
        wanted = [
            expected(self.bare, case, self.adapters[case], row_alone(self.batch, row))
            for row, case in enumerate(self.names)
        ]
        for backend in ops.BACKENDS:
            got = self.logits(self.model, backend)
            for row, case in enumerate(self.names):
                change, error = (wanted[row] - plain[row]).abs().max(), (wanted[row] - got[row]).abs().max()
                if not (change > 1e-4 and error < min(0.02 * change, 1e-3)):
                    self.found[case]["runs"] = (
                        f"WRONG on {backend}: changes {change:.2g}, is off by {error:.2g}"
                    )
        again = self.logits(loaded, "native")
        got = self.logits(self.model, "native")
        for row, (case, name) in enumerate(self.names.items()):
            mine, theirs = (a.interventions[0] for a in (self.adapters[case], others.adapters[name]))
            tensors = [(getattr(mine, n), getattr(theirs, n)) for n in mine.names]
            same = all(torch.equal(a, b) for a, b in tensors) and torch.equal(again[row], got[row])
            if not same or mine.options != theirs.options:
                self.found[case]["saves"] = "WRONG: another one was loaded"

    def merges(self) -> None:
        """Merged, every row has the edit; then the weights are to the bit what they were."""
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        row = row_alone(self.batch, 0)
        for case, name in self.names.items():
            with torch.no_grad(), rk.backend("native"):
                want = self.model(**row, adapter_names=[name]).logits
                try:
                    self.reft.merge_adapter(name)
                except ValueError as error:
                    self.found[case]["merges"] = reason(case, error)
                else:
                    got = self.model(**row, adapter_names=["__base__"]).logits
                    self.reft.unmerge_adapter(name)
                    if not torch.allclose(got, want, rtol=1e-3, atol=1e-4):
                        self.found[case]["merges"] = f"WRONG by {(got - want).abs().max():.2g}"
        after = self.model.state_dict()
        assert before.keys() == after.keys() and all(torch.equal(t, after[n]) for n, t in before.items())

    def trains(self) -> None:
        """Gradients of all in one backward are the reference's on each backend; and each row's loss falls."""
        training: dict[Case, rk.Adapter] = {}
        for case in self.names:
            try:
                self.adapters[case].trainable = True
                training[case] = self.adapters[case]
            except ValueError as error:
                self.found[case]["trains"] = reason(case, error)
        rows = [list(self.names).index(case) for case in training]
        batch = {name: tensor[rows] for name, tensor in self.batch.items()}
        names = [self.names[case] for case in training]
        labels = batch["input_ids"][:, 1:]

        def losses() -> Tensor:
            logits = self.model(**batch, adapter_names=names).logits[:, :-1]
            flat = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
            return flat.mean(1)

        grads: dict[str, dict[Case, list[Tensor]]] = {}
        for backend in ops.BACKENDS:
            with rk.backend(backend):
                losses().sum().backward()
            grads[backend] = {
                case: [torch.zeros_like(p) if p.grad is None else p.grad for p in adapter.parameters()]
                for case, adapter in training.items()
            }
            for adapter in training.values():
                adapter.zero_grad(set_to_none=True)
        for (backend, found), case in itertools.product(grads.items(), training):
            for mine, want in zip(found[case], grads["reference"][case]):
                if not torch.allclose(mine, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())):
                    self.found[case]["trains"] = f"WRONG gradients on {backend}"
        seen = []
        optimizer = torch.optim.Adam([p for a in training.values() for p in a.parameters()], lr=0.01)
        for _ in range(6):
            with rk.backend("native"):
                loss = losses()
                loss.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen.append(loss.detach())
        for case, first, last in zip(training, seen[0].tolist(), seen[-1].tolist()):
            if not last < first:
                self.found[case]["trains"] = f"WRONG: the loss went from {first:.4f} to {last:.4f}"


# The page -----------------------------------------------------------------------------------------------


def _cell(by_site: Mapping[str, str], notes: list[str]) -> str:
    """One cell of outcomes at some sites: yes, no with a note, or yes at some of them and a note."""

    def note(why: str) -> str:
        if why not in notes:
            notes.append(why)
        return f"({notes.index(why) + 1})"

    good = [site for site, why in by_site.items() if why == YES]
    marks = dict.fromkeys(note(why) for why in by_site.values() if why != YES)
    if not good:
        return f"no {' '.join(marks)}"
    if not marks:
        return YES
    most = len(good) > len(by_site) / 2
    named = [f"`{site}`" for site in by_site if (site not in good if most else site in good)]
    return f"{'not at' if most else 'at'} {', '.join(named)} {' '.join(marks)}"


def rows(
    found: Mapping[Case, Mapping[str, str]],
) -> tuple[dict[str, list[str]], dict[str, list[str]], list[str]]:
    """The cells of the methods' rows by label, of the sites' rows by site, and the notes."""
    notes: list[str] = []
    by_method: dict[str, list[str]] = {}
    for label, cases in itertools.groupby(METHOD_CASES, key=lambda case: case.label):
        mine = {case.site: found[case] for case in cases}
        by_method[label] = [_cell({site: one[what] for site, one in mine.items()}, notes) for what in WHAT]
    by_site: dict[str, list[str]] = {}
    for site, cases in itertools.groupby(SITE_CASES, key=lambda case: case.site):
        both = {case.method: found[case] for case in cases}
        by_site[site] = [_cell({method: one[what] for method, one in both.items()}, notes) for what in WHAT]
    return by_method, by_site, notes


def table(kind: str, cells: Mapping[str, list[str]]) -> str:
    heads = [kind, "in a mixed batch", "saved and loaded", "merged", "trained"]
    lines = [f"| {' | '.join(line)} |" for line in (heads, *([name, *mine] for name, mine in cells.items()))]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


def written(found: Mapping[Case, Mapping[str, str]]) -> str:
    """What stands between the page's marks."""
    by_method, by_site, notes = rows(found)
    listed = "\n".join(f"{number}. {note}" for number, note in enumerate(notes, 1))
    named = {f"`{site}`": cells for site, cells in by_site.items()}
    return "\n\n".join(["", table("method", by_method), table("site", named), listed, ""])


MARKS = ("<!-- tried -->", "<!-- /tried -->")


def on_the_page() -> str:
    return PAGE.read_text(encoding="utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]


if __name__ == "__main__":
    from support.interpreter import fix_the_order_of_sums

    fix_the_order_of_sums()
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    new = written(Tried().found)
    PAGE.write_text(before + MARKS[0] + new + MARKS[1] + after, encoding="utf-8")
    print(new)
