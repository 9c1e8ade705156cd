"""A checkpoint's identity: the model and its parts' order, the prior, the data, and the format."""

from __future__ import annotations

import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from fastvae import VAE
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian

from . import models
from .conftest import DEVICE
from .models import evaluate_parts, generator, randn

N, D, X, K = 23, 3, 7, 40


def _run(file, encoder, decoder, x, **options):
    options = {"k": K, "batch_size": 10, "progress": False, "generator": generator(1), **options}
    return evaluate_parts(encoder, decoder, x, checkpoint=file, **options)


@pytest.mark.parametrize("learned", [False, True])
def test_a_changed_prior_is_detected(tmp_path, learned):
    """A prior that differs by less than the results show is detected, also one computed by a network."""
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=2)

    def prior(shift=0.0):
        mu = torch.zeros(D, device=DEVICE) + shift
        return DiagonalNormal(nn.Parameter(mu) if learned else mu, torch.zeros(D, device=DEVICE))

    _run(tmp_path / "run.npz", encoder, decoder, x, prior=prior())
    for other in (prior(1e-6), None):
        with pytest.raises(ValueError, match="was made with other parameters"):
            _run(tmp_path / "run.npz", encoder, decoder, x, prior=other)
    assert len(_run(tmp_path / "run.npz", encoder, decoder, x, prior=prior()).log_px) == N


def test_a_changed_likelihood_is_detected(tmp_path):
    encoder, decoder = models.networks(X, D, "bernoulli")
    x = randn(N, X, seed=3)
    _run(tmp_path / "run.npz", encoder, decoder, x, likelihood=Gaussian(0.5))
    with pytest.raises(ValueError, match="was made with other parameters"):
        _run(tmp_path / "run.npz", encoder, decoder, x, likelihood=Gaussian(0.5 + 1e-9))


def test_exchanged_encoder_and_decoder_are_detected(tmp_path):
    """Swapped parameters of encoder and decoder are detected."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(D, D)

        def forward(self, x):
            h = self.linear(x)
            return h, 0.1 * h

    one, other = Net().to(DEVICE), Net().to(DEVICE)
    x = randn(N, D, seed=4)
    _run(tmp_path / "run.npz", one, other, x)
    with pytest.raises(ValueError, match="was made with other parameters"):
        _run(tmp_path / "run.npz", other, one, x)


def test_data_of_another_dtype_are_detected(tmp_path):
    """Data of another dtype are detected even if the first batch is zeros."""
    encoder, decoder = models.networks(X, D)
    wide = lambda x: encoder(x.float())  # noqa: E731
    x = randn(N, X, seed=5).to(torch.float16)
    x[:10] = 0
    _run(tmp_path / "run.npz", wide, decoder, x)
    with pytest.raises(ValueError, match="was made with other data"):
        _run(tmp_path / "run.npz", wide, decoder, x.view(torch.bfloat16))


def test_data_of_another_shape_are_detected(tmp_path):
    encoder, decoder = models.networks(X, D)
    flat = lambda x: encoder(x.flatten(1))  # noqa: E731
    reshaped = lambda z: tuple(v.view(-1, 1, X) for v in decoder(z))  # noqa: E731
    x = randn(N, X, seed=6)
    _run(tmp_path / "run.npz", flat, lambda z: decoder(z), x)
    with pytest.raises(ValueError, match="was made with other data"):
        _run(tmp_path / "run.npz", flat, reshaped, x[:, None])


def test_parameters_of_another_dtype_are_detected(tmp_path):
    """Parameters of another dtype are detected even if their bytes, zeros, are equal."""
    x = randn(N, X, seed=7)

    def parts(dtype):
        encoder, decoder = models.networks(X, D)
        gain = nn.Module()
        gain.register_buffer("gain", torch.zeros(D, dtype=dtype, device=DEVICE))
        encoder.gain = gain
        return encoder, decoder

    _run(tmp_path / "run.npz", *parts(torch.float16), x)
    with pytest.raises(ValueError, match="was made with other parameters"):
        _run(tmp_path / "run.npz", *parts(torch.bfloat16), x)


def test_parameters_that_are_columns_of_a_table(tmp_path):
    """Strided parameters are compared by value: the run resumes, and another table is another model."""
    encoder, decoder = models.networks(X, D)
    x, table = randn(N, X, seed=7), 0.3 * randn(D, 2, seed=8)

    def prior():
        return DiagonalNormal(table[:, 0], table[:, 1])

    file = tmp_path / "run.npz"
    first, again = (_run(file, encoder, decoder, x, prior=prior()) for _ in range(2))
    assert torch.equal(first.log_px, again.log_px)
    table[1, 1] += 1e-3
    with pytest.raises(ValueError, match="was made with other parameters"):
        _run(file, encoder, decoder, x, prior=prior())


def _edited(file, target, **changes):
    """Copy a checkpoint with changed settings."""
    with np.load(file) as saved:
        arrays = dict(saved)
    settings = json.loads(str(arrays.pop("settings"))) | changes
    settings = {name: value for name, value in settings.items() if value is not ...}
    np.savez(target, settings=json.dumps(settings), **arrays)
    return target


@pytest.mark.parametrize("made", [0, 99, ...], ids=str)
def test_another_format_is_refused(tmp_path, made):
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=8)
    file = tmp_path / "run.npz"
    _run(file, encoder, decoder, x)
    other = _edited(file, tmp_path / "other.npz", format=made)
    with pytest.raises(ValueError, match="other format"):
        _run(other, encoder, decoder, x)


def test_a_checkpoint_of_other_estimates_is_refused(tmp_path):
    """A checkpoint names its estimates: another version may have more or fewer."""
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=8)
    file = tmp_path / "run.npz"
    _run(file, encoder, decoder, x)
    other = _edited(file, tmp_path / "other.npz", estimates="log_px")
    with pytest.raises(ValueError, match="other estimates: 'log_px' then, 'log_px log_px_stderr"):
        _run(other, encoder, decoder, x)


def test_an_unknown_setting_is_refused(tmp_path):
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=9)
    file = tmp_path / "run.npz"
    _run(file, encoder, decoder, x)
    other = _edited(file, tmp_path / "other.npz", novelty=3)
    with pytest.raises(ValueError, match="other novelty"):
        _run(other, encoder, decoder, x)


def test_a_run_with_nan_can_be_resumed(tmp_path):
    """A resumed run compares the first batch, in which NaN equals NaN."""
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=10)
    x[3, 1] = math.nan
    file = tmp_path / "run.npz"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first, again = (_run(file, encoder, decoder, x) for _ in range(2))
    assert first.log_px.isnan().tolist() == [n == 3 for n in range(N)]
    torch.testing.assert_close(again.log_px, first.log_px, rtol=0, atol=0, equal_nan=True)


def test_a_checkpoint_does_not_depend_on_what_the_model_has_seen(tmp_path):
    """A VAE learns the number of its latents from its first batch, which changes no parameter."""
    torch.manual_seed(0)
    vae = VAE(nn.Linear(5, 4), nn.Linear(2, 5), likelihood="bernoulli").to(DEVICE)
    options = {"k": 5, "progress": False, "checkpoint": tmp_path / "run.npz"}
    x = torch.ones(6, 5, device=DEVICE)
    assert torch.equal(vae.evaluate(x, **options).log_px, vae.evaluate(x, **options).log_px)
    assert vae.latent_dim == 2


def test_a_resumed_run_repeats_no_batch(tmp_path):
    """A resumed run repeats no batch and gives the numbers of an unbroken run."""
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=11)
    calls = []

    def stops(x):
        calls.append(len(x))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return encoder(x)

    def goes_on(x):
        calls.append(len(x))
        return encoder(x)

    file, options = tmp_path / "run.npz", {"batch_size": 4}
    with pytest.raises(KeyboardInterrupt):
        _run(file, stops, decoder, x, **options)
    with np.load(file) as saved:
        assert saved["sizes"].tolist() == [4, 4, 4]
    calls.clear()
    result = _run(file, goes_on, decoder, x, **options)
    # One batch to compare the weights, and the three missing ones.
    assert calls == [4, 4, 4, 3]
    expected = _run(None, encoder, decoder, x, **options)
    assert torch.equal(result.log_px, expected.log_px)
    assert result.curve == expected.curve
    torch.testing.assert_close(result.kl_per_dim, expected.kl_per_dim, rtol=1e-14, atol=0)
