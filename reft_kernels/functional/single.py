"""One edit on rows of h, by its tensors. Differentiable in all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..ops.arguments import PoolRows
from ..plan import check_rows, one_segment
from .checks import check_dtype, check_rows_of, explained


def loreft(h: Tensor, R: Tensor, W: Tensor, b: Tensor, rows: Tensor | Sequence[int] | None = None) -> Tensor:
    """LoReFT on the rows of h: h + Rᵀ(W h + b − R h) (Wu et al. 2024, arXiv 2404.03592, eq. 2).

    >>> R, W, b = torch.tensor([[1.0, 0.0]]), torch.zeros(1, 2), torch.tensor([7.0])
    >>> loreft(torch.ones(2, 2), R, W, b, rows=[1]).tolist()  # what lies along R becomes W h + b
    [[1.0, 1.0], [7.0, 1.0]]

    Args:
        h: [..., d].
        R: [r, d], the paper's R with orthonormal rows (not checked: any R is computed with).
        W: [r, d]. R and W are in h's dtype or in float32.
        b: [r].
        rows: flat indices into h.reshape(-1, d), each at most once; None for all rows. Rows that lie on
            the host are checked; rows on an accelerator are not read back, so there one that is out of
            range is skipped and one that is named twice gives an undefined result.

    Returns:
        A new tensor like h; rows that are not named are copied to the bit. Differentiable in h, R, W, b.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; rows out of range or named twice.
    """
    check_dtype(h)
    d = h.shape[-1] if h.dim() else 0
    if R.dim() != 2 or R.shape[1] != d:
        raise ValueError(f"R: must be [r, {d}] to fit h {list(h.shape)}, was {list(R.shape)}")
    if W.shape != R.shape:
        raise ValueError(f"W: must have R's shape {list(R.shape)}, was {list(W.shape)}")
    if b.shape != R.shape[:1]:
        raise ValueError(f"b: must be [{R.shape[0]}], was {list(b.shape)}")
    for name, tensor in (("R", R), ("W", W), ("b", b)):
        if tensor.device != h.device:
            raise ValueError(f"{name}: is on {tensor.device}, but h is on {h.device}")
    for name, tensor in (("R", R), ("W", W)):
        if tensor.dtype is not h.dtype and tensor.dtype is not torch.float32:
            raise ValueError(f"{name}: dtype must be h's ({h.dtype}) or torch.float32, was {tensor.dtype}")
    count = h.numel() // d if d else 0
    rank = R.shape[0]
    if rows is not None and not torch.compiler.is_compiling():
        check_rows(rows, count)
    plan = one_segment(rows, count, rank, h.device)
    wide = torch.promote_types(R.dtype, W.dtype)
    # The difference is taken in float32 at least and rounded once.
    fold_dtype = torch.promote_types(wide, torch.float32)
    fold = PoolRows(
        down=(W.to(fold_dtype) - R.to(fold_dtype)).to(wide).contiguous(),
        up=R.to(wide).contiguous(),
        bias=b.to(fold_dtype).contiguous(),
        kind=torch.zeros(rank, dtype=torch.int32, device=h.device),
    )
    op = ops.INTERVENE[ops.current_backend(h.device)]
    try:
        return op(h, *fold, *plan)
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None


def _check_one(h: Tensor, rows: Tensor | Sequence[int] | None, **tensors: tuple[Tensor, list[int]]) -> int:
    """Refuses what does not fit h [..., d]; tensors: (tensor, its shape) by name. Returns the rows of h."""
    check_dtype(h)
    count = check_rows_of(h, rows)
    for name, (tensor, shape) in tensors.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: must be {shape} to fit h {list(h.shape)}, was {list(tensor.shape)}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: is on {tensor.device}, but h is on {h.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: must be floating, was {tensor.dtype}")
    return count


def scale_shift(
    h: Tensor, scale: Tensor, shift: Tensor, rows: Tensor | Sequence[int] | None = None
) -> Tensor:
    """Elementwise on the rows of h: scale ⊙ h + shift (RED: Wu et al. 2024, arXiv 2402.15179, eq. 3).

    >>> h = torch.tensor([[1.0, 2.0], [3.0, float("inf")]])
    >>> scale_shift(h, torch.tensor([2.0, 0.0]), torch.tensor([0.0, 7.0]), rows=[1]).tolist()
    [[1.0, 2.0], [6.0, 7.0]]

    Args:
        h: [..., d].
        scale: [d]. What is 0 assigns the shift, also where h is Inf or NaN.
        shift: [d]. Both of any floating dtype: they are taken in float32 at least, the scale as scale − 1.
        rows: flat indices into h.reshape(-1, d), each at most once; None for all rows. Checked as those
            of `loreft`.

    Returns:
        A new tensor like h; rows that are not named are copied to the bit. Differentiable in h, scale, shift.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; rows out of range or named twice.
    """
    width = [h.shape[-1] if h.dim() else 0]
    count = _check_one(h, rows, scale=(scale, width), shift=(shift, width))
    dtype = torch.float64 if h.dtype is torch.float64 else torch.float32
    pool = ops.ScaleRows((scale.to(dtype) - 1)[None].contiguous(), shift.to(dtype)[None].contiguous())
    plan = one_segment(rows, count, 1, h.device)
    op = ops.SCALE_SHIFT[ops.current_backend(h.device)]
    try:
        return op(h, *pool, *plan)
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None


def interchange(
    h: Tensor,
    source: Tensor,
    R: Tensor,
    rows: Tensor | Sequence[int] | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Distributed interchange on the rows of h: h + Rᵀ m ⊙ (R source − R h).

    What lies along R is taken from the source (Geiger et al. 2023, arXiv 2303.02536; with a mask, Boundless
    DAS: Wu et al. 2023, arXiv 2305.08809).

    >>> R = torch.tensor([[1.0, 0.0]])
    >>> interchange(torch.ones(2, 2), torch.tensor([[5.0, 6.0]]), R, rows=[1]).tolist()
    [[1.0, 1.0], [5.0, 1.0]]

    R source is one product, and the rest one op, which reads a source of its own for each row.

    Args:
        h: [..., d].
        source: a source for each edited row, in the order of `rows`: states [n, d], or what R makes of
            them, [n, r]. If r is d it is taken as states.
        R: [r, d] with orthonormal rows (not checked: any R is computed with).
        rows: flat indices into h.reshape(-1, d), each at most once; None for all rows, of which there are
            n then. Checked as those of `loreft`.
        mask: [r], how much of each direction is taken, from 0 to 1 (not checked); None takes all of it.

    Returns:
        A new tensor like h; rows that are not named are copied to the bit. Differentiable in h, source, R
        and mask.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; rows out of range or named twice.
    """
    d = h.shape[-1] if h.dim() else 0
    rank = R.shape[0] if R.dim() == 2 else 0
    named = h.numel() // max(d, 1) if rows is None else len(rows)
    width = d if source.dim() == 2 and source.shape[1] == d else rank
    if list(source.shape) != [named, width]:
        raise ValueError(
            f"source: must be [{named}, {d}] or [{named}, {rank}], one for each edited row, was "
            f"{list(source.shape)}"
        )
    shapes = {"R": (R, [rank, d]), "source": (source, [named, width])}
    if mask is not None:
        shapes["mask"] = (mask, [rank])
    count = _check_one(h, rows, **shapes)
    wide = torch.promote_types(h.dtype, torch.float32)
    # As it is R may stay in h's dtype; with a mask it would be rounded anew.
    up = R if R.dtype is h.dtype and mask is None else R.to(wide)
    down = -R.to(wide) if mask is None else -mask.to(wide)[:, None] * R.to(wide)
    target = source.to(wide) @ R.to(wide).T if width == d else source.to(wide)
    fold = PoolRows(
        down=down.to(up.dtype).contiguous(),
        up=up.contiguous(),
        bias=torch.zeros(rank, dtype=wide, device=h.device),
        kind=torch.zeros(rank, dtype=torch.int32, device=h.device),
    )
    plan = one_segment(rows, count, rank, h.device)
    op = ops.INTERVENE_SOURCE[ops.current_backend(h.device)]
    try:
        return op(h, (target if mask is None else target * mask.to(wide)).contiguous(), *fold, *plan)
    except (RuntimeError, IndexError) as error:
        raise explained(error) from None
