"""Wrong uses: the exception, and a message with the argument, the actual and the expected value.

Also the specified edge cases: an empty batch, and NaN in one row.
"""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import distributions as td

import fastvae
from fastvae import elbo, iwae, log_marginal, ops
from fastvae.core.checks import on_same_device
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian

from . import models
from .conftest import DEVICE
from .models import generator, rand, randn, seed_of

B, D, X, K = 5, 3, 7, 4

# A device other than the one under test that always exists.
ELSEWHERE = "meta"


def mu(*shape):
    return randn(*(shape or (B, D)), seed=1)


def logvar(*shape):
    return randn(*(shape or (B, D)), seed=2)


def x(*shape):
    return rand(*(shape or (B, X)), seed=3)


def q():
    return mu(), logvar()


def logits(z):
    """Decode z for a bernoulli likelihood."""
    return models.networks(X, D, "bernoulli")[1](z)


def pair(z):
    """Decode z for a gaussian likelihood."""
    return models.networks(X, D)[1](z)


def scaled(scale):
    return {"likelihood": Gaussian(scale=scale)}


BERNOULLI = {"likelihood": "bernoulli"}


def enter_backend(name):
    with fastvae.use_backend(name):
        pass


CASES = {
    # x and q
    "batch sizes": (
        lambda: elbo(x(4, X), q(), pair),
        ValueError,
        ["x has shape [4, 7]", "q has 5 rows", "batch"],
    ),
    "batch sizes, log_marginal": (
        lambda: log_marginal(x(4, X), q(), pair),
        ValueError,
        ["x has shape [4, 7]", "q has 5 rows"],
    ),
    "x without a batch": (lambda: elbo(x()[0, 0], q(), pair), ValueError, ["x has shape []", "batch"]),
    "mu and logvar of two shapes": (
        lambda: elbo(x(), (mu(), logvar(B, 2)), pair),
        ValueError,
        ["logvar has shape [5, 2]", "mu has shape [5, 3]", "must be equal"],
    ),
    "mu with three axes": (
        lambda: iwae(x(), (mu(1, B, D), logvar(1, B, D)), pair),
        ValueError,
        ["x has shape [5, 7] but q has 1 rows", "[B, *latent] = [1, 5, 3]", "the batch"],
    ),
    "integer x": (
        lambda: elbo((x() > 0.5).long(), q(), logits, **BERNOULLI),
        TypeError,
        ["x has dtype torch.int64", "float32", "x.float()"],
    ),
    "bytes": (
        lambda: elbo((255 * x()).to(torch.uint8), q(), logits, **BERNOULLI),
        TypeError,
        ["x has dtype torch.uint8", "float32", "x.float()"],
    ),
    "complex x": (
        lambda: elbo(x().cfloat(), q(), pair),
        TypeError,
        ["x has dtype torch.complex64", "float32"],
    ),
    "complex mu": (
        lambda: elbo(x(), (mu().cfloat(), logvar()), pair),
        TypeError,
        ["mu has dtype torch.complex64", "float32"],
    ),
    "numpy x": (lambda: elbo(np.zeros((B, X)), q(), pair), TypeError, ["x must be a tensor", "ndarray"]),
    "x on another device": (
        lambda: elbo(x().to(ELSEWHERE), q(), pair),
        ValueError,
        ["x is on meta", f"q is on {DEVICE.type}", "move"],
    ),
    "logvar on another device": (
        lambda: elbo(x(), (mu(), logvar().to(ELSEWHERE)), pair),
        ValueError,
        ["logvar is on meta", f"mu is on {DEVICE.type}", "logvar.to("],
    ),
    "decoder on another device": (
        lambda: elbo(x(), q(), lambda z: logits(z).to(ELSEWHERE), **BERNOULLI),
        ValueError,
        ["decoder's logits is on meta", f"x is on {DEVICE.type}"],
    ),
    "prior on another device": (
        lambda: elbo(
            x(),
            q(),
            pair,
            prior=DiagonalNormal(mu(D).to(ELSEWHERE), logvar(D).to(ELSEWHERE)),
        ),
        ValueError,
        ["prior", "is on meta", f"mu is on {DEVICE.type}"],
    ),
    "q a tensor of an odd width": (
        lambda: elbo(x(), mu(B, 2 * D + 1), pair),
        ValueError,
        ["q has shape [5, 7]", "[B, 2 D], mu and logvar side by side", "width is even"],
    ),
    "q stacked": (
        lambda: elbo(x(), torch.stack(q()), pair),
        ValueError,
        ["q has shape [2, 5, 3]", "[B, 2 D], mu and logvar side by side"],
    ),
    "q of integers": (
        lambda: elbo(x(), mu(B, 2 * D).long(), pair),
        TypeError,
        ["q has dtype torch.int64", "float32"],
    ),
    "q of an odd number of channels": (
        lambda: elbo(x(), mu(B, 7, 2, 3), pair),
        ValueError,
        ["q has shape [5, 7, 2, 3]", "[B, 2 C, ...]", "mu and then logvar, on axis 1"],
    ),
    "mu of several axes, logvar of one": (
        lambda: elbo(x(), (mu(B, 4, 2, 3), logvar(B, 24)), pair),
        ValueError,
        ["logvar has shape [5, 24]", "mu has shape [5, 4, 2, 3]", "[B, *latent] each, or else flat"],
    ),
    "logvar of several axes, mu of one": (
        lambda: elbo(x(), (mu(B, 24), logvar(B, 4, 2, 3)), pair),
        ValueError,
        ["logvar has shape [5, 4, 2, 3]; expected [B, D]"],
    ),
    "a prior that does not broadcast to latents of several axes": (
        lambda: elbo(x(), mu(B, 8, 2, 3), pair, prior=DiagonalNormal(mu(3, 2), logvar(4, 1, 1))),
        ValueError,
        ["prior mean has shape [3, 2]", "[B, *latent] = [5, 4, 2, 3]", "[D] = [24]"],
    ),
    "a prior of another batch, latents of several axes": (
        lambda: elbo(x(), mu(B, 8, 2, 3), pair, prior=DiagonalNormal(mu(2, 3), logvar(4, 4, 2, 3))),
        ValueError,
        ["prior logvar has shape [4, 4, 2, 3]", "[B, *latent] = [5, 4, 2, 3]"],
    ),
    "a prior of torch's that does not broadcast to latents of several axes": (
        lambda: elbo(x(), mu(B, 8, 2, 3), pair, prior=td.Laplace(mu(4, 2), 1.0)),
        ValueError,
        ["prior, a Laplace with event shape [],", "has shape [4, 2]", "[B, *latent] = [5, 4, 2, 3]"],
    ),
    "a prior whose event is not the last of the latents' axes": (
        lambda: elbo(
            x(), mu(B, 8, 2, 3), pair, prior=td.Independent(td.Laplace(mu(4, 1, 1), logvar(4, 1, 1).exp()), 1)
        ),
        ValueError,
        ["prior, a Independent with event shape [1],", "[B, *latent] = [5, 4, 2, 3]"],
    ),
    "a prior of latents of another shape": (
        lambda: elbo(
            x(), mu(B, 8, 2, 3), pair, prior=lambda c: (mu(B, 4, 3, 2), logvar(B, 4, 3, 2)), context=x()
        ),
        ValueError,
        ["prior has latents of the shape [4, 3, 2]", "q has [4, 2, 3]"],
    ),
    "a decoder that merges rows of latents of several axes": (
        lambda: elbo(x(), mu(B, 8, 2, 3), lambda z: logits(z.reshape(-1, 3)), k=2, **BERNOULLI),
        ValueError,
        ["decoder returned [80, 7]", "z [10, 4, 2, 3]", "K·B = 2·5 rows", "z.flatten(1)"],
    ),
    "q of three": (
        lambda: elbo(x(), (*q(), mu()), pair),
        TypeError,
        ["q must be a pair (mu, logvar)", "tuple of length 3"],
    ),
    "q of another family": (
        lambda: elbo(x(), td.Poisson(mu().exp()), pair),
        TypeError,
        ["q is a Poisson", "no rsample", "reparameterised", "use a family that has"],
    ),
    "q a Normal over several event axes": (
        lambda: elbo(x(), td.Independent(td.Normal(mu(), logvar().exp()), 2), pair),
        ValueError,
        ["q is Independent(Normal, 2)", "batch shape []", "event shape [5, 3]", "expected [B, D]"],
    ),
    "q a mapping of other names": (
        lambda: elbo(x(), {"m": mu(), "logvar": logvar()}, pair),
        TypeError,
        ["a mean (mu, mean", "a log variance (logvar", "Got a dict of m, logvar"],
    ),
    "q an array": (lambda: elbo(x(), np.zeros((B, 2 * D)), pair), TypeError, ["q must be", "Got ndarray"]),
    "q an encoder": (
        lambda: elbo(x(), torch.nn.Linear(X, 2 * D), pair),
        TypeError,
        ["q must be", "Got the module Linear itself", "encoder(x)"],
    ),
    "q None": (lambda: elbo(x(), None, pair), TypeError, ["q must be", "Got NoneType"]),
    "beta of several rows": (
        lambda: elbo(x(), q(), pair, beta=torch.ones(2, device=DEVICE)),
        ValueError,
        ["beta has shape [2]", "[] or [B] = [5]"],
    ),
    "beta a tensor below 0": (
        lambda: elbo(x(), q(), pair, beta=torch.tensor([1.0, -1.0, 1.0, math.nan, 1.0], device=DEVICE)),
        ValueError,
        ["beta must be finite and at least 0", "got [-1.0, nan]"],
    ),
    "beta of integers": (
        lambda: elbo(x(), q(), pair, beta=torch.tensor(1)),
        TypeError,
        ["beta has dtype torch.int64"],
    ),
    "beta on another device": (
        lambda: elbo(x(), q(), pair, beta=torch.ones(B, device=ELSEWHERE)),
        ValueError,
        ["beta is on meta", f"q is on {DEVICE.type}", "beta.to("],
    ),
    "free_bits of several rows": (
        lambda: elbo(x(), q(), pair, free_bits=torch.ones(B, device=DEVICE)),
        ValueError,
        ["free_bits has shape [5]", "must be []"],
    ),
    "free_bits a tensor without an analytic KL": (
        lambda: elbo(x(), q(), pair, free_bits=torch.tensor(0.1), kl="mc"),
        ValueError,
        ["free_bits", "kl='mc'", "use kl='analytic'"],
    ),
    "row_offset of an objective negative": (
        lambda: elbo(x(), q(), pair, row_offset=-1),
        ValueError,
        ["row_offset must be at least 0, got -1", "did you mean shared_noise=True?"],
    ),
    "row_offset of an objective a fraction": (
        lambda: iwae(x(), q(), pair, row_offset=2.5),
        TypeError,
        ["row_offset must be an int", "got 2.5"],
    ),
    "row_offset of an objective beyond the address": (
        lambda: log_marginal(x(), q(), pair, k=3, row_offset=2**32 - B + 1),
        ValueError,
        ["row_offset must lie in", "5 rows"],
    ),
    # counts and numbers
    "k of zero": (lambda: iwae(x(), q(), pair, k=0), ValueError, ["k must be at least 1", "got 0"]),
    "k of a fraction": (lambda: iwae(x(), q(), pair, k=2.5), TypeError, ["k must be an int", "got 2.5"]),
    "k a tensor": (
        lambda: iwae(x(), q(), pair, k=torch.tensor(4)),
        TypeError,
        ["k must be an int", "got tensor(4)"],
    ),
    "k a truth value": (lambda: iwae(x(), q(), pair, k=True), TypeError, ["k must be an int", "got True"]),
    "k negative, log_marginal": (
        lambda: log_marginal(x(), q(), pair, k=-3),
        ValueError,
        ["k must be at least 1", "got -3"],
    ),
    "k_chunk of zero": (
        lambda: log_marginal(x(), q(), pair, k=10, k_chunk=0),
        ValueError,
        ["k_chunk must be at least 1", "got 0"],
    ),
    "samples of zero": (
        lambda: elbo(x(), q(), pair, k=0),
        ValueError,
        ["k must be at least 1", "got 0"],
    ),
    "beta a string": (
        lambda: elbo(x(), q(), pair, beta="1"),
        TypeError,
        ["beta must be a number", "'1' (str)"],
    ),
    "beta NaN": (lambda: elbo(x(), q(), pair, beta=math.nan), ValueError, ["beta must be finite", "got nan"]),
    "free_bits per something": (
        lambda: elbo(x(), q(), pair, free_bits=0.1, free_bits_per="row"),
        ValueError,
        ["free_bits_per='row' is unknown", "'batch', 'example'"],
    ),
    "free_bits negative": (
        lambda: elbo(x(), q(), pair, free_bits=-0.1),
        ValueError,
        ["free_bits must be", "at least 0", "got -0.1"],
    ),
    "free_bits without an analytic KL": (
        lambda: elbo(x(), q(), pair, free_bits=0.1, kl="mc"),
        ValueError,
        ["free_bits", "kl='mc'", "use kl='analytic'"],
    ),
    # names
    "misspelt likelihood": (
        lambda: elbo(x(), q(), pair, likelihood="guassian"),
        ValueError,
        ["likelihood='guassian'", "'bernoulli', 'beta', 'categorical'", "'poisson'"],
    ),
    "likelihood a class": (
        lambda: elbo(x(), q(), pair, likelihood=Gaussian),
        TypeError,
        ["likelihood must be", "fastvae.likelihoods.Gaussian(scale=0.1)"],
    ),
    "misspelt prior": (
        lambda: elbo(x(), q(), pair, prior="normal"),
        ValueError,
        ["prior='normal'", "'standard_normal'"],
    ),
    "prior of three tensors": (
        lambda: elbo(x(), q(), pair, prior=(*q(), q()[0])),
        TypeError,
        ["prior must be", "a pair (mu, logvar)", "got tuple"],
    ),
    "prior of numbers": (
        lambda: elbo(x(), q(), pair, prior=(0.0, 0.0)),
        TypeError,
        ["the prior's mu must be", "float"],
    ),
    "prior of a pair of another D": (
        lambda: elbo(x(), q(), pair, prior=(mu(2), mu(2))),
        ValueError,
        ["prior mean has shape [2]", "[5, 3]"],
    ),
    "torch prior of another dimension": (
        lambda: elbo(x(), q(), pair, prior=td.Laplace(mu(2), 1.0), kl="mc"),
        ValueError,
        ["Laplace", "of shape [2]", "z's [B, D] = [5, 3]"],
    ),
    "torch prior on another device": (
        lambda: elbo(
            x(), q(), pair, prior=td.Laplace(mu(D).to(ELSEWHERE), 1.0, validate_args=False), kl="mc"
        ),
        ValueError,
        ["Laplace", "is on meta", f"z is on {DEVICE.type}", "move one of them"],
    ),
    "prior of another dimension": (
        lambda: elbo(x(), q(), pair, prior=DiagonalNormal(mu(2), logvar(2))),
        ValueError,
        ["prior mean has shape [2]", "mu's [5, 3]"],
    ),
    "misspelt estimator": (
        lambda: iwae(x(), q(), pair, estimator="DReG"),
        ValueError,
        ["estimator='DReG'", "'iwae', 'dreg', 'stl'"],
    ),
    "misspelt reduction": (
        lambda: iwae(x(), q(), pair, reduction="avg"),
        ValueError,
        ["reduction='avg'", "'mean', 'sum', 'none'"],
    ),
    "reduction None": (
        lambda: elbo(x(), q(), pair, reduction=None),
        ValueError,
        ["reduction=None", "'mean', 'sum', 'none'"],
    ),
    "misspelt kl": (
        lambda: elbo(x(), q(), pair, kl="exact"),
        ValueError,
        ["kl='exact'", "'analytic', 'mc'"],
    ),
    "unknown backend": (
        lambda: enter_backend("cuda"),
        ValueError,
        ["use_backend", "'cuda'", "'native', 'reference', 'triton'"],
    ),
    # the decoder
    "a pair for a bernoulli likelihood": (
        lambda: elbo(x(), q(), pair, **BERNOULLI),
        TypeError,
        ["decoder of a bernoulli likelihood", "logits, one tensor", "a tuple of 2"],
    ),
    "a tensor for a gaussian likelihood": (
        lambda: elbo(x(), q(), logits),
        TypeError,
        [
            "decoder of a gaussian likelihood",
            "(mean, logvar)",
            "a tensor [5, 7]",
            "fastvae.likelihoods.Gaussian(scale=0.1)",
        ],
    ),
    "a pair for a gaussian likelihood with a scale": (
        lambda: elbo(x(), q(), pair, **scaled(0.1)),
        TypeError,
        ["Gaussian(scale=...)", "mean alone", "a tuple of 2", "likelihood='gaussian'"],
    ),
    "a tensor for a laplace likelihood": (
        lambda: elbo(x(), q(), logits, likelihood="laplace"),
        TypeError,
        [
            "of a laplace likelihood",
            "(location, log_scale)",
            "a location alone",
            "fastvae.likelihoods.Laplace(scale=0.1)",
        ],
    ),
    "a pair for a log-normal likelihood with a scale": (
        lambda: elbo(x(), q(), pair, likelihood=fastvae.likelihoods.LogNormal(0.1)),
        TypeError,
        ["LogNormal(scale=...)", "location alone", "a tuple of 2", "likelihood='log_normal'"],
    ),
    "a tensor for a student t likelihood": (
        lambda: elbo(x(), q(), logits, likelihood="student_t"),
        TypeError,
        [
            "(location, log_scale, log_df)",
            "a tensor [5, 7]",
            "fastvae.likelihoods.StudentT(scale=0.1, df=4.0)",
        ],
    ),
    "a pair for a student t likelihood": (
        lambda: elbo(x(), q(), pair, likelihood="student_t"),
        TypeError,
        ["a tuple of 2", "these alone", "df, the degrees of freedom", "fastvae.likelihoods.StudentT(df=4.0)"],
    ),
    "a tensor for a student t likelihood with df": (
        lambda: elbo(x(), q(), logits, likelihood=fastvae.likelihoods.StudentT(4)),
        TypeError,
        ["StudentT(df=...)", "(location, log_scale);", "a tensor [5, 7]", "without a df"],
    ),
    "decoder output of a wrong width": (
        lambda: elbo(x(), q(), lambda z: logits(z)[:, 1:], **BERNOULLI),
        ValueError,
        ["decoder's logits", "[5, 6]", "expected [5, 7]"],
    ),
    "decoder output of another event shape": (
        lambda: elbo(x(), q(), lambda z: logits(z)[:, None], **BERNOULLI),
        ValueError,
        ["decoder's logits", "[5, 1, 7]", "expected [5, 7]", "reshape"],
    ),
    "decoder output with axes [K, B]": (
        lambda: iwae(x(), q(), lambda z: logits(z).view(K, B, X), k=K, **BERNOULLI),
        ValueError,
        ["[4, 5, 7]", "expected [20, 7]", "4·5 rows"],
    ),
    "decoder output with axes [B, K]": (
        lambda: iwae(x(), q(), lambda z: logits(z).view(K, B, X).transpose(0, 1), k=K, **BERNOULLI),
        ValueError,
        ["[5, 4, 7]", "expected [20, 7]", "4·5 rows"],
    ),
    "decoder mean fits, logvar does not": (
        lambda: elbo(x(), q(), lambda z: (pair(z)[0], pair(z)[1][:, :1])),
        ValueError,
        ["decoder's logvar", "[5, 1]", "expected [5, 7]"],
    ),
    "decoder returns None": (
        lambda: elbo(x(), q(), lambda z: None, **BERNOULLI),
        TypeError,
        ["decoder of a bernoulli", "one tensor", "NoneType"],
    ),
    "gaussian decoder returns None": (
        lambda: elbo(x(), q(), lambda z: None),
        TypeError,
        ["decoder of a gaussian", "(mean, logvar)", "NoneType"],
    ),
    "decoder returns integers": (
        lambda: elbo(x(), q(), lambda z: logits(z).long(), **BERNOULLI),
        TypeError,
        ["logits has dtype torch.int64", "float32"],
    ),
    "decoder's output for a decoder": (
        lambda: elbo(x(), q(), logits(mu()), **BERNOULLI),
        TypeError,
        ["decoder must be a callable", "got Tensor", "not its output"],
    ),
    # values of the data
    "targets in [-1, 1]": (
        lambda: elbo(2 * x() - 1, q(), logits, **BERNOULLI),
        ValueError,
        ["x holds values in [-0.", "[0, 1]", "(x + 1) / 2"],
    ),
    "targets in [0, 255]": (
        lambda: iwae(255 * x(), q(), logits, k=K, **BERNOULLI),
        ValueError,
        ["x holds values in [", "[0, 1]", "x / 255"],
    ),
    # scales and ranges
    "scale of zero": (lambda: Gaussian(scale=0), ValueError, ["scale", "positive", "got 0"]),
    "scale negative": (lambda: Gaussian(scale=-0.1), ValueError, ["scale", "positive", "got -0.1"]),
    "scale NaN": (lambda: Gaussian(scale=math.nan), ValueError, ["scale", "positive", "got nan"]),
    "scale a string": (
        lambda: Gaussian("0.1"),
        TypeError,
        ["scale must be a number or a tensor", "str"],
    ),
    "scale a parameter": (
        lambda: Gaussian(scale=torch.nn.Parameter(torch.tensor(0.1))),
        TypeError,
        ["scale", "fastvae.likelihoods.Gaussian(scale=0.1, learned=True)", "log_scale"],
    ),
    "scale that requires gradients, learned": (
        lambda: Gaussian(scale=torch.tensor(0.1, requires_grad=True), learned=True),
        TypeError,
        ["scale must be a value to begin training at"],
    ),
    "learned without a scale": (
        lambda: Gaussian(learned=True),
        ValueError,
        ["learned=True needs a scale", "fastvae.likelihoods.Gaussian(scale=0.1, learned=True)"],
    ),
    "learned scale negative": (
        lambda: Gaussian(scale=torch.tensor([0.1, -0.1]), learned=True),
        ValueError,
        ["scale", "positive"],
    ),
    "df a parameter": (
        lambda: fastvae.likelihoods.StudentT(torch.nn.Parameter(torch.tensor(4.0))),
        TypeError,
        ["df must be a value", "fastvae.likelihoods.StudentT(df=4.0, learned_df=True)", "log_df"],
    ),
    "df of zero": (
        lambda: fastvae.likelihoods.StudentT(0),
        ValueError,
        ["df is the degrees of freedom", "got 0"],
    ),
    "learned scale of a student t without one": (
        lambda: fastvae.likelihoods.StudentT(4.0, learned=True),
        ValueError,
        ["learned=True needs a scale", "fastvae.likelihoods.StudentT(scale=0.1, df=4.0, learned=True)"],
    ),
    "df of another shape": (
        lambda: elbo(x(), q(), pair, likelihood=fastvae.likelihoods.StudentT(torch.ones(6, device=DEVICE))),
        ValueError,
        ["df has shape [6]", "[5, 7]", "[7]"],
    ),
    "learned scale of another shape": (
        lambda: elbo(x(), q(), logits, likelihood=Gaussian(torch.ones(6, device=DEVICE), learned=True)),
        ValueError,
        ["scale has shape [6]", "[5, 7]", "[7]"],
    ),
    "logvar_range reversed": (
        lambda: DiagonalNormal(*q(), logvar_range=(3, -3)),
        ValueError,
        ["logvar_range", "lo < hi", "(3.0, -3.0)"],
    ),
    "a scale that is none": (
        lambda: DiagonalNormal(*q(), scale_form="sigma"),
        ValueError,
        ["scale_form='sigma' is unknown", "'logvar', 'log_scale', 'scale', 'softplus'"],
    ),
    "a floor of a log variance": (
        lambda: ops.rsample_kl(*q(), floor=1e-4),
        ValueError,
        ["floor=0.0001", "scale='softplus'", "scale='logvar'", "leave it out"],
    ),
    "a negative floor": (
        lambda: ops.rsample_log_ratio(*q(), k=2, scale="softplus", floor=-1e-4),
        ValueError,
        ["floor must be finite and at least 0", "-0.0001"],
    ),
    "a floor that is not a number": (
        lambda: DiagonalNormal(*q(), scale_form="softplus", floor="1e-4"),
        TypeError,
        ["floor must be a number", "the least variance", "'1e-4'"],
    ),
    "a floor too small for float32": (
        lambda: DiagonalNormal(*q(), scale_form="softplus", floor=1e-40),
        ValueError,
        ["floor must be 0 or at least 1.18e-38", "1e-40"],
    ),
    "logvar_range of a softplus": (
        lambda: DiagonalNormal(*q(), scale_form="softplus", logvar_range=(-3, 3)),
        ValueError,
        ["logvar_range bounds a log variance", "scale_form='softplus'", "floor"],
    ),
    "logvar_range a number": (
        lambda: ops.rsample_kl(*q(), logvar_range=3.0),
        TypeError,
        ["logvar_range", "pair of numbers (lo, hi)", "got 3.0"],
    ),
    # seeds and addresses
    "seed an int": (
        lambda: ops.rsample_kl(*q(), seed=3),
        TypeError,
        ["seed must be an int64 tensor", "draw_seed", "got 3"],
    ),
    "seed of int32": (
        lambda: ops.rsample_kl(*q(), seed=torch.tensor(3, dtype=torch.int32, device=DEVICE)),
        TypeError,
        ["seed must be an int64 tensor", "torch.int32"],
    ),
    "seed with an axis": (
        lambda: ops.rsample_log_ratio(*q(), k=K, seed=torch.zeros(1, dtype=torch.int64, device=DEVICE)),
        TypeError,
        ["seed must be an int64 tensor of no dimensions", "[1]"],
    ),
    "seed on another device": (
        lambda: ops.rsample_kl(*q(), seed=torch.zeros((), dtype=torch.int64, device=ELSEWHERE)),
        ValueError,
        ["seed is on meta", f"on {DEVICE.type}", "draw_seed"],
    ),
    "row_offset negative": (
        lambda: ops.rsample_kl(*q(), row_offset=-2),
        ValueError,
        ["row_offset must lie in", "got -2", "2^32"],
    ),
    "row_offset beyond the address": (
        lambda: ops.rsample_kl(*q(), row_offset=2**32 - B + 1),
        ValueError,
        ["row_offset must lie in", "got 4294967292", "5 rows", "2^32"],
    ),
    "row_offset a fraction": (
        lambda: ops.rsample_kl(*q(), row_offset=1.0),
        TypeError,
        ["row_offset must be an int", "got 1.0"],
    ),
    "sample_offset beyond the address": (
        lambda: ops.rsample_log_ratio(*q(), k=2, sample_offset=2**32 - 1),
        ValueError,
        ["sample_offset must lie in", "got 4294967295", "2 samples"],
    ),
    # the other ops
    "no samples": (
        lambda: ops.log_mean_exp(mu(0, B)),
        ValueError,
        ["log_w has no samples along dim=0", "(0, 5)", "at least one"],
    ),
    "no such axis": (lambda: ops.log_mean_exp(mu(K, B), dim=2), ValueError, ["dim=2", "log_w"]),
    "mean of another shape": (
        lambda: ops.gaussian_log_prob(x(), x(B, 6), 0.0),
        ValueError,
        ["mean has shape [5, 6]", "x's [5, 7]", "expected [..., 5, 7]"],
    ),
    "logvar that does not broadcast": (
        lambda: ops.gaussian_log_prob(x(), x(), logvar(6)),
        ValueError,
        ["logvar has shape [6]", "mean's [5, 7]", "one row [7], or one number"],
    ),
    # the module
    "encoder no callable": (lambda: fastvae.VAE(3, logits), TypeError, ["encoder must be a module", "int"]),
    "encoder returns an odd width": (
        lambda: fastvae.VAE(lambda data: mu(B, 2 * D + 1), pair, modules=[]).elbo(x()),
        ValueError,
        ["q has shape [5, 7]", "[B, 2 D]"],
    ),
    "unknown objective": (
        lambda: fastvae.VAE(lambda data: q(), pair, modules=[])(x(), objective="IWAE"),
        ValueError,
        ["objective='IWAE'", "'elbo', 'iwae', 'beta_tc', 'sleep', 'log_marginal'"],
    ),
    "latent dimension unknown": (
        lambda: fastvae.VAE(lambda data: q(), pair, modules=[]).sample(2),
        ValueError,
        ["latent dimension", "latent_dim=D"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_wrong_use(case, monkeypatch):
    call, exception, fragments = CASES[case]
    if DEVICE.type == "cuda":  # data are checked on request only
        monkeypatch.setenv("FASTVAE_CHECK", "1")
    with pytest.raises(exception) as raised:
        call()
    # The class itself: a subclass would be a different failure (UnicodeError, torch's OutOfMemoryError, ...).
    assert type(raised.value) is exception
    for fragment in fragments:
        assert fragment in str(raised.value)


@pytest.mark.parametrize(
    "bad", [2 * rand(B, X, seed=4) - 1, 255 * rand(B, X, seed=4)], ids=["[-1, 1]", "bytes"]
)
def test_targets_are_checked_by_every_backend(backend, bad, monkeypatch):
    if DEVICE.type != "cpu":
        # A GPU would have to synchronise, so it checks only on request.
        monkeypatch.setenv("FASTVAE_CHECK", "1")
    with pytest.raises(ValueError, match=re.escape("must lie in [0, 1]")):
        ops.bernoulli_log_prob(bad, randn(K, B, X, seed=5))


def test_failed_call_leaves_the_random_state_alone():
    """Arguments are validated before a seed is drawn, so that a failed call does not change later numbers."""
    torch.manual_seed(0)
    expected = elbo(x(), q(), pair)
    torch.manual_seed(0)
    for wrong in ({"k": 0}, {"likelihood": "guassian"}, {"reduction": "avg"}, {"kl": "exact"}):
        with pytest.raises(ValueError):
            elbo(x(), q(), pair, **wrong)
    assert torch.equal(elbo(x(), q(), pair), expected)


def test_backend_is_restored_after_an_error():
    from fastvae.core import backend as _backend

    before = _backend.chosen()
    with pytest.raises(ZeroDivisionError), fastvae.use_backend("reference"):
        raise ZeroDivisionError
    assert _backend.chosen() == before


# An empty batch gives an empty result, and every gradient is defined.


def _leaves(rows: int, dtype=torch.float32):
    return tuple(randn(rows, D, seed=s, dtype=dtype).requires_grad_() for s in (6, 7))


@pytest.mark.parametrize("prior", [None, "learned"])
def test_empty_batch_through_the_ops(backend, prior):
    mu, logvar = _leaves(0)
    leaves = [mu, logvar]
    parts = None
    if prior:
        parts = tuple(randn(D, seed=s).requires_grad_() for s in (8, 9))
        leaves += parts
    z, kl = ops.rsample_kl(mu, logvar, k=K, prior=parts)
    assert (z.shape, kl.shape) == ((K, 0, D), (0,))
    z2, ratio = ops.rsample_log_ratio(mu, logvar, k=K, prior=parts, estimator="dreg")
    assert (z2.shape, ratio.shape) == ((K, 0, D), (K, 0))
    assert ops.rsample_kl(mu, logvar, prior=parts, per_dimension=True)[1].shape == (0, D)
    bound = ops.log_mean_exp(ratio)
    assert bound.shape == (0,)
    mean, log_scale = randn(K, 0, X, seed=10).requires_grad_(), randn(X, seed=11).requires_grad_()
    gaussian = ops.gaussian_log_prob(mean.new_zeros(0, X), mean, log_scale)
    bernoulli = ops.bernoulli_log_prob(mean.new_zeros(0, X), mean)
    assert gaussian.shape == bernoulli.shape == (K, 0)
    leaves += [mean, log_scale]
    total = z.sum() + kl.sum() + z2.sum() + bound.sum() + gaussian.sum() + bernoulli.sum()
    for leaf, grad in zip(leaves, torch.autograd.grad(total, leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_empty_batch_through_the_objectives(backend, likelihood):
    _, decoder = models.networks(X, D, likelihood)
    data, leaves = rand(0, X, seed=12), _leaves(0)
    options = {"likelihood": likelihood, "reduction": "none"}
    for bound in (
        elbo(data, leaves, decoder, **options),
        elbo(data, leaves, decoder, kl="mc", k=K, **options),
        iwae(data, leaves, decoder, k=K, estimator="dreg", **options),
    ):
        assert bound.shape == (0,)
        bound.sum().backward()
        assert leaves[0].grad.shape == (0, D)
        assert not any(p.grad.any() for p in decoder.parameters())
    estimates = log_marginal(data, leaves, decoder, k=K, k_chunk=3, likelihood=likelihood)
    assert all(v.shape == (0,) for v in vars(estimates).values())


# NaN in gives NaN out, in its own row only.


def _only(row: int, *tensors) -> None:
    """Assert that every tensor [B, ...] has NaN in ``row`` and nowhere else."""
    for t in tensors:
        rows = t.isnan().reshape(B, -1).any(1).tolist()
        assert rows == [b == row for b in range(B)]


@pytest.mark.parametrize("where", ["x", "mu", "logvar"])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_nan_stays_in_its_row(backend, where, likelihood):
    row = 2
    _, decoder = models.networks(X, D, likelihood)
    tensors = {"x": rand(B, X, seed=13), "mu": randn(B, D, seed=14), "logvar": randn(B, D, seed=15)}
    tensors[where][row, 1] = math.nan
    mu, logvar = tensors["mu"].requires_grad_(), tensors["logvar"].requires_grad_()
    arguments = (tensors["x"], (mu, logvar), decoder)
    for bound in (
        elbo(*arguments, likelihood=likelihood, reduction="none"),
        iwae(*arguments, k=K, likelihood=likelihood, reduction="none"),
        iwae(*arguments, k=K, likelihood=likelihood, reduction="none", estimator="dreg"),
    ):
        _only(row, bound, *torch.autograd.grad(bound.sum(), (mu, logvar)))
    # Enough draws for k̂ to be defined elsewhere.
    estimates = log_marginal(*arguments, k=30, k_chunk=7, likelihood=likelihood)
    _only(row, *vars(estimates).values())
    _only(row, fastvae.reconstruction_log_prob(*arguments, k=K, likelihood=likelihood))


def test_nan_in_one_sample_reaches_its_example(backend):
    """A NaN among K weights makes its example's bound NaN, at any position, and no other's."""
    for sample in range(K):
        log_w = randn(K, B, seed=16)
        log_w[sample, 3] = math.nan
        log_w.requires_grad_()
        bound = ops.log_mean_exp(log_w)
        _only(3, bound, torch.autograd.grad(bound.sum(), log_w)[0].T)


def test_nan_in_the_decoders_output(backend):
    mean, row = randn(K, B, X, seed=17), 4
    mean[2, row, 6] = math.nan
    for value in (
        ops.gaussian_log_prob(rand(B, X, seed=18), mean, 0.0),
        ops.bernoulli_log_prob(rand(B, X, seed=18), mean),
    ):
        bad = value.isnan()
        assert bool(bad[2, row])
        assert int(bad.sum()) == 1


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
def test_certainly_impossible_example_is_minus_infinity(estimator):
    """All-zero weights give a bound of -inf with zero gradient, and log_marginal agrees."""
    data = torch.tensor([[1.0, 0.0], [1.0, 1.0]], device=DEVICE)
    # Certain of (1, 0): the second example cannot happen.
    certain = torch.tensor([math.inf, -math.inf], device=DEVICE)
    decoder = lambda z: certain.expand(z.shape[0], 2)  # noqa: E731
    mu, logvar = (randn(2, D, seed=s).requires_grad_() for s in (19, 20))
    options = {"reduction": "none", "generator": generator(0), "estimator": estimator, **BERNOULLI}
    bound = iwae(data, (mu, logvar), decoder, k=K, **options)
    # For the first, log p(x|z) = 0 and the bound is the mean of p(z) / q(z).
    _, ratio = ops.rsample_log_ratio(mu, logvar, k=K, seed=seed_of(0))
    torch.testing.assert_close(bound[0], ops.log_mean_exp(ratio)[0], rtol=1e-6, atol=1e-6)
    assert float(bound[1]) == -math.inf
    grad_mu, grad_logvar = torch.autograd.grad(bound.sum(), (mu, logvar))
    assert not grad_mu[1].any()
    assert not grad_logvar[1].any()
    assert bool(grad_mu[0].all())
    result = log_marginal(data, (mu, logvar), decoder, k=K, k_chunk=3, **BERNOULLI)
    assert float(result.log_px[1]) == -math.inf
    assert math.isfinite(float(result.log_px[0]))


def test_devices_without_an_index():
    """Devices compare equal without an index: a user's distribution may say "cuda", its tensors "cuda:0"."""
    on = lambda one, other: on_same_device(torch.device(one), torch.device(other))  # noqa: E731
    assert on("cuda", "cuda:0") and on("cuda:1", "cuda") and on("cpu", "cpu") and on("cuda:1", "cuda:1")
    assert not on("cuda:0", "cuda:1") and not on("cpu", "cuda") and not on("cuda:0", "cpu")
