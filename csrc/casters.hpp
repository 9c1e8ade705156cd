// How arguments come from Python. A tensor is read by its own methods, so that no libtorch is linked and one build serves every version.
#pragma once

#include <pybind11/pybind11.h>

#include "arguments.hpp"

namespace fastvae {

// What a call gives to fill, at most as many as a likelihood has parameters.
struct Outputs {
  Output p[kMostParameters];
  Output operator[](int i) const { return p[i]; }
};

constexpr int kUInt8 = 4, kBool = 9, kDtypes = 10;

// Names and types of torch, looked up once.
struct Torch {
  PyObject *data_ptr, *dtype, *shape, *stride, *dtypes[kDtypes];
  Torch() {
    data_ptr = PyUnicode_InternFromString("data_ptr");
    dtype = PyUnicode_InternFromString("dtype");
    shape = PyUnicode_InternFromString("shape");
    stride = PyUnicode_InternFromString("stride");
    const pybind11::module_ torch = pybind11::module_::import("torch");
    // In the order of enum Dtype (common.hpp); bool last, for which uint8 serves.
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "uint8", "int8", "int16", "int32", "int64", "bool"};
    for (int i = 0; i < kDtypes; ++i) dtypes[i] = pybind11::object(torch.attr(names[i])).release().ptr();
  }
};
inline const Torch& torch_names() {
  static const Torch* const names = new Torch;  // never destroyed: Python may be gone by then
  return *names;
}

inline pybind11::object owned(PyObject* result) {
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

inline i64 integer(PyObject* number) {
  const i64 value = PyLong_AsLongLong(number);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

inline address address_of(PyObject* tensor) {
  if (tensor == Py_None) return 0;
  return static_cast<address>(integer(owned(PyObject_CallMethodNoArgs(tensor, torch_names().data_ptr)).ptr()));
}

// The items of a tuple, as far as there are any.
inline int read_numbers(PyObject* tuple, i64& n0, i64& n1, i64& n2) {
  i64* numbers[] = {&n0, &n1, &n2};
  const Py_ssize_t size = PyTuple_Check(tuple) ? PyTuple_GET_SIZE(tuple) : 4;
  if (size > 3) throw pybind11::type_error("fastvae._C: a tensor must have up to three axes");
  for (Py_ssize_t i = 0; i < size; ++i) *numbers[i] = integer(PyTuple_GET_ITEM(tuple, i));
  return static_cast<int>(size);
}

inline Tensor tensor_of(PyObject* tensor) {
  Tensor t;
  if (tensor == Py_None) return t;
  const Torch& names = torch_names();
  t.data = address_of(tensor);
  const pybind11::object dtype = owned(PyObject_GetAttr(tensor, names.dtype));
  while (t.dtype < kDtypes && names.dtypes[t.dtype] != dtype.ptr()) ++t.dtype;
  if (t.dtype == kDtypes) throw pybind11::type_error("fastvae._C: a tensor of a dtype that has no number here");
  if (t.dtype == kBool) t.dtype = kUInt8;
  t.axes = read_numbers(owned(PyObject_GetAttr(tensor, names.shape)).ptr(), t.n0, t.n1, t.n2);
  read_numbers(owned(PyObject_CallMethodNoArgs(tensor, names.stride)).ptr(), t.s0, t.s1, t.s2);
  return t;
}

inline double real(PyObject* number) {
  const double value = PyFloat_AsDouble(number);
  if (value == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
  return value;
}

}  // namespace fastvae

namespace pybind11::detail {

template <>
struct type_caster<fastvae::Tensor> {
  PYBIND11_TYPE_CASTER(fastvae::Tensor, const_name("Tensor | None"));
  bool load(handle source, bool) {
    value = fastvae::tensor_of(source.ptr());
    return true;
  }
};

template <>
struct type_caster<fastvae::Output> {
  PYBIND11_TYPE_CASTER(fastvae::Output, const_name("Tensor | None"));
  bool load(handle source, bool) {
    value.data = fastvae::address_of(source.ptr());
    return true;
  }
};

template <>
struct type_caster<fastvae::Outputs> {
  PYBIND11_TYPE_CASTER(fastvae::Outputs, const_name("list[Tensor | None]"));
  bool load(handle source, bool) {
    PyObject* list = source.ptr();
    if (!PyList_Check(list) || PyList_GET_SIZE(list) > fastvae::kMostParameters) return false;
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(list); ++i) value.p[i].data = fastvae::address_of(PyList_GET_ITEM(list, i));
    return true;
  }
};

template <>
struct type_caster<fastvae::Parameters> {
  PYBIND11_TYPE_CASTER(fastvae::Parameters, const_name("tuple[Tensor, ...]"));
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) > fastvae::kMostParameters) return false;
    for (; value.count < PyTuple_GET_SIZE(t); ++value.count) {
      value.p[value.count] = fastvae::tensor_of(PyTuple_GET_ITEM(t, value.count));
    }
    return true;
  }
};

template <>
struct type_caster<fastvae::Draw> {
  PYBIND11_TYPE_CASTER(fastvae::Draw, const_name("Draw"));
  // (samples, sample_offset, row_offset, logvar_min, logvar_max, flat); the last says how z's memory is seen, which is one here
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 6) return false;
    value.samples = fastvae::integer(PyTuple_GET_ITEM(t, 0));
    value.sample_offset = fastvae::integer(PyTuple_GET_ITEM(t, 1));
    value.row_offset = fastvae::integer(PyTuple_GET_ITEM(t, 2));
    value.logvar_min = fastvae::real(PyTuple_GET_ITEM(t, 3));
    value.logvar_max = fastvae::real(PyTuple_GET_ITEM(t, 4));
    return true;
  }
};

template <>
struct type_caster<fastvae::How> {
  PYBIND11_TYPE_CASTER(fastvae::How, const_name("Weighing"));
  // (coefficient, over, reduction)
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) != 3) return false;
    value.coefficient = fastvae::real(PyTuple_GET_ITEM(t, 0));
    value.log_mean_exp = PyUnicode_CompareWithASCIIString(PyTuple_GET_ITEM(t, 1), "log_mean_exp") == 0;
    value.reduction = static_cast<char>(PyUnicode_READ_CHAR(PyTuple_GET_ITEM(t, 2), 0));
    return true;
  }
};

template <>
struct type_caster<fastvae::Rows> {
  PYBIND11_TYPE_CASTER(fastvae::Rows, const_name("Rows"));
  // (likelihood, threads, x, (kind, parameter), ...); parameters have the axes of samples, rows and columns, or lack the first
  bool load(handle source, bool) {
    PyObject* t = source.ptr();
    if (!PyTuple_Check(t) || PyTuple_GET_SIZE(t) < 4 || PyTuple_GET_SIZE(t) > 3 + fastvae::kMostParameters) return false;
    value.likelihood = static_cast<int>(fastvae::integer(PyTuple_GET_ITEM(t, 0)));
    value.threads = static_cast<int>(fastvae::integer(PyTuple_GET_ITEM(t, 1)));
    value.x = fastvae::tensor_of(PyTuple_GET_ITEM(t, 2));
    for (Py_ssize_t j = 3; j < PyTuple_GET_SIZE(t); ++j) {
      PyObject* pair = PyTuple_GET_ITEM(t, j);
      value.kind[j - 3] = static_cast<int>(fastvae::integer(PyTuple_GET_ITEM(pair, 0)));
      value.p[j - 3] = fastvae::tensor_of(PyTuple_GET_ITEM(pair, 1)).along(3);
    }
    value.samples = value.p[0].n0, value.rows = value.p[0].n1, value.columns = value.p[0].n2;
    return true;
  }
};

}  // namespace pybind11::detail
