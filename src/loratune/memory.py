"""How much main memory there is."""

import os
from pathlib import Path

_CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> tuple[int, int]:
    """Returns (available, total) main memory, within a container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # macOS tells the total alone
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total, total
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if len(line.split()) > 1}
    available, total = table["MemAvailable"], table["MemTotal"]
    limits = [int(text) for path in _CONTAINER_LIMITS if (text := _text(Path(path))).isdigit()]
    return min(available, *limits, total), min(total, *limits, total)


def _text(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
