// Torch's C interface, whose functions are looked up in the loaded library: nothing is linked, and no torch
// header is needed.
#pragma once

#ifdef __linux__
#include <dlfcn.h>
#endif

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "arguments.hpp"

namespace fastvae {

using Word = std::uint64_t;
using Handle = void*;
using Boxed = void (*)(Word*, std::uint64_t, std::uint64_t);

// As in torch 2.11; later versions keep to it for callers that declare this version.
constexpr Word kInterface = (Word{2} << 56) | (Word{11} << 48);

struct TorchInterface {
  int (*library)(const char*, const char*, const char*, std::uint32_t, Handle*) = nullptr;
  int (*implement)(Handle, const char*, Boxed, Word) = nullptr;
  int (*data)(Handle, void**) = nullptr;
  int (*axes)(Handle, i64*) = nullptr;
  int (*sizes)(Handle, i64**) = nullptr;
  int (*strides)(Handle, i64**) = nullptr;
  int (*dtype)(Handle, std::int32_t*) = nullptr;
  int (*device)(Handle, std::int32_t*) = nullptr;
  int (*layout)(Handle, std::int32_t*) = nullptr;
  int (*bytes)(Handle, i64*) = nullptr;
  int (*offset)(Handle, i64*) = nullptr;
  int (*empty)(i64, const i64*, const i64*, std::int32_t, std::int32_t, std::int32_t, Handle*) = nullptr;
  int (*undefined)(Handle*) = nullptr;
  int (*delete_tensor)(Handle) = nullptr;
  int (*threads)(std::uint32_t*) = nullptr;
  int (*text)(Handle, const char**) = nullptr;
  int (*delete_text)(Handle) = nullptr;
  int (*length)(Handle, std::size_t*) = nullptr;
  int (*item)(Handle, std::size_t, Word*) = nullptr;
  int (*delete_list)(Handle) = nullptr;
  std::int32_t cpu = 0, strided = 0, dtypes[kDtypes] = {};
  bool complete = false;

  void find(const char* path) {
#ifdef __linux__
    void* torch = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
    complete = torch != nullptr;
    const auto look = [&](auto& function, const char* name) {
      function = torch ? reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(torch, name)) : nullptr;
      complete = complete && function != nullptr;
    };
    look(library, "aoti_torch_library_init_impl");
    look(implement, "torch_library_impl");
    look(data, "aoti_torch_get_data_ptr");
    look(axes, "aoti_torch_get_dim");
    look(sizes, "aoti_torch_get_sizes");
    look(strides, "aoti_torch_get_strides");
    look(dtype, "aoti_torch_get_dtype");
    look(device, "aoti_torch_get_device_type");
    look(layout, "aoti_torch_get_layout");
    look(bytes, "aoti_torch_get_storage_size");
    look(offset, "aoti_torch_get_storage_offset");
    look(empty, "aoti_torch_empty_strided");
    look(undefined, "aoti_torch_new_uninitialized_tensor");
    look(delete_tensor, "aoti_torch_delete_tensor_object");
    look(threads, "torch_get_num_threads");
    look(text, "torch_string_c_str");
    look(delete_text, "torch_delete_string");
    look(length, "torch_list_size");
    look(item, "torch_list_get_item");
    look(delete_list, "torch_delete_list");
    const auto number = [&](std::int32_t& value, const std::string& name) {
      std::int32_t (*function)() = nullptr;
      look(function, name.c_str());
      if (function) value = function();
    };
    number(cpu, "aoti_torch_device_type_cpu");
    number(strided, "aoti_torch_layout_strided");
    // In the order of enum Dtype.
    const char* names[] = {"float32", "float64", "bfloat16", "float16", "uint8",
                           "int8",    "int16",   "int32",    "int64",   "bool"};
    for (int i = 0; i < kDtypes; ++i) number(dtypes[i], std::string("aoti_torch_dtype_") + names[i]);
#else
    static_cast<void>(path);
#endif
  }
};
inline TorchInterface& torch_interface() {
  static TorchInterface functions;
  return functions;
}

inline void succeed(int error) {
  if (error != 0) throw std::runtime_error("fastvae: a function of torch's C interface failed");
}

constexpr int kItemSizes[kDtypes] = {4, 8, 2, 2, 1, 1, 2, 4, 8, 1};

// Reads a tensor. One that a kernel must not read gets a flaw, and no address.
inline Tensor tensor_of(Handle handle) {
  Tensor t;
  if (handle == nullptr) return t;
  const TorchInterface& torch = torch_interface();
  t.given = true;
  std::int32_t device = 0, layout = 0, type = 0;
  i64 axes = 0, bytes = 0, offset = 0, *sizes = nullptr, *strides = nullptr;
  succeed(torch.device(handle, &device));
  succeed(torch.layout(handle, &layout));
  succeed(torch.dtype(handle, &type));
  succeed(torch.axes(handle, &axes));
  succeed(torch.sizes(handle, &sizes));
  t.axes = static_cast<int>(axes);
  while (t.dtype < kDtypes && torch.dtypes[t.dtype] != type) ++t.dtype;
  i64 *const n[] = {&t.n0, &t.n1, &t.n2}, *const s[] = {&t.s0, &t.s1, &t.s2};
  for (i64 i = 0; i < axes && axes <= 3; ++i) *n[i] = sizes[i];
  if (layout != torch.strided) return t.with(kNotStrided);
  if (t.dtype == kDtypes) return t.with(kUnknownDtype);
  succeed(torch.strides(handle, &strides));
  succeed(torch.bytes(handle, &bytes));
  succeed(torch.offset(handle, &offset));
  i64 last = offset, count = 1;
  for (i64 i = 0; i < axes; ++i) {
    count *= sizes[i];
    last += (sizes[i] - 1) * strides[i];
    if (axes <= 3) *s[i] = strides[i];
  }
  // As left by sharding for a parameter that is elsewhere.
  if (count > 0 && (last + 1) * kItemSizes[t.dtype] > bytes) return t.with(kFreed);
  if (device != torch.cpu) return t.with(kNotOnCpu);
  if (t.dtype == kBool) t.dtype = kUInt8;
  void* address = nullptr;
  succeed(torch.data(handle, &address));
  t.data = count > 0 ? reinterpret_cast<fastvae::address>(address) : 0;
  return t;
}

}  // namespace fastvae
