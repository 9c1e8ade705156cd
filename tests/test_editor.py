"""Answers of pyright's language server, as an editor shows them, and pyright's strict type checker."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import fastvae

SCRIPT = Path(__file__).parent / "typed" / "user_script.py"
ROOT = Path(fastvae.__file__).parents[1]
# No look-up of newer versions, which needs a network.
_ENVIRONMENT = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1"}


def _program(name: str) -> str:
    folder = Path(sys.executable).parent
    found = shutil.which(name, path=os.pathsep.join([str(folder), os.environ.get("PATH", "")]))
    assert found is not None, f"{name} is not installed: pip install 'fastvae[test]'"
    return found


def _workspace(folder: Path, mode: str = "standard") -> Path:
    """Make a folder in which a checker reads nothing but its files and fastvae."""
    paths = [] if ROOT.name == "site-packages" else [str(ROOT)]
    (folder / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": mode, "extraPaths": paths}))
    return folder


def _errors(folder: Path, source: str) -> list[tuple[int, str]]:
    """Return the line and rule of each error in a program, in pyright's strict mode."""
    (folder / "program.py").write_text(source)
    command = [_program("pyright"), "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(
        command, cwd=_workspace(folder, "strict"), env=_ENVIRONMENT, capture_output=True, text=True
    )
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == 1, done.stdout
    return [(d["range"]["start"]["line"] + 1, d.get("rule", d["message"])) for d in found]


@pytest.mark.slow
def test_pyright_finds_no_error_in_a_users_program(tmp_path):
    assert _errors(tmp_path, SCRIPT.read_text()) == []


WRONG = """
import fastvae, torch
x = torch.rand(3, 8)
vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8))
vae.evaluate(x, tols=0.1)
vae.log_marginal(x, noise="sobol")
vae.ais(x, step=3)
vae.bdmc(start="q")
vae.reconstruction_log_prob(x, elementwise="yes")
vae.sleep(3, reduction="avg")
vae.iwae(x, estimator="DReG")
fastvae.ops.gaussian_log_prob(x, x)
vae.elbo(x, terms=True).klt
"""


@pytest.mark.slow
def test_pyright_finds_every_mistake(tmp_path):
    assert {line for line, _ in _errors(tmp_path, WRONG)} == set(range(5, 14))


class _Server:
    """Client of a language server: requests and answers by JSON-RPC on standard input and output."""

    def __init__(self, folder: Path):
        command = [_program("pyright-langserver"), "--stdio"]
        self._process = subprocess.Popen(
            command, cwd=folder, env=_ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        # A server that neither answers nor exits must not stop the tests.
        self._watchdog = threading.Timer(300, self._process.kill)
        self._watchdog.daemon = True
        self._watchdog.start()
        self._requests, self._folder = 0, folder
        plain = {
            "hover": {"contentFormat": ["plaintext"]},
            "signatureHelp": {"signatureInformation": {"documentationFormat": ["plaintext"]}},
        }
        capabilities = {"workspace": {"configuration": True}, "textDocument": plain}
        place = {"uri": folder.as_uri(), "name": "workspace"}
        self.ask(
            "initialize",
            {
                "processId": os.getpid(),
                "rootUri": place["uri"],
                "workspaceFolders": [place],
                "capabilities": capabilities,
            },
        )
        self._send({"method": "initialized", "params": {}})

    def close(self) -> None:
        self.ask("shutdown", None)
        self._send({"method": "exit"})
        self._process.communicate(timeout=60)
        self._watchdog.cancel()

    def open(self, source: str) -> str:
        """Open a file with this source, and return its address."""
        path = self._folder / "script.py"
        path.write_text(source)
        document = {"uri": path.as_uri(), "languageId": "python", "version": 1, "text": source}
        self._send({"method": "textDocument/didOpen", "params": {"textDocument": document}})
        return path.as_uri()

    def ask(self, method: str, params: Any) -> Any:
        """Send a request and return its result, answering the server's own requests meanwhile."""
        self._requests += 1
        self._send({"id": self._requests, "method": method, "params": params})
        while True:
            message = self._receive()
            if "method" in message and "id" in message:
                items = message["params"].get("items", ()) if message.get("params") else ()
                python = {"pythonPath": sys.executable}
                settings = [python if item.get("section") == "python" else None for item in items]
                self._send({"id": message["id"], "result": settings or None})
            elif message.get("id") == self._requests and "method" not in message:
                assert "error" not in message, message
                return message["result"]

    def _send(self, message: dict[str, Any]) -> None:
        content = json.dumps({"jsonrpc": "2.0", **message}).encode()
        assert self._process.stdin is not None
        self._process.stdin.write(b"Content-Length: %d\r\n\r\n%s" % (len(content), content))
        self._process.stdin.flush()

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        size = None
        while line := self._process.stdout.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                size = int(value)
        assert size is not None, "the language server has ended"
        return json.loads(self._process.stdout.read(size))


BEFORE = """import torch
import fastvae
from fastvae.ops import gaussian_log_prob, rsample_kl

x = torch.rand(16, 8)
vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8))
result = vae.evaluate(x)
"""


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Return a function of a method and a line, with ``|`` at the cursor, that asks the server."""
    server = _Server(_workspace(tmp_path_factory.mktemp("editor")))
    opened: list[str] = []

    def answer(method: str, line: str) -> Any:
        if opened:
            server._send(
                {"method": "textDocument/didClose", "params": {"textDocument": {"uri": opened.pop()}}}
            )
        uri = server.open(BEFORE + line.replace("|", "") + "\n")
        opened.append(uri)
        position = {"line": BEFORE.count("\n"), "character": line.index("|")}
        return server.ask(f"textDocument/{method}", {"textDocument": {"uri": uri}, "position": position})

    yield answer
    server.close()


HOVERS = {
    "fastvae.ops.bernoulli_lo|g_prob": [
        "x: Tensor",
        "logits: Tensor",
        "mask: Tensor | None",
        "Nats [..., B]",
    ],
    "gaussian_lo|g_prob": ["mean: Tensor", "logvar: Tensor | float", "-> Tensor", "Compute log p(x|z)"],
    "rsample_k|l": ["mu: Tensor", "logvar: Tensor", "k: int | None = None", "-> tuple[Tensor, Tensor]"],
    "fastvae.ops.log_mean_ex|p": ["log_w: Tensor", "dim: int = 0"],
    "fastvae.elb|o": ["Return the ELBO", "-> Tensor"],
    "fastvae.log_margina|l": ["k: int = 5000", "proposal: ProposalName | Proposal"],
    "vae.log_margina|l": ["k: int = 5000", "-> LogMarginal", "proposal", "shared_noise"],
    "vae.evaluat|e": ["data: Any", "-> Evaluation", "checkpoint", "proposal"],
    "vae.sampl|e": ["n: int", "mean: bool = False"],
    "fastvae.VA|E": ["encoder", "Variational autoencoder"],
    "result.nll_interva|l": ["tuple[float, float]", "95 % interval"],
    "result.log_p|x": ["log_px: Tensor"],
    "result.plo|t": ["axes: Any = None", "in two panels"],
    "result.to_panda|s": ["Return the fields of the examples"],
}


@pytest.mark.slow
@pytest.mark.parametrize("line", HOVERS)
def test_hover(ask, line):
    shown = ask("hover", line)["contents"]["value"]
    assert [words for words in HOVERS[line] if words not in shown] == [], shown


# Parameters of the first signature that an editor shows in a call.
SIGNATURES = {
    "vae.iwae(x, |)": [
        "x: Any",
        "k: int = 50",
        "estimator: Estimator",
        "noise: Noise",
        "reduction: Reduction",
    ],
    "vae.elbo(x, |)": ["beta: float | Tensor", "free_bits: float | Tensor", "kl: KL", "mask: Any"],
    "vae.bound(x, |)": ["objective: Bound", "k: int = 50", "q_objective: Bound | None"],
    "vae.beta_tc(x, |)": ["alpha: float | Tensor", "sampling: Sampling"],
    "vae.log_marginal(x, |)": ["k: int = 5000", "noise: Noise", "proposal: ProposalName | Proposal"],
    "vae.evaluate(x, |)": ["k: int | None", "tol: float | None", "audit: int | None", "progress: bool"],
    "vae.ais(x, |)": ["steps: int", "leapfrog: int", "start: Start"],
    "vae.bdmc(|)": ["n: int", "steps: int", "latent_dim: int | tuple[int, ...]"],
    "vae.reconstruction_log_prob(x, |)": ["k: int = 100", "elementwise: bool"],
    "vae.sleep(|)": ["n: int", "reduction: Reduction"],
    "fastvae.iwae(x, x, vae.decoder, |)": ["k: int", "estimator: Estimator", "prior: Any"],
    "gaussian_log_prob(|)": ["x: Tensor", "mean: Tensor", "mask: Tensor | None = None"],
    "fastvae.ops.mixture_log_prob(|)": ["z: Tensor", "logits: Tensor | None = None"],
}


@pytest.mark.slow
@pytest.mark.parametrize("line", SIGNATURES)
def test_signature_help(ask, line):
    first = ask("signatureHelp", line)["signatures"][0]
    label = first["label"]
    parts = [p["label"] for p in first["parameters"]]
    parts = [p if isinstance(p, str) else label[slice(*p)] for p in parts]
    missing = [p for p in SIGNATURES[line] if not any(part.startswith(p) for part in parts)]
    assert missing == [] and not any(part.startswith("**") for part in parts), label
    assert "terms: Literal[True]" not in label


COMPLETIONS = {
    "vae.iwae(x, |)": ["k=", "estimator=", "noise=", "terms="],
    "vae.log_marginal(x, |)": ["k=", "proposal=", "shared_noise="],
    "vae.evaluate(x, |)": ["k=", "tol=", "checkpoint=", "proposal="],
    "vae.ais(x, |)": ["steps=", "start="],
    'vae.iwae(x, estimator="|")': ['"iwae"', '"dreg"', '"stl"'],
    'vae.evaluate(x, proposal="|")': ['"posterior"', '"adapted"', '"refined"', '"defensive"'],
    'vae.ais(x, start="|")': ['"posterior"', '"prior"'],
    "fastvae.ops.|": ["bernoulli_log_prob", "gaussian_log_prob", "rsample_kl"],
    "result.|": ["nll", "nll_interval", "log_px", "plot", "to_dict", "to_pandas"],
}


@pytest.mark.slow
@pytest.mark.parametrize("line", COMPLETIONS)
def test_completion(ask, line):
    offered = {item["label"] for item in ask("completion", line)["items"]}
    assert set(COMPLETIONS[line]) <= offered
    assert "options=" not in offered
