"""Whether the tests bite: small faults are put into the code one at a time, and the tests of its area have to notice.

    make mutants                    300 of them, chosen with a fixed seed; goes on where it was interrupted
    make mutants ARGS="--number 20 --jobs 1"
    make mutants ARGS=--report      what was found so far, as Markdown

A mutant lives in memory only: a forked child, in which torch is imported already, gets the changed module from an
import hook and runs tests of its area until one fails (killed), time runs out (killed), or all pass (survived). Which
tests: those that came by the changed line when they ran on the code as it is, the quickest first, up to MAX_SECONDS;
where none did, or what does is another process, all of the area. The tree is copied first, so that work on it goes on
beside this.
"""

import argparse
import ast
import hashlib
import importlib.abc
import importlib.util
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results" / "mutants.jsonl"
SEED, MAX_BYTES = 0, 8 << 30
MAX_SECONDS = 120.0  # of tests for one mutant, by their time on the code as it is
ENDS = {0: "survived", 5: "empty"}  # pytest's exit codes; 5: every test of the files is left out
# Code -> the tests of its area.
AREAS: dict[str, list[str]] = {
    "adapter": ["adapter", "compat", "parity", "export", "report/test_adapter_reports.py"],
    "train/loop.py": ["train/test_loop.py", "faults/test_nonfinite.py", "faults/test_memory.py", "train/test_resume.py",
                      "train/test_watch.py", "faults/test_sabotage.py", "faults/test_crash.py"],
    "train/checkpoint.py": ["train/test_checkpoint.py", "faults/test_checkpoint_faults.py", "train/test_resume.py",
                            "faults/test_crash.py"],
    "data/encode.py": ["data/test_encode.py", "data/test_templates.py", "data/test_masks.py", "data/test_dataset.py"],
    "data/templates.py": ["data/test_templates.py", "data/test_encode.py", "data/test_template_families.py"],
    "data/masks.py": ["data/test_masks.py", "data/test_templates.py", "data/test_encode.py",
                      "data/test_template_families.py"],
}  # fmt: skip
IN_PROCESS = {area for area in AREAS if not area.startswith("train/")}  # the tests of train fork, and start others

# ---- mutations ------------------------------------------------------------------------------------------------------

_COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
            ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In}  # fmt: skip
_ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
               ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr}  # fmt: skip
_BOOLEAN = {ast.And: ast.Or, ast.Or: ast.And}
_UNTOUCHED = {"annotation", "returns", "decorator_list", "type_params", "type_comment", "exc"}  # fields
_STATEMENTS = (ast.Expr, ast.Assign, ast.AugAssign, ast.Raise, ast.Return, ast.Delete)

Change = Callable[[], None]


def mutations(tree: ast.AST) -> Iterator[tuple[int, Change]]:
    """Yields (line, what makes the change in the tree); the same ones in the same order for the same source."""
    for parent, field, index, node in _children(tree):
        for change in _changes(parent, field, index, node):
            yield getattr(node, "lineno", getattr(parent, "lineno", 0)), change
        yield from mutations(node)


def _children(node: ast.AST) -> Iterator[tuple[ast.AST, str, int | None, Any]]:
    """Yields what may be changed: no types, texts, decorators, nor the text of an error."""
    for field, value in ast.iter_fields(node):
        if field in _UNTOUCHED or isinstance(node, ast.JoinedStr):
            continue
        if isinstance(value, list):
            yield from ((node, field, i, each) for i, each in enumerate(value) if isinstance(each, ast.AST))
        elif isinstance(value, ast.AST):
            yield node, field, None, value


def _changes(parent: ast.AST, field: str, index: int | None, node: Any) -> Iterator[Change]:
    def put(new: ast.AST) -> Change:
        def change() -> None:
            ast.copy_location(new, node)
            if index is None:
                setattr(parent, field, new)
            else:
                getattr(parent, field)[index] = new
            ast.fix_missing_locations(new)

        return change

    def operator(owner: Any, name: str, at: int | None, table: dict[Any, Any]) -> Iterator[Change]:
        old = getattr(owner, name) if at is None else getattr(owner, name)[at]
        if type(old) in table:
            new = table[type(old)]()
            yield (
                (lambda: setattr(owner, name, new))
                if at is None
                else (lambda: getattr(owner, name).__setitem__(at, new))
            )

    if isinstance(node, ast.Compare):
        for at in range(len(node.ops)):
            yield from operator(node, "ops", at, _COMPARE)
    elif isinstance(node, ast.BinOp | ast.AugAssign):
        yield from operator(node, "op", None, _ARITHMETIC)
    elif isinstance(node, ast.BoolOp):
        yield from operator(node, "op", None, _BOOLEAN)
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield put(node.operand)
    elif isinstance(node, ast.Constant) and not (field == "value" and isinstance(parent, ast.Expr)):
        yield from (put(ast.Constant(value)) for value in _other(node.value))
    elif isinstance(node, ast.If | ast.While | ast.IfExp):
        yield lambda: setattr(node, "test", ast.copy_location(ast.UnaryOp(ast.Not(), node.test), node.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield lambda: setattr(node, "ifs", node.ifs[1:])
    elif isinstance(node, ast.Call):
        yield from ((lambda at=at: node.keywords.pop(at)) for at, each in enumerate(node.keywords) if each.arg)
    if isinstance(node, _STATEMENTS) and not _is_text(node):
        yield put(ast.Return(ast.Constant(None)) if isinstance(node, ast.Return) else ast.Pass())


def _other(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    return [value * 2 or 1.0] if isinstance(value, float) else []


def _is_text(node: Any) -> bool:
    """A docstring, a plain assignment of a module or a return of nothing: deleting it changes nothing or everything."""
    value = getattr(node, "value", None)
    if isinstance(node, ast.Return):
        return value is None or isinstance(value, ast.Constant)
    if isinstance(node, ast.Assign):
        return isinstance(node.targets[0], ast.Name) and node.col_offset == 0
    return isinstance(value, ast.Constant)


@dataclass(frozen=True)
class Mutant:
    """One changed place: `number` counts the mutations of its file, `digest` is that of the file's text."""

    file: str
    number: int
    line: int
    digest: str

    def tree(self, source: str) -> ast.Module:
        tree = ast.parse(source)
        list(mutations(tree))[self.number][1]()
        return ast.fix_missing_locations(tree)

    def difference(self, source: str) -> tuple[str, str]:
        """Returns the first line that differs, before and after, in the way `ast` writes it."""
        before, after = ast.unparse(ast.parse(source)).splitlines(), ast.unparse(self.tree(source)).splitlines()
        at = next((i for i, pair in enumerate(zip(before, after)) if pair[0] != pair[1]), len(after) - 1)
        return before[at].strip(), after[at].strip()


def every_mutant(src: Path) -> list[Mutant]:
    found: list[Mutant] = []
    for area in AREAS:
        path = src / "loratune" / area
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            source = file.read_text("utf-8")
            digest = hashlib.sha256(source.encode()).hexdigest()[:12]
            name = file.relative_to(src / "loratune").as_posix()
            found += [Mutant(name, i, line, digest) for i, (line, _) in enumerate(mutations(ast.parse(source)))]
    return found


# ---- running --------------------------------------------------------------------------------------------------------


class _Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives one module from a changed tree."""

    def __init__(self, name: str, path: Path, tree: ast.Module) -> None:
        self._name, self._path, self._tree = name, path, tree

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_file_location(fullname, self._path, loader=self)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._tree, str(self._path), "exec"), module.__dict__)


class _Watch:
    """A plugin that notes the seconds of each test and the lines of our code it came by, and writes them at the end.

    What a fixture of several tests ran counts for every test of the file.
    """

    def __init__(self, copy: Path, output: Path) -> None:
        self._output, self._prefix = output, str(copy / "src" / "loratune") + "/"
        self._watched = tuple(self._prefix + area for area in AREAS)
        self._setup: set[tuple[str, int]] = set()
        self._lines: set[tuple[str, int]] = set()
        self._tests: dict[str, tuple[float, set[tuple[str, int]]]] = {}
        self._began = 0.0

    def pytest_runtest_setup(self, item: Any) -> None:
        self._lines, self._began = self._setup, time.monotonic()
        sys.settrace(self._trace)

    def pytest_runtest_call(self, item: Any) -> None:
        self._lines = set()
        self._tests[item.nodeid] = (0.0, self._lines)

    def pytest_runtest_teardown(self, item: Any) -> None:
        sys.settrace(None)
        if item.nodeid in self._tests:
            self._tests[item.nodeid] = (time.monotonic() - self._began, self._tests[item.nodeid][1])

    def pytest_sessionfinish(self) -> None:
        found = {
            test: {"seconds": seconds, "lines": sorted(f"{file}:{line}" for file, line in lines | self._setup)}
            for test, (seconds, lines) in self._tests.items()
        }
        self._output.write_text(json.dumps(found), "utf-8")

    def _trace(self, frame: Any, event: str, argument: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._watched):
            return None
        lines, file = self._lines, frame.f_code.co_filename.removeprefix(self._prefix)

        def line(frame: Any, event: str, argument: Any) -> Any:
            lines.add((file, frame.f_lineno))
            return line

        return line(frame, event, argument)


def run(
    copy: Path, tests: list[str], seconds: float, mutant: Mutant | None = None, watch: Path | None = None
) -> tuple[str, float]:
    """Runs tests in a forked child; returns ("survived" | "killed" | "time" | "empty", seconds).

    With `watch` the tests' times and lines are written there.
    """
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = _in_child(copy, tests, mutant, watch)
        finally:
            os._exit(code)
    while time.monotonic() - began < seconds:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return ENDS.get(os.waitstatus_to_exitcode(status), "killed"), time.monotonic() - began
        time.sleep(0.02)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "time", time.monotonic() - began


def _in_child(copy: Path, tests: list[str], mutant: Mutant | None, watch: Path | None) -> int:
    import pytest

    worker = os.getppid()
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_BYTES, MAX_BYTES))
    os.chdir(copy)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    if mutant is not None:
        path = copy / "src" / "loratune" / mutant.file
        name = "loratune." + mutant.file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        sys.meta_path.insert(0, _Changed(name, path, mutant.tree(path.read_text("utf-8"))))
    options = ["-x", "-q", "-p", "no:cacheprovider", "--hypothesis-seed=0", "-m", "not slow and not full and not model"]
    plugins = [] if watch is None else [_Watch(copy, watch)]
    return int(pytest.main([*options, f"--basetemp={copy / f'temporary-{worker}'}", *tests], plugins))


def warm_up(copy: Path) -> None:
    """Imports what is heavy, and nothing of loratune."""
    sys.path[:0] = [str(copy / "src"), str(copy / "tests")]
    os.environ["PYTHONPATH"] = str(copy / "src")
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import hypothesis  # noqa: F401
    import peft  # noqa: F401
    import pytest  # noqa: F401
    import torch
    from transformers import (  # noqa: F401
        BertForSequenceClassification,
        Gemma3ForCausalLM,
        GPT2LMHeadModel,
        LlamaForCausalLM,
        Qwen2ForCausalLM,
    )

    torch.set_num_threads(1)
    assert not any(name.split(".")[0] == "loratune" for name in sys.modules)


def in_workers(jobs: int, items: list[Any], do: Callable[[Any], None]) -> None:
    """Calls `do` on every item, in `jobs` forked processes; raises SystemExit where one of them failed."""
    pids: list[int] = []
    for number in range(jobs):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 1
        try:
            for item in items[number::jobs]:
                do(item)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if max(os.waitpid(pid, 0)[1] for pid in pids):
        raise SystemExit("a worker failed; its error stands above")


def _tests_of(area: str, copy: Path) -> list[str]:
    paths = [copy / "tests" / each for each in AREAS[area]]
    missing = [path for path in paths if not path.exists()]
    if missing:
        raise SystemExit(f"{missing[0]} is not there: mend AREAS")
    files = [file for path in paths for file in (sorted(path.glob("test_*.py")) if path.is_dir() else [path])]
    return [str(file.relative_to(copy)) for file in files]


class Watched:
    """The tests of some areas, as they ran on the code as it is."""

    def __init__(self, copy: Path, areas: set[str], jobs: int) -> None:
        self._files = {area: _tests_of(area, copy) for area in areas}
        found: dict[str, dict[str, Any]] = {}

        def place(file: str) -> Path:
            return copy / ("watched-" + file.replace("/", "-") + ".json")

        def watch(file: str) -> None:
            outcome, seconds = run(copy, [file], 900, watch=place(file))
            print(f"{file}: {seconds:.0f} s", flush=True)
            if outcome not in ENDS.values():
                raise SystemExit(f"{file} fails on the code as it is ({outcome}): mend that first.")

        every = sorted({file for files in self._files.values() for file in files})
        in_workers(jobs, every, watch)
        for file in every:
            found |= json.loads(place(file).read_text("utf-8"))
        self._tests = found
        self._lines = {test: set(about["lines"]) for test, about in found.items()}

    def chosen(self, mutant: Mutant) -> tuple[list[str], float]:
        """Returns the tests for a mutant, the ones named after its module first, and their seconds."""
        area, stem = area_of(mutant), Path(mutant.file).stem
        every = [test for test in self._tests if test.split("::")[0] in self._files[area]]
        came_by = [test for test in every if f"{mutant.file}:{mutant.line}" in self._lines[test]]
        tests = came_by if came_by and area in IN_PROCESS else every
        taken, total = list[str](), 0.0
        for test in sorted(tests, key=lambda test: (stem not in Path(test.split("::")[0]).stem, self._seconds(test))):
            if total + self._seconds(test) <= MAX_SECONDS:
                taken.append(test)
                total += self._seconds(test)
        return taken, total

    def _seconds(self, test: str) -> float:
        return self._tests[test]["seconds"]


def area_of(mutant: Mutant) -> str:
    return next(area for area in AREAS if mutant.file == area or mutant.file.startswith(area + "/"))


def known() -> dict[tuple[str, int, str], dict[str, Any]]:
    lines = RESULTS.read_text("utf-8").splitlines() if RESULTS.exists() else []
    entries = [json.loads(line) for line in lines]
    return {(entry["file"], entry["number"], entry["digest"]): entry for entry in entries}


def rank(mutant: Mutant) -> str:
    """An order that stays as it is where another file changes."""
    return hashlib.sha256(f"{SEED}:{mutant.file}:{mutant.number}".encode()).hexdigest()


def chosen_mutants(src: Path, number: int) -> list[Mutant]:
    return sorted(every_mutant(src), key=rank)[:number]


def work(number: int, jobs: int, copy: Path) -> None:
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "*.egg-info", "results", "runs", "__pycache__"))
    chosen = chosen_mutants(copy / "src", number)
    done = known()
    todo = [each for each in chosen if (each.file, each.number, each.digest) not in done]
    print(f"{len(chosen)} mutants, {len(todo)} of them not tried yet", flush=True)
    if not todo:
        return
    warm_up(copy)
    watched = Watched(copy, {area_of(mutant) for mutant in todo}, jobs)

    def try_one(mutant: Mutant) -> None:
        tests, seconds = watched.chosen(mutant)
        outcome, taken = run(copy, tests, 3 * seconds + 20, mutant)
        before, after = mutant.difference((copy / "src" / "loratune" / mutant.file).read_text("utf-8"))
        entry = {**asdict(mutant), "before": before, "after": after, "outcome": outcome, "seconds": round(taken, 1)}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        print(f"{outcome:8} {taken:5.1f} s  {mutant.file}:{mutant.line}  {after}", flush=True)

    in_workers(jobs, todo, try_one)


def report(number: int) -> str:
    done = known()
    keys = [(each.file, each.number, each.digest) for each in chosen_mutants(ROOT / "src", number)]
    entries = [done[key] for key in keys if key in done]
    survived = [entry for entry in entries if entry["outcome"] == "survived"]
    lines = ["| module | mutants | killed |", "|---|---|---|"]
    total = Counter(entry["file"] for entry in entries)
    alive = Counter(entry["file"] for entry in survived)
    lines += [f"| `{file}` | {total[file]} | {total[file] - alive[file]} |" for file in sorted(total)]
    killed = len(entries) - len(survived)
    lines += [f"| all | {len(entries)} | {killed} ({killed / max(1, len(entries)):.1%}) |", "", "Survivors:", ""]
    for entry in sorted(survived, key=lambda entry: (entry["file"], entry["line"])):
        lines.append(f"- `{entry['file']}:{entry['line']}`: `{entry['before']}` -> `{entry['after']}`")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=300)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--report", action="store_true")
    given = parser.parse_args()
    if not given.report:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            work(given.number, given.jobs, Path(folder) / "copy")
    print(report(given.number))


if __name__ == "__main__":
    main()
