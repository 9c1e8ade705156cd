// Declaration of a likelihood, in a file of csrc/likelihoods: scalar functions of one element.
#pragma once

#include "common.hpp"
#include "elementary.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr int kMostPrepared = 4, kMostData = 2;

// Defaults for the optional parts of a declaration.
struct Declaration {
  static constexpr int kParameters = 1;
  // The parameter with a prepare() hook, evaluated once per tile where the parameter broadcasts, and the
  // number of values it computes (q0 to q3); its own term is added to value(), inside of kFactor.
  static constexpr int kHooked = -1, kPrepared = 0;
  // data() computes, once for all samples, the term of x alone (own, outside of kFactor) and kData further
  // values of x (d0, d1), at least one, which value() and perhaps gradient() take.
  static constexpr int kData = 0;
  static constexpr bool kGradientTakesData = false;
  // zero() is a cheaper value() for x = 0, where data() adds 0, and zero_gradient() likewise gradient():
  // where most of x is 0, the other elements are gathered and computed separately.
  static constexpr bool kSparse = false, kSparseGradient = false;
  // value() leaves out a factor 1 + odds, odds in [0, 1], whose logarithm is to be added: elements share
  // logarithms. value_if_finite() is a cheaper value() that may be NaN where value() is infinite or the limit
  // of 0 * inf: where a sum is not finite it is computed again.
  static constexpr bool kSharedLog = false;
  // log p = kFactor * sum(kConstant + value).
  static constexpr double kFactor = 1, kConstant = 0;
  // Bounds of x, which may also be NaN.
  static constexpr double kLow = -__builtin_inf(), kHigh = __builtin_inf();
};

// The x of elements that were not observed: in the support and, for sparse likelihoods, not 0.
template <class L>
constexpr double inside_of() {
  if (L::kHigh < __builtin_inf()) return 0.5 * (L::kLow + L::kHigh);
  return L::kLow > -__builtin_inf() ? L::kLow + 1 : 1;
}

// One element of a tile, and the values that the scalar functions compute for it. No arrays: GCC leaves a
// loop with one scalar.
template <class C>
struct Element {
  C x, d0, d1, p0, p1, p2, q0, q1, q2, q3;
};
template <class C>
struct Prepared {
  C own, q0, q1, q2, q3;  // the hooked parameter's own term, and the values used from it
};
template <class C>
struct Value {
  C value, odds;
};
template <class C>
struct Slopes {
  C x, p0, p1, p2;
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
