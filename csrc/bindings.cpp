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
// clang-format on
}  // namespace FASTVAE_ISA
}  // namespace fastvae

#else

#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "parallel.hpp"
#include "rows.hpp"

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

namespace py = pybind11;

namespace pybind11::detail {

// The items of a tuple from `at` on, strides, as far as there are any.
inline void read_strides(PyObject* tuple, Py_ssize_t at, fastvae::i64& s0, fastvae::i64& s1, fastvae::i64& s2) {
  fastvae::i64* strides[] = {&s0, &s1, &s2};
  for (fastvae::i64* stride : strides) {
    if (at < PyTuple_GET_SIZE(tuple)) *stride = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple, at++));
  }
  if (PyErr_Occurred()) throw error_already_set();
}

// A tuple (address, stride, ...) of up to three strides, or None for no tensor.
template <>
struct type_caster<fastvae::Matrix> {
  PYBIND11_TYPE_CASTER(fastvae::Matrix, const_name("Matrix"));

  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr())) return false;
    const Py_ssize_t size = PyTuple_GET_SIZE(source.ptr());
    if (size < 1 || size > 4) return false;
    value.data = PyLong_AsSize_t(PyTuple_GET_ITEM(source.ptr(), 0));
    read_strides(source.ptr(), 1, value.s0, value.s1, value.s2);
    return true;
  }
};

template <>
struct type_caster<fastvae::Operand> {
  PYBIND11_TYPE_CASTER(fastvae::Operand, const_name("Operand"));

  // (address, dtype, stride, ...), or None for no tensor.
  bool load(handle source, bool) {
    if (source.is_none()) return true;
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) > 5) return false;
    read(source.ptr(), 0, value);
    return true;
  }
  static void read(PyObject* tuple, Py_ssize_t at, fastvae::Operand& to) {
    to.data = PyLong_AsSize_t(PyTuple_GET_ITEM(tuple, at));
    to.dtype = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(tuple, at + 1)));
    read_strides(tuple, at + 2, to.s0, to.s1, to.s2);
  }
};

template <>
struct type_caster<fastvae::Rows> {
  PYBIND11_TYPE_CASTER(fastvae::Rows, const_name("Rows"));

  // (likelihood, samples, rows, columns, threads, x, (kind, address, dtype, stride, stride, stride), ...)
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) < 7 || PyTuple_GET_SIZE(t) > 6 + fastvae::kMostParameters) return false;
    fastvae::i64 numbers[5];
    for (Py_ssize_t i = 0; i < 5; ++i) numbers[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(t, i));
    value.likelihood = static_cast<int>(numbers[0]);
    value.samples = numbers[1], value.rows = numbers[2], value.columns = numbers[3];
    value.threads = static_cast<int>(numbers[4]);
    using Read = type_caster<fastvae::Operand>;
    Read::read(PyTuple_GET_ITEM(t, 5), 0, value.x);
    for (Py_ssize_t j = 6; j < PyTuple_GET_SIZE(t); ++j) {
      value.kind[j - 6] = static_cast<int>(PyLong_AsLong(PyTuple_GET_ITEM(PyTuple_GET_ITEM(t, j), 0)));
      Read::read(PyTuple_GET_ITEM(t, j), 1, value.p[j - 6]);
    }
    return true;
  }
};

}  // namespace pybind11::detail

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
#define FASTVAE_NAME(L) fastvae::base::L::kName,
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

  using release = py::call_guard<py::gil_scoped_release>;
#define FASTVAE_DEF(name) m.def(#name, FASTVAE_PICK(name), release())
  FASTVAE_DEF(normal);
  FASTVAE_DEF(rsample_kl);
  FASTVAE_DEF(rsample_kl_backward);
  FASTVAE_DEF(rsample_log_ratio);
  FASTVAE_DEF(rsample_log_ratio_backward);
  m.attr("likelihoods") = likelihoods();
  FASTVAE_DEF(log_prob);
  m.def("log_prob_backward", [](const fastvae::Rows& a, bool wide, const fastvae::Operand& grad, fastvae::address x,
                                fastvae::address p0, fastvae::address p1, fastvae::address p2) {
    static const auto run = FASTVAE_PICK(log_prob_backward);
    run(a, wide, {grad, x, {p0, p1, p2}});
  }, release());
  FASTVAE_DEF(log_mean_exp);
  FASTVAE_DEF(log_mean_exp_backward);
}

#endif
