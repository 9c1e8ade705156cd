// Arguments that Python passes to the kernels. Compiled once: contains no code of an instruction set.
#pragma once

#include <cstring>
#include <initializer_list>
#include <stdexcept>
#include <string>

#include "parallel.hpp"

namespace fastvae {

constexpr int kMostParameters = 3;

// Integers are allowed for data only; bool is read as uint8.
enum Dtype { kFloat32, kFloat64, kBFloat16, kFloat16, kUInt8, kInt8, kInt16, kInt32, kInt64, kBool, kDtypes };
constexpr const char* kDtypeNames[] = {"float32",
                                       "float64",
                                       "bfloat16",
                                       "float16",
                                       "uint8",
                                       "int8",
                                       "int16",
                                       "int32",
                                       "int64",
                                       "bool",
                                       "of a dtype that no kernel reads"};

// Reason why a kernel must not read a tensor.
enum Flaw { kSound, kNoTensor, kNotOnCpu, kNotStrided, kUnknownDtype, kFreed };
constexpr const char* kFlaws[] = {"",
                                  "is not a tensor",
                                  "is not on the CPU",
                                  "is not a dense strided tensor",
                                  "has a dtype that no kernel reads",
                                  "reaches beyond its storage, which was freed or made smaller"};

// A tensor of up to three axes in any storage type: address of the first element (null for no tensor), the
// type's number, strides in elements, and how long the axes are; of more axes only their number.
struct Tensor {
  address data = 0;
  int dtype = 0;
  i64 s0 = 0, s1 = 0, s2 = 0;
  int axes = 0;
  i64 n0 = 1, n1 = 1, n2 = 1;
  bool given = false;  // false for None
  Flaw flaw = kSound;

  Tensor with(Flaw its) const {
    Tensor t = *this;
    t.flaw = its;
    return t;
  }
  // A stack of n matrices, whose rows may come one after the other in a matrix.
  Tensor stacked(i64 n) const {
    if (axes != 2) return *this;
    Tensor t = *this;
    t.axes = 3;
    t.n0 = n;
    t.n1 = n0 / n;
    t.n2 = n1;
    t.s0 = t.n1 * s0;
    t.s1 = s0;
    t.s2 = s1;
    return t;
  }
  // Returns this tensor with `number` axes: the missing ones are prepended with stride 0.
  Tensor along(int number) const {
    Tensor t = *this;
    for (; t.axes < number; ++t.axes) {
      t.s2 = t.s1;
      t.s1 = t.s0;
      t.s0 = 0;
      t.n2 = t.n1;
      t.n1 = t.n0;
      t.n0 = 1;
    }
    return t;
  }
  i64 size() const { return n0 * n1 * n2; }
  bool is_contiguous() const {
    i64 stride = 1;
    const i64 n[] = {n0, n1, n2}, s[] = {s0, s1, s2};
    for (int i = axes; i-- > 0; stride *= n[i]) {
      if (n[i] != 1 && s[i] != stride) return false;
    }
    return true;
  }
  // The dtype of the computation.
  int wide() const { return dtype == kFloat64 ? kFloat64 : kFloat32; }
};

// Validates the arguments of an op. Raises ValueError, before a kernel reads anything.
constexpr int kFloating = -1, kAnyDtype = -2;  // in place of a dtype
struct Contract {
  const char *op, *likelihood = nullptr;

  static bool fits(const Tensor& t, int dtype, std::initializer_list<i64> sizes, bool contiguous = false) {
    const bool right = dtype == kAnyDtype || (dtype == kFloating ? t.dtype <= kFloat16 : t.dtype == dtype);
    if (!t.given || t.flaw != kSound || !right || t.axes != static_cast<int>(sizes.size())) return false;
    const i64 n[] = {t.n0, t.n1, t.n2};
    int i = 0;
    for (const i64 size : sizes) {
      if (size >= 0 && size != n[i]) return false;  // -1: any
      ++i;
    }
    return !contiguous || t.size() == 0 || t.is_contiguous();
  }
  void expect(const char* name, const Tensor& t, int dtype, std::initializer_list<i64> sizes,
              bool contiguous = false) const {
    if (!fits(t, dtype, sizes, contiguous))
      refuse(name, t, described(dtype, sizes) + (contiguous ? ", contiguous" : ""));
  }
  // Of one shape, or of another.
  void expect_either(const char* name, const Tensor& t, int dtype, std::initializer_list<i64> sizes,
                     std::initializer_list<i64> others) const {
    if (!fits(t, dtype, sizes) && !fits(t, dtype, others))
      refuse(name, t, described(dtype, sizes) + " or " + shape(others));
  }
  void expect_count(const char* name, i64 value, i64 least = 1) const {
    if (value < least)
      throw std::invalid_argument(subject(name) + " is " + std::to_string(value) + "; expected at least " +
                                  std::to_string(least));
  }
  // The dtype of a computation.
  void expect_dtype(int dtype) const {
    if (dtype != kFloat32 && dtype != kFloat64)
      throw std::invalid_argument(subject("dtype") + " is " + kDtypeNames[dtype] +
                                  "; expected float32 or float64");
  }
  [[noreturn]] void refuse(const char* name, const Tensor& t, const std::string& expected) const {
    std::string found = !t.given ? "is None" : std::string("is ") + kDtypeNames[t.dtype] + " " + shape(t);
    if (t.given && t.flaw != kSound)
      found = std::string(kFlaws[t.flaw]) + (t.flaw == kNoTensor ? "" : " (" + shape(t) + ")");
    throw std::invalid_argument(subject(name) + " " + found + "; expected " + expected +
                                ". The functions of fastvae.ops promote, broadcast and validate what they "
                                "are given: call the op by them");
  }
  static std::string shape(std::initializer_list<i64> sizes) {
    std::string text = "[";
    for (const i64 size : sizes)
      text += (text.size() > 1 ? ", " : "") + (size < 0 ? std::string("*") : std::to_string(size));
    return text + "]";
  }

 private:
  std::string subject(const char* name) const {
    return std::string("fastvae::") + op + (likelihood ? std::string(" of ") + likelihood : std::string()) +
           ": " + name;
  }
  static std::string described(int dtype, std::initializer_list<i64> sizes) {
    const char* kind = dtype == kFloating   ? "floating-point"
                       : dtype == kAnyDtype ? "a tensor"
                                            : kDtypeNames[dtype];
    return std::string(kind) + " " + shape(sizes);
  }
  static std::string shape(const Tensor& t) {
    if (t.axes == 0) return "[]";
    if (t.axes == 1) return shape({t.n0});
    if (t.axes == 2) return shape({t.n0, t.n1});
    return t.axes == 3 ? shape({t.n0, t.n1, t.n2}) : "of " + std::to_string(t.axes) + " axes";
  }
};

// A result of a kernel: contiguous, null where not needed.
struct Output {
  address data = 0;
  operator address() const { return data; }
};

// Activation of a hidden layer, by torch.nn's names; the parameter is ELU's alpha or LeakyReLU's slope.
enum class ActivationKind { identity, relu, tanh, sigmoid, silu, gelu, gelu_tanh, elu, leaky_relu, softplus };
constexpr const char* kActivationNames[] = {"identity", "relu",      "tanh", "sigmoid",    "silu",
                                            "gelu",     "gelu_tanh", "elu",  "leaky_relu", "softplus"};
struct Activation {
  ActivationKind kind;
  double parameter;
};

// Layers of a decoder: those of the outputs, whose weights and biases come first, and hidden ones before
// them; outputs that are fixed. Null if none.
constexpr int kMostHidden = 3, kMostLayers = kMostParameters + kMostHidden;
struct HeadTensors {
  Tensor weight[kMostLayers], bias[kMostLayers], constant[kMostParameters];
  int hidden = 0;
  Activation activation[kMostHidden];
};
struct HeadOutputs {
  Output weight[kMostLayers], bias[kMostLayers], constant[kMostParameters];
};

// Which of the inputs need a gradient.
constexpr int kMostNeeds = kMostParameters + 2 + 2 * kMostHidden;
struct Need {
  bool gradient[kMostNeeds] = {};
  bool operator[](int i) const { return gradient[i]; }
};

// Form of a log variance: log sigma^2 itself, log sigma, sigma, or r of sigma^2 = softplus(r) + floor.
enum Scale { kLogvar, kLogScale, kSigma, kSoftplus, kScales };
constexpr const char* kScaleNames[] = {"logvar", "log_scale", "scale", "softplus"};
inline Scale scale_of(const char* name) {
  int number = 0;
  while (number < kScales && std::strcmp(kScaleNames[number], name) != 0) ++number;
  if (number == kScales)
    throw std::runtime_error(std::string("fastvae._C: no scale of a normal is called ") + name);
  return static_cast<Scale>(number);
}

// Settings of a draw of z.
struct Draw {
  i64 samples, sample_offset, row_offset;
  double logvar_min, logvar_max;
  bool flat;  // z is (K B, D): the same memory
  Scale scale;
  double floor;
};

// Size of a digital net, of which quasi-Monte-Carlo words are made. fastvae/random.py has the definition.
constexpr i64 kNetColumns = 128;
constexpr int kNetBits = 30;

// Settings of a draw without a clamp.
struct Place {
  i64 samples, sample_offset, row_offset;
  bool flat;
};

// Of a parameter: a number for every element; a row, the same for all samples and rows; one number for each
// row (k, b); one in all.
enum Kind { kFull = 0, kColumn = 1, kOne = 2, kNumber = 3 };
inline bool is_shared(int kind) { return kind == kColumn || kind == kNumber; }

// A call: x (B, X), parameters (K, B, X) that may broadcast, and a mask (B, X) of bytes, which are 0 where x
// was not observed; null for none.
struct Rows {
  int likelihood;
  Tensor x, mask, p[kMostParameters];
  int kind[kMostParameters];
  i64 samples, rows, columns;
  int threads;
};

// Requested gradients: of x (B, X) and of parameters, contiguous, null where not needed. Those of parameters
// that broadcast are of compute type: (X), one number, or (K, B).
struct RowGradients {
  Tensor grad;  // upstream gradient (K, B) of compute type
  address x, p[kMostParameters];
};

// Reduction of the samples to a bound.
struct How {
  double coefficient;  // of the term, in addition to beta
  bool log_mean_exp;   // over samples; else their mean
  char reduction;      // of the batch: n(one), s(um), m(ean)
  double alpha;        // a log-mean-exp is that of w^(1 - alpha), over 1 - alpha
  i64 groups;          // of samples, whose log-mean-exps are averaged
  double share;        // of the mean of the log weights; the remaining share is the log-mean-exp's
  // True for an ordinary log-mean-exp.
  bool plain() const { return alpha == 0 && groups == 1 && share == 0; }
};

// Log-likelihoods and their reduction to the bound.
struct BoundReduction {
  Rows rows;
  Tensor term;       // (K, B), or (B) with no stride over samples: of compute type; null for none
  bool each_sample;  // the first
  Tensor beta;       // (B), of any storage type; null for 1
  How how;
  double coefficient;  // the term counts this times beta
  bool log_mean_exp;   // over samples; else their mean
  double scale;        // of the sum over the batch; 0: no sum

  // Of x (B, X), its mask, a decoder's outputs, the first (K B, X), and a term (K, B) or (B).
  BoundReduction(int likelihood, const Tensor& x, const Tensor& mask, int count, const Tensor* outputs,
                 const Tensor& added, const Tensor& weight, const How& own, int threads)
      : rows{likelihood, x, mask, {}, {}, 0, x.n0, x.n1, threads}, term(added.along(2)),
        each_sample(added.axes == 2), beta(weight), how(own), coefficient(own.coefficient),
        log_mean_exp(own.log_mean_exp), scale(own.reduction == 'n'   ? 0
                                              : own.reduction == 's' ? 1
                                                                     : 1.0 / static_cast<double>(x.n0)) {
    const Tensor& full = outputs[0];
    rows.samples = full.n0 / x.n0;
    for (int j = 0; j < count; ++j) {
      const Tensor& p = outputs[j];
      Tensor& to = rows.p[j] = p;
      if (p.axes == 2 && p.n0 == full.n0 && (p.n1 == full.n1 || p.n1 == 1)) {
        rows.kind[j] = p.n1 == full.n1 ? kFull : kOne;
        to.s0 = p.s0 * x.n0;
        to.s1 = p.s0;
        to.s2 = p.n1 == full.n1 ? p.s1 : 0;
      } else {
        const bool number = p.size() == 1;
        rows.kind[j] = number ? kNumber : kColumn;
        to.s0 = to.s1 = 0;
        to.s2 = number ? 0 : p.axes == 1 ? p.s0 : p.s1;
      }
    }
  }
  bool wide() const {
    bool found = rows.x.dtype == 1;
    for (const Tensor& p : rows.p) found |= p.data && p.dtype == 1;
    return found;
  }
};

// Results, of compute type: the bound, one number or (B); (B); (K, B). The last two may be null.
struct ReductionResults {
  address bound, log_likelihood, weights;
};

// Upstream gradients: strides may be 0, addresses null; and the weights (K, B) again.
struct ReductionGradients {
  Tensor bound, log_likelihood;
  address weights;
};

}  // namespace fastvae
