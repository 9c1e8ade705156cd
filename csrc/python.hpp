// Python as a caller of the ops in calls.hpp: reads its arguments and allocates the results. Tensors are read
// by their own methods and allocated by torch's functions, so no libtorch is linked and one build serves
// every version.
#pragma once

#include <pybind11/pybind11.h>

#include <cstring>
#include <initializer_list>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "targets.hpp"
#include "torch.hpp"

namespace fastvae {

// Names, types and functions of torch, looked up once.
struct Torch {
  PyObject *base, *data_ptr, *dtype, *shape, *stride, *to, *new_empty, *with_dtype, *empty_like,
      *get_num_threads, *dtypes[kDtypes];
  // Of size, stride and dtype, on the CPU and on the current GPU: how Inductor's code allocates, in half of
  // new_empty's time or less. Null where this torch does not have them.
  PyObject *empty_on_cpu = nullptr, *empty_on_gpu = nullptr;
  Torch() {
    data_ptr = PyUnicode_InternFromString("data_ptr");
    dtype = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    to = PyUnicode_InternFromString("to");
    new_empty = PyUnicode_InternFromString("new_empty");
    with_dtype = pybind11::make_tuple("dtype").release().ptr();
    const pybind11::module_ torch = pybind11::module_::import("torch");
    base = pybind11::object(torch.attr("_C").attr("TensorBase")).release().ptr();
    empty_like = pybind11::object(torch.attr("empty_like")).release().ptr();
    get_num_threads = pybind11::object(torch.attr("get_num_threads")).release().ptr();
    try {
      const pybind11::object guards = torch.attr("_C").attr("_dynamo").attr("guards");
      empty_on_cpu = pybind11::object(guards.attr("_empty_strided_cpu")).release().ptr();
      empty_on_gpu = pybind11::object(guards.attr("_empty_strided_cuda")).release().ptr();
    } catch (const pybind11::error_already_set&) {
    }
    // In the order of enum Dtype.
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "uint8",
                           "int8",    "int16",   "int32",    "int64",   "bool"};
    for (int i = 0; i < kDtypes; ++i) dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
  }
};
inline const Torch& torch_names() {
  static const Torch* const names = new Torch;  // never destroyed: Python may have exited by then
  return *names;
}

inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline i64 to_integer(PyObject* number) {
  const i64 value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

// Offset of the handle that torch's C interface takes in Python's tensor object; -1 if unknown. Found by
// comparison with a handle that torch created for the same tensor: reading it costs a tenth of calling the
// object's methods.
inline Py_ssize_t find_handle() {
  namespace py = pybind11;
  if (!torch_interface().complete) return -1;
  Py_ssize_t found = -1;
  try {
    const py::module_ torch = py::module_::import("torch"), aoti = torch.attr("_C").attr("_aoti");
    const auto size = py::handle(torch.attr("Tensor")).attr("__basicsize__").cast<Py_ssize_t>();
    for (int i = 0; i < 2; ++i) {
      const py::object tensor = torch.attr("empty")(i + 1),
                       capsule = aoti.attr("unsafe_alloc_void_ptr_from_tensor")(tensor);
      const auto* handle =
          static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), PyCapsule_GetName(capsule.ptr())));
      const auto* object = reinterpret_cast<const char*>(tensor.ptr());
      Py_ssize_t at = sizeof(PyObject);
      while (at + static_cast<Py_ssize_t>(sizeof(void*)) <= size &&
             std::memcmp(object + at, handle, sizeof(void*)) != 0)
        at += sizeof(void*);
      py::list handles;
      handles.append(capsule);
      aoti.attr("alloc_tensors_by_stealing_from_void_ptrs")(handles);
      if (at + static_cast<Py_ssize_t>(sizeof(void*)) > size || (i > 0 && at != found)) return -1;
      found = at;
    }
  } catch (const py::error_already_set&) {
    return -1;
  }
  return found;
}

// The items of a tuple, as many as exist, and their number; of a tuple of more than three none is read.
inline int read_numbers(PyObject* tuple, i64& n0, i64& n1, i64& n2) {
  i64* numbers[] = {&n0, &n1, &n2};
  const Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 4;
  for (Py_ssize_t i = 0; i < size && size <= 3; ++i) *numbers[i] = to_integer(PyTuple_GET_ITEM(tuple, i));
  return static_cast<int>(size);
}

// The same as tensor_of(Handle), by the object's methods.
inline Tensor tensor_by_methods(PyObject* tensor) {
  const pybind11::handle object(tensor);
  const Torch& names = torch_names();
  Tensor t;
  t.given = true;
  const pybind11::object dtype = owned(PyObject_GetAttr(tensor, names.dtype));
  while (t.dtype < kDtypes && names.dtypes[t.dtype] != dtype.ptr()) ++t.dtype;
  t.axes = read_numbers(owned(PyObject_GetAttr(tensor, names.shape)).ptr(), t.n0, t.n1, t.n2);
  if (pybind11::str(object.attr("layout")).cast<std::string>() != "torch.strided") return t.with(kNotStrided);
  if (t.dtype == kDtypes) return t.with(kUnknownDtype);
  const pybind11::tuple sizes(object.attr("shape")), strides(object.attr("stride")());
  i64 last = object.attr("storage_offset")().cast<i64>(), count = 1;
  for (std::size_t i = 0; i < sizes.size(); ++i) {
    count *= sizes[i].cast<i64>();
    last += (sizes[i].cast<i64>() - 1) * strides[i].cast<i64>();
  }
  read_numbers(strides.ptr(), t.s0, t.s1, t.s2);
  if (count > 0 &&
      (last + 1) * kItemSizes[t.dtype] > object.attr("untyped_storage")().attr("nbytes")().cast<i64>())
    return t.with(kFreed);
  if (!object.attr("is_cpu").cast<bool>()) return t.with(kNotOnCpu);
  if (t.dtype == kBool) t.dtype = kUInt8;
  t.data =
      count > 0
          ? static_cast<address>(to_integer(owned(PyObject_CallMethodNoArgs(tensor, names.data_ptr)).ptr()))
          : 0;
  return t;
}

inline Tensor tensor_of(PyObject* tensor) {
  Tensor t;
  if (tensor == Py_None) return t;
  static const Py_ssize_t at = find_handle();
  if (!PyObject_TypeCheck(tensor, reinterpret_cast<PyTypeObject*>(torch_names().base))) {
    t.given = true;
    return t.with(kNoTensor);
  }
  return at < 0 ? tensor_by_methods(tensor)
                : tensor_of(static_cast<Handle>(reinterpret_cast<char*>(tensor) + at));
}

inline pybind11::list likelihoods() {
  pybind11::list names;
  for (const char* name : kLikelihoods) names.append(name);
  return names;
}

// A tensor, and the object it was read from.
struct Given : Tensor {
  PyObject* object = Py_None;
  Given() = default;
  explicit Given(PyObject* tensor) : Tensor(tensor_of(tensor)), object(tensor) {}
};

// A result: a tensor for a kernel to fill, or None.
struct Made : Output {
  pybind11::object object = pybind11::none();
  int dtype = 0;
  Made() = default;
  Made(pybind11::object tensor, int its)
      : Output{tensor_of(tensor.ptr()).data}, object(std::move(tensor)), dtype(its) {}

  void convert(int wanted) {
    if (!data || wanted == dtype) return;
    PyObject* arguments[] = {object.ptr(), torch_names().dtypes[wanted]};
    object = owned(PyObject_VectorcallMethod(torch_names().to, arguments, 2, nullptr));
  }
};

// Allocates an uninitialised contiguous tensor [sizes] on the CPU, as the given one.
inline Made make(const Given& given, std::initializer_list<i64> sizes, int dtype) {
  const Torch& names = torch_names();
  if (names.empty_on_cpu != nullptr) {
    const auto axes = static_cast<Py_ssize_t>(sizes.size());
    const pybind11::object size = owned(PyTuple_New(axes)), strides = owned(PyTuple_New(axes));
    i64 stride = 1;
    for (Py_ssize_t i = axes; i-- > 0;) {
      const i64 its = sizes.begin()[i];
      PyTuple_SET_ITEM(size.ptr(), i, owned(PyLong_FromLongLong(its)).release().ptr());
      PyTuple_SET_ITEM(strides.ptr(), i, owned(PyLong_FromLongLong(stride)).release().ptr());
      stride *= its > 0 ? its : 1;
    }
    PyObject* arguments[] = {size.ptr(), strides.ptr(), names.dtypes[dtype]};
    return Made(owned(PyObject_Vectorcall(names.empty_on_cpu, arguments, 3, nullptr)), dtype);
  }
  // Sizes one by one cost less than a tuple of them, except for none.
  PyObject* arguments[5] = {given.object};
  std::size_t n = 1;
  pybind11::object items[4];
  for (i64 size : sizes) {
    items[n - 1] = owned(PyLong_FromLongLong(size));
    arguments[n] = items[n - 1].ptr();
    ++n;
  }
  if (n == 1) {
    items[0] = pybind11::tuple();
    arguments[n++] = items[0].ptr();
  }
  arguments[n] = names.dtypes[dtype];
  return Made(owned(PyObject_VectorcallMethod(names.new_empty, arguments, n,
                                              dtype == given.dtype ? nullptr : names.with_dtype)),
              dtype);
}

// Allocates an uninitialised contiguous tensor of the given one's shape.
inline Made make_like(const Given& given, int dtype) {
  if (torch_names().empty_on_cpu == nullptr && dtype == given.dtype && given.is_contiguous()) {
    return Made(owned(PyObject_CallOneArg(torch_names().empty_like, given.object)), dtype);
  }
  if (given.axes == 0) return make(given, {}, dtype);
  if (given.axes == 1) return make(given, {given.n0}, dtype);
  return given.axes == 2 ? make(given, {given.n0, given.n1}, dtype)
                         : make(given, {given.n0, given.n1, given.n2}, dtype);
}

inline int number_of_threads() {
  return static_cast<int>(to_integer(owned(PyObject_CallNoArgs(torch_names().get_num_threads)).ptr()));
}

inline double to_real(PyObject* number) {
  const double value = PyFloat_AsDouble(number);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline PyObject* const* items_of(PyObject* tuple, Py_ssize_t number) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != number)
    throw pybind11::type_error("fastvae._C: expected a record of the op");
  return &PyTuple_GET_ITEM(tuple, 0);
}

// The arguments of one call, read one after the other.
class FromPython {
 public:
  using Given = fastvae::Given;
  using Made = fastvae::Made;
  using Results = PyObject*;
  static constexpr int kHow = 1;  // number of arguments

  FromPython(PyObject* const* arguments, Py_ssize_t number) : at_(arguments), end_(arguments + number) {}

  int left() const { return static_cast<int>(end_ - at_); }
  int likelihood() { return number_of(text()); }
  // Reads the fallback, which is called with the remaining arguments if the C++ does not support them.
  void read_otherwise() {
    otherwise_ = next();
    given_ = at_;
  }
  Results otherwise() const {
    return PyObject_Vectorcall(otherwise_, given_, static_cast<std::size_t>(end_ - given_), nullptr);
  }

  void skip() { next(); }
  bool flag() { return next() == Py_True; }
  i64 integer() { return to_integer(next()); }
  double real() { return to_real(next()); }
  const char* text() {
    const char* characters = PyUnicode_AsUTF8(next());
    if (characters == nullptr) throw pybind11::error_already_set();
    return characters;
  }
  int dtype() {
    const PyObject* wanted = next();
    int found = 0;
    while (found < kDtypes && torch_names().dtypes[found] != wanted) ++found;
    return found;
  }
  Tensor tensor() { return tensor_of(next()); }
  Given given() { return Given(next()); }
  Draw draw() {  // (samples, sample_offset, row_offset, logvar_min, logvar_max, flat, scale, floor)
    PyObject* const* t = items_of(next(), 8);
    const char* scale = PyUnicode_AsUTF8(t[6]);
    if (scale == nullptr) throw pybind11::error_already_set();
    return {to_integer(t[0]), to_integer(t[1]), to_integer(t[2]), to_real(t[3]),
            to_real(t[4]),    t[5] == Py_True,  scale_of(scale),  to_real(t[7])};
  }
  Place place() {  // (samples, sample_offset, row_offset, flat)
    PyObject* const* t = items_of(next(), 4);
    return {to_integer(t[0]), to_integer(t[1]), to_integer(t[2]), t[3] == Py_True};
  }
  How how() {  // (coefficient, over, reduction, alpha, groups, share)
    PyObject* const* t = items_of(next(), 6);
    const bool log_mean_exp = PyUnicode_CompareWithASCIIString(t[1], "log_mean_exp") == 0;
    return {to_real(t[0]), log_mean_exp,     static_cast<char>(PyUnicode_READ_CHAR(t[2], 0)),
            to_real(t[3]), to_integer(t[4]), to_real(t[5])};
  }
  Need need() {
    Need need;
    const pybind11::object items =
        owned(PySequence_Fast(next(), "fastvae._C: needs of gradients must be a sequence"));
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(items.ptr());
    if (count > kMostNeeds) throw pybind11::type_error("fastvae._C: more needs of gradients than inputs");
    for (Py_ssize_t i = 0; i < count; ++i)
      need.gradient[i] = PySequence_Fast_GET_ITEM(items.ptr(), i) == Py_True;
    return need;
  }

  // Returns true if arguments of two dtypes can be computed and returned.
  bool converts() const { return true; }
  Given in_dtype(const Given& given, int dtype) {
    return kept(pybind11::handle(given.object).attr("to")(pybind11::handle(torch_names().dtypes[dtype])));
  }
  Given contiguous(const Given& given) { return kept(pybind11::handle(given.object).attr("contiguous")()); }
  int threads() const { return number_of_threads(); }
  // Calls a kernel with the GIL released.
  template <class F, class... A>
  static auto run(F kernel, const A&... arguments) {
    const pybind11::gil_scoped_release release;
    return kernel(arguments...);
  }
  template <std::size_t kNumber>
  static Results results(Made (&&made)[kNumber], int number = kNumber) {
    if (number == 1) return made[0].object.release().ptr();
    PyObject* tuple = PyTuple_New(number);
    if (tuple == nullptr) throw pybind11::error_already_set();
    for (int i = 0; i < number; ++i) PyTuple_SET_ITEM(tuple, i, made[i].object.release().ptr());
    return tuple;
  }

 private:
  PyObject* next() {
    if (at_ == end_) throw pybind11::type_error("fastvae._C: an op was called with too few arguments");
    return *at_++;
  }
  PyObject *const *at_, *const *end_, *const *given_ = nullptr;
  PyObject* otherwise_ = nullptr;
  Given kept(pybind11::object tensor) {
    copies_.push_back(std::move(tensor));
    return Given(copies_.back().ptr());
  }
  std::vector<pybind11::object> copies_;  // kept while they are read
};

// Calling convention of Python functions without pybind11, whose call costs as much as a small kernel.
template <class F>
PyObject* guarded(F function) {
  try {
    return function();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::type_error& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}
inline PyMethodDef fast_method(const char* name,
                               PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL,
          nullptr};
}

// An op of calls.hpp as a Python function.
template <class Op>
PyMethodDef method() {
  return fast_method(Op::kName, [](PyObject*, PyObject* const* arguments, Py_ssize_t n) {
    return guarded([&] {
      FromPython from(arguments, n);
      return Op::call(from);
    });
  });
}

}  // namespace fastvae
