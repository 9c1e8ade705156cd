// Matrix products by the BLAS that torch loaded into this process; none is linked. Compiled once.
#pragma once

#ifdef __linux__
#include <dlfcn.h>
#endif
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

#include "parallel.hpp"

namespace fastvae {

// Fortran's convention: matrices are stored column by column.
template <class C>
using Gemm = void (*)(const char* a_is, const char* b_is, const int* m, const int* n, const int* k,
                      const C* alpha, const C* a, const int* lda, const C* b, const int* ldb, const C* beta,
                      C* c, const int* ldc);

struct Blas {
  Gemm<float> sgemm = nullptr;
  Gemm<double> dgemm = nullptr;
  bool complete() const { return sgemm != nullptr && dgemm != nullptr; }
};
inline Blas& blas() {
  static Blas functions;
  return functions;
}

// Looks in torch's library and the libraries that it was linked to.
inline void find_blas(const char* torch_library) {
#ifdef __linux__
  void* torch = dlopen(torch_library, RTLD_LAZY | RTLD_NOLOAD);
  if (torch != nullptr) {
    blas().sgemm = reinterpret_cast<Gemm<float>>(dlsym(torch, "sgemm_"));
    blas().dgemm = reinterpret_cast<Gemm<double>>(dlsym(torch, "dgemm_"));
  }
#else
  static_cast<void>(torch_library);
#endif
}

template <class C>
void gemm(char a_is, char b_is, i64 m, i64 n, i64 k, const C* a, i64 lda, const C* b, i64 ldb, C beta, C* c,
          i64 ldc) {
  const int sizes[] = {static_cast<int>(m), static_cast<int>(n), static_cast<int>(k)};
  const int strides[] = {static_cast<int>(lda), static_cast<int>(ldb), static_cast<int>(ldc)};
  const C one = 1;
  const auto call = [&](auto function) {
    function(&a_is, &b_is, sizes, sizes + 1, sizes + 2, &one, a, strides, b, strides + 1, &beta, c,
             strides + 2);
  };
  if constexpr (std::is_same<C, float>::value) {
    call(blas().sgemm);
  } else {
    call(blas().dgemm);
  }
}

// True if products of floats use the tiles of gemm.hpp where the instruction set has them. On AMD's
// processors torch's BLAS leaves half of AVX-512's width unused (107 and 250 of 255 GFLOP/s per core;
// docs/log.md); on Intel's it is their own, and the tiles were not compared. FASTVAE_PRODUCTS=tiles or blas
// decides otherwise.
inline bool use_tiles() {
  static const bool use = [] {
    if (const char* wanted = std::getenv("FASTVAE_PRODUCTS")) {
      if (!std::strcmp(wanted, "tiles")) return true;
      if (!std::strcmp(wanted, "blas")) return false;
    }
#ifdef __x86_64__
    unsigned highest = 0, name[3] = {};
    return !__get_cpuid(0, &highest, name, name + 2, name + 1) || std::memcmp(name, "GenuineIntel", 12) != 0;
#else
    return true;
#endif
  }();
  return use;
}

}  // namespace fastvae
