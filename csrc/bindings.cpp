// The Python module fastvae._C. No libtorch: addresses, sizes and strides come from Python.
#include <pybind11/pybind11.h>

#include <map>
#include <string>
#include <utility>

#include "calls.hpp"
#include "dispatcher.hpp"
#include "launch_key.hpp"
#include "products.hpp"
#include "python.hpp"
#include "replay.hpp"
#include "targets.hpp"

namespace py = pybind11;

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
      {"mixture_log_prob", &Kernel<MixtureLogProb, 0>::implement},
      {"mixture_log_prob_backward", &Kernel<MixtureLogProbBackward, 0>::implement},
      {"aggregate_log_prob", &Kernel<AggregateLogProb, 0>::implement},
      {"aggregate_log_prob_backward", &Kernel<AggregateLogProbBackward, 0>::implement},
      {"normal", &Kernel<Normal, 0>::implement},
      {"categorical_log_prob", &Kernel<CategoricalLogProb, 0>::implement},
      {"categorical_log_prob_backward", &Kernel<CategoricalLogProbBackward, 0>::implement},
      {"multinomial_log_prob", &Kernel<MultinomialLogProb, 0>::implement},
      {"multinomial_log_prob_backward", &Kernel<MultinomialLogProbBackward, 0>::implement},
      {"discretized_logistic_mixture_log_prob", &Kernel<ComponentsLogProb, 0>::implement},
      {"discretized_logistic_mixture_log_prob_backward", &Kernel<ComponentsLogProbBackward, 0>::implement},
      {"linear_log_prob", &Kernel<LinearLogProb, 0>::implement},
      {"linear_log_prob_backward", &Kernel<LinearLogProbBackward, 0>::implement},
      {"reduce_linear", &Kernel<ReduceLinear, 0>::implement},
      {"log_mean_exp", &Kernel<LogMeanExp, 0>::implement},
      {"log_mean_exp_backward", &Kernel<LogMeanExpBackward, 0>::implement},
  };
#define FASTVAE_NUMBER(name, L) k##L,
  enum { FASTVAE_LIKELIHOODS(FASTVAE_NUMBER) };
#undef FASTVAE_NUMBER
#define FASTVAE_KERNELS(name, L)                                               \
  all[#name "_log_prob"] = &Kernel<LogProb, k##L>::implement;                  \
  all[#name "_log_prob_backward"] = &Kernel<LogProbBackward, k##L>::implement; \
  all["reduce_" #name] = &Kernel<Reduce, k##L>::implement;                     \
  all["reduce_" #name "_backward"] = &Kernel<ReduceBackward, k##L>::implement;
  FASTVAE_LIKELIHOODS(FASTVAE_KERNELS)
#undef FASTVAE_KERNELS
  return all;
}

// Registers the kernel of fastvae::<op>.<overload> for CPU tensors. Returns false if this torch or this op
// does not support it.
bool implement(const std::string& op, const std::string& overload, const std::string& types,
               py::object in_python, py::object backend) {
  static Handle library = [&] {
    Handle made = nullptr;
    if (torch_interface().complete) torch_interface().library("fastvae", "CPU", "fastvae", 0, &made);
    return made;
  }();
  const auto all = kernels();
  const auto found = all.find(op);
  if (library == nullptr || found == all.end()) return false;
  return found->second(library, (op + "." + overload).c_str(), types.c_str(), std::move(in_python),
                       std::move(backend));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "fastvae's CPU kernels; call them through fastvae.ops";
  m.def("isa", [] { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "base"; });
  m.def("products", [] { return isa != Isa::base && fastvae::use_tiles() ? "tiles" : "blas"; });
  m.def("threaded", [] { return fastvae::openmp().parallel != nullptr; });
  m.def("philox",
        [](std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed) {
          const std::uint32_t counter[] = {c0, c1, c2, c3};
          std::uint32_t words[4];
          fastvae::base::philox_words(counter, seed, words);
          return py::make_tuple(words[0], words[1], words[2], words[3]);
        });

  using namespace fastvae;
  const std::string torch = py::module_::import("torch").attr("__file__").cast<std::string>();
  const std::string folder = torch.substr(0, torch.find_last_of('/')) + "/lib/";
  const std::string library = folder + "libtorch_cpu.so";
  openmp_library() = folder + "libomp.dylib";
  torch_interface().find(library.c_str());
  find_blas(library.c_str());
  // Reads a tensor's description in either way; for tests.
  m.def("read", [](py::handle tensor, bool by_methods) {
    const Tensor t = by_methods ? tensor_by_methods(tensor.ptr()) : tensor_of(tensor.ptr());
    return py::make_tuple(t.data, t.dtype, t.axes, t.n0, t.n1, t.n2, t.s0, t.s1, t.s2,
                          std::string(kFlaws[t.flaw]));
  });
  m.def("reads_by_handle", [] { return find_handle() >= 0; });
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
      method<Reduce>(),
      method<ReduceBackward>(),
      method<MixtureLogProb>(),
      method<MixtureLogProbBackward>(),
      method<AggregateLogProb>(),
      method<AggregateLogProbBackward>(),
      method<Normal>(),
      method<NormalOfNet>(),
      method<CategoricalLogProb>(),
      method<CategoricalLogProbBackward>(),
      method<MultinomialLogProb>(),
      method<MultinomialLogProbBackward>(),
      method<ComponentsLogProb>(),
      method<ComponentsLogProbBackward>(),
      method<LinearLogProb>(),
      method<LinearLogProbBackward>(),
      method<ReduceLinear>(),
      method<LogMeanExp>(),
      method<LogMeanExpBackward>(),
      method<EstimatesOfWeights>(),
      fast_method("described", &described),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(m.ptr(), ops) != 0) throw py::error_already_set();
  m.def("implement", &implement);
  m.def("replayed", &replayed);
  m.def("implement_on_gpu", &implement_on_gpu);
  m.def("watch", &watch);
  m.def("forget", &forget);
  m.def("count_plans", &count_plans);
}
