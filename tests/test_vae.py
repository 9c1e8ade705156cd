"""fastvae.VAE as a module: its parameters, copies, calls and training."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution
from fastvae.likelihoods import Gaussian
from fastvae.ops.head import FEWEST_NUMBERS

from . import models
from .conftest import DEVICE
from .models import evaluate_parts, generator, rand, randn, values_of

B, D, X, K = 5, 3, 7, 4
BERNOULLI = {"likelihood": "bernoulli"}


class Net(nn.Module):
    """Both networks in one module, with methods as in other libraries."""

    def __init__(self):
        super().__init__()
        self.enc = nn.Sequential(nn.Linear(X, 6), nn.Dropout(0.5), nn.Linear(6, 2 * D)).to(DEVICE)
        self.dec = nn.Linear(D, X).to(DEVICE)

    def encode(self, x):
        return self.enc(x)

    def decode(self, z):
        return self.dec(z)


class Caller:
    """Callable object that is not a module."""

    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net.encode(x)


class UsesGlobal:
    """Callable whose code refers to a global module."""

    def __call__(self, x):
        return GLOBALS["net"].encode(x)

    def method(self, x):
        return GLOBALS["net"].encode(x)


GLOBALS = {}


class Trainer:
    """Plain object with the networks, and the VAE of its methods."""

    def __init__(self, net):
        self.net = net
        self.vae = fastvae.VAE(self.encode, self.decode, modules=[net], **BERNOULLI)

    def encode(self, x):
        return self.net.encode(x)

    def decode(self, z):
        return self.net.decode(z)


def callables():
    """Return, for each kind of callable, a net, an encoder and decoder that use it, and ``modules=``."""
    net = Net()
    enc, dec = net.enc, net.dec
    yield "modules", net, enc, dec, None
    yield "methods", net, net.encode, net.decode, None
    yield "functions", net, lambda x: enc(x).chunk(2, dim=1), lambda z: dec(z), [enc, dec]
    yield "functions of one net", net, lambda x: net.encode(x), lambda z: net.decode(z), [net]
    yield (
        "partials",
        net,
        functools.partial(lambda m, x: m(x), enc),
        functools.partial(Net.decode, net),
        [net],
    )
    yield "an object", net, Caller(net), dec, [enc]
    yield "defaults", net, lambda x, f=enc: f(x), lambda z, *, f=dec: f(z), (enc, dec)
    GLOBALS["net"] = net
    yield "a method with a global", net, UsesGlobal().method, net.decode, [net]
    yield "an object with a global", net, UsesGlobal(), net.decode, [net]
    yield "compiled functions", net, torch.compile(lambda x: enc(x), backend="eager"), net.decode, [enc]
    yield (
        "compiled modules",
        net,
        torch.compile(enc, backend="eager"),
        torch.compile(dec, backend="eager"),
        None,
    )


KINDS = [kind for kind, *_ in callables()]


def build(kind):
    net, encoder, decoder, modules = next(rest for name, *rest in callables() if name == kind)
    return fastvae.VAE(encoder, decoder, modules=modules, **BERNOULLI), net


@pytest.mark.parametrize("kind", KINDS)
def test_a_vae_owns_the_parameters_of_its_callables(kind):
    """Optimisers, state_dict, .eval() and .to() reach the modules that encoder and decoder use."""
    vae, net = build(kind)
    assert {id(p) for p in vae.parameters()} == {id(p) for p in net.parameters()}
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.1)
    (-vae.elbo(rand(B, X, seed=1))).backward()
    optimizer.step()
    for name, value in net.state_dict().items():
        assert not torch.equal(value, before[name]), name
    vae.eval()
    assert not net.enc[1].training
    other, other_net = build(kind)
    GLOBALS["net"] = net
    other.load_state_dict(vae.state_dict())
    for name, value in net.state_dict().items():
        assert torch.equal(other_net.state_dict()[name], value)
    vae.to(torch.float64)
    assert {p.dtype for p in net.parameters()} == {torch.float64}
    assert vae.elbo(rand(B, X, seed=1, dtype=torch.float64)).dtype == torch.float64


def test_scripted_modules():
    scripted = torch.jit.trace(nn.Linear(X, 2 * D), torch.zeros(1, X)).to(DEVICE)
    vae = fastvae.VAE(scripted, nn.Linear(D, X, device=DEVICE), **BERNOULLI)
    assert len(list(vae.parameters())) == 4
    (-vae(rand(B, X, seed=1))).backward()
    assert all(bool(p.grad.any()) for p in vae.parameters())
    # Methods of scripted modules do not reveal their module.
    with pytest.raises(TypeError, match=r"encoder is .*modules=\[net\].*the module itself"):
        fastvae.VAE(scripted.forward, nn.Linear(D, X))
    vae = fastvae.VAE(scripted.forward, nn.Linear(D, X), modules=[scripted])
    assert len(list(vae.parameters())) == 4


def test_functions_need_modules():
    """Functions need modules=, and the error says what to write; nothing is found by looking into them."""
    net, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)
    functions = lambda x: net(x), functools.partial(net), Caller(Net()), Trainer(Net()).encode  # noqa: E731
    for encoder in functions:
        with pytest.raises(TypeError, match=r"VAE\(encoder=\.\.\., modules=\[net\]\).*net\.encode"):
            fastvae.VAE(encoder, decoder)
    with pytest.raises(TypeError, match=r"decoder is .*<lambda>.*VAE\(decoder=\.\.\., modules=\[net\]\)"):
        fastvae.VAE(net, lambda z: decoder(z))
    with pytest.raises(TypeError, match=r"prior is .*VAE\(prior=\.\.\., modules=\[net\]\)"):
        fastvae.VAE(net, decoder, prior=lambda c: net(c))
    vae = fastvae.VAE(lambda x: net(x), decoder, prior=lambda c: decoder(c).chunk(2, 1), modules=[net])
    assert {id(p) for p in vae.parameters()} == {id(p) for m in (net, decoder) for p in m.parameters()}
    assert not list(fastvae.VAE(lambda x: net(x), lambda z: z, modules=[]).parameters())
    for modules in (net, 3, [net.weight], ["net"]):
        with pytest.raises(TypeError, match="modules must be a list"):
            fastvae.VAE(lambda x: net(x), decoder, modules=modules)
    with pytest.raises(TypeError, match="modules names.*leave it out"):
        fastvae.VAE(net, decoder, modules=[nn.Linear(1, 1)])


def test_names_of_the_modules():
    """A module gets the name of its type, with a number if there are several."""
    net, other = nn.Linear(X, X, bias=False), nn.Linear(X, 2 * D, bias=False)
    vae = fastvae.VAE(lambda x: other(net(x)), Net().decode, modules=[net, other])
    names = [n for n in vae.state_dict() if not n.startswith("decoder")]
    assert sorted(names) == ["encoder.linear.weight", "encoder.linear2.weight"]


def test_functions_without_parameters_are_accepted():
    model = models.LinearGaussian(D, X, dtype=torch.float32)
    vae = fastvae.VAE(model.posterior, model.decoder, likelihood=model.likelihood, modules=[])
    assert not list(vae.parameters())
    twin = copy.deepcopy(vae)
    x = model.sample(B)
    assert torch.equal(twin(x, generator=generator(1)), vae(x, generator=generator(1)))


class Holder(nn.Module):
    """Module with networks, methods, and a VAE of the methods, like a LightningModule."""

    def __init__(self, build):
        super().__init__()
        self.enc, self.dec = nn.Linear(X, 2 * D), nn.Linear(D, X)
        self.vae = build(self)

    def encode(self, x):
        return self.enc(x)

    def decode(self, z):
        return self.dec(z)


CYCLES = {
    "methods": lambda self: fastvae.VAE(self.encode, self.decode),
    "functions": lambda self: fastvae.VAE(lambda x: self.enc(x), lambda z: self.dec(z), modules=[self]),
    "the decoder alone": lambda self: fastvae.VAE(self.enc, self.decode),
    "a partial": lambda self: fastvae.VAE(functools.partial(self.encode), self.dec, modules=[self]),
}


@pytest.mark.parametrize("how", CYCLES)
def test_a_module_that_contains_the_vae_is_refused(how):
    """A VAE that reaches the module holding it is refused: train() and state_dict() would not end."""
    holder = Holder(CYCLES[how])
    with pytest.raises(ValueError, match=r"reaches the Holder that holds the VAE.*\.enc and \w+\.dec"):
        holder.train()
    holder = Holder(lambda self: fastvae.VAE(self.enc, self.dec))
    holder.train().eval()
    assert len(list(holder.parameters())) == 4
    assert len(holder.state_dict()) == 8


@pytest.mark.parametrize("walk", ["train", "state_dict", "load_state_dict", "double", "repr"])
def test_a_module_that_later_contains_the_vae_is_refused(walk):
    holder = Holder(lambda self: None)
    holder.vae = fastvae.VAE(holder.encode, holder.decode)
    call = {
        "load_state_dict": lambda: holder.load_state_dict({}, strict=False),
        "repr": lambda: repr(holder),
    }.get(walk, lambda: getattr(holder, walk)())
    with pytest.raises(ValueError, match=r"holds the VAE.*\.enc and \w+\.dec"):
        call()


def test_a_subclass_with_its_own_methods():
    class Own(fastvae.VAE):
        def __init__(self):
            super().__init__(self.encode, self.decode, **BERNOULLI)
            self.enc, self.dec = nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE)

        encode = Net.encode
        decode = Net.decode

    vae, x = Own(), rand(B, X, seed=1)
    assert len(vae.state_dict()) == len(list(vae.train().parameters())) == 4
    _assert_copy(vae, copy.deepcopy(vae), x)


def _assert_copy(vae, twin, x):
    """Assert that a copy computes the same, and that changing it does not change the original."""
    value = vae(x, generator=generator(1))
    assert torch.equal(twin(x, generator=generator(1)), value)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.3)
    assert torch.equal(vae(x, generator=generator(1)), value)
    assert not torch.equal(twin(x, generator=generator(1)), value)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "average"])
@pytest.mark.parametrize("kind", ["modules", "methods"])
def test_copies_use_their_own_parameters(kind, how):
    vae, _ = build(kind)
    vae.eval()
    if how == "average":
        twin = torch.optim.swa_utils.AveragedModel(vae)
    elif how == "deepcopy":
        twin = copy.deepcopy(vae)
    else:
        file = io.BytesIO()
        torch.save(vae, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    _assert_copy(vae, twin, rand(B, X, seed=1))


_GLOBAL = nn.Linear(X, 2 * D)


def _of_a_global(x):
    return _GLOBAL(x)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "average"])
def test_copies_that_would_share_parameters_are_refused(how):
    """Copies are refused if a function, which cannot be copied, would use the original's modules."""
    net = Net()
    copies = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda vae: torch.save(vae, io.BytesIO()),
        "average": torch.optim.swa_utils.AveragedModel,
    }
    GLOBALS["net"] = net
    functions = (lambda x: net(x), _of_a_global, functools.partial(_of_a_global), UsesGlobal().method)
    for encoder in (*functions, Caller(net), Trainer(net).encode):
        vae = fastvae.VAE(encoder, nn.Linear(D, X), modules=[net])
        with pytest.raises(TypeError, match=r"cannot be copied.*would go on using the original's \w+"):
            copies[how](vae)


def test_evaluate_with_methods():
    """evaluate puts the net of methods into eval mode, without dropout, and back."""
    net = Net().train()
    vae = fastvae.VAE(net.encode, net.decode, **BERNOULLI)
    x = rand(B, X, seed=1)
    results = [vae.evaluate(x, k=9, progress=False, generator=generator(2)) for _ in range(2)]
    assert net.enc[1].training
    assert torch.equal(results[0].log_px, results[1].log_px)
    expected = evaluate_parts(net.enc, net.dec, x, k=9, progress=False, generator=generator(2), **BERNOULLI)
    assert torch.equal(results[0].log_px, expected.log_px)


# forward


def test_forward_calls_an_objective_by_name():
    encoder, decoder = models.networks(X, D, "bernoulli")
    vae, x = fastvae.VAE(encoder, decoder, **BERNOULLI), rand(B, X, seed=1)
    for objective, options in (
        ("elbo", {"k": 2, "beta": 0.3, "reduction": "none"}),
        ("iwae", {"k": K, "estimator": "dreg"}),
        ("iwae", {"k": K, "terms": True}),
        ("log_marginal", {"k": 30}),
    ):
        got = vae(x, objective=objective, generator=generator(1), **options)
        expected = getattr(vae, objective)(x, generator=generator(1), **options)
        assert type(got) is type(expected)
        pairs = zip(values_of(got), values_of(expected), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert torch.equal(vae(x, generator=generator(1)), vae.elbo(x, generator=generator(1)))
    seen = []
    vae.register_forward_hook(lambda module, arguments, result: seen.append(result))
    vae(x, objective="iwae", k=K)
    assert len(seen) == 1


# Noise of a part of the batch


@pytest.mark.parametrize("offset", [0, 2, 2**32 - 2 * B])
def test_parts_of_a_batch_use_the_noise_of_the_whole(backend, offset):
    """Ranks with one seed give, for their rows, the results of one process for all rows."""
    encoder, decoder = models.networks(X, D)
    rows = 2 * B
    x = randn(rows, X, seed=1)
    x[B:] = x[:B]
    vae = fastvae.VAE(encoder, decoder)
    calls = [
        (vae.elbo, {"k": K}),
        (vae.elbo, {"k": K, "kl": "mc"}),
        (vae.iwae, {"k": K}),
        (vae.iwae, {"k": K, "k_chunk": 3, "estimator": "dreg"}),
    ]
    calls += [(lambda *a, **o: vae.log_marginal(*a, **o).log_px, {"k": 9, "k_chunk": 4})]
    calls += [(vae.reconstruction_log_prob, {"k": 9})]
    for call, options in calls:
        train = {"reduction": "none"} if call in (vae.elbo, vae.iwae) else {}
        whole, *parts = (
            call(x[start:stop], row_offset=offset + start, generator=generator(2), **options, **train)
            for start, stop in ((0, rows), (0, B), (B, rows))
        )
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
        # The same data at other indices have different noise.
        assert not torch.allclose(parts[0], parts[1])


def test_a_posterior_without_offsets_is_accepted():
    class Plain(Distribution):
        def __init__(self, mu, logvar):
            super().__init__()
            self.inner = DiagonalNormal(mu, logvar)
            self.batch, self.device = mu.shape[0], mu.device

        def rsample_log_prob(self, samples, seed):
            return self.inner.rsample_log_prob(samples, seed)

    encoder, decoder = models.networks(X, D)
    x = randn(B, X, seed=1)
    for objective, options in ((fastvae.elbo, {"kl": "mc"}), (fastvae.iwae, {"k": K})):
        got = objective(x, Plain(*encoder(x)), decoder, generator=generator(1), **options)
        expected = objective(x, encoder(x), decoder, generator=generator(1), **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="row_offset"):
        fastvae.iwae(x, Plain(*encoder(x)), decoder, k=K, row_offset=1)


# A learned scale


@pytest.mark.parametrize("scale", [0.1, torch.full((X,), 0.1)], ids=["number", "row"])
def test_learned_scale_stays_positive(scale):
    """A learned scale stays positive for constant pixels, which drive it to 0; a plain step crosses it."""
    likelihood = Gaussian(scale=scale, learned=True)
    encoder, decoder = models.networks(X, D, "bernoulli")
    vae = fastvae.VAE(encoder, decoder, likelihood=likelihood.to(DEVICE))
    assert "likelihood.log_scale" in vae.state_dict()
    assert torch.allclose(likelihood.scale, torch.as_tensor(0.1, device=DEVICE))
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
    with torch.no_grad():
        decoder.weight.zero_()
        decoder.bias.zero_()
    for _ in range(300):
        optimizer.zero_grad()
        loss = -vae(torch.zeros(B, X, device=DEVICE))
        loss.backward()
        optimizer.step()
        assert bool(loss.isfinite())
        assert bool((likelihood.scale > 0).all())
    assert float(likelihood.scale.detach().max()) < 0.05


def test_an_explicit_latent_dim_is_checked():
    decoder, x = nn.Linear(2, 7), torch.rand(4, 7)
    vae = fastvae.VAE(nn.Linear(7, 2 * 2), decoder, latent_dim=3, likelihood=Gaussian(0.3))
    for call in (vae, vae.posterior, vae.log_marginal, vae.evaluate):
        with pytest.raises(ValueError, match=r"a q of 2 latents, but the VAE has latent_dim=3; .*\[B, 6\]"):
            call(x)
    picture = fastvae.VAE(lambda x: torch.zeros(len(x), 4, 3, 2), decoder, latent_dim=(2, 2, 3), modules=[])
    with pytest.raises(ValueError, match=r"a q of \(2, 3, 2\) latents, .* latent_dim=\(2, 2, 3\)"):
        picture.posterior(x)
    flat = fastvae.VAE(lambda x: torch.zeros(len(x), 4, 3, 2), decoder, latent_dim=12, modules=[])
    assert flat.posterior(x).mean.shape == (4, 12)
    # A latent dimension inferred from a first batch may change.
    free = fastvae.VAE(nn.Linear(7, 2 * 2), decoder, likelihood=Gaussian(0.3))
    free.posterior(x)
    free.encoder = nn.Linear(7, 2 * 3)
    assert free.posterior(x).mean.shape == (4, 3)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize(
    "options", [{"estimator": "dreg"}, {"encoder": fastvae.bounds.IWAE()}], ids=["dreg", "encoder"]
)
def test_a_decoder_that_mixes_rows_is_refused_at_any_size(fuse, options):
    """A decoder that mixes rows is refused also at sizes whose last layer is fused."""
    decoder = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 800))
    vae = fastvae.VAE(nn.Linear(800, 6), decoder, likelihood="bernoulli", fuse=fuse)
    k = FEWEST_NUMBERS // (5 * 800) + 1
    x = torch.ones(5, 800)
    objective = fastvae.bounds.IWAE(estimator=options.get("estimator", "iwae"))
    with pytest.raises(ValueError, match="1, a BatchNorm1d, takes statistics over all samples"):
        vae.bound(x, objective, k=k, q_objective=options.get("encoder"))
    decoder.eval()
    assert bool(vae.bound(x, objective, k=k, q_objective=options.get("encoder")).isfinite())


@pytest.mark.parametrize("kind", [tuple, list])
def test_a_single_parameter_may_come_in_a_tuple(kind):
    """Every method reads it alike."""

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 7)

        def forward(self, z):
            return kind([self.layer(z)])

    wrapped = fastvae.VAE(nn.Linear(7, 4), Decoder(), likelihood="poisson", latent_dim=2)
    plain = fastvae.VAE(wrapped.encoder, wrapped.decoder.layer, likelihood="poisson", latent_dim=2)
    x = torch.arange(35.0).reshape(5, 7)
    for name in ("elbo", "iwae", "log_marginal", "evaluate", "reconstruct", "sample"):
        args = (3,) if name == "sample" else (x,)
        found = []
        for vae in (wrapped, plain):
            torch.manual_seed(1)
            result = getattr(vae, name)(*args)
            found.append(getattr(result, "log_px", result))
        assert torch.allclose(*found), name
