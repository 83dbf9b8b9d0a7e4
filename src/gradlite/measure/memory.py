"""How much memory the run has taken at most."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """On CUDA the allocator's peak on `device`; elsewhere the process's peak resident set, model loading included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
