"""Puts tests/ on the import path, so that every test can say `from families import FAMILIES`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
