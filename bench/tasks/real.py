"""LoRA against full fine-tuning, a head alone and floors on real tasks: MiniLM in English, Gemma 3 270M in Ukrainian.

    python bench/tasks/real.py                       all six tasks: about 55 minutes on two cores
    python bench/tasks/real.py --only section,size   some of them
    python bench/tasks/real.py --share 0.1 --steps 3 --folder DIR --results DIR --now      to try it

Each run is a process of its own, begun when the machine is idle; finished ones are kept in the folder, so that what was
interrupted goes on. Writes tasks.json and tasks.md.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from run import machine, wait_until_idle  # noqa: E402
from specs import SPECS  # noqa: E402

from report import report  # noqa: E402


def main(options: argparse.Namespace) -> None:
    """Does what is missing, task by task, and writes what there is after each."""
    names = [each for each in options.only.split(",") if each] or list(SPECS)
    unknown = [name for name in names if name not in SPECS]
    if unknown:
        raise SystemExit(f"unknown task {unknown[0]!r}; expected some of {', '.join(SPECS)}.")
    for name in names:
        folder, spec = options.folder / name, SPECS[name]
        if not (folder / "about.json").exists():
            spec.write(folder, options.share)
        for method, trains in spec.methods:
            for seed in range(spec.seeds if trains else 1):
                one(options, name, method, seed)
        write(options)


def one(options: argparse.Namespace, name: str, method: str, seed: int) -> None:
    """Does one run, unless its file is there, and says what it came to."""
    file = run_file(options.folder, name, method, seed)
    if file.exists():
        return
    if not options.now:
        wait_until_idle()
    begun = time.monotonic()
    more = ["--steps", str(options.steps)] if options.steps else []
    command = ["--folder", str(options.folder), *more, "--run", name, method, str(seed)]
    done = subprocess.run([sys.executable, __file__, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}, {method}, seed {seed} failed:\n{done.stderr[-3000:]}")
    found = json.loads(file.read_text("utf-8"))
    metric = SPECS[name].metrics[0]
    print(
        f"{time.strftime('%H:%M:%S')} {name}: {method}, seed {seed}: {metric} {found['figures'][metric]['value']}, "
        f"{found['seconds']:.0f} s of training, {time.monotonic() - begun:.0f} s in all", flush=True,
    )  # fmt: skip


def run_file(folder: Path, name: str, method: str, seed: int) -> Path:
    return folder / name / f"{method.replace(', ', '-').replace(' ', '-')}-{seed}.json"


def write(options: argparse.Namespace) -> None:
    """Writes the figures of every task that is complete."""
    tasks: dict[str, Any] = {}
    for name, spec in SPECS.items():
        wanted = {
            method: [run_file(options.folder, name, method, seed) for seed in range(spec.seeds if trains else 1)]
            for method, trains in spec.methods
        }
        if all(file.exists() for files in wanted.values() for file in files):
            runs = {method: [json.loads(file.read_text("utf-8")) for file in files] for method, files in wanted.items()}
            tasks[name] = {"about": json.loads((options.folder / name / "about.json").read_text("utf-8")), "runs": runs}
    options.results.mkdir(parents=True, exist_ok=True)
    text = report(tasks, machine())
    for task in tasks.values():
        for runs in task["runs"].values():
            for run in runs:
                del run["counts"]  # one entry a test row: in the folder
    stored = {"machine": machine(), "tasks": tasks}
    (options.results / "tasks.json").write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    (options.results / "tasks.md").write_text(text, "utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="tasks, separated by commas")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-tasks"), metavar="DIR")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results", metavar="DIR")
    parser.add_argument("--share", type=float, default=1.0, help="of the rows, for a trial")
    parser.add_argument("--steps", type=int, help="at most, for a trial")
    parser.add_argument("--now", action="store_true", help="do not wait for an idle machine: no figures to report")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "METHOD", "SEED"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.run:
        from methods import run

        task, method, seed = chosen.run
        found = run(SPECS[task], chosen.folder / task, method, int(seed), chosen.steps)
        run_file(chosen.folder, task, method, int(seed)).write_text(json.dumps(found), "utf-8")
    else:
        main(chosen)
