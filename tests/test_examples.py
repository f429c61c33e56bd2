"""The example runs as a reader would run it, is short, and needs nothing of this package."""

import re
import subprocess
import sys
from pathlib import Path

LOOP = Path(__file__).parents[1] / "examples" / "loop.py"


def test_the_whole_method_in_a_hundred_lines(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(LOOP)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    found = re.fullmatch(
        r"4 layers adapted, ([\d,]+) parameters trained\n"
        r"loss before (\d+\.\d+), after (\d+\.\d+)\n"
        r"merged: largest difference (\d\.\de-\d\d)\n",
        done.stdout,
    )
    assert found, done.stdout
    assert int(found[1].replace(",", "")) == 4 * 8 * (64 + 64)  # layers, rank, inputs and outputs
    before, after, difference = map(float, found.groups()[1:])
    assert before > 4 and after < 0.5
    assert 0 < difference < 1e-4  # in another order of adding up
    assert done.stderr == "" and list(tmp_path.iterdir()) == []


def test_it_is_at_most_a_hundred_lines_and_imports_nothing_of_ours() -> None:
    text = LOOP.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert "import loratune" not in text and "from loratune" not in text and "peft" not in text
