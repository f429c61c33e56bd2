"""What the machine reports about this process."""

import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory so far: allocated on a CUDA device, resident in main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS
