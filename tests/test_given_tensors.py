"""Users' tensors: layouts, stored arrays, another default device, exported programs."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

import fastvae
from fastvae.core import backend
from fastvae.distributions import DiagonalNormal, FullNormal
from fastvae.likelihoods import Joint

from .models import evaluate_parts

DENSE = (torch.arange(24.0).reshape(4, 6) % 5 > 1).float()


def _layout(name, like=DENSE):
    if name in ("nested", "jagged"):
        layout = torch.jagged if name == "jagged" else torch.strided
        return torch.nested.nested_tensor(list(like), layout=layout)
    if name == "quantised":
        return torch.quantize_per_tensor(like, 0.1, 0, torch.quint8)
    blocks = ((2, 2),) if name in ("sparse_bsr", "sparse_bsc") else ()
    return getattr(like, f"to_{name}")(*blocks)


FIX = {"nested": "to_padded_tensor(", "jagged": "to_padded_tensor(", "quantised": ".dequantize()"}
LAYOUTS = (
    "sparse", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "mkldnn", "nested", "jagged",
    "quantised",
)  # fmt: skip

q, decoder = torch.zeros(4, 4), nn.Linear(2, 6)
options = {"likelihood": "bernoulli"}
ENTRIES = {
    "elbo": ("x", lambda x: fastvae.elbo(x, q, decoder, **options)),
    "elbo of a pair": ("x", lambda x: fastvae.elbo(x, q.chunk(2, 1), decoder, **options)),
    "integers": ("x", lambda x: fastvae.elbo(x, q, decoder, likelihood="poisson")),
    "iwae": ("x", lambda x: fastvae.iwae(x, (q[:, :2], q[:, 2:]), decoder, k=5, **options)),
    "bound": ("x", lambda x: fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(2), k=5, **options)),
    "beta_tc": ("x", lambda x: fastvae.beta_tc(x, q, decoder, dataset_size=99, **options)),
    "log_weights": ("x", lambda x: fastvae.log_weights(x, q, decoder, k=5, **options)),
    "log_marginal": ("x", lambda x: fastvae.log_marginal(x, q, decoder, k=5, **options)),
    "score": ("x", lambda x: fastvae.reconstruction_log_prob(x, q, decoder, **options)),
    "ais": ("x", lambda x: fastvae.audit.ais(x, q, decoder, steps=3, k=2, **options)),
    "VAE": ("x", lambda x: fastvae.VAE(lambda x: q, decoder, latent_dim=2, modules=[], **options).elbo(x)),
    "evaluate": ("data", lambda x: evaluate_parts(lambda x: q, decoder, x, k=5, progress=False, **options)),
    "batches": ("data", lambda x: evaluate_parts(lambda x: q, decoder, [x], progress=False, **options)),
    "parts": ("x['a']", lambda x: fastvae.elbo({"a": x}, q, lambda z: {"a": decoder(z)},
              likelihood=Joint(a="bernoulli"))),
    "op": ("x", lambda x: fastvae.ops.bernoulli_log_prob(x, DENSE)),
    "op of logits": ("logits", lambda x: fastvae.ops.bernoulli_log_prob(DENSE, x)),
    "q": ("q", lambda x: fastvae.elbo(DENSE, x, nn.Linear(3, 6), **options)),
    "mu": ("mu", lambda x: fastvae.elbo(DENSE, (x, x), nn.Linear(6, 6), **options)),
    "logvar": ("logvar", lambda x: fastvae.elbo(DENSE, (DENSE, x), nn.Linear(6, 6), **options)),
    "full": ("tril", lambda x: FullNormal(DENSE, x)),
    "prior": ("mu", lambda x: DiagonalNormal(x, x)),
    "context": ("context", lambda x: fastvae.elbo(DENSE, q, lambda z, c: decoder(z), context=x, **options)),
    "decoder": ("logits", lambda x: fastvae.elbo(DENSE, q, lambda z: x, **options)),
    "decoder of two": ("logvar", lambda x: fastvae.elbo(DENSE, q, lambda z: (DENSE, x))),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_dense_are_refused(layout):
    given = _layout(layout)
    for entry, (name, call) in ENTRIES.items():
        if (entry, layout) == ("context", "quantised"):
            continue  # a decoder may take one
        with pytest.raises(TypeError, match="layout|nested|quantised") as error:
            call(given)
        message = str(error.value)
        assert name in message and FIX.get(layout, ".to_dense()") in message, (entry, message)


@pytest.mark.parametrize("layout", ["sparse", "sparse_csr"])
@pytest.mark.filterwarnings("ignore")
def test_sparse_masks_and_integers(layout):
    with pytest.raises(TypeError, match=r"mask.*mask\.to_dense\(\)"):
        fastvae.elbo(DENSE, q, decoder, mask=_layout(layout, DENSE.bool()), **options)
    with pytest.raises(TypeError, match=r"x has layout.*x\.to_dense\(\)"):
        fastvae.elbo(_layout(layout, DENSE.long()), q, decoder, likelihood="poisson")


class Stored:
    """Array in a file that counts the elements read."""

    def __init__(self, values):
        self._values, self.shape, self.dtype = values, values.shape, values.dtype
        self.read = []

    def __len__(self):
        return len(self._values)

    def __array__(self, dtype=None, copy=None):
        return self[:]

    def __getitem__(self, rows):
        self.read.append(len(self._values[rows]))
        return self._values[rows]


def _model():
    torch.manual_seed(0)
    return fastvae.VAE(nn.Linear(6, 4), nn.Linear(2, 6), **options)


def test_stored_arrays_are_read_batch_by_batch(tmp_path):
    vae = _model()
    values = (np.random.default_rng(0).random((11, 6)) > 0.5).astype(np.float32)

    def log_px(data, **kwargs):
        generator = torch.Generator().manual_seed(0)
        found = vae.evaluate(data, k=10, batch_size=4, progress=False, generator=generator, **kwargs)
        return torch.as_tensor(found.log_px)

    # torch's product in the encoder rounds differently by the alignment of its input.
    same = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0)
    expected = log_px(torch.from_numpy(values))
    stored = Stored(values)
    same(log_px(stored), expected)
    assert stored.read == [4, 4, 3]
    x, context = Stored(values), Stored(values[:, :1])
    same(log_px([Stored(values[:4]), (Stored(values[4:]), 0)]), expected)
    vae = fastvae.VAE(
        lambda x, c, f=vae.encoder: f(x),
        lambda z, c, f=vae.decoder: f(z),
        modules=[vae.encoder, vae.decoder],
        **options,
    )
    found = log_px(
        [{"x": x, "c": context}], prepare_batch=lambda batch: {"x": batch["x"], "context": batch["c"]}
    )
    same(found, expected)
    joint = fastvae.VAE(lambda x: torch.zeros(len(x["a"]), 4), lambda z: {"a": z @ torch.ones(2, 6)},
                        likelihood=Joint(a="bernoulli"), modules=[])  # fmt: skip
    stored = Stored(values)
    joint.evaluate({"a": stored}, k=5, batch_size=4, progress=False)
    assert stored.read == [4, 4, 3]


def test_hdf5_is_read_batch_by_batch(tmp_path):
    h5py = pytest.importorskip("h5py")
    values = torch.rand(7, 6).round()
    with h5py.File(tmp_path / "data.h5", "w") as file:
        data = file.create_dataset("x", data=values.numpy())
        stored = _model().evaluate(data, k=5, batch_size=3, progress=False, generator=torch.Generator())
    expected = _model().evaluate(values, k=5, batch_size=3, progress=False, generator=torch.Generator())
    np.testing.assert_allclose(stored.log_px, expected.log_px, rtol=1e-6)


def test_new_tensors_ignore_the_default_device():
    """New tensors are on their inputs' device, whatever the default device."""
    vae, x = _model(), DENSE

    def results():
        torch.manual_seed(0)
        yield from (vae(x, objective) for objective in ("elbo", "iwae"))
        yield vae.elbo(x, kl="mc", free_bits=0.0)
        yield vae.beta_tc(x, dataset_size=99)
        yield vae.iwae(x, k=4, noise="qmc")
        yield vae.iwae(x, k=4, k_chunk=3)
        yield vae.bound(x, fastvae.bounds.IWAE(2), k=4)
        for proposal in ("posterior", "adapted", "defensive"):
            yield vae.log_marginal(x, k=300, proposal=proposal).log_px
            found = vae.evaluate(x, k=300, proposal=proposal, batch_size=3, progress=False)
            yield torch.from_numpy(np.asarray(found.log_px))
        yield vae.log_marginal(x, k=64, noise="qmc", proposal="defensive").psis
        yield vae.reconstruction_log_prob(x)
        yield vae.ais(x, steps=3, k=2).log_px
        yield vae.sample(3)
        yield vae.reconstruct(x)
        yield FullNormal.of(x, torch.eye(6, device="cpu").expand(4, 6, 6)).mean

    expected = list(results())
    with torch.device("meta"):
        found = list(results())
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


class Exported(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.vae, self.call = _model(), call

    def forward(self, x):
        return self.call(self.vae, x)


@pytest.mark.parametrize(
    "call",
    [
        lambda vae, x: vae.reconstruction_log_prob(x, k=10),
        lambda vae, x: vae.reconstruction_log_prob(x, k=10, k_chunk=4),
        lambda vae, x: vae.log_marginal(x, k=30),
        lambda vae, x: vae.elbo(x, reduction="none"),
        lambda vae, x: vae.iwae(x, k=5, reduction="none"),
        lambda vae, x: vae.reconstruct(x),
    ],
    ids=["reconstruction_log_prob", "chunks", "log_marginal", "elbo", "iwae", "reconstruct"],
)
def test_exported_programs_accept_any_batch(call):
    module = Exported(call)
    shapes = {"x": {0: torch.export.Dim("batch", max=2**32)}}
    program = torch.export.export(module, (torch.ones(3, 6),), dynamic_shapes=shapes).module()
    x = torch.ones(13, 6)
    torch.manual_seed(1)
    found = program(x)
    torch.manual_seed(1)
    expected = module(x)
    assert type(found) is type(expected)
    if dataclasses.is_dataclass(found):
        found, expected = vars(found), vars(expected)
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.skipif(backend.LEFT_OUT, reason="reads tensors in C++")
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.bool, torch.int64],
    ids=str,
)
def test_tensors_are_read_alike_by_their_handle_and_by_methods(dtype):
    """Both ways of reading a tensor give one description; a bool is a byte."""
    read = backend.extension().read
    whole = torch.ones(3, 4, 6).to(dtype)
    for t in (
        whole,
        whole[1],
        whole[:, 1, 2],
        whole.mT,
        whole[..., ::2],
        whole[:1].expand(3, 4, 6),
        whole[:0],
    ):
        assert read(t, True) == read(t, False)
    number = {torch.bool: 4, torch.uint8: 4}.get(dtype)
    assert number is None or read(whole, True)[1] == number
