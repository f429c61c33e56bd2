"""Puts tests/ on the import path, so that every test can say `from families import FAMILIES`."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers of two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")
