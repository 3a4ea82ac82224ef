"""φ and φ′ for Triton, element by element, by the activation codes of `ops.schema.Act`.

The definitions are torch's. Finite z of any size gives a finite result (no Inf − Inf, no 0·Inf), ±Inf
gives the limit, and NaN stays NaN (but for the step, which makes it 0), so `tl.maximum` and `tl.clamp`,
which drop NaN, are not used.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..schema import Act

_RELU = tl.constexpr(int(Act.RELU))
_GELU = tl.constexpr(int(Act.GELU))
_GELU_TANH = tl.constexpr(int(Act.GELU_TANH))
_SILU = tl.constexpr(int(Act.SILU))
_SIGMOID = tl.constexpr(int(Act.SIGMOID))
_TANH = tl.constexpr(int(Act.TANH))
_QUICK_GELU = tl.constexpr(int(Act.QUICK_GELU))
_LEAKY_RELU = tl.constexpr(int(Act.LEAKY_RELU))
_STEP = tl.constexpr(int(Act.STEP))

_SLOPE = tl.constexpr(0.01)
_QUICK = tl.constexpr(1.702)
_CUBIC = tl.constexpr(0.044715)
_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(z):
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def _tanh(z):
    # Near 0 the exponential form cancels; the polynomial there is a fit (docs/triton.md, Activations).
    t = z * z
    q = -0.0057049518274747985
    q = q * t + 0.020639061682459214
    q = q * t - 0.053739709076862284
    q = q * t + 0.13331442147491063
    q = q * t - 0.3333328194083207
    near = z + z * (q * t)
    far = 1.0 - 2.0 / (1.0 + tl.exp(2.0 * tl.abs(z)))
    return tl.where(tl.abs(z) < 0.625, near, tl.where(z < 0, -far, far))


@triton.jit
def _normal_cdf(z):
    return 0.5 + 0.5 * tl.math.erf(z * _SQRT_HALF)


@triton.jit
def _sigmoid_slope(u):
    # s (1 − s) would cancel where s is near 1.
    t = tl.exp(-tl.abs(u))
    return t / ((1.0 + t) * (1.0 + t))


@triton.jit
def _gate_argument(code, z):
    """u of the activations that are z · sigmoid(u)."""
    u = tl.where(code == _QUICK_GELU, _QUICK * z, z)
    return tl.where(code == _GELU_TANH, _SQRT_8_OVER_PI * (z + _CUBIC * z * z * z), u)


@triton.jit
def _gate(code, z, u):
    """The factor s of the activations that are z · s(z)."""
    return tl.where(code == _GELU, _normal_cdf(z), _sigmoid(u))


@triton.jit
def _is_gated(code):
    return (code == _GELU) | (code == _GELU_TANH) | (code == _SILU) | (code == _QUICK_GELU)


@triton.jit
def activate(z, code):
    """φ(z); z float32, code int32 of a shape that broadcasts."""
    gate = _gate(code, z, _gate_argument(code, z))
    out = tl.where(_is_gated(code), tl.where(gate == 0.0, 0.0, z * gate), z)
    out = tl.where((code == _RELU) & (z <= 0), 0.0, out)
    out = tl.where(code == _SIGMOID, _sigmoid(z), out)
    out = tl.where(code == _TANH, _tanh(z), out)
    out = tl.where(code == _STEP, tl.where(z > 0, 1.0, 0.0), out)
    return tl.where((code == _LEAKY_RELU) & (z <= 0), _SLOPE * z, out)


@triton.jit
def slope(z, code):
    """φ′(z); at 0 that of ReLU is 0 and that of leaky ReLU its slope, as in torch."""
    # Beyond ±50 every slope has reached its limit in float32; powers of a clipped z stay finite.
    z = tl.where(z > 50.0, 50.0, tl.where(z < -50.0, -50.0, z))
    u = _gate_argument(code, z)
    # φ′ = s + z s′ (docs/triton.md, Activations).
    du = tl.where(code == _QUICK_GELU, _QUICK, 1.0)
    du = tl.where(code == _GELU_TANH, _SQRT_8_OVER_PI * (1.0 + 3.0 * _CUBIC * z * z), du)
    ds = tl.where(code == _GELU, _INV_SQRT_2PI * tl.exp(-0.5 * z * z), _sigmoid_slope(u) * du)
    out = tl.where(_is_gated(code), _gate(code, z, u) + z * ds, 1.0)
    out = tl.where((code == _RELU) & (z <= 0), 0.0, out)
    out = tl.where(code == _SIGMOID, _sigmoid_slope(z), out)
    out = tl.where(code == _TANH, 4.0 * _sigmoid_slope(2.0 * z), out)
    out = tl.where(code == _STEP, 0.0, out)
    return tl.where((code == _LEAKY_RELU) & (z <= 0), _SLOPE, out)
