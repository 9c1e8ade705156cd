// Estimates from importance weights: fastvae/estimation/weights.py.
#include "weights.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param log_px (B), tail (T, B), powers (6, B), moments (3, 4, B) float64 and count (B) int64, all
// contiguous
// @param to the other fields of LogMarginal in their order, each (B): written
void weight_estimates(const Tensor& log_px, const Tensor& tail, const Tensor& powers, const Tensor& moments,
                      const Tensor& count, double level, double normal_quantile, const Output* to,
                      int threads) {
  const i64 batch = count.n0;
  const int length = static_cast<int>(tail.n0);
  parallel(threads, batch, batch * length * 64, [&](i64 begin, i64 end) {
    WeightEstimates estimates(length);
    WeightStatistics& s = estimates.statistics;
    for (i64 b = begin; b < end; ++b) {
      const auto column = [&](const Tensor& from, i64 row) {
        return pointer<const double>(from.data)[row * batch + b];
      };
      for (int i = 0; i < length; ++i) s.tail[static_cast<std::size_t>(i)] = column(tail, i);
      for (int j = 0; j < s.kPowers; ++j) s.powers[j] = column(powers, j);
      for (int j = 0; j < s.kOrders * s.kMoments; ++j)
        s.moments[j / s.kMoments][j % s.kMoments] = column(moments, j);
      s.count = static_cast<double>(pointer<const i64>(count.data)[b]);
      s.log_px = column(log_px, 0);
      double found[kEstimates];
      estimates.compute(level, normal_quantile, found);
      for (int i = 0; i < kEstimates; ++i) pointer<double>(to[i])[b] = found[i];
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
