// The table of all likelihoods' loops over a tile, and the masks that they take.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common.hpp"
#include "declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// A mask as integers of a number's size, with all bits set where x was observed and none elsewhere: loops
// over numbers and bytes would take twice as long. Values are cleared by them, not multiplied by 0: they may
// be NaN.
template <class C>
using Bits = std::conditional_t<sizeof(C) == 4, std::uint32_t, std::uint64_t>;
template <class C>
FASTVAE_INLINE C kept(C value, Bits<C> seen) {
  return bit_cast<C>(static_cast<Bits<C>>(bit_cast<Bits<C>>(value) & seen));
}

// Returns the number of observed elements.
template <class C>
FASTVAE_LOOP int read_bits(int n, const std::uint8_t* mask, Bits<C>* seen) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < n; ++i) {
    const bool observed = mask[i] != 0;
    seen[i] = observed ? static_cast<Bits<C>>(-1) : Bits<C>(0);
    count += observed;
  }
  return count;
}

template <class C>
FASTVAE_LOOP int count_observed(int n, const Bits<C>* seen) {
  int count = 0;
#pragma omp simd reduction(+ : count)
  for (int i = 0; i < n; ++i) count += seen[i] != 0;
  return count;
}

// Replaces what was not observed; x may be written over itself.
template <class C>
FASTVAE_LOOP void cover(int n, const Bits<C>* seen, C inside, const C* x, C* to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C given = x[i];
    to[i] = seen[i] != 0 ? given : inside;
  }
}

template <class C>
FASTVAE_LOOP void keep_observed(int n, const Bits<C>* seen, C* values) {
#pragma omp simd
  for (int i = 0; i < n; ++i) values[i] = kept(values[i], seen[i]);
}

template <class C>
FASTVAE_LOOP double sum_observed(int n, const Bits<C>* seen, const C* values) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED { return kept(values[i], seen[i]); });
}

// A tile's data, its mask and its parameters, and the values prepared from the data and from the hooked
// parameter.
template <class C>
struct TileArrays {
  const C* x;
  const Bits<C>* seen;  // only for loops that take a mask
  const C* d[kMostData];
  const C* p[kMostParameters];
  const C* q[kMostPrepared];
};

// The loops of one likelihood. The index "ready" means that the hooked parameter is already prepared. The
// common loops take a mask; the others compute all elements, and what was not observed is cleared.
template <class C>
struct Loops {
  int parameters, hooked, prepared;
  bool shared_log, checked, gradient_takes_data;
  double factor, constant;
  C low, high, inside;
  double (*sum[2][2])(int n, const TileArrays<C>& a);  // [ready][masked]
  void (*terms[2])(int n, const TileArrays<C>& a, C* out);
  using Gradients = void (*)(int n, const C* g, const TileArrays<C>& a, C* out_x, C* const* out);
  Gradients gradients[2][2][2];   // [ready][with out_x][many g]
  Gradients masked_gradients[2];  // [ready], without out_x, of one g
  // The sum of the elements' own terms, which are written to `own`, too.
  double (*prepare)(int n, const C* p, C* const* q, C* own);
  double (*data)(int n, const C* x, C* const* d, C* own);  // null if none
  // For the elements with x = 0 alone; null if not declared.
  double (*zeros[2])(int n, const TileArrays<C>& a);
  void (*zero_gradients[2])(int n, C g, const TileArrays<C>& a, C* const* out);
};

// The loops of a likelihood by its number. Defined in likelihood_loops.hpp, which units/loops_float.cpp and
// units/loops_double.cpp alone include: they are half of all code.
template <class C>
__attribute__((visibility("hidden"))) const Loops<C>& loops(int likelihood);

}  // namespace FASTVAE_ISA
}  // namespace fastvae
