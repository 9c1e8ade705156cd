// Instruction set for which kernels are compiled. Their headers are included once for each, in a namespace
// named after it, and their include guards therefore compare two macros: FASTVAE_TOGGLE changes from one
// inclusion of kernels.hpp to the next. A header opened alone is compiled for the base instruction set.
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
