// Partition of rows, columns and samples into tiles: functions of the shape alone, so that results do not
// depend on threads.
#pragma once

#include "common.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Rows and vectors of a product's tile, which stays in registers.
constexpr int kTileRows = 8, kTileVectors = kVectorBytes == 64 ? 2 : 1;

// Samples summed before their sum is added to the previous ones.
constexpr i64 kSamplesPerBlock = 16;

inline int tile_width(i64 columns, i64 column) {
  return static_cast<int>(columns - column < kTile ? columns - column : kTile);
}

// Number of rows processed as one tile: a function of the shape alone, so that results do not depend on
// threads. Nearly a full tile, and all tiles of nearly the same height.
constexpr int kMostRows = 64;
inline i64 rows_per_tile(i64 rows, i64 columns) {
  const i64 pitch = columns > 0 ? (columns + 3) / 4 * 4 : 4;
  if (2 * pitch > kTile) return 1;
  const i64 fit = kTile / pitch < kMostRows ? kTile / pitch : kMostRows;
  const i64 tiles = (rows + fit - 1) / fit;
  return tiles ? (rows + tiles - 1) / tiles : 1;
}
inline Tile tile_of(i64 rows, i64 row, i64 height, i64 columns, i64 column) {
  const int n = tile_width(columns, column);
  return {static_cast<int>(rows - row < height ? rows - row : height), n, (n + 3) / 4 * 4};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
