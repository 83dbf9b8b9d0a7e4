"""Whether two files or directories hold the same: their names alone would make two data sets called train.jsonl one.

Importing this module is light: no torch, no transformers.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

_PIECE_BYTES = 1 << 20
_NUM_PIECES = 32


@lru_cache(maxsize=64)
def fingerprint(source: str) -> str | None:
    """Twelve hexadecimal digits of what lay at a path when this process first asked; None for hub ids and what is embedded.

    Of a file longer than 32 MiB, 32 pieces spread evenly are read, so that a model of any size takes no time: training moves
    every piece of its weights. Of a directory what lies in it and in its folder ``data`` counts, but for hidden files.
    """
    path = Path(source).expanduser()
    if not path.exists():
        return None
    entries = sorted([*path.iterdir(), *path.glob("data/*")]) if path.is_dir() else [path]
    files = [entry for entry in entries if entry.is_file() and not entry.name.startswith(".")]
    digest = hashlib.sha256()
    for file in files:
        num_bytes = file.stat().st_size
        digest.update(f"{file.name} {num_bytes}\n".encode())
        step = max(_PIECE_BYTES, -(-num_bytes // _NUM_PIECES))
        with file.open("rb") as content:
            for start in range(0, num_bytes, step):
                content.seek(start)
                digest.update(content.read(_PIECE_BYTES))
    return digest.hexdigest()[:12]
