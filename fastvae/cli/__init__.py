"""Command line ``python -m fastvae``, with one module per command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import __version__


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        if args.command == "info":
            from . import info

            info.run(args.json)
        elif args.command == "evaluate":
            from . import evaluate

            evaluate.run(args)
        else:
            from . import demo

            demo.run(args)
    except KeyboardInterrupt:
        print(f"\nfastvae {args.command}: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fastvae", description="Fused kernels for the objectives of variational autoencoders."
    )
    parser.add_argument("--version", action="version", version=f"fastvae {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    _add_demo(commands)
    _add_evaluate(commands)
    info = commands.add_parser(
        "info",
        help="print versions, devices and which implementation each op uses here",
        description="Print versions, devices, the state of the C++ extension, and which implementation each "
        "op uses on CPU and on GPU tensors.",
    )
    _add_json(info)
    return parser


def _add_json(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--json", action="store_true", help="print JSON on standard output, and nothing else there"
    )


def _add_output(command: argparse.ArgumentParser) -> None:
    """Add the options of what a command prints."""
    _add_json(command)
    command.add_argument(
        "--quiet",
        action="store_true",
        help="print only the results: no progress bars, settings, times and file names",
    )


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from . import latents

    demo = commands.add_parser(
        "demo",
        help="train two small VAEs, with the ELBO and with IWAE, and compare them",
        description="Train one VAE with the ELBO and one with IWAE on the same images, estimate the test "
        "log-likelihood of both with many importance samples, print a table and draw pictures. On the "
        "digits this takes about a minute.",
    )
    demo.add_argument(
        "--data",
        type=_path,
        metavar="FOLDER",
        help="folder with MNIST or Fashion-MNIST as IDX files, .gz or not (default: scikit-learn's digits)",
    )
    demo.add_argument(
        "--likelihood",
        default="bernoulli",
        metavar="NAME",
        help="what the digits are taken as: binary pixels (bernoulli), counts of ink (poisson, "
        "negative_binomial), classes (categorical), levels, numbers; an unknown name lists them all "
        "(default: %(default)s)",
    )
    demo.add_argument(
        "--posterior",
        default=latents.DIAGONAL,
        metavar="NAME",
        help=f"family of q(z|x): {', '.join(latents.POSTERIORS)} (default: %(default)s)",
    )
    demo.add_argument(
        "--prior",
        default=latents.STANDARD,
        metavar="NAME",
        help=f"p(z), with any posterior: {', '.join(latents.PRIORS)} (default: %(default)s)",
    )
    demo.add_argument(
        "--out",
        type=_path,
        default=Path("demo"),
        metavar="DIR",
        help="where pictures and models go (default: %(default)s)",
    )
    demo.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
    )
    demo.add_argument(
        "--epochs",
        type=_whole,
        metavar="N",
        help="passes over the training images (default: 100 for the digits, 10 for a folder)",
    )
    demo.add_argument(
        "--k",
        type=_whole,
        default=50,
        help="importance samples of the IWAE bound in training (default: %(default)s)",
    )
    demo.add_argument(
        "--latent",
        type=_whole,
        default=2,
        metavar="D",
        help="latent dimensions of both models (default: %(default)s)",
    )
    demo.add_argument(
        "--eval-k",
        type=_whole,
        default=5000,
        metavar="K",
        help="importance samples of the test log-likelihood (default: %(default)s)",
    )
    demo.add_argument(
        "--seed",
        type=lambda text: _whole(text, 0),
        default=0,
        metavar="S",
        help="seed of weights, batches and noise; the test set is always the same (default: %(default)s)",
    )
    _add_output(demo)


def _add_evaluate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from ..random import NOISES

    evaluate = commands.add_parser(
        "evaluate",
        help="estimate log p(x) of a saved data set under a saved model",
        description="Estimate log p(x) of every example by importance sampling; print a summary with its "
        "errors, and write results and a picture. Under torchrun the processes share the work.",
    )
    evaluate.add_argument(
        "model",
        type=_path,
        metavar="CHECKPOINT",
        help="a model of the demo, or a fastvae.VAE saved whole (--trust)",
    )
    evaluate.add_argument(
        "data",
        metavar="DATA",
        help="'digits', a folder of MNIST's IDX files (its test images), or an array in a .npy, .npz or .pt "
        "file; bytes are divided by 255, unless the model's likelihood takes integers, such as counts",
    )
    evaluate.add_argument(
        "--k", type=_whole, help="draws per example (default: 5000; with --tol the most, default 100000)"
    )
    evaluate.add_argument(
        "--tol", type=float, metavar="NATS", help="draw until each example's standard error is this small"
    )
    evaluate.add_argument(
        "--proposal",
        default="posterior",
        metavar="NAME",
        help="what z is drawn from: posterior, the model's q; adapted, fitted to each example's draws; "
        "refined, fitted to it by gradients; defensive, q and the prior in turn (default: %(default)s)",
    )
    evaluate.add_argument(
        "--noise",
        choices=NOISES,
        default="philox",
        help="independent draws (philox), or quasi-Monte-Carlo points (qmc) (default: %(default)s)",
    )
    evaluate.add_argument("--out", type=_path, metavar="FILE.npz", help="write results of every example")
    evaluate.add_argument(
        "--plot",
        nargs="?",
        type=_path,
        const=True,
        metavar="FILE.png",
        help="draw NLL against draws, and histograms (default: next to --out, else evaluation.png)",
    )
    evaluate.add_argument(
        "--checkpoint", type=_path, metavar="RUN.npz", help="save results as they come, and resume from them"
    )
    evaluate.add_argument(
        "--audit",
        type=_whole,
        metavar="N",
        help="estimate N examples once more by annealed importance sampling: is log p(x) too low?",
    )
    _add_run(evaluate)


def _add_run(evaluate: argparse.ArgumentParser) -> None:
    """Add the options of how evaluate computes."""
    evaluate.add_argument(
        "--batch-size",
        type=_whole,
        metavar="B",
        help="examples at a time (default: 100, on a GPU 500)",
    )
    evaluate.add_argument("--k-chunk", type=_whole, metavar="K", help="draws at a time (default: what fits)")
    evaluate.add_argument(
        "--shard",
        choices=("data", "samples", "none"),
        default="data",
        help="what processes share: examples, each example's draws, or nothing: this process works alone, "
        "ignoring torchrun's environment (default: %(default)s)",
    )
    evaluate.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="where to compute (default: %(default)s)"
    )
    evaluate.add_argument(
        "--seed", type=lambda text: _whole(text, 0), default=0, metavar="S", help="of the noise (default: 0)"
    )
    evaluate.add_argument(
        "--trust", action="store_true", help="load a pickled model, which may run code from the file"
    )
    _add_output(evaluate)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _whole(text: str, least: int = 1) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if not least <= value < 2**32:
        raise argparse.ArgumentTypeError(f"must be from {least} to {2**32 - 1}, got {value}")
    return value
