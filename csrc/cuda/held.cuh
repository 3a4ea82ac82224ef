// What a thread holds of the rows of h that its block works on: eight neighbouring columns of one
// unit in kRows of them.
#pragma once

#include "sums.cuh"

namespace reft::cuda {

// A warp owns 64 columns of eight or sixteen rows, as the tensor cores leave their results: thread
// 4 g + t has columns 8 g to 8 g + 7 of rows 2 t and 2 t + 1 and, of sixteen rows, of the same two
// beyond the eighth.
template <int kSlots_>
struct TileLayout {
  static constexpr int kSlots = kSlots_;  // rows that a block works on at once
  static constexpr int kRows = kSlots / 4;

  static __device__ int column(int unit) { return unit * kUnit + threadIdx.x / 4 * 8; }
  static __device__ int slot(int i) { return i / 2 * 8 + threadIdx.x % 4 * 2 + i % 2; }
  // Sums one value for each row over the threads of the warp.
  static __device__ void add_up(float (&parts)[kRows], float* warp) {
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int lanes = 16; lanes > 2; lanes /= 2) parts[i] += shuffle_xor(parts[i], lanes);
      if (threadIdx.x % 32 < 4) warp[slot(i)] = parts[i];
    }
  }
};

// The rows that a thread takes into the first product of a tile: g and g + 8 of mma16.
template <int kSlots_>
struct OperandLayout {
  static constexpr int kRows = kSlots_ / 8;

  static __device__ int slot(int i) { return threadIdx.x % 32 / 4 + 8 * i; }
  // Of such rows, those of TileLayout, from the threads of the warp that have them.
  static __device__ void pass(const int (&mine)[kRows], int (&held)[2 * kRows]) {
#pragma unroll
    for (int i = 0; i < 2 * kRows; ++i) {
      held[i] = shuffle(mine[i / 2], 4 * (threadIdx.x % 4 * 2 + i % 2));
    }
  }
};

// A thread owns eight columns of every row.
template <int kSlots_>
struct RowLayout {
  static constexpr int kSlots = kSlots_;
  static constexpr int kRows = kSlots;

  static __device__ int column(int unit) { return unit * kUnit + threadIdx.x * 8; }
  static __device__ int slot(int i) { return i; }
  template <int N>
  static __device__ void add_up(float (&parts)[N], float* warp) {
    const float total = warp_total(parts);
    const int lanes = 32 / N;  // that hold the same value
    if (threadIdx.x % lanes == 0) warp[threadIdx.x % 32 / lanes] = total;
  }
};

// Rows of h by their slots in the plan's `rows`, of which there are `count`. They are asked for
// where this is made, and may be used later.
template <class Layout>
struct Places {
  int row[Layout::kRows];

  __device__ Places(const int32_t* rows, int count) {
#pragma unroll
    for (int i = 0; i < Layout::kRows; ++i) {
      row[i] = load_word_if(Layout::slot(i) < count, rows + Layout::slot(i));
    }
  }

  // −1 where there is no such row among the first `count`, or not in this h.
  __device__ int operator()(const ForwardCall& call, int count, int i) const {
    return Layout::slot(i) < count && row[i] < call.row_count ? row[i] : -1;
  }
};
// Not to be read where there is no row.
template <class T>
__device__ T* row_at(const Matrix& rows, int row) {
  return static_cast<T*>(rows.data) + offset(row, rows.stride);
}

template <class T, class Layout_, bool kAligned>
struct Held {
  using Type = T;
  using Layout = Layout_;
  static constexpr bool kWide = kAligned;

  int row[Layout::kRows];  // −1: none
  Eight<T> x[Layout::kRows];

  __device__ void load(const Matrix& h, int unit, int d) {
    const int col = Layout::column(unit);
#pragma unroll
    for (int i = 0; i < Layout::kRows; ++i) {
      x[i].template load<kAligned>(row_at<T>(h, row[i]) + col, d - col, row[i] >= 0);
    }
  }
  __device__ void store(const Matrix& to, int unit, int d) const {
    const int col = Layout::column(unit);
#pragma unroll
    for (int i = 0; i < Layout::kRows; ++i) {
      if (row[i] >= 0) x[i].template store<kAligned>(row_at<T>(to, row[i]) + col, d - col);
    }
  }
};

}  // namespace reft::cuda
