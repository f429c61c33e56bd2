"""What the suites found against what was aimed at: bench/results/speed.md, and the figure bench/results/speed.svg.

python bench/summary.py         from the results that are there; make bench ends with it
"""

import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from loratune.report.figures import tag

RESULTS = Path(__file__).parent / "results"
WAIT_SECONDS = 3  # before each run, for the machine to be idle
HALF = "--documents 32"
OURS, PEFT, BEST, TRL = (
    f"train.py {side} {HALF}" for side in ("ours --micro 8", "peft --micro 8", "peft --micro 2 --grouped",
                                           "trl --micro 2 --grouped")
)  # fmt: skip
FAST = f"--preset fast --dropout 0.05 {HALF}"
SHAPES = {
    "long": "long prompt, short answer", "prefix40": "40% of the tokens shared", "prefix70": "70% shared",
    "full": "every token trained, one length",
}  # fmt: skip
_BAR, _LEFT, _WIDTH = 26, 330, 860
_STYLE = """
.b { --surface: #fcfcfb; --ink: #0b0b0b; --soft: #52514e; --ours: #2a78d6; --theirs: #a9a79f }
@media (prefers-color-scheme: dark) {
  .b { --surface: #1a1a19; --ink: #f2f1ec; --soft: #c3c2b7; --ours: #3987e5; --theirs: #6b6a64 } }
.b text { font: 13px system-ui, sans-serif; fill: var(--ink) } .b .end { text-anchor: end }
.b .title { font-size: 16px; font-weight: 600 } .b .soft { fill: var(--soft) } .b .surface { fill: var(--surface) }
.b .ours { fill: var(--ours) } .b .theirs { fill: var(--theirs) }
.b .floor { stroke: var(--ink); stroke-dasharray: 3 4 }
"""


class Results:
    """The runs of every suite, by command."""

    def __init__(self) -> None:
        self._suites = {path.stem: json.loads(path.read_text("utf-8")) for path in RESULTS.glob("*.json")}

    def values(self, suite: str, command: str, key: str) -> list[float]:
        return [run[key] for run in self._suites.get(suite, {}).get("runs", {}).get(command, []) if key in run]

    def median(self, suite: str, command: str, key: str = "tokens_per_second") -> float:
        """Returns NaN where it has not been run."""
        values = self.values(suite, command, key)
        return statistics.median(values) if values else float("nan")

    def ratio(self, suite: str, one: str, others: Sequence[str], key: str = "tokens_per_second") -> float:
        """Of one command over the best of others (that have been run)."""
        found = [self.median(suite, each, key) for each in others if self.values(suite, each, key)]
        return self.median(suite, one, key) / max(found, default=float("nan"))

    def repeats(self, suite: str, command: str) -> int:
        return len(self.values(suite, command, "tokens_per_second"))

    def commands(self, suite: str) -> list[str]:
        return list(self._suites.get(suite, {}).get("runs", {}))

    def gain(self, suite: str, one: str, other: str) -> float:
        """Of one of our commands over another, by their shares of the floor: the machine's rate changes by the minute,
        and the floor counts the same operations for both."""
        return self.ratio(suite, one, [other], "of_floor")

    @property
    def minutes(self) -> float:
        """What all runs took together."""
        suites = (each.get("runs", {}) for each in self._suites.values())
        runs = (run for suite in suites for runs in suite.values() for run in runs)
        return sum(run.get("wall_seconds", 0) + WAIT_SECONDS for run in runs if "wall_seconds" in run) / 60

    @property
    def machine(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self._suites["train"]["machine"].items())


def _percent(value: float) -> str:
    return f"{value:.0%}"


def _times(value: float) -> str:
    return f"{value:.2f}x"


def goals(of: Results) -> Iterator[tuple[str, str, str]]:
    """Yields (what, asked, found)."""
    gate = lambda key: of.median("gate", "gate.py", key)  # noqa: E731
    for what in ("loss", "gradient"):
        found = f"{gate(f'our_{what}_error'):.0e} (PEFT in float32: {gate(f'peft_{what}_error'):.0e})"
        yield f"first step's {what}, off PEFT in float64", "1e-5", found
    steps = [f"train.py {side} --micro 8 --shape tiny --documents 16 --steps 50" for side in ("ours", "peft")]
    ends = [of.values("steps", command, "losses")[-1][-1] for command in steps if of.values("steps", command, "losses")]
    if len(ends) == 2:
        yield "loss after 50 steps, off PEFT's", "1e-3", f"{abs(ends[0] - ends[1]):.0e}"
    yield from _throughput(of)
    yield from _memory(of)
    yield from _others(of)


def _throughput(of: Results) -> Iterator[tuple[str, str, str]]:
    yield "main work, against the best peer", "2.2x (stretch 2.35x)", _times(of.ratio("train", OURS, [BEST, PEFT, TRL]))
    yield "main work, against PEFT + Trainer as users run it", "3x", _times(of.ratio("train", OURS, [PEFT]))
    shares = of.values("train", OURS, "of_floor") or [float("nan")]
    found = f"{_percent(statistics.median(shares))} ({_percent(min(shares))} to {_percent(max(shares))})"
    yield "main work, share of the floor", "75% (stretch 80%)", found
    peers = [command for command in of.commands("sweep") if "train.py ours" not in command]
    if peers:
        best = max(peers, key=lambda command: of.median("sweep", command))
        yield f"the sweep's best peer, `{best.removesuffix(HALF).strip()}`", "", _times(of.ratio("sweep", OURS, [best]))
    ours, peers = (
        f"train.py ours --micro 8 {FAST}",
        [f"train.py peft {m} {FAST}" for m in ("--micro 8", "--micro 2 --grouped")],
    )
    yield "preset fast, dropout 0.05, against the best peer", "2.2x", _times(of.ratio("fast", ours, peers))
    yield "preset fast, against PEFT + Trainer as users run it", "3x", _times(of.ratio("fast", ours, peers[:1]))
    yield "preset fast, share of the floor", "75%", _percent(of.median("fast", ours, "of_floor"))
    cost = of.median("dropout", f"train.py dropout --micro 8 {FAST}", "dropout_costs")
    yield "what dropout costs", "under 5%", f"{cost:.1%}"
    llama = ["train.py peft --micro 2 --grouped --model llama --documents 16"]
    llama += [f"llama_peers.py {side} --micro 2" for side in ("torchtune", "litgpt")]
    ours = "train.py ours --micro 8 --model llama --documents 16"
    yield "Llama 3.2 1B's shape, against the best peer", "1.25x", _times(of.ratio("llama", ours, llama))
    yield "Llama 3.2 1B's shape, share of the floor", "75%", _percent(of.median("llama", ours, "of_floor"))
    for shape, name in SHAPES.items():
        ours, peer = (f"train.py {s} --shape {shape} {HALF}" for s in ("ours --micro 8", "peft --micro 2 --grouped"))
        asked = "1.15x" if shape == "full" else ""
        yield f"{name}, against PEFT micro-batch 2, grouped", asked, _times(of.ratio("shapes", ours, [peer]))
        if shape.startswith("prefix"):
            apart = f"train.py ours --micro 8 --off sharing --shape {shape} {HALF}"
            ceiling = of.median("shapes", ours, "sharing_ceiling")
            asked = f"{0.9 * ceiling:.2f}x (90% of the ceiling)"
            yield f"{name}, against sharing off", asked, _times(of.gain("shapes", ours, apart))
    few, many = (of.median("growth", f"growth.py rows {number}") for number in ("1000", "1000000"))
    yield "a million rows, of the speed with 1,000", "within 5%", f"{many / few - 1:+.1%}"
    packs = {m: f"train.py ours --micro {m} {'--batch 16 ' if m == 16 else ''}{HALF}" for m in (1, 2, 4, 8, 16)}
    found = [f"{_percent(of.gain('sweep', packs[m], packs[8]) - 1)} ({m})" for m in packs if m != 8]
    yield "packs of so many documents, of the speed with 8", "within 5%", ", ".join(found)


def _memory(of: Results) -> Iterator[tuple[str, str, str]]:
    above, found = "peak_above_model_bytes", []
    for micro in (1, 4, 8, 16):
        ours, peft = (
            f"train.py {side} {'--batch 16 ' if micro == 16 else ''}{HALF}"
            for side in (f"ours --micro {micro}", f"peft --micro {micro} --grouped")
        )
        found.append(f"{_times(of.median('sweep', ours, above) / of.median('sweep', peft, above))} ({micro})")
    yield "memory above the model, of PEFT's at so many documents a micro-batch", "0.16x", ", ".join(found)
    found = []
    for micro in (1, 4):
        ours, trl = (f"train.py {side} {HALF}" for side in (f"ours --micro {micro}", f"trl --micro {micro} --grouped"))
        found.append(f"{_times(of.median('sweep', ours, above) / of.median('sweep', trl, above))} ({micro})")
    yield "memory above the model, of TRL's", "0.5x", ", ".join(found)
    kept = {name: of.median("gate", "gate.py", f"kept_bytes_{name}") for name in ("ours", "recompute", "peft")}
    yield "kept for the backward pass, of PEFT's", "0.6x", f"{kept['ours'] / kept['peft']:.3f}x"
    yield "the same with recomputation", "0.3x", f"{kept['recompute'] / kept['peft']:.3f}x"
    recompute = f"train.py ours --micro 8 --recompute {HALF}"
    yield "time of selective recomputation", "at most 14%", f"{of.gain('sweep', OURS, recompute) - 1:.1%}"
    few, many = (of.median("growth", f"growth.py rows {number}", above) for number in ("1000", "1000000"))
    pages = (of.median("growth", f"growth.py rows {n}", "of_it_mapped_pages_of_the_rows") for n in ("1000", "1000000"))
    few, many = (each - mapped for each, mapped in zip((few, many), pages))
    yield "a million rows, memory above the model less mapped pages", "flat", f"{few / 1e6:.0f} and {many / 1e6:.0f} MB"


def _others(of: Results) -> Iterator[tuple[str, str, str]]:
    share = of.median("evaluate", "evaluate.py", "evaluation_over_training")
    yield "evaluation, of a training step's time a token", "0.55", f"{share:.2f}"
    with_adapter, bare = (
        of.median("evaluate", "evaluate.py", f"generated_{by}_per_second") for by in ("with_adapter", "by_bare_base")
    )
    yield "generation with an adapter, of the bare base's speed", "1.00", f"{with_adapter / bare:.2f}"
    yield "start-up on a tokenised store", "3 s", f"{of.median('start', 'growth.py start', 'start_seconds'):.1f} s"
    share = of.median("growth", "growth.py rows 1000", "optimizer_share")
    yield "the optimizer's share of a step", "under 1%", f"{share:.2%}"


def sweep(of: Results) -> Iterator[tuple[str, float, float, float, float, int]]:
    """Yields (command, tokens/s, memory above the model, peak, share of the floor, repeats), the fastest first."""
    rows = []
    for suite in ("train", "sweep"):
        for command in of.commands(suite):
            if suite == "sweep" and command in of.commands("train"):
                continue
            figures = (
                of.median(suite, command, key)
                for key in ("tokens_per_second", "peak_above_model_bytes", "peak_bytes", "of_floor")
            )
            rows.append((command, *figures, of.repeats(suite, command)))
    yield from sorted(rows, key=lambda row: -row[1])


def ablation(of: Results) -> Iterator[tuple[str, float, float]]:
    """Yields (technique left out, speed by the share of the floor, memory), as shares of those with all."""
    for command in of.commands("ablation"):
        memory = of.median("ablation", command, "peak_above_model_bytes") / of.median(
            "ablation", OURS, "peak_above_model_bytes"
        )
        name = command.partition("--off ")[2].split()[0] if "--off" in command else "none"
        yield name, of.gain("ablation", command, OURS), memory


def page(of: Results) -> str:
    lines = [
        "# Speed and memory", "",
        f"Medians; the runs one by one are in the JSON files beside this. {of.machine}.",
        f"All runs together took {of.minutes:.0f} minutes. Against peers, tokens a second of alternating runs are",
        "compared; where both sides are ours, their shares of the floor: the machine's own rate changes by the minute.",
        "",
        "![tokens a second](speed.svg)", "",
        "| | asked | found |", "|---|---|---|",
        *(f"| {what} | {asked} | {found} |" for what, asked, found in goals(of)), "",
        "## Micro-batches: ours, PEFT + Trainer, TRL", "",
        "Memory above the model is the peak less what is resident once it is loaded; what loading freed by then can",
        "be used again, so small values are lower than what a step keeps. The whole process's peak is beside it.", "",
        "| command | tokens/s | memory above the model | peak | of the floor | runs |", "|---|---|---|---|---|---|",
        *(f"| `{command}` | {speed:.1f} | {memory / 1e9:.2f} GB | {peak / 1e9:.2f} GB | {floor:.0%} | {count} |"
          for command, speed, memory, peak, floor, count in sweep(of)), "",
        "## One technique left out at a time", "",
        "| left out | speed | memory above the model |", "|---|---|---|",
        *(f"| {name} | {speed:.2f}x | {memory:.2f}x |" for name, speed, memory in ablation(of)), "",
    ]  # fmt: skip
    return "\n".join(lines)


def figure(of: Results) -> str:
    """Returns tokens a second of each side as bars, with the floor of the arithmetic as a line."""
    names = {
        OURS: "loratune", BEST: "PEFT + Trainer, micro-batch 2, by length", TRL: "TRL, micro-batch 2, by length",
        PEFT: "PEFT + Trainer, micro-batch 8",
    }  # fmt: skip
    speeds = {name: of.median("train", command) for command, name in names.items()}
    floor = of.median("train", OURS) / of.median("train", OURS, "of_floor")
    scale, height = (_WIDTH - _LEFT - 70) / floor, 110 + 40 * len(names)
    body = [
        tag("style", raw=_STYLE), tag("rect", width=_WIDTH, height=height, class_="surface"),
        tag("text", "Gemma 3 270M, float32, r=8 on seven roles: tokens a second", x=20, y=30, class_="title"),
    ]  # fmt: skip
    for row, (name, speed) in enumerate(speeds.items()):
        y = 56 + 40 * row
        body += [
            tag("text", name, x=_LEFT - 12, y=y + 18, class_="end"),
            tag("rect", x=_LEFT, y=y, width=round(speed * scale, 1), height=_BAR, class_="theirs" if row else "ours"),
            tag("text", f"{speed:.0f}", x=round(_LEFT + speed * scale + 8, 1), y=y + 18),
        ]
    end, bottom = round(_LEFT + floor * scale, 1), 56 + 40 * len(names)
    body += [
        tag("line", x1=end, x2=end, y1=48, y2=bottom, class_="floor"),
        tag("text", f"what the arithmetic allows: {floor:.0f}", x=end + 6, y=bottom + 18, class_="end soft"),
    ]
    box = {"viewBox": f"0 0 {_WIDTH} {height}", "width": _WIDTH, "height": height}
    return tag("svg", raw="".join(body), xmlns="http://www.w3.org/2000/svg", class_="b", role="img", **box) + "\n"


def main() -> None:
    of = Results()
    (RESULTS / "speed.md").write_text(page(of), "utf-8")
    (RESULTS / "speed.svg").write_text(figure(of), "utf-8")
    print(page(of))


if __name__ == "__main__":
    main()
