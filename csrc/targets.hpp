// The kernels of every instruction set, and the choice of one at run time.
#pragma once

#include <cstdlib>
#include <cstring>

#include "kernels.hpp"

// FASTVAE_BASE_ONLY: a quick build for development, sanitisers and mutation checks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTVAE_BASE_ONLY)
#define FASTVAE_AVX2 1
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#endif
#define FASTVAE_ISA avx2
#define FASTVAE_VECTOR_BYTES 32
#include "kernels.hpp"
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// Untested with clang.
#if defined(FASTVAE_AVX2) && !defined(__clang__)
#define FASTVAE_AVX512 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FASTVAE_ISA avx512
#define FASTVAE_VECTOR_BYTES 64
#include "kernels.hpp"
#pragma GCC pop_options
#endif

namespace fastvae {

enum class Isa { base, avx2, avx512 };

// The best instruction set that this processor supports and FASTVAE_ISA (for tests) allows.
inline Isa choose_isa() {
  Isa best = Isa::base;
#ifdef FASTVAE_AVX2
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (v3) best = Isa::avx2;
#ifdef FASTVAE_AVX512
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512vl");
  if (v4) best = Isa::avx512;
#endif
  if (const char* wanted = std::getenv("FASTVAE_ISA")) {
    if (!std::strcmp(wanted, "base")) best = Isa::base;
    if (!std::strcmp(wanted, "avx2") && best == Isa::avx512) best = Isa::avx2;
  }
#endif
  return best;
}

const Isa isa = choose_isa();

template <class F>
F pick(F base, [[maybe_unused]] F avx2, [[maybe_unused]] F avx512) {
  return isa == Isa::avx512 ? avx512 : isa == Isa::avx2 ? avx2 : base;
}

#if defined(FASTVAE_AVX512)
#define FASTVAE_PICK(name) pick(&fastvae::base::name, &fastvae::avx2::name, &fastvae::avx512::name)
#elif defined(FASTVAE_AVX2)
#define FASTVAE_PICK(name) pick(&fastvae::base::name, &fastvae::avx2::name, &fastvae::avx2::name)
#else
#define FASTVAE_PICK(name) (&fastvae::base::name)
#endif

// The likelihoods' names, by number.
#define FASTVAE_NAME(name, L) #name,
constexpr const char* kLikelihoods[] = {FASTVAE_LIKELIHOODS(FASTVAE_NAME)};
#undef FASTVAE_NAME
// The numbers of their parameters.
#define FASTVAE_COUNT(name, L) base::L::kParameters,
constexpr int kParameterCounts[] = {FASTVAE_LIKELIHOODS(FASTVAE_COUNT)};
#undef FASTVAE_COUNT

inline int number_of(const char* likelihood) {
  int number = 0;
  for (const char* name : kLikelihoods) {
    if (std::strcmp(name, likelihood) == 0) return number;
    ++number;
  }
  throw std::runtime_error(std::string("fastvae: the C++ extension fastvae._C has no likelihood '") +
                           likelihood + "': it was built without csrc/likelihoods/" + likelihood +
                           ".hpp. Build it again with `pip install -e .` in fastvae's folder.");
}

}  // namespace fastvae
