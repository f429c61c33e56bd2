"""What the machine reports about this process, and what a run asks of it."""

import sys
from pathlib import Path

import torch

from loratune import files
from loratune.adapter.adapter import Adapter
from loratune.errors import ConfigError

# How PyTorch says that memory ran out where it has no class of error for it (CPU, MPS, cuBLAS).
_OUT_OF_MEMORY = ("DefaultCPUAllocator", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_SLACK_BYTES = 1 << 20  # JSON files, headers, whole blocks


def peak_memory_bytes(device: torch.device) -> int:
    """Returns the peak memory so far: allocated on a CUDA device, resident in main memory otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    if sys.platform == "linux":  # ru_maxrss would be that of whoever started this process, if it was larger
        status = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kilobytes elsewhere


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whichever device."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def checkpoint_bytes(adapter: Adapter) -> int:
    """Returns about how many bytes a checkpoint takes: the adapter's file, the parameters, and two moments of each.

    A factor with a `start` is written for others as rank 2 r.
    """
    trained = sum(parameter.numel() * parameter.element_size() for _, parameter in adapter.named_parameters())
    doubled = any(factor.A0 is not None for factor in adapter.factors.values())
    return trained * (5 if doubled else 4) + _SLACK_BYTES


def check_space(output: Path, num_bytes: int) -> None:
    """Raises ConfigError unless the disk has that much room."""
    free = files.free_bytes(output)
    if free < num_bytes:
        raise ConfigError(
            f"the disk of {output} is too full for the checkpoints: {free / 1e6:,.0f} MB are free, "
            f"{num_bytes / 1e6:,.0f} MB are needed. Free space, choose another output directory, or set a smaller keep."
        )
