// Torch's dispatcher as a caller of the ops in calls.hpp: a compiled graph calls them without Python. Kernels
// are registered through torch's C interface (torch.hpp). Arguments and results are 64-bit words, as
// torch/csrc/stable/stableivalue_conversions.h has it: numbers as they are; handles of tensors, strings and
// lists, which are the kernel's to delete; of an optional one the address of a word, or null.
#pragma once

#include <pybind11/pybind11.h>
#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "python.hpp"
#include "torch.hpp"

namespace fastvae {

struct HandleGiven : Tensor {
  HandleGiven() = default;
  explicit HandleGiven(Handle its) : Tensor(tensor_of(its)) {}
};

struct HandleMade : Output {
  Handle handle = nullptr;
  HandleMade() = default;
  HandleMade(int axes, const i64* sizes, int dtype) {
    const TorchInterface& torch = torch_interface();
    i64 strides[3] = {}, stride = 1;
    for (int i = axes; i-- > 0; stride *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = stride;
    succeed(torch.empty(axes, sizes, strides, torch.dtypes[dtype], torch.cpu, 0, &handle));
    void* address = nullptr;
    succeed(torch.data(handle, &address));
    data = reinterpret_cast<fastvae::address>(address);
  }
  // On a GPU; without a handle if the allocation fails.
  static HandleMade on_gpu(const std::vector<i64>& sizes, const std::vector<i64>& strides, std::int32_t type,
                           std::int32_t device_type, std::int32_t device) {
    const TorchInterface& torch = torch_interface();
    HandleMade made;
    if (torch.empty(static_cast<i64>(sizes.size()), sizes.data(), strides.data(), type, device_type, device,
                    &made.handle) != 0) {
      made.handle = nullptr;
      return made;
    }
    void* address = nullptr;
    succeed(torch.data(made.handle, &address));
    made.data = reinterpret_cast<fastvae::address>(address);
    return made;
  }
  HandleMade(HandleMade&& other) noexcept : Output(other), handle(std::exchange(other.handle, nullptr)) {}
  HandleMade& operator=(HandleMade&& other) noexcept {
    std::swap(data, other.data), std::swap(handle, other.handle);
    return *this;
  }
  ~HandleMade() {
    if (handle != nullptr) torch_interface().delete_tensor(handle);
  }
  void convert(int /*dtype*/) {}  // never requested: see FromDispatcher::converts
};

inline HandleMade make(const HandleGiven&, std::initializer_list<i64> sizes, int dtype) {
  return {static_cast<int>(sizes.size()), sizes.begin(), dtype};
}
inline HandleMade make_like(const HandleGiven& given, int dtype) {
  const i64 sizes[] = {given.n0, given.n1, given.n2};
  return {given.axes, sizes, dtype};
}

// Properties of a registered op.
struct Registered {
  int likelihood = 0;
  bool empty_for_none = false;
  std::string types;  // of the arguments: t(ensor), T(ensor or None), i(nteger), f(loat), b(ool), s(tring),
                      // l(ist of bools), d(type)
  PyObject* in_python =
      nullptr;  // called with the arguments, tensors as capsules of handles, where the C++ does not serve
  PyObject* backend = nullptr;  // called for the name of the backend in force
};

// The arguments of one call, read one after the other.
class FromDispatcher {
 public:
  using Given = HandleGiven;
  using Made = HandleMade;
  using Results = void;
  static constexpr int kHow = 6;  // arguments that it is
  static constexpr std::uint64_t kMostArguments = 24;

  FromDispatcher(const Registered& op, Word* stack, std::uint64_t number, std::uint64_t results)
      : op_(op), stack_(stack), number_(static_cast<int>(number)), wanted_(static_cast<int>(results)) {
    if (number > kMostArguments || number != op.types.size())
      throw std::runtime_error("fastvae._C: an op was registered with another schema");
    std::copy_n(stack, number, words_);
  }
  FromDispatcher(const FromDispatcher&) = delete;
  ~FromDispatcher() {
    const TorchInterface& torch = torch_interface();
    for (int i = 0; i < number_; ++i) {
      const char type = op_.types[static_cast<std::size_t>(i)];
      if (type == 't' || type == 'T') {
        if (Handle handle = handle_at(i)) torch.delete_tensor(handle);
        if (type == 'T') delete reinterpret_cast<Word*>(words_[i]);
      } else if (type == 's') {
        torch.delete_text(reinterpret_cast<Handle>(words_[i]));
      } else if (type == 'l') {
        torch.delete_list(reinterpret_cast<Handle>(words_[i]));
      }
    }
  }

  int left() const { return number_ - at_; }
  int likelihood() const { return op_.likelihood; }
  void read_otherwise() const {}
  void skip() { ++at_; }
  bool flag() { return (next() & 0xff) != 0; }
  i64 integer() { return static_cast<i64>(next()); }
  double real() {
    const Word word = next();
    double value = 0;
    std::memcpy(&value, &word, sizeof value);
    return value;
  }
  const char* text() {
    const char* characters = "";
    succeed(torch_interface().text(reinterpret_cast<Handle>(next()), &characters));
    return characters;
  }
  int dtype() {
    const auto type = static_cast<std::int32_t>(next());
    int found = 0;
    while (found < kDtypes && torch_interface().dtypes[found] != type) ++found;
    return found;
  }
  Given given() { return Given(handle_at(at_++)); }
  Tensor tensor() { return given(); }
  Handle handle() { return handle_at(at_++); }
  // Of the list that need() reads next.
  int length() const {
    std::size_t length = 0;
    succeed(torch_interface().length(reinterpret_cast<Handle>(words_[at_]), &length));
    return static_cast<int>(length);
  }
  Draw draw() {
    const i64 samples = integer(), sample_offset = integer(), row_offset = integer();
    const double low = real(), high = real();
    const bool flat = flag();
    const Scale scale = scale_of(text());
    return {samples, sample_offset, row_offset, low, high, flat, scale, real()};
  }
  Place place() {
    const i64 samples = integer(), sample_offset = integer(), row_offset = integer();
    return {samples, sample_offset, row_offset, flag()};
  }
  How how() {
    const double coefficient = real();
    const bool log_mean_exp = std::strcmp(text(), "log_mean_exp") == 0;
    const char reduction = text()[0];
    const double alpha = real();
    const i64 groups = integer();
    return {coefficient, log_mean_exp, reduction, alpha, groups, real()};
  }
  Need need() {
    const TorchInterface& torch = torch_interface();
    const Handle list = reinterpret_cast<Handle>(next());
    Need need;
    std::size_t length = 0;
    succeed(torch.length(list, &length));
    for (std::size_t i = 0; i < length && i < kMostNeeds; ++i) {
      Word item = 0;
      succeed(torch.item(list, i, &item));
      need.gradient[i] = (item & 0xff) != 0;
    }
    return need;
  }

  bool converts() const { return false; }
  static Given in_dtype(const Given& given, int /*dtype*/) { return given; }
  static Given contiguous(const Given& given) { return given; }
  int threads() const {
    std::uint32_t number = 1;
    succeed(torch_interface().threads(&number));
    return static_cast<int>(number);
  }
  template <class F, class... A>
  static auto run(F kernel, const A&... arguments) {
    return kernel(arguments...);
  }
  template <std::size_t kNumber>
  void results(Made (&&made)[kNumber], int number = kNumber) {
    Made empty;
    for (int i = 0; i < number; ++i) {
      if (made[i].handle != nullptr) continue;
      const i64 none = 0;
      // In the dtype of the first, which is there.
      if (op_.empty_for_none) {
        std::int32_t type = 0;
        succeed(torch_interface().dtype(made[0].handle, &type));
        const i64 stride = 1;
        succeed(torch_interface().empty(1, &none, &stride, type, torch_interface().cpu, 0, &made[i].handle));
      } else {
        succeed(torch_interface().undefined(&made[i].handle));
      }
    }
    for (int i = 0; i < number; ++i)
      stack_[i] = reinterpret_cast<Word>(std::exchange(made[i].handle, nullptr));
  }

  // Gives the results that are `shown`, -1 for None.
  void give(const std::vector<int>& shown, HandleMade* made, std::int32_t device_type, std::int32_t device) {
    const TorchInterface& torch = torch_interface();
    Handle given[kMostArguments] = {};
    for (std::size_t i = 0; i < shown.size(); ++i) {
      if (shown[i] >= 0) {
        given[i] = std::exchange(made[shown[i]].handle, nullptr);
      } else if (op_.empty_for_none) {
        std::int32_t type = 0;
        succeed(torch.dtype(given[0], &type));
        const i64 none = 0, stride = 1;
        succeed(torch.empty(1, &none, &stride, type, device_type, device, &given[i]));
      } else {
        succeed(torch.undefined(&given[i]));
      }
    }
    for (std::size_t i = 0; i < shown.size(); ++i) stack_[i] = reinterpret_cast<Word>(given[i]);
  }

  // Returns true if the C++ is the selected backend.
  bool serves() const {
    const pybind11::gil_scoped_acquire gil;
    const pybind11::object name = called(op_.backend, nullptr, 0);
    return PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), "native") == 0;
  }
  void otherwise() {
    const pybind11::gil_scoped_acquire gil;
    pybind11::object arguments[kMostArguments];
    PyObject* pointers[kMostArguments];
    for (int i = 0; i < number_; ++i) {
      arguments[i] = object_at(i);
      pointers[i] = arguments[i].ptr();
    }
    const pybind11::object made = called(op_.in_python, pointers, static_cast<std::size_t>(number_));
    const pybind11::list handles(made);
    if (static_cast<int>(handles.size()) != wanted_)
      throw std::runtime_error("fastvae: an op returned another number of results");
    for (int i = 0; i < wanted_; ++i) {
      const pybind11::object handle = handles[static_cast<std::size_t>(i)];
      Handle result = nullptr;
      if (handle.is_none()) {
        succeed(torch_interface().undefined(&result));
      } else {
        result = PyCapsule_GetPointer(handle.ptr(), PyCapsule_GetName(handle.ptr()));
      }
      stack_[i] = reinterpret_cast<Word>(result);
    }
  }

 private:
  Word next() { return words_[at_++]; }
  Handle handle_at(int i) const {
    if (op_.types[static_cast<std::size_t>(i)] == 't') return reinterpret_cast<Handle>(words_[i]);
    const Word* word = reinterpret_cast<const Word*>(words_[i]);
    return word ? reinterpret_cast<Handle>(*word) : nullptr;
  }
  // An argument as a Python object; a tensor's handle is passed on to Python.
  pybind11::object object_at(int i) {
    at_ = i;
    switch (op_.types[static_cast<std::size_t>(i)]) {
      case 'i': return pybind11::int_(integer());
      case 'f': return pybind11::float_(real());
      case 'b': return pybind11::bool_(flag());
      case 's': return pybind11::str(text());
      case 'd': {
        const int known = dtype();
        if (known == kDtypes)
          throw std::invalid_argument(std::string("fastvae: dtype is ") + kDtypeNames[known]);
        return pybind11::reinterpret_borrow<pybind11::object>(torch_names().dtypes[known]);
      }
      case 'l': {
        const Need found = need();
        pybind11::list list;
        std::size_t length = 0;
        succeed(torch_interface().length(reinterpret_cast<Handle>(words_[i]), &length));
        for (std::size_t j = 0; j < length; ++j) list.append(found[static_cast<int>(j)]);
        return std::move(list);
      }
      default: break;
    }
    const Handle handle = handle_at(i);
    if (handle == nullptr) return pybind11::none();
    if (op_.types[static_cast<std::size_t>(i)] == 't') {
      words_[i] = 0;
    } else {
      *reinterpret_cast<Word*>(words_[i]) = 0;
    }
    return pybind11::capsule(handle);
  }
  // Python errors become C++ exceptions that torch converts back to the original errors.
  static pybind11::object called(PyObject* function, PyObject* const* arguments, std::size_t number) {
    PyObject* result = PyObject_Vectorcall(function, arguments, number, nullptr);
    if (result != nullptr) return pybind11::reinterpret_steal<pybind11::object>(result);
    const pybind11::error_already_set error;
    const std::string text = pybind11::str(error.value());
    if (error.matches(PyExc_ValueError)) throw std::invalid_argument(text);
    if (error.matches(PyExc_MemoryError)) throw std::bad_alloc();
    throw std::runtime_error(std::string(pybind11::str(error.type().attr("__name__"))) + ": " + text);
  }

  const Registered& op_;
  Word* stack_;
  Word words_[kMostArguments];
  int number_, at_ = 0, wanted_;
};

// The kernel of an op, of a likelihood by its number.
template <class Op, int kLikelihood>
struct Kernel {
  static Registered& state() {
    static Registered registered;
    return registered;
  }
  static void boxed(Word* stack, std::uint64_t arguments, std::uint64_t results) {
    FromDispatcher from(state(), stack, arguments, results);
    from.serves() ? Op::call(from) : from.otherwise();
  }
  static bool implement(Handle library, const char* name, const char* types, pybind11::object in_python,
                        pybind11::object backend) {
    state() = {kLikelihood, Op::kEmptyForNone, types, in_python.release().ptr(), backend.release().ptr()};
    return torch_interface().implement(library, name, &boxed, kInterface) == 0;
  }
};

}  // namespace fastvae
