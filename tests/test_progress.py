"""Progress bars are drawn for a terminal or a notebook, and never into a log."""

from __future__ import annotations

import contextlib
import io
import os
import sys

import pytest
import torch
from torch import nn

import fastvae
from fastvae.cli import training
from fastvae.cli.images import digits
from fastvae.core.terminal import has_reader, progress_bar

from .models import rand


def _evaluate(**options):
    vae = fastvae.VAE(nn.Linear(8, 4), nn.Linear(2, 8), likelihood="bernoulli")
    return vae.evaluate(rand(7, 8, seed=1).round(), k=30, batch_size=3, **options)


def _train(prior="standard", **options):
    pytest.importorskip("sklearn")
    architecture = {"pixels": 64, "hidden": 8, "latent": 2, "prior": prior}
    with training.threads(1):
        return training.train("ELBO", None, digits(), architecture, 1, 5, seed=0, **options)


def _notebook(stream):
    """Give a stream the class of a notebook's, which is not a terminal."""
    stream.__class__ = type("OutStream", (type(stream),), {"__module__": "ipykernel.iostream"})


CALLS = {
    "evaluate": lambda **options: _evaluate(**options),
    "audit": lambda **options: _evaluate(audit=1, **options),
    "train": lambda **options: _train(**options),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_log_gets_no_bar(name, tmp_path, capsys):
    """Neither standard error nor standard output gets a character, as in ``> log 2>&1``."""
    with open(tmp_path / "log", "w+") as log, contextlib.redirect_stderr(log):
        CALLS[name]()
        assert log.tell() == 0
    CALLS[name]()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", CALLS)
def test_a_notebook_gets_a_bar_unless_progress_is_false(name, capsys):
    _notebook(sys.stderr)
    CALLS[name](progress=False)
    assert capsys.readouterr().err == ""
    CALLS[name](progress=True)
    words = {"evaluate": "log p(x): 100%", "audit": "audit: 100%", "train": "ELBO"}
    assert words[name] in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals on this system")
def test_a_terminal_gets_a_bar():
    master, slave = os.openpty()
    try:
        with open(slave, "w", encoding="utf-8") as terminal, contextlib.redirect_stderr(terminal):
            _evaluate()
        shown = b""
        with contextlib.suppress(OSError):  # the end of a terminal that is closed at the other side
            while part := os.read(master, 10_000):
                shown += part
    finally:
        os.close(master)
    assert b"3/3" in shown and b"NLL" in shown


def test_who_reads_a_stream():
    closed = io.StringIO()
    closed.close()
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    assert not any(map(has_reader, (None, object(), io.StringIO(), closed)))
    assert has_reader(terminal)


def test_without_standard_error(monkeypatch):
    """A bar works where sys.stderr is None, as under pythonw and in some services."""
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(True, total=3) as bar:
        bar.update()
        bar.set_postfix(bound="1")


def test_a_hidden_bar_does_not_change_training(capsys):
    """The schedule of beta follows the steps, which a hidden bar does not count."""
    hidden = _train("vamp", progress=False)
    _notebook(sys.stderr)
    shown = _train("vamp", progress=True)
    assert "ELBO" in capsys.readouterr().err
    assert hidden.train_curve == shown.train_curve and torch.equal(hidden.log_px, shown.log_px)
