// Types of a caller, shared by the ops: Python (python.hpp) or torch's dispatcher
// (dispatcher.hpp).
#pragma once

#include "arguments.hpp"

namespace fastvae {

template <class Caller>
using GivenOf = typename Caller::Given;
template <class Caller>
using MadeOf = typename Caller::Made;
template <class Caller>
using ResultsOf = typename Caller::Results;

// z (K, B, D), or (K B, D).
template <class Caller>
MadeOf<Caller> make_z(const GivenOf<Caller>& mu, i64 samples, bool flat, int dtype) {
  if (!flat) return make(mu, {samples, mu.n0, mu.n1}, dtype);
  return samples == 1 ? make_like(mu, dtype) : make(mu, {samples * mu.n0, mu.n1}, dtype);
}

}  // namespace fastvae
