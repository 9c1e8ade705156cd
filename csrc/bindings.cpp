// The Python module fastvae._C, and the kernels compiled once per instruction set: this file includes itself with FASTVAE_ISA
// defined for each, and the first call chooses. No libtorch: addresses, sizes and strides come from Python.

#ifdef FASTVAE_ISA

namespace fastvae {
namespace FASTVAE_ISA {
// clang-format off
#include "common.hpp"
#include "random.hpp"
#include "latent.hpp"
#include "likelihood.hpp"
#include "importance.hpp"
#include "weigh.hpp"
// clang-format on
}  // namespace FASTVAE_ISA
}  // namespace fastvae

#else

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "parallel.hpp"
#include "arguments.hpp"

// How long its vectors are is told along with the instruction set: the pragmas below do not define __AVX2__ and the like.
#define FASTVAE_ISA base
#if defined(__AVX512F__)
#define FASTVAE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTVAE_VECTOR_BYTES 32
#else
#define FASTVAE_VECTOR_BYTES 16
#endif
#include "bindings.cpp"
#undef FASTVAE_ISA
#undef FASTVAE_VECTOR_BYTES

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
#include "bindings.cpp"
#undef FASTVAE_ISA
#undef FASTVAE_VECTOR_BYTES
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

// By clang this has not been tried.
#if defined(FASTVAE_AVX2) && !defined(__clang__)
#define FASTVAE_AVX512 1
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define FASTVAE_ISA avx512
#define FASTVAE_VECTOR_BYTES 64
#include "bindings.cpp"
#undef FASTVAE_ISA
#undef FASTVAE_VECTOR_BYTES
#pragma GCC pop_options
#endif

#include "casters.hpp"

namespace py = pybind11;

namespace {

enum class Isa { base, avx2, avx512 };

// The best instruction set that this processor has and FASTVAE_ISA (for tests) does not forbid.
Isa choose_isa() {
  Isa best = Isa::base;
#ifdef FASTVAE_AVX2
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                  __builtin_cpu_supports("bmi2");
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

// Names by number.
py::tuple likelihoods() {
#define FASTVAE_NAME(name, L) #name,
  return py::make_tuple(FASTVAE_LIKELIHOODS(FASTVAE_NAME) py::none())[py::slice(0, -1, 1)];
#undef FASTVAE_NAME
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastvae's CPU kernels; call them through fastvae.ops";
  m.def("isa", [] { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base"; });
  m.def("threaded", [] { return fastvae::openmp().parallel != nullptr; });
  m.def("philox", [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed) {
    const auto w = fastvae::base::philox_words(c0, c1, c2, c3, seed);
    return py::make_tuple(w.w0, w.w1, w.w2, w.w3);
  });

  using namespace fastvae;
  using release = py::call_guard<py::gil_scoped_release>;
#define FASTVAE_DEF(name) m.def(#name, FASTVAE_PICK(name), release())
  FASTVAE_DEF(normal);
  FASTVAE_DEF(rsample_kl);
  FASTVAE_DEF(rsample_kl_backward);
  FASTVAE_DEF(rsample_log_ratio);
  FASTVAE_DEF(rsample_log_ratio_backward);
  m.attr("likelihoods") = likelihoods();
  FASTVAE_DEF(log_prob);
  m.def("log_prob_backward", [](const Rows& a, bool wide, const Tensor& grad, Output x, const Outputs& p) {
    static const auto run = FASTVAE_PICK(log_prob_backward);
    run(a, wide, {grad.along(2), x, {p[0], p[1], p[2]}});
  }, release());
  m.def("weigh", [](int likelihood, const Tensor& x, const Parameters& parameters, const Tensor& term, const Tensor& beta,
                    const How& how, int threads, Output bound, Output log_likelihood, Output weights) {
    static const auto run = FASTVAE_PICK(weigh);
    const Weighing w(likelihood, x, parameters, term, beta, how, threads);
    return run(w, w.wide(), {bound, log_likelihood, weights});
  }, release());
  m.def("weigh_backward", [](int likelihood, const Tensor& x, const Parameters& parameters, const Tensor& term, const Tensor& beta,
                             const How& how, int threads, const Tensor& bound, const Tensor& log_likelihood, Output weights,
                             Output to_term, Output to_x, const Outputs& p) {
    static const auto run = FASTVAE_PICK(weigh_backward);
    const Weighing w(likelihood, x, parameters, term, beta, how, threads);
    run(w, w.wide(), {bound, log_likelihood, weights}, {{}, to_x, {p[0], p[1], p[2]}}, to_term);
  }, release());
  FASTVAE_DEF(log_mean_exp);
  FASTVAE_DEF(log_mean_exp_backward);
}

#endif
