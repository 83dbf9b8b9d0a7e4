"""What a measurement's figures depend on besides the code: the machine."""

import os
import platform
from pathlib import Path
from typing import Any

import torch

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def multiplies_bfloat16() -> bool:
    """Whether matrix products in bfloat16 have fast kernels here: on an accelerator, and on a CPU where oneDNN has them.

    (On x86 that takes AVX-512.) Elsewhere PyTorch falls back to loops of 4 to 50 times a float32 product's time, measured with
    AVX2 (docs/log.md).
    """
    if torch.accelerator.is_available():
        return True
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)  # not there in a build without oneDNN
    return supported is not None and bool(supported())


def has_huge_pages() -> bool:
    """Whether PyTorch was told to ask for huge pages (:mod:`gradlite.train.huge_pages`) and the system (Linux) gives them."""
    try:
        choice = _HUGE_PAGES.read_text(encoding="utf-8")
    except OSError:
        return False
    return os.environ.get("THP_MEM_ALLOC_ENABLE") == "1" and "[never]" not in choice


def machine() -> dict[str, Any]:
    """Processor and its vector instructions ("AVX2"), threads, whether tensors get huge pages, memory (bytes), and the GPU's
    name or None.
    """
    return {
        "processor": platform.machine(),
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "num_processors": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "huge_pages": has_huge_pages(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
