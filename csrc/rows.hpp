// What Python hands to the engine of the likelihoods (likelihood.hpp). Compiled once: no code of an instruction set is in it.
#pragma once

#include "parallel.hpp"

namespace fastvae {

constexpr int kMostParameters = 3;

// A tensor in any storage type: address of the first element, the type's number, strides in elements.
struct Operand {
  address data = 0;
  int dtype = 0;
  i64 s0 = 0, s1 = 0, s2 = 0;
};

// Of a parameter: a number for every element; a row, the same for all samples and rows; one number for each row (k, b); one in all.
enum Kind { kFull = 0, kColumn = 1, kOne = 2, kNumber = 3 };
inline bool is_shared(int kind) { return kind == kColumn || kind == kNumber; }

// A call: x (B, X), parameters (K, B, X) that may broadcast.
struct Rows {
  int likelihood;
  Operand x, p[kMostParameters];
  int kind[kMostParameters];
  i64 samples, rows, columns;
  int threads;
};

// What is asked for: gradients of x (B, X) and of parameters, contiguous, null where not wanted. Those of parameters that broadcast
// are of compute type: (X), one number, or (K, B).
struct RowGradients {
  Operand grad;  // (K, B) of compute type: arrives
  address x, p[kMostParameters];
};

}  // namespace fastvae
