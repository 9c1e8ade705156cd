"""An evaluation as a picture, an HTML table, plain Python and a DataFrame."""

from __future__ import annotations

import builtins
import dataclasses
import html.parser
import json
import math
import sys

import pytest
import torch
from torch import nn

import fastvae

from .models import generator, rand

N, X = 23, 8


def _result(x=None, **options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = fastvae.VAE(nn.Linear(X, 4), nn.Linear(2, X), likelihood="bernoulli")
    x = rand(N, X, seed=1).round() if x is None else x
    return vae.evaluate(x, **{"k": 50, "progress": False, "generator": generator(2), **options})


@pytest.fixture(scope="module")
def result():
    return _result()


def _text_of(figure):
    return [
        t.get_text()
        for axes in figure.axes
        for t in [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
    ]


def test_the_picture_shows_every_example(result):
    collections = pytest.importorskip("matplotlib.collections")
    figure = result.plot()
    first, second = figure.axes
    points = [c for c in first.collections if isinstance(c, collections.PathCollection)]
    drawn = sorted(y for c in points for _, y in c.get_offsets().tolist())
    text = " ".join(_text_of(figure))
    assert f"log p(x) of {N} examples" in text and f"mean {-result.nll:.2f}".replace("-", "−") in text
    assert drawn == pytest.approx(result.log_px.sort().values.tolist())
    khat = {(x, y) for c in second.collections for x, y in c.get_offsets().tolist()}
    assert khat == set(zip(result.log_px.tolist(), result.khat.tolist(), strict=True))
    assert any(line.get_ydata()[0] == 0.7 for line in second.lines)
    low, high = first.get_ylim()
    assert low < result.log_px.min() and result.log_px.max() < high


def test_a_notebook_shows_the_picture_and_pyplot_does_not_know_it(result):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = result.plot()
    assert figure._repr_png_().startswith(b"\x89PNG\r\n\x1a\n")
    assert pyplot.get_fignums() == []


def test_a_picture_in_given_axes(result):
    matplotlib = pytest.importorskip("matplotlib.figure")
    figure = matplotlib.Figure()
    left, right = figure.subfigures(1, 2)
    axes = right.subplots(1, 2)
    left.subplots()
    assert result.plot(axes) is figure and axes[1].get_ylabel() == "Pareto k-hat"
    for wrong, words in (
        (figure.subplots(1, 3), r"a pair of matplotlib Axes, got 3 objects \(Axes, Axes, Axes\)"),
        (axes[0], "got 1 object "),
        (["a", "b"], r"got 2 objects \(str, str\); such as"),
    ):
        with pytest.raises(TypeError, match=words):
            result.plot(wrong)


def _with(result, **values):
    return dataclasses.replace(result, **values)


def test_pictures_of_unusual_results(result):
    pytest.importorskip("matplotlib")
    log_px = result.log_px.clone()
    log_px[3], log_px[5] = math.nan, -math.inf
    text = " ".join(_text_of(_with(result, log_px=log_px).plot()))
    assert "23 examples, without 2 that are NaN or infinite" in text
    none = _with(result, log_px=torch.full_like(log_px, math.nan)).plot()
    assert "log p(x) of all 23 examples is NaN or infinite" in _text_of(none)
    assert any("it takes 21 draws" in t for t in _text_of(_result(k=5).plot()))
    unbounded = _with(
        result, high=torch.full_like(log_px, math.inf), khat=torch.full_like(log_px, 0.9)
    ).plot()
    assert all(math.isfinite(v) for v in unbounded.axes[0].get_ylim())
    assert any("above 0.7: 100.0 % of the examples" in t for t in _text_of(unbounded))
    constant = _with(result, **{n: torch.full_like(log_px, -4.0) for n in ("log_px", "low", "high")}).plot()
    assert constant.axes[0].get_ylim()[0] < -4 < constant.axes[0].get_ylim()[1]
    for rows in (1, 200):
        figure = _result(torch.ones(rows, X)).plot()
        figure.draw_without_rendering()
        assert f"log p(x) of {rows} example{'s' * (rows > 1)}" in _text_of(figure)


class _Cells(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.text, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_html_has_every_line_of_the_report(result):
    cells = _Cells()
    cells.feed(result._repr_html_())
    title, *lines = str(result).splitlines()
    assert cells.text[0] == title
    assert " ".join(" ".join(cells.text[1:]).split()) == " ".join(" ".join(lines).split())


def test_html_is_escaped():
    audited = _result(audit=2)
    reason = "<script>alert('&')</script>"
    audit = dataclasses.replace(audited.audit, without_bounds=reason)
    shown = _with(audited, audit=audit)._repr_html_()
    cells = _Cells()
    cells.feed(shown)
    assert "script" not in cells.tags and any(reason in text for text in cells.text)


def test_a_dict_survives_strict_json():
    result = _result(audit=2, shared_noise=True)
    found = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert found["nll"] == result.nll and found["log_px"] == result.log_px.tolist()
    assert found["k"] == [50] * N and found["curve"] == [list(row) for row in result.curve]
    assert found["nll_jackknife"] == result.nll_jackknife and found["untrusted"] == result.untrusted
    assert found["kl_per_dim"] == result.kl_per_dim.tolist()
    assert found["audit"]["examples"] == result.audit.examples.tolist()
    fields = {f.name for f in dataclasses.fields(result)} - {"left_out"}
    assert found.keys() == fields | {"nll_jackknife", "nll_interval", "ess_quantiles", "untrusted"}


def test_a_dict_of_nan_and_infinities(result):
    log_px = result.log_px.clone()
    log_px[:2] = torch.tensor([math.nan, -math.inf])
    found = _with(result, log_px=log_px, high=torch.full_like(log_px, math.inf), nll=math.nan).to_dict()
    assert found["log_px"][:2] == [None, "-Infinity"] and found["high"] == ["Infinity"] * N
    assert found["nll"] is None and found["nll_interval"][0] == "-Infinity" and found["audit"] is None
    assert float(found["log_px"][1]) == -math.inf
    json.dumps(found, allow_nan=False)


def test_a_data_frame_has_a_row_for_each_example(result):
    pytest.importorskip("pandas")
    frame = result.to_pandas()
    assert list(frame.index) == list(range(N)) and frame.index.name == "example"
    expected = {f.name for f in dataclasses.fields(result) if getattr(result, f.name) is not None}
    expected = {n for n in expected if getattr(getattr(result, n), "shape", None) == (N,)}
    assert set(frame.columns) == expected and {"log_px", "k", "elbo", "khat"} <= expected
    assert frame["log_px"].tolist() == result.log_px.tolist() and frame["k"].dtype == "int64"


@pytest.mark.parametrize(
    ("package", "method", "words"),
    [
        ("matplotlib", "plot", r"needs matplotlib.*pip install 'fastvae\[demo\]'"),
        ("pandas", "to_pandas", "needs pandas.*pip install pandas"),
    ],
)
def test_a_missing_package_is_named(result, monkeypatch, package, method, words):
    for name in [
        n for n in sys.modules if n.partition(".")[0] == package or n.endswith("evaluation.picture")
    ]:
        monkeypatch.delitem(sys.modules, name)
    imported = builtins.__import__

    def without(name, *args, **options):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return imported(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=words) as error:
        getattr(result, method)()
    assert error.value.name == package
    json.dumps(result.to_dict())
