"""python -m fastvae evaluate: models and data in files, results, pictures, and messages."""

from __future__ import annotations

import errno
import io
import json
import os
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import fastvae
from fastvae.cli import demo, main, models
from fastvae.likelihoods import Gaussian

ROOT = Path(__file__).parents[1]


def _binomial(logits):
    return torch.distributions.Binomial(255, logits=logits)


class _Both(torch.nn.Module):
    """Decoder's last step for two outputs."""

    def forward(self, h):
        return h[:, 0], h[:, 1]


@pytest.fixture
def folder(tmp_path):
    """Save a model as the demo does, one as a whole, and data in every form."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        architecture = {"pixels": 64, "hidden": 16, "latent": 2}
        model = models.build(architecture)
        whole = fastvae.VAE(models.Encoder(64, 16, 2), torch.nn.Linear(2, 64), likelihood=Gaussian(0.5))
    torch.save({"architecture": architecture, "state_dict": model.state_dict()}, tmp_path / "model.pt")
    torch.save(whole, tmp_path / "whole.pt")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    rng = np.random.default_rng(0)
    x = rng.random((23, 8, 8), dtype=np.float32).round()
    np.save(tmp_path / "x.npy", x)
    np.savez(tmp_path / "x.npz", x=x, y=np.arange(23))
    torch.save((torch.from_numpy(x), torch.arange(23)), tmp_path / "x.pt")
    np.save(tmp_path / "big.npy", x.astype(">f4"))
    torch.save([torch.from_numpy(x), torch.from_numpy(x)], tmp_path / "list.pt")
    np.save(tmp_path / "bytes.npy", (255 * x).astype(np.uint8))
    np.save(tmp_path / "small.npy", x[:, :7])
    np.savez(tmp_path / "two.npz", a=x, b=x)
    np.save(tmp_path / "none.npy", x[:0])
    np.save(tmp_path / "wide.npy", x.astype(np.float64))
    np.save(tmp_path / "whole.npy", x.astype(np.int64))
    np.savez(tmp_path / "empty.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "x.npz").read_bytes()[:-100])
    (tmp_path / "zero.npy").write_bytes(b"")
    (tmp_path / "garbage.pt").write_bytes(b"nonsense")
    torch.save({"x": torch.zeros(3)}, tmp_path / "dict.pt")
    torch.save({"architecture": architecture, "state_dict": {}}, tmp_path / "partial.pt")
    idx = tmp_path / "idx"
    idx.mkdir()
    for part in ("train", "t10k"):
        header = struct.pack(">4I", 0x803, 23, 8, 8)
        (idx / f"{part}-images-idx3-ubyte").write_bytes(header + (255 * x).astype(np.uint8).tobytes())
    return tmp_path


def test_results_and_picture(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model.pt", "x.npy", "--k", "60", "--seed", "3"]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*arguments, "--out", "results.npz", "--plot"]) == 0
    shown = capsys.readouterr()
    assert "23 examples, 60 draws each" in shown.out
    assert "NLL" in shown.err
    assert shown.out.splitlines()[-2:] == ["results.npz", "results.png"]
    with np.load("results.npz") as saved:
        model = models.load("model.pt")
        x = torch.from_numpy(np.load("x.npy")).flatten(1)
        expected = model.evaluate(x, k=60, progress=False, generator=torch.Generator().manual_seed(3))
        np.testing.assert_allclose(saved["log_px"], expected.log_px.numpy(), rtol=1e-6)
        np.testing.assert_allclose(saved["curve"], expected.curve, rtol=1e-6)
    assert Path("results.png").read_bytes().startswith(b"\x89PNG")
    main([*arguments, "--plot", "other.png"])
    assert Path("other.png").stat().st_size > 10_000


def _strict(text):
    """Parse one JSON value, without Python's NaN and Infinity."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_is_all_of_standard_output(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    arguments = ["evaluate", "model.pt", "x.npy", "--k", "30", "--json", "--audit", "1"]
    assert main([*arguments, "--out", "results.npz", "--plot"]) == 0
    shown = capsys.readouterr()
    assert _strict(shown.out) == fastvae.Evaluation.load("results.npz").to_dict()
    assert shown.err == "" and Path("results.png").exists()
    x = np.load("x.npy")
    x[3] = np.nan
    np.save("x.npy", x)
    with pytest.warns(RuntimeWarning, match="NaN"):
        assert main([*arguments, "--quiet"]) == 0
    found = _strict(capsys.readouterr().out)
    assert found["nll"] is None and found["log_px"][3] is None and found["log_px"][4] < 0


def test_quiet_prints_only_the_summary(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    arguments = ["evaluate", "model.pt", "x.npy", "--k", "30", "--quiet", "--audit", "1"]
    assert main([*arguments, "--out", "results.npz", "--plot"]) == 0
    shown = capsys.readouterr()
    assert shown.out == f"{fastvae.Evaluation.load('results.npz')}\n"
    assert shown.err == "" and Path("results.png").exists()


def test_json_of_the_demo(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "draw", lambda *args: [Path("overview.png")])
    arguments = ["demo", "--epochs", "1", "--k", "2", "--eval-k", "3", "--out", "out"]
    assert main([*arguments, "--json"]) == 0
    shown = capsys.readouterr()
    found = _strict(shown.out)
    elbo, iwae = found["models"]
    assert shown.err == "" and (found["epochs"], found["k"], found["eval_k"]) == (1, 2, 3)
    assert (elbo["objective"], iwae["objective"]) == ("ELBO", "IWAE-2")
    assert Path(iwae["file"]).exists() and iwae["log_px"] < 0 < iwae["log_px_stderr"]
    assert main([*arguments, "--quiet"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("nats per test image") and "overview.png" not in table
    assert f"{elbo['log_px']:.2f} ± {elbo['log_px_stderr']:.2f}" in table


def test_json_of_info(capsys):
    assert main(["info", "--json"]) == 0
    found = _strict(capsys.readouterr().out)
    assert found["versions"]["fastvae"] == fastvae.__version__
    assert list(found["ops"]) == fastvae.ops.__all__


class _NoWork:
    def __call__(self, *args, **options):
        raise AssertionError("the work began")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write to")
def test_an_unwritable_folder_fails_before_evaluation(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(fastvae.VAE, "evaluate", _NoWork())
    monkeypatch.setattr(demo, "train", _NoWork())
    for option, name in (("--out", "out.npz"), ("--plot", "plot.png"), ("--checkpoint", "run.npz")):
        with pytest.raises(
            SystemExit, match=f"{option} /proc/{name}: no file can be created in the folder /proc"
        ):
            main(["evaluate", "model.pt", "x.npy", option, f"/proc/{name}"])
    with pytest.raises(SystemExit, match="no file can be created in the folder /proc"):
        main(["demo", "--out", "/proc"])


def test_results_survive_a_full_disk(folder, monkeypatch, capsys):
    """Results are saved elsewhere and printed as far as possible."""
    monkeypatch.chdir(folder)
    save = fastvae.Evaluation.save

    def full(self, path):
        if Path(path) == Path("out.npz"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(self, path)

    monkeypatch.setattr(fastvae.Evaluation, "save", full)
    words = r"out\.npz cannot be written \(No space left.*\); the results are in (.*out\.npz)$"
    with pytest.raises(SystemExit, match=words) as error:
        main(["evaluate", "model.pt", "x.npy", "--k", "30", "--out", "out.npz", "--plot"])
    shown = capsys.readouterr().out.splitlines()
    assert "23 examples, 30 draws each" in shown[0]
    assert str(error.value).endswith(shown[-2])
    assert len(fastvae.Evaluation.load(shown[-2]).log_px) == 23
    assert shown[-1] == "out.png"

    def none(self, path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fastvae.Evaluation, "save", none)
    with pytest.raises(SystemExit, match=r"out\.npz cannot be written \(No space left[^;]*$"):
        main(["evaluate", "model.pt", "x.npy", "--k", "30", "--out", "out.npz"])
    assert "NLL" in capsys.readouterr().out


def _terminal(monkeypatch, encoding):
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream.buffer


@pytest.mark.parametrize(("encoding", "sign"), [("ascii", "+-"), ("cp1252", "±"), ("utf-8", "±")])
def test_terminals_of_every_encoding(folder, monkeypatch, encoding, sign):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "draw", lambda *args: [Path("Größe.png")])
    size = "Größe.png".encode(encoding, "backslashreplace")
    for arguments, words in (
        (["evaluate", "model.pt", "x.npy", "--k", "30", "--out", "ß.npz"], f" {sign} ".encode(encoding)),
        (["demo", "--epochs", "1", "--k", "2", "--eval-k", "3"], size),
        (["info"], b"rsample_kl"),
    ):
        buffer = _terminal(monkeypatch, encoding)
        assert main(arguments) == 0
        assert words in buffer.getvalue()
        if arguments[0] == "demo":
            assert f" {sign} ".encode(encoding) in buffer.getvalue()
    assert len(fastvae.Evaluation.load("ß.npz").log_px) == 23


# Lets a clone's subprocesses find the package when it is not installed.
_ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_closed_pipe(folder):
    """Under ``| head``, also with standard error in the pipe, results are saved without a traceback."""
    command = [sys.executable, "-m", "fastvae", "evaluate", "model.pt", "x.npy", "--k", "30", "--out"]
    read, write = os.pipe()
    os.close(read)
    for encoding, errors in (("ascii", subprocess.PIPE), ("cp1252", write)):
        environment = {**_ENVIRONMENT, "PYTHONIOENCODING": encoding}
        out = f"{encoding}.npz"
        done = subprocess.run([*command, out], cwd=folder, env=environment, stdout=write, stderr=errors)
        assert done.returncode == 0
        assert not [word for word in (b"Traceback", b"ignored") if word in (done.stderr or b"")]
        assert len(fastvae.Evaluation.load(folder / out).log_px) == 23
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_standard_output_on_a_full_disk(folder):
    command = [sys.executable, "-m", "fastvae", "evaluate", "model.pt", "x.npy", "--k", "30"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*command, "--out", "full.npz"],
            cwd=folder,
            env=_ENVIRONMENT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.endswith("fastvae: standard output cannot be written: No space left on device\n")
    assert "Traceback" not in done.stderr
    assert len(fastvae.Evaluation.load(folder / "full.npz").log_px) == 23


def test_a_single_process_ignores_rank_variables(folder, monkeypatch, capsys):
    """A single process ignores a cluster job's rank variables in the environment."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setattr(torch.distributed, "init_process_group", _NoWork())
    main(["evaluate", str(folder / "model.pt"), str(folder / "x.npy"), "--k", "30", "--shard", "none"])
    assert "23 examples" in capsys.readouterr().out


@pytest.mark.parametrize("data", ["x.npy", "x.npz", "x.pt", "wide.npy", "bytes.npy", "idx"])
def test_forms_of_data(folder, data, capsys):
    """All forms of data hold the same black-and-white images."""
    results = []
    for name in ("x.npy", data):
        out = folder / "out.npz"
        main(["evaluate", str(folder / "model.pt"), str(folder / name), "--k", "30", "--out", str(out)])
        with np.load(out) as saved:
            results.append(saved["log_px"])
    np.testing.assert_allclose(*results, rtol=1e-5)


class _Numbers(torch.nn.Sequential):
    """Encoder or decoder of numbers of any dtype."""

    def forward(self, t):
        return super().forward(t.float())


_OF_BYTES = {
    "poisson": (fastvae.likelihoods.Poisson(), 6, 1.0),
    "negative_binomial": (fastvae.likelihoods.NegativeBinomial(2.0), 6, 1.0),
    "zero_inflated": (fastvae.likelihoods.ZeroInflatedNegativeBinomial(2.0), 12, 1.0),
    "multinomial": (fastvae.likelihoods.Multinomial(), 6, 1.0),
    "columns": (fastvae.likelihoods.Columns([(name, "poisson") for name in "abcdef"]), 6, 1.0),
    "binomial": (fastvae.likelihoods.from_distribution(_binomial), 6, 1.0),
    "grid": (fastvae.likelihoods.DiscretizedLogistic(high=255.0, scale=30.0), 6, 1.0),
    "signed_grid": (fastvae.likelihoods.DiscretizedLogistic(low=-1.0, scale=0.2), 6, None),
    "gaussian": (Gaussian(0.5), 6, 255.0),
}


_OF_ROWS = ("multinomial", "columns", "zero_inflated")  # of numbers, not of images


@pytest.mark.parametrize(
    ("name", "form"),
    [(n, f) for n in _OF_BYTES for f in ("npy", "pt", "idx") if f != "idx" or n not in _OF_ROWS],
)
def test_bytes_are_data_of_the_likelihood(tmp_path, name, form):
    """Bytes of counts are counts, pixels of a grid span the grid, and others are divided by 255."""
    likelihood, outputs, scale = _OF_BYTES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = _Numbers(torch.nn.Linear(2, outputs))
        if outputs == 12:
            decoder = torch.nn.Sequential(decoder, torch.nn.Unflatten(1, (2, 6)), _Both())
        vae = fastvae.VAE(_Numbers(torch.nn.Flatten(), torch.nn.Linear(6, 4)), decoder, likelihood=likelihood)
    torch.save(vae, tmp_path / "vae.pt")
    x = np.random.default_rng(1).poisson(3, (19, 6)).astype(np.uint8)
    if form == "npy":
        np.save(tmp_path / "x.npy", x)
    elif form == "pt":
        torch.save(torch.from_numpy(x), tmp_path / "x.pt")
    else:
        (tmp_path / "x.idx").mkdir()
        header = struct.pack(">4I", 0x803, 19, 1, 6)
        (tmp_path / "x.idx" / "t10k-images-idx3-ubyte").write_bytes(header + x.tobytes())
        vae.decoder = torch.nn.Sequential(vae.decoder, torch.nn.Unflatten(1, (1, 6)))
        torch.save(vae, tmp_path / "vae.pt")
    options = ["--k", "40", "--trust", "--seed", "3", "--quiet", "--out", str(tmp_path / "out.npz")]
    main(["evaluate", str(tmp_path / "vae.pt"), str(tmp_path / f"x.{form}"), *options])
    numbers = torch.from_numpy(x).float()
    numbers = numbers / scale if scale else 2 * numbers / 255 - 1
    numbers = numbers.unflatten(1, (1, 6)) if form == "idx" else numbers
    generator = torch.Generator().manual_seed(3)
    expected = vae.evaluate(numbers, k=40, progress=False, generator=generator).log_px
    with np.load(tmp_path / "out.npz") as saved:
        np.testing.assert_allclose(saved["log_px"], expected.numpy(), rtol=1e-5)


def test_digits_and_a_tolerance(folder, capsys):
    main(["evaluate", str(folder / "model.pt"), "digits", "--tol", "0.2", "--k", "400", "--k-chunk", "50"])
    shown = capsys.readouterr().out
    assert "397 examples" in shown
    assert "to 400 draws" in shown or "100 draws each" in shown


def test_every_option_is_passed_on(folder, monkeypatch):
    given = {}
    evaluate = fastvae.VAE.evaluate

    def watching(*args, **options):
        given.update(options)
        return evaluate(*args, **options)

    monkeypatch.setattr(fastvae.VAE, "evaluate", watching)
    options = {"k": "30", "tol": "0.5", "k-chunk": "7", "batch-size": "9", "shard": "samples"}
    options |= {"checkpoint": str(folder / "run.npz"), "proposal": "defensive", "noise": "qmc"}
    main(
        [
            "evaluate",
            str(folder / "model.pt"),
            str(folder / "x.npy"),
            *(v for o in options.items() for v in ("--" + o[0], o[1])),
        ]
    )
    for name, value in options.items():
        assert str(given[name.replace("-", "_")]) == value


@pytest.mark.parametrize("name", ["model.pt", "whole.pt", "x.pt"])
def test_a_damaged_archive_is_refused(folder, name):
    """A changed byte of a tensor is detected; torch.load ignores checksums."""
    file = folder / name
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
        with archive.open(entry) as opened:
            content = opened.read()
    data = bytearray(file.read_bytes())
    data[bytes(data).index(content) + len(content) // 2] ^= 1
    file.write_bytes(data)
    model, x = (str(file), "digits") if name != "x.pt" else (str(folder / "model.pt"), str(file))
    with pytest.raises(SystemExit, match=f"{name} is damaged: the checksum of its entry"):
        main(["evaluate", model, x, "--k", "30", "--trust"])


def test_a_pickled_vae_needs_trust(folder, capsys):
    data = str(folder / "idx")
    with pytest.raises(SystemExit, match="add --trust"):
        main(["evaluate", str(folder / "whole.pt"), data])
    flat = folder / "flat.npy"
    np.save(flat, np.load(folder / "x.npy").reshape(23, 64))
    main(["evaluate", str(folder / "whole.pt"), str(flat), "--trust", "--k", "20"])
    assert "unknown; it takes 21 draws" in capsys.readouterr().out


@pytest.mark.parametrize("rows", [slice(3, 4), slice(None)])
def test_a_picture_of_nan_results(folder, monkeypatch, rows):
    monkeypatch.chdir(folder)
    x = np.load("x.npy")
    x[rows] = np.nan
    np.save("x.npy", x)
    with pytest.warns(RuntimeWarning, match="log p\\(x\\) is NaN"):
        assert main(["evaluate", "model.pt", "x.npy", "--k", "30", "--plot", "nan.png"]) == 0
    assert Path("nan.png").read_bytes().startswith(b"\x89PNG")


def test_resumes_from_a_checkpoint(folder, capsys):
    arguments = ["evaluate", str(folder / "model.pt"), str(folder / "x.npy"), "--k", "30"]
    arguments += ["--checkpoint", str(folder / "run.npz"), "--batch-size", "10"]
    outputs = []
    for _ in range(2):
        main(arguments)
        outputs.append(capsys.readouterr().out.splitlines()[:-1])
    assert outputs[0] == outputs[1]
    with pytest.raises(SystemExit, match="other seed"):
        main([*arguments, "--seed", "1"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing.pt", "x.npy"], "No such file"),
        (["x.npy", "x.npy"], "x.npy is damaged, or was not written by torch.save$"),
        (["weights.pt", "x.npy"], r"expected a model of the demo.*torch\.save\(vae, path\)"),
        (["model.pt", "nothing"], "'digits', a folder of IDX files"),
        (["model.pt", "nothing.npy"], "No such file"),
        (["model.pt", "two.npz"], "holds a, b; call the data x"),
        (["model.pt", "cut.npz"], "cut.npz cannot be read: BadZipFile"),
        (["model.pt", "empty.npz"], "holds nothing"),
        (["model.pt", "zero.npy"], "zero.npy cannot be read: EOFError"),
        (["model.pt", "garbage.pt"], "garbage.pt cannot be read"),
        (["model.pt", "list.pt"], "list.pt cannot be read: ValueError: it holds a list of 2"),
        (["model.pt", "dict.pt"], "holds an object of dict"),
        (["garbage.pt", "x.npy"], "garbage.pt is damaged, or was not written by torch.save$"),
        (["garbage.pt", "x.npy", "--trust"], "garbage.pt is damaged, or was not written by torch.save$"),
        (["partial.pt", "x.npy"], "not a complete checkpoint of the demo"),
        (["model.pt", "x.npy", "--plot", "p.foo"], r"must end in \.png"),
        (["model.pt", "x.npy", "--out", "run"], r"must end in \.npz"),
        (
            ["model.pt", "x.npy", "--out", "a.npz", "--checkpoint", "./a.npz"],
            "would overwrite the checkpoint",
        ),
        (["model.pt", "none.npy"], r"expected \[N, \.\.\.\] with N > 0"),
        (["model.pt", "."], "no train images"),
        (["model.pt", "small.npy"], r"does not take data of shape \[23, 7, 8\]"),
        (["model.pt", "x.npy", "--tol", "0"], "tol must be greater than 0"),
        (["model.pt", "x.npy", "--proposal", "best"], "proposal='best' is unknown; known: 'posterior', "),
        (["model.pt", "x.npy", "--proposal", "adapted", "--noise", "qmc"], "use noise='philox', or another"),
        (["model.pt", "x.npy", "--out", "nowhere/out.npz"], "there is no folder nowhere"),
        (["model.pt", "x.npy", "--checkpoint", "nowhere/run.npz"], "there is no folder nowhere"),
        (["model.pt", "x.npy", "--plot", "nowhere/p.png"], "there is no folder nowhere"),
        (["model.pt", "x.npy", "--out", "x.npy/out.npz"], "there is no folder x.npy"),
        (["model.pt", "x.npy", "--checkpoint", "idx"], "idx is a folder; expected the name of a file"),
        (["model.pt", "whole.npy"], r"data has dtype torch.int64.*data\.float\(\)"),
    ],
)
def test_errors(folder, monkeypatch, arguments, words):
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit, match=words) as error:
        main(["evaluate", *arguments])
    assert str(error.value).startswith("fastvae evaluate: ")


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_torchrun(folder):
    """Two processes print one result, equal to a single process's."""
    arguments = ["evaluate", "model.pt", "x.npy", "--k", "30", "--batch-size", "5"]
    outputs = []
    for launcher in ([], ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]):
        command = [sys.executable, "-m", *launcher, "fastvae", *arguments]
        done = subprocess.run(
            command, cwd=folder, env=_ENVIRONMENT, capture_output=True, text=True, check=True
        )
        outputs.append(done.stdout.splitlines()[:-1])
    assert outputs[0] == outputs[1]
