// What Python asks of tensors before a kernel is called, in one call: where models are small, asking costs
// more than computing. What does not pass is looked at there one by one. The contracts stand in
// fastvae/_glance.py.
#pragma once

#include "python.hpp"

namespace fastvae {

struct Glance {
  PyObject *tensor, *parameter, *is_wrapped, *transforms, *modes, *tracing, *forward_ad;
  PyObject *level, *is_cpu, *is_cuda, *requires_grad, *device, *is_neg, *get_device;
  Glance() {
    const auto kept = [](pybind11::object object) { return object.release().ptr(); };
    const pybind11::module_ torch = pybind11::module_::import("torch"), c = torch.attr("_C");
    tensor = kept(torch.attr("Tensor"));
    parameter = kept(torch.attr("nn").attr("Parameter"));
    is_wrapped = kept(c.attr("_functorch").attr("is_functorch_wrapped_tensor"));
    transforms = kept(c.attr("_are_functorch_transforms_active"));
    modes = kept(c.attr("_len_torch_dispatch_stack"));
    tracing = kept(c.attr("_get_tracing_state"));
    forward_ad = kept(pybind11::module_::import("torch.autograd.forward_ad"));
    level = PyUnicode_InternFromString("_current_level");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_cuda = PyUnicode_InternFromString("is_cuda");
    is_neg = PyUnicode_InternFromString("is_neg");
    get_device = PyUnicode_InternFromString("get_device");
    requires_grad = PyUnicode_InternFromString("requires_grad");
    device = PyUnicode_InternFromString("device");
  }
};
inline const Glance& glance() {
  static const Glance* const names = new Glance;
  return *names;
}

inline bool asks(PyObject* object, PyObject* attribute) {
  return owned(PyObject_GetAttr(object, attribute)).ptr() == Py_True;
}

inline bool is_tensor(PyObject* object) {
  const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  return type == glance().tensor || type == glance().parameter;
}

struct Shape {
  pybind11::object sizes;
  Py_ssize_t axes;
  explicit Shape(PyObject* tensor)
      : sizes(owned(PyObject_GetAttr(tensor, torch_names().shape))), axes(PyTuple_GET_SIZE(sizes.ptr())) {}
  i64 operator[](Py_ssize_t i) const { return to_integer(PyTuple_GET_ITEM(sizes.ptr(), i)); }
  bool operator==(const Shape& other) const {
    bool same = axes == other.axes;
    for (Py_ssize_t i = 0; same && i < axes; ++i) same = (*this)[i] == other[i];
    return same;
  }
};

inline bool is_floating(PyObject* dtype) {
  const auto& known = torch_names().dtypes;
  return dtype == known[kFloat32] || dtype == known[kFloat64] || dtype == known[kBFloat16] ||
         dtype == known[kFloat16];
}
inline pybind11::object dtype_of(PyObject* tensor) {
  return owned(PyObject_GetAttr(tensor, torch_names().dtype));
}

inline bool together(PyObject* one, PyObject* other) {
  if (asks(one, glance().is_cpu)) return asks(other, glance().is_cpu);
  const auto device = [](PyObject* t) { return owned(PyObject_GetAttr(t, glance().device)); };
  return PyObject_RichCompareBool(device(one).ptr(), device(other).ptr(), Py_EQ) == 1;
}

inline bool are_rows(PyObject* mu, PyObject* logvar) {
  if (!is_tensor(mu) || !is_tensor(logvar)) return false;
  const pybind11::object dtype = dtype_of(mu);
  const Shape shape(mu);
  return shape.axes == 2 && is_floating(dtype.ptr()) && dtype_of(logvar).ptr() == dtype.ptr() &&
         shape == Shape(logvar) && together(mu, logvar);
}

inline bool are_batch(PyObject* x, PyObject* mu, PyObject* logvar) {
  if (!is_tensor(x) || !are_rows(mu, logvar)) return false;
  const Shape shape(x);
  return shape.axes > 0 && shape[0] == Shape(mu)[0] && is_floating(dtype_of(x).ptr()) && together(x, mu);
}

inline bool are_outputs(PyObject* x, PyObject* samples, PyObject* parameters) {
  const Shape shape(x);
  if (shape.axes != 2) return false;
  const i64 rows = to_integer(samples) * shape[0], columns = shape[1];
  if (rows == 0 || columns == 0) return false;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(parameters); ++i) {
    PyObject* p = PyTuple_GET_ITEM(parameters, i);
    if (!is_tensor(p)) return false;
    const Shape its(p);
    if (its.axes != 2 || its[0] != rows || its[1] != columns || !is_floating(dtype_of(p).ptr()) ||
        !together(x, p))
      return false;
  }
  return true;
}

constexpr int kOnCpu = 1, kOnGpu = 2, kWanted = 4;

inline int plain(PyObject* tensors) {
  const Glance& names = glance();
  if (owned(PyObject_CallNoArgs(names.transforms)).ptr() == Py_True ||
      to_integer(owned(PyObject_CallNoArgs(names.modes)).ptr()) != 0 ||
      owned(PyObject_CallNoArgs(names.tracing)).ptr() != Py_None ||
      to_integer(owned(PyObject_GetAttr(names.forward_ad, names.level)).ptr()) >= 0) {
    return 0;
  }
  int found = 0;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors); ++i) {
    PyObject* t = PyTuple_GET_ITEM(tensors, i);
    if (t == Py_None) continue;
    if (!is_tensor(t) || owned(PyObject_CallOneArg(names.is_wrapped, t)).ptr() == Py_True) return 0;
    // A view that is negative lazily is for the dispatcher to resolve.
    if (owned(PyObject_CallMethodNoArgs(t, names.is_neg)).ptr() == Py_True) return 0;
    if (asks(t, names.is_cpu)) {
      found |= kOnCpu;
    } else if (asks(t, names.is_cuda)) {
      found |= kOnGpu;
    } else {
      return 0;
    }
    if (!(found & kWanted) && asks(t, names.requires_grad)) found |= kWanted;
  }
  return (found & kOnCpu) && (found & kOnGpu) ? 0 : found;
}

template <int (*kFunction)(PyObject* const*), int kArguments>
PyObject* called(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  if (n != kArguments)
    return PyErr_Format(PyExc_TypeError, "fastvae._C: expected %d arguments, got %zd", kArguments, n);
  return guarded([&] { return PyLong_FromLong(kFunction(arguments)); });
}
inline int call_plain(PyObject* const* a) { return plain(a[0]); }
inline int call_are_batch(PyObject* const* a) { return are_batch(a[0], a[1], a[2]); }
inline int call_are_outputs(PyObject* const* a) { return are_outputs(a[0], a[1], a[2]); }

// All that the launch of a kernel depends on, of a tuple of tensors or None, as bytes that compare equal
// where a launch is the same; and their addresses.
inline PyObject* described(PyObject*, PyObject* const* arguments, Py_ssize_t n) {
  if (n != 1 || !PyTuple_Check(arguments[0]))
    return PyErr_Format(PyExc_TypeError, "fastvae._C: expected a tuple of tensors");
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
      note(to_integer(owned(PyObject_CallMethodNoArgs(t, glance().get_device)).ptr()));
      note_all(owned(PyObject_GetAttr(t, names.shape)));
      note_all(owned(PyObject_CallMethodNoArgs(t, names.stride)));
      PyTuple_SET_ITEM(addresses.ptr(), i, address.release().ptr());
    }
    return PyTuple_Pack(
        2, owned(PyBytes_FromStringAndSize(key.data(), static_cast<Py_ssize_t>(key.size()))).ptr(),
        addresses.ptr());
  });
}

inline void add_glances(PyObject* module) {
  static PyMethodDef functions[] = {
      fast_method("plain", &called<call_plain, 1>),
      fast_method("are_batch", &called<call_are_batch, 3>),
      fast_method("are_outputs", &called<call_are_outputs, 3>),
      fast_method("described", &described),
      {nullptr, nullptr, 0, nullptr},
  };
  if (PyModule_AddFunctions(module, functions) != 0) throw pybind11::error_already_set();
}

}  // namespace fastvae
