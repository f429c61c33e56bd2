"""What may import what: parsed from every file, functions' own imports included."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratune

_ROOT = Path(loratune.__file__).parent
# A part may import those of lower levels and itself; adapter and data, on one level, never each other.
_LEVELS = {
    "errors": 0, "language": 0, "memory": 0, "files": 1, "adapter": 2, "data": 2, "model": 3, "evaluate": 4, "tasks": 5,
    "train": 6, "ladder": 7,
    # They read values and run directories, and nothing above imports them.
    "report": 8, "export": 8, "explain": 8, "serve": 8, "compat": 8,
    "plan": 9,
    "prepare": 10, "outputs": 10, "api": 11, "contest": 12, "demo": 12, "cli": 13,
}  # fmt: skip
# What a part may need beyond the standard library and loratune; elsewhere anything that pyproject.toml names.
_THIRD_PARTIES = {
    "errors": set[str](),
    "language": set[str](),
    "memory": set[str](),
    "files": set[str](),
    "adapter": {"torch", "safetensors", "numpy"},
    "data": {"numpy", "pyarrow", "PIL", "datasets", "jinja2"},
}


def part_of(module: str) -> str:
    """loratune.adapter.fused -> adapter; loratune itself -> the empty string."""
    return module.split(".")[1] if "." in module else ""


def module_of(path: Path) -> str:
    parts = ("loratune", *path.relative_to(_ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, with its line; `from loratune import files` counts as loratune.files."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            for alias in node.names:
                inner = any(path.exists() for path in (_ROOT / f"{alias.name}.py", _ROOT / alias.name))
                name = f"loratune.{alias.name}" if node.module == "loratune" and inner else node.module
                yield node.lineno, name or ""


_FILES = sorted(path for path in _ROOT.rglob("*.py") if path != _ROOT / "__init__.py")


def test_every_part_has_its_level() -> None:
    assert {part_of(module_of(path)) for path in _FILES} <= _LEVELS.keys()
    assert len(_FILES) > 40


@pytest.mark.parametrize("path", _FILES, ids=module_of)
def test_imports_go_down(path: Path) -> None:
    part = part_of(module_of(path))
    for line, name in imports(path):
        if name.split(".")[0] != "loratune":
            continue
        other = part_of(name)
        where = f"{path.relative_to(_ROOT)}:{line}: {part} imports {name}"
        assert other == part or (other and _LEVELS[other] < _LEVELS[part]), where


@pytest.mark.parametrize("path", _FILES, ids=module_of)
def test_third_parties_stay_where_they_belong(path: Path) -> None:
    part = part_of(module_of(path))
    for line, name in imports(path):
        top = name.split(".")[0]
        if top == "loratune" or top in sys.stdlib_module_names:
            continue
        where = f"{path.relative_to(_ROOT)}:{line}: {part} imports {name}"
        assert top != "peft", f"{where}; PEFT is an oracle of the tests only"
        assert part not in _THIRD_PARTIES or top in _THIRD_PARTIES[part], where


def loaded_by(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after running some code."""
    script = f"{code}; import sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(run.stdout.split())


def test_importing_loratune_loads_nothing_heavy() -> None:
    assert not loaded_by("import loratune; dir(loratune)") & {"torch", "transformers", "pydantic", "numpy", "pyarrow"}


def test_the_adapter_core_runs_without_transformers() -> None:
    code = "from loratune import LoraConfig, attach, load_adapter; from loratune.adapter import merge, peft_format"
    loaded = loaded_by(code)
    assert "torch" in loaded and not loaded & {"transformers", "peft", "pydantic", "pyarrow"}


def test_every_public_name_resolves() -> None:
    for name in loratune.__all__:
        assert getattr(loratune, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'atach'"):
        loratune.atach  # noqa: B018
