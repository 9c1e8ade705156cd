// Compiles FASTVAE_UNIT, a file of csrc/units, for one instruction set: FASTVAE_FOR_AVX2, FASTVAE_FOR_AVX512,
// or else the base one. Empty where the compiler does not know it. generate.py writes the files that include
// this.
//
// The instruction set is that of the functions between two pragmas, not of the file: what the standard
// library and the headers included here have inline is compiled for the oldest in every unit, because the
// linker keeps one copy of it. So a header that a kernel's file includes, and that is not in an instruction
// set's namespace, is listed here.
#pragma once

#ifndef FASTVAE_UNIT
#define FASTVAE_UNIT "target.hpp"  // this file opened alone
#endif

#include <math.h>
#if defined(__linux__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <initializer_list>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if defined(FASTVAE_FOR_AVX512)
#define FASTVAE_ISA avx512
#define FASTVAE_VECTOR_BYTES 64
#elif defined(FASTVAE_FOR_AVX2)
#define FASTVAE_ISA avx2
#define FASTVAE_VECTOR_BYTES 32
#endif

#include "arguments.hpp"
#include "kernels.hpp"
#include "parallel.hpp"
#include "products.hpp"
#include "target.hpp"

// clang takes the features one by one: its "x86-64-v4" prefers vectors of half the length.
#if defined(FASTVAE_FOR_AVX512)
#ifdef FASTVAE_AVX512
#ifdef __clang__
#pragma clang attribute push(                                                                 \
    __attribute__((target("avx2,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), \
    apply_to = function)
#include FASTVAE_UNIT
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#include FASTVAE_UNIT
#pragma GCC pop_options
#endif
#endif
#elif defined(FASTVAE_FOR_AVX2)
#ifdef FASTVAE_AVX2
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma,bmi,bmi2"))), apply_to = function)
#include FASTVAE_UNIT
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#include FASTVAE_UNIT
#pragma GCC pop_options
#endif
#endif
#else
#include FASTVAE_UNIT
#endif
