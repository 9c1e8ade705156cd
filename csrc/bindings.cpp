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
#include "glance.hpp"

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

// Calls a kernel while other threads of Python go on.
template <class F, class... A>
auto released(F run, const A&... arguments) {
  const py::gil_scoped_release release;
  return run(arguments...);
}

using namespace fastvae;

Made make_z(const Given& mu, const Draw& draw, int dtype) {
  if (!draw.flat) return make(mu, {draw.samples, mu.n0, mu.n1}, dtype);
  return draw.samples == 1 ? make_like(mu, dtype) : make(mu, {draw.samples * mu.n0, mu.n1}, dtype);
}

// Gradients of q and p.
struct LatentMade {
  Made mu, logvar, prior_mu, prior_logvar;
  LatentMade(const Given& like, const Need& need)
      : mu(need[0] ? make_like(like) : Made()), logvar(need[1] ? make_like(like) : Made()), prior_mu(need[2] ? make_like(like) : Made()),
        prior_logvar(need[3] ? make_like(like) : Made()) {}
  py::tuple objects() const { return py::make_tuple(mu.object, logvar.object, prior_mu.object, prior_logvar.object); }
};

// x, the likelihood's parameters, term, beta, how and one thing more, from this position on.
struct WeighArguments {
  int likelihood, count = 0;
  Given x, parameter[kMostParameters], term;
  Tensor beta;
  How how;
  PyObject* last;
  int wide, term_dtype;
  py::object widened;  // the term in the dtype of the computation, if it came in another

  WeighArguments(const char* name, const py::args& given, Py_ssize_t first) : likelihood(number_of(name)) {
    PyObject* const* at = &PyTuple_GET_ITEM(given.ptr(), first);
    const Py_ssize_t outputs = PyTuple_GET_SIZE(given.ptr()) - first - 5;
    if (outputs < 1 || outputs > kMostParameters) throw py::type_error("fastvae._C: weigh takes one to three parameters");
    x = Given(*at++);
    wide = x.wide();
    for (; count < outputs; ++count) {
      parameter[count] = Given(*at++);
      wide = parameter[count].dtype == kFloat64 ? kFloat64 : wide;
    }
    term = Given(*at++);
    term_dtype = term.dtype;
    if (term.data && term.dtype != wide) {
      widened = py::handle(term.object).attr("to")(py::handle(torch_names().dtypes[wide]));
      term = Given(widened.ptr());
    }
    beta = tensor_of(*at++);
    how = py::cast<How>(py::handle(*at++));
    last = *at;
  }
  Weighing weighing() const {
    const Tensor outputs[kMostParameters] = {parameter[0], parameter[1], parameter[2]};
    return {likelihood, x, count, outputs, term, beta, how, number_of_threads()};
  }
};

// x (B, X) and parameters (B, X) or (K, B, X) in full, from this position on; `fits` says whether they are.
struct FullRows {
  Given x, parameter[kMostParameters];
  int count = 0, wide = kFloat32;
  bool fits = false;
  Rows rows{};

  FullRows(const char* likelihood, const py::args& given, Py_ssize_t first, Py_ssize_t outputs) {
    const auto at = [&](Py_ssize_t i) { return PyTuple_GET_ITEM(given.ptr(), first + i); };
    if (outputs < 1 || outputs > kMostParameters || Shape(at(0)).axes != 2 || Shape(at(1)).axes > 3) return;
    x = Given(at(0));
    rows.likelihood = number_of(likelihood), rows.threads = number_of_threads(), rows.x = x;
    wide = x.wide();
    for (; count < outputs; ++count) {
      const Shape shape(at(count + 1));
      if (shape.axes != 2 && shape.axes != 3) return;
      const Given p(at(count + 1));
      const Tensor t = p.along(3), full = parameter[0].along(3);
      if (t.n1 != x.n0 || t.n2 != x.n1 || (count > 0 && (p.axes != parameter[0].axes || t.n0 != full.n0))) return;
      parameter[count] = p, rows.p[count] = t, rows.kind[count] = kFull;
      if (p.dtype == kFloat64) wide = kFloat64;
    }
    rows.samples = rows.p[0].n0, rows.rows = x.n0, rows.columns = x.n1;
    fits = parameter[0].size() > 0;
  }
  Made per_row() const { return parameter[0].axes == 2 ? make(x, {rows.rows}, wide) : make(x, {rows.samples, rows.rows}, wide); }
};

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
  m.def("rsample_kl", [](const Given& mu, const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar, Output seed,
                         const Draw& draw, bool per_dimension, bool keep_slope) {
    static const auto run = FASTVAE_PICK(rsample_kl);
    const Made z = make_z(mu, draw, mu.dtype), slope = keep_slope ? make_z(mu, draw, mu.wide()) : Made();
    const Made kl = per_dimension ? make_like(mu, mu.wide()) : make(mu, {mu.n0}, mu.wide());
    released(run, z, slope, kl, mu, logvar, prior_mu, prior_logvar, draw, seed, number_of_threads(), per_dimension);
    return py::make_tuple(z.object, kl.object, slope.object);
  });
  m.def("rsample_kl_backward",
        [](const Tensor& grad_z, const Tensor& grad_kl, const Tensor& slope, const Given& mu, const Tensor& logvar, const Tensor& prior_mu,
           const Tensor& prior_logvar, py::handle /*seed*/, const Draw& draw, const Need& need) {
          static const auto run = FASTVAE_PICK(rsample_kl_backward);
          const LatentMade to(mu, need);
          released(run, to.mu, to.logvar, to.prior_mu, to.prior_logvar, grad_z, grad_kl, slope, mu, logvar, prior_mu, prior_logvar, draw,
                   number_of_threads());
          return to.objects();
        });
  m.def("rsample_log_ratio", [](const Given& mu, const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar, Output seed,
                                const Draw& draw, py::handle /*estimator*/, bool chunk, bool keep_slope) {
    static const auto run = FASTVAE_PICK(rsample_log_ratio);
    const Made z = make_z(mu, draw, mu.dtype), slope = keep_slope ? make_z(mu, draw, mu.wide()) : Made();
    const Made log_ratio = make(mu, {draw.samples, mu.n0}, mu.wide()), whole = chunk ? make(mu, {mu.n0}, mu.wide()) : Made();
    if (whole.data) std::memset(reinterpret_cast<void*>(whole.data), 0, static_cast<std::size_t>(mu.n0) * (mu.dtype == kFloat64 ? 8 : 4));
    released(run, z, slope, log_ratio, mu, logvar, prior_mu, prior_logvar, draw, seed, number_of_threads());
    return py::make_tuple(z.object, log_ratio.object, whole.object, slope.object);
  });
  m.def("rsample_log_ratio_backward", [](const Tensor& grad_z, const Tensor& grad_log_ratio, const Tensor& weight, const Tensor& slope,
                                         const Given& mu, const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar,
                                         py::handle /*seed*/, const Draw& draw, bool path, const Need& need) {
    static const auto run = FASTVAE_PICK(rsample_log_ratio_backward);
    const LatentMade to(mu, need);
    released(run, to.mu, to.logvar, to.prior_mu, to.prior_logvar, grad_z, grad_log_ratio, weight, slope, mu, logvar, prior_mu, prior_logvar,
             draw, number_of_threads(), path);
    return to.objects();
  });
  add_glances(m.ptr());
  m.attr("likelihoods") = likelihoods();
  FASTVAE_DEF(log_prob);
  m.def(
      "log_prob_backward",
      [](const Rows& a, bool wide, const Tensor& grad, Output x, const Outputs& p) {
        static const auto run = FASTVAE_PICK(log_prob_backward);
        run(a, wide, {grad.along(2), x, {p[0], p[1], p[2]}});
      },
      release());
  // x, parameters -> log-likelihoods. What is not in full, or has an x that lies where it cannot, is left to `otherwise`.
  m.def("full_log_prob", [](const char* likelihood, py::handle otherwise, const py::args& given) -> py::object {
    static const auto run = FASTVAE_PICK(log_prob);
    const FullRows a(likelihood, given, 0, PyTuple_GET_SIZE(given.ptr()) - 1);
    if (!a.fits) return otherwise(*given);
    const Made out = a.per_row();
    return released(run, a.rows, a.wide == kFloat64, out) ? out.object : py::object(otherwise(*given));
  });
  // What arrives, x, parameters, need -> gradients of x and of the parameters.
  m.def("full_log_prob_backward", [](const char* likelihood, py::handle otherwise, const py::args& given) -> py::object {
    static const auto run = FASTVAE_PICK(log_prob_backward);
    const Py_ssize_t outputs = PyTuple_GET_SIZE(given.ptr()) - 3;
    const FullRows a(likelihood, given, 1, outputs);
    const Shape arrived(PyTuple_GET_ITEM(given.ptr(), 0));
    if (!a.fits || arrived.axes != a.parameter[0].axes - 1) return otherwise(*given);
    const Tensor grad = tensor_of(PyTuple_GET_ITEM(given.ptr(), 0));
    const Need need = py::cast<Need>(py::handle(PyTuple_GET_ITEM(given.ptr(), outputs + 2)));
    const Made to_x = need[0] ? make_like(a.x) : Made();
    Made to[kMostParameters];
    for (int j = 0; j < a.count; ++j) {
      if (need[j + 1]) to[j] = make_like(a.parameter[j]);
    }
    released(run, a.rows, a.wide == kFloat64, RowGradients{grad.along(2), to_x, {to[0], to[1], to[2]}});
    py::tuple grads(a.count + 1);
    grads[0] = to_x.object;
    for (int j = 0; j < a.count; ++j) grads[j + 1] = to[j].object;
    return std::move(grads);
  });
  // x, parameters, term, beta, how, terms -> bound, mean log-likelihood, weights. Where there is nothing to sum over, or x lies where
  // it cannot, `otherwise` is called with them.
  m.def("weigh", [](const char* likelihood, py::handle otherwise, const py::args& given) -> py::object {
    static const auto run = FASTVAE_PICK(weigh);
    const WeighArguments a(likelihood, given, 0);
    if (a.parameter[0].size() == 0) return otherwise(*given);
    const Weighing w = a.weighing();
    const Made bound = w.scale == 0 ? make(a.x, {a.x.n0}, a.wide) : make(a.x, {}, a.wide);
    const Made log_likelihood = a.last == Py_True ? make(a.x, {a.x.n0}, a.wide) : Made();
    const Made weights = w.log_mean_exp ? make(a.x, {w.rows.samples, w.rows.rows}, a.wide) : Made();
    if (!released(run, w, w.wide(), WeighingResults{bound, log_likelihood, weights})) return otherwise(*given);
    return py::make_tuple(bound.object, log_likelihood.object, weights.object);
  });
  // What arrives at the bound and at the mean log-likelihood, weights, x, parameters, term, beta, how, need -> gradients of x,
  // parameters, term.
  m.def("weigh_backward", [](const char* likelihood, py::handle otherwise, const py::args& given) -> py::object {
    static const auto run = FASTVAE_PICK(weigh_backward);
    const WeighArguments a(likelihood, given, 3);
    if (a.parameter[0].size() == 0) return otherwise(*given);
    const Weighing w = a.weighing();
    const Need need = py::cast<Need>(py::handle(a.last));
    const Made to_x = need[0] ? make_like(a.x) : Made(), to_term = need[a.count + 1] ? make_like(a.term, a.wide) : Made();
    Made to[kMostParameters];
    for (int j = 0; j < a.count; ++j) {
      // Those of parameters that broadcast are sums.
      if (need[j + 1]) to[j] = make_like(a.parameter[j], w.rows.kind[j] == kFull ? a.parameter[j].dtype : a.wide);
    }
    const auto at = [&](Py_ssize_t i) { return tensor_of(PyTuple_GET_ITEM(given.ptr(), i)); };
    released(run, w, w.wide(), WeighingGradients{at(0), at(1), at(2).data}, RowGradients{{}, to_x, {to[0], to[1], to[2]}}, to_term);
    py::tuple grads(a.count + 2);
    grads[0] = to_x.object;
    for (int j = 0; j < a.count; ++j) grads[j + 1] = to[j].as(a.parameter[j].dtype);
    grads[a.count + 1] = to_term.as(a.term_dtype);
    return std::move(grads);
  });
  m.def("log_mean_exp", [](const Given& log_w) {
    static const auto run = FASTVAE_PICK(log_mean_exp);
    const auto column = [&] { return make(log_w, {log_w.n1}, log_w.wide()); };
    const Made bound = column(), maximum = column(), total = column();
    released(run, bound, maximum, total, log_w, number_of_threads());
    return py::make_tuple(bound.object, maximum.object, total.object);
  });
  m.def("log_mean_exp_backward", [](const Tensor& grad, const Given& log_w, Output maximum, Output total) {
    static const auto run = FASTVAE_PICK(log_mean_exp_backward);
    const Made to = make_like(log_w);
    released(run, to, grad, log_w, maximum, total, number_of_threads());
    return to.object;
  });
}

#endif
