"""VectorQuantizer: nearest codes, the paper's formulas, moving averages, and training."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import distributed, nn

import fastvae
from fastvae.ops.codebook import nearest_code
from fastvae.quantize import VectorQuantizer
from fastvae.reference import codebook as tiles

from .conftest import DEVICE
from .models import randn

pytestmark = pytest.mark.usefixtures("one_thread")

B, D, U, SPATIAL = 5, 3, 7, (2, 4)


def quantizer(codes=U, dim=D, *, seed=1, dtype=torch.float64, **options):
    vq = VectorQuantizer(codes, dim, dtype=dtype, device=DEVICE, **options)
    with torch.no_grad():
        vq.codebook.copy_(randn(codes, dim, seed=seed, dtype=torch.float64))
    return vq


def encoded(*spatial, batch=B, dim=D, seed=2, dtype=torch.float64):
    return randn(batch, dim, *spatial, seed=seed, dtype=dtype).requires_grad_()


def brute(z, codebook):
    """Compute squared distances [N, U] in float64, by differences."""
    return (z.double()[:, None] - codebook.double()).square().sum(2)


def assert_nearest(z, codebook, index):
    """Assert that the codes found are nearest, up to the roundings of the scores."""
    distance = brute(z, codebook)
    found = distance.gather(1, index[:, None])[:, 0]
    centre = codebook.double().mean(0)
    e, rows = (codebook - centre).norm(dim=1), (z - centre).norm(dim=1)
    # A score's roundings: 2 from centring, D from a sum, 2 more. Two scores, each half a squared distance.
    u = torch.finfo(z.dtype).eps / 2
    bound = 4 * (z.shape[1] + 4) * u * (0.5 * e.amax() ** 2 + rows.double() * e.amax())
    assert bool((found <= distance.amin(1) + bound).all())
    return float((index == distance.argmin(1)).double().mean())


# Nearest codes.


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("n, codes, dim", [(1, 1, 1), (0, 5, 2), (37, 11, 5), (1000, 300, 64), (70, 5, 3)])
def test_nearest(n, codes, dim, offset, backend, monkeypatch):
    """The nearest code is found in tiles with a remainder, and for norms large against the distances."""
    monkeypatch.setattr(tiles, "NUMBERS_ON_CPU", 600)
    z, codebook = (randn(m, dim, seed=s) + offset for m, s in ((n, 3), (codes, 4)))
    index = nearest_code(z, codebook)
    assert index.dtype == torch.int64 and index.shape == (n,)
    if n:
        # Only the inputs are rounded, not the distances.
        assert assert_nearest(z, codebook, index) > 0.99


def test_two_clusters_far_apart():
    """Two distant clusters, for which centring does not help, stay within the bound of these norms."""
    codebook = torch.cat([randn(20, 4, seed=5), randn(20, 4, seed=6) + 1e3])
    z = torch.cat([randn(30, 4, seed=7), randn(30, 4, seed=8) + 1e3])
    index = nearest_code(z, codebook)
    assert_nearest(z, codebook, index)
    assert torch.equal(index >= 20, torch.arange(60, device=z.device) >= 30)


def test_ties_go_to_the_first_code():
    codebook = torch.tensor([[1.0], [-1.0], [1.0]], device=DEVICE)
    assert nearest_code(torch.tensor([[0.0], [2.0], [-3.0]], device=DEVICE), codebook).tolist() == [0, 0, 1]


def test_no_matrix_of_all_distances(monkeypatch):
    """The largest tensor allocated has the size of a tile."""
    made = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda self, *shape, **kw: made.append(math.prod(shape)) or new_empty(self, *shape, **kw),
    )
    monkeypatch.setattr(tiles, "NUMBERS_ON_CPU", 1 << 12)
    monkeypatch.setattr(tiles, "NUMBERS_ELSEWHERE", 1 << 12)
    tiles.nearest_code(randn(1000, 4, seed=9), randn(64, 4, seed=10))
    assert max(made) == 1 << 12


# The paper's formulas.


@pytest.mark.parametrize("spatial", [(), (6,), SPATIAL])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_values_and_gradients_of_the_formula(decay, spatial):
    """Values and gradients equal eq. 3 by autograd, with example weights and any upstream gradient of z_q."""
    vq, z_e = quantizer(commitment=0.3, decay=decay).train(), encoded(*spatial)
    codebook = vq.codebook.detach().clone().requires_grad_(decay is None)
    z_q, loss, indices = vq(z_e)

    rows = z_e.movedim(1, -1)  # [B, *spatial, D]
    k = (rows[..., None, :] - codebook).square().sum(-1).argmin(-1)
    e = codebook[k]
    squares = 0.3 * (rows - e.detach()).square().sum(-1)
    if decay is None:
        squares = squares + (rows.detach() - e).square().sum(-1)
    expected = squares.reshape(B, -1).mean(1)

    assert torch.equal(indices, k) and indices.shape == (B, *spatial)
    assert torch.equal(z_q, e.detach().movedim(-1, 1))  # exactly the codes
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=1e-13)
    weight, upstream = randn(B, seed=11, dtype=torch.float64), randn(*z_e.shape, seed=12, dtype=torch.float64)
    leaves = [z_e] + ([vq.codebook] if decay is None else [])
    grads = torch.autograd.grad((weight * loss).sum() + (upstream * z_q).sum(), leaves)
    leaves = [z_e] + ([codebook] if decay is None else [])
    # Straight through: z_q's gradient is added to z_e's unchanged.
    wanted = torch.autograd.grad((weight * expected).sum() + (upstream * z_e).sum(), leaves)
    for actual, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-12, atol=1e-13)


def test_the_reconstruction_does_not_move_the_codebook():
    vq, z_e = quantizer(decay=None), encoded(*SPATIAL)
    z_q = vq(z_e).z_q
    (grad,) = torch.autograd.grad(z_q.square().sum(), [vq.codebook], allow_unused=True)
    assert grad is None


def test_moving_averages_equal_the_paper():
    """Moving averages equal the paper's sums m and counts N, over batches of several sizes."""
    vq = quantizer(decay=0.7).train()
    start = vq.codebook.clone()
    size = torch.zeros(U, dtype=torch.float64, device=DEVICE)
    sums = torch.zeros(U, D, dtype=torch.float64, device=DEVICE)
    for step, batch in enumerate((3, 1, 8, 2)):
        z_e = encoded(*SPATIAL, batch=batch, seed=20 + step)
        before = vq.codebook.clone()
        z_q, _, indices = vq(z_e)
        assert torch.equal(z_q.detach().movedim(1, -1), before[indices])
        one_hot = nn.functional.one_hot(indices.flatten(), U).double()
        size = 0.7 * size + 0.3 * one_hot.sum(0)
        sums = 0.7 * sums + 0.3 * one_hot.T @ z_e.detach().movedim(1, -1).reshape(-1, D)
        torch.testing.assert_close(vq.cluster_size, size, rtol=1e-13, atol=0)
        used = size > 0
        torch.testing.assert_close(vq.codebook[used], sums[used] / size[used, None], rtol=1e-11, atol=1e-13)
        assert torch.equal(vq.codebook[~used], start[~used])
    assert bool(used.any())


def test_moving_averages_far_from_the_origin():
    """A code far from the origin follows its positions to float32's precision; no sums of 1e6 cancel."""
    vq = quantizer(2, 4, dtype=torch.float32, decay=0.99).train()
    center = torch.tensor([1e3, -1e3], device=DEVICE)[:, None].expand(2, 4)
    with torch.no_grad():
        vq.codebook.copy_(center + 1)
    z_e = torch.cat([randn(500, 4, seed=30), randn(500, 4, seed=31)]) * 0.01 + center.repeat_interleave(
        500, 0
    )
    for _ in range(3):
        vq(z_e)
    exact = z_e.double().reshape(2, 500, 4).mean(1)
    # An ulp of 1000 per step.
    torch.testing.assert_close(vq.codebook.double(), exact, rtol=0, atol=3 * 2**-14)


def test_unused_codes_stay_unchanged():
    """Unused codes stay: after enough steps for 0.5^t to underflow, nothing is NaN, and a code may return."""
    vq = quantizer(2, 1, dtype=torch.float32, decay=0.5).train()
    with torch.no_grad():
        vq.codebook.copy_(torch.tensor([[0.0], [10.0]]))
    vq(torch.full((4, 1), 9.0, device=DEVICE))
    for _ in range(200):
        vq(torch.full((4, 1), 1.0, device=DEVICE))
    assert vq.codebook.flatten().tolist() == [1.0, 9.0] and float(vq.cluster_size[1]) == 0
    vq(torch.full((4, 1), 8.0, device=DEVICE))
    assert vq.codebook.flatten().tolist() == [1.0, 8.0]


@pytest.mark.parametrize("how", ["eval", "no_grad", "encode", "inference"])
def test_the_codebook_is_fixed_outside_of_training(how):
    vq, z_e = quantizer(restart=1), encoded(*SPATIAL)
    before = copy.deepcopy(vq.state_dict())
    if how == "encode":
        indices = vq.encode(z_e)
    else:
        vq.train(how != "eval")
        modes = {"no_grad": torch.no_grad, "inference": torch.inference_mode}
        with modes.get(how, torch.enable_grad)():
            indices = vq(z_e).indices
    assert all(torch.equal(v, before[k]) for k, v in vq.state_dict().items())
    assert torch.equal(indices, vq.eval()(z_e).indices)


def test_state_dict():
    vq = quantizer(decay=0.9, restart=5).train()
    vq(encoded(*SPATIAL))
    assert set(vq.state_dict()) == {"codebook", "cluster_size", "unused"}
    other = VectorQuantizer(U, D, restart=5, dtype=torch.float64, device=DEVICE).train()
    other.decay = 0.9
    other.load_state_dict(vq.state_dict())
    z_e = encoded(*SPATIAL, seed=41)
    torch.manual_seed(0)
    vq(z_e)
    torch.manual_seed(0)
    other(z_e)
    assert torch.equal(vq.codebook, other.codebook)
    assert list(dict(quantizer(decay=None).named_parameters())) == ["codebook"]
    assert set(quantizer(decay=None).state_dict()) == {"codebook"} and not list(vq.parameters())


@pytest.mark.parametrize("decay", [0.9, None])
def test_restart(decay):
    """Codes start as positions of the first batch; codes unused for ``restart`` steps are redrawn."""
    vq = quantizer(4, 2, decay=decay, restart=3).train()
    with torch.no_grad():
        vq.codebook.fill_(1e6)
    z_e = encoded(dim=2, batch=50)
    found = []
    for _ in range(2):
        again = copy.deepcopy(vq)
        torch.manual_seed(3)
        z_q = again(z_e).z_q
        found.append(z_q)
    assert torch.equal(*found)  # given the seed
    assert all(bool((z_e == row).all(1).any()) for row in z_q)
    vq = again
    assert len(vq(z_e).indices.unique()) == 4  # from a batch of distinct rows
    near = vq.codebook.detach()[0].clone()
    rows = near + 0.001 * randn(6, 2, seed=44, dtype=torch.float64)
    for _ in range(3):
        before = vq.codebook.detach().clone()
        vq(rows)
        assert torch.equal(vq.codebook[1:], before[1:])
    assert vq.unused.tolist() == [0, 3, 3, 3]
    indices = vq(rows).indices
    assert bool(((vq.codebook - near).norm(dim=1) < 0.1).all())
    if decay is not None:
        # The previous codes have zero weight.
        used = indices.unique()
        count = torch.bincount(indices, minlength=4)[used]
        anew = used > 0
        assert bool(anew.any())
        torch.testing.assert_close(vq.cluster_size[used][anew], 0.1 * count[anew].double())
    assert vq.perplexity(vq.encode(rows)) > 1


def test_restart_with_an_empty_batch():
    vq = quantizer(restart=1).train()
    before = vq.codebook.clone()
    vq(encoded(*SPATIAL, batch=0))
    assert torch.equal(vq.codebook, before) and vq.unused.tolist() == [2] * U


# Uses of indices.


def test_prior_decode_and_usage():
    vq = quantizer(dtype=torch.float32)
    indices = vq.encode(encoded(*SPATIAL, dtype=torch.float32))
    assert torch.equal(vq.decode(indices), vq.codebook[indices].movedim(-1, 1))
    assert torch.equal(vq.decode(indices), vq.eval()(encoded(*SPATIAL, dtype=torch.float32)).z_q)
    nats = vq.log_prob(indices)
    torch.testing.assert_close(nats, torch.full((B,), -8 * math.log(U), device=DEVICE))
    torch.testing.assert_close(vq.bits(indices), torch.full((B,), 8 * math.log2(U), device=DEVICE))
    shared, each = randn(U, seed=50), randn(B, U, *SPATIAL, seed=51)
    exact = -nn.functional.cross_entropy(each.double(), indices, reduction="none").flatten(1).sum(1)
    torch.testing.assert_close(vq.log_prob(indices, each).double(), exact, rtol=1e-5, atol=1e-5)
    exact = torch.log_softmax(shared.double(), 0)[indices].flatten(1).sum(1)
    torch.testing.assert_close(vq.log_prob(indices, shared).double(), exact, rtol=1e-5, atol=1e-5)
    zero = torch.zeros(U, device=DEVICE)
    torch.testing.assert_close(vq.log_prob(indices, zero), nats)
    p = torch.bincount(indices.flatten(), minlength=U) / indices.numel()
    exact = torch.distributions.Categorical(p).entropy().exp()
    torch.testing.assert_close(vq.perplexity(indices), exact)
    assert float(vq.perplexity(torch.arange(U, device=DEVICE))) == pytest.approx(U)
    assert float(vq.perplexity(torch.ones(9, dtype=torch.int32, device=DEVICE))) == 1
    assert bool(vq.perplexity(indices[:0]).isnan())


def test_the_bound_is_below_log_px():
    """log p(x|z_q) + log p(k) <= log p(x), a sum for one position and few codes."""
    vq = quantizer(decay=None)
    x = randn(B, D, seed=53, dtype=torch.float64)
    log_px_z = fastvae.ops.gaussian_log_prob(
        x,
        vq.codebook.detach()[:, None].expand(U, B, D).contiguous(),
        torch.zeros(D, dtype=x.dtype).to(DEVICE),
    )
    log_px = torch.logsumexp(log_px_z - math.log(U), 0)
    indices = vq.encode(x)
    bound = log_px_z.gather(0, indices[None])[0] + vq.log_prob(indices)
    assert bool((bound < log_px).all()) and bool((bound > log_px - math.log(U)).all())


def test_sample():
    vq = quantizer()
    generator = torch.Generator(DEVICE).manual_seed(0)
    indices = vq.sample(1000, SPATIAL, generator=generator)
    assert indices.shape == (1000, *SPATIAL) and indices.dtype == torch.int64
    count = torch.bincount(indices.flatten(), minlength=U).double()
    chi2 = float(((count - 8000 / U).square() / (8000 / U)).sum())
    assert len(count) == U and chi2 < 22.5  # 99.9 % of six degrees of freedom
    assert vq.decode(vq.sample(2, SPATIAL)).shape == (2, D, *SPATIAL) and vq.sample(4).shape == (4,)


# Dtypes, edges, errors.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    """Distances and loss are computed in float32 from a half-precision z_e, also under autocast."""
    vq, z_e = quantizer(dtype=torch.float32).train(), encoded(*SPATIAL, dtype=dtype)
    before, twin = vq.codebook.clone(), copy.deepcopy(vq)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        z_q, loss, indices = vq(z_e)
    wide = twin(z_e.float())
    assert z_q.dtype == dtype and loss.dtype == torch.float32
    assert torch.equal(indices, wide.indices) and torch.equal(loss, wide.loss)
    assert torch.equal(z_q, before[indices].movedim(-1, 1).to(dtype))
    assert torch.equal(vq.codebook, twin.codebook)
    (grad,) = torch.autograd.grad(loss.sum() + z_q.float().sum(), [z_e])
    assert grad.dtype == dtype


def test_autocast_leaves_float32_distances():
    vq, z_e = quantizer(200, 16, dtype=torch.float32).eval(), encoded(dim=16, batch=500, dtype=torch.float32)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert torch.equal(vq.encode(z_e), vq.encode(z_e.float())) and torch.equal(
            vq(z_e).indices, brute(z_e, vq.codebook).argmin(1)
        )


def test_a_wide_encoder_on_a_float32_codebook():
    vq, z_e = quantizer(dtype=torch.float32).train(), encoded(*SPATIAL)
    z_q, loss, _ = vq(z_e)
    assert z_q.dtype == loss.dtype == torch.float64 and vq.codebook.dtype == torch.float32


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("shape", [(0, D), (0, D, 4), (2, D, 0)])
def test_empty(decay, shape):
    vq = quantizer(decay=decay, restart=2).train()
    before = vq.codebook.detach().clone()
    z_e = torch.zeros(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    z_q, loss, indices = vq(z_e)
    assert z_q.shape == shape and indices.shape == (shape[0], *shape[2:])
    assert loss.tolist() == [0.0] * shape[0] and torch.equal(vq.codebook, before)
    (loss.sum() + z_q.sum()).backward()
    assert z_e.grad.shape == shape and vq.decode(indices).shape == shape
    assert (
        vq.log_prob(indices).tolist() == vq.log_prob(indices, before.new_zeros(U)).tolist() == loss.tolist()
    )


def test_nan_and_infinity_propagate():
    vq, z_e = quantizer().eval(), encoded(*SPATIAL).detach()
    z_e[1, 0, 1, 2], z_e[2, 1, 0, 0] = math.nan, math.inf
    z_q, loss, _ = vq(z_e)
    assert z_q.isnan().nonzero().tolist() == [[1, 0, 1, 2], [2, 1, 0, 0]]
    assert (~loss.isfinite()).nonzero().flatten().tolist() == [1, 2]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"codes": 0}, ValueError, "codes must be at least 1, the number of codes; got 0"),
        ({"codes": 2.0}, TypeError, "codes must be an int"),
        ({"dim": -1}, ValueError, "dim must be at least 1"),
        ({"commitment": -0.1}, ValueError, "commitment must be finite and at least 0"),
        ({"decay": 1.0}, ValueError, "decay must lie between 0 and 1.*decay=None"),
        ({"decay": 0}, ValueError, "decay must lie between 0 and 1"),
        ({"decay": "0.9"}, TypeError, "decay must be a number"),
        ({"restart": 0}, ValueError, "restart must be at least 1"),
        ({"dtype": torch.int32}, TypeError, "dtype must be that of floating-point numbers.*int32"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        VectorQuantizer(**{"codes": U, "dim": D, **arguments})


@pytest.mark.parametrize(
    "z_e, error, message",
    [
        ([1.0], TypeError, "z_e must be a tensor"),
        (torch.zeros(B, D, dtype=torch.int64), TypeError, "z_e has dtype torch.int64"),
        (torch.zeros(D), ValueError, r"z_e has shape \[3\]; expected \[B, D, \*spatial\] with D = dim = 3"),
        (torch.zeros(B, 4), ValueError, r"z_e has shape \[5, 4\].*axis 1 is that of the codes"),
        (torch.zeros(B, 2, 4, D), ValueError, r"z_e\.movedim\(-1, 1\)"),
        (torch.zeros(B, D, device="meta"), ValueError, "z_e is on meta but the codebook is on"),
    ],
)
def test_wrong_z_e(z_e, error, message):
    for call in (quantizer(), quantizer().encode):
        with pytest.raises(error, match=message):
            call(z_e)


def test_wrong_indices_and_logits():
    vq = quantizer()
    whole = torch.zeros(B, 4, dtype=torch.int64, device=DEVICE)
    for call in (vq.decode, vq.log_prob, vq.bits, vq.perplexity):
        with pytest.raises(TypeError, match=r"indices must be an integer tensor .*got torch\.float32"):
            call(whole.float())
        with pytest.raises(ValueError, match=r"indices has shape \[\]"):
            call(whole[0, 0])
        if DEVICE.type == "cpu":
            with pytest.raises(ValueError, match="indices has 7; a codebook of 7 codes has 0 … 6"):
                call(whole + U)
            with pytest.raises(ValueError, match="indices has -1"):
                call(whole - 1)
    with pytest.raises(ValueError, match=r"logits has shape \[5, 4, 7\]; expected .*\[5, 7, 4\]"):
        vq.log_prob(whole, torch.zeros(B, 4, U, device=DEVICE))
    with pytest.raises(ValueError, match="n must be at least 1"):
        vq.sample(0)


def test_moving_averages_in_half_precision_are_refused():
    vq, z_e = quantizer(dtype=torch.float32).bfloat16(), encoded(dtype=torch.bfloat16)
    with pytest.raises(TypeError, match=r"codebook has dtype torch.bfloat16, .*vq\.float\(\)"):
        vq.train()(z_e)
    vq.eval()(z_e)
    quantizer(dtype=torch.float32, decay=None).bfloat16()(z_e)


# torch.


@pytest.mark.parametrize("options", [{}, {"decay": None}, {"restart": 2}])
def test_compiled(options):
    """Compiled in one graph, values, gradients and codes equal eager mode's over several steps."""
    eager = quantizer(dtype=torch.float32, **options).train()
    twin = copy.deepcopy(eager)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    for step in range(3):
        z_e = encoded(*SPATIAL, dtype=torch.float32, seed=60 + step)
        results = []
        for vq in (eager, compiled):
            torch.manual_seed(step)
            z_q, loss, indices = vq(z_e)
            leaves = [z_e, *vq.parameters()]
            results += [(z_q, loss, indices, *torch.autograd.grad(loss.sum() + z_q.square().sum(), leaves))]
        for actual, expected in zip(*results, strict=True):
            assert torch.equal(actual, expected)
        for name, value in eager.state_dict().items():
            assert torch.equal(twin.state_dict()[name], value)


def test_compiled_with_any_batch():
    vq = quantizer(dtype=torch.float32).eval()
    compiled = torch.compile(vq, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (3, 5, 8):
        z_e = encoded(*SPATIAL, batch=batch, dtype=torch.float32)
        assert torch.equal(compiled(z_e).z_q, vq(z_e).z_q)


def test_functional_gradient():
    vq, z_e = quantizer(decay=None).eval(), encoded(*SPATIAL)

    def loss(codebook, z_e):
        z_q, loss, _ = torch.func.functional_call(vq, {"codebook": codebook}, (z_e,))
        return loss.sum() + z_q.square().sum()

    grads = torch.func.grad(loss, argnums=(0, 1))(vq.codebook.detach(), z_e.detach())
    expected = torch.autograd.grad(loss(vq.codebook, z_e), [vq.codebook, z_e])
    for actual, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def _train_one_rank(rank: int, ranks: int, store: str) -> None:
    """Assert that codes of ranks that share a batch equal those of one process with the whole batch."""
    torch.set_num_threads(1)
    batches = [torch.randn(9, D, 4, generator=torch.Generator().manual_seed(s)).double() for s in range(4)]
    for options in ({"decay": 0.8}, {"decay": 0.8, "restart": 2}, {"decay": None, "restart": 2}):
        torch.manual_seed(0)
        alone = VectorQuantizer(U, D, dtype=torch.float64, **options)
        shared = copy.deepcopy(alone)
        restarts = "restart" in options
        if not restarts:
            for batch in batches:
                alone(batch)
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
        try:
            torch.manual_seed(rank)
            # Uneven parts, one of them empty.
            for cut, batch in zip((4, 2, 9, 5), batches, strict=True):
                shared(batch[:cut] if rank == 0 else batch[cut:])
            if not restarts:
                torch.testing.assert_close(shared.codebook, alone.codebook, rtol=1e-12, atol=1e-12)
                torch.testing.assert_close(shared.cluster_size, alone.cluster_size, rtol=1e-12, atol=0)
            every = [torch.empty_like(shared.codebook) for _ in range(ranks)]
            distributed.all_gather(every, shared.codebook.detach())
            assert torch.equal(*every)
            distributed.barrier()
        finally:
            distributed.destroy_process_group()
        store += "+"


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_ranks(tmp_path):
    torch.multiprocessing.spawn(_train_one_rank, args=(2, str(tmp_path / "store")), nprocs=2)


# A model.


class VQVAE(nn.Module):
    """VQ-VAE of 64 pixels and 4 positions."""

    def __init__(self, **options):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Unflatten(1, (8, 4)))
        self.vq = VectorQuantizer(codes=32, dim=8, **options)
        self.decoder = nn.Sequential(nn.Flatten(), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64))

    def forward(self, x):
        """Return log p(x|z_q) [B], the quantizer's loss [B] and the indices."""
        z_q, loss, indices = self.vq(self.encoder(x))
        return fastvae.ops.bernoulli_log_prob(x, self.decoder(z_q)), loss, indices

    @torch.no_grad()
    def bound(self, x):
        """Return a lower bound on log p(x) [B]."""
        log_px, _, indices = self(x)
        return log_px + self.vq.log_prob(indices)

    @torch.no_grad()
    def sample(self, n):
        """Return the means of p(x|z) for n draws from the uniform prior."""
        return self.decoder(self.vq.decode(self.vq.sample(n, (4,)))).sigmoid()


@pytest.fixture
def one_thread():
    """Use one thread: on a busy machine two wait for each other far longer than these small ops take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("options", [{"decay": None}, {"decay": 0.95, "restart": 20}], ids=["loss", "ema"])
def test_a_vqvae_learns_digits(options, one_thread):
    data = pytest.importorskip("sklearn.datasets").load_digits().data
    x = torch.tensor(data / 16, dtype=torch.float32, device=DEVICE)
    torch.manual_seed(0)
    model = VQVAE(**options).to(DEVICE)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = float(model.eval().bound(x).mean())
    model.train()
    for _ in range(300):
        log_px, loss, _ = model(x[torch.randint(len(x), (128,), device=DEVICE)])
        optimizer.zero_grad()
        (-log_px + loss).mean().backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        log_px, _, indices = model(x)
    logits = x.mean(0).clamp(1e-6, 1 - 1e-6).logit()
    blind = float(fastvae.ops.bernoulli_log_prob(x, logits.expand(x.shape)).mean())
    log_px, bound, perplexity = (
        float(log_px.mean()),
        float(model.bound(x).mean()),
        model.vq.perplexity(indices),
    )
    print(before, blind, log_px, bound, float(perplexity))
    # The codes gain at least two nats over the pixels' means; soft pixels carry little information.
    assert log_px > blind + 2
    assert bound > before + 10
    assert perplexity > 4
    assert model.sample(3).shape == (3, 64)
