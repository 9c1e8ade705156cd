"""Published numbers: the experiments on tiny data, and the page against the files of results."""

from __future__ import annotations

import csv
import struct
from pathlib import Path

import pytest
import torch

from docs.experiments import imputation
from docs.experiments.mnist import accuracy, compare, evaluation, noise
from docs.experiments.mnist.runs import RUNS, burda_rate
from docs.experiments.mnist.training import trained
from fastvae.cli.images import idx_folder

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def images(tmp_path):
    """Random images of 36 pixels in MNIST's format."""
    for part, n in (("train", 60), ("t10k", 9)):
        pixels = torch.randint(0, 256, (n, 6, 6), generator=torch.Generator().manual_seed(n))
        header = struct.pack(">IIII", 2051, n, 6, 6)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + bytes(pixels.flatten().tolist()))
    return idx_folder(tmp_path)


def test_the_schedule_is_burdas():
    """Eight stages of 3^i epochs, 3280 in all."""
    rates = [burda_rate(epoch) for epoch in range(3280)]
    lengths = [rates.count(rate) for rate in sorted(set(rates), reverse=True)]
    assert lengths == [3**i for i in range(8)]
    assert rates[0] == 1e-3 and rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_an_interrupted_run_gives_the_same_model(images, tmp_path, name):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir(), parts.mkdir()
    train = images.train[:25]
    expected = trained(name, train, 2, whole)
    trained(name, train, 1, parts)
    found = trained(name, train, 2, parts)
    assert (found.epochs, found.curve) == (2, expected.curve)
    for a, b in zip(found.vae.parameters(), expected.vae.parameters(), strict=True):
        assert torch.equal(a, b)
    assert trained(name, train, 5, parts, train_on=False).epochs == 2


def test_a_line_of_results(images, tmp_path):
    run, file = trained("iwae-5", images.train, 1, tmp_path), tmp_path / "results.csv"
    line = evaluation.evaluated("iwae-5", run, images.test, k=50, refined=3, annealed=2)
    for epochs in ("1", "2", "1"):
        evaluation.write(line | {"epochs": epochs}, file)
    lines = evaluation.read(file)
    assert [(found["run"], found["epochs"]) for found in lines] == [("iwae-5", "1"), ("iwae-5", "2")]
    assert lines[0] == line and float(line["q: NLL"]) > 0


def test_plain_pytorch_trains_alike(images, tmp_path):
    """The curves are equal to rounding for the same noise."""
    rows = compare.compared(images.train, 3, 2)
    bounds = {name: [v for n, *_, v in rows if n == name] for name, *_ in rows}
    for name in ("eager", "torch.compile"):
        assert bounds[name] == pytest.approx(bounds["fastvae"], rel=1e-4)
    for k in (3, 1, 3):
        compare.write([(n, k, e, s, v) for n, _, e, s, v in rows], tmp_path / "curves.csv")
    assert len((tmp_path / "curves.csv").read_text().splitlines()) == 1 + 2 * len(rows)


def test_errors_of_estimates(images, tmp_path, monkeypatch):
    methods = (("posterior", 7, None), ("refined", 5, None), ("refined", 200, 0.5))
    monkeypatch.setattr(accuracy, "METHODS", methods)
    rows = accuracy.errors(trained("iwae-5", images.train, 1, tmp_path).vae, images.test[:3], truth=50)
    assert [proposal for proposal, *_ in rows] == [proposal for proposal, *_ in methods]
    assert all(float(row[4]) >= abs(float(row[3])) for row in rows)
    accuracy.write(rows, tmp_path / "accuracy.csv")
    assert len((tmp_path / "accuracy.csv").read_text().splitlines()) == 1 + len(methods)


def test_noise_of_gradients(images, tmp_path, monkeypatch):
    monkeypatch.setattr(noise, "DRAWS", (1, 4))
    run = trained("iwae-5", images.train, 1, tmp_path)
    rows = noise.ratios(run.vae, images.test[:3], 20)
    noise.write(rows, tmp_path / "noise.csv")
    assert len(rows) == 6
    exact = [("iwae", k, k**-0.5, 0.0) for k in (1, 4, 16)]
    assert noise.slope(exact, "iwae", 1) == pytest.approx(-0.5)
    assert len(noise.of_finite_variance(run.vae, images.test[:3], 9.0, 2)) == 2


def test_the_slopes_with_two_latents():
    """The page's numbers are those of the file."""
    with (DOCS / "published-noise-2d.csv").open() as file:
        rows = [(r["estimator"], int(r["K"]), float(r["signal-to-noise"]), 0.0) for r in csv.DictReader(file)]
    of = {(name, k): value for name, k, value, _ in rows}
    assert noise.slope([r for r in rows if r[1] <= 256], "iwae", 1) == pytest.approx(-0.35, abs=0.005)
    shown = of["iwae", 1], of["iwae", 256], of["dreg", 1], of["dreg", 16], of["dreg", 256], of["dreg", 1024]
    page = (DOCS / "published.md").read_text("utf-8")
    assert all(f"{value:.2f}" in page for value in shown)


def test_imputation_of_a_table():
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    found = imputation.errors(x, seed=0, epochs=2)
    assert found["mean"] == pytest.approx(1.0, abs=0.5)
    assert all(0 < value < 4 for value in found.values())


def _rows(name):
    with (DOCS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_page_has_the_numbers_of_the_files():
    page = (DOCS / "published.md").read_text(encoding="utf-8")
    for line in _rows("published.csv"):
        for column in ("epochs", "q: NLL", "refined: NLL", "AIS: NLL", "active units"):
            value = line[column]
            rounded = value if "." not in value else f"{float(value):.2f}"
            assert f" {rounded} " in page, (line["run"], column, rounded)
    for line in _rows("published-accuracy.csv"):
        cells = [line["seconds"], line["bias"].replace("-", "−"), line["rms error"], line["khat > 0.7 %"]]
        assert f"| {line['draws']} | {' | '.join(cells)} % |" in page
    for line in _rows("published-cells.csv"):
        theirs, q, adapted = (
            f"{line[name].replace('-', '−')}, {line[f'{name}: seconds']} s"
            for name in ("get_marginal_ll", "posterior", "adapted")
        )
        of_q, of_adapted = (f"{line[f'{name}: khat > 0.7 %']} %" for name in ("posterior", "adapted"))
        gap = f"{line['below the truth']} ± {line['below the truth: stderr, cells']}"
        assert f"| {theirs} | {q} | {of_q} | {adapted} | {of_adapted} | {gap} |" in page
    for line in _rows("published-imputation.csv"):
        assert f"{line['mean squared error']} ± {line['standard deviation']}" in page
