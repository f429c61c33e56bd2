"""What `loratune plan` says before a run, beside that run: five configurations of Gemma 3 270M in fresh processes.

    python bench/plan.py                  all five, into bench/results/plan.json and plan.md
    python bench/plan.py --only fast      one, printed

Each configuration: a process that plans (estimate, and steps measured), then a process that trains. Compared are the
estimate and the measurement with the run: peak resident memory, seconds of a step (the run's mean, without its first),
and seconds from start to exit.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import work
from run import RESULTS, machine, wait_until_idle

NUM_ROWS, NUM_HELD_OUT, STEPS = 96, 16, 12
CONFIGURATIONS = {
    "fast": {"adapter": {"preset": "fast"}},
    "quality": {"adapter": {"preset": "quality"}},
    "deep": {"adapter": {"preset": "deep"}},
    "deep, recompute": {"adapter": {"preset": "deep"}, "train": {"recompute": True}},
    "fast, micro_batch_tokens 512": {"adapter": {"preset": "fast"}, "train": {"micro_batch_tokens": 512}},
}
FIGURES = {"memory": "GB", "step": "s", "finish": "s"}
SCALE = {"memory": 1e9, "step": 1, "finish": 1}


def write_rows(folder: Path) -> None:
    pairs = work.changed_pairs(250)
    chosen = np.random.default_rng(0).choice(len(pairs), NUM_ROWS + NUM_HELD_OUT, replace=False).tolist()
    for name, rows in (("rows", chosen[:NUM_ROWS]), ("held-out", chosen[NUM_ROWS:])):
        lines = (json.dumps({"prompt": pairs[i][0] + "\n", "completion": pairs[i][1]}) for i in rows)
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def write_config(folder: Path, name: str) -> Path:
    config = {
        "model": work.MODELS["gemma"],
        "data": {"train": str(folder / "rows.jsonl"), "validation": str(folder / "held-out.jsonl")},
        "adapter": CONFIGURATIONS[name].get("adapter", {}),
        "train": {"max_steps": STEPS, **CONFIGURATIONS[name].get("train", {})},
        "output": str(folder / "run"),
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return path


def loratune(*words: str) -> tuple[str, float]:
    """Returns (standard output, seconds) of one command in a process of its own."""
    code = "from loratune.cli.main import main; main()"
    command = [sys.executable, "-c", code, *words]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment())
    if done.returncode:
        raise SystemExit(f"loratune {' '.join(words)} failed:\n{done.stderr[-3000:]}{done.stdout[-3000:]}")
    return done.stdout, time.perf_counter() - start


def environment() -> dict:
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("BENCH_THREADS", "2")}


def compare(name: str) -> dict:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder)
        config = write_config(folder, name)
        plan = json.loads(loratune("plan", str(config), "--json")[0])
        _, seconds = loratune("train", str(config), "--json")
        steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in steps if line["event"] == "step"]
    estimate = plan["estimate"]
    return {
        "estimated": {
            "memory": sum(estimate["memory"].values()),
            "step": estimate["seconds"]["step"],
            "finish": sum(value for part, value in estimate["seconds"].items() if part != "step"),
        },
        "measured": {
            "memory": plan["measured"]["peak_bytes"],
            "step": statistics.mean(plan["step_seconds"]),
            "finish": statistics.mean(plan["seconds"]),
        },
        "run": {
            "memory": max(line["memory_bytes"] for line in steps),
            "step": statistics.mean(line["step_seconds"] for line in steps[1:]),
            "finish": seconds,
        },
        "plan": plan,
    }


def errors(found: dict, of: str) -> dict:
    return {figure: found[of][figure] / found["run"][figure] - 1 for figure in FIGURES}


def table(results: dict) -> str:
    heads = ["configuration"]
    for figure, unit in FIGURES.items():
        heads += [f"{figure}, {unit}: run", "estimated", "measured"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, found in results.items():
        cells = [name]
        for figure in FIGURES:
            cells.append(f"{found['run'][figure] / SCALE[figure]:.3g}")
            for of in ("estimated", "measured"):
                cells.append(f"{found[of][figure] / SCALE[figure]:.3g} ({errors(found, of)[figure]:+.0%})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def document(stored: dict) -> str:
    about = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    worst = {
        figure: max(abs(errors(found, "estimated")[figure]) for found in stored["runs"].values()) for figure in FIGURES
    }
    said = ", ".join(f"{figure} {value:.0%}" for figure, value in worst.items())
    return (
        f"# plan\n\nWhat `loratune plan` says before the run, and the run of {STEPS} steps itself (difference from the "
        f"run). {about}.\n\n{table(stored['runs'])}\nLargest difference of an estimate: {said}.\n"
    )


def main(options) -> None:
    names = [options.only] if options.only else list(CONFIGURATIONS)
    runs = {}
    for name in names:
        if not options.now:
            wait_until_idle()
        runs[name] = compare(name)
        print(table({name: runs[name]}), flush=True)
    if not options.only:
        stored = {"machine": machine(), "runs": runs}
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "plan.json").write_text(json.dumps(stored, indent=1) + "\n")
        (RESULTS / "plan.md").write_text(document(stored))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", choices=["", *CONFIGURATIONS])
    parser.add_argument("--now", action="store_true", help="do not wait for an idle machine")
    main(parser.parse_args())
