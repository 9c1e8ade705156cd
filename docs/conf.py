"""Configuration of the documentation: ``sphinx-build -W --keep-going -n docs site``."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import fastvae

project = "fastvae"
author = "fastvae developers"
copyright = "2026, fastvae developers"
version = release = fastvae.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
    # MathJax in the site itself, so that formulas are rendered without a network.
    "sphinx-mathjax-offline",
]
exclude_patterns = ["experiments", "examples", "tutorials", "**/GALLERY_HEADER.rst"]
suppress_warnings = ["config.cache"]

# Pages

html_theme = "furo"
html_title = "fastvae"
html_static_path = ["_static"]
html_css_files = ["fastvae.css"]
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist", "attrs_inline"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# The API, from the docstrings

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
nitpicky = True
# Types in annotations: torch's and Python's have no inventory offline, and private names have no page.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|numpy|np|typing|collections|os|pathlib|matplotlib|pandas|nn|td)(\..*)?"),
    (r"py:class", r"typing_extensions\.\w+"),
    (r"py:.*", r"(Tensor|Any|Callable|Iterable|Iterator|Sequence|Mapping|Self|Path|Literal|Generator|T|P|R)"),
    (r"py:.*", r"(int|float|bool|str|None|object|tuple|list|dict|optional|callable|type|set|bytes)"),
    (r"py:.*", r"fastvae\.(core|inputs|estimation|objectives|vae|integrations|reference|kernels|cli)(\..*)?"),
    (r"py:.*", r"(.*\.)?_.*"),
    (r"py:mod", r"fastvae\.(ops|distributions)\.\w+"),
    (r"py:class", r"(Figure|DataFrame|Data|Decoder|Marginal|BetaTCTerms|\w+Arguments|\w+Options)"),
    (r"py:class", r"fastvae\.(ops|distributions|likelihoods)\.\w+\..*"),
]

# Tutorials, executed while the site is built

sphinx_gallery_conf = {
    "examples_dirs": "tutorials",
    "gallery_dirs": "auto_tutorials",
    "filename_pattern": r"/\d\d_",
    "abort_on_example_error": True,
    "capture_repr": (),
    "download_all_examples": False,
    "show_signature": False,
    "min_reported_time": 0,
    "remove_config_comments": True,
    "within_subsection_order": "FileNameSortKey",
}


def write_api() -> None:
    """Write a page for each public module, with an entry for each name in its ``__all__``."""
    titles = {
        "fastvae": "Objectives, models and evaluation",
        "fastvae.ops": "Ops",
        "fastvae.distributions": "Posteriors and priors",
        "fastvae.likelihoods": "Likelihoods",
        "fastvae.bounds": "Bounds",
        "fastvae.schedules": "Schedules",
        "fastvae.proposals": "Proposals",
        "fastvae.audit": "Audits",
        "fastvae.diagnostics": "Diagnostics",
        "fastvae.random": "Noise",
        "fastvae.quantize": "Vector quantisation",
    }
    # Methods that users call or write, by class; of the others the class is what they need.
    members = {
        **dict.fromkeys(("VAE", "Evaluation", "LogMarginal", "GradientMonitor", "Quantized"), ""),
        "Distribution": "rsample_log_prob, log_prob, mean, variance, sample, rsample, entropy, support",
        "FullNormal": "of",
        "Hierarchy": "forward, split",
        "Likelihood": "log_prob, log_likelihood, mean, sample, parameters_of",
        "Bound": "value, paths, check, route",
    }
    # Results that are returned, and have no public name.
    results = (
        *("objectives.log_weights.LogWeights", "objectives.beta_tc.BetaTCTerms"),
        *("objectives.marginalize.Marginal", "estimation.imputation.Imputation"),
        *("estimation.evaluation.audit.Audit", "estimation.evaluation.delta.Delta"),
    )
    folder = Path(__file__).parent / "api"
    text = "Results\n=======\n\nRecords that functions return.\n"
    text += "".join([f"\n.. autoclass:: fastvae.{name}\n" for name in results])
    written = {"results": text}
    for module, title in titles.items():
        value = fastvae if module == "fastvae" else getattr(fastvae, module.removeprefix("fastvae."))
        lines = [title, "=" * len(title), "", f".. py:module:: {module}", "", f"``{module}``", ""]
        if value is not fastvae and value.__doc__:
            lines += [inspect.cleandoc(value.__doc__), ""]
        for name in value.__all__:
            member = getattr(value, name)
            if not callable(member):
                continue
            kind = "class" if inspect.isclass(member) else "function"
            lines += [f".. auto{kind}:: {module}.{name}"]
            if name in members:
                lines += [f"   :members: {members[name]}".rstrip()]
            lines += [""]
        written[module] = "\n".join(lines)
    for name, text in written.items():
        file = folder / f"{name}.rst"
        if not file.exists() or file.read_text("utf-8") != text:
            file.write_text(text, "utf-8")


write_api()


def escape_axes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Escape the star of shapes such as ``[B, *event]``, and colons that napoleon reads as types."""
    if what == "attribute" and lines:
        lines[0] = lines[0].replace(": ", ", that is ", 1)
    lines[:] = [re.sub(r"(?<![\\*`\w])\*(?=[a-z_]+[\],])", r"\\*", line) for line in lines]


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escape_axes, priority=400)  # before napoleon
