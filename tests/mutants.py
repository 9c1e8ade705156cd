"""Mutation check: break one line at a time, in a scratch copy, and see the tests notice.

``python -m tests.mutants [cpp|triton|python] [--only TEXT] [--jobs 2]`` prints a line per mutant, and fails
if one survives. It is no part of the test suite: the whole list takes about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """One wrong line: ``old`` (its ``nth`` occurrence) becomes ``new`` in ``file``.

    ``tests`` are those that must notice: files, ``"latent"`` for tests/test_latent.py, or a test of one, such
    as ``"latent::test_empty"``.
    """

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    nth: int = 0


CPP = [
    Mutant(
        "z: sign of the noise",
        "csrc/latent.hpp",
        "v = q.mu[i] + C(2) * half;",
        "v = q.mu[i] - C(2) * half;",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "ratio: sign of the noise",
        "csrc/latent.hpp",
        "terms[i] = eps[i] * eps[i] - white",
        "terms[i] = eps[i] * eps[i] + white",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "KL: the mean's term dropped",
        "csrc/latent.hpp",
        "out[i] = white * white + expm1",
        "out[i] = expm1",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "KL: half its constant",
        "csrc/latent.hpp",
        "static_cast<C>(0.5 * kl_sum[r])",
        "static_cast<C>(0.25 * kl_sum[r])",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "ratio: log variances dropped",
        "csrc/latent.hpp",
        "ratio_sum[k - k0][r] += constant[r];",
        ";",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "ratio: samples and rows swapped",
        "csrc/latent.hpp",
        "C* out = to.log_ratio + k * a.rows + b;",
        "C* out = to.log_ratio + b * a.samples + k;",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: the prior pushes",
        "csrc/latent.hpp",
        "C h = grad_z[i] - pull",
        "C h = grad_z[i] + pull",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: DReG weight dropped",
        "csrc/latent.hpp",
        "h = weight[i] * (h + push",
        "h = (h + push",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: half the entropy",
        "csrc/latent.hpp",
        "static_cast<C>(entropy[r])",
        "static_cast<C>(0.5 * entropy[r])",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: entropy kept by stl",
        "csrc/latent.hpp",
        ("            } else {\n              for (int r = 0; r < t.rows; ++r) entropy[r] +="),
        ("            }\n            {\n              for (int r = 0; r < t.rows; ++r) entropy[r] +="),
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: prior log variance",
        "csrc/latent.hpp",
        "part * white - ratio[i]",
        "part * white",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: gradient outside the clamp",
        "csrc/latent.hpp",
        "q.clamped[i] > q.logvar[i] ? C(0)",
        "q.clamped[i] > q.logvar[i] ? v",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "noise: a key constant",
        "csrc/random.hpp",
        "0x9E3779B9u",
        "0x9E3779BAu",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: a quarter turn's sign",
        "csrc/random.hpp",
        "((turns + 0x40000000u) & sign)",
        "(turns & sign)",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: rows and samples swapped",
        "csrc/random.hpp",
        "{pattern0 + blocks, pattern1 + rows, samples, zero}",
        "{pattern0 + blocks, samples, pattern1 + rows, zero}",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: the chunk's offset dropped",
        "csrc/random.hpp",
        "static_cast<std::uint32_t>(sample + sample_offset_)",
        "static_cast<std::uint32_t>(sample)",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "gaussian: log 2 pi dropped",
        "csrc/likelihood.hpp",
        "+ f.constant * n;",
        ";",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "gaussian: constant once per row",
        "csrc/likelihood.hpp",
        "own *= n;",
        ";",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "gaussian: sign of x's gradient",
        "csrc/likelihoods/gaussian.hpp",
        "return {-mean, mean,",
        "return {mean, mean,",
        ("likelihoods", "gaussian"),
    ),
    Mutant(
        "gaussian: twice a row's log variance",
        "csrc/likelihoods/gaussian.hpp",
        "mean, C(0.5) * (part",
        "mean, (part",
        ("likelihoods", "gaussian"),
    ),
    Mutant(
        "gaussian: last tile alone",
        "csrc/likelihood.hpp",
        "(column == 0 ? C(0) : sum[r])",
        "C(0)",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "gaussian: samples and rows swapped",
        "csrc/likelihood.hpp",
        "const i64 first = (k * a.rows + b)",
        "const i64 first = (b * a.samples + k)",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "bernoulli: wrong side",
        "csrc/likelihoods/bernoulli.hpp",
        "l > C(0) ? C(1) - e.x : e.x",
        "l > C(0) ? e.x : C(1) - e.x",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "bernoulli: 0 * inf",
        "csrc/likelihoods/bernoulli.hpp",
        "miss == C(0) ? C(0) : miss * magnitude",
        "miss * magnitude",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "bernoulli: sigmoid of |l|",
        "csrc/likelihoods/bernoulli.hpp",
        "(l >= C(0) ? C(1) : t)",
        "C(1)",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "bernoulli: range check",
        "csrc/likelihood.hpp",
        "return low == lowest && high == highest;",
        "return high == highest;",
        ("likelihoods", "bernoulli", "gaussian", "poisson"),
    ),
    Mutant(
        "importance: log K dropped",
        "csrc/importance.hpp",
        "- log_samples",
        "",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: weights not divided",
        "csrc/importance.hpp",
        " / total[column + i];",
        ";",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: denormal weights kept",
        "csrc/importance.hpp",
        "w < tiny || ",
        "",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: -inf minus -inf",
        "csrc/importance.hpp",
        "abs_(maximum) == infinity(C{}) ? C(0) : maximum",
        "maximum",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "half precision: no rounding",
        "csrc/common.hpp",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "bits >> 16",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "noise: odd calls take the even words",
        "csrc/random.hpp",
        "(pattern0 >> 32) + blocks",
        "pattern0 + blocks",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: planes in another order",
        "csrc/random.hpp",
        "high2[l] = low2[l] + (lanes > 2 ? lanes / 2 : 2);",
        "high2[l] = low2[l];",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "tile: its last rows",
        "csrc/random.hpp",
        "rows - row < height ? rows - row : height",
        "height - 1",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "tile: the end of a row",
        "csrc/common.hpp",
        "mask > zero ?",
        "mask > zero + C(1) ?",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "copy: the last vector",
        "csrc/common.hpp",
        "(to + n - step) = *reinterpret_cast<const Vector<C>*>(from + n - step)",
        "(to + n - step) = *reinterpret_cast<const Vector<C>*>(from)",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "slope: not halved",
        "csrc/latent.hpp",
        "if constexpr (kKeep) slope[i] = half;",
        "if constexpr (kKeep) slope[i] = C(2) * half;",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: blocks of samples forgotten",
        "csrc/latent.hpp",
        "if (&sums == &block && last) total",
        "if (&sums == &block && last && k + 1 == a.samples) total",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "bernoulli: product of the pairs",
        "csrc/common.hpp",
        "e[i] += other[i] * (C(1) + e[i]);",
        "e[i] += other[i];",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "exp: large arguments",
        "csrc/common.hpp",
        "const float s = e.power(down - 64);",
        "const float s = e.power(down - 63);",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "gaussian: a tile's constant",
        "csrc/likelihood.hpp",
        "(to[r] + f.constant * n +",
        "(to[r] + 0.5 * f.constant * n +",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "gaussian: a tile of another sample",
        "csrc/likelihood.hpp",
        "k * from.s0 + b * from.s1, from.s1",
        "b * from.s1, from.s1",
        ("likelihoods", "gaussian", "bernoulli", "poisson"),
    ),
    Mutant(
        "bernoulli: the logarithms of a tile of short rows left out",
        "csrc/likelihood.hpp",
        "L::kSharedLog ? value + log1p_(v.odds) : value",
        "value",
        ("likelihoods", "bernoulli", "gaussian", "poisson"),
    ),
    Mutant(
        "clamp: the lower side alone is ignored",
        "csrc/latent.hpp",
        "a.logvar_min > -infinity(C{}) || ",
        "",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: the upper side alone is ignored",
        "csrc/latent.hpp",
        " || a.logvar_max < infinity(C{})",
        "",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: gradient below it",
        "csrc/latent.hpp",
        "q.clamped[i] < q.logvar[i] ||",
        "",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: no gradient inside",
        "csrc/latent.hpp",
        "q.clamped[i] < q.logvar[i] ||",
        "q.clamped[i] <= q.logvar[i] ||",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "range check: first tile of a row alone",
        "csrc/likelihood.hpp",
        "if (f.checked && k == 0) o |=",
        "if (f.checked && k == 0 && column == 0) o |=",
        ("numbers::test_a_single_target_out_of_range_is_refused",),
    ),
    Mutant(
        "range check: first rows alone",
        "csrc/likelihood.hpp",
        "if (f.checked && k == 0) o |=",
        "if (f.checked && k == 0 && i < 16) o |=",
        ("numbers::test_a_single_target_out_of_range_is_refused",),
    ),
    Mutant(
        "range check: first tile of rows alone",
        "csrc/likelihood.hpp",
        "if (f.checked && k == 0) o |=",
        "if (f.checked && k == 0 && b == 0)",
        ("numbers::test_a_single_target_out_of_range_is_refused",),
    ),
    Mutant(
        "range check: first row of a tile alone",
        "csrc/likelihood.hpp",
        "!within(r.shape(count).size()",
        "!within(r.n",
        ("numbers::test_a_single_target_out_of_range_is_refused",),
    ),
    Mutant(
        "range check: the upper end",
        "csrc/likelihood.hpp",
        "return low == lowest && high == highest;",
        "return low == lowest;",
        ("numbers::test_a_single_target_out_of_range_is_refused",),
    ),
    Mutant(
        "half precision: subnormals loaded",
        "csrc/common.hpp",
        "bits = exponent == 0 ? bit_cast<std::uint32_t>(subnormal) : bits;",
        "",
        ("numbers::test_every_half_precision_number_is_read",),
    ),
    Mutant(
        "half precision: infinity loaded",
        "csrc/common.hpp",
        "exponent == (0x7c00u << 13) ? normal + (112u << 23) : normal",
        "normal",
        ("numbers::test_every_half_precision_number_is_read",),
    ),
    Mutant(
        "half precision: overflow to infinity",
        "csrc/common.hpp",
        "half = bits >= (143u << 23) ?",
        "half = bits >= (255u << 23) ?",
        ("numbers::test_every_result_is_rounded_to_the_nearest",),
    ),
    Mutant(
        "half precision: subnormals stored",
        "csrc/common.hpp",
        "bits < (113u << 23) ? subnormal : normal",
        "normal",
        ("numbers::test_every_result_is_rounded_to_the_nearest",),
    ),
    Mutant(
        "half precision: ties of float16",
        "csrc/common.hpp",
        "+ 0xfffu + ((bits >> 13) & 1u)) >> 13",
        "+ 0x1000u) >> 13",
        ("numbers::test_every_result_is_rounded_to_the_nearest",),
    ),
    Mutant(
        "half precision: float16's NaN",
        "csrc/common.hpp",
        "(bits > 0x7f800000u ? 0x7e00u : 0x7c00u)",
        "0x7c00u",
        ("numbers::test_nan_of_any_payload_stays_nan",),
    ),
    Mutant(
        "half precision: bfloat16's NaN",
        "csrc/common.hpp",
        "(bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded",
        "rounded",
        ("numbers::test_nan_of_any_payload_stays_nan",),
    ),
    Mutant(
        "half precision: float16's sign",
        "csrc/common.hpp",
        "half | (sign >> 16)",
        "half",
        ("numbers::test_every_result_is_rounded_to_the_nearest",),
    ),
    Mutant(
        "sums: tiles of a row in float",
        "csrc/likelihood.hpp",
        "double sums[kRowsPerUnit] = {};",
        "C sums[kRowsPerUnit] = {};",
        ("numbers::test_very_long_rows",),
    ),
    Mutant(
        "sums: tiles of a latent row in float",
        "csrc/common.hpp",
        "sums[r] += total;",
        "sums[r] = C(sums[r] + total);",
        ("numbers::test_very_long_rows",),
    ),
    Mutant(
        "sums: samples in float",
        "csrc/likelihood.hpp",
        "sums[i] += p[i];",
        "sums[i] = C(sums[i] + p[i]);",
        ("numbers::test_gradients_over_many_samples",),
    ),
    Mutant(
        "a parameter of any stride read at stride 1",
        "csrc/likelihood.hpp",
        "column * t.s2, t.s2, n);",
        "column * t.s2, 1, n);",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a parameter of any stride read at stride 1, short rows",
        "csrc/likelihood.hpp",
        "a.p[j].data, a.p[j].s2, n);",
        "a.p[j].data, 1, n);",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "gradients of short rows by the first row's",
        "csrc/likelihood.hpp",
        "sink.grad(k, b + i), t.n);",
        "sink.grad(k, b), t.n);",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "gradients of short rows: a group's first tile alone",
        "csrc/likelihood.hpp",
        "for (i64 b = a.rows * unit / groups; b < stop; b += height) {",
        "for (i64 b = a.rows * unit / groups; b < stop; b += a.rows) {",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a column's gradient: the first row of a tile alone",
        "csrc/likelihood.hpp",
        "for (int r = 0; r < t.rows; ++r) add_to(t.n,",
        "for (int r = 0; r < 1; ++r) add_to(t.n,",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a number's gradient: the last pixel alone",
        "csrc/likelihood.hpp",
        "all += sum;",
        "all = sum;",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a row's own part: not times its pixels, short rows",
        "csrc/likelihood.hpp",
        "own[r] *= n;",
        ";",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a row's own part: of the first row alone, short rows",
        "csrc/likelihood.hpp",
        "own[r] = own[0];",
        ";",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a log variance of another row, short rows",
        "csrc/likelihood.hpp",
        "(b + r) * from.s1",
        "b * from.s1",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "a column's gradient: all tiles in the first",
        "csrc/likelihood.hpp",
        "group * a.columns + column)];",
        "group * a.columns)];",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "x's gradient: the last sample alone",
        "csrc/likelihood.hpp",
        "if (to.x) add_to(",
        "if (to.x && k == a.samples - 1) add_to(",
        ("gaussian", "numbers", "shapes"),
    ),
    Mutant(
        "sums: a group of rows left out",
        "csrc/likelihood.hpp",
        "for (i64 group = 0; group < groups; ++group) sum +=",
        "for (i64 group = 1; group < groups; ++group) sum +=",
        ("numbers::test_gradients_over_many_samples", "gaussian"),
    ),
    Mutant(
        "sums: entropies in float",
        "csrc/latent.hpp",
        "entropy[r] += *g.log_ratio.at(k, b + r);",
        "entropy[r] = C(entropy[r]) + *g.log_ratio.at(k, b + r);",
        ("numbers::test_gradients_over_many_samples",),
    ),
    Mutant(
        "sums: blocks of weights in float",
        "csrc/importance.hpp",
        "sum[i] = sum[i] * scale[i] + part[i];",
        "sum[i] = C(sum[i]) * scale[i] + part[i];",
        ("numbers::test_weights_of_many_samples_sum_to_one",),
    ),
    Mutant(
        "sums: blocks of samples forgotten for the prior",
        "csrc/latent.hpp",
        "    add(n, prior, other.prior);\n",
        "",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "threads: a unit left out",
        "csrc/parallel.hpp",
        "t.units * (part + 1) / t.parts);",
        "t.units * (part + 1) / t.parts - (part + 1 < t.parts));",
        ("torch::test_threads_do_not_change_a_bit",),
    ),
    Mutant(
        "log variance: one row's of another sample",
        "csrc/likelihood.hpp",
        "k * t.s0 + b * t.s1 + column",
        "b * t.s1 + column",
        ("numbers::test_log_variances_of_every_layout",),
    ),
    Mutant(
        "log variance: one row's gradient of another sample",
        "csrc/likelihood.hpp",
        "pointer<C>(to.p[j]) + k * a.rows + b",
        "pointer<C>(to.p[j]) + b",
        ("numbers::test_log_variances_of_every_layout",),
    ),
    Mutant(
        "weigh: coefficient dropped beside beta",
        "csrc/weigh.hpp",
        "return coefficient * storage->load",
        "return 1.0 * storage->load",
        ("weigh",),
    ),
    Mutant(
        "weigh: beta of the first row",
        "csrc/weigh.hpp",
        "b * beta.s0 * storage->size",
        "0 * beta.s0 * storage->size",
        ("weigh",),
    ),
    Mutant(
        "weigh: mean over samples not divided",
        "csrc/weigh.hpp",
        "out[i] /= static_cast<double>(samples);",
        ";",
        ("weigh",),
    ),
    Mutant(
        "weigh: term of the first sample alone",
        "csrc/weigh.hpp",
        "w.each_sample ? samples : 1, first",
        "1, first",
        ("weigh",),
    ),
    Mutant(
        "weigh: factor dropped from the mean",
        "csrc/weigh.hpp",
        "likelihood[i] + factor(first + i) * added[i]",
        "likelihood[i] + added[i]",
        ("weigh",),
    ),
    Mutant(
        "weigh: factor of a tile's first row",
        "csrc/weigh.hpp",
        "added[i] = factor(first + i);",
        "added[i] = factor(first);",
        ("weigh",),
    ),
    Mutant(
        "weigh: term of the first rows in every unit",
        "csrc/weigh.hpp",
        "term + k * w.term.s0 + first * w.term.s1",
        "term + k * w.term.s0",
        ("weigh",),
    ),
    Mutant(
        "weigh: term read at stride 1",
        "csrc/weigh.hpp",
        "static_cast<C>(added[i]) * t[i * w.term.s1]",
        "static_cast<C>(added[i]) * t[i]",
        ("weigh",),
    ),
    Mutant(
        "weigh: sum over the batch for its mean",
        "csrc/weigh.hpp",
        "static_cast<C>(w.scale * sum)",
        "static_cast<C>(sum)",
        ("weigh",),
    ),
    Mutant(
        "weigh: log-likelihoods of the first unit alone",
        "csrc/weigh.hpp",
        "log_likelihood[first + i] = ",
        "log_likelihood[i] = ",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: batch's mean not divided",
        "csrc/weigh.hpp",
        "static_cast<C>(scale * pointer<const C>(from.bound",
        "static_cast<C>(pointer<const C>(from.bound",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: bound's gradient of the first row",
        "csrc/weigh.hpp",
        "[b * from.bound.s0]",
        "[0]",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: log-likelihood's gradient dropped",
        "csrc/weigh.hpp",
        "share * (arrives + extra)",
        "share * (arrives)",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: samples not averaged",
        "csrc/weigh.hpp",
        "static_cast<C>(share * (arrives + extra))",
        "static_cast<C>(arrives + extra)",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: denormal weights kept",
        "csrc/weigh.hpp",
        "g = weights[i] == C(0) || abs_(product) < tiny ? C(0) : product;",
        "g = product;",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: term's factor dropped",
        "csrc/weigh.hpp",
        "term[i] = static_cast<C>(c * (",
        "term[i] = static_cast<C>((",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: Monte Carlo term not averaged",
        "csrc/weigh.hpp",
        "static_cast<double>(g) : share * arrives)",
        "static_cast<double>(g) : arrives)",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: sum over samples of a row's term",
        "csrc/weigh.hpp",
        "c * (w.log_mean_exp ? sum : static_cast<double>(arrives))",
        "c * static_cast<double>(arrives)",
        ("weigh",),
    ),
    Mutant(
        "weigh: a mean taken for log weights",
        "csrc/weigh.hpp",
        "if (log_likelihood || !w.log_mean_exp) {",
        "if (!w.log_mean_exp) {",
        ("weigh",),
    ),
    Mutant(
        "draw: offset of rows read as that of samples",
        "csrc/casters.hpp",
        "value.row_offset = fastvae::integer(PyTuple_GET_ITEM(t, 2));",
        "value.row_offset = fastvae::integer(PyTuple_GET_ITEM(t, 1));",
        ("addresses", "latent"),
    ),
    Mutant(
        "weigh: sum for the batch's mean",
        "csrc/arguments.hpp",
        "1.0 / static_cast<double>(x.n0)",
        "1.0",
        ("weigh",),
    ),
    Mutant(
        "weigh: a term of each sample for one of all",
        "csrc/arguments.hpp",
        "each_sample(added.axes == 2)",
        "each_sample(false)",
        ("weigh",),
    ),
    Mutant(
        "weigh: decoder's rows at the wrong distance",
        "csrc/arguments.hpp",
        "to.s0 = p.s0 * x.n0",
        "to.s0 = p.s0",
        ("weigh",),
    ),
    Mutant(
        "weigh: a row of a parameter read at stride 1",
        "csrc/arguments.hpp",
        "number ? 0 : p.axes == 1 ? p.s0 : p.s1",
        "number ? 0 : 1",
        ("weigh",),
    ),
    Mutant(
        "tensors: an axis that is lacking comes last",
        "csrc/arguments.hpp",
        "t.s2 = t.s1, t.s1 = t.s0, t.s0 = 0;",
        "t.s2 = 0;",
        ("latent", "bernoulli"),
    ),
    Mutant(
        "poisson: sign of the gradient",
        "csrc/likelihoods/poisson.hpp",
        "g * (e.x - exp_(e.p0))",
        "g * (exp_(e.p0) - e.x)",
        ("likelihoods",),
    ),
    Mutant(
        "poisson: the constant of the counts dropped",
        "csrc/likelihoods/poisson.hpp",
        "return {-log_factorial_excess(x, log_x), log_x}",
        "return {C(0), log_x}",
        ("likelihoods",),
    ),
    Mutant(
        "poisson: cancels near the mode",
        "csrc/likelihoods/poisson.hpp",
        "abs_(d) < C(1) ?",
        "abs_(d) < C(0) ?",
        ("poisson",),
    ),
    Mutant(
        "poisson: inf - inf",
        "csrc/likelihoods/poisson.hpp",
        "d > C(710) ? C(710) : d",
        "d",
        ("poisson",),
    ),
    Mutant(
        "poisson: 0 * inf",
        "csrc/likelihoods/poisson.hpp",
        "(e.x == C(0) ? C(0) : e.x * linear)",
        "e.x * linear",
        ("poisson",),
    ),
    Mutant(
        "poisson: counts below zero",
        "csrc/likelihoods/poisson.hpp",
        "static constexpr double kLow = 0;",
        "",
        ("likelihoods",),
    ),
    Mutant(
        "counts: zeros add a little",
        "csrc/common.hpp",
        "(x == 0.0f ? 0.0f : below)",
        "below + 1e-7f",
        ("poisson",),
    ),
    Mutant(
        "counts: fractions as if they were whole",
        "csrc/common.hpp",
        "return x < 1.0f ? (",
        "return x < 0.0f ? (",
        ("likelihoods", "poisson"),
    ),
    Mutant(
        "data: of the first row for all",
        "csrc/likelihood.hpp",
        "if (b != b_read || column != column_read)",
        "if (column != column_read)",
        ("likelihoods",),
    ),
    Mutant(
        "data: of the first tile for all",
        "csrc/likelihood.hpp",
        "if (b != b_read || column != column_read)",
        "if (b != b_read)",
        ("likelihoods",),
    ),
    Mutant(
        "data: of the first short rows for all",
        "csrc/likelihood.hpp",
        "    if (b != b_read) {",
        "    if (b_read < 0) {",
        ("likelihoods",),
    ),
    Mutant(
        "data: results in each other's place",
        "csrc/likelihood.hpp",
        "out[row_by_row ? i % a.samples * a.rows + i / a.samples : i]",
        "out[i]",
        ("likelihoods",),
    ),
    Mutant(
        "data: short rows in each other's place",
        "csrc/likelihood.hpp",
        "row_by_row ? unit % a.samples : unit / tiles",
        "unit / tiles",
        ("likelihoods",),
    ),
    Mutant(
        "integers: signed bytes as unsigned",
        "csrc/likelihood.hpp",
        "integers<std::int16_t, C>,",
        "integers<std::uint16_t, C>,",
        ("poisson", "likelihoods"),
    ),
    Mutant(
        "integers: bool as its neighbour",
        "csrc/casters.hpp",
        "if (t.dtype == kBool) t.dtype = kUInt8;",
        "if (t.dtype == kBool) t.dtype = kUInt8 + 3;",
        ("likelihoods",),
    ),
    Mutant(
        "poisson: gradients of a sample without weight",
        "csrc/likelihoods/poisson.hpp",
        "g == C(0) ? C(0) : g * (e.x - exp_(e.p0))",
        "g * (e.x - exp_(e.p0))",
        ("poisson",),
    ),
    Mutant(
        "flat draws: rows and samples swapped",
        "csrc/arguments.hpp",
        "t.s0 = t.n1 * s0, t.s1 = s0",
        "t.s0 = s0, t.s1 = n * s0",
        ("weigh", "mathematics", "chunks", "likelihoods"),
    ),
]

TRITON = [
    Mutant(
        "z: sign of the noise",
        "kernels/latent.py",
        "b_z = b_mu + b_sigma",
        "b_z = b_mu - b_sigma",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "KL: the mean's term dropped",
        "kernels/latent.py",
        "b_white * b_white + b_excess",
        "b_excess",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "KL: padding counted",
        "kernels/latent.py",
        "tl.where(o_d < D, b_term, 0.0)",
        "b_term",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "ratio: half its constant",
        "kernels/latent.py",
        "return 0.5 * ((b_eps",
        "return 0.25 * ((b_eps",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "ratio: rows and samples swapped",
        "kernels/latent.py",
        "o_ratio = (i_d_split.to(tl.int64) * K + o_k) * B + o_b",
        "o_ratio = (i_d_split.to(tl.int64) * B + o_b) * K + o_k",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: the prior pushes",
        "kernels/latent.py",
        "b_h -= b_pull",
        "b_h += b_pull",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: DReG weight dropped",
        "kernels/latent.py",
        "b_h *= b_weight",
        "b_h *= 1.0",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: half the entropy",
        "kernels/latent.py",
        "b_out += 0.5 * tl.sum(s_entropy",
        "b_out += 0.25 * tl.sum(s_entropy",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: prior log variance",
        "kernels/latent.py",
        "b_part * b_white - b_g), 0.0)",
        "b_part * b_white), 0.0)",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "backward: gradient outside the clamp",
        "kernels/latent.py",
        "b_out = tl.where(b_inside, b_out, 0.0)",
        "b_out = b_out",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "noise: rows and samples swapped",
        "kernels/random.py",
        "o_b.to(tl.uint32), o_k.to(tl.uint32)",
        "o_k.to(tl.uint32), o_b.to(tl.uint32)",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: a quarter turn's sign",
        "kernels/random.py",
        "(add_bits(b_n, 1) & 2) << 30",
        "(add_bits(b_n, 2) & 2) << 30",
        ("random", "importance", "bernoulli", "gaussian", "latent"),
    ),
    Mutant(
        "noise: the row's offset dropped",
        "kernels/latent.py",
        "o_b + row_offset",
        "o_b",
        ("latent", "importance", "bernoulli", "gaussian", "random"),
    ),
    Mutant(
        "gaussian: log 2 pi dropped",
        "kernels/likelihoods/gaussian.py",
        "LOG_2_PI + logvar",
        "logvar",
        ("likelihoods", "gaussian"),
    ),
    Mutant(
        "gaussian: sign of x's gradient",
        "kernels/likelihoods/gaussian.py",
        "return -grad_mean, grad_mean",
        "return grad_mean, grad_mean",
        ("likelihoods", "gaussian"),
    ),
    Mutant(
        "gaussian: twice the log variance",
        "kernels/likelihoods/gaussian.py",
        "0.5 * (part",
        "(part",
        ("likelihoods", "gaussian"),
    ),
    Mutant(
        "gaussian: padding rows counted",
        "kernels/likelihood.py",
        "s_grad += tl.where(m_row, b_grad, 0.0)",
        "s_grad += b_grad",
        ("extremes::test_a_scale_too_small_for_its_type",),
    ),
    Mutant(
        "gaussian: padding samples counted",
        "kernels/likelihood.py",
        "b_grads[0] if FINITE else tl.where(m_row, b_grads[0], 0.0)",
        "b_grads[0]",
        ("extremes::test_a_scale_too_small_for_its_type",),
    ),
    Mutant(
        "bernoulli: wrong side",
        "kernels/likelihoods/bernoulli.py",
        "tl.where(logits > 0, 1.0 - x, x)",
        "tl.where(logits > 0, x, 1.0 - x)",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "bernoulli: 0 * inf",
        "kernels/likelihoods/bernoulli.py",
        "tl.where(miss == 0, 0.0, miss * margin)",
        "miss * margin",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "bernoulli: sigmoid of |l|",
        "kernels/likelihoods/bernoulli.py",
        "tl.where(logits > 0, (x - 1.0) + t, x - t)",
        "((x - 1.0) + t)",
        ("likelihoods", "bernoulli"),
    ),
    Mutant(
        "importance: log K dropped",
        "kernels/importance.py",
        " - log(tl.zeros([BLOCK_N, 1], dtype=DTYPE) + count)",
        "",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: rescaling dropped",
        "kernels/importance.py",
        "b_sum = b_sum * b_rescale",
        "b_sum = b_sum",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: denormal weights kept",
        "kernels/importance.py",
        "(b_weight < TINY) | ",
        "",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: -inf minus -inf",
        "kernels/importance.py",
        'tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)',
        "b_max",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "bernoulli: a product's last term",
        "kernels/common.py",
        "b_s + (b_t + b_s * b_t)",
        "b_s + b_t",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "bernoulli: log 1.5",
        "kernels/common.py",
        "tl.where(b_s < 0.5, log1p(b_s)",
        "tl.where(b_s < 2.5, log1p(b_s)",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "exp: the last step",
        "kernels/common.py",
        "(b_x - b_f * LOG_2_HIGH) - b_f * LOG_2_LOW",
        "b_x - b_f * LOG_2_HIGH",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "KL: a polynomial's range",
        "kernels/common.py",
        "tl.abs(b_x - 0.25) < 1.25",
        "tl.abs(b_x - 0.25) < 2.5",
        ("importance", "bernoulli", "gaussian", "latent", "random"),
    ),
    Mutant(
        "importance: a part's sum forgotten",
        "kernels/importance.py",
        "b_term *= load(p_part, o_k * N + o_n, mask, DTYPE)",
        "b_term *= 1.0",
        ("shapes",),
    ),
    Mutant(
        "importance: a part of another split",
        "kernels/importance.py",
        "o_out = i_split.to(tl.int64) * N + o_n",
        "o_out = o_n",
        ("shapes",),
    ),
    Mutant(
        "KL: a part of another split",
        "kernels/latent.py",
        "o_kl = i_d_split.to(tl.int64) * B + o_b",
        "o_kl = o_b",
        ("shapes",),
    ),
    Mutant(
        "traffic: mu is read twice",
        "kernels/latent.py",
        "b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)",
        (
            "b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)\n"
            "    b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)"
        ),
        ("traffic",),
    ),
    Mutant(
        "traffic: logits are read twice",
        "kernels/likelihood.py",
        "    return load(p_p, o_k",
        "    load(p_p, o_k * stride_k + o_b * stride_b + o_x * stride_x, mask, DTYPE, PADDING)\n"
        "    return load(p_p, o_k",
        ("traffic",),
    ),
    Mutant(
        "traffic: a copy of the means",
        "kernels/likelihood.py",
        "        (x, *parameters, out),",
        "        (x, parameters[0].clone(), *parameters[1:], out),",
        ("traffic",),
    ),
    Mutant(
        "traffic: a result is written twice",
        "kernels/latent.py",
        "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))",
        (
            "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))\n"
            "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))"
        ),
        ("traffic",),
    ),
    Mutant(
        "code: tiles that spill",
        "kernels/common.py",
        '"latent_backward": Launch(512, 128, 128, 64)',
        '"latent_backward": Launch(4096, 128, 128, 64)',
        ("kernels_compile::test_nothing_spills",),
    ),
    Mutant(
        "code: rows not known to be aligned",
        "kernels/likelihood.py",
        'do_not_specialize=["K", "B", "x_tiles"]',
        'do_not_specialize=["K", "B", "X", "x_tiles"]',
        ("kernels_compile::test_loads_and_stores_are_wide",),
    ),
    Mutant(
        "offsets: int32 in the likelihoods",
        "kernels/common.py",
        "o_x = (start + tl.arange(0, BLOCK)).to(tl.int64)",
        "o_x = start + tl.arange(0, BLOCK)",
        ("shapes",),
    ),
    Mutant(
        "offsets: int32 in the backward pass",
        "kernels/latent.py",
        "o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]",
        "o_b = (i_b + tl.arange(0, BLOCK_B))[None, :, None]",
        ("shapes",),
        nth=2,
    ),
    Mutant(
        "launch: numbers in another order",
        "kernels/common.py",
        "run(*tensors, *loose, *numbers, *constants)",
        "run(*tensors, *numbers, *loose, *constants)",
        ("launches",),
    ),
    Mutant(
        "clamp: no gradient at its lower edge",
        "kernels/latent.py",
        "b_low = b_logvar < LOGVAR_MIN",
        "b_low = b_logvar <= LOGVAR_MIN",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: no gradient at its upper edge",
        "kernels/latent.py",
        "b_high = b_logvar > LOGVAR_MAX",
        "b_high = b_logvar >= LOGVAR_MAX",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: one of one side is ignored",
        "kernels/latent.py",
        'draw.logvar_min > float("-inf") or draw.logvar_max < float("inf")',
        'draw.logvar_min > float("-inf")',
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "clamp: gradient below it",
        "kernels/latent.py",
        "b_inside = (b_low | b_high) == 0",
        "b_inside = b_high == 0",
        ("numbers::test_a_clamp_of_one_side",),
    ),
    Mutant(
        "backward: the first sample's place lost",
        "kernels/latent.py",
        "seed, o_k + sample_offset, o_b + row_offset, i_d",
        "seed, o_k, o_b + row_offset, i_d",
        ("addresses::test_a_shards_rows_and_draws_are_those_of_the_whole",),
        nth=1,
    ),
    Mutant(
        "backward: the first row's place lost",
        "kernels/latent.py",
        "seed, o_k + sample_offset, o_b + row_offset, i_d",
        "seed, o_k + sample_offset, o_b, i_d",
        ("addresses::test_a_shards_rows_and_draws_are_those_of_the_whole",),
        nth=1,
    ),
    Mutant(
        "forward: the first sample's place lost",
        "kernels/latent.py",
        "seed, o_k + sample_offset, o_b + row_offset, i_d",
        "seed, o_k, o_b + row_offset, i_d",
        ("addresses::test_a_shards_rows_and_draws_are_those_of_the_whole",),
    ),
    Mutant(
        "launch: programs of another device",
        "kernels/common.py",
        "num_warps, device, *wide)",
        "num_warps, *wide)",
        ("launch_keys::test_a_program_belongs_to_its_device",),
    ),
    Mutant(
        "launch: programs of narrow numbers",
        "kernels/common.py",
        "num_warps, device, *wide)",
        "num_warps, device)",
        ("launch_keys::test_a_program_belongs_to_the_width_of_its_numbers",),
    ),
    Mutant(
        "launch: programs of another dtype",
        "kernels/common.py",
        "types.append(t.dtype)",
        "types.append(None)",
        ("launch_keys::test_a_program_belongs_to_its_dtypes_and_constants",),
    ),
    Mutant(
        "launch: programs of other constants",
        "kernels/common.py",
        "*numbers, *constants.values(), num_warps",
        "*numbers, num_warps",
        ("launch_keys::test_a_program_belongs_to_its_dtypes_and_constants",),
    ),
    Mutant(
        "split sums: the first part alone",
        "kernels/common.py",
        "if parts.shape[0] == 1 else parts.sum(0)",
        "if parts.shape[0] == 1 else parts[0]",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: every part adds the KL's push",
        "kernels/latent.py",
        "b_out += tl.where(i_split == 0, b_push, 0.0)",
        "b_out += b_push",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: every part adds the KL's stretch",
        "kernels/latent.py",
        "b_out += tl.where(i_split == 0, 0.5 * b_kl * b_ratio, 0.0)",
        "b_out += 0.5 * b_kl * b_ratio",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: every part adds the KL's pull on the prior",
        "kernels/latent.py",
        "b_out -= tl.where(i_split == 0, b_push, 0.0)",
        "b_out -= b_push",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: every part adds the KL's stretch of the prior",
        "kernels/latent.py",
        "b_out -= tl.where(i_split == 0, b_square, 0.0)",
        "b_out -= b_square",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: parts of a gradient in one place",
        "kernels/latent.py",
        "o_b = o_b + i_split.to(tl.int64) * B",
        "o_b = o_b + 0 * i_split.to(tl.int64) * B",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: a Gaussian's parts in one place",
        "kernels/likelihood.py",
        "o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b\n    tl.store",
        "o_out = o_k * B + o_b\n    tl.store",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: a row's log variance's parts in one place",
        "kernels/likelihood.py",
        "o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b\n        tl.store",
        "o_out = o_k * B + o_b\n        tl.store",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: a column's log variance's parts in one place",
        "kernels/likelihood.py",
        "p_grad + tl.program_id(0).to(tl.int64) * X + o_x",
        "p_grad + o_x",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "split sums: the data's parts in one place",
        "kernels/likelihood.py",
        "o_part = (i_split.to(tl.int64) * B + o_b) * X + o_x",
        "o_part = o_b * X + o_x",
        ("numbers::test_sums_that_are_split_over_programs",),
    ),
    Mutant(
        "bfloat16: truncated under the interpreter",
        "kernels/common.py",
        "(b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16",
        "b_bits >> 16",
        ("latent::test_half_precision_is_the_rounded_float32",),
    ),
    Mutant(
        "backward: distance by the path, sign of the noise",
        "kernels/latent.py",
        "b_shift + b_spread * b_eps",
        "b_shift - b_spread * b_eps",
        ("latent",),
    ),
    Mutant(
        "backward: scaled pull by the path, not halved",
        "kernels/latent.py",
        "(0.5 * b_part) * b_spread",
        "b_part * b_spread",
        ("latent",),
    ),
    Mutant(
        "backward: scaled pull, not halved",
        "kernels/latent.py",
        "b_part * (b_half_sigma * b_inverse_s)",
        "b_part * (b_sigma * b_inverse_s)",
        ("latent",),
    ),
    Mutant(
        "backward: a factor of the prior mean's sum",
        "kernels/latent.py",
        "            b_out *= b_inverse_s\n",
        "            b_out *= 1.0\n",
        ("latent",),
    ),
    Mutant(
        "weigh: factor dropped",
        "kernels/weigh.py",
        "b_added *= load(p_factor, o_b, m_b, DTYPE)",
        "b_added *= 1.0",
        ("weigh",),
    ),
    Mutant(
        "weigh: sign of the factor",
        "kernels/weigh.py",
        "b_added = SIGN * load(",
        "b_added = load(",
        ("weigh",),
    ),
    Mutant(
        "weigh: term of the first sample",
        "kernels/weigh.py",
        "o_k * stride_k + o_b * stride_b, mask",
        "o_b * stride_b, mask",
        ("weigh",),
    ),
    Mutant(
        "weigh: padding samples counted",
        "kernels/weigh.py",
        'b_w = tl.where(mask, b_likelihood + b_added, float("-inf"))',
        "b_w = b_likelihood + b_added",
        ("weigh",),
    ),
    Mutant(
        "weigh: sum so far not rescaled",
        "kernels/weigh.py",
        "b_sum = b_sum * b_rescale +",
        "b_sum = b_sum +",
        ("weigh",),
    ),
    Mutant(
        "weigh: log K dropped",
        "kernels/weigh.py",
        "b_max + log(b_total) - log(b_count)",
        "b_max + log(b_total)",
        ("weigh",),
    ),
    Mutant(
        "weigh: mean not divided",
        "kernels/weigh.py",
        "b_average + quotient(tl.sum(b_term, axis=1, keep_dims=True), b_count)",
        "b_average + tl.sum(b_term, axis=1, keep_dims=True)",
        ("weigh",),
    ),
    Mutant(
        "weigh: weights not divided",
        "kernels/weigh.py",
        "quotient(exp(b_likelihood + b_added - b_shift), b_divisor)",
        "exp(b_likelihood + b_added - b_shift)",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: denormal weights kept",
        "kernels/weigh.py",
        "b_grad = tl.where((b_weight == 0) | (tl.abs(b_grad) < TINY), 0.0, b_grad)",
        "b_grad = b_grad",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: term's sign",
        "kernels/weigh.py",
        "b_term = SIGN * b_grad",
        "b_term = b_grad",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: log-likelihood's gradient dropped",
        "kernels/weigh.py",
        "b_grad += quotient(load(p_grad_mean, o_b * stride_mean, m_b, DTYPE), b_count)",
        "b_grad += 0.0",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: samples not averaged",
        "kernels/weigh.py",
        "b_grad = quotient(b_bound, b_count) +",
        "b_grad = b_bound +",
        ("weigh",),
    ),
    Mutant(
        "weigh backward: batch's mean not divided",
        "kernels/weigh.py",
        "grad_bound = grad_bound / batch",
        "grad_bound = grad_bound / 1",
        ("weigh",),
    ),
    Mutant(
        "weigh: mean and sum of the batch",
        "kernels/weigh.py",
        'bound.sum() if how.reduction == "sum" else bound.mean()',
        "bound.sum()",
        ("weigh",),
    ),
    Mutant(
        "weigh: size of the coefficient",
        "kernels/weigh.py",
        "return sign, like.new_full((batch,), abs(coefficient))",
        "return sign, None",
        ("weigh",),
    ),
    Mutant(
        "poisson: sign of the gradient",
        "kernels/likelihoods/poisson.py",
        "g * (x - exp(log_rate))",
        "g * (exp(log_rate) - x)",
        ("likelihoods",),
    ),
    Mutant(
        "poisson: the constant of the counts dropped",
        "kernels/likelihoods/poisson.py",
        "return -log_factorial_excess(x, log_x), log_x",
        "return 0.0 * x, log_x",
        ("likelihoods",),
    ),
    Mutant(
        "poisson: cancels near the mode",
        "kernels/likelihoods/poisson.py",
        "tl.abs(d) < 0.69",
        "tl.abs(d) < 0",
        ("poisson",),
    ),
    Mutant(
        "poisson: inf - inf",
        "kernels/likelihoods/poisson.py",
        "tl.minimum(d, 710.0)",
        "d",
        ("poisson",),
    ),
    Mutant(
        "poisson: 0 * inf",
        "kernels/likelihoods/poisson.py",
        "tl.where(x == 0, 0.0, x * linear)",
        "x * linear",
        ("poisson",),
    ),
    Mutant(
        "counts: zeros add a little",
        "kernels/common.py",
        "tl.where(b_x == 0, 0.0, b_below)",
        "b_below + 1e-7",
        ("poisson",),
    ),
    Mutant(
        "data: added for each sample twice",
        "kernels/likelihood.py",
        "b_value += b_own",
        "b_value += 2.0 * b_own",
        ("likelihoods",),
    ),
    Mutant(
        "padding: beyond a row counted",
        "kernels/likelihood.py",
        "            b_value = tl.where(m_x, b_value, 0.0)\n",
        "",
        ("likelihoods",),
    ),
]

PYTHON = [
    Mutant(
        "iwae's terms: sign of the KL",
        "fastvae/objectives.py",
        "-log_ratio.detach().mean(0)",
        "log_ratio.detach().mean(0)",
        ("frontend::test_terms_of_iwae_are_means_over_the_draws",),
    ),
    Mutant(
        "iwae's terms: log-likelihood of the first draw",
        "fastvae/_model.py",
        "    mean = log_likelihood.mean(0)",
        "    mean = log_likelihood[0]",
        ("chunks", "frontend::test_terms_of_iwae_are_means_over_the_draws"),
    ),
    Mutant(
        "iwae's terms: KL of the first draw",
        "fastvae/objectives.py",
        "-log_ratio.detach().mean(0)",
        "-log_ratio.detach()[0]",
        ("frontend::test_terms_of_iwae_are_means_over_the_draws",),
    ),
    Mutant(
        "elbo: Monte Carlo KL of the first draw, by a likelihood of the user's",
        "fastvae/_model.py",
        "(term if term.dim() == 1 else term.mean(0))",
        "(term if term.dim() == 1 else term[0])",
        ("weigh::test_every_form_of_a_likelihood",),
    ),
    Mutant(
        "elbo: Monte Carlo KL of the first draw",
        "fastvae/objectives.py",
        "else -term.mean(0))",
        "else -term[0])",
        ("frontend::test_terms_of_the_monte_carlo_elbo_are_means_over_the_draws",),
    ),
    Mutant(
        "elbo: sign of the Monte Carlo KL",
        "fastvae/objectives.py",
        "else -term.mean(0))",
        "else term.mean(0))",
        ("frontend::test_terms_of_the_monte_carlo_elbo_are_means_over_the_draws",),
    ),
    Mutant(
        "elbo: beta ignored with kl='mc'",
        "fastvae/objectives.py",
        "z, term = draw_ratio(q, prior, samples, seed, row_offset)\n",
        "(z, term), coefficient = draw_ratio(q, prior, samples, seed, row_offset), 1.0\n",
        ("frontend::test_beta_weighs_every_kind_of_kl",),
    ),
    Mutant(
        "elbo: beta ignored with free bits",
        "fastvae/objectives.py",
        ".sum().expand(q.batch)",
        ".sum().expand(q.batch) / (coefficient if beta is None else beta)",
        ("frontend::test_beta_weighs_every_kind_of_kl",),
    ),
    Mutant(
        "elbo: free bits of each example",
        "fastvae/objectives.py",
        "term = term.mean(0).clamp(min=free_bits).sum().expand(q.batch)",
        "term = term.clamp(min=free_bits).sum(1)",
        ("mathematics::test_free_bits_is_kingmas_batch_variant",),
    ),
    Mutant(
        "iwae: a last chunk draws more",
        "fastvae/objectives.py",
        "samples=min(k_chunk, k - start)",
        "samples=k_chunk",
        ("chunks::test_chunks_have_the_gradient_of_the_whole",),
    ),
    Mutant(
        "iwae: chunks of the same noise",
        "fastvae/objectives.py",
        "sample_offset=start,",
        "sample_offset=0,",
        ("chunks::test_chunks_have_the_gradient_of_the_whole",),
    ),
    Mutant(
        "iwae: what a chunk of DReG lacks is left out",
        "fastvae/objectives.py",
        "bound = bound + whole",
        "bound = bound + 0",
        ("chunks::test_chunks_have_the_gradient_of_the_whole",),
    ),
    Mutant(
        "reconstruction_log_prob: weighs by the prior",
        "fastvae/objectives.py",
        "chunks, 1, ratio=False",
        "chunks, 1, ratio=True",
        ("frontend::test_an_anomaly_score_is_minus_an_and_chos_reconstruction_probability",),
    ),
    Mutant(
        "reconstruction_log_prob: samples ignored",
        "fastvae/objectives.py",
        "model, seed, 0, samples, chunks, 1",
        "model, seed, 0, 100, chunks, 1",
        ("frontend::test_an_anomaly_score_is_minus_an_and_chos_reconstruction_probability",),
    ),
    Mutant(
        "a prior per row is one by its mean alone",
        "fastvae/priors.py",
        "for v in (self.mu, self.logvar))",
        "for v in (self.mu,))",
        ("frontend::test_a_prior_of_its_own_for_each_row_by_its_scale_alone",),
    ),
    Mutant(
        "prior's sample: variance for deviation",
        "fastvae/priors.py",
        "torch.exp(0.5 * self.logvar) * eps",
        "torch.exp(self.logvar) * eps",
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "prior's sample: without its mean",
        "fastvae/priors.py",
        "return self.mu + torch.exp",
        "return torch.exp",
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "prior's sample: one row for all",
        "fastvae/priors.py",
        "random.draw_seed(self.mu.device, generator), 1, n, dim)[0]",
        "random.draw_seed(self.mu.device, generator), 1, 1, dim)[0]",
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "prior's sample: the generator ignored",
        "fastvae/priors.py",
        "random.draw_seed(self.mu.device, generator)",
        "random.draw_seed(self.mu.device)",
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "standard prior's sample: the generator ignored",
        "fastvae/priors.py",
        'random.draw_seed(device or "cpu", generator)',
        'random.draw_seed(device or "cpu")',
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "a Normal as p: scale read as variance",
        "fastvae/priors.py",
        "2 * prior.scale.log()",
        "prior.scale.log()",
        ("frontend::test_a_torch_normal_is_read_by_its_standard_deviation",),
    ),
    Mutant(
        "a Normal as q: scale read as variance",
        "fastvae/posteriors.py",
        "2 * normal.scale.log()",
        "normal.scale.log()",
        ("frontend::test_a_torch_normal_is_read_by_its_standard_deviation",),
    ),
    Mutant(
        "logvar_range lost for some rows",
        "fastvae/posteriors.py",
        "self.logvar[start:stop], logvar_range=self.logvar_range)",
        "self.logvar[start:stop])",
        ("frontend::test_a_clamp_is_kept_by_examples_that_go_on_drawing",),
    ),
    Mutant(
        "logvar_range lost in the KL of objectives",
        "fastvae/posteriors.py",
        "parts, q.logvar_range, seed, samples, row_offset, per_dimension",
        "parts, None, seed, samples, row_offset, per_dimension",
        ("frontend::test_logvar_range_clamps_everything_that_the_posterior_says",),
    ),
    Mutant(
        "a row offset lost in the KL of objectives",
        "fastvae/posteriors.py",
        "parts, q.logvar_range, seed, samples, row_offset, per_dimension",
        "parts, q.logvar_range, seed, samples, 0, per_dimension",
        ("addresses::test_an_objectives_rows_begin_where_they_are_told",),
    ),
    Mutant(
        "a prior lost in the log-ratio of objectives",
        "fastvae/posteriors.py",
        "parts = None if prior is STANDARD else _normal_parts(prior)\n        return flat_log_ratio",
        "parts = None\n        return flat_log_ratio",
        ("frontend", "mathematics"),
    ),
    Mutant(
        "logvar_range lost in the KL",
        "fastvae/posteriors.py",
        "logvar_range=self.logvar_range,\n",
        "logvar_range=None,\n",
        ("frontend::test_a_posterior_draws_what_its_objectives_draw",),
    ),
    Mutant(
        "logvar_range lost in the log-ratio",
        "fastvae/posteriors.py",
        "logvar_range=self.logvar_range,\n",
        "logvar_range=None,\n",
        ("frontend::test_logvar_range_clamps_everything_that_the_posterior_says",),
        nth=1,
    ),
    Mutant(
        "rows of another place",
        "fastvae/posteriors.py",
        "DiagonalGaussian(self.mu[start:stop]",
        "DiagonalGaussian(self.mu[: stop - start]",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
    ),
    Mutant(
        "a posterior's row offset lost",
        "fastvae/posteriors.py",
        "row_offset=row_offset,",
        "row_offset=0,",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
        nth=1,
    ),
    Mutant(
        "a posterior's row offset lost in the KL",
        "fastvae/posteriors.py",
        "row_offset=row_offset,",
        "row_offset=0,",
        ("frontend::test_a_posterior_draws_what_its_objectives_draw",),
    ),
    Mutant(
        "an objective's row offset lost",
        "fastvae/objectives.py",
        'return {"row_offset": row_offset}',
        "return {}",
        ("addresses::test_an_objectives_rows_begin_where_they_are_told",),
    ),
    Mutant(
        "Bernoulli's mean is logits",
        "fastvae/likelihoods/bernoulli.py",
        "torch.sigmoid(parameters)",
        "parameters",
        ("frontend::test_means_are_in_the_space_of_the_data",),
    ),
    Mutant(
        "Gaussian's mean is the log variance",
        "fastvae/likelihoods/gaussian.py",
        "else parameters[0]",
        "else parameters[1]",
        ("frontend::test_means_are_in_the_space_of_the_data",),
    ),
    Mutant(
        "Gaussian: scale read as variance",
        "fastvae/likelihoods/gaussian.py",
        "return (2 * log_scale,)",
        "return (log_scale,)",
        ("mathematics::test_gaussian_scale_is_a_standard_deviation",),
    ),
    Mutant(
        "Gaussian: an infinite scale",
        "fastvae/likelihoods/gaussian.py",
        "(values > 0) & values.isfinite()",
        "values > 0",
        ("frontend::test_a_scale_that_is_no_deviation_is_refused",),
    ),
    Mutant(
        "Gaussian: a scale of zero",
        "fastvae/likelihoods/gaussian.py",
        "(values > 0) & values.isfinite()",
        "(values >= 0) & values.isfinite()",
        ("frontend::test_a_scale_that_is_no_deviation_is_refused",),
    ),
    Mutant(
        "Gaussian: a scale of any shape",
        "fastvae/likelihoods/gaussian.py",
        "_check_scale(log_scale, x)\n",
        "pass\n",
        ("frontend::test_a_scale_must_be_of_the_event",),
    ),
    Mutant(
        "noise: a batch's place lost",
        "fastvae/_model.py",
        "[(model.q, row_offset, rows)] if rows",
        "[(model.q, 0, rows)] if rows",
        ("evaluate::test_independent_of_batches_and_chunks",),
    ),
    Mutant(
        "noise: a batch's place lost in spans",
        "fastvae/_model.py",
        "(q, row_offset + run[0], None)",
        "(q, run[0], None)",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
    ),
    Mutant(
        "noise: a span's place lost",
        "fastvae/_model.py",
        "(q, row_offset + run[0], None)",
        "(q, row_offset, None)",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
    ),
    Mutant(
        "noise: a batch's place lost where spans are not made",
        "fastvae/_model.py",
        "    return [(model.q, row_offset, rows)]",
        "    return [(model.q, 0, rows)]",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
    ),
    Mutant(
        "noise: chunks of the same",
        "fastvae/_model.py",
        "seed=seed, sample_offset=start, row_offset=offset",
        "seed=seed, sample_offset=0, row_offset=offset",
        ("mistakes::test_last_chunk_may_be_ragged",),
    ),
    Mutant(
        "spans: a prior for each row shared",
        "fastvae/_model.py",
        "shared = not (",
        "shared = True or (",
        ("frontend::test_a_prior_of_its_own_for_each_row_by_its_scale_alone",),
    ),
    Mutant(
        "spans: data of all examples",
        "fastvae/_model.py",
        "x = model.x if rows is None else model.x[rows]",
        "x = model.x if rows is None else model.x[: len(rows)]",
        ("addresses::test_stopping_draws_the_same_noise_in_any_batch",),
    ),
    Mutant(
        "weights: the last of a buffer forgotten",
        "fastvae/_model.py",
        "if filled >= tail or start == stop:",
        "if filled >= tail:",
        ("weights::test_log_marginal_agrees_with_weights_of_all_draws",),
    ),
    Mutant(
        "memory: what fits divided by the batch twice",
        "fastvae/_model.py",
        "self.most_rows = half * batch",
        "self.most_rows = half",
        ("evaluate::test_out_of_memory_halves_the_chunk",),
    ),
    Mutant(
        "seeds of 32 bits",
        "fastvae/random.py",
        "torch.randint(-(2**63), 2**63 - 1, (), device=device)",
        "torch.randint(-(2**31), 2**31 - 1, (), device=device)",
        ("addresses::test_seeds_have_64_bits",),
    ),
    Mutant(
        "seeds of 31 bits with a generator",
        "fastvae/random.py",
        "torch.randint(-(2**63), 2**63 - 1, (), device=device, generator",
        "torch.randint(2**31, (), device=device, generator",
        ("addresses::test_seeds_have_64_bits",),
    ),
    Mutant(
        "seeds: the generator ignored",
        "fastvae/random.py",
        "device=device, generator=generator)",
        "device=device)",
        ("addresses::test_a_vae_samples_by_its_generator_alone",),
    ),
    Mutant(
        "an int seed loses its high word",
        "fastvae/random.py",
        "(seed + 2**63) % 2**64 - 2**63",
        "seed % 2**32",
        ("addresses::test_every_bit_of_a_seed_counts",),
    ),
    Mutant(
        "slope made again without the clamp",
        "fastvae/ops/latent.py",
        ".clamp(draw.logvar_min, draw.logvar_max)) * eps",
        ") * eps",
        ("numbers::test_what_the_dispatchers_op_did_not_keep_is_made_again",),
    ),
    Mutant(
        "slope made again: half of it",
        "fastvae/ops/latent.py",
        "slope = 0.5 * torch.exp",
        "slope = torch.exp",
        ("numbers::test_what_the_dispatchers_op_did_not_keep_is_made_again",),
    ),
    Mutant(
        "gradients of a shared log variance rounded before they are summed",
        "fastvae/ops/likelihood.py",
        "laid_out = laid_out.to(dtype)",
        "pass",
        ("gaussian",),
    ),
    Mutant(
        "a row of log variances per sample taken for one",
        "fastvae/ops/likelihood.py",
        "shared = all(n == 1 for n in leading)",
        "shared = leading[-1] == 1",
        ("numbers::test_log_variances_of_every_layout",),
    ),
    Mutant(
        "a row of log variances per example taken for one",
        "fastvae/ops/likelihood.py",
        "shared = all(n == 1 for n in leading)",
        "shared = leading[0] == 1",
        ("numbers::test_log_variances_of_every_layout",),
    ),
    Mutant(
        "a number in the mean's half precision",
        "fastvae/ops/likelihood.py",
        "dtype=accumulator(full.dtype), device",
        "dtype=full.dtype, device",
        ("frontend::test_a_fixed_log_variance_is_as_exact_as_the_sums",),
    ),
    Mutant(
        "DReG's weights of a vanished gradient",
        "fastvae/ops/latent.py",
        "torch.where(total == 0, 0.0, grad_log_ratio / total)",
        "grad_log_ratio / total",
        ("errors::test_certainly_impossible_example_is_minus_infinity",),
    ),
    Mutant(
        "DReG's weights by one chunk",
        "fastvae/ops/latent.py",
        "total = grad_whole if chunk else",
        "total = grad_log_ratio.sum(0) if chunk else",
        ("chunks::test_chunks_have_the_gradient_of_the_whole",),
    ),
    Mutant(
        "log_mean_exp: the axis ignored",
        "fastvae/ops/importance.py",
        "log_w.movedim(dim, 0)",
        "log_w",
        ("importance::test_any_axis",),
    ),
    Mutant(
        "infinite examples go on drawing",
        "fastvae/evaluate.py",
        " & (total.log_px != math.inf)",
        "",
        ("diagnostics::test_what_is_known_stops",),
    ),
    Mutant(
        "NaN examples go on drawing",
        "fastvae/evaluate.py",
        " & ~total.log_px.isnan()",
        "",
        ("diagnostics::test_what_is_known_stops",),
    ),
    Mutant(
        "examples without a weight stop",
        "fastvae/evaluate.py",
        "wanted = ~(total.stderr <= plan.tol)",
        "wanted = (total.stderr > plan.tol)",
        ("diagnostics::test_what_is_known_stops",),
    ),
    Mutant(
        "the curve's error is the last point's",
        "fastvae/evaluate.py",
        "-float(v.mean()), _standard_error(v)",
        "-float(v.mean()), _standard_error(log_px)",
        ("diagnostics::test_the_curve_has_each_points_own_mean_and_error",),
    ),
    Mutant(
        "the KL per dimension forgets the prior",
        "fastvae/evaluate.py",
        "q.rsample_kl(prior, samples=1",
        "q.rsample_kl(as_prior(None), samples=1",
        ("diagnostics::test_the_kl_of_each_latent_is_that_to_the_models_prior",),
    ),
    Mutant(
        "the KL per dimension of batches' means",
        "fastvae/evaluate.py",
        "kl[0].sum(0) / n",
        "kl[0].mean(0) / n",
        ("diagnostics::test_the_kl_of_each_latent_is_that_to_the_models_prior",),
    ),
    Mutant(
        "active units: variance divided by n",
        "fastvae/evaluate.py",
        "/ max(n - 1, 1)",
        "/ n",
        ("diagnostics::test_active_units_are_counted_by_the_unbiased_variance",),
    ),
    Mutant(
        "active units: variance between batches forgotten",
        "fastvae/evaluate.py",
        "(deviations + sizes * (mean - common) ** 2)",
        "(deviations)",
        ("diagnostics::test_batches_of_other_means_are_active_units_too",),
    ),
    Mutant(
        "active units: common mean of batches",
        "fastvae/evaluate.py",
        "common = (sizes * mean).sum(0) / n",
        "common = mean.mean(0)",
        ("diagnostics::test_batches_of_other_means_are_active_units_too",),
    ),
    Mutant(
        "a checkpoint of another prior is taken",
        "fastvae/evaluate.py",
        "weights_digest(encoder, decoder, likelihood, prior)",
        "weights_digest(encoder, decoder, likelihood)",
        ("checkpoints::test_another_prior_is_another_model",),
    ),
    Mutant(
        "a checkpoint of another likelihood is taken",
        "fastvae/evaluate.py",
        "weights_digest(encoder, decoder, likelihood, prior)",
        "weights_digest(encoder, decoder, prior)",
        ("checkpoints::test_another_likelihood_is_another_model",),
    ),
    Mutant(
        "a checkpoint of another format is taken",
        "fastvae/evaluate.py",
        '{"format": 1, ',
        "{",
        ("checkpoints::test_another_format_is_refused",),
    ),
    Mutant(
        "a checkpoint of another tolerance is taken",
        "fastvae/evaluate.py",
        ', "tol": tol}',
        "}",
        ("evaluate::test_checkpoints_of_something_else",),
    ),
    Mutant(
        "a checkpoint with a NaN is refused",
        "fastvae/evaluate.py",
        ", equal_nan=True",
        "",
        ("checkpoints::test_a_run_with_a_nan_goes_on",),
    ),
    Mutant(
        "weights that no module holds are not compared",
        "fastvae/evaluate.py",
        "compared = True",
        "compared = False",
        ("evaluate::test_killed_and_started_again",),
    ),
    Mutant(
        "evaluate: 500 draws",
        "fastvae/evaluate.py",
        "(5000 if tol",
        "(500 if tol",
        ("diagnostics::test_defaults",),
    ),
    Mutant(
        "evaluate: 10 000 draws at most",
        "fastvae/evaluate.py",
        "else 100_000)",
        "else 10_000)",
        ("diagnostics::test_defaults",),
    ),
    Mutant(
        "evaluate: stops after 10 draws",
        "fastvae/evaluate.py",
        "stop >= FIRST_LOOK",
        "stop >= 10",
        ("diagnostics::test_what_is_known_stops",),
    ),
    Mutant(
        "evaluate: batches counted from the first row",
        "fastvae/evaluate.py",
        "= row + x.shape[0], row",
        "= row + x.shape[0], 0",
        ("evaluate::test_independent_of_batches_and_chunks",),
    ),
    Mutant(
        "evaluate: quantiles of NaN",
        "fastvae/evaluate.py",
        "values = self.ess[self.ess.isfinite()]",
        "values = self.ess",
        ("diagnostics::test_what_is_known_stops",),
    ),
    Mutant(
        "evaluate: the gap's sign",
        "fastvae/evaluate.py",
        "float((self.log_px - self.elbo).mean())",
        "float((self.elbo - self.log_px).mean())",
        ("diagnostics::test_what_a_result_says_in_words",),
    ),
    Mutant(
        "evaluate: None is saved",
        "fastvae/evaluate.py",
        " for name, v in values.items() if v is not None}",
        " for name, v in values.items()}",
        ("diagnostics::test_what_is_not_known_is_left_out_of_the_file",),
    ),
    Mutant(
        "evaluate: stderr of the draws by n alone",
        "fastvae/evaluate.py",
        "float(stderr.square().sum().sqrt()) / n",
        "float(stderr.mean()) / n",
        ("evaluate::test_linear_gaussian",),
    ),
    Mutant(
        "evaluate: bits per example",
        "fastvae/evaluate.py",
        "nll * n / (total * math.log(2))",
        "nll / math.log(2)",
        ("evaluate::test_one_example_and_sizes_that_differ",),
    ),
    Mutant(
        "evaluate: modules stay in eval mode",
        "fastvae/evaluate.py",
        "            m.training = mode\n",
        "            pass\n",
        ("evaluate::test_eval_mode_and_back",),
    ),
    Mutant(
        "digests are blind to the dtype",
        "fastvae/_parts.py",
        'f"{t.dtype}{tuple(t.shape)}"',
        'f"{tuple(t.shape)}"',
        (
            "checkpoints::test_the_same_bytes_in_another_dtype_are_other_data",
            "checkpoints::test_parameters_of_another_dtype_are_other_weights",
        ),
    ),
    Mutant(
        "digests are blind to the shape",
        "fastvae/_parts.py",
        'f"{t.dtype}{tuple(t.shape)}"',
        'f"{t.dtype}{t.numel()}"',
        ("checkpoints::test_the_same_numbers_in_another_shape_are_other_data",),
    ),
    Mutant(
        "digests are blind to encoder and decoder exchanged",
        "fastvae/_parts.py",
        "    return digest(tensors).tobytes().hex()",
        "    return digest(sorted(tensors, key=lambda t: digest([t]).tobytes())).tobytes().hex()",
        ("checkpoints::test_encoder_and_decoder_are_not_exchanged",),
    ),
    Mutant(
        "digests are blind to parameters' names",
        "fastvae/_parts.py",
        'names.append(name.replace("_orig_mod.", ""))',
        "pass",
        ("evaluate::test_what_the_digests_see",),
    ),
    Mutant(
        "checkpoints: what was done is forgotten",
        "fastvae/_parts.py",
        "self.mine = list(self.done.values())",
        "self.mine = []",
        ("evaluate::test_interrupted_twice",),
    ),
    Mutant(
        "checkpoints: batches of other data",
        "fastvae/_parts.py",
        "if extra := sorted(found.keys() - self._seen.keys()):",
        "if extra := []:",
        ("evaluate::test_checkpoints_of_something_else",),
    ),
    Mutant(
        "checkpoints: a setting that is not known",
        "fastvae/_parts.py",
        "sorted(self.settings.keys() | made.keys())",
        "sorted(self.settings.keys())",
        ("checkpoints::test_a_setting_that_this_version_does_not_know_is_refused",),
    ),
    Mutant(
        "checkpoints: not saved when interrupted",
        "fastvae/_parts.py",
        "if time.monotonic() - self._saved >= 20 * self._cost:",
        "if False:",
        ("evaluate::test_killed_and_started_again",),
    ),
    Mutant(
        "checkpoints: not saved at the end",
        "fastvae/evaluate.py",
        "                store.save()\n",
        "                pass\n",
        ("checkpoints::test_an_interrupted_run_keeps_what_was_done",),
    ),
    Mutant(
        "sums in the weights' own dtype",
        "fastvae/weights.py",
        "torch.exp(log_w.double() - _shift(maximum))",
        "torch.exp(log_w - _shift(maximum))",
        ("diagnostics::test_sums_of_float32_weights_are_kept_in_float64",),
    ),
    Mutant(
        "the ELBO's sum in the weights' own dtype",
        "fastvae/weights.py",
        "log_w.double().sum(0)",
        "log_w.sum(0).double()",
        ("diagnostics::test_sums_of_float32_weights_are_kept_in_float64",),
    ),
    Mutant(
        "log p(x) in the weights' own dtype",
        "fastvae/weights.py",
        "_shift(self.maximum).double() + torch.log(self.first)",
        "_shift(self.maximum) + torch.log(self.first).to(self.maximum.dtype)",
        ("diagnostics::test_sums_of_float32_weights_are_kept_in_float64",),
    ),
    Mutant(
        "khat from a tail of four",
        "fastvae/weights.py",
        "torch.where(n <= 4, math.inf",
        "torch.where(n <= 3, math.inf",
        ("diagnostics::test_a_tail_of_four_is_not_fitted",),
    ),
    Mutant(
        "khat of 20 draws",
        "fastvae/weights.py",
        "unknown = (length <= 4)",
        "unknown = (length <= 3)",
        ("weights::test_khat_where_nothing_can_be_fitted",),
    ),
    Mutant(
        "khat: half of the pull",
        "fastvae/weights.py",
        "10 * 0.5) / (n + 10)",
        "10 * 0.5) / (n + 5)",
        ("weights::test_khat_is_that_of_arviz",),
    ),
    Mutant(
        "stderr: without Bessel's correction",
        "fastvae/weights.py",
        "* (k / (k - 1))).sqrt()",
        ").sqrt()",
        ("mistakes::test_last_chunk_may_be_ragged",),
    ),
    Mutant(
        "ess: not rescaled",
        "fastvae/weights.py",
        "other.second * its.square()",
        "other.second * its",
        ("weights::test_any_split_gives_the_same",),
    ),
    Mutant(
        "VAE: samples in the noise's dtype",
        "fastvae/vae.py",
        "self.decoder(z.to(reference.dtype))",
        "self.decoder(z)",
        ("frontend::test_samples_are_of_the_models_dtype",),
    ),
    Mutant(
        "VAE: samples are logits",
        "fastvae/vae.py",
        "return self.likelihood.mean(self.decoder(z",
        "return (self.decoder(z",
        ("frontend::test_means_are_in_the_space_of_the_data",),
    ),
    Mutant(
        "VAE: samples: the generator ignored",
        "fastvae/vae.py",
        "device=reference.device, generator=generator)",
        "device=reference.device)",
        ("frontend::test_samples_are_draws_from_the_prior",),
    ),
    Mutant(
        "VAE: reconstructs beside the mean",
        "fastvae/vae.py",
        "self.posterior(x).mu)",
        "self.posterior(x).logvar)",
        ("frontend::test_means_are_in_the_space_of_the_data",),
    ),
    Mutant(
        "VAE: anomaly_score's options are dropped",
        "fastvae/vae.py",
        '"samples": samples, **options}',
        '"samples": samples}',
        ("frontend::test_an_anomaly_score_is_minus_an_and_chos_reconstruction_probability",),
    ),
    Mutant(
        "VAE: anomaly_score's sign",
        "fastvae/vae.py",
        "return -objectives.reconstruction_log_prob",
        "return objectives.reconstruction_log_prob",
        ("frontend::test_an_anomaly_score_is_minus_an_and_chos_reconstruction_probability",),
    ),
    Mutant(
        "VAE: anomaly_score's samples are dropped",
        "fastvae/vae.py",
        '"samples": samples, **options}',
        "**options}",
        ("frontend::test_an_anomaly_score_is_minus_an_and_chos_reconstruction_probability",),
    ),
    Mutant(
        "VAE: the prior is dropped",
        "fastvae/vae.py",
        '"prior": self.prior}',
        '"prior": None}',
        ("frontend::test_a_vae_hands_on_its_prior_its_likelihood_and_every_option",),
    ),
    Mutant(
        "VAE: iwae's k is dropped",
        "fastvae/vae.py",
        "self.decoder, k=k, **self._meaning(), **options)",
        "self.decoder, **self._meaning(), **options)",
        ("frontend::test_a_vae_hands_on_its_prior_its_likelihood_and_every_option",),
    ),
    Mutant(
        "VAE: the latent dimension is the batch",
        "fastvae/vae.py",
        "mu.shape[1]",
        "mu.shape[0]",
        ("frontend::test_the_latent_dimension_is_learned_from_the_first_batch",),
    ),
    Mutant(
        "checks: an empty range of log variances",
        "fastvae/_checks.py",
        "if not lo < hi:",
        "if lo > hi:",
        ("frontend::test_an_empty_range_is_refused",),
    ),
    Mutant(
        "checks: the last address",
        "fastvae/_checks.py",
        "offset + count > 2**32",
        "offset + count >= 2**32",
        ("latent::test_rsample_kl", "random::test_normals_agree_to_ulps"),
    ),
    Mutant(
        "checks: an infinite number",
        "fastvae/_checks.py",
        "if not least <= value < math.inf:",
        "if not least <= value:",
        ("frontend::test_infinite_numbers_are_refused",),
    ),
    Mutant(
        "checks: NaN",
        "fastvae/_checks.py",
        "if not least <= value < math.inf:",
        "if value < least or value == math.inf:",
        ("errors::test_wrong_use",),
    ),
    Mutant(
        "weigh: range of targets not looked at",
        "fastvae/ops/weigh.py",
        "        if not in_range:\n",
        "        if False:\n",
        ("errors",),
    ),
    Mutant(
        "weigh: gradient of the mean log-likelihood of a log-mean-exp",
        "fastvae/ops/weigh.py",
        'if ctx.how.over == "log_mean_exp":\n            *_,',
        "if False:\n            *_,",
        ("weigh",),
    ),
    Mutant(
        "weigh: sums kept in half precision",
        "fastvae/ops/likelihood.py",
        "empty_like(p, None if p.shape == full else dtype)",
        "empty_like(p)",
        ("weigh",),
    ),
    Mutant(
        "elbo: sign of the KL",
        "fastvae/objectives.py",
        "        coefficient = -coefficient\n",
        "",
        ("mathematics", "weigh"),
    ),
    Mutant(
        "elbo: its terms reduced",
        "fastvae/objectives.py",
        'Weighing(coefficient, "mean", "none" if terms else reduction)',
        'Weighing(coefficient, "mean", reduction)',
        ("weigh::test_terms_are_those_of_the_bound",),
    ),
    Mutant(
        "elbo: a learned beta's gradient lost",
        "fastvae/_model.py",
        "takes_fused = beta is None or not beta.requires_grad",
        "takes_fused = True",
        ("weigh::test_a_beta_that_is_learned_gets_its_gradient",),
    ),
    Mutant(
        "likelihoods: a subclass's log_prob not asked",
        "fastvae/likelihoods/base.py",
        "if type(likelihood).log_prob is not Declared.log_prob or",
        "if not isinstance(likelihood, Declared) or",
        ("weigh::test_a_subclass_is_asked_for_its_own_log_prob",),
    ),
    Mutant(
        "op: second derivatives of the short way",
        "fastvae/ops/op.py",
        "self.gradient is None or torch.is_grad_enabled() or not",
        "self.gradient is None or not",
        ("weigh::test_no_second_derivatives", "torch"),
    ),
    Mutant(
        "op: fields of the record out of order",
        "fastvae/ops/op.py",
        "*args[n], *args[n + 1 :]",
        "*args[n][::-1], *args[n + 1 :]",
        ("torch::test_compiled_ops_equal_eager",),
    ),
    Mutant(
        "poisson: definition without its series",
        "fastvae/likelihoods/poisson.py",
        "-x * expm1_minus(d)",
        "-x * (torch.exp(d) - 1 - d)",
        ("poisson",),
    ),
    Mutant(
        "poisson: definition's data in float32",
        "fastvae/likelihoods/poisson.py",
        "wide = x.double()",
        "wide = x",
        ("poisson",),
    ),
    Mutant(
        "poisson: mean is the log rate",
        "fastvae/likelihoods/poisson.py",
        "return torch.exp(parameters)",
        "return parameters",
        ("likelihoods::test_means",),
    ),
    Mutant(
        "support: not asked on the fused path",
        "fastvae/likelihoods/base.py",
        "        check_support(type(self), x)\n",
        "",
        ("likelihoods",),
    ),
    Mutant(
        "support: upper end alone",
        "fastvae/ops/likelihood.py",
        "bool(values.amin() < likelihood.low) or ",
        "",
        ("likelihoods",),
    ),
    Mutant(
        "integers: taken by all",
        "fastvae/_checks.py",
        "x.dtype in INTEGERS and likelihood.takes_integers",
        "x.dtype in INTEGERS",
        ("errors",),
    ),
    Mutant(
        "data: a gradient left out in silence",
        "fastvae/_checks.py",
        "if x.requires_grad and not likelihood.differentiable",
        "if False",
        ("likelihoods",),
    ),
    Mutant(
        "reference: data added for each sample alone",
        "fastvae/reference/likelihood.py",
        "value + likelihood.data(x).sum(1)",
        "value",
        ("likelihoods",),
    ),
    Mutant(
        "flat draws: an offset of rows lost",
        "fastvae/ops/latent.py",
        "if prior is None and logvar_range is None and row_offset == 0 and samples <= 2**32:",
        "if prior is None and logvar_range is None and samples <= 2**32:",
        ("vae", "addresses"),
    ),
    Mutant(
        "flat draws: a clamp lost",
        "fastvae/ops/latent.py",
        "if prior is None and logvar_range is None and row_offset == 0 and samples <= 2**32:",
        "if prior is None and row_offset == 0 and samples <= 2**32:",
        ("frontend", "vae", "mistakes", "extremes"),
        nth=1,
    ),
    Mutant(
        "ops: the slope kept without a backward pass",
        "fastvae/ops/op.py",
        'args = (*args, wanted and way == "native")',
        'args = (*args, way == "native")',
        ("latent::test_no_gradients_no_slope",),
    ),
]

# Changes that no test can notice, and why.
EQUIVALENT: dict[str, str] = {
    "cpp: NaN of bfloat16 with a low payload stored as infinity": (
        "whatever is stored comes out of arithmetic, which sets a NaN's highest payload bit"
    ),
    "cpp: blocks of a tile added in float (sum_over, add_row_sums)": (
        "at most 16 of them: random terms are then off by 1.4 eps and not 0.8, where three are allowed; "
        "rows of equal terms by as much as before (5 eps, plain PyTorch 3)"
    ),
    "cpp: threads' parts that overlap by a unit": (
        "what a unit writes depends on nothing but its inputs: it is written twice, and takes longer"
    ),
    "python: rank 0 evaluates every batch": "the ranks' results are the same, and take longer",
}

# The other implementations' tests tell nothing of a mutant.
KINDS = {
    "cpp": (CPP, "not triton and not reference"),
    "triton": (TRITON, "not native and not reference"),
    "python": (PYTHON, ""),
}

# What the sanitisers run, too.
TESTS = [f"tests/test_{name}.py" for name in ("importance", "likelihoods", "latent", "random")]


def copy_to(folder: Path) -> None:
    """A copy of the project in the editable layout without an installation: the kernels are a subpackage."""
    left_out = (".git", ".venv*", "build", "demo", "*.so", ".hypothesis", "*.egg-info", "results")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    # In such a layout itself it may be a link to that folder.
    if (folder / "fastvae" / "kernels").exists():
        shutil.rmtree(folder / "fastvae" / "kernels")
    shutil.move(folder / "kernels", folder / "fastvae" / "kernels")


def build(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Compile the extension of a copy, with options of one's own."""
    import pybind11

    includes = [
        f"-I{folder / 'csrc'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    target = folder / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fopenmp-simd",
        "-fvisibility=hidden",
        *options,
    ]
    runpy.run_path(str(folder / "csrc/list_likelihoods.py"))["write"](target.parent)
    includes.append(f"-I{target.parent}")
    command = ["c++", *flags, *includes, str(folder / "csrc/bindings.cpp"), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def copy_extension(folder: Path) -> None:
    """The extension that is built already, for what does not change it."""
    from fastvae._backend import extension

    shutil.copy(extension().__file__, folder / "fastvae")


def apply(mutant: Mutant, folder: Path) -> str | None:
    """Break a copy's line; why that cannot be done, or None."""
    path = folder / mutant.file.replace("kernels/", "fastvae/kernels/", 1)
    parts = path.read_text().split(mutant.old)
    if len(parts) < mutant.nth + 2:
        return f"NOT APPLIED: {mutant.old!r} does not occur in {mutant.file}"
    n = mutant.nth + 1
    path.write_text(mutant.old.join(parts[:n]) + mutant.new + mutant.old.join(parts[n:]))
    return None


def run(mutants: list[Mutant], kind: str, *, changed: bool = True) -> tuple[bool, str]:
    """Whether the tests of these mutants fail on them, and which test failed first; or on unchanged code."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_to(folder)
        for mutant in mutants if changed else ():
            if problem := apply(mutant, folder):
                return False, problem
        if kind == "cpp":
            # Unoptimised, which takes a quarter of the time: what a line means does not change with that.
            built = build(folder, "-DFASTVAE_BASE_ONLY", "-O0")
            if built.returncode:
                return False, "DOES NOT COMPILE: " + built.stderr[-300:]
        else:
            copy_extension(folder)
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "FASTVAE_TEST_PROFILE": "mutants",
            # The same inputs every time.
            "CI": "1",
            "OMP_NUM_THREADS": "1",
        }
        names = dict.fromkeys(name for mutant in mutants for name in mutant.tests)
        chosen = [
            f"tests/test_{file}.py{colons}{test}" for file, colons, test in (n.partition("::") for n in names)
        ]
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:doctest"]
        command += ["-o", "addopts=", "-k", KINDS[kind][1], *chosen]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=3600
            )
        except subprocess.TimeoutExpired:
            return not changed, "TESTS DO NOT END"
        failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
        # Neither 1 (failures) nor 0: no such test, or a file that cannot be imported, which is no finding.
        if done.returncode not in (0, 1):
            return not changed, f"TESTS DO NOT RUN: {(failed or [done.stdout[-200:]])[0][:200]}"
        return done.returncode == 1 and bool(failed), (failed or [done.stdout[-200:].strip()])[0][:110]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="?", choices=list(KINDS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only mutants whose description has this text")
    arguments = parser.parse_args()
    caught = survived = 0
    for kind, (mutants, _) in KINDS.items():
        mutants = [m for m in mutants if arguments.only in m.what]
        if arguments.which not in (None, kind) or not mutants:
            continue
        fails, message = run(mutants, kind, changed=False)
        print(f"{kind}: unchanged code {'FAILS ' + message if fails else 'passes'}", flush=True)
        survived += fails
        with ThreadPoolExecutor(arguments.jobs) as pool:
            results = pool.map(lambda m, kind=kind: run([m], kind), mutants)
            for mutant, (noticed, message) in zip(mutants, results, strict=True):
                caught += noticed
                survived += not noticed
                print(f"{'caught  ' if noticed else 'SURVIVED'} {kind}: {mutant.what}: {message}", flush=True)
    print(f"caught {caught}, survived {survived}, equivalent {len(EQUIVALENT)}:")
    for what, why in EQUIVALENT.items():
        print(f"  {what}: {why}")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
