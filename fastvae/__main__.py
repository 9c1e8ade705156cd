"""python -m fastvae: the command line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import __version__


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

            info.run()
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

    demo = commands.add_parser(
        "demo",
        help="train two small VAEs, with the ELBO and with IWAE, and compare them",
        description="Train one VAE with the ELBO and one with IWAE on the same images, estimate the test log-likelihood of "
        "both with many importance samples, print a table and draw pictures. Takes about a minute on the digits.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder with MNIST or Fashion-MNIST as IDX files, also gzipped; without it, scikit-learn's 8x8 digits",
    )
    demo.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR", help="where pictures and models go")
    demo.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to compute")
    demo.add_argument(
        "--epochs",
        type=_count,
        metavar="N",
        help="passes over the training images; without it, 100 for the digits and 10 for a folder",
    )
    demo.add_argument("--k", type=_count, default=50, help="importance samples of the IWAE bound in training")
    demo.add_argument("--latent", type=_count, default=2, metavar="D", help="latent dimensions of both models")
    demo.add_argument(
        "--eval-k", type=_count, default=5000, metavar="K", help="importance samples of the test log-likelihood"
    )
    demo.add_argument(
        "--seed", type=int, default=0, metavar="S", help="of initial weights, batches and noise; not of the test set"
    )

    commands.add_parser(
        "info",
        help="print versions, devices and which implementation each op uses here",
        description="Print versions, devices, the state of the C++ extension, and which implementation each op uses on "
        "CPU and on GPU tensors.",
    )
    return parser


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}") from None
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
