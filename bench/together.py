"""Eight configurations trained at the same time on one copy of the model against each of them alone.

    python bench/together.py               UA-GEC (a Ukrainian sentence, then its correction) with Gemma 3 270M
    python bench/together.py --model FOLDER --name tiny --folder DIR --steps 8 --now       to try it

The grid of `loratune ladder --together`, on the same rows and for as many steps: all to the end, with losers dropped on
the way, and each alone, every side in a process of its own. Finished sides in DIR are kept: a benchmark that was
interrupted goes on where it stopped. Writes bench/ladder/NAME.json and NAME.md.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from run import machine, run_sides
from work import MODELS

from ladder import sentence_rows, write_rows

HERE = Path(__file__).parent
JOINT = {"together": 8, "halving": 2}  # how many train to the end


def configurations(options: argparse.Namespace, output: Path) -> dict[str, Any]:
    """Returns the grid, each configuration to be trained into a folder of `output`."""
    from loratune.ladder.configurations import resolve

    given: dict[str, Any] = {
        "model": options.model, "output": str(output), "data.train": str(options.folder / "train.jsonl"),
        "data.validation": str(options.folder / "held.jsonl"), "train.epochs": 1000.0,
        "train.max_steps": options.steps, "train.seed": options.seed, "train.batch_size": options.batch_size,
    }  # fmt: skip
    return resolve(None, given, None)[1]


def run_side(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Trains one side; returns the seconds of its steps, the peak of its memory and its held-out losses by name."""
    import torch

    from loratune import api, contest
    from loratune.train.measure import peak_memory_bytes

    torch.set_num_threads(options.threads)
    output = options.folder / name
    shutil.rmtree(output, ignore_errors=True)
    found = configurations(options, output)
    if name in JOINT:
        contest.run(output, found, JOINT[name], lambda event: None)
        record = json.loads((output / "ladder.json").read_text("utf-8"))
        seconds, steps = record["seconds"], record["steps"]
        losses = {each["name"]: each["loss"] for each in record["configurations"] if each["dropped"] is None}
    else:
        result = api.run(found[name], lambda event: None)
        lines = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text("utf-8").splitlines()]
        timed = [line["step_seconds"] for line in lines if line["event"] == "step"]
        seconds, steps, losses = sum(timed), len(timed), {name: result.after.loss if result.after else None}
    memory = peak_memory_bytes(torch.device("cpu"))
    return {"seconds": seconds, "steps": steps, "memory_bytes": memory, "losses": losses}


def furthest(folder: Path, name: str) -> float:
    """Returns the largest difference of an entry of an adapter from the same trained alone."""
    from safetensors.torch import load_file

    def read(side: str) -> dict[str, Any]:
        place = folder / side / "configurations" / name / "checkpoints"
        return load_file(max(place.iterdir()) / "adapter_model.safetensors")

    one, other = read("together"), read(name)
    return max(float((one[key] - other[key]).abs().max()) for key in one)


def report(options: argparse.Namespace, sides: dict[str, dict[str, Any]], apart: dict[str, float]) -> str:
    """Returns the comparison as Markdown."""
    alone = {name: side for name, side in sides.items() if name not in JOINT}
    rows = ["| side | seconds of its steps | steps | seconds a step | peak memory |", "|---" * 5 + "|"]
    for name, side in sides.items():
        rows.append(
            f"| {name} | {side['seconds']:.1f} | {side['steps']} | {side['seconds'] / side['steps']:.3f} | "
            f"{side['memory_bytes'] / 1e9:.2f} GB |"
        )
    seconds = sum(side["seconds"] for side in alone.values())
    memory = sum(side["memory_bytes"] for side in alone.values())
    ours, halving = sides["together"], sides["halving"]
    about = ", ".join(f"{key} {value}" for key, value in machine().items())
    return "\n".join(
        [
            f"# Together: {options.name}", "",
            f"{options.model}, {len(alone)} configurations, {options.steps} steps of {options.batch_size} rows, seed "
            f"{options.seed}. {about}.", "", *rows, "",
            f"All together to the end: {seconds / ours['seconds']:.2f} times as fast as one after another "
            f"({ours['seconds']:.0f} against {seconds:.0f} s), in {memory / ours['memory_bytes']:.2f} times less "
            f"memory than as many processes at once ({ours['memory_bytes'] / 1e9:.2f} against {memory / 1e9:.2f} GB).",
            f"With losers dropped: {seconds / halving['seconds']:.2f} times as fast ({halving['seconds']:.0f} s).",
            f"The largest difference of an entry of an adapter from the same trained alone: {max(apart.values()):.1e} "
            f"(smallest of the {len(apart)}: {min(apart.values()):.1e}), in float32, where Adam makes a rounding error "
            "of a gradient near zero a step; in float64 it is below 1e-10 (tests/ladder/test_together.py).",
            "",
        ]
    )  # fmt: skip


def main(options: argparse.Namespace) -> None:
    """Runs what is missing, side by side, and writes the comparison."""
    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "held.jsonl").exists():
        write_rows(folder, sentence_rows(options.rows, options.held_out))
    names = [*JOINT, *configurations(options, folder)]
    sides = run_sides(folder, names, options.now)
    apart = {name: furthest(folder, name) for name in names if name not in JOINT}
    results = HERE / "ladder"
    results.mkdir(exist_ok=True)
    stored = {"machine": machine(), "options": {**vars(options), "folder": None}, "sides": sides, "apart": apart}
    (results / f"{options.name}.json").write_text(json.dumps(stored, indent=1) + "\n", "utf-8")
    (results / f"{options.name}.md").write_text(report(options, sides, apart), "utf-8")
    print((results / f"{options.name}.md").read_text("utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=MODELS["gemma"])
    parser.add_argument("--name", default="together")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-together"), metavar="DIR")
    parser.add_argument("--rows", type=int, default=800)
    parser.add_argument("--held-out", type=int, default=60)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--now", action="store_true", help="do not wait until the machine is idle: no timings to report"
    )
    parser.add_argument("--side", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.side:
        side = run_side(chosen, chosen.side)
        (chosen.folder / f"{chosen.side}.json").write_text(json.dumps(side), "utf-8")
    else:
        main(chosen)
