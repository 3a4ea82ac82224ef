#include <math.h>

#include "intervene.h"

namespace reft {
namespace {

constexpr float kLeakySlope = 0.01f;
constexpr float kQuick = 1.702f;
constexpr float kSqrtHalf = 0.70710678f;
constexpr float kInvSqrt2Pi = 0.39894228f;
// tanh approximation of GELU: 0.5 z (1 + tanh(√(2/π) (z + 0.044715 z³)))
constexpr float kTanhScale = 0.79788456f;
constexpr float kTanhCubic = 0.044715f;

float sigmoid(float z) { return 1.0f / (1.0f + expf(-z)); }

float gelu_tanh_inner(float z) { return tanhf(kTanhScale * (z + kTanhCubic * z * z * z)); }

}  // namespace

float activate(float z, int32_t kind) {
  switch (kind & kActMask) {
    case kRelu:
      return z < 0.0f ? 0.0f : z;  // NaN stays NaN
    case kGelu:
      return 0.5f * z * (1.0f + erff(z * kSqrtHalf));
    case kGeluTanh:
      return 0.5f * z * (1.0f + gelu_tanh_inner(z));
    case kSilu:
      return z * sigmoid(z);
    case kSigmoid:
      return sigmoid(z);
    case kTanh:
      return tanhf(z);
    case kQuickGelu:
      return z * sigmoid(kQuick * z);
    case kLeakyRelu:
      return z > 0.0f ? z : kLeakySlope * z;
    case kStep:
      return z > 0.0f ? 1.0f : 0.0f;  // NaN gives 0
    default:
      return z;
  }
}

float activation_slope(float z, int32_t kind) {
  switch (kind & kActMask) {
    case kRelu:
      return z <= 0.0f ? 0.0f : 1.0f;
    case kGelu:
      return 0.5f * (1.0f + erff(z * kSqrtHalf)) + z * kInvSqrt2Pi * expf(-0.5f * z * z);
    case kGeluTanh: {
      const float t = gelu_tanh_inner(z);
      const float inner = kTanhScale * (1.0f + 3.0f * kTanhCubic * z * z);
      return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * inner;
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
      const float s = sigmoid(kQuick * z);
      return s * (1.0f + kQuick * z * (1.0f - s));
    }
    case kLeakyRelu:
      return z > 0.0f ? 1.0f : kLeakySlope;
    case kStep:
      return 0.0f;
    default:
      return 1.0f;
  }
}

}  // namespace reft
