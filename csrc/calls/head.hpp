// Likelihoods of a decoder that ends in linear layers, whose outputs are never stored: ops/head.py.
#pragma once

#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "products.hpp"
#include "targets.hpp"
#include "torch.hpp"

namespace fastvae {

// A batch of fewer rows is divided among threads by samples, which takes two passes. As in ops/head.py.
constexpr i64 kFewestRows = 8;

// x (B, X), h (K B, H), weight (m X, H) and bias (m X) of the first m outputs, up to two constant outputs,
// each a row (X) or a number, and weight (W, V) and bias (W) of each hidden layer. `fits` is false for empty
// sums, without a BLAS, and if tensors must be copied first and the caller does not; `otherwise` computes
// these.
template <class Caller>
struct HeadArguments {
  static constexpr int kConstants = kMostParameters - 1, kHidden = 3 + kConstants;
  static constexpr int kGradients = kHidden + 2 * kMostHidden;
  GivenOf<Caller> x, h, weight, bias, constant[kConstants], hidden[2 * kMostHidden];
  int products = 0, constants = 0, layers = 0, wide = kFloat32;
  i64 inner = 0;
  int dtypes[kGradients];  // of the gradients
  bool fits = false;
  HeadTensors tensors;

  HeadArguments(Caller& from, const Contract& contract)
      : x(from.given()), h(from.given()), weight(from.given()), bias(from.given()) {
    for (GivenOf<Caller>& t : constant) {
      t = from.given();
      constants += t.given;
    }
    for (GivenOf<Caller>& t : hidden) t = from.given();
    while (layers < kMostHidden && hidden[2 * layers].given) ++layers;
    contract.expect("x", x, kAnyDtype, {-1, -1});
    contract.expect("h", h, kFloating, {-1, -1});
    if (x.n0 > 0 ? h.n0 % x.n0 != 0 : h.n0 != 0)
      contract.refuse("h", h, "a multiple of x's " + std::to_string(x.n0) + " rows");
    inner = h.n1;
    for (int i = 0; i < layers; ++i) {
      const Tensor &w = hidden[2 * i], &b = hidden[2 * i + 1];
      contract.expect("a hidden weight", w, kFloating, {-1, inner});
      inner = w.n0;
      if (b.given) contract.expect("a hidden bias", b, kFloating, {inner});
    }
    contract.expect("weight", weight, kFloating, {-1, inner});
    products = x.n1 > 0 ? static_cast<int>(weight.n0 / x.n1) : 1;
    if (weight.n0 != products * x.n1 || products < 1 || products > kMostParameters - constants)
      contract.refuse("weight", weight,
                      Contract::shape({x.n1, inner}) + " for each of 1 to " +
                          std::to_string(kMostParameters - constants) + " outputs");
    if (bias.given) contract.expect("bias", bias, kFloating, {weight.n0});
    for (const Tensor& t : constant) {
      if (t.given && !Contract::fits(t, kFloating, {}) && !Contract::fits(t, kFloating, {1}))
        contract.expect("a constant output", t, kFloating, {x.n1});
    }
    for (const Tensor* t :
         std::initializer_list<const Tensor*>{&x, &h, &weight, &bias, constant, constant + 1}) {
      if (t->given && t->dtype == kFloat64) wide = kFloat64;
    }
    for (const Tensor& t : hidden) {
      if (t.given && t.dtype == kFloat64) wide = kFloat64;
    }
    for (int i = 0; i < kGradients; ++i) dtypes[i] = differentiable(i).dtype;
    fits = x.size() > 0 && h.size() > 0 && inner > 0 && blas().complete() && in_place(from);
    if (fits) lay_out();
  }
  void expect_outputs(const Contract& contract, int likelihood) const {
    if (products + constants != base::parameter_count(likelihood))
      contract.refuse("weight", weight,
                      std::string("as many layers and constants as ") + kLikelihoods[likelihood] +
                          " has outputs, " + std::to_string(base::parameter_count(likelihood)));
  }
  // @param text of each hidden layer its activation, such as "tanh elu:1.0".
  void activate(const char* text) {
    tensors.hidden = layers;
    for (int i = 0; i < layers; ++i) {
      const std::size_t length = std::strcspn(text, " "), name = std::strcspn(text, " :");
      int kind = 0;
      for (const char* known : kActivationNames) {
        if (std::strlen(known) == name && std::strncmp(known, text, name) == 0) break;
        ++kind;
      }
      if (kind == sizeof kActivationNames / sizeof *kActivationNames)
        throw std::runtime_error(std::string("fastvae._C: no activation is called ") + text);
      tensors.activation[i] = {static_cast<ActivationKind>(kind),
                               name < length ? std::strtod(text + name + 1, nullptr) : 0.0};
      text += length + (text[length] == ' ');
    }
  }
  i64 samples() const { return h.n0 / x.n0; }
  const GivenOf<Caller>& differentiable(int i) const {
    return i == 0 ? h : i == 1 ? weight : i == 2 ? bias : i < kHidden ? constant[i - 3] : hidden[i - kHidden];
  }

  // Gradients of h, weight, bias and the constants, of the dtype of the computation.
  struct Gradients {
    MadeOf<Caller> made[kGradients];
    HeadOutputs outputs{};
  };
  Gradients gradients(const Need& need) const {
    Gradients to;
    for (int i = 0; i < kGradients; ++i) {
      if (need[i] && differentiable(i).given) to.made[i] = make_like(differentiable(i), wide);
    }
    const i64 item = kItemSizes[wide];
    for (int j = 0; j < products; ++j) {
      if (to.made[1].data) to.outputs.weight[j].data = to.made[1].data + offset(j * x.n1 * inner, item);
      if (to.made[2].data) to.outputs.bias[j].data = to.made[2].data + offset(j * x.n1, item);
    }
    int j = products;
    for (int i = 0; i < kConstants; ++i) {
      if (constant[i].given) to.outputs.constant[j++].data = to.made[3 + i].data;
    }
    for (int i = 0; i < layers; ++i) {
      to.outputs.weight[kMostParameters + i].data = to.made[kHidden + 2 * i].data;
      to.outputs.bias[kMostParameters + i].data = to.made[kHidden + 2 * i + 1].data;
    }
    return to;
  }

 private:
  static address offset(i64 elements, i64 item) { return static_cast<address>(elements * item); }
  // Weights and biases as the products read them, in the dtype of the computation; false where they are not
  // and the caller makes no copies.
  bool in_place(Caller& from) {
    bool fits = in_place(from, weight, bias);
    for (int i = 0; i < layers; ++i) fits &= in_place(from, hidden[2 * i], hidden[2 * i + 1]);
    return fits;
  }
  bool in_place(Caller& from, GivenOf<Caller>& w, GivenOf<Caller>& b) {
    const auto rows = [&] { return (w.s1 == 1 || w.n1 == 1) && (w.s0 >= w.n1 || w.n0 == 1); };
    const bool biases = !b.given || (b.dtype == wide && b.is_contiguous());
    if ((w.dtype != wide || !rows() || !biases) && !from.converts()) return false;
    if (w.dtype != wide) w = from.in_dtype(w, wide);
    if (!rows()) w = from.contiguous(w);
    if (b.given && b.dtype != wide) b = from.in_dtype(b, wide);
    if (!b.is_contiguous()) b = from.contiguous(b);
    return true;
  }
  static Tensor matrix(const Tensor& w) {
    Tensor m = w;
    m.s0 = w.n0 == 1 ? w.n1 : w.s0;
    m.s1 = 1;
    return m;
  }
  void lay_out() {
    const i64 item = kItemSizes[wide];
    for (int j = 0; j < products; ++j) {
      Tensor& w = tensors.weight[j] = matrix(weight);
      w.data += offset(j * x.n1 * w.s0, item);
      w.n0 = x.n1;
      if (!bias.given) continue;
      Tensor& b = tensors.bias[j] = bias;
      b.data += offset(j * x.n1, item);
      b.n0 = x.n1;
      b.s0 = 1;
    }
    int j = products;
    for (const Tensor& t : constant) {
      if (t.given) tensors.constant[j++] = t;
    }
    for (int i = 0; i < layers; ++i) {
      tensors.weight[kMostParameters + i] = matrix(hidden[2 * i]);
      if (hidden[2 * i + 1].given) tensors.bias[kMostParameters + i] = hidden[2 * i + 1];
    }
  }
};

// x, layers, the likelihood's name -> log-likelihoods. `otherwise` is called if the arguments do not fit, or
// x lies where it cannot.
struct LinearLogProb {
  static constexpr const char* kName = "linear_log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(head_log_prob);
    from.read_otherwise();
    const Contract contract{kName};
    HeadArguments<Caller> a(from, contract);
    const int likelihood = number_of(from.text());
    a.activate(from.text());
    a.expect_outputs(contract, likelihood);
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> out = make(a.h, {a.samples(), a.x.n0}, a.wide);
    if (!from.run(kernel, likelihood, a.x, a.h, a.tensors, a.wide == kFloat64, out, from.threads()))
      return from.otherwise();
    return from.results({std::move(out)});
  }
};

// The upstream gradient, x, layers, the likelihood's name, need -> gradients of h, weight, bias and
// constants.
struct LinearLogProbBackward {
  static constexpr const char* kName = "linear_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(head_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor();
    const Contract contract{kName};
    HeadArguments<Caller> a(from, contract);
    const int likelihood = number_of(from.text());
    a.activate(from.text());
    a.expect_outputs(contract, likelihood);
    if (!a.fits) return from.otherwise();
    contract.expect("grad", grad, a.wide, {a.samples(), a.x.n0});
    const Need need = from.need();
    for (int i = 0; i < a.kGradients; ++i) {
      if (need[i] && a.differentiable(i).given && a.dtypes[i] != a.wide && !from.converts())
        return from.otherwise();
    }
    auto to = a.gradients(need);
    from.run(kernel, likelihood, grad, a.x, a.h, a.tensors, a.wide == kFloat64, to.made[0], to.outputs,
             from.threads());
    for (int i = 0; i < a.kGradients; ++i) to.made[i].convert(a.dtypes[i]);
    return from.results(std::move(to.made));
  }
};

// x, layers, term, beta, how, the likelihood's name, terms, need -> bound, mean log-likelihood, weights, and
// in the dtype of the computation the gradients of h, weight, bias and constants for an upstream gradient of
// 1, where they take no further pass. `otherwise` is called if the arguments do not fit, or x lies where it
// cannot.
struct ReduceLinear {
  static constexpr const char* kName = "reduce_linear";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(head_reduce_rows);
    from.read_otherwise();
    const Contract contract{kName};
    HeadArguments<Caller> a(from, contract);
    GivenOf<Caller> term = from.given();
    const Tensor beta = from.tensor();
    const How how = from.how();
    const int likelihood = number_of(from.text());
    a.activate(from.text());
    const bool terms = from.flag();
    const Need need = from.need();
    a.expect_outputs(contract, likelihood);
    const i64 rows = a.x.n0, samples = rows > 0 ? a.samples() : 0;
    if (term.given) contract.expect_either("term", term, kFloating, {rows > 0 ? samples : -1, rows}, {rows});
    if (beta.given) contract.expect_either("beta", beta, kFloating, {}, {rows});
    contract.expect_count("groups", how.groups);
    if (samples % how.groups != 0) contract.refuse("h", a.h, "whole groups of samples");
    if (!a.fits) return from.otherwise();
    if (term.given && term.dtype != a.wide) {
      if (!from.converts()) return from.otherwise();
      term = from.in_dtype(term, a.wide);
    }
    MadeOf<Caller> bound = how.reduction == 'n' ? make(a.h, {rows}, a.wide) : make(a.h, {}, a.wide), mean,
                   weights;
    if (terms) mean = make(a.h, {rows}, a.wide);
    if (how.log_mean_exp) weights = make(a.h, {samples, rows}, a.wide);
    const bool once = how.reduction != 'n' && !terms && rows >= kFewestRows;
    auto to = a.gradients(once ? need : Need{});
    if (!from.run(kernel, likelihood, a.x, a.h, a.tensors, term, beta, how, a.wide == kFloat64, bound, mean,
                  weights, to.made[0], to.outputs, from.threads()))
      return from.otherwise();
    MadeOf<Caller> made[3 + a.kGradients];
    made[0] = std::move(bound), made[1] = std::move(mean), made[2] = std::move(weights);
    for (int i = 0; i < a.kGradients; ++i) made[3 + i] = std::move(to.made[i]);
    return from.results(std::move(made));
  }
};

}  // namespace fastvae
