// The walk that every row-reduced likelihood shares: rows r = (k, b) of parameters (K, B, X), data (B, X) broadcast over k.

constexpr i64 kRowsPerUnit = 16;

// out[k, b] = constant + sum over the row of part(k, b, column, n).
// Body is made anew per thread from params: its buffers are the thread's own. begin_tile() prepares what a tile's rows share.
// Short rows are handled many at a time, where the body can: body.add_sums(k, b, tile, sums) adds the sums of the rows from b on.
template <class Body, class Params>
void reduce_rows(const Params& params, i64 samples, i64 rows, i64 columns, compute_t<typename Params::Parameter>* out,
                 int threads) {
  using C = compute_t<typename Params::Parameter>;
  if (2 * columns <= kTile && Body::takes_tiles(params)) {
    const i64 height = rows_per_tile(rows, columns), tiles = (rows + height - 1) / height;
    parallel(threads, samples * tiles, samples * rows * columns, [&](i64 begin, i64 end) {
      Body body(params);
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 k = unit / tiles, b = unit % tiles * height;
        const int n = static_cast<int>(columns), count = tile_of(rows, b, height, columns, 0).rows;
        double sums[kMostRows] = {};
        body.add_sums(k, b, {count, n, n}, sums);
        for (int r = 0; r < count; ++r) out[k * rows + b + r] = static_cast<C>(sums[r]);
      }
      body.finish();
    });
    return;
  }
  const i64 total = samples * rows, units = (total + kRowsPerUnit - 1) / kRowsPerUnit;
  parallel(threads, units, total * columns, [&](i64 begin, i64 end) {
    Body body(params);
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit * kRowsPerUnit, last = first + kRowsPerUnit < total ? first + kRowsPerUnit : total;
      double sums[kRowsPerUnit] = {};
      for (i64 column = 0; column < columns; column += kTile) {
        const int n = tile_width(columns, column);
        body.begin_tile(column, n);
        for (i64 r = first; r < last; ++r) sums[r - first] += body.part(r / rows, r % rows, column, n);
      }
      for (i64 r = first; r < last; ++r) out[r] = static_cast<C>(sums[r - first]);
    }
    body.finish();
  });
}

// sums += factor * p, in double: sums over many samples.
template <class C>
FASTVAE_LOOP void add_scaled(int n, C factor, const C* __restrict p, double* __restrict sums) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sums[i] += factor * p[i];
}

// How many partial sums over rows are kept for a gradient that is summed over all rows: a function of the batch alone, so that
// the order of summation, and with it every bit, is the same for any number of threads.
inline i64 column_partials(i64 rows) { return rows < 64 ? rows : 64; }

// Calls body.backward(k, b, column, n) for every tile of every row. With `across`, sums over rows are wanted: a unit is then a
// group of data rows with all their samples, and body.begin_row / end_row / begin_group / end_group frame them.
template <class Body, class Params>
void for_each_row(const Params& params, i64 samples, i64 rows, i64 columns, bool across, int threads) {
  const i64 total = samples * rows;
  if (!across) {
    const i64 units = (total + kRowsPerUnit - 1) / kRowsPerUnit;
    parallel(threads, units, total * columns, [&](i64 begin, i64 end) {
      Body body(params);
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 first = unit * kRowsPerUnit, last = first + kRowsPerUnit < total ? first + kRowsPerUnit : total;
        for (i64 column = 0; column < columns; column += kTile) {
          const int n = tile_width(columns, column);
          body.begin_tile(column, n);
          for (i64 r = first; r < last; ++r) body.backward(r / rows, r % rows, column, n);
        }
      }
    });
    return;
  }
  const i64 groups = column_partials(rows);
  parallel(threads, groups, total * columns, [&](i64 begin, i64 end) {
    Body body(params);
    for (i64 group = begin; group < end; ++group) {
      for (i64 column = 0; column < columns; column += kTile) {
        const int n = tile_width(columns, column);
        body.begin_tile(column, n);
        body.begin_group(n);
        for (i64 b = rows * group / groups; b < rows * (group + 1) / groups; ++b) {
          body.begin_row(n);
          for (i64 k = 0; k < samples; ++k) body.backward(k, b, column, n);
          body.end_row(b, column, n);
        }
        body.end_group(group, column, n);
      }
    }
  });
}
