// The key of a Triton launch, the C++ twin of kernels/launching.py's: describing the tensors of a small call
// in Python costs more than launching.
#pragma once

#include <stdexcept>
#include <string>

#include "python.hpp"

namespace fastvae {

// All that the launch of a kernel depends on, of a tuple of tensors or None, as bytes that compare equal
// where a launch is the same; and their addresses.
inline PyObject* described(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  if (n != 1 || !PyTuple_Check(arguments[0]))
    return PyErr_Format(PyExc_TypeError, "fastvae._C: expected a tuple of tensors");
  static PyObject* const get_device = PyUnicode_InternFromString("get_device");
  return guarded([&] {
    const Torch& names = torch_names();
    const Py_ssize_t size = PyTuple_GET_SIZE(arguments[0]);
    const pybind11::object addresses = owned(PyTuple_New(size));
    std::string key;
    key.reserve(static_cast<size_t>(size) * 64);
    const auto note = [&](i64 number) { key.append(reinterpret_cast<const char*>(&number), sizeof number); };
    const auto note_all = [&](const pybind11::object& numbers) {
      const Py_ssize_t count = PyTuple_GET_SIZE(numbers.ptr());
      note(count);
      for (Py_ssize_t i = 0; i < count; ++i) note(to_integer(PyTuple_GET_ITEM(numbers.ptr(), i)));
    };
    for (Py_ssize_t i = 0; i < size; ++i) {
      PyObject* t = PyTuple_GET_ITEM(arguments[0], i);
      if (t == Py_None) {
        note(-1);
        PyTuple_SET_ITEM(addresses.ptr(), i, Py_NewRef(Py_None));
        continue;
      }
      if (tensor_of(t).flaw == kFreed)
        throw std::invalid_argument("fastvae: a tensor " + std::string(kFlaws[kFreed]));
      pybind11::object address = owned(PyObject_CallMethodNoArgs(t, names.data_ptr));
      // A program is for addresses divisible by 16, or not: chunk(2) of 100 columns is off by 8.
      note(PyLong_AsUnsignedLongLong(address.ptr()) & 15);
      // There is one object of each dtype.
      note(reinterpret_cast<i64>(owned(PyObject_GetAttr(t, names.dtype)).ptr()));
      note(to_integer(owned(PyObject_CallMethodNoArgs(t, get_device)).ptr()));
      note_all(owned(PyObject_GetAttr(t, names.shape)));
      note_all(owned(PyObject_CallMethodNoArgs(t, names.stride)));
      PyTuple_SET_ITEM(addresses.ptr(), i, address.release().ptr());
    }
    return PyTuple_Pack(
        2, owned(PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size()))).ptr(),
        addresses.ptr());
  });
}

}  // namespace fastvae
