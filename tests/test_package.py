"""The shipped extension: instruction sets, threads, forks, and imports."""

from __future__ import annotations

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import setuptools
import torch

import fastvae
from fastvae import ops
from fastvae.cli import info
from fastvae.core import backend as _backend

from .conftest import CUDA

ROOT = Path(__file__).parents[1]

WORK = """
import sys, torch, fastvae
from fastvae import ops
generator = torch.Generator().manual_seed(0)
make = lambda *s: torch.randn(s, generator=generator).requires_grad_()
mu, logvar, mean, scale = make(37, 70), make(37, 70), make(3, 37, 131), make(131)
x, seed = torch.rand(37, 131, generator=generator), torch.tensor(7)
z, kl = ops.rsample_kl(mu, logvar, k=5, seed=seed)
y, ratio = ops.rsample_log_ratio(mu, logvar, k=5, seed=seed)
log_px = ops.gaussian_log_prob(x, mean, scale), ops.bernoulli_log_prob(x, mean)
terms = [z, kl, ratio, *log_px, ops.log_mean_exp(ratio)]
grads = torch.autograd.grad(sum(t.sum() for t in terms), [mu, logvar, mean, scale])
torch.save([t.detach() for t in (*terms, *grads)], sys.argv[1])
print(fastvae.core.backend.extension().isa())
"""


def _run(path, **environment):
    environment = {**os.environ, **environment}
    command = [sys.executable, "-c", WORK, str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), torch.load(path)


@pytest.mark.parametrize("isa", ["base", "avx2"])
def test_instruction_sets_agree(tmp_path, isa):
    """The code for older processors, where a wheel may run, gives the same results to rounding."""
    best = _backend.extension().isa()
    used, results = _run(tmp_path / "older.pt", FASTVAE_ISA=isa)
    assert used == (isa if best != "base" else "base")
    _, expected = _run(tmp_path / "best.pt")
    for a, b in zip(results, expected, strict=True):
        # Sums in another order: a few ulps of the largest terms.
        torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6 * float(b.abs().max()))


OPS = ("random", "normal_diagonal", "gaussian", "bernoulli", "logsumexp")


@pytest.mark.parametrize(
    ("isa", "products", "names"),
    [("base", "", OPS), ("avx2", "tiles", (*OPS, "hidden")), ("avx512", "blas", ("hidden",))],
)
def test_the_kernels_on_another_processor(isa, products, names):
    """Ops pass their tests with other vectors and products, in float64 and half precision too."""
    folder = os.path.dirname(__file__)
    tests = [os.path.join(folder, f"test_{name}.py") for name in names]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    command += ["-o", "addopts=", "-k", "(native or cpp or hidden) and not slow", *tests]
    # Without a GPU, where "native" is Triton.
    environment = {**os.environ, "FASTVAE_ISA": isa, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["FASTVAE_PRODUCTS"] = products
    environment["FASTVAE_TEST_PROFILE"] = "few"
    root = os.path.dirname(folder)
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


def test_bits_do_not_depend_on_the_number_of_threads(tmp_path):
    results = [_run(tmp_path / f"{n}.pt", OMP_NUM_THREADS=str(n))[1] for n in (1, 2, 3)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere one thread computes")
def test_torch_and_the_extension_share_one_openmp():
    """The process has one OpenMP runtime, which gives the kernels threads; two would fight over the cores."""
    code = """
import os, torch, fastvae
threads = lambda: len(os.listdir("/proc/self/task"))
mu = torch.randn(5000, 64, generator=torch.Generator().manual_seed(0))
torch.set_num_threads(3)
before = threads()
fastvae.ops.rsample_kl(mu, mu)
print("new threads:", threads() - before)
(mu @ mu.T).relu_()  # torch's own threads
print(open("/proc/self/maps").read())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "new threads: 2\n" in done.stdout, done.stderr + done.stdout[:100]
    files = {os.path.realpath(line.split()[-1]) for line in done.stdout.splitlines() if ".so" in line}
    runtimes = [f for f in files if re.match(r"lib(gomp|omp|iomp)", os.path.basename(f))]
    assert len(runtimes) == 1, runtimes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_worker_does_not_hang():
    """A DataLoader's worker, forked after OpenMP ran, does not hang, and uses one thread."""
    code = """
import os, torch, fastvae
mu = torch.randn(5000, 64)
torch.set_num_threads(2)
fastvae.ops.rsample_kl(mu, mu)
child = os.fork()
if child == 0:
    torch.set_num_threads(1)
    fastvae.ops.rsample_kl(mu, mu)
    os._exit(0)
_, status = os.waitpid(child, 0)
print("exit", os.waitstatus_to_exitcode(status))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "exit 0", done.stderr


@pytest.mark.skipif(CUDA, reason="for machines without a GPU")
def test_import_without_a_gpu_does_not_import_triton():
    seen = "print(sorted(m for m in ('triton', 'matplotlib', 'sklearn', 'argparse') if m in sys.modules))"
    ours = f"import sys, torch, fastvae; mu = torch.zeros(2, 3); fastvae.ops.rsample_kl(mu, mu); {seen}"
    torchs = f"import sys, torch; {seen}"
    ours, torchs = (
        subprocess.run([sys.executable, "-c", c], capture_output=True, text=True).stdout
        for c in (ours, torchs)
    )
    assert ours == torchs


def test_typed_and_complete():
    from importlib.resources import files

    assert files("fastvae").joinpath("py.typed").is_file()
    assert all(hasattr(fastvae, name) for name in fastvae.__all__)
    assert all(callable(getattr(ops, name)) for name in ops.__all__)


def test_a_missing_triton_is_explained(monkeypatch):
    monkeypatch.setattr(_backend, "has_triton", lambda: False)
    with pytest.raises(RuntimeError, match=r"on a GPU.* need triton.*pip install 'fastvae\[triton\]'"):
        _backend.layer("triton", "normal_diagonal")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with fastvae.use_backend("native"):
        assert all(gpu == "fails: no triton (pip install 'fastvae[triton]')" for _, _, gpu in info._ops())
    with fastvae.use_backend("triton"):
        assert all(cpu == "fails: no triton" for _, cpu, _ in info._ops())


# As installed with FASTVAE_NO_EXTENSION=1, or by accident.
WITHOUT_EXTENSION = """
import sys, torch
from importlib import metadata
from types import SimpleNamespace
sys.modules["fastvae._C"] = None
on_purpose = sys.argv[1] == "on purpose"
wheel = SimpleNamespace(read_text=lambda file: f"Root-Is-Purelib: {str(on_purpose).lower()}")
real, metadata.distributions = metadata.distributions, lambda **options: [wheel]
import fastvae
from fastvae import ops
from fastvae.cli import info
metadata.distributions = real
"""
SAID_ONCE = """
import warnings
mu, seed, decoder = torch.randn(6, 3), torch.tensor(5), torch.nn.Linear(3, 4)

def caught(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return caught

def first():
    return fastvae.elbo(torch.rand(6, 4), (mu, mu), decoder, likelihood="bernoulli")

if sys.argv[2] == "compiled":
    first = torch.compile(first, backend="eager", fullgraph=True)
with fastvae.use_backend("reference"):  # a choice, and no surprise
    assert not caught(lambda: ops.rsample_kl(mu, mu, seed=seed))
(warning,) = caught(first)
assert warning.category is RuntimeWarning
assert sys.argv[2] == "compiled" or warning.filename == "<string>", warning.filename
assert not caught(first) and not caught(lambda: ops.rsample_kl(mu, mu, seed=seed))
print(warning.message)
"""
LEFT_OUT = """
import warnings
warnings.filterwarnings("ignore", "fastvae: this is the pure-Python build")
mu, logvar = torch.randn(6, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
x, logits, seed = torch.rand(6, 11), torch.randn(4, 6, 11, requires_grad=True), torch.tensor(5)

def everything():
    z, kl = ops.rsample_kl(mu, logvar, k=4, seed=seed)
    y, ratio = ops.rsample_log_ratio(mu, logvar, k=4, seed=seed)
    log_px = ops.gaussian_log_prob(x, logits, logits) + ops.bernoulli_log_prob(x, logits)
    results = [z, kl, y, log_px, ops.log_mean_exp(ratio), fastvae.random.normal(seed, 4, 6, 3)]
    torch.manual_seed(1)
    results += [fastvae.elbo(x, (mu, logvar), lambda z: logits[0], likelihood="bernoulli")]
    return [*results, *torch.autograd.grad(sum(r.sum() for r in results), [mu, logvar, logits])]

found = everything()
with fastvae.use_backend("reference"):
    expected = everything()
assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
try:
    ops.bernoulli_log_prob(x + 1, logits)
except ValueError as error:
    assert "targets must lie in" in str(error)
else:
    assert False
compiled = torch.compile(lambda m, v: ops.rsample_kl(m, v, seed=seed), backend="eager", fullgraph=True)
assert torch.equal(compiled(mu, logvar)[1], ops.rsample_kl(mu, logvar, seed=seed)[1])
info.run()
"""
MISSING = """
try:
    ops.rsample_kl(torch.zeros(2, 3), torch.zeros(2, 3))
except RuntimeError as error:
    print(error)
info.run()
"""


def _without_extension(code: str, *arguments: str) -> str:
    command = [sys.executable, "-W", "error", "-c", WITHOUT_EXTENSION + code, *arguments]
    done = subprocess.run(command, env={**os.environ, "FASTVAE_BACKEND": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(CUDA, reason="native is Triton there")
def test_an_extension_left_out_on_purpose_is_replaced_by_the_reference():
    printed = _without_extension(LEFT_OUT, "on purpose")
    assert re.search(r"C\+\+ instructions +none: .*pure-Python build.*FASTVAE_NO_EXTENSION=1", printed)
    assert re.search(r"rsample_kl +PyTorch ", printed)


@pytest.mark.skipif(CUDA, reason="native is Triton there")
@pytest.mark.parametrize("way", ["eager", "compiled"])
def test_plain_pytorch_in_place_of_the_extension_is_announced_once(way):
    """The first use on CPU tensors warns at the user's line, not the import and no later use."""
    said = _without_extension(SAID_ONCE, "on purpose", way)
    assert re.search(r"plain PyTorch computes on CPU tensors.*slower.*binary wheel.*from source", said), said


@pytest.mark.skipif(CUDA, reason="native is Triton there")
def test_an_extension_missing_by_accident_is_an_error():
    printed = _without_extension(MISSING, "by accident")
    assert re.search(r"fastvae\._C could not be imported.*pip install -e \.", printed)
    assert re.search(r"rsample_kl +fails: no C\+\+ ", printed)


def test_an_extension_of_another_version_is_an_error(monkeypatch):
    """An editable install whose C++ was not rebuilt raises a clear error."""
    monkeypatch.setattr(_backend, "extension", lambda: SimpleNamespace(rsample=None))
    with pytest.raises(RuntimeError, match=r"no rsample_kl: it was built from another version.*pip install"):
        _backend.native("rsample_kl")(1, 2)


@pytest.mark.parametrize(
    "installed, left_out", [("true", True), ("false", False), (None, False)], ids=["pure", "built", "nothing"]
)
def test_an_extension_omitted_on_purpose_is_recognised(tmp_path, monkeypatch, installed, left_out):
    """The installed wheel shows whether the extension was omitted on purpose, not the clone's egg-info."""
    egg, wheel = tmp_path / "clone" / "fastvae.egg-info", tmp_path / "site" / "fastvae-0.1.0.dist-info"
    egg.mkdir(parents=True)
    (egg / "PKG-INFO").write_text("Name: fastvae\nVersion: 0.1.0\n")
    if installed:
        wheel.mkdir(parents=True)
        (wheel / "METADATA").write_text("Name: fastvae\nVersion: 0.1.0\n")
        (wheel / "WHEEL").write_text(f"Wheel-Version: 1.0\nRoot-Is-Purelib: {installed}\n")
    monkeypatch.setattr(sys, "path", [str(egg.parent), str(wheel.parent)])
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    assert _backend._left_out() is left_out


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs binutils")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set")
def test_newer_instructions_stay_in_their_namespaces():
    """An inline function of several units is kept once: it must run on processors without AVX."""
    command = ["objdump", "-d", "--no-show-raw-insn", _backend.extension().__file__]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    function, using = "", {"avx": set(), "avx512": set()}
    for line in listing.splitlines():
        if line.endswith(">:"):
            function = line.partition("<")[2]
        elif (instruction := line.partition("\t")[2]).startswith("v") or "%ymm" in instruction:
            using["avx512" if re.search(r"%zmm|%k[0-7]", instruction) else "avx"].add(function)
    assert using["avx"]
    assert not [f for f in using["avx"] if not re.search("7fastvae(4avx2|6avx512)", f)]
    assert not [f for f in using["avx512"] if "7fastvae6avx512" not in f]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    """Build a wheel without the extension and an sdist, from a copy of a clone's files."""
    folder = tmp_path_factory.mktemp("distributions")
    clone = folder / "clone"
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in ("fastvae", "kernels", "csrc"):
        shutil.copytree(ROOT / name, clone / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, clone)
    for path in (ROOT / "tools" / "smoke.py", ROOT / "tests" / "test_package.py"):
        (clone / path.parent.name).mkdir()
        shutil.copy(path, clone / path.parent.name)
    code = (
        f"import setuptools.build_meta as b; b.build_wheel({str(folder)!r}); b.build_sdist({str(folder)!r})"
    )
    environment = {**os.environ, "FASTVAE_NO_EXTENSION": "1"}
    command = [sys.executable, "-W", "error::setuptools.SetuptoolsDeprecationWarning", "-c", code]
    done = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_installed_without_a_compiler(distributions, tmp_path):
    """Installed without a compiler, the README's first lines work, and info names the backend."""
    with zipfile.ZipFile(next(distributions.glob("*-py3-none-any.whl"))) as wheel:
        wheel.extractall(tmp_path / "site")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PATH": "", "FASTVAE_BACKEND": ""}
    # An editable install would lend its extension to any fastvae.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in repr(f)]\n"
    code += re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S).group(1)
    code += "print('from', fastvae.__file__)\nfrom fastvae.cli import info\ninfo.run()\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"<string>:\d+: RuntimeWarning: fastvae: this is the pure-Python build.*\n", done.stderr
    )
    assert f"from {tmp_path / 'site'}" in done.stdout
    assert re.search(r"none: .*FASTVAE_NO_EXTENSION=1", done.stdout), done.stdout


def test_metadata_and_contents(distributions):
    """The licence is included by every version of setuptools; triton, a gigabyte, is optional."""
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        text = wheel.read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert re.search(r"^License(-Expression)?: MIT$", text, re.M)
    assert re.search(r"^License-File: LICENSE$", text, re.M) and any(n.endswith("/LICENSE") for n in names)
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist: ")]
    assert not any("triton" in n and "extra ==" not in n for n in needs)
    assert sum("triton" in n and re.search("extra == .triton", n) is not None for n in needs) == 1
    assert {
        "fastvae/kernels/normal_diagonal.py",
        "fastvae/reference/normal_diagonal.py",
        "fastvae/ops/_declared.pyi",
        "fastvae/py.typed",
    } <= set(names)
    with tarfile.open(next(distributions.glob("*.tar.gz"))) as sdist:
        inside = {n.partition("/")[2] for n in sdist.getnames()}
    suffixes = (".cpp", ".hpp", ".py")
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob("*") if p.suffix in suffixes}
    assert inside >= {"setup.py", "pyproject.toml", "LICENSE", "kernels/normal_diagonal.py", *sources}
    assert "fastvae/ops/_declared.pyi" in inside
    assert "tools/smoke.py" in inside and not any(name.startswith("tests") for name in inside)
    assert f"\nVersion: {fastvae.__version__}\n" in text


def test_the_index_shows_the_readme_with_links_that_work(distributions):
    """Relative links lead nowhere outside the repository: they point to the version's tag."""
    with zipfile.ZipFile(next(distributions.glob("*.whl"))) as wheel:
        text = wheel.read(next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))).decode()
    description = text.partition("\n\n")[2]
    tag = f"https://github.com/fastvae/fastvae/{{}}/v{fastvae.__version__}/".format
    assert f'src="{tag("raw")}docs/proposals.png"' in description and "dark" not in description
    assert f"]({tag('blob')}CONTRIBUTING.md)" in description
    links = re.findall(r"""(?:\]\(|src=")([^)"\s]+)""", description)
    files = [p for p in links if not p.startswith(("https://", "#"))]
    assert not [p for p in files if (ROOT / p.partition("#")[0]).exists()]


def test_the_version_is_stated_once():
    """Every other file that a release is made of reads it."""
    files = [ROOT / "pyproject.toml", ROOT / "setup.py", ROOT / "CITATION.cff"]
    assert not [p for p in files if re.search(r"""^\s*version\s*[:=]\s*["'\d]""", p.read_text(), re.M)]


def test_setuptools_of_before_2025_reads_pyproject():
    """pyproject.toml suits setuptools 68 to 76, which refuse every form of `license` that 77 accepts."""
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^requires = \["setuptools>=68"', text, re.M)
    assert not re.search(r"^license(-files)? *=", text, re.M)
    assert re.search(r'^dynamic = \[.*"license".*\]', text, re.M)


@pytest.fixture
def build_ext(monkeypatch):
    """Return setup.py's build_ext with a stand-in compiler that only has attributes."""
    monkeypatch.setenv("FASTVAE_NO_EXTENSION", "1")
    said = {}
    monkeypatch.setattr(setuptools, "setup", said.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert said["ext_modules"] == []

    def build(**compiler):
        command = said["cmdclass"]["build_ext"](setuptools.Distribution())
        command.extensions, command.compiler = [], SimpleNamespace(**compiler)
        command.build_extensions()

    return build


@pytest.mark.parametrize("attribute", ["compiler_so_cxx", "compiler_so"])
def test_a_missing_compiler_is_explained(build_ext, attribute):
    compiler = {"compiler_so": ["cc"], "compiler_cxx": ["c++"], attribute: ["no-such-compiler", "-O2"]}
    with pytest.raises(SystemExit, match="no-such-compiler.*apt-get install g[+][+].*FASTVAE_NO_EXTENSION=1"):
        build_ext(compiler_type="unix", **compiler)


def test_microsofts_compiler_is_refused(build_ext):
    with pytest.raises(SystemExit, match="Microsoft's compiler lacks.*FASTVAE_NO_EXTENSION=1"):
        build_ext(compiler_type="msvc")
