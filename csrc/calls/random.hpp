// Noise: fastvae/random.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// samples, rows, columns, sample_offset, row_offset, level, dtype.
struct NoiseArguments {
  i64 samples, rows, columns, sample_offset, row_offset, level;
  int dtype;
  template <class Caller>
  NoiseArguments(Caller& from, const Contract& contract)
      : samples(from.integer()), rows(from.integer()), columns(from.integer()), sample_offset(from.integer()),
        row_offset(from.integer()), level(from.integer()), dtype(from.dtype()) {
    contract.expect_count("samples", samples, 0);
    contract.expect_count("rows", rows, 0);
    contract.expect_count("columns", columns, 0);
    contract.expect_dtype(dtype);
  }
  template <class Caller>
  ResultsOf<Caller> draw(Caller& from, const GivenOf<Caller>& seed, const Tensor& net) const {
    static const auto kernel = FASTVAE_PICK(normal);
    MadeOf<Caller> out = make(seed, {samples, rows, columns}, dtype);
    from.run(kernel, out, dtype == kFloat64, Output{seed.data}, Output{net.data}, net.given ? seed.n0 : 0,
             samples, rows, columns, sample_offset, row_offset, level, from.threads());
    return from.results({std::move(out)});
  }
};

// seed, size and address of the noise, dtype -> normals. With a seed for each of several randomisations
// `otherwise` is called.
struct Normal {
  static constexpr const char* kName = "normal";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    from.read_otherwise();
    const GivenOf<Caller> seed = from.given();
    const Contract contract{kName};
    contract.expect_either("seed", seed, kInt64, {}, {-1});
    const NoiseArguments noise(from, contract);
    return seed.axes == 1 ? from.otherwise() : noise.draw(from, seed, {});
  }
};

// seeds, a net, size and address of the noise, dtype -> quasi-Monte-Carlo normals. Called from Python
// only, where the net is.
struct NormalOfNet {
  static constexpr const char* kName = "normal_of_net";
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    const GivenOf<Caller> seed = from.given();
    const Tensor net = from.tensor();
    const Contract contract{kName};
    contract.expect("seed", seed, kInt64, {-1}, true);
    contract.expect_count("the number of seeds", seed.n0);
    contract.expect("net", net, kInt64, {kNetBits, kNetColumns}, true);
    return NoiseArguments(from, contract).draw(from, seed, net);
  }
};

}  // namespace fastvae
