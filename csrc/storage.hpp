// Tensors of any dtype, read and written as numbers of the compute type.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Conversions of a storage type.
template <class C>
struct Storage {
  i64 size;  // bytes per element
  const C* (*load)(C* buffer, address from, i64 stride, int n);
  // null for integers, which have no gradients
  void (*store)(address to, const C* from, int n);
  void (*scatter)(address to, i64 stride, const C* from, int n);
  bool in_place;  // for the compute type itself
};

template <class T, class C>
const C* load_as(C* __restrict buffer, address from, i64 stride, int n) {
  const T* p = pointer<const T>(from);
  if constexpr (std::is_same<T, C>::value) {
    return load(buffer, p, stride, n);
  } else {
    if (stride == 1) {
#pragma omp simd
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<C>(upcast(p[i]));
    } else if (stride == 0) {
      fill(buffer, static_cast<C>(upcast(*p)), n);
    } else {
      for (int i = 0; i < n; ++i) buffer[i] = static_cast<C>(upcast(p[i * stride]));
    }
    return buffer;
  }
}
template <class T, class C>
void store_as(address to, const C* __restrict from, int n) {
  T* p = pointer<T>(to);
#pragma omp simd
  for (int i = 0; i < n; ++i) assign(p[i], static_cast<compute_t<T>>(from[i]));
}

template <class T, class C>
void scatter_as(address to, i64 stride, const C* from, int n) {
  if (stride == 1) return store_as<T, C>(to, from, n);
  T* p = pointer<T>(to);
  for (int i = 0; i < n; ++i) assign(p[i * stride], static_cast<compute_t<T>>(from[i]));
}

template <class T, class C>
constexpr Storage<C> integers = {sizeof(T), load_as<T, C>, nullptr, nullptr, false};

// In the order of enum Dtype.
template <class C>
const Storage<C>& storage(int dtype) {
  static const Storage<C> all[] = {
      {4, load_as<float, C>, store_as<float, C>, scatter_as<float, C>, std::is_same<C, float>::value},
      {8, load_as<double, C>, store_as<double, C>, scatter_as<double, C>, std::is_same<C, double>::value},
      {2, load_as<bf16, C>, store_as<bf16, C>, scatter_as<bf16, C>, false},
      {2, load_as<f16, C>, store_as<f16, C>, scatter_as<f16, C>, false},
      integers<std::uint8_t, C>,  // also bool
      integers<std::int8_t, C>,
      integers<std::int16_t, C>,
      integers<std::int32_t, C>,
      integers<i64, C>,
  };
  return all[dtype];
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
