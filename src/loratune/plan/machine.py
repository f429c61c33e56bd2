"""What this machine has, measured in about a second: free memory, the rate of matrix products, how fast memory reads.

Nothing is written.
"""

import ctypes
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from loratune.evaluate.samples import NUM_SAMPLES
from loratune.memory import memory_bytes
from loratune.train.measure import peak_memory_bytes

_MATRIX_SECONDS, _READ_SECONDS = 0.5, 0.2
_MAX_WEIGHTS = 1 << 26  # of a matrix that is made to measure with
_READ_BYTES = 1 << 27  # more than a cache holds


@dataclass(frozen=True)
class Machine:
    """What a plan needs of a machine. flops: a second, of matrix products in the model's own shapes; read: bytes of
    weights a second, where a few rows pass them; held: what this process holds now (Python, libraries, tokenizer,
    rows), of which a run needs the same.
    """

    device: str
    free_bytes: int
    held_bytes: int
    flops: float
    read: float


def look(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], num_tokens: int) -> Machine:
    """Measures the machine with products of `shapes` (outputs, inputs) for `num_tokens` tokens."""
    flops, read = matrix_rate(device, dtype, shapes, num_tokens), read_rate(device, dtype)
    held = 0 if device.type == "cuda" else live_bytes()
    return Machine(str(device), free_bytes(device) + held, held, flops, read)


def free_bytes(device: torch.device) -> int:
    """Returns the memory that is free now: the device's, or main memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else memory_bytes()[0]


def live_bytes() -> int:
    """Returns what this process holds in main memory, without what it freed and the allocator still keeps."""
    statm = Path("/proc/self/statm")
    if not statm.is_file():  # not Linux: the peak so far is near it
        return peak_memory_bytes(torch.device("cpu"))
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    pages = int(statm.read_text().split()[1])
    return pages * _page_bytes()


def _page_bytes() -> int:
    import resource

    return resource.getpagesize()


def matrix_rate(device: torch.device, dtype: torch.dtype, shapes: Sequence[tuple[int, int]], num_tokens: int) -> float:
    """Returns floating-point operations a second of x W^T, over the shapes in turn, for half a second."""
    pairs = [(torch.randn(num_tokens, i, dtype=dtype, device=device), _matrix(o, i, dtype, device)) for o, i in shapes]
    flops = sum(2 * x.numel() * w.shape[0] for x, w in pairs)

    def products() -> None:
        for x, w in pairs:
            _ = x @ w.T

    return flops / _median_seconds(products, _MATRIX_SECONDS, device)


def _matrix(outputs: int, inputs: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.randn(max(1, min(outputs, _MAX_WEIGHTS // inputs)), inputs, dtype=dtype, device=device)


def read_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Returns bytes of weights a second that a product with a few rows passes, which is what generating does."""
    w = torch.zeros(_READ_BYTES // dtype.itemsize // 1024, 1024, dtype=dtype, device=device)
    x = torch.ones(NUM_SAMPLES, 1024, dtype=dtype, device=device)
    return _READ_BYTES / _median_seconds(lambda: w @ x.T, _READ_SECONDS, device)  # as `model.decode` does


def _median_seconds(work: Callable[[], object], seconds: float, device: torch.device) -> float:
    """Returns the median time of work that is done for so many seconds: what else runs now and then has no part."""
    work()
    times: list[float] = []
    while sum(times) < seconds:
        start = _now(device)
        work()
        times.append(_now(device) - start)
    return statistics.median(times)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
