"""Keeps oneDNN, which multiplies bfloat16 matrices on a CPU, from hoarding code for sequence lengths that are over.

It compiles every product anew for every shape and keeps the last 1,024 of them, once in oneDNN and once in torch: with
lengths that vary some 16 MB stay behind in each step (measured: docs/log.md). A step uses about 25, so 64 lose no speed.
"""

import os

_NUM_KEPT = "64"


def limit_matmul_caches() -> None:
    """For the whole process, and to be called before its first product; what the user has set stays."""
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, _NUM_KEPT)
