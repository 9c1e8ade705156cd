// The instruction set for which this file is compiled, a namespace's name, and those that the compiler knows.
// unit.hpp sets it; a header opened alone is compiled for the base instruction set.
#pragma once

// FASTVAE_BASE_ONLY: a quick build for development, sanitisers and mutation checks.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(FASTVAE_BASE_ONLY)
#define FASTVAE_AVX2 1
#define FASTVAE_AVX512 1
#endif

#ifndef FASTVAE_ISA
#define FASTVAE_ISA base
#endif

// The length of a vector: the target pragmas do not define __AVX2__ and the like.
#ifndef FASTVAE_VECTOR_BYTES
#if defined(__AVX512F__)
#define FASTVAE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define FASTVAE_VECTOR_BYTES 32
#else
#define FASTVAE_VECTOR_BYTES 16
#endif
#endif
