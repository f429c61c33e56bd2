"""Nothing in the package reads or writes a program as data: no pickle, no torch.load, no eval, no code from a hub."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import loratune

PACKAGE = Path(loratune.__file__).parent
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
CALLS = {"eval", "exec", "__import__", "torch.load", "torch.save", "torch.hub.load", "numpy.load", "np.load",
         "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}  # fmt: skip
TRUE_NEVER = {"trust_remote_code", "allow_pickle", "shell"}


def found_in(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (each.name for each in node.names if each.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield from (f"{module}.{each.name}" for each in node.names if f"{module}.{each.name}" in CALLS)
            if module.split(".")[0] in MODULES:
                yield module
        elif isinstance(node, ast.Call):
            if (name := ast.unparse(node.func)) in CALLS:
                yield name
            yield from (f"{each.arg}=True" for each in node.keywords if each.arg in TRUE_NEVER and _may_be_true(each))
            yield from (
                "weights_only=False" for each in node.keywords if each.arg == "weights_only" and not _is(each, True)
            )


def _is(keyword: ast.keyword, value: bool) -> bool:
    return isinstance(keyword.value, ast.Constant) and keyword.value.value is value


def _may_be_true(keyword: ast.keyword) -> bool:
    return not _is(keyword, False)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "import a, dill as d", "from pickle import loads", "from torch import load",
        "torch.load('x')", "f(torch.load(p, weights_only=True))", "model.from_pretrained(p, trust_remote_code=flag)",
        "np.load(p, allow_pickle=True)", "load(p, weights_only=False)", "def f():\n    exec(text)",
    ],
)  # fmt: skip
def test_the_search_finds_it(source: str) -> None:
    assert list(found_in(source))


def test_the_package_has_none() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    found = {(path.relative_to(PACKAGE).as_posix(), each) for path in files for each in found_in(path.read_text())}
    assert found == set()
