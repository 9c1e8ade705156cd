// What a likelihood declares, in a file of csrc/likelihoods: scalar functions of one element.

#if defined(FASTVAE_DECLARATION_HPP) == defined(FASTVAE_TOGGLE)
#ifdef FASTVAE_DECLARATION_HPP
#undef FASTVAE_DECLARATION_HPP
#else
#define FASTVAE_DECLARATION_HPP
#endif

#include "common.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr int kMostPrepared = 4, kMostData = 2;

// What a likelihood declares, and what it leaves out.
struct Declaration {
  static constexpr int kParameters = 1;
  // The parameter of which something is computed by itself, once a tile where it broadcasts, and how many
  // numbers that is.
  static constexpr int kHooked = -1, kPrepared = 0;
  // data() tells what x adds by itself, and so many numbers of it that value() takes, and perhaps gradient():
  // once, not for each sample.
  static constexpr int kData = 0;
  static constexpr bool kGradientTakesData = false;
  // zero() is value() for x = 0, for which data() adds 0, and zero_gradient() is gradient(), which cost less:
  // where most of x is 0 the others are taken apart.
  static constexpr bool kSparse = false, kSparseGradient = false;
  // value() leaves a factor 1 + odds, odds in [0, 1], whose logarithm is to be added: elements share
  // logarithms.
  static constexpr bool kSharedLog = false;
  // log p = kFactor * sum(kConstant + value).
  static constexpr double kFactor = 1, kConstant = 0;
  // x lies between these, or is NaN.
  static constexpr double kLow = -__builtin_inf(), kHigh = __builtin_inf();
};

// One element of a tile, and what the scalar functions make of it. No arrays: with one GCC leaves a loop
// scalar.
template <class C>
struct Element {
  C x, d0, d1, p0, p1, p2, q0, q1, q2, q3;
};
template <class C>
struct Prepared {
  C own, q0, q1, q2, q3;  // what the hooked parameter adds by itself, and what is used of it
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

#endif
