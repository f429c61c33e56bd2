"""`loratune doctor`: a healthy machine is fine, and each planted fault is found with the command that mends it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratune.cli import main
from loratune.explain.doctor import BAD, NOTE, OK, Check, examine, num_cores
from loratune.memory import memory_bytes

Examine = Callable[[], dict[str, list[Check]]]


@pytest.fixture
def look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Examine:
    """Examines the machine for runs in a new folder, with a cache of its own."""
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def checks() -> dict[str, list[Check]]:
        found: dict[str, list[Check]] = {}
        for check in examine(tmp_path):
            found.setdefault(check.name, []).append(check)
        return found

    return checks


def plant(site: Path, package: str, version: str) -> None:
    """Makes a folder in which a package claims to have another version."""
    info = site / f"{package}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")


def test_a_healthy_machine_is_fine(look: Examine, tmp_path: Path) -> None:
    found = look()
    assert list(found) == [
        *("python", "packages", "processor", "accelerator", "memory", "disk", "cache", "hub", "extras"),
    ]
    assert not [check for checks in found.values() for check in checks if check.status == BAD]
    packages = found["packages"][-1].found
    assert f"torch {torch.__version__}" in packages and "transformers" in packages and "datasets" not in packages
    assert found["cache"] == [Check("cache", OK, f"{tmp_path / 'cache'}: not used yet")]
    assert not (tmp_path / "cache").exists()  # looking changes nothing
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("package", "bound"), [("torch", "torch>=2.6"), ("rich", "rich>=13.7")])
def test_a_package_that_is_too_old(
    package: str, bound: str, look: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(tmp_path / "site", package, "0.1")
    monkeypatch.syspath_prepend(tmp_path / "site")
    bad = [check for check in look()["packages"] if check.status == BAD]
    assert [(check.found, check.command) for check in bad] == [
        (f"{package} is 0.1, outside >={bound.partition('>=')[2]}", f"pip install '{bound}'")
    ]


def test_a_cache_that_cannot_be_written(look: Examine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LORATUNE_CACHE", str(tmp_path / "file" / "cache"))
    (check,) = look()["cache"]
    assert (check.status, check.command) == (BAD, "export LORATUNE_CACHE=/another/folder")
    assert "cannot be written" in check.found


def test_a_conversion_that_is_not_whole(look: Examine, tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "gguf" / "abc"
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(b"{}")
    first, second = look()["cache"]
    assert first.status == OK and "used" in first.found
    assert second.status == NOTE and str(folder) in second.found


def test_a_full_disk(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5_000_000})()
    monkeypatch.setattr("loratune.files.shutil.disk_usage", lambda path: usage)
    found = look()
    assert [found[name][0].status for name in ("disk", "cache")] == [BAD, BAD]
    assert "0.0 GB free" in found["disk"][0].found and found["disk"][0].command == "df -h ."


def test_threads_that_are_held_down(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        check = look()["processor"][1]
        torch.set_num_threads(num_cores())
        fine = look()["processor"][1]
    finally:
        torch.set_num_threads(threads)
    assert fine.status == OK and fine.found == f"{num_cores()} threads on {num_cores()} cores"
    if num_cores() > 1:
        assert (check.status, check.command) == (NOTE, "unset OMP_NUM_THREADS")


def test_the_offline_state(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    for is_offline, word in ((True, "offline"), (False, "online")):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", is_offline)
        (check,) = look()["hub"]
        assert (check.status, check.found.split(":")[0]) == (OK, word)


def test_what_breaks_a_check_is_its_finding(look: Examine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("the driver is too old\nmore lines")

    monkeypatch.setattr(torch.cuda, "device_count", broken)
    (check,) = look()["accelerator"]
    assert (check.status, check.found) == (BAD, "RuntimeError: the driver is too old")
    assert check.command.startswith("pip install --force-reinstall")


def test_memory_is_within_the_total() -> None:
    available, total = memory_bytes()
    assert 0 < available <= total


def test_exit_codes_and_both_ways_of_showing(
    look: Examine, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    assert main.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True and {check["status"] for check in report["checks"]} <= {OK, NOTE}
    plant(tmp_path / "site", "numpy", "1.0")
    monkeypatch.syspath_prepend(tmp_path / "site")
    assert main.run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗ packages" in out and "pip install 'numpy>=1.26'" in out and "Not fine: 1 of" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    assert main.run(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False
