"""Modules of the model's that an adapter trains a copy of: PEFT's `modules_to_save`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

#: Path of a module in its model → its tensors by name.
Stored = dict[str, dict[str, Tensor]]


class SavedModules(nn.Module):
    """An adapter's own copies of some of its model's modules, such as a classification head.

    An adapter that was read from a file has their tensors (`stored`); it gets modules for them once it meets
    a model that has such modules (`meet`).

    Args:
        names: last parts of paths in the model: "classifier" is every module of that name.
        stored: tensors by path, for an adapter that was saved.
    """

    def __init__(self, names: Sequence[str] = (), stored: Mapping[str, Mapping[str, Tensor]] | None = None):
        super().__init__()
        self.names = tuple(names)
        self.stored: Stored = {path: dict(tensors) for path, tensors in (stored or {}).items()}
        self._paths: tuple[str, ...] = ()
        self._copies = nn.ModuleList()

    def __bool__(self) -> bool:
        return bool(self.names or self.stored)

    @property
    def has_copies(self) -> bool:
        return bool(self._paths)

    @property
    def modules_by_path(self) -> dict[str, nn.Module]:
        """Path in the model → the adapter's copy; empty before it met a model."""
        return dict(zip(self._paths, self._copies))

    def tensors(self) -> Stored:
        """All parameters and buffers, by path and name."""
        if not self._paths:
            return self.stored
        return {path: dict(module.state_dict()) for path, module in self.modules_by_path.items()}

    def stored_copy(self) -> SavedModules:
        """The same tensors, copied, for an adapter that has yet to meet a model."""
        copies = {
            path: {name: tensor.detach().clone() for name, tensor in tensors.items()}
            for path, tensors in self.tensors().items()
        }
        return SavedModules(self.names, copies)

    def check(self, model: nn.Module) -> dict[str, nn.Module]:
        """The model's modules that are meant, by path.

        Raises ValueError where the model has none of a name, or where stored tensors don't fit.
        """
        found = dict(model.named_modules(remove_duplicate=False))
        if self.tensors():
            wanted = list(self.tensors())
        else:
            wanted = []
            for name in self.names:
                paths = [path for path in found if path == name or path.endswith("." + name)]
                paths = [path for path in paths if path.split(".")[0] != "reft"]
                if not paths:
                    raise ValueError(f"modules_to_save: the model has no module called {name!r}")
                wanted += [path for path in paths if path not in wanted]
        for path in wanted:
            if path not in found:
                raise ValueError(f"modules_to_save: the model has no module at {path!r}")
        for path, tensors in self.tensors().items():
            theirs = {name: tuple(t.shape) for name, t in found[path].state_dict().items()}
            ours = {name: tuple(t.shape) for name, t in tensors.items()}
            if ours != theirs:
                raise ValueError(
                    f"modules_to_save: {path!r} was saved with {_shapes(ours)}; this model's has "
                    f"{_shapes(theirs)}"
                )
        return {path: found[path] for path in wanted}

    def meet(self, model: nn.Module, trainable: bool) -> None:
        """Copies the model's modules, and lays the stored tensors into the copies."""
        if self._paths:
            return
        theirs = self.check(model)
        for module in theirs.values():
            self._copies.append(_copied(module))
        self._paths = tuple(theirs)
        for path, tensors in self.stored.items():
            twin = self.modules_by_path[path]
            # In the dtype that they were stored in.
            twin.load_state_dict(tensors, assign=True)
            twin.to(next(theirs[path].parameters()).device)
        self.stored = {}
        self.requires_grad_(trainable)


def _copied(module: nn.Module) -> nn.Module:
    """A copy without the wrappers of `forward`, which are the model's and may lead to all of it."""
    wrappers = {part: part.__dict__.pop("forward") for part in module.modules() if "forward" in part.__dict__}
    try:
        return copy.deepcopy(module)
    finally:
        for part, wrapper in wrappers.items():
            part.__dict__["forward"] = wrapper


def _shapes(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items()) or "no tensors"


def by_rows(modules: Sequence[Callable[[Tensor], Tensor]], rows: Sequence[Tensor], x: Tensor) -> Tensor:
    """Each module on its rows of x [B, ...]; together they are all rows. Returns [B, ...] in x's order.

    A module runs in its own dtype (training keeps float32 under a half-precision model); the results have the
    widest of what the modules gave.
    """
    outputs = [
        _run(module, x if len(modules) == 1 else x.index_select(0, index))
        for module, index in zip(modules, rows)
    ]
    if len(outputs) == 1:
        return outputs[0]
    dtype = outputs[0].dtype
    for output in outputs:
        dtype = torch.promote_types(dtype, output.dtype)
    order = torch.argsort(torch.cat(list(rows)))
    return torch.cat([output.to(dtype) for output in outputs]).index_select(0, order)


def _run(module: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    parameter = next(module.parameters(), None) if isinstance(module, nn.Module) else None
    if parameter is None or parameter.dtype is x.dtype or torch.is_autocast_enabled(x.device.type):
        return module(x)
    return module(x.to(parameter.dtype)).to(x.dtype)
