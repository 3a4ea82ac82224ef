"""The pool of elementwise interventions: s − 1 and v of many adapters, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from .ops import ScaleRows
from .pool import Fold, Pool

__all__ = ["AnyFold", "ScaleFold", "ScalePool"]


class ScaleFold(ScaleRows):
    """An elementwise intervention s ⊙ h + v: the pool row that it is.

    >>> ScaleFold.of(scale=torch.tensor([0.5, 1.0]), shift=torch.zeros(2)).scale_less_one.tolist()
    [[-0.5, 0.0]]

    scale_less_one, shift: [1, d]; s − 1 and v.
    """

    __slots__ = ()
    #: As `Fold.form`.
    form: ClassVar[str] = "elementwise"

    @classmethod
    def of(cls, scale: Tensor, shift: Tensor) -> ScaleFold:
        """From s and v [d], differentiable; in float32 at least, in which s − 1 is taken."""
        dtype = torch.promote_types(torch.promote_types(scale.dtype, shift.dtype), torch.float32)
        return cls((scale.to(dtype) - 1)[None], shift.to(dtype)[None])

    @property
    def rank(self) -> int:
        return self.shift.shape[0]

    @property
    def width(self) -> int:
        return self.shift.shape[1]

    def times(self, number: float) -> ScaleFold:
        """The fold whose edit is this one's times a number: of s − 1 and v."""
        return self if number == 1 else ScaleFold(*(tensor * number for tensor in self))

    @staticmethod
    def meeting(folds: Sequence[ScaleFold]) -> Sequence[ScaleFold]:
        """The one fold that is the sum of these edits, each of the unedited h: Σ (s − 1) and Σ v."""
        if len(folds) < 2:
            return folds
        return [ScaleFold(*(torch.stack(parts).sum(0) for parts in zip(*folds)))]


#: A fold of any form.
AnyFold = Fold | ScaleFold


class ScalePool(Pool):
    """Room for elementwise interventions on one device, at one width: a `Pool` whose rows are s − 1 and v.

    >>> pool = ScalePool(width=2)
    >>> span = pool.add(ScaleFold.of(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 7.0])))
    >>> tuple(span), pool.rows.shift[0].tolist()
    ((0, 1), [0.0, 7.0])

    Args:
        width: d, the length of a hidden state.
        dtype: float32, or float64 for hidden states in float64. Those in 16 bits have a pool in float32.
        device, capacity: as `Pool` has them.

    Attributes:
        rows: scale_less_one, shift [capacity, width]. Others when it grows, both at once.
    """

    rows: ScaleRows  # type: ignore[assignment]

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: must be torch.float32 or torch.float64, was {dtype}")
        super().__init__(width, dtype, device, capacity)

    def _no_rows(self) -> ScaleRows:  # type: ignore[override]
        return ScaleRows(
            *(torch.zeros(0, self.width, dtype=self.dtype, device=self.device) for _ in range(2))
        )

    def _check(self, fold: ScaleFold) -> None:
        if not isinstance(fold, ScaleFold) or not all(isinstance(t, Tensor) for t in fold):
            raise ValueError(
                "fold: must be a ScaleFold of the tensors scale_less_one [1, d] and shift [1, d], was a "
                f"{type(fold).__name__}"
            )
        for name, tensor in zip(ScaleRows._fields, fold):
            if tensor.shape != (1, self.width):
                raise ValueError(
                    f"fold: {name} must be [1, {self.width}] to fit a pool of width {self.width}, was "
                    f"{list(tensor.shape)}"
                )
            if not tensor.is_floating_point():
                raise ValueError(f"fold: {name} must be floating, was {tensor.dtype}")
