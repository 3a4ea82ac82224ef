"""The ops as functions: one adapter (`loreft`, `scale_shift`), or many by a pool and a plan (`intervene`).

`intervene_norm_` edits and returns the norm that follows, in one pass over h.

Low level: no Hugging Face, no adapters. Serving stacks call these.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .ops.arguments import PoolRows
from .ops.checks import check_norm
from .plan import Plan, check_pool, check_rows, one_segment
from .pool import Pool
from .scale_pool import ScalePool

__all__ = ["interchange", "intervene", "intervene_", "intervene_norm_", "loreft", "scale_shift"]


_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def _check_dtype(h: Tensor) -> None:
    if h.dtype not in _DTYPES:
        raise ValueError(f"h: must be float64, float32, bfloat16 or float16, was {h.dtype}")


#: A complaint of the compiled library's about an argument, behind the function and line that made it.
_COMPLAINT = re.compile(
    r".*?[\w./]*\.(?:cpp|cu|cuh|h):\d+[,:] *"
    r"((?:h|down|up|bias|kind|rows|tiles|spans|offsets|grad|hs|weight|shift|eps|norm|scale_less_one): .*)",
    re.DOTALL,
)


def _explained(error: Exception) -> Exception:
    """What a backend says of an argument, as the ValueError that is promised; other errors as they are.

    Asked only once something went wrong: a plan is not read back before every call.
    """
    if isinstance(error, IndexError):  # torch's own, in the reference backend
        return ValueError(f"plan: names a row that h lacks, or pool rows that the pool lacks: {error}")
    found = _COMPLAINT.fullmatch(str(error))
    return ValueError(found[1]) if found else error


def _check_in_place(h: Tensor) -> None:
    """Refuses h whose rows don't lie in memory as an edit in place needs them."""
    if h.is_contiguous():
        return
    shape, strides = h.shape, h.stride()
    folded = shape[-1] == 1 or strides[-1] == 1
    rows, stride = 1, 0
    for size, step in reversed(list(zip(shape[:-1], strides[:-1]))):
        if size == 1:
            continue
        if rows == 1:
            stride = step
        folded = folded and step == stride * rows
        rows *= size
    if not folded:
        raise ValueError(
            "h: its last dimension must be contiguous and the others collapse to rows with one stride "
            "(h.view(-1, d) must work), because it is edited in place; its shape was "
            f"{list(shape)}, its strides {list(strides)}. Use intervene, or h.contiguous()"
        )
    if rows > 1 and stride < shape[-1]:
        raise ValueError(
            f"h: its rows overlap in memory (row stride {stride}, width {shape[-1]}), so it can't be edited "
            "in place"
        )


def _check(h: Tensor, pool: Pool, plan: Plan) -> None:
    if not isinstance(pool, Pool):
        raise ValueError(f"pool: must be a Pool, was a {type(pool).__name__}")
    if not isinstance(plan, Plan):
        raise ValueError(f"plan: must be a Plan, was a {type(plan).__name__}")
    if not torch.compiler.is_compiling():  # there it would be a constant, or a reason to compile anew
        check_pool(plan.spans, pool)
    _check_dtype(h)
    if h.dim() < 1 or h.shape[-1] != pool.width:
        raise ValueError(
            f"h: last dimension must be the pool's width {pool.width}, shape was {list(h.shape)}"
        )
    if h.device != pool.rows[0].device or h.device != plan.rows.device:
        raise ValueError(
            "h, pool and plan must be on one device; they are on "
            f"{h.device}, {pool.device} and {plan.rows.device}"
        )
    if pool.dtype is not h.dtype and pool.dtype is not torch.float32:
        raise ValueError(f"pool: its dtype must be h's ({h.dtype}) or torch.float32, was {pool.dtype}")


def intervene_(h: Tensor, pool: Pool, plan: Plan) -> Tensor:
    """Edits the rows of h that the plan names, in place: h ← h + Uᵀ φ(D h + c). For inference.

    >>> import reft_kernels as rk
    >>> pool = rk.Pool(width=2)  # one row that adds (1, 2): no D, φ(c) = 1
    >>> kind = torch.tensor([rk.ops.NO_PRODUCT], dtype=torch.int32)
    >>> span = pool.add(rk.Fold(torch.zeros(1, 2), torch.tensor([[1.0, 2.0]]), torch.ones(1), kind))
    >>> intervene_(torch.zeros(3, 2), pool, rk.make_plan([(span, [1])])).tolist()
    [[0.0, 0.0], [1.0, 2.0], [0.0, 0.0]]

    Args:
        h: [..., d], float32, bfloat16 or float16 (float64 on the reference backend), last dimension
            contiguous. It is returned.
        pool: folded adapters, on h's device, in h's dtype or float32; of a `ScalePool` the rows become
            s ⊙ h + v.
        plan: from `reft_kernels.make_plan`.

    Raises:
        ValueError: h does not fit the pool or plan, its rows don't lie in memory as said above, or autograd
            would need h (use `intervene` there); the plan is of another pool, or of a span that was removed
            since. On an accelerator the plan is not read back, and a row that h lacks is skipped.
    """
    _check(h, pool, plan)
    _check_in_place(h)
    if torch.is_grad_enabled() and h.requires_grad:
        raise ValueError(
            "h: requires a gradient, which an in-place edit would lose; use intervene, or no_grad"
        )
    table = ops.SCALE_SHIFT_ if isinstance(pool, ScalePool) else ops.INTERVENE_
    op = table[ops.current_backend(h.device)]
    try:
        op(h, *pool.rows, *plan[:-1])
    except (RuntimeError, IndexError) as error:
        raise _explained(error) from None
    return h


def intervene(h: Tensor, pool: Pool, plan: Plan) -> Tensor:
    """`intervene_` out of place, differentiable in h (a pool's own tensors are constants).

    >>> import reft_kernels as rk
    >>> pool, h = rk.Pool(width=2), torch.ones(3, 2, requires_grad=True)
    >>> one, kind = torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.int32)
    >>> span = pool.add(rk.Fold(-one, one, torch.zeros(1), kind))
    >>> out = intervene(h, pool, rk.make_plan([(span, [1])]))
    >>> out.tolist()
    [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]
    >>> torch.autograd.grad(out.sum(), h)[0].tolist()
    [[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]]

    Shapes and errors as `intervene_`. Returns a new contiguous tensor of h's shape and dtype.
    """
    _check(h, pool, plan)
    table = ops.SCALE_SHIFT if isinstance(pool, ScalePool) else ops.INTERVENE
    op = table[ops.current_backend(h.device)]
    try:
        return op(h, *pool.rows, *plan)
    except (RuntimeError, IndexError) as error:
        raise _explained(error) from None


def intervene_norm_(
    h: Tensor,
    pool: Pool,
    plan: Plan,
    weight: Tensor,
    shift: Tensor | None = None,
    eps: float = 1e-6,
    norm: int = ops.Norm.RMS,
) -> Tensor:
    """`intervene_`, and the norm of every row of the edited h, as a new tensor. For inference.

    >>> import reft_kernels as rk
    >>> h, plan = torch.tensor([[3.0, 4.0]]), rk.make_plan([], total_rows=1, cover=True)  # nothing is edited
    >>> intervene_norm_(h, rk.Pool(width=2), plan, torch.ones(2), eps=0.0).mul(12.5**0.5).round().tolist()
    [[3.0, 4.0]]

    The edited rows have the bits that `intervene_` gives them, and the norm reads them as they were
    written, in h's dtype; so it is the edit followed by the model's norm, in one pass over h. A row's
    norm depends, to the bit, on that row alone.

    Args:
        h, pool: as `intervene_` takes them. h is edited in place.
        plan: one that names every row of h, from `reft_kernels.make_plan` with total_rows and cover=True.
        weight: [d], contiguous, in h's dtype and on its device.
        shift: like weight; added at the end.
        eps: added to the mean square (or variance) before its root is taken.
        norm: a sum of `ops.Norm`. Llama's RMSNorm is RMS + ROUND (in float32 the two are one), Gemma's
            RMS + PLUS_ONE, torch.nn.LayerNorm CENTRED.

    Returns:
        The norm, a contiguous tensor of h's shape and dtype.

    Raises:
        ValueError: what `intervene_` raises; a weight, shift, eps or norm that does not fit; a plan with
            fewer rows than h; a row of h in no tile, or in two (on a CPU, by the native backend; on an
            accelerator the plan is not read back, and what is returned for a row that it lacks is
            undefined); or autograd would need h, weight or shift.
    """
    if isinstance(pool, ScalePool):
        raise ValueError("pool: intervene_norm_ takes no ScalePool; use intervene_ and the norm by itself")
    _check(h, pool, plan)
    _check_in_place(h)
    check_norm(h, weight, shift, eps, norm)
    rows = h.numel() // h.shape[-1] if h.shape[-1] else 0
    if plan.rows.shape[0] < rows:
        raise ValueError(
            f"plan: must name every row of h, has {plan.rows.shape[0]} of {rows}; "
            "make_plan takes total_rows and cover=True"
        )
    if torch.is_grad_enabled():
        for name, tensor in (("h", h), ("weight", weight), ("shift", shift)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(
                    f"{name}: requires a gradient, and intervene_norm_ has none; use intervene and the "
                    "norm by itself, or no_grad"
                )
    op = ops.INTERVENE_NORM_[ops.current_backend(h.device)]
    try:
        return op(h, *pool.rows, *plan[:-1], weight, shift, float(eps), int(norm))
    except (RuntimeError, IndexError) as error:
        raise _explained(error) from None


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
    _check_dtype(h)
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
        raise _explained(error) from None


def _check_one(h: Tensor, rows: Tensor | Sequence[int] | None, **tensors: tuple[Tensor, list[int]]) -> int:
    """Refuses what does not fit h [..., d]; tensors: (tensor, its shape) by name. Returns the rows of h."""
    _check_dtype(h)
    if h.dim() < 1 or h.shape[-1] < 1:
        raise ValueError(f"h: must be [..., d] with d ≥ 1, shape was {list(h.shape)}")
    for name, (tensor, shape) in tensors.items():
        if list(tensor.shape) != shape:
            raise ValueError(f"{name}: must be {shape} to fit h {list(h.shape)}, was {list(tensor.shape)}")
        if tensor.device != h.device:
            raise ValueError(f"{name}: is on {tensor.device}, but h is on {h.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"{name}: must be floating, was {tensor.dtype}")
    count = h.numel() // h.shape[-1]
    if rows is not None and not torch.compiler.is_compiling():
        check_rows(rows, count)
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
        raise _explained(error) from None


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

    By torch's own operations on every backend, with sums in float32 at least: the ops read one c for all rows
    of a segment, and here each row has its own.

    Args:
        h: [..., d].
        source: a source for each edited row, in the order of `rows`: states [n, d], or what R makes of
            them, [n, r]. If r is d it is taken as states.
        R: [r, d] with orthonormal rows (not checked: any R is computed with).
        rows: flat indices into h.reshape(-1, d), each at most once; None for all rows, of which there are
            n then. Checked as those of `loreft`, but one that is out of range is an error of the device's.
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
    flat = h.reshape(count, d)
    wide = torch.promote_types(h.dtype, torch.float32)
    index = None if rows is None else torch.as_tensor(rows, dtype=torch.int64, device=h.device)
    x, basis, origin = (flat if index is None else flat[index]).to(wide), R.to(wide), source.to(wide)
    # Of states the difference is taken first: near the source it would cancel behind the product.
    change = (origin - x) @ basis.T if width == d else origin - x @ basis.T
    if mask is not None:
        change = change * mask.to(wide)
    edited = (x + change @ basis).to(h.dtype)
    out = edited if index is None else flat.index_copy(0, index, edited)
    return out.reshape(h.shape).contiguous()
