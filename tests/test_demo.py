"""The command line: demo and info, through the function that python -m fastvae calls."""

import gzip
import pickle
import struct
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

import fastvae
from fastvae.cli import demo, kinds, latents, main, models, pictures, training
from fastvae.cli.images import digits, read_idx
from fastvae.core import backend as _backend
from fastvae.distributions import DiagonalNormal

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TINY = ["--epochs", "1", "--k", "3", "--eval-k", "7"]
PICTURES = {f"{n}.png" for n in ("samples", "reconstructions", "manifold", "latents", "training", "overview")}


def idx_bytes(count, seed, size=6, magic=0x803):
    pixels = np.random.default_rng(seed).integers(0, 256, (count, size, size), np.uint8)
    return struct.pack(">4I", magic, count, size, size) + pixels.tobytes()


def idx_folder(folder, dot="-", compress=False):
    folder.mkdir()
    for part, count in (("train", 230), ("t10k", 23)):
        data = idx_bytes(count, count)
        name = f"{part}-images{dot}idx3-ubyte"
        (folder / (name + ".gz" if compress else name)).write_bytes(gzip.compress(data) if compress else data)
    return folder


def check_pictures(folder, names):
    assert {p.name for p in folder.glob("*.png")} == names
    for name in names:
        content = (folder / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 1000


def test_digits(tmp_path, capsys):
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    assert main(["demo", "--out", str(tmp_path / "out"), *TINY]) == 0
    assert torch.equal(state, torch.get_rng_state()) and threads == torch.get_num_threads()
    check_pictures(tmp_path / "out", PICTURES)
    text = capsys.readouterr().out
    for part in (
        "1400 training and 397 test images",
        "log p(x), K=7",
        "IWAE-3",
        "is better than",
        "manifold.png",
    ):
        assert part in text

    # The checkpoint rebuilds the table's model.
    saved = torch.load(tmp_path / "out" / "iwae.pt", weights_only=True)
    assert saved["architecture"] == {"pixels": 64, "hidden": 128, "latent": 2}
    assert saved["settings"] == {"data": "digits", "epochs": 1, "k": 3, "seed": 0, "shape": [8, 8]}
    model = models.load(tmp_path / "out" / "iwae.pt")
    noise = torch.Generator().manual_seed(training.TEST_SEED)
    result = model.evaluate(digits().test, k=7, generator=noise, progress=False)
    assert f"{-result.nll:.2f} ±" in text


def test_a_seed_reproduces_a_run():
    images = digits()
    architecture = {"pixels": 64, "hidden": 8, "latent": 3}
    with training.threads(1):
        first, again, other = (training.train("x", 2, images, architecture, 1, 5, seed) for seed in (3, 3, 4))
    assert first.train_curve == again.train_curve and torch.equal(first.log_px, again.log_px)
    assert first.train_curve != other.train_curve


@pytest.mark.parametrize("dot, compress", [("-", True), (".", False)])
def test_idx_folder(tmp_path, capsys, dot, compress):
    folder = idx_folder(tmp_path / "images", dot, compress)
    out = tmp_path / "out"
    assert main(["demo", "--data", str(folder), "--out", str(out), "--latent", "3", *TINY]) == 0
    check_pictures(out, PICTURES - {"manifold.png", "latents.png"})
    text = capsys.readouterr().out
    assert "images: 230 training and 23 test images of 6x6 pixels" in text
    assert "no manifold.png" in text and "--latent 2" in text


def test_read_idx(tmp_path):
    data = idx_bytes(5, 0)
    (tmp_path / "a").write_bytes(data)
    (tmp_path / "a.gz").write_bytes(gzip.compress(data))
    images = read_idx(tmp_path / "a")
    assert images.shape == (5, 6, 6) and images.tobytes() == data[16:]
    assert np.array_equal(images, read_idx(tmp_path / "a.gz"))


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a", b"", "0 bytes"),
        ("a", idx_bytes(5, 0, magic=0x801), "0x00000801.*0x00000803"),
        ("a", idx_bytes(5, 0)[:-1], "195 bytes.*which make 196.*cut off"),
        ("a", idx_bytes(5, 0) + b"x", "goes on after 196 bytes"),
        ("a.gz", gzip.compress(idx_bytes(5, 0) + b"x", mtime=0), "goes on after 196 bytes"),
        ("a", struct.pack(">4I", 0x803, 2**32 - 1, 2**31, 6) + b"few", "19 bytes.*cut off"),
        (
            "a.gz",
            gzip.compress(struct.pack(">4I", 0x803, 2**32 - 1, 2**31, 6) + b"few", mtime=0),
            "19 bytes.*cut off",
        ),
        ("a", struct.pack(">4I", 0x803, 0, 6, 6), "no pixels"),
        ("a.gz", idx_bytes(5, 0), "not a whole gzip"),
        ("a.gz", gzip.compress(idx_bytes(5, 0), mtime=0)[:-9], "not a whole gzip"),
    ],
)
def test_read_idx_refuses(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name)


def test_read_idx_decompresses_no_more_than_the_header_declares(tmp_path):
    """Reading stops at the header's size: a gzip file of 250 KiB can hold 256 MiB of zeros."""
    with gzip.open(tmp_path / "a.gz", "wb") as file:
        file.write(struct.pack(">4I", 0x803, 5, 6, 6))
        for _ in range(256):
            file.write(bytes(2**20))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="goes on after 196 bytes"):
            read_idx(tmp_path / "a.gz")
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_folder_errors(tmp_path):
    out = ["--out", str(tmp_path / "out"), *TINY]
    with pytest.raises(SystemExit, match="fastvae demo: .*no such folder.*nowhere"):
        main(["demo", "--data", str(tmp_path / "nowhere"), *out])
    folder = idx_folder(tmp_path / "images")
    (folder / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        SystemExit, match=r"no t10k images in .*images: looked for t10k-images-idx3-ubyte, t10k.*\.gz"
    ):
        main(["demo", "--data", str(folder), *out])
    (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(3, 0, size=5))
    with pytest.raises(SystemExit, match="6x6.*5x5"):
        main(["demo", "--data", str(folder), *out])
    assert not (tmp_path / "out").exists()


def test_messages(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--device cuda needs a GPU"):
        main(["demo", "--device", "cuda"])
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(
        SystemExit, match=r"sklearn and matplotlib cannot be imported.*pip install 'fastvae\[demo\]'"
    ):
        main(["demo"])
    for wrong in (["--k", "0"], ["--epochs", "two"], ["--seed", "-1"]):
        with pytest.raises(SystemExit):
            main(["demo", *wrong])
    assert (
        "must be from 1" in (text := capsys.readouterr().err) and "expected a whole number, got 'two'" in text
    )


def test_interrupt(monkeypatch, capsys):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_table_names_the_better_model():
    def run(name, log_px):
        values = torch.tensor(log_px)
        return training.Run(name, None, {}, [], [], values - 1, values, torch.full_like(values, 5.0))

    low, high = run("ELBO", [-10.0, -12.0, -14.0]), run("IWAE-9", [-9.0, -11.5, -12.5])
    assert "IWAE-9 is better than ELBO by 1.00 nats per image (± 0.29" in demo.table([low, high], 7)
    assert "-12.00 ± 1.15" in demo.table([low, high], 7)
    assert "IWAE-9 is better than ELBO by 1.00" in demo.table([high, low], 7)
    assert "raise --eval-k" in demo.table([low, high], 7)
    assert "no clear difference" in demo.table([low, run("IWAE-9", [-9.0, -14.0, -13.0])], 7)


def test_info(capsys, monkeypatch):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    for part in (
        "fastvae",
        torch.__version__,
        "Python",
        "FASTVAE_BACKEND",
        "rsample_log_ratio",
        "log_mean_exp",
    ):
        assert part in text
    _backend._default.cache_clear()
    monkeypatch.setenv("FASTVAE_BACKEND", "fortran")
    with pytest.raises(SystemExit, match="FASTVAE_BACKEND: unknown backend 'fortran'"):
        main(["info"])


def test_bare_command_prints_help(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert "usage: python -m fastvae" in text and "demo" in text and "info" in text


def test_import_loads_no_heavy_package():
    heavy = {"matplotlib", "sklearn", "triton", "fastvae.__main__", "fastvae.cli"}
    code = f"import sys, fastvae; assert not {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Bernoulli is the demo itself.
@pytest.mark.parametrize("likelihood", [n for n in kinds.NAMES if n != "bernoulli"])
def test_any_likelihood(likelihood, tmp_path, capsys):
    """The demo trains, measures and draws the digits as any likelihood's data; its checkpoint evaluates."""
    out = tmp_path / "out"
    assert main(["demo", "--likelihood", likelihood, "--out", str(out), *TINY]) == 0
    check_pictures(out, {"likelihood.png"})
    text = capsys.readouterr().out
    assert kinds.kind_of(likelihood).says in text and "is better than" in text and "nan" not in text
    saved = torch.load(out / "iwae.pt", weights_only=True)
    assert saved["architecture"]["likelihood"] == likelihood
    model = models.load(out / "iwae.pt")
    noise = torch.Generator().manual_seed(training.TEST_SEED)
    result = model.evaluate(digits(likelihood).test, k=7, generator=noise, progress=False)
    assert f"{-result.nll:.2f} ±" in text
    assert main(["evaluate", str(out / "iwae.pt"), "digits", "--k", "7"]) == 0


def test_an_unknown_likelihood(tmp_path):
    with pytest.raises(SystemExit, match="--likelihood poison is unknown; known: .*poisson"):
        main(["demo", "--likelihood", "poison", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="--likelihood poisson is shown on .* digits; leave --data out"):
        main(["demo", "--likelihood", "poisson", "--data", str(tmp_path), "--out", str(tmp_path)])


# Every posterior, and every prior, in combinations other than the default.
PAIRS = [
    (q, "standard" if q == "ladder" else p)
    for q, p in zip(latents.POSTERIORS, [*latents.PRIORS] * 2, strict=False)
]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("posterior, prior", PAIRS[1:])
def test_any_posterior_and_prior(posterior, prior, tmp_path, capsys):
    """The demo trains, measures and draws any posterior and prior; its checkpoint evaluates."""
    if "flow" in (posterior, prior):
        pytest.importorskip("zuko")
    out = tmp_path / "out"
    assert main(["demo", "--posterior", posterior, "--prior", prior, "--out", str(out), *TINY]) == 0
    check_pictures(out, PICTURES)
    text = capsys.readouterr().out
    assert "is better than" in text and "nan" not in text
    names = {"posterior": posterior} | ({} if prior == "standard" else {"prior": prior})
    assert ", ".join(f"{option} {name}" for option, name in names.items()) + ", 128 hidden units" in text
    saved = torch.load(out / "iwae.pt", weights_only=True)
    assert saved["architecture"] == {"pixels": 64, "hidden": 128, "latent": 2, **names}
    model = models.load(out / "iwae.pt")
    noise = torch.Generator().manual_seed(training.TEST_SEED)
    result = model.evaluate(digits().test, k=7, generator=noise, progress=False)
    assert f"{-result.nll:.2f} ±" in text
    assert main(["evaluate", str(out / "iwae.pt"), "digits", "--k", "7"]) == 0


def test_a_ladder_brings_its_own_prior(tmp_path):
    options = ["demo", "--out", str(tmp_path), "--posterior", "ladder"]
    with pytest.raises(SystemExit, match="--posterior ladder brings its own prior; leave --prior vamp out"):
        main([*options, "--prior", "vamp"])
    with pytest.raises(SystemExit, match="two levels of latents; --latent must be 2 or more, not 1"):
        main([*options, "--latent", "1"])


def test_a_vamp_prior_warms_up():
    """A VampPrior's KL weight rises over three tenths of the steps, and then is 1."""
    architecture = {"pixels": 64, "hidden": 8, "latent": 3}
    beta = latents.beta_of(models.build({**architecture, "prior": "vamp"}), 100)
    assert [round(float(beta(step)), 3) for step in (0, 15, 30, 99)] == [0.0, 0.5, 1.0, 1.0]
    assert latents.beta_of(models.build(architecture), 100) is None


@pytest.mark.parametrize("name", [n for n in latents.PRIORS if n != "standard"])
def test_a_prior_is_trained(name):
    """A prior's parameters move from their start, a VampPrior's from images of any range."""
    if name == "flow":
        pytest.importorskip("zuko")
    images = digits("poisson")
    architecture = {"pixels": 64, "hidden": 8, "latent": 3, "likelihood": "poisson", "prior": name}
    torch.manual_seed(3)
    before = models.build(architecture)
    latents.start(before, images.train)
    if name == "vamp":
        inputs = before.prior.pseudo_inputs()
        assert inputs.amin() >= 0 and inputs.amax() <= 16
        assert torch.allclose(inputs, images.train[: len(inputs)].clamp(0.05 * 16, 0.95 * 16), atol=1e-4)
    with training.threads(1):
        run = training.train("x", 2, images, architecture, 1, 5, seed=3)
    own = {n: p for n, p in run.model.prior.named_parameters() if not n.startswith("encoder.")}
    assert own
    for n, p in own.items():
        # 14 steps of Adam.
        assert 0 < (p - before.prior.get_parameter(n)).abs().amax() < 20 * training.LEARNING_RATE, n


def test_any_number_of_latents():
    """Losses are finite and all parameters have gradients for one and three latents."""
    pytest.importorskip("zuko")
    x = digits().test[:5]
    for name in latents.POSTERIORS:
        ladder = name == "ladder"
        for latent in (2, 3) if ladder else (1, 3):
            architecture = {"pixels": 64, "hidden": 8, "latent": latent, "posterior": name}
            architecture["prior"] = "standard" if ladder else "flow"
            model = models.build(architecture)
            bound = model.iwae(x, 4)
            bound.backward()
            assert bound.isfinite()
            missing = [n for n, p in model.named_parameters() if p.grad is None]
            assert not missing, (name, latent, missing)
            # As for a VAE saved as a whole.
            again = pickle.loads(pickle.dumps(model))
            with torch.random.fork_rng():
                torch.manual_seed(3)
                expected = model.iwae(x, 4)
                torch.manual_seed(3)
                assert torch.equal(again.iwae(x, 4), expected)


def test_the_kl_is_analytic_where_available():
    def kl(**names):
        model = models.build({"pixels": 64, "hidden": 8, "latent": 3, **names})
        return latents.elbo_options(model, torch.zeros(2, 64), 10)

    assert kl() == kl(posterior="full", prior="learned") == kl(posterior="laplace")
    assert kl() == {"kl": "analytic", "k": 10}
    assert kl(posterior="student_t") == kl(prior="vamp") == {"kl": "mc", "k": 10}
    # 10 per component.
    assert kl(posterior="mixture") == {"kl": "mc", "k": 20}


def test_unknown_latents(tmp_path, monkeypatch, capsys):
    out = ["--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="--posterior cauchy is unknown; known: diagonal, softplus, .*flow"):
        main(["demo", "--posterior", "cauchy", *out])
    with pytest.raises(SystemExit, match="--prior wide is unknown; known: standard, learned, .*vamp"):
        main(["demo", "--prior", "wide", *out])
    monkeypatch.setattr(latents, "find_spec", lambda name: None)
    for option in ("--posterior", "--prior"):
        with pytest.raises(SystemExit, match=f"{option} flow .*pip install zuko"):
            main(["demo", option, "flow", *out])
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in (*latents.POSTERIORS, *latents.PRIORS))


@pytest.mark.parametrize("latent", [2, 3])
def test_classes_are_labelled_at_their_centroids(latent):
    """More than two latents are shown in the plane of the largest variance."""
    from matplotlib.figure import Figure

    images = digits()
    means = torch.zeros(len(images.test), latent)
    means[:, 0], means[:, -1] = images.labels, 10 * (images.labels % 2)
    encoder = torch.nn.Identity()
    model = fastvae.VAE(encoder, encoder, likelihood="bernoulli", latent_dim=latent)
    run = training.Run("x", model, {}, [], [], *[torch.zeros(1)] * 3)
    images = images._replace(test=torch.cat([means, torch.zeros_like(means)], 1))
    axes = Figure().subplots()
    pictures._scatter(axes, run, images)
    assert [t.get_text() for t in axes.texts] == [str(n) for n in range(10)]
    at = torch.tensor([t.get_position() for t in axes.texts])
    expected = torch.stack([torch.arange(10.0), 10.0 * (torch.arange(10) % 2)], 1)
    assert torch.allclose(torch.cdist(at, at), torch.cdist(expected, expected), atol=1e-3)


def test_the_manifold_covers_the_prior():
    """The picture's grid decodes quantiles of each dimension's marginal."""

    class Seen(torch.nn.Module):
        def forward(self, z):
            self.z = z
            return torch.zeros(len(z), 64)

    class Axes:
        def __getattr__(self, name):
            return lambda *args, **kwargs: None

    prior = DiagonalNormal(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0]).log() * 2)
    model = fastvae.VAE(lambda x: x, Seen(), likelihood="bernoulli", prior=prior, latent_dim=2, modules=[])
    run = training.Run("x", model, {}, [], [], *[torch.zeros(1)] * 3)
    pictures._manifold(Axes(), run, digits())
    grid = model.decoder.z
    assert torch.allclose(grid.mean(0), prior.mu, atol=0.1)
    expected = prior.mu + torch.tensor([0.5, 3.0]) * torch.tensor([-1.959964])
    assert torch.allclose(grid.amin(0), expected, atol=0.15)
