// All kernels for one instruction set, FASTVAE_ISA, with vectors of FASTVAE_VECTOR_BYTES. No include guard:
// targets.hpp includes this file once per instruction set.
#include "aggregate.hpp"
#include "normal_full.hpp"
#include "categorical.hpp"
#include "multinomial.hpp"
#include "components.hpp"
#include "head.hpp"
#include "logsumexp.hpp"
#include "normal_diagonal.hpp"
#include "likelihood.hpp"
#include "mixture.hpp"
#include "random.hpp"
#include "reduce.hpp"

#undef FASTVAE_ISA
#undef FASTVAE_VECTOR_BYTES
#ifdef FASTVAE_TOGGLE
#undef FASTVAE_TOGGLE
#else
#define FASTVAE_TOGGLE
#endif
