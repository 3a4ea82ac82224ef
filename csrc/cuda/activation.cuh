// φ and φ′ by the activation codes of ops/schema.py; the definitions are torch's.
#pragma once

#include <math.h>

#include "device.cuh"

namespace reft::cuda {

__device__ inline float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

// z · gate, where a gate of 0 closes it: −Inf · 0 would be NaN.
__device__ inline float gated(float z, float gate) { return gate == 0.0f ? 0.0f : z * gate; }

__device__ inline float gelu_tanh_inner(float z) {
  return 0.79788456f * (z + 0.044715f * z * z * z);  // √(2/π)
}

__device__ inline float activate(float z, int32_t kind) {
  switch (kind & kActMask) {
    case kRelu:
      return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    case kGelu:
      return gated(z, 0.5f + 0.5f * erff(z * 0.70710678f));
    case kGeluTanh:
      return gated(z, 0.5f + 0.5f * tanhf(gelu_tanh_inner(z)));
    case kSilu:
      return gated(z, sigmoid(z));
    case kSigmoid:
      return sigmoid(z);
    case kTanh:
      return tanhf(z);
    case kQuickGelu:
      return gated(z, sigmoid(1.702f * z));
    case kLeakyRelu:
      return z > 0.0f ? z : 0.01f * z;
    default:  // A case of its own makes one form of forward_tiles spill.
      return (kind & kActMask) == kStep ? (z > 0.0f ? 1.0f : 0.0f) : z;
  }
}

__device__ inline float activation_slope(float z, int32_t kind) {
  // Beyond ±50 every slope has reached its limit in float32; powers of a clipped z stay finite.
  z = z > 50.0f ? 50.0f : z < -50.0f ? -50.0f : z;
  switch (kind & kActMask) {
    case kRelu:
      return z <= 0.0f ? 0.0f : 1.0f;
    case kGelu:
      return 0.5f + 0.5f * erff(z * 0.70710678f) + z * 0.39894228f * expf(-0.5f * z * z);
    case kGeluTanh: {
      const float t = tanhf(gelu_tanh_inner(z));
      const float inner = 0.79788456f * (1.0f + 3.0f * 0.044715f * z * z);
      return 0.5f + 0.5f * t + 0.5f * z * (1.0f - t * t) * inner;
    }
    case kSilu: {
      const float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    case kSigmoid: {
      const float s = sigmoid(z);
      return s * (1.0f - s);
    }
    case kTanh: {
      const float t = tanhf(z);
      return 1.0f - t * t;
    }
    case kQuickGelu: {
      const float s = sigmoid(1.702f * z);
      return s * (1.0f + 1.702f * z * (1.0f - s));
    }
    case kLeakyRelu:
      return z > 0.0f ? 1.0f : 0.01f;
    case kStep:
      return 0.0f;
    default:
      return 1.0f;
  }
}

// c, φ and whether there is a D of pool row `r` of a range. Loaded ahead of the sum that it meets.
struct RowActivation {
  float bias = 0;
  int32_t kind = 0;
  bool live, has_down;

  __device__ RowActivation(const Pool& pool, Span span, int r) : live(r < span.rank) {
    if (live) {
      bias = pool.bias[span.first + r];
      kind = pool.kind[span.first + r];
    }
    has_down = live && !(kind & kNoProduct);
  }

  // z of a product D h; 0 · Inf must not arise where there is no D.
  __device__ float pre(float product) const { return (has_down ? product : 0.0f) + bias; }
  // φ(z) and φ′(z), 0 beyond the range.
  __device__ float operator()(float product) const {
    return live ? activate(pre(product), kind) : 0.0f;
  }
  __device__ float slope(float product) const {
    return live ? activation_slope(pre(product), kind) : 0.0f;
  }
};

}  // namespace reft::cuda
