"""Lists what lies in csrc/likelihoods for likelihood_loops.hpp: a likelihood is registered by its file."""

from pathlib import Path


def write(folder):
    """Write likelihoods.inc into a folder, which is to be among those of includes."""
    names = sorted(path.stem for path in (Path(__file__).parent / "likelihoods").glob("*.hpp"))
    structs = ["".join(word.capitalize() for word in name.split("_")) for name in names]
    entries = (f"F({name}, {struct})" for name, struct in zip(names, structs, strict=True))
    lines = [f'#include "likelihoods/{name}.hpp"' for name in names]
    lines.append(f"#define FASTVAE_LIKELIHOODS(F) {' '.join(entries)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / "likelihoods.inc").write_text("\n".join(lines) + "\n")
