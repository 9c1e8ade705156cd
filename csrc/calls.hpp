// The ops: which arguments are read, which results are allocated, and which kernel is called. Written once
// for both callers, Python (python.hpp) and torch's dispatcher (dispatcher.hpp).
//
// Each op is a struct: its name, whether the dispatcher gets an empty tensor [0] for a result that is None,
// and the call.
#pragma once

#include "calls/aggregate.hpp"
#include "calls/normal_full.hpp"
#include "calls/categorical.hpp"
#include "calls/multinomial.hpp"
#include "calls/components.hpp"
#include "calls/head.hpp"
#include "calls/logsumexp.hpp"
#include "calls/normal_diagonal.hpp"
#include "calls/likelihood.hpp"
#include "calls/mixture.hpp"
#include "calls/random.hpp"
#include "calls/reduce.hpp"
#include "calls/weights.hpp"
