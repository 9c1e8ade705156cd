"""The compiler's cache on disk, which knows a graph by its ops' names, not by their formulas."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path

from torch.compiler import config


def tag_cache_keys() -> None:
    """Tag the keys of torch's cache of compiled graphs with a fingerprint of fastvae's source.

    A compiled graph may contain an op's formulas, while its key in the cache has the op's name only. Without
    the tag, a graph compiled by another version of fastvae would be reused.
    """
    tag = _tag()
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


@functools.cache
def _tag() -> str:
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return f" fastvae-{digest.hexdigest()[:16]}"
