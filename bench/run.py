"""Runs the benchmarks, each side in fresh processes, alternating, and writes bench/results/NAME.json and NAME.md.

    make bench                      the gate, then everything: the main work three times, the rest once
    make bench ONLY=train,llama     some suites
    make bench ONLY=peft,ours       some sides of all suites
    make bench REPEATS=3            everything three times

A run starts only when the machine has been at least 95% idle for 3 seconds, and finished runs are kept: an interrupted
benchmark goes on where it stopped; to begin anew, remove the suite's JSON file. Times are of this machine on that day;
the ratios are what is meant.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import summary

HERE = Path(__file__).parent
RESULTS = HERE / "results"
# These need other packages than we do: each runs in an environment of its own (make bench-peers).
PEERS = {
    name: Path(os.environ.get(f"BENCH_{name.upper()}", HERE / f".venv-{name}" / "bin" / "python"))
    for name in ("trl", "torchtune", "litgpt")
}
MIN_IDLE, WINDOW_SECONDS, PATIENCE_SECONDS = 0.95, 3.0, 600

HALF = ["--documents", "32"]
FAST = ["--preset", "fast", "--dropout", "0.05", *HALF]


def _train(side: str, micro: int, *more: str) -> list[str]:
    return ["train.py", side, "--micro", str(micro), *more]


SUITES: dict[str, list[list[str]]] = {
    "gate": [["gate.py"]],
    "attach": [["attach.py", side, str(count)] for count in (1, 10, 100) for side in ("ours", "peft")]
    + [["attach.py", "ours", "1000"], ["attach.py", "peft-extrapolated", "1000"]],
    "train": [
        _train("ours", 8, *HALF),
        _train("peft", 8, *HALF),  # as users run it
        _train("peft", 2, "--grouped", *HALF),  # its best of the sweep
        _train("trl", 2, "--grouped", *HALF),
    ],
    "sweep": [
        *(_train("ours", micro, *HALF) for micro in (1, 2, 4, 8)),
        _train("ours", 8, "--recompute", *HALF),
        _train("ours", 16, "--batch", "16", *HALF),
        *(_train("peft", micro, "--grouped", *HALF) for micro in (1, 4, 8)),
        _train("peft", 16, "--grouped", "--batch", "16", *HALF),
        _train("trl", 8, "--checkpointing", *HALF),  # TRL's defaults, but in float32
        *(_train("trl", micro, "--grouped", *HALF) for micro in (1, 4)),
        _train("trl", 1, "--packing", *HALF),
    ],
    "fast": [
        _train("ours", 8, *FAST),
        _train("peft", 8, *FAST),
        _train("peft", 2, "--grouped", *FAST),
    ],
    "dropout": [_train("dropout", 8, *FAST)],  # what it costs
    "shapes": [
        *(
            _train(side, micro, *more, "--shape", shape, *HALF)
            for shape in ("long", "prefix40", "prefix70", "full")
            for side, micro, more in (("ours", 8, ()), ("peft", 2, ("--grouped",)))
        ),
        *(_train("ours", 8, "--off", "sharing", "--shape", shape, *HALF) for shape in ("prefix40", "prefix70")),
    ],
    "llama": [
        _train("ours", 8, "--model", "llama", "--documents", "16"),
        _train("peft", 2, "--grouped", "--model", "llama", "--documents", "16"),
        *(["llama_peers.py", side, "--micro", "2"] for side in ("torchtune", "litgpt")),  # of all, 4 is no faster
    ],
    "ablation": [
        _train("ours", 8, *HALF),
        *(_train("ours", 8, "--off", name, *HALF)
          for name in ("blocks", "short-attention", "wide-head-blocks", "label-loss", "packing")),
    ],
    "steps": [  # the loss after 50 steps
        _train(side, 8, "--shape", "tiny", "--documents", "16", "--steps", "50") for side in ("ours", "peft")
    ],
    "evaluate": [["evaluate.py"]],
    "growth": [["growth.py", "rows", number] for number in ("1000", "1000000")],
    "start": [["growth.py", "start"]],
}  # fmt: skip
MAIN = {"train": 3, "fast": 3, "start": 3}  # how often these run, unless REPEATS says; the rest once
APART = {"attach"}  # run when asked for by name
SIDES = {"ours", "peft", *PEERS}


def side(command: list[str]) -> str:
    return command[1] if len(command) > 1 and command[1] in SIDES else "ours"


def idle_share(seconds: float) -> float:
    def read() -> tuple[int, int]:
        values = [int(value) for value in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
        return values[3] + values[4], sum(values)

    idle, total = read()
    time.sleep(seconds)
    idle_after, total_after = read()
    return (idle_after - idle) / (total_after - total)


def wait_until_idle() -> None:
    if not Path("/proc/stat").exists():
        return
    deadline = time.monotonic() + PATIENCE_SECONDS
    while idle_share(WINDOW_SECONDS) < MIN_IDLE:
        if time.monotonic() > deadline:
            raise SystemExit("the machine has not been idle for 10 minutes: close other programs and run this again.")


def machine() -> dict:
    import torch
    import transformers

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), cpu)
    try:
        import peft

        peft_version = peft.__version__
    except ImportError:
        peft_version = None
    return {
        "cpu": cpu,
        "cores": len(__import__("os").sched_getaffinity(0)),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft_version,
        "date": time.strftime("%Y-%m-%d"),
    }


def run(command: list[str]) -> dict:
    wait_until_idle()
    python = PEERS.get(command[1], sys.executable) if len(command) > 1 else sys.executable
    begin = time.monotonic()
    done = subprocess.run([str(python), *command], cwd=HERE, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1]) | {"wall_seconds": time.monotonic() - begin}


def run_sides(folder: Path, names: list[str], now: bool) -> dict:
    """Runs this script again for each side whose NAME.json is not in the folder yet; returns all of them by name."""
    for name in names:
        if (folder / f"{name}.json").exists():
            continue
        if not now:
            wait_until_idle()
        subprocess.run([sys.executable, *sys.argv, "--side", name], check=True)
        print(f"{time.strftime('%H:%M')} {name}: done", flush=True)
    return {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in names}


def suite(name: str, repeats: int, sides: set[str]) -> None:
    path = RESULTS / f"{name}.json"
    stored = json.loads(path.read_text()) if path.exists() else {"machine": machine(), "runs": {}}
    for repeat in range(repeats):
        for command in SUITES[name]:
            if side(command) not in sides:
                continue
            if len(command) > 1 and not PEERS.get(command[1], HERE).exists():
                print(f"{name}: {' '.join(command)}: left out, {PEERS[command[1]]} is missing (make bench-peers)")
                continue
            runs = stored["runs"].setdefault(" ".join(command), [])
            if len(runs) > repeat:
                continue
            runs.append(run(command))
            print(f"{name}: {' '.join(command)}: {short(runs[-1])}", flush=True)
            RESULTS.mkdir(exist_ok=True)
            path.write_text(json.dumps(stored, indent=1) + "\n")
    (RESULTS / f"{name}.md").write_text(table(name, stored))


def short(result: dict) -> str:
    keys = ("tokens_per_second", "of_floor", "peak_above_model_bytes", "first_attach", "last_attach", "switch")
    return "  ".join(f"{key} {result[key]:.6g}" for key in keys if key in result)


def table(name: str, stored: dict) -> str:
    """Returns the medians and spreads of a suite as a Markdown table, with the machine's description."""
    numbers = [key for key, value in next(iter(stored["runs"].values()))[0].items() if isinstance(value, float)]
    numbers += [
        key for key in ("peak_bytes", "peak_above_model_bytes") if key in next(iter(stored["runs"].values()))[0]
    ]
    rows = ["| command | " + " | ".join(numbers) + " |", "|---" * (len(numbers) + 1) + "|"]
    for command, runs in stored["runs"].items():
        cells = []
        for key in numbers:
            values = sorted(run[key] for run in runs)
            cells.append(f"{statistics.median(values):.4g} ({values[0]:.4g} to {values[-1]:.4g})")
        rows.append(f"| `{command}` | " + " | ".join(cells) + " |")
    about = ", ".join(f"{key} {value}" for key, value in stored["machine"].items())
    return f"# {name}\n\nMedian (smallest to largest). {about}.\n\n" + "\n".join(rows) + "\n"


def chosen(only: str) -> tuple[list[str], set[str]]:
    """Returns (suites, sides) of a list of either, separated by commas; the gate is always passed first."""
    names = {name for name in only.split(",") if name}
    if unknown := names - SIDES - set(SUITES):
        known = ", ".join([*SUITES, *sorted(SIDES)])
        raise SystemExit(f"no suite or side is called {', '.join(sorted(unknown))}; there are {known}.")
    suites = [name for name in SUITES if name in names] or [name for name in SUITES if name not in APART]
    return list(dict.fromkeys(["gate", *suites])), names & SIDES or SIDES


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="suites or sides, separated by commas")
    parser.add_argument("--repeats", type=int, help="how often each run; else those of MAIN, and once")
    options = parser.parse_args()
    suites, sides = chosen(options.only)
    for name in suites:
        suite(name, options.repeats or MAIN.get(name, 1), sides if name != "gate" else SIDES)
    summary.main()
