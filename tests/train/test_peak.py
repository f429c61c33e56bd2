"""What a process says of its own memory."""

import subprocess
import sys

import pytest
import torch

_CODE = "import torch; from loratune.train.measure import peak_memory_bytes as p; print(p(torch.device('cpu')))"


@pytest.mark.skipif(sys.platform != "linux", reason="what a child inherits is Linux's way")
def test_the_peak_is_not_that_of_whoever_started_the_process() -> None:
    own = torch.ones(2 * 10**9 // 4)  # touched, so resident
    peak = int(subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True).stdout)
    assert 10**8 < peak < own.numel() * 4 < 3 * 10**9
