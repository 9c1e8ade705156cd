"""Every kernel has minimal memory traffic: inputs are read once, outputs written once, nothing else."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import TorchDispatchMode

from fastvae.core.deferred import HiddenLayer
from fastvae.kernels import (
    aggregate,
    categorical,
    chain,
    common,
    head,
    likelihood,
    logsumexp,
    multinomial,
    normal_diagonal,
    normal_tiles,
    reduce,
)
from fastvae.kernels.likelihood_flat import SAMPLES_FLAT
from fastvae.kernels.likelihood_parameters import is_heavy, launching_of
from fastvae.kernels.mixture import THREAD, tile_of
from fastvae.ops.normal_arguments import Draw
from fastvae.ops.reduce import BoundReduction

from . import cases
from .cases import DECLARED
from .conftest import CUDA
from .traffic import Launch, recorded

pytestmark = pytest.mark.skipif(CUDA, reason="counts the accesses of Triton's interpreter")

BERNOULLI = DECLARED["bernoulli"]
FREE = (0, 0, -math.inf, math.inf)
SEED = torch.tensor(3)
# Operations allowed in a launcher besides launching: allocate, view, cast the results of split sums to half
# precision, and add the parts of a split sum.
ALLOWED = {"empty", "new_empty", "view", "squeeze_", "resize_", "select", "unsqueeze", "unbind", "_to_copy"}


class Called(TorchDispatchMode):
    """Mode that records the names of the torch operations that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def run(call) -> list[Launch]:
    """Return the launches of a call but those of the sum of one tensor's parts, which are read once.

    Torch may only add the parts of split sums.
    """
    with recorded() as launches, Called() as called:
        results = call()
    parts = [t for launch in launches for t in _parts(launch, results)]
    assert called.names <= ALLOWED | ({"sum"} if parts else set()), called.names
    for launch in launches:
        if launch.kernel == "sum_kernel":
            assert_least(launch)
    return [launch for launch in launches if launch.kernel != "sum_kernel"]


def _parts(launch: Launch, results) -> list[torch.Tensor]:
    """Return the tensors that a launch stores which are not results of the call."""
    results = results if isinstance(results, tuple) else (results,)
    kept = {t.data_ptr() for t in results if t is not None}
    return [launch.tensors[name] for name in launch.stores if launch.tensors[name].data_ptr() not in kept]


def assert_least(
    launch: Launch,
    again: dict[str, int] = {},  # noqa: B006 (it is only read)
    unlike: tuple[str, ...] = (),
) -> None:
    """Assert that each element of each argument is read once (``again`` times) or written once.

    The elements of an argument in ``unlike`` are not all read as often.
    """
    for name in launch.tensors:
        if name in unlike:
            continue
        loaded, stored = launch.counts(launch.loads, name), launch.counts(launch.stores, name)
        what = f"{launch.kernel}: each element of {name}"
        assert not (loaded.any() and stored.any()), f"{what} is read and written"
        if stored.any():
            least, most = stored.min(), stored.max()
            assert least == most == 1, f"{what} must be written once, and is written {least} to {most} times"
        else:
            # Every program reads the seed.
            allowed = again.get(name, math.prod(launch.grid) if name == "p_seed" else 1)
            least, most = loaded.min(), loaded.max()
            times = f"must be read {allowed} times, and is read {least} to {most} times"
            assert least == most == allowed, f"{what} {times}"


def _tiles(n: int, most: int) -> int:
    return triton.cdiv(n, common.tile_width(n, most))


def tensors(count, *shape, dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for _ in range(count)]


def pair(b, d, dtype, chunked):
    """Return mu and logvar; if ``chunked``, the halves of one tensor, as in an encoder's output."""
    if not chunked:
        return tensors(2, b, d, dtype=dtype)
    return list(torch.randn(b, 2 * d).to(dtype).chunk(2, dim=1))


# K, B, D, and whether mu and logvar are halves of one tensor.
DRAWS = [(1, 33, 70, False), (5, 3, 300, False), (2, 1, 1100, False), (3, 40, 50, True), (2, 130, 10, True)]


@pytest.fixture
def enough(monkeypatch):
    """Disable splitting, as if there were always enough programs."""
    cached = (common.event_tiles, normal_tiles.latent_tiles)
    for function in cached:
        function.cache_clear()
    for module in (common, normal_tiles, logsumexp):
        monkeypatch.setattr(module, "PROGRAMS", 1)
    yield
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("k, b, d, chunked", DRAWS)
def test_sampling_reads_once(enough, k, b, d, chunked, prior, dtype):
    """A program takes all samples of its rows: mu, logvar and the prior are read once, z written once."""
    q, p = pair(b, d, dtype, chunked), tensors(2, b, d, dtype=dtype) if prior else (None, None)
    arguments = (*q, *p, SEED, Draw(k, *FREE))
    (launch,) = run(lambda: normal_diagonal.rsample_kl(*arguments, False))
    assert_least(launch)
    size, row = q[0].element_size(), 4 * b
    read = (2 + 2 * prior) * b * d * size + 8 * math.prod(launch.grid)
    # Not a byte more: no noise, no copies.
    assert launch.bytes() == read + k * b * d * size + 4 * launch.tensors["p_kl"].numel()

    (launch,) = run(lambda: normal_diagonal.rsample_log_ratio(*arguments, "iwae"))
    assert_least(launch)
    tiles = _tiles(d, common.LAUNCH["normal_diagonal"].tile)
    assert launch.tensors["p_log_ratio"].numel() == tiles * k * b
    read = (2 + 2 * prior) * b * d * size + 8 * math.prod(launch.grid)
    assert launch.bytes() == read + k * b * d * size + k * row * tiles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, b, d, chunked", DRAWS)
def test_sampling_backward_reads_once(enough, k, b, d, chunked, dtype):
    (mu, logvar), prior = pair(b, d, dtype, chunked), tensors(2, b, d, dtype=dtype)
    (grad_z,) = tensors(1, k, b, d, dtype=dtype)
    (grad_kl,), (grad_each,), (grad_ratio, weight) = tensors(1, b), tensors(1, b, d), tensors(2, k, b)
    arguments = (mu, logvar, *prior, SEED, Draw(k, *FREE))
    size, need, tiles = mu.element_size(), [True] * 4, _tiles(d, common.LAUNCH["latent_backward"].tile)
    # mu, logvar, the prior's, z's gradient; four gradients.
    least = (4 + k + 4) * b * d * size

    (launch,) = run(lambda: normal_diagonal.rsample_kl_backward(grad_z, grad_kl, *arguments, need))
    # A number per row is read by every tile of the row.
    assert_least(launch, {"p_grad_kl": tiles})
    assert launch.bytes() == least + 4 * tiles * b + launch.loaded("p_seed")

    (launch,) = run(lambda: normal_diagonal.rsample_kl_backward(grad_z, grad_each, *arguments, need))
    assert_least(launch)
    assert launch.bytes() == least + 4 * b * d + launch.loaded("p_seed")

    (launch,) = run(
        lambda: normal_diagonal.rsample_log_ratio_backward(
            grad_z, grad_ratio, weight, *arguments, False, need
        )
    )
    assert_least(launch, {"p_grad_log_ratio": tiles, "p_weight": tiles})
    assert launch.bytes() == least + 4 * tiles * 2 * k * b + launch.loaded("p_seed")


def test_sampling_backward_reads_only_what_it_needs(enough):
    """Nothing is read for gradients that are not needed."""
    k, b, d = 3, 5, 70
    (mu, logvar), (grad_z,), (grad_kl,) = tensors(2, b, d), tensors(1, k, b, d), tensors(1, b)
    arguments = (mu, logvar, None, None, SEED, Draw(k, *FREE))
    (launch,) = run(
        lambda: normal_diagonal.rsample_kl_backward(grad_z, None, *arguments, [True, False, False, False])
    )
    assert launch.loaded("p_grad_z") == grad_z.nbytes and launch.stores.keys() == {"p_grad_mu"}
    # The KL alone needs no samples, and the backward pass then reads no seed.
    (launch,) = run(
        lambda: normal_diagonal.rsample_kl_backward(None, grad_kl, *arguments, [True, True, False, False])
    )
    assert set(launch.loads) == {"p_mu", "p_logvar", "p_grad_kl"}
    assert launch.bytes() == 4 * (4 * b * d + b)


def test_split_samples():
    """For few rows, samples are split over programs, each of which reads mu, logvar and writes a part."""
    k, b, d = 130, 2, 20
    (mu, logvar), (grad_z,) = tensors(2, b, d), tensors(1, k, b, d)
    arguments = (mu, logvar, None, None, SEED, Draw(k, *FREE))
    for call in (
        lambda: normal_diagonal.rsample_kl(*arguments, False),
        lambda: normal_diagonal.rsample_log_ratio(*arguments, "iwae"),
        lambda: normal_diagonal.rsample_kl_backward(grad_z, None, *arguments, [True, True, False, False]),
    ):
        # A second launch adds the parts of two sums.
        launch, *_ = run(call)
        splits = launch.grid[1]
        assert splits > 1
        assert_least(launch, {"p_mu": splits, "p_logvar": splits})
    assert [t.shape for t in launch.tensors.values()].count((splits, b, d)) == 2


LAYOUTS = {
    "full": lambda k, b, x: (k, b, x),
    "column": lambda k, b, x: (1, 1, x),
    "row": lambda *_: (1, 1, 1),
}


each = [
    pytest.param(name, layout, id=f"{name}-{layout}")
    for name, declared in DECLARED.items()
    for layout in (LAYOUTS if len(declared.outputs) > 1 else ["full"])
]
# Also with x's gradient, if x has one and a program may take all samples, which a row's sum forbids.
each_with_x = [
    pytest.param(*case.values, with_x, id=f"{case.id}{'-x' if with_x else ''}")
    for case in each
    for with_x in (False, True)
    if not with_x or (DECLARED[case.values[0]].differentiable and case.values[1] != "row")
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, b, x", [(1, 33, 70), (7, 9, 200), (3, 2, 1100)])
@pytest.mark.parametrize("name, layout", each)
def test_likelihoods_read_once(enough, name, layout, k, b, x, dtype):
    """Parameters are read once, x once for each block of samples that shares it."""
    declared, data = DECLARED[name], cases.data(name, b, x)
    (first,) = tensors(1, k, b, x, dtype=dtype)
    given = [first, *tensors(len(declared.outputs) - 1, *LAYOUTS[layout](k, b, x), dtype=dtype)]
    tiles = common.event_tiles(k, b, x, launching_of(declared, False).tile)
    blocks = triton.cdiv(k, tiles.block_k)
    assert blocks < k or k == 1 or is_heavy(name)
    (launch,) = run(lambda: likelihood.log_prob(declared, data, None, *given))
    again, moved = {"p_x": blocks}, blocks * data.nbytes + first.nbytes + 4 * k * b
    for i in range(1, len(given)):
        if layout != "full":
            # A few numbers shared by all programs.
            again[f"p_p{i}"] = int(launch.counts(launch.loads, f"p_p{i}").max())
            assert again[f"p_p{i}"] <= blocks * triton.cdiv(b, tiles.block_b) * _tiles(x, common.TILE_X)
        moved += launch.loaded(f"p_p{i}")
    assert_least(launch, again)
    assert launch.bytes() == moved


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("k, b, x", [(1, 33, 70), (7, 9, 200), (3, 2, 1100)])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_masks_are_read_as_often_as_x(enough, name, k, b, x, shared):
    """A mask is a byte per element of x, read with it; one that all rows share is not copied for each."""
    declared, data = DECLARED[name], cases.data(name, b, x)
    given = tensors(len(declared.outputs), k, b, x)
    mask = cases.mask_of("of one event" if shared else "most", b, x)
    (grad,), need = tensors(1, k, b), [False] + [True] * len(given)
    for call in (
        lambda m: likelihood.log_prob(declared, data, m, *given),
        lambda m: likelihood.log_prob_backward(declared, grad, data, m, *given, need),
    ):
        (launch,), (plain,) = run(lambda c=call: c(mask)), run(lambda c=call: c(None))
        assert launch.tensors["p_mask"].data_ptr() == mask.data_ptr()
        assert launch.loaded("p_mask") * data.element_size() == launch.loaded("p_x")
        assert launch.bytes() == plain.bytes() + launch.loaded("p_mask")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, b, x", [(1, 33, 70), (7, 9, 200), (3, 2, 1100)])
@pytest.mark.parametrize("name, layout, with_x", each_with_x)
def test_likelihoods_backward_reads_once(enough, name, layout, with_x, k, b, x, dtype):
    """The gradient of x is summed over samples by a program that has them all, so x is read once."""
    declared, data = DECLARED[name], cases.data(name, b, x)
    (first,), (grad,) = tensors(1, k, b, x, dtype=dtype), tensors(1, k, b)
    given = [first, *tensors(len(declared.outputs) - 1, *LAYOUTS[layout](k, b, x), dtype=dtype)]
    need = [with_x] + [True] * len(given)
    merged = {"merge_k": with_x or layout == "column", "merge_b": layout == "column"}
    blocks = common.event_tiles(k, b, x, launching_of(declared, True).tile, **merged).k_splits
    assert blocks == 1 or not with_x
    (launch,) = run(lambda: likelihood.log_prob_backward(declared, grad, data, None, *given, need))
    # A row's gradient is read for each of its tiles, or groups of pixels, out of the caches.
    tiles = _tiles(x, common.TILE_X)
    if not with_x and (layout == "full" or len(given) == 1):
        assert launch.kernel == "log_prob_flat_backward_kernel"
        tiles = x // min(x & -x, 16 // first.element_size())
        blocks = triton.cdiv(k, SAMPLES_FLAT)
    again, moved = {"p_x": blocks, "p_grad": tiles}, blocks * data.nbytes + tiles * grad.nbytes
    moved += 2 * first.nbytes + (data.nbytes if with_x else 0)
    for i in range(1, len(given)):
        if layout != "full":
            again[f"p_p{i}"] = int(launch.counts(launch.loads, f"p_p{i}").max())
        moved += launch.loaded(f"p_p{i}") + {"full": first.nbytes, "column": 4 * x, "row": 4 * k * b}[layout]
    assert_least(launch, again)
    assert launch.bytes() == moved


@pytest.mark.parametrize("last", [False, True], ids=["classes first", "classes last"])
def test_classes_read_the_logits_once(last):
    """Each logit is read once, of classes last also that of x; gradients are written once."""
    b, k, c, p = 3, 2, 21, 7
    x = torch.randint(c, (b, p))
    logits = torch.randn(k * b, *((p, c) if last else (c, p)))
    with recorded() as launches:
        _, normaliser = categorical.categorical_log_prob(x, None, logits, last, -100)
        grad = torch.randn(k * b)
        categorical.categorical_log_prob_backward(grad, normaliser, x, None, logits, last, -100)
    forward, backward = [launch for launch in launches if "p_a" in launch.tensors]
    chosen = torch.nn.functional.one_hot(x.repeat(k, 1), c) * last
    often = 1 + (chosen if last else chosen.movedim(-1, 1))
    assert forward.counts(forward.loads, "p_a").tolist() == often.flatten().tolist()
    assert set(forward.counts(forward.stores, "p_normaliser").tolist()) == {1}
    assert set(backward.counts(backward.loads, "p_a").tolist()) == {1}
    assert set(backward.counts(backward.stores, "p_grad_a").tolist()) == {1}
    assert set(backward.counts(backward.loads, "p_x").tolist()) == {k}


@pytest.mark.parametrize("masked", [False, True])
def test_counts_read_the_logits_once(masked):
    """Each logit is read once in each direction, x and a mask once for each sample."""
    b, k, size = 3, 2, 600
    x, logits = (3 * torch.rand(b, size)).floor(), torch.randn(k * b, size)
    mask = torch.rand(b, size) > 0.5 if masked else None
    with recorded() as launches:
        _, normaliser, total = multinomial.multinomial_log_prob(x, None, None, mask, logits, False)
        grad = torch.randn(k * b)
        multinomial.multinomial_log_prob_backward(grad, normaliser, total, x, None, None, mask, logits)
    assert len(launches) == 2
    for launch in launches:
        assert set(launch.counts(launch.loads, "p_a").tolist()) == {1}
        for name in ("p_x", *["p_mask"] * masked):
            assert set(launch.counts(launch.loads, name).tolist()) == {k}
    assert set(launches[1].counts(launches[1].stores, "p_grad_a").tolist()) == {1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_output_of_a_fused_layer_is_not_stored(enough, dtype):
    """The layer's output is not in memory: layer and inputs are read per tile, log-likelihoods written."""
    k, b, inner, size = 9, 20, 40, 150
    n = k * b
    x, h = torch.rand(b, size), torch.randn(n, inner).to(dtype)
    weight, bias = torch.randn(size, inner).to(dtype), torch.randn(size).to(dtype)
    layers = SimpleNamespace(weights=(weight,), biases=(bias,), constants=())
    (launch,) = run(lambda: head.linear_log_prob(BERNOULLI, x, h, layers))
    # Half precision is computed in float32 here.
    rows, outputs = triton.cdiv(n, head.BLOCK_N), triton.cdiv(size, head.BLOCK_X)
    assert set(launch.loads) == {"p_x", "p_h", "p_w0", "p_b0"} and set(launch.stores) == {"p_out"}
    assert launch.loaded("p_h") == n * inner * outputs * dtype.itemsize
    assert launch.loaded("p_w0") == size * inner * rows * dtype.itemsize
    assert launch.loaded("p_b0") == size * rows * dtype.itemsize
    assert launch.loaded("p_x") == n * size * 4
    stored = sum(o.size for o in launch.stores["p_out"])
    assert stored % n == 0 and stored <= n * outputs


@pytest.mark.parametrize("widths", [(40,), (40, 24), (40, 24, 70)])
def test_the_values_of_hidden_layers_are_not_in_memory(widths):
    """A program reads the weights, and for its samples z; an example's samples share x."""
    k, b, latents, size = 100, 3, 7, 150
    x, z = torch.rand(b, size), torch.randn(k * b, latents)
    pairs = zip((latents, *widths), widths, strict=False)
    hidden = tuple(HiddenLayer(torch.randn(w, v), torch.randn(w), "tanh") for v, w in pairs)
    last = torch.randn(size, widths[-1])
    layers = SimpleNamespace(weights=(last,), biases=(torch.randn(size),), constants=(), hidden=hidden)
    (launch,) = run(lambda: chain.chain_log_prob(BERNOULLI, x, z, layers))
    programs = launch.grid[0]
    assert programs == 2 * b  # tiles of 64 samples
    assert set(launch.stores) == {"p_out"}
    assert set(launch.counts(launch.stores, "p_out").tolist()) == {1}
    assert launch.loaded("p_w0") == last.numel() * 4 * programs
    assert launch.loaded("p_x") == size * 4 * programs
    if len(widths) == 2:
        assert set(launch.counts(launch.loads, "p_h").tolist()) == {1}
    for i, layer in enumerate(hidden):
        # The first of two layers is computed in columns, for which the second one's are read once.
        assert launch.loaded(f"p_u{i}") == layer.weight.numel() * 4 * programs


def test_long_rows_are_split():
    """A few long rows keep many programs busy, each of which only writes a part of its row's sum."""
    k, b, x = 1, 2, 40_000
    logits, data = tensors(2, b, x)
    data = data.sigmoid()
    (launch,) = run(lambda: likelihood.log_prob(BERNOULLI, data, None, logits[None]))
    assert launch.grid[1] > 50 and launch.tensors["p_out"].shape == (launch.grid[1], k, b)
    assert_least(launch)
    (launch,) = run(lambda: normal_diagonal.rsample_kl(data, logits, None, None, SEED, Draw(1, *FREE), False))
    assert launch.grid[0] == b * launch.tensors["p_kl"].shape[0] > 60
    assert_least(launch)


def test_a_long_row_of_even_odds_is_split(enough):
    """A long row of even odds, which double a lane's product per pixel, is split before that overflows."""
    x = likelihood.MAX_TILES * common.TILE_X + 700
    tiles = common.event_tiles(1, 1, x, common.LAUNCH["likelihood"].tile, max_tiles=likelihood.MAX_TILES)
    assert tiles.x_splits == 2 and 4 * tiles.x_tiles < 127
    out = likelihood.log_prob(BERNOULLI, torch.full((1, x), 0.5), None, torch.zeros(1, 1, x))
    assert float(out) == pytest.approx(-x * math.log(2), rel=1e-6)


def test_log_mean_exp_reads_once(enough):
    for k, n in ((70, 5), (300, 33), (40, logsumexp.MANY_COLUMNS + 3)):
        (log_w,), (grad, maximum, total) = tensors(1, k, n), tensors(3, n)
        (launch,) = run(lambda: logsumexp.log_mean_exp(log_w))  # noqa: B023
        assert_least(launch)
        assert launch.bytes() == log_w.nbytes + 12 * n
        (launch,) = run(lambda: logsumexp.log_mean_exp_backward(grad, log_w, maximum, total))  # noqa: B023
        blocks = launch.grid[0] // triton.cdiv(n, logsumexp.tile(k, n)[1])
        assert_least(launch, {"p_grad": blocks, "p_maximum": blocks, "p_total": blocks})
        assert launch.bytes() == 2 * log_w.nbytes + 12 * n * blocks


def test_log_mean_exp_of_many_samples_is_split():
    """For few columns and many samples, a second launch merges two numbers per split."""
    k, n = 3000, 3
    (log_w,) = tensors(1, k, n)
    first, second = run(lambda: logsumexp.log_mean_exp(log_w))
    splits = first.tensors["p_maximum"].shape[0]
    assert 1 < splits <= k // logsumexp.MIN_SAMPLES and first.tensors["p_total"].shape == (splits, n)
    assert_least(first)
    assert_least(second)
    assert first.bytes() + second.bytes() == log_w.nbytes + 4 * (4 * splits * n + 3 * n)


def test_reduce_reads_once_for_the_sums_and_once_for_the_weights():
    k, b = 300, 5
    (likelihood, ratio), (kl, grad, grad_mean) = tensors(2, k, b), tensors(3, b)
    how = BoundReduction(1.0, "log_mean_exp", "none")
    (launch,) = run(lambda: reduce.reduce(likelihood, ratio, None, how, True))
    assert_least(launch, {"p_log_likelihood": 2, "p_term": 2})
    assert launch.bytes() == 5 * likelihood.nbytes + 8 * b
    (launch,) = run(lambda: reduce.reduce_backward(grad, None, likelihood, None, how, k, b, 2))
    blocks = launch.grid[0] // triton.cdiv(b, logsumexp.tile(k, b)[1])
    assert_least(launch, {"p_grad_bound": blocks})
    assert launch.bytes() == 3 * likelihood.nbytes + 4 * b * blocks
    # A mean stores no weights, and a KL is shared by all samples.
    how = BoundReduction(-1.0, "mean", "none")
    (launch,) = run(lambda: reduce.reduce(likelihood, kl, None, how, True))
    assert_least(launch, {"p_term": k})
    assert launch.stores.keys() == {"p_bound", "p_mean"}
    (launch,) = run(lambda: reduce.reduce_backward(grad, grad_mean, None, None, how, k, b, 1))
    assert_least(launch, {"p_grad_bound": blocks, "p_grad_mean": blocks})
    assert launch.stores.keys() == {"p_grad", "p_grad_kl"}


@pytest.mark.parametrize("over, reads", [("log_mean_exp", 2), ("mean", 1)])
def test_a_row_in_parts_is_summed_by_the_reduction(over, reads):
    """Parts are read as often as rows are, and no other launch adds them."""
    k, b, size = 2, 3, 2500
    x, logits, term = torch.rand(b, size), torch.randn(k, b, size), torch.randn(k, b)
    (rows,) = run(lambda: likelihood.log_prob(DECLARED["bernoulli"], x, None, logits, in_parts=True))
    parts = rows.tensors["p_out"].shape[0]
    assert rows.tensors["p_out"].shape == (parts, k, b) and parts > 1
    how, in_parts = BoundReduction(1.0, over, "mean"), torch.randn(parts, k, b)
    (launch,) = run(lambda: reduce.reduce(in_parts, term, None, how, False))
    assert_least(launch, {"p_log_likelihood": reads, "p_term": reads})


@pytest.mark.parametrize("k, b", [(3, 50), (60, 300)])
def test_the_bound_of_a_batch_is_summed_where_it_is_computed(k, b):
    """A small batch by one program; a large one leaves a sum for each program."""
    (likelihood, ratio), how = tensors(2, k, b), BoundReduction(1.0, "log_mean_exp", "mean")
    (launch,) = run(lambda: reduce.reduce(likelihood, ratio, None, how, False))
    assert_least(launch, {"p_log_likelihood": 2, "p_term": 2})
    programs = launch.grid[0]
    assert (programs == 1) == (k * b <= reduce.BATCH_SIZE)
    assert launch.bytes() == 5 * likelihood.nbytes + 4 * programs


@pytest.mark.parametrize("weighted", [False, True])
def test_the_gradient_of_a_bound_is_one_launch(weighted):
    """It reads what the likelihood's gradient reads, weights in place of the rows' gradients."""
    k, b, size = 5, 7, 96
    logits, x, mean = *tensors(1, k, b, size), *tensors(1, b, size), *tensors(1)
    (weights,) = tensors(1, k, b)
    how = BoundReduction(-1.0, "log_mean_exp" if weighted else "mean", "mean")
    upstream = mean, None, weights if weighted else None
    axes = 2 if weighted else 1
    (launch,) = run(
        lambda: likelihood.bound_backward(
            DECLARED["bernoulli"], upstream, x, None, [logits], None, how, [False, True], axes
        )
    )
    assert launch.kernel == "log_prob_flat_backward_kernel"
    for name in ("p_grad_p0", "p_grad_term" if weighted else "p_grad_kl"):
        assert (launch.counts(launch.stores, name) == 1).all(), name
    assert (launch.counts(launch.loads, "p_p0") == 1).all()


@triton.jit
def reads_twice(p_x, p_y, N, BLOCK: tl.constexpr):
    """Kernel that the checker must flag: a mean, then the difference from it, each from memory."""
    o_x = tl.arange(0, BLOCK)
    b_mean = tl.sum(tl.load(p_x + o_x, mask=o_x < N, other=0.0)) / N
    tl.store(p_y + o_x, tl.load(p_x + o_x, mask=o_x < N, other=0.0) - b_mean, mask=o_x < N)


@triton.jit
def writes_twice(p_x, p_y, N, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_y + o_x, tl.load(p_x + o_x, mask=o_x < N), mask=o_x < N)
    tl.store(p_y + o_x // 2, 0.0, mask=o_x < 1)


@triton.jit
def reads_beyond(p_x, p_y, N, BLOCK: tl.constexpr):
    o_x = tl.arange(0, BLOCK)
    tl.store(p_y + o_x, tl.load(p_x + o_x), mask=o_x < N)


@pytest.mark.parametrize(
    "kernel, message",
    [
        (reads_twice, "p_x must be read 1 times, and is read 2 to 2 times"),
        (writes_twice, "p_y must be written once, and is written 1 to 2 times"),
        (reads_beyond, "reads_beyond reaches beyond its arguments"),
    ],
)
def test_planted_inefficiencies_are_flagged(kernel, message):
    (x, y) = tensors(2, 13)
    with pytest.raises(AssertionError, match=message), recorded() as launches:
        kernel[(1,)](x, y, 13, BLOCK=16)
        assert_least(launches[0])


def test_a_copy_is_flagged():
    x = torch.rand(5, 7)
    with pytest.raises(AssertionError, match="clone"):
        run(lambda: likelihood.log_prob(BERNOULLI, x, None, x.clone()[None]))


def _often(rows: int, block: int, dims: int, each: int) -> torch.Tensor:
    """Return how often scores read z [rows, dims]: lanes beyond the last row repeat it."""
    often = torch.full((rows, dims), each)
    often[-1] *= 1 + triton.cdiv(rows, block) * block - rows
    return often.flatten()


# Rows, components, dimensions and the size of the data set, 0 without strata: components in one tile and in
# several, also split over programs, more rows than a program takes, and dimensions of two programs.
AGGREGATES = [(30, 15, 5, 0), (9, 300, 3, 0), (2, 1030, 2, 0), (70, 70, 20, 300), (3, 2, 70, 0)]


@pytest.mark.parametrize("n, u, d, size", AGGREGATES)
def test_an_aggregate_stores_nothing_of_all_triples(n, u, d, size):
    """The marginals' [N, U, D] are never in memory; the backward pass alone stores [N, U], of all dimensions.

    Tiles of scores read z once for each block of components, and components once for each block of rows. The
    marginals read z once, and components twice, for the maxima and for the sums.
    """
    (mu, logvar), (z,) = pair(u, d, torch.float32, True), tensors(1, n, d)
    block_n, block_u, _ = tile_of(n, u, torch.float32, THREAD // 2)
    blocks, tiles = triton.cdiv(n, block_n), triton.cdiv(u, block_u)
    with recorded() as launches:
        whole, marginals = aggregate.aggregate_log_prob(z, mu, logvar, size)
    prepared, scores, each = launches[:3]
    for merging in launches[3:]:  # of the maxima and sums of splits
        assert_least(merging)
    assert_least(prepared)
    components = {"p_mean": blocks, "p_inverse": blocks, "p_constant": blocks}
    z_often = _often(n, block_n, d, tiles)
    assert scores.counts(scores.loads, "p_z").tolist() == z_often.tolist()
    assert_least(scores, components, unlike=("p_z",))
    padded = prepared.tensors["p_mean"].shape[1]
    assert padded == tiles * block_u
    parts = sum(t.numel() for name, t in scores.tensors.items() if name in scores.stores)
    read = int(z_often.sum()) + blocks * (2 * d * padded + u)
    assert scores.bytes() == 4 * (read + parts)
    row_blocks = each.grid[0]
    assert_least(each, dict.fromkeys(("p_mu", "p_logvar", "p_scale"), 2 * row_blocks))
    assert each.bytes() == 4 * (2 * n * d + 2 * row_blocks * 3 * u * d)
    assert max(t.numel() for launch in launches for t in launch.tensors.values()) <= max(n, padded) * d

    grad, grad_each = torch.randn(n), torch.randn(n, d)
    with recorded() as launches:
        aggregate.aggregate_log_prob_backward(
            grad, grad_each, whole, marginals, z, mu, logvar, size, [True] * 3
        )
    found = {launch.kernel: launch for launch in launches}
    shares, rows = found["aggregate_shares_kernel"], found["aggregate_rows_kernel"]
    of_components = found["aggregate_components_kernel"]
    assert shares.counts(shares.loads, "p_z").tolist() == z_often.tolist()
    assert_least(shares, {**components, "p_grad": tiles, "p_log_q": tiles}, unlike=("p_z",))
    read = int(z_often.sum()) + 2 * tiles * n + blocks * (2 * d * padded + u)
    assert shares.bytes() == 4 * (read + n * padded)
    # Every other number is read once, for each program along an axis that it does not have.
    wide = rows.grid[1]
    splits = rows.tensors["p_out"].numel() // (n * d)
    row_blocks = rows.grid[0] // splits
    again = dict.fromkeys(("p_mu", "p_logvar", "p_scale"), row_blocks)
    again |= dict.fromkeys(("p_grad", "p_log_q", "p_z"), splits)
    assert_least(rows, again, unlike=("p_share",))
    assert rows.bytes() == 4 * (wide * n * u + splits * 3 * n * d + row_blocks * 3 * u * d + splits * n * d)
    splits = of_components.tensors["p_grad_mu"].numel() // (u * d)
    blocks = of_components.grid[0] // splits
    again = dict.fromkeys(("p_mu", "p_logvar"), splits)
    again |= dict.fromkeys(("p_grad", "p_log_q", "p_z"), blocks)
    assert_least(of_components, again, unlike=("p_share",))
    assert of_components.bytes() == 4 * (
        wide * n * u + blocks * 3 * n * d + splits * 2 * u * d + splits * 2 * u * d
    )
    for launch in (rows, of_components):
        often = launch.counts(launch.loads, "p_share").reshape(n, padded)
        assert (often[:, :u] == wide).all() and not often[:, u:].any()
