// What the stand-ins (standin.cpp, which knows Python) call in the CPU library (cpu.cpp, which
// knows torch).
//
// Plain C, so that neither is built against the other: the stand-ins are given the address of the
// one table.
#pragma once

#include <cstdint>

extern "C" {

// A pool and one site's ranges in it, as the ops take them.
struct ReftPool {
  const void* down;     // [rows, d]
  const void* up;       // [rows, d]
  const float* bias;    // [rows]
  const int32_t* kind;  // [rows]
  int64_t rows;
  int64_t d;
  int32_t dtype;         // of down and up: a code of ReftDtype
  const int32_t* spans;  // [segments, 2]
  int64_t segments;
};

// The rows of one forward by segment, as the ops take them.
struct ReftRows {
  const int32_t* rows;   // [positions]
  const int32_t* tiles;  // [tiles, 3]
  int64_t positions;
  int64_t tile_count;
  int64_t count;  // rows of h
};

// Contiguous rows [count, d].
struct ReftHidden {
  void* data;
  int64_t count;
  int64_t d;
  int32_t dtype;
};

struct ReftNorm {
  const void* weight;  // [d] of h's dtype
  const void* shift;   // the same, or null
  double eps;
  int64_t norm;  // a sum of Norm
};

enum ReftDtype { kReftF32 = 0, kReftBf16 = 1, kReftF16 = 2 };

// Functions that can fail return null, or what was wrong (valid until the thread's next call);
// nothing is written then. They give the bits of the ops of the same names.
struct ReftLaunches {
  int64_t version;  // of this table
  int (*grad_enabled)();
  const char* (*intervene_)(const ReftHidden*, const ReftPool*, const ReftRows*);
  const char* (*norm)(const ReftHidden*, void* out, const ReftNorm*);
};

enum { kReftLaunchesVersion = 1 };

}  // extern "C"
