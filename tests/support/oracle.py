"""What the ops must compute, written from the formula alone, one row and one pool row at a time, in float64.

h + Σ_j φ_j(z_j) U_j with z_j = D_j · h + c_j, or z_j = c_j where the pool row has no product.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from reft_kernels.ops import ACT_MASK, NO_PRODUCT, Norm

#: Unit roundoff: half the distance from 1 to the next number.
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}

#: Half the smallest subnormal: the absolute error of a rounding near zero.
FLOOR = {torch.float64: 0.0, torch.float32: 2.0**-150, torch.float16: 2.0**-25, torch.bfloat16: 2.0**-134}


def between(dtype: torch.dtype) -> float:
    """What a factor may lose on the way where h has `dtype`: two TF32 halves hold 21 bits of a float32."""
    return 2.0**-20 if dtype in (torch.float16, torch.bfloat16) else 0.0


#: Codes of `ACTIVATIONS` that are asked after by name.
STEP = 9

#: Steepest slope of any activation (GELU's, 1.13), rounded up.
STEEPEST = 1.2


def _sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z)) if z > -700 else 0.0


#: (φ, φ′) by activation code. Analytic slopes, so that gradients are checked against no other autograd.
ACTIVATIONS = {
    0: (lambda z: z, lambda z: 1.0),
    1: (lambda z: max(z, 0.0), lambda z: float(z > 0)),
    2: (
        lambda z: z * 0.5 * (1 + math.erf(z / math.sqrt(2))),
        lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))) + z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi),
    ),
    3: (
        lambda z: 0.5 * z * (1 + math.tanh(_inner(z))),
        lambda z: (
            0.5 * (1 + math.tanh(_inner(z))) + 0.5 * z * (1 - math.tanh(_inner(z)) ** 2) * _inner_slope(z)
        ),
    ),
    4: (lambda z: z * _sigmoid(z), lambda z: _sigmoid(z) * (1 + z * (1 - _sigmoid(z)))),
    5: (_sigmoid, lambda z: _sigmoid(z) * (1 - _sigmoid(z))),
    6: (math.tanh, lambda z: 1 - math.tanh(z) ** 2),
    7: (
        lambda z: z * _sigmoid(1.702 * z),
        lambda z: _sigmoid(1.702 * z) * (1 + 1.702 * z * (1 - _sigmoid(1.702 * z))),
    ),
    8: (lambda z: z if z > 0 else 0.01 * z, lambda z: 1.0 if z > 0 else 0.01),
    9: (lambda z: float(z > 0), lambda z: 0.0),
}


def _inner(z: float) -> float:
    return math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)


def _inner_slope(z: float) -> float:
    return math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * z**2)


def wide(t: Tensor) -> np.ndarray:
    return t.detach().cpu().double().numpy()


class Intervention:
    """The pool rows of one span in float64, with errors that fp32 sums may make along the way."""

    def __init__(self, pool: tuple[Tensor, Tensor, Tensor, Tensor], first: int, rank: int) -> None:
        down, up, bias, kind = (t[first : first + rank] for t in pool)
        self.kind = kind.cpu().numpy()
        self.has_product = (self.kind & NO_PRODUCT) == 0
        self.down = np.where(self.has_product[:, None], wide(down), 0.0)
        self.up, self.bias = wide(up), wide(bias)

    def _each(self, which: int, z: np.ndarray) -> np.ndarray:
        return np.array([ACTIVATIONS[int(k) & ACT_MASK][which](float(x)) for k, x in zip(self.kind, z)])

    def pre(self, x: np.ndarray) -> np.ndarray:
        return np.array([self.bias[j] + float(np.dot(self.down[j], x)) for j in range(len(self.kind))])

    def pre_error(self, x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
        sums = UNIT[torch.float64 if dtype is torch.float64 else torch.float32]
        return (sums * (len(x) + 4) + between(dtype)) * (np.abs(self.down) @ np.abs(x) + np.abs(self.bias))

    def forward(self, x: np.ndarray, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray]:
        """The edited row, and how far a right answer in `dtype` may be from it."""
        sums = UNIT[torch.float64 if dtype is torch.float64 else torch.float32]
        z = self.pre(x)
        v = self._each(0, z)
        y = x + sum((v[j] * self.up[j] for j in range(len(v))), np.zeros_like(x))
        # An activation may cost a few more roundings.
        z_error = self.pre_error(x, dtype)
        v_error = STEEPEST * z_error + (8 * sums + between(dtype)) * (np.abs(v) + np.abs(z))
        # A step is exact, or where z is too near to its edge to tell, anywhere from 0 to 1.
        v_error = np.where((self.kind & ACT_MASK) == STEP, (np.abs(z) <= z_error).astype(float), v_error)
        terms = np.abs(x) + np.abs(v) @ np.abs(self.up)
        error = v_error @ np.abs(self.up) + sums * (len(v) + 2) * terms
        return y, error + UNIT[dtype] * (np.abs(y) + error) + FLOOR[dtype]

    def backward(self, x: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
        """Gradients of one row: dh [d], ddown and dup [r, d], dbias [r]."""
        z = self.pre(x)
        p = self._each(1, z) * (self.up @ g)
        return {
            "h": g + p @ self.down,
            "down": np.outer(p, x) * self.has_product[:, None],
            "up": np.outer(self._each(0, z), g),
            "bias": p,
        }

    def backward_scale(self, x: np.ndarray, g: np.ndarray) -> dict[str, np.ndarray]:
        """Sizes that the errors of `backward` are measured in (sums of absolute values)."""
        z = np.abs(self.down) @ np.abs(x) + np.abs(self.bias)
        p = (1 + z) * (np.abs(self.up) @ np.abs(g))  # slopes change with z no faster than by 1 per unit
        return {
            "h": np.abs(g) + p @ np.abs(self.down),
            "down": np.outer(p, np.abs(x)),
            "up": np.outer(z + 1, np.abs(g)),
            "bias": p,
        }


def forward(case) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Flat row of h → (value, allowed error), for the rows that the case's plan edits."""
    flat = wide(case.h.reshape(-1, case.h.shape[-1]))
    result = {}
    for segment in case.segments:
        if segment.rank:
            intervention = Intervention(case.pool, segment.first, segment.rank)
            for row in segment.rows:
                if row >= 0:
                    result[row] = intervention.forward(flat[row], case.h.dtype)
    return result


def norm(x: np.ndarray, weight, shift, eps: float, norm: int, dtype: torch.dtype):
    """The norm of one row (its weight and shift in float64), and how far a right answer may be from it.

    ROUND counts as an error and is not made: a number at the edge may be rounded either way.
    """
    sums = UNIT[torch.float64 if dtype is torch.float64 else torch.float32]
    terms = len(x) + 4
    mean = float(np.mean(x)) if norm & Norm.CENTRED else 0.0
    c = x - mean
    c_error = sums * (terms * np.mean(np.abs(x)) + np.abs(c)) if norm & Norm.CENTRED else np.zeros_like(x)
    square = float(np.mean(c**2))
    off = float(np.mean(2 * np.abs(c) * c_error + c_error**2)) + sums * terms * square
    low, inverse, high = ((max(s, 0.0) + eps) ** -0.5 for s in (square + off, square, square - off))
    inverse_error = max(high - inverse, inverse - low) + 4 * sums * inverse
    y = c * inverse
    error = np.abs(c) * inverse_error + c_error * (inverse + inverse_error) + sums * np.abs(y)
    if norm & Norm.ROUND:
        error += UNIT[dtype] * (np.abs(y) + error) + FLOOR[dtype]
    scale = weight + 1 if norm & Norm.PLUS_ONE else weight
    y, error = y * scale, error * np.abs(scale) + 2 * sums * np.abs(y * scale)
    if shift is not None:
        y = y + shift
        error += sums * np.abs(y)
    return y, error + UNIT[dtype] * (np.abs(y) + error) + FLOOR[dtype]


def backward(case, grad: Tensor) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Gradients of the pool and of h ("h" [T, d]), and the sizes that errors are measured in."""
    flat, g = wide(case.h.reshape(-1, case.h.shape[-1])), wide(grad.reshape(-1, grad.shape[-1]))
    shapes = {"h": flat.shape, "down": case.down.shape, "up": case.up.shape, "bias": case.bias.shape}
    total = {name: np.zeros(shape) for name, shape in shapes.items()}
    scale = {name: np.zeros(shape) for name, shape in shapes.items()}
    for segment in case.segments:
        span = slice(segment.first, segment.first + segment.rank)
        if not segment.rank:
            continue
        intervention = Intervention(case.pool, segment.first, segment.rank)
        for row in (row for row in segment.rows if row >= 0):
            for into, parts in (
                (total, intervention.backward(flat[row], g[row])),
                (scale, intervention.backward_scale(flat[row], g[row])),
            ):
                into["h"][row] = parts["h"]
                for name in ("down", "up", "bias"):
                    into[name][span] += parts[name]
    return total, scale
