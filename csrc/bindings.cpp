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
#include "grouped.hpp"
#include "mixture.hpp"
#include "full.hpp"
#include "gemm.hpp"
#include "head.hpp"
// clang-format on
}  // namespace FASTVAE_ISA
}  // namespace fastvae

#else

#include <pybind11/pybind11.h>

#include <math.h>  // lgamma_r

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <map>
#include <new>
#include <type_traits>
#include <vector>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "parallel.hpp"
#include "arguments.hpp"
#include "products.hpp"

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

#include "python.hpp"
#include "glance.hpp"
#include "dispatcher.hpp"

namespace py = pybind11;

namespace {

enum class Isa { base, avx2, avx512 };

// The best instruction set that this processor has and FASTVAE_ISA (for tests) does not forbid.
Isa choose_isa() {
  Isa best = Isa::base;
#ifdef FASTVAE_AVX2
  __builtin_cpu_init();
  const bool v3 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
  if (v3) best = Isa::avx2;
#ifdef FASTVAE_AVX512
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
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

}  // namespace

#include "calls.hpp"
#include "checked.hpp"

namespace {

using namespace fastvae;

using Implement = bool (*)(Handle, const char*, const char*, py::object, py::object);

// The kernels for torch's dispatcher, by the op's name in fastvae.ops.
std::map<std::string, Implement> kernels() {
  std::map<std::string, Implement> all = {
      {"rsample_kl", &Kernel<RsampleKl, 0>::implement},
      {"rsample_kl_backward", &Kernel<RsampleKlBackward, 0>::implement},
      {"rsample_log_ratio", &Kernel<RsampleLogRatio, 0>::implement},
      {"rsample_log_ratio_backward", &Kernel<RsampleLogRatioBackward, 0>::implement},
      {"rsample_tril", &Kernel<RsampleTril, 0>::implement},
      {"rsample_tril_backward", &Kernel<RsampleTrilBackward, 0>::implement},
      {"log_mean_exp", &Kernel<LogMeanExp, 0>::implement},
      {"log_mean_exp_backward", &Kernel<LogMeanExpBackward, 0>::implement},
  };
#define FASTVAE_NUMBER(name, L) k##L,
  enum { FASTVAE_LIKELIHOODS(FASTVAE_NUMBER) };
#undef FASTVAE_NUMBER
#define FASTVAE_KERNELS(name, L)                                               \
  all[#name "_log_prob"] = &Kernel<LogProb, k##L>::implement;                  \
  all[#name "_log_prob_backward"] = &Kernel<LogProbBackward, k##L>::implement; \
  all["weigh_" #name] = &Kernel<Weigh, k##L>::implement;                       \
  all["weigh_" #name "_backward"] = &Kernel<WeighBackward, k##L>::implement;
  FASTVAE_LIKELIHOODS(FASTVAE_KERNELS)
#undef FASTVAE_KERNELS
  return all;
}

// Registers the kernel of fastvae::<op>.<overload> for CPU tensors; false where this torch or this op knows no such thing.
bool implement(const std::string& op, const std::string& overload, const std::string& types, py::object in_python, py::object backend) {
  static Handle library = [&] {
    Handle made = nullptr;
    if (torch_interface().complete) torch_interface().library("fastvae", "CPU", "fastvae", 0, &made);
    return made;
  }();
  const auto all = kernels();
  const auto found = all.find(op);
  if (library == nullptr || found == all.end()) return false;
  return found->second(library, (op + "." + overload).c_str(), types.c_str(), std::move(in_python), std::move(backend));
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
  const std::string torch = py::module_::import("torch").attr("__file__").cast<std::string>();
  torch_interface().find((torch.substr(0, torch.find_last_of('/')) + "/lib/libtorch_cpu.so").c_str());
  using release = py::call_guard<py::gil_scoped_release>;
#define FASTVAE_DEF(name) m.def(#name, &checked_##name, release())
  FASTVAE_DEF(normal);
  FASTVAE_DEF(grouped_log_prob);
  FASTVAE_DEF(grouped_log_prob_backward);
  FASTVAE_DEF(mixture_log_prob);
  FASTVAE_DEF(mixture_log_prob_backward);
  FASTVAE_DEF(head_log_prob);
  FASTVAE_DEF(head_log_prob_backward);
  FASTVAE_DEF(head_weigh_rows);
  // What is read of a tensor, in either way; for tests.
  m.def("read", [](py::handle tensor, bool by_methods) {
    const Tensor t = by_methods ? tensor_by_methods(tensor.ptr()) : tensor_of(tensor.ptr());
    return py::make_tuple(t.data, t.dtype, t.axes, t.n0, t.n1, t.n2, t.s0, t.s1, t.s2, std::string(kFlaws[t.flaw]));
  });
  m.def("reads_by_handle", [] { return find_handle() >= 0; });
  m.def("find_blas", &find_blas);
  add_glances(m.ptr());
  m.attr("likelihoods") = likelihoods();
  static PyMethodDef ops[] = {
      method<RsampleKl>(),
      method<RsampleKlBackward>(),
      method<RsampleLogRatio>(),
      method<RsampleLogRatioBackward>(),
      method<RsampleTril>(),
      method<RsampleTrilBackward>(),
      method<LogProb>(),
      method<LogProbBackward>(),
      method<Weigh>(),
      method<WeighBackward>(),
      method<LogMeanExp>(),
      method<LogMeanExpBackward>(),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), ops) != 0) throw py::error_already_set();
  m.def("implement", &implement);
}

#endif
