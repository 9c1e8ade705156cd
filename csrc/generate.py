"""Write the files that csrc's build includes: a likelihood and a unit are each registered by its file."""

from pathlib import Path

CSRC = Path(__file__).parent
INSTRUCTION_SETS = ("base", "avx2", "avx512")


def write(folder):
    """Write the lists of likelihoods, and a source for every unit and instruction set; return the sources.

    The folder is to be among those of includes.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(path.stem for path in (CSRC / "likelihoods").glob("*.hpp"))
    structs = ["".join(word.capitalize() for word in name.split("_")) for name in names]
    entries = (f"F({name}, {struct})" for name, struct in zip(names, structs, strict=True))
    lines = ["#pragma once", f"#define FASTVAE_LIKELIHOODS(F) {' '.join(entries)}", ""]
    (folder / "likelihoods.inc").write_text("\n".join(lines))
    lines = [f'#include "likelihoods/{name}.hpp"\n' for name in names]
    (folder / "likelihood_headers.inc").write_text("".join(lines))
    sources = []
    for unit in sorted((CSRC / "units").glob("*.cpp")):
        for instructions in INSTRUCTION_SETS:
            sources.append(folder / f"{unit.stem}_{instructions}.cpp")
            macros = f'#define FASTVAE_FOR_{instructions.upper()}\n#define FASTVAE_UNIT "units/{unit.name}"\n'
            sources[-1].write_text(macros + '#include "unit.hpp"\n')
    return sources
