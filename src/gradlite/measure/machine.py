"""What a measurement's figures depend on besides the code: the machine."""

import os
import platform
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Processor, threads, memory (bytes), and the GPU's name or None."""
    return {
        "processor": platform.machine(),
        "num_processors": os.cpu_count(),
        "num_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }
