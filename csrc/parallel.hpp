// Threads. Compiled once, for the oldest instruction set; the kernels pass functions compiled for theirs.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastvae {

using i64 = std::int64_t;
using address = std::uintptr_t;

// A strided tensor of up to three axes as it comes from Python: address of the first element, strides in elements.
struct Matrix {
  address data = 0;
  i64 s0 = 0, s1 = 0, s2 = 0;
};

// Below this many elements a thread costs more than it saves (measured: docs/NOTES.md).
constexpr i64 kElementsPerThread = 20000;

// Runs work(context, begin, end) on contiguous parts of [0, units). A part's bounds depend on the number of threads, so
// what a unit computes must not depend on its neighbours.
inline void parallel_ranges(int threads, i64 units, i64 elements, void (*work)(void*, i64, i64), void* context) {
  const i64 wanted = std::min<i64>({static_cast<i64>(threads), units, elements / kElementsPerThread});
  // One thread opens no parallel region: it would hang in a process forked after OpenMP ran.
  if (wanted <= 1) {
    if (units > 0) work(context, 0, units);
    return;
  }
#pragma omp parallel for num_threads(static_cast<int>(wanted)) schedule(static, 1)
  for (i64 part = 0; part < wanted; ++part) {
    work(context, units * part / wanted, units * (part + 1) / wanted);
  }
}

}  // namespace fastvae
