"""The arguments that all ops share, as two types: `PoolRows` and `Plan`.

From the pool and the plan down to the kernels they travel as these. Flat they are in two places alone: in
torch's schemas, which know tensors only, and in the arguments of compiled kernels. A call of an op is
flattened where it is made: op(h, *pool, *plan[:-1]), and op(h, *pool, *plan) where the op takes `offsets`.
`ops.schema` makes the schemas' text of the fields, and gives a backend in Python the two types back.

To give the ops something more:

- of each pool row (another activation, a row without D): a flag or code in `kind`. No tensor is added;
- a tensor of the pool (a scale beside each U, say): a field at the end of `PoolRows`;
- a tensor of the rows (a source for each, say): a field of `Plan` before `offsets`, which stays last, since
  the ops in place don't take it.

A field with the default None is an optional argument. All schemas have the new field then. It is read by each
backend (reference.py, triton_ops/launch.py, and in C++ python_bindings/arguments.cpp) and asked after in
`checks.check_tables`. A field that `reft_kernels.Pool` stores is made there, too, and counted in
python_bindings/standin_records.cpp. What one op alone takes, as a norm's weight, is no field but an argument
of that op's schema.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PoolRows(NamedTuple):
    """Rows of a pool, of one intervention or of many: the D, U and c of h + Uᵀ φ(D h + c), and φ.

    down, up: [P, d]; bias: [P]; kind: [P] int32, activation codes and flags (see `ops.schema`).
    """

    down: Tensor
    up: Tensor
    bias: Tensor
    kind: Tensor


class Plan(NamedTuple):
    """Which rows of h take which pool rows: all that an op needs beside h and the pool.

    rows: [n] int32; tiles: [n_tiles, 3] int32; spans: [S, 2] int32; offsets: [S + 1] int32, None within a
    backend's ops in place, which take none. `reft_kernels.ops.schema` says what they hold.
    """

    rows: Tensor
    tiles: Tensor
    spans: Tensor
    offsets: Tensor | None = None


def declared(arguments: type[PoolRows] | type[Plan]) -> str:
    """The fields as a schema's arguments, of a plan without `offsets`: "Tensor down, Tensor up, …"."""
    optional = arguments._field_defaults
    names = [name for name in arguments._fields if name != "offsets"]
    return ", ".join(f"Tensor{'?' if name in optional else ''} {name}" for name in names)
