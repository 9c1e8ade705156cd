"""The host's work: launches, streams, threads, devices, graphs, errors. The card's kernels do nothing."""

from __future__ import annotations

import re
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

import fastvae
from benchmarks import frontend
from fastvae import likelihoods, ops
from fastvae.ops import normal_diagonal, reduce
from tools.fakecard import control

# Kernels launched by forward and backward of the benchmark's cases; each a bound from above.
LAUNCHES = {
    "elbo": (frontend.CASES[0], 6),
    "elbo of rows in parts": (frontend.CASES[2], 6),
    "iwae": (frontend.CASES[3], 6),
}
B, D, X, K = 5, 7, 11, 3


@pytest.fixture(autouse=True)
def card():
    """Let kernels do nothing."""


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Let memory be, as filling it is a launch too."""


def _inputs(device="cuda"):
    mu, logvar = (torch.zeros(B, D, device=device, requires_grad=True) for _ in range(2))
    return torch.zeros(B, X, device=device), mu, logvar, torch.zeros(X, D, device=device)


def _step(x, mu, logvar, weight):
    bound = fastvae.iwae(x, (mu, logvar), lambda z: z @ weight.T, k=K, likelihood="bernoulli")
    return torch.autograd.grad(bound, (mu, logvar))


def _kernels(found):
    """Return the names of Triton's kernels."""
    return [launch.name for launch in found if launch.kind == "driver"]


@pytest.fixture(scope="module")
def kernels():
    """Names of a step's kernels, which are compiled then."""
    _step(*_inputs())
    with control.launches() as found:
        _step(*_inputs())
    names = _kernels(found)
    assert len(names) == 4 and all(name.endswith("_kernel") for name in names)
    return names


# Launches


@pytest.mark.parametrize("case, most", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("likelihood", frontend.LIKELIHOODS)
def test_launches_of_an_objective(case, most, likelihood):
    """Forward and backward launch no more than this many; whoever needs fewer lowers the number."""
    inputs = frontend.make(case, likelihood, "cuda")
    run = frontend.implementations(case, likelihood, inputs, False)["fastvae"]
    for _ in range(2):
        run()
    with control.launches() as found:
        run()
    names = [launch.name for launch in found]
    assert len(names) <= most, names


def test_a_step_of_the_benchmark(kernels):
    step = frontend.steps((1, B, (X,), D), "cuda")["fastvae"]
    step()
    with control.launches() as found:
        step()
    assert "rsample_kl_kernel" in _kernels(found)
    assert sum(launch.kind == "library" for launch in found) >= 8  # products


def test_launches_of_estimates():
    """A small batch's statistics go to the CPU in one copy; the formulas would be hundreds of launches."""
    x, mu, logvar, weight = _inputs()

    @torch.no_grad()
    def run():
        return fastvae.log_marginal(x, (mu, logvar), lambda z: z @ weight.T, k=200, likelihood="bernoulli")

    run()
    with control.launches() as found:
        run()
    assert len(found) <= 80, len(found)


def test_a_repeated_call_allocates_no_memory_and_copies_nothing(kernels):
    inputs = _inputs()
    for _ in range(2):
        _step(*inputs)
    before = control.counts()
    _step(*inputs)
    since = control.counts().since(before)
    assert since.malloc == since.copy == since.set == 0 and since.driver == len(kernels)


@pytest.mark.parametrize("fused", [True, False])
def test_compiled_calls_launch_one_kind_of_kernels(kernels, fused, monkeypatch):
    """The compiler's, of formulas; for large tensors those of the ops."""
    if not fused:
        monkeypatch.setattr(normal_diagonal, "FEW_DRAWS", 0)
        monkeypatch.setattr(reduce, "FEW_ROWS", 0)
    torch._dynamo.reset()
    inputs = _inputs()
    compiled = torch.compile(
        lambda x, mu, logvar, weight: fastvae.iwae(
            x, (mu, logvar), lambda z: z @ weight.T, k=K, likelihood="bernoulli"
        )
    )

    def run():
        return torch.autograd.grad(compiled(*inputs), inputs[1:3])

    with torch._functorch.config.patch(enable_autograd_cache=False):
        for _ in range(2):
            run()
    with control.launches() as found:
        run()
    launched = _kernels(found)
    # In a graph the bound has a launch of its own, as its ops change no input.
    expected = [] if fused else [*kernels[:2], "reduce_kernel", *kernels[2:]]
    assert [n for n in launched if not n.startswith("triton_")] == expected
    assert launched


# Streams, threads and devices


def test_launches_go_to_the_current_stream(kernels):
    inputs = _inputs()
    streams = [torch.cuda.Stream() for _ in range(3)]
    for stream in streams:
        with torch.cuda.stream(stream), control.launches() as found:
            _step(*inputs)
        assert _kernels(found) == kernels
        assert {launch.stream for launch in found if launch.kind == "driver"} == {stream.cuda_stream}


def test_threads(kernels):
    """Threads launch at the same time, also as the first thing that they ask of CUDA."""
    errors, barrier = [], threading.Barrier(4)
    inputs = [_inputs() for _ in range(4)]

    def work(own):
        try:
            barrier.wait()
            for _ in range(10):
                _step(*own)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(own,)) for own in inputs]
    with control.launches() as found:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors
    assert sorted(_kernels(found)) == sorted(40 * kernels)


def test_two_devices(kernels):
    """Tensors are computed on their own device, whichever is current, in turns and in threads."""
    first, second = _inputs("cuda:0"), _inputs("cuda:1")
    for current in (0, 1):
        with torch.cuda.device(current), control.launches() as found:
            for inputs in (first, second, first):
                assert all(g.device == inputs[0].device for g in _step(*inputs))
        devices = [launch.device for launch in found if launch.kind == "driver"]
        assert devices == [0] * 4 + [1] * 4 + [0] * 4
        assert _kernels(found) == 3 * kernels
    assert torch.cuda.current_device() == 0


def test_shapes_and_layouts_in_turns():
    """Each shape, layout and alignment has its launch, also when they alternate."""
    wide = torch.zeros(2 * B, 2 * D, device="cuda")
    grids = []
    for _ in range(2):
        for mu, logvar in (
            (wide[:B, :D], wide[:B, D:]),
            (wide[B:, 1 : D + 1], wide[B:, :D]),
            (wide[:, :D], wide[:, D:]),
            (wide[:B, :D].contiguous(), wide[:B, :D].contiguous()),
        ):
            with control.launches() as found:
                fastvae.ops.rsample_kl(
                    mu, logvar, k=K, seed=torch.zeros((), dtype=torch.int64, device="cuda")
                )
            (launch,) = (launch for launch in found if launch.kind == "driver")
            grids.append((launch.function, launch.grid))
    assert grids[:4] == grids[4:]


# Graphs


def _training():
    model = nn.ModuleDict({"encoder": nn.Linear(X, 2 * D), "decoder": nn.Linear(D, X)}).to("cuda")
    optimizer = torch.optim.Adam(model.parameters(), capturable=True)

    def step(x):
        optimizer.zero_grad()
        loss = -fastvae.iwae(x, model["encoder"](x), model["decoder"], k=K, likelihood="bernoulli")
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def test_a_graph_is_one_launch(kernels):
    x = torch.zeros(B, X, device="cuda")
    graphed = fastvae.graphed(_training(), warmup=3)
    for _ in range(3):
        with control.launches() as found:
            graphed(x)
        assert _kernels(found) == kernels and not any(launch.captured for launch in found)
    with control.launches() as found:  # captured, and replayed once
        graphed(x)
    captured = [launch for launch in found if launch.captured]
    assert _kernels(captured) == kernels == _kernels(found)
    for shape in (B, B + 1, B):
        x = torch.zeros(shape, X, device="cuda")
        with control.launches() as found:
            graphed(x)
        kinds = [launch.kind for launch in found if launch.kind in ("driver", "graph")]
        assert kinds == (["graph"] if shape == B else ["driver"] * 4)


def _table(*columns, probs=False):
    likelihood = likelihoods.Columns(columns)

    def bound(mu, logvar):
        def decoder(z):
            output = z @ z.new_zeros(D, likelihood.width)
            return output.softmax(1) if probs else output

        x = mu.new_zeros(B, len(columns))
        mask = torch.ones_like(x, dtype=torch.bool)
        return fastvae.elbo(x, (mu, logvar), decoder, likelihood=likelihood, mask=mask)

    return bound


CAPTURED = {
    "scales of columns": _table(
        ("a", likelihoods.Gaussian(scale=0.1)), ("b", likelihoods.Gaussian(scale=0.2))
    ),
    "classes": _table(("a", "categorical", 3), ("b", "categorical", 2)),
    "probabilities": _table(
        ("a", likelihoods.Categorical(probs=True), 3),
        ("b", likelihoods.Categorical(probs=True), 2),
        probs=True,
    ),
    "all pairs": lambda mu, logvar: ops.all_pairs_log_prob(
        torch.zeros(B, D, device="cuda"), (mu, -1.5), likelihood="gaussian"
    ).mean(),
    "last layer": lambda mu, logvar: ops.linear_log_prob(
        torch.zeros(B, X, device="cuda"), mu, mu.new_zeros(X, D), None, -1.5, likelihood="gaussian"
    ).mean(),
}


@pytest.mark.parametrize("bound", CAPTURED.values(), ids=CAPTURED)
def test_numbers_need_no_copy_from_the_host(bound):
    """A copy would wait for the card, and no graph captures one."""
    mu, logvar = _inputs()[1:3]
    step = fastvae.graphed(lambda: torch.autograd.grad(bound(mu, logvar), mu), warmup=2)
    for _ in range(3):
        step()


READS = """
import torch
from tests.gpu_host import test_host

step = test_host._training()
graphed = test_host.fastvae.graphed(lambda x: step(x) * step(x).item(), warmup=1)
x = torch.zeros(test_host.B, test_host.X, device="cuda")
graphed(x)
graphed(x)
"""


def test_a_step_that_reads_from_the_card_is_not_captured():
    # In another process: torch 2.11 draws no random numbers after a capture that failed.
    run = subprocess.run([sys.executable, "-c", READS], capture_output=True, text=True)
    assert re.search(r"(?s)RuntimeError: fastvae.graphed: .*could not be captured.*\.item\(\)", run.stderr)


# Errors


def test_a_failed_launch_raises_and_the_next_call_works(kernels):
    inputs = _inputs()
    for skipped in range(len(kernels)):
        with control.failing("driver", 719, skipped), pytest.raises(RuntimeError, match="LaunchFailure"):
            _step(*inputs)
        with control.launches() as found:
            _step(*inputs)
        assert _kernels(found) == kernels


def test_memory_that_is_not_there():
    mu = torch.zeros(B, D, device="cuda")
    # The caching allocator tries again after it has freed what it can.
    with control.failing("malloc", 2, times=9), pytest.raises(torch.OutOfMemoryError):
        fastvae.random.normal(torch.zeros((), dtype=torch.int64, device="cuda"), 1, 4096, 4096)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(1 << 40, device="cuda")
    assert fastvae.ops.rsample_kl(mu, mu)[0].shape == mu.shape


# The fake card itself


def test_counts_and_records():
    x = torch.zeros(B, X, device="cuda")
    before = control.counts()
    with control.launches() as found:
        x + x
        torch.zeros(3, 4).to("cuda")
        x @ x.T
    since = control.counts().since(before)
    assert (since.runtime, since.library, since.copy, since.driver) == (1, 1, 1, 0)
    assert since.launches == len(found) == 2
    assert "elementwise" in found[0].name and found[1].kind == "library"
    assert found[0].grid[0] >= 1 and found[0].threads > 0 and not found[0].captured


def test_what_is_wrong_on_a_card_fails(kernels):
    """A function of another device, a thread without a context, addresses of no block."""
    with control.launches() as found:
        _step(*_inputs())
    function = next(launch.function for launch in found if launch.kind == "driver")
    launch = control.library().cuLaunchKernel
    parameters = (control.ctypes.c_void_p * 64)()
    one = [1] * 6

    def code():
        return launch(control.ctypes.c_void_p(function), *one, 0, None, parameters, None)

    codes = []
    thread = threading.Thread(target=lambda: codes.append(code()))
    thread.start()
    thread.join()
    assert codes == [201]  # CUDA_ERROR_INVALID_CONTEXT
    with torch.cuda.device(1):
        torch.zeros(1, device="cuda")
        assert code() == 400  # CUDA_ERROR_INVALID_HANDLE
    assert control.block(control.ctypes.addressof(parameters)) is None


def test_mistakes_are_named():
    with (
        pytest.raises(ValueError, match="kind is 'kernel'; expected one of 'runtime', 'driver'"),
        control.failing("kernel", 1),
    ):
        pass
    with (
        control.launches(),
        pytest.raises(RuntimeError, match="one block records at a time"),
        control.launches(),
    ):
        pass


def test_an_error_of_the_device_is_raised_by_the_block(kernels):
    def run(launch, parameters):
        assert len(parameters) == len(control.parameter_sizes(launch.function)) > 2
        raise KeyError(launch.name)

    with pytest.raises(KeyError, match=re.escape(kernels[0])), control.device(run):
        _step(*_inputs())


def test_microseconds_are_of_the_processor():
    """A call that waits takes none, and a longer one takes more."""
    done = threading.Event()
    waits = control.cpu_microseconds(lambda: done.wait(0.02), calls=1, blocks=3, warmup=0)
    works = control.cpu_microseconds(lambda: sum(range(10**6)), calls=1, blocks=3, warmup=0)
    assert 0 <= waits < works


def test_the_last_layer_is_fused_on_request_alone():
    """It saves memory; whether it saves time has not been measured."""
    x, layer = _inputs()[0], nn.Linear(D, X, device="cuda")

    def launched(decoder):
        vae = fastvae.VAE(nn.Linear(X, 2 * D, device="cuda"), decoder, likelihood="bernoulli")
        with control.launches() as found:
            vae.iwae(x, k=K)
        return "linear_log_prob_kernel" in _kernels(found)

    assert not launched(layer)
    assert launched(fastvae.FusedHead(nn.Identity(), layer))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"dtype": torch.float64}, False),
        ({"k": 20}, False),
        ({"widths": (300,)}, False),
        ({"widths": ()}, False),
        ({"likelihood": "negative_binomial"}, False),
        ({"gradients": True}, False),
        ({"mask": True}, False),
        ({"hook": True}, False),
        ({"request": True}, True),
        ({"fuse": False}, False),
    ],
)
def test_an_evaluation_takes_the_whole_decoder(change, expected, monkeypatch):
    """An evaluation in half precision takes one kernel where gradients are not needed."""
    given = {
        "dtype": torch.bfloat16,
        "k": 40,
        "widths": (20, 30),
        "likelihood": "bernoulli",
    }
    given |= {"gradients": False, "mask": False, "hook": False, "request": False, "fuse": True} | change
    monkeypatch.setattr(fastvae.ops.head, "FEWEST_CHAIN_ROWS", 0)
    monkeypatch.setattr(fastvae.vae, "FEWEST_NUMBERS", 0)
    sizes = (D, *given["widths"])
    count = 2 if given["likelihood"] == "negative_binomial" else 1
    layers = [m for v, w in zip(sizes, sizes[1:], strict=False) for m in (nn.Linear(v, w), nn.Tanh())]
    last = nn.Linear(sizes[-1], count * X)
    if given["hook"]:
        last.register_forward_hook(lambda module, inputs, output: None)
    split = [] if count == 1 else [Halves()]
    decoder = nn.Sequential(*layers, last, *split)
    if given["request"]:
        decoder = fastvae.FusedHead(nn.Sequential(*layers), last)
    decoder.to("cuda", given["dtype"])
    encoder = nn.Linear(X, 2 * D, device="cuda", dtype=given["dtype"])
    x = torch.zeros(B, X, device="cuda", dtype=given["dtype"])
    options = {"mask": torch.ones(B, X, dtype=torch.bool, device="cuda")} if given["mask"] else {}
    vae = fastvae.VAE(encoder, decoder, likelihood=given["likelihood"], fuse=given["fuse"])
    with torch.set_grad_enabled(given["gradients"]), control.launches() as found:
        vae.iwae(x, k=given["k"], **options)
    assert ("chain_log_prob_kernel" in _kernels(found)) == expected


class Halves(nn.Module):
    """Split of an output into two."""

    def forward(self, output):
        return output.chunk(2, 1)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_fused_last_layer_makes_three_products(objective):
    """Its output, and the gradients of its input and weight: all in the forward pass, none again."""
    rows = 4 * B  # from a few rows on
    x, mu, logvar = (torch.zeros(rows, n, device="cuda") for n in (X, D, D))
    layer = nn.Linear(D, X, device="cuda")
    mu.requires_grad_()
    options = {} if objective == "elbo" else {"k": K}

    def launched(backward):
        with control.launches() as found:
            bound = getattr(fastvae, objective)(
                x, (mu, logvar), fastvae.FusedHead(nn.Identity(), layer), likelihood="bernoulli", **options
            )
            if backward:
                torch.autograd.grad(bound, (mu, layer.weight, layer.bias))
        return sum(launch.kind == "library" for launch in found)

    assert launched(False) == launched(True) == 3
