"""The same faults done to loratune and to transformers' Trainer with PEFT: what is refused, what goes on silently.

    python bench/reliability.py          both sides, a few minutes; writes bench/results/reliability.json and .md

Both train the same tiny Llama with LoRA on the same rows: six steps of eight rows, two epochs, dropout 0.1, a
checkpoint a step of which two are kept, each with its own defaults otherwise. Each case runs in a forked child, is
taken up again by the documented way of resuming, and its adapter is compared bit by bit with that of a run that nothing
happened to.
"""

import contextlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tests"))
warnings.filterwarnings("ignore")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from transformers import Trainer, TrainingArguments  # noqa: E402

from faults import harness  # noqa: E402
from loratune.adapter.attach import load_adapter  # noqa: E402
from loratune.errors import LoratuneError  # noqa: E402
from loratune.train import checkpoint  # noqa: E402
from tiny_run import tiny_llama  # noqa: E402

TRIALS = 40
SETTINGS = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}
WEIGHTS = "adapter_model.safetensors"
SAME, OTHER, FAILS, NOTHING = "same end", "other end, nothing said", "resuming fails", "ended before the kill"

Work = Callable[[Path], None]


def child(work: Callable[[], None]) -> int:
    """Runs work in a forked child without its output; 0 when it came to its end."""
    pid = os.fork()
    if pid == 0:
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 1), os.dup2(null, 2)
        code = 1
        with contextlib.suppress(BaseException):
            work()
            code = 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- the two sides --------------------------------------------------------------------------------------------------


class Ours:
    """loratune: the run of tests/faults."""

    name = f"loratune {version('loratune')}"

    def __init__(self, folder: Path) -> None:
        self.run = harness.toy_run(folder)

    def go(self, output: Path) -> None:
        self.run.output = output
        assert harness.go_on(self.run) == harness.DONE

    def before_save(self, do: Callable[[], None]) -> None:
        write = checkpoint.write

        def noted(*args: Any) -> Path:
            do()
            return write(*args)

        checkpoint.write = noted

    def newest(self, output: Path) -> Path:
        return checkpoint.folders(output)[-1]

    def poison(self, step: int) -> None:
        losses = self.run.causal.losses

        def poisoned(batch: Any) -> Any:
            total, each = losses(batch)
            return (total * torch.nan if self.run.step == step and torch.is_grad_enabled() else total), each

        self.run.causal.losses = poisoned

    def weights(self) -> list[torch.Tensor]:
        return list(self.run.optimizer.parameters.values())

    def load(self, adapter: Path) -> torch.nn.Module:
        model = tiny_llama()
        load_adapter(model, adapter)
        return model


class Theirs:
    """Trainer with PEFT."""

    name = f"transformers {version('transformers')} Trainer, PEFT {version('peft')}"

    def __init__(self, folder: Path) -> None:
        documents = harness.toy_run(folder).train.documents
        self.rows = [
            {
                "input_ids": d.input_ids.tolist(),
                "labels": [int(i) if t else -100 for i, t in zip(d.input_ids, d.trained)],
            }
            for d in documents
        ]
        self.model: Any = None
        self.at_step: Callable[[int], None] = lambda step: None

    def collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)

        def padded(name: str, value: int) -> torch.Tensor:
            return torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])

        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        return {
            "input_ids": padded("input_ids", 0),
            "labels": padded("labels", -100),
            "attention_mask": torch.tensor(mask),
        }

    def trainer(self, output: Path) -> Trainer:
        import peft

        side = self
        torch.manual_seed(0)
        self.model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**SETTINGS, task_type="CAUSAL_LM"))

        class Noted(Trainer):
            def training_step(self, *args: Any, **kwargs: Any) -> Any:
                side.at_step(self.state.global_step)
                return super().training_step(*args, **kwargs)

            def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
                side.saving()
                super()._save_checkpoint(*args, **kwargs)

        settings = TrainingArguments(
            output_dir=str(output), num_train_epochs=2, per_device_train_batch_size=8, learning_rate=0.01,
            save_strategy="steps", save_steps=1, save_total_limit=2, report_to=[], disable_tqdm=True, use_cpu=True,
            logging_strategy="no",
        )  # fmt: skip
        return Noted(self.model, settings, train_dataset=self.rows, data_collator=self.collate)  # type: ignore[arg-type]

    saving: Callable[[], None] = staticmethod(lambda: None)

    def go(self, output: Path) -> None:
        trainer = self.trainer(output)
        trainer.train(resume_from_checkpoint=any(output.glob("checkpoint-*")) or None)
        self.model.save_pretrained(output / "adapter")

    def before_save(self, do: Callable[[], None]) -> None:
        self.saving = do

    def newest(self, output: Path) -> Path:
        return max(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))

    def poison(self, step: int) -> None:
        def at_step(now: int) -> None:
            if now == step:
                forward = self.model.forward

                def poisoned(*args: Any, **kwargs: Any) -> Any:
                    self.model.forward = forward
                    found = forward(*args, **kwargs)
                    found.loss = found.loss * torch.nan
                    return found

                self.model.forward = poisoned

        self.at_step = at_step

    def weights(self) -> list[torch.Tensor]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def load(self, adapter: Path) -> torch.nn.Module:
        import peft

        return peft.PeftModel.from_pretrained(tiny_llama(), adapter)


# ---- the faults -----------------------------------------------------------------------------------------------------


class Board:
    """One side's outcomes; `end` is the adapter of a run that nothing happened to."""

    def __init__(self, side: Any, folder: Path) -> None:
        self.side, self.folder = side, folder
        self.generator = random.Random(0)
        assert child(lambda: side.go(folder / "whole")) == 0, side.name
        self.end = load_file(folder / "whole" / "adapter" / WEIGHTS)
        assert child(lambda: side.go(folder / "again")) == 0
        assert self.outcome(folder / "again", 0) == SAME  # else nothing below says anything

    def outcome(self, output: Path, code: int) -> str:
        if code != 0:
            return FAILS
        found = load_file(output / "adapter" / WEIGHTS)
        same = found.keys() == self.end.keys() and all(torch.equal(found[name], self.end[name]) for name in found)
        return SAME if same else OTHER

    def taken_up(self, output: Path) -> str:
        return self.outcome(output, child(lambda: self.side.go(output)))

    def kills_during_a_save(self) -> Counter[str]:
        """SIGKILL at a uniform random time from the start of a save, the third to sixth, to that of the next."""
        found: Counter[str] = Counter()
        seconds = self.seconds_of_a_save()
        for trial in range(TRIALS):
            output = self.folder / f"kill-{trial}"
            found[self.taken_up(output) if self._killed(output, trial % 4 + 3, seconds) else NOTHING] += 1
        return found

    def seconds_of_a_save(self) -> float:
        """From the start of a save to that of the next, with a step between them."""
        times = self.folder / "times"

        def work() -> None:
            moments: list[float] = []
            self.side.before_save(lambda: moments.append(time.monotonic()))
            self.side.go(self.folder / "timed")
            times.write_text(json.dumps(moments))

        assert child(work) == 0
        moments = json.loads(times.read_text())
        return min(b - a for a, b in itertools.pairwise(moments))

    def _killed(self, output: Path, save: int, seconds: float) -> bool:
        read, write = os.pipe()

        def work() -> None:
            count = 0

            def note() -> None:
                nonlocal count
                count += 1
                if count == save:
                    os.write(write, b"x")

            self.side.before_save(note)
            self.side.go(output)

        pid = os.fork()
        if pid == 0:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 1), os.dup2(null, 2)
            with contextlib.suppress(BaseException):
                work()
            os._exit(0)
        os.read(read, 1)
        time.sleep(self.generator.uniform(0, seconds))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(read), os.close(write)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL

    def stopped_early(self, output: Path) -> Path:
        """A run that ended after its fifth save; returns its newest checkpoint."""
        stopped = self.folder / "stopped"
        if not stopped.exists():
            assert not self._ended_before(stopped, 6)
        shutil.copytree(stopped, output)
        return self.side.newest(output)

    def _ended_before(self, output: Path, save: int) -> bool:
        def work() -> None:
            count = 0

            def note() -> None:
                nonlocal count
                count += 1
                if count == save:
                    os._exit(9)

            self.side.before_save(note)
            self.side.go(output)

        return child(work) == 0

    def files_removed(self) -> tuple[Counter[str], dict[str, str]]:
        names = sorted(path.name for path in self.stopped_early(self.folder / "names").iterdir())
        each: dict[str, str] = {}
        for name in names:
            output = self.folder / f"without-{name}"
            (self.stopped_early(output) / name).unlink()
            each[name] = self.taken_up(output)
        return Counter(each.values()), each

    def bits_flipped(self) -> Counter[str]:
        """One bit anywhere in the newest checkpoint, each file as likely as it is large."""
        found: Counter[str] = Counter()
        for trial in range(TRIALS):
            output = self.folder / f"flip-{trial}"
            files = sorted(self.stopped_early(output).iterdir())
            path = self.generator.choices(files, [file.stat().st_size for file in files])[0]
            data = bytearray(path.read_bytes())
            data[self.generator.randrange(len(data))] ^= 1 << self.generator.randrange(8)
            path.write_bytes(data)
            found[self.taken_up(output)] += 1
        return found

    def nan_loss(self) -> str:
        """The loss of the fourth step is NaN: does the run stop, and are the weights still numbers?"""
        note = self.folder / "nan"

        def work() -> None:
            self.side.poison(3)
            try:
                self.side.go(self.folder / "nan-run")
                ended = "goes on to its end"
            except Exception:
                ended = "stops"
            finite = all(bool(weight.isfinite().all()) for weight in self.side.weights())
            note.write_text(f"{ended}, weights {'unharmed' if finite else 'NaN'}")

        child(work)
        return note.read_text()

    def bad_adapters(self) -> tuple[Counter[str], dict[str, str]]:
        """An adapter with one fault: refused, or loaded with or without a warning."""
        each: dict[str, str] = {}
        usual = self._warnings(self.folder / "whole" / "adapter")
        assert usual is not None
        for name, fault in BAD_ADAPTERS.items():
            folder = self.folder / f"bad-{len(each)}"
            shutil.copytree(self.folder / "whole" / "adapter", folder)
            fault(folder)
            said = self._warnings(folder)
            each[name] = "refused" if said is None else "loaded, " + ("a warning" if said - usual else "nothing said")
        return Counter(each.values()), each

    def _warnings(self, adapter: Path) -> set[str] | None:
        """Loads an adapter; returns how the warnings begin, None for an error."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.side.load(adapter)
            except Exception as error:
                assert not isinstance(self.side, Ours) or isinstance(error, LoratuneError), error
                return None
        return {str(warning.message)[:40] for warning in caught}


def tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Work:
    """A fault in an adapter's tensors. The metadata are kept out: PEFT's files have none."""

    def fault(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, {"format": "pt"})

    return fault


def values(**changes: Any) -> Work:
    def fault(folder: Path) -> None:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return fault


def cut(folder: Path) -> None:
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def _first(found: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    name = min(found)
    return found | {name: change(found[name]).contiguous()}


BAD_ADAPTERS: dict[str, Work] = {
    "no tensors": tensors(lambda found: {}),
    "names with another prefix": tensors(lambda found: {f"x.{name}": value for name, value in found.items()}),
    "names without a part": tensors(lambda found: {k.replace("self_attn.", ""): v for k, v in found.items()}),
    "every B missing": tensors(lambda found: {name: value for name, value in found.items() if "lora_B" not in name}),
    "one layer missing": tensors(lambda found: {k: v for k, v in found.items() if "layers.1" not in k}),
    "one tensor missing": tensors(lambda found: {name: found[name] for name in sorted(found)[1:]}),
    "a tensor too many": tensors(
        lambda found: found | {"base_model.model.model.layers.9.x.lora_A.weight": torch.ones(2, 2)}
    ),
    "a NaN": tensors(lambda found: _first(found, lambda value: value * torch.nan)),
    "an infinity": tensors(lambda found: _first(found, lambda value: value + torch.inf)),
    "another shape": tensors(lambda found: _first(found, lambda value: value[:, :-1])),
    "whole numbers": tensors(lambda found: _first(found, lambda value: value.to(torch.int32))),
    "another rank": values(r=4),
    "alpha 0": values(lora_alpha=0),
    "a negative dropout": values(lora_dropout=-1.0),
    "another target": values(target_modules=["k_proj"]),
    "a target that the model lacks": values(target_modules=["q_proj", "v_proj", "x_proj"]),
    "a mistyped field": values(lora_alhpa=32),
    "cut in half": cut,
    "no configuration": lambda folder: (folder / "adapter_config.json").unlink(),
    "weights that are text": lambda folder: (folder / WEIGHTS).write_text("hello") and None,
}


def measure(kind: type, folder: Path) -> dict[str, Any]:
    folder.mkdir()
    side = kind(folder)
    board = Board(side, folder)
    removed, each_removed = board.files_removed()
    bad, each_bad = board.bad_adapters()
    return {
        "side": side.name,
        f"killed during a save, {TRIALS} times": dict(board.kills_during_a_save()),
        "a file of the newest checkpoint removed": dict(removed),
        f"a bit of the newest checkpoint flipped, {TRIALS} times": dict(board.bits_flipped()),
        "the loss of one step is NaN": board.nan_loss(),
        f"an adapter with a fault, {len(BAD_ADAPTERS)} kinds": dict(bad),
        "files removed": each_removed,
        "bad adapters": each_bad,
    }


def table(sides: list[dict[str, Any]]) -> str:
    def cell(value: Any) -> str:
        counts = sorted(value.items(), key=lambda pair: -pair[1]) if isinstance(value, dict) else None
        return ", ".join(f"{count} {name}" for name, count in counts) if counts else str(value)

    rows = [name for name in sides[0] if name not in ("side", "files removed", "bad adapters")]
    lines = ["| fault | " + " | ".join(side["side"] for side in sides) + " |", "|---" * (len(sides) + 1) + "|"]
    lines += [f"| {row} | " + " | ".join(cell(side[row]) for side in sides) + " |" for row in rows]
    lines += ["", "Each file removed:", ""]
    lines += [
        f"- {side['side']}: " + ", ".join(f"`{k}` {v}" for k, v in side["files removed"].items()) for side in sides
    ]
    lines += ["", "Each adapter with a fault:", "", "| fault | " + " | ".join(side["side"] for side in sides) + " |"]
    lines += ["|---" * (len(sides) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(side["bad adapters"][name] for side in sides) + " |" for name in BAD_ADAPTERS]
    return "\n".join(lines)


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        sides = [measure(kind, Path(folder) / kind.__name__) for kind in (Ours, Theirs)]
    about = f"Python {platform.python_version()}, torch {torch.__version__}, CPU, one thread, {platform.system()}."
    results = HERE / "results" / "reliability"
    results.with_suffix(".json").write_text(json.dumps({"about": about, "sides": sides}, indent=1) + "\n")
    results.with_suffix(".md").write_text(f"{about}\n\n{table(sides)}\n")
    print(table(sides))


if __name__ == "__main__":
    main()
