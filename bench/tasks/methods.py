"""What is compared: adapters, a head alone, every weight, and floors, each on the same rows in a process of its own.

Every method trains on the same rows in the same order, as many steps, with AdamW without decay, clipped at norm 1, a
warm-up of 5% and a linear fall; evaluates the validation rows after each epoch; and is tested as it was at its best.
"""

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rows import source_of
from specs import FULL, MODELS, Spec

import loratune
from loratune import api
from loratune.data.dataset import Dataset, load_dataset
from loratune.data.encode import Encoder
from loratune.data.pack import length_groups, step_rows
from loratune.data.rows import iter_rows
from loratune.evaluate import metrics, text
from loratune.evaluate.generate import generate, text_of
from loratune.evaluate.interval import Interval
from loratune.evaluate.loss import evaluate
from loratune.evaluate.samples import prompt_length
from loratune.model import heads
from loratune.model.causal import CausalModel
from loratune.tasks.evaluation import evaluate_task
from loratune.tasks.floors import FLOORS
from loratune.tasks.model import TaskModel
from loratune.tasks.table import find_labels, max_positions, task_of, with_head
from loratune.train import schedule
from loratune.train.config import TrainConfig

SPLITS = ("train", "validation", "test")
HEAD_RATE = 5e-3


@dataclass
class Work:
    """A task's rows as one model reads them. seconds: of training; the peak: since the model was loaded."""

    spec: Spec
    folder: Path
    seed: int
    steps: int | None
    model: Any
    tokenizer: Any
    task: Any
    data: dict[str, Dataset] = field(repr=False)

    @property
    def config(self) -> TrainConfig:
        return TrainConfig(
            epochs=float(self.spec.epochs), batch_size=self.spec.batch, micro_batch_tokens=self.spec.micro,
            max_steps=self.steps, seed=self.seed,
        )  # fmt: skip


def _register_tagger() -> None:
    """Gives Gemma 3 a tagging head: transformers 5.23 has none for it, though it has the general one of decoders."""
    from transformers import AutoModelForTokenClassification, Gemma3PreTrainedModel, Gemma3TextConfig
    from transformers.modeling_layers import GenericForTokenClassification

    class Gemma3ForTokenClassification(GenericForTokenClassification, Gemma3PreTrainedModel):
        config_class = Gemma3TextConfig

    AutoModelForTokenClassification.register(Gemma3TextConfig, Gemma3ForTokenClassification, exist_ok=True)


def prepare(spec: Spec, folder: Path, seed: int, steps: int | None) -> Work:
    """Loads model and rows, and forgets the peak of loading."""
    if spec.model == "gemma" and spec.task_type == "TOKEN_CLS":
        _register_tagger()
    files = {name: folder / f"{name}.jsonl" for name in SPLITS}
    labels = find_labels(spec.task_type, [str(files["train"])], None, None)
    model, tokenizer = loratune.load_model(
        MODELS[spec.model](), task_type=spec.task_type, labels=labels.names, problem=labels.problem
    )
    task = task_of(spec.task_type, model, tokenizer, labels)
    encoder: Any = task or Encoder(tokenizer, max_positions(model))
    data = {name: load_dataset(file, encoder) for name, file in files.items()}
    Path("/proc/self/clear_refs").write_text("5")
    return Work(spec, folder, seed, steps, model, tokenizer, task, data)


def peak_bytes() -> int:
    """Returns the process's largest resident memory since `prepare`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@contextmanager
def runner(work: Work) -> Iterator[Any]:
    """Yields what runs the model as it stands on the task's rows."""
    made: Any = TaskModel(work.model, work.task) if work.task else CausalModel(work.model)
    try:
        yield made
    finally:
        made.close()


# ---- methods: each returns what it took, and leaves the model as it is to be tested ----------------------------------


def adapter(work: Work, rate: float | None, lora: loratune.LoraConfig) -> dict[str, Any]:
    """Trains what a configuration says, as `loratune train` does."""
    attached = loratune.attach(work.model, with_head(lora, work.model), seed=work.seed)
    output, seconds = Path(tempfile.mkdtemp()) / "run", 0.0

    def on_event(event: dict[str, Any]) -> None:
        nonlocal seconds
        seconds += event.get("step_seconds", 0.0)

    config = work.config
    settings = {name: getattr(config, name) for name in
                ("epochs", "batch_size", "micro_batch_tokens", "max_steps", "seed")}  # fmt: skip
    result = api.train(
        work.model, work.tokenizer, data=work.folder / "train.jsonl", validation=work.folder / "validation.jsonl",
        output=output, on_event=on_event, learning_rate=rate, **settings,
    )  # fmt: skip
    found = {
        "trainable": attached.adapter.num_parameters(), "seconds": seconds, "steps": result.steps,
        "validation_loss": result.after.loss if result.after else None, "peak_bytes": peak_bytes(),
    }  # fmt: skip
    shutil.rmtree(output.parent)
    return found


def preset(name: str) -> Callable[[Work, float | None], dict[str, Any]]:
    def method(work: Work, rate: float | None) -> dict[str, Any]:
        return adapter(work, rate, loratune.LoraConfig.preset(name, task_type=work.spec.task_type))

    return method


def head_only(work: Work, rate: float | None) -> dict[str, Any]:
    """Trains the head alone: an adapter without factors. A head wants ten times the rate."""
    lora = loratune.LoraConfig(
        target_modules=(), modules_to_save=heads.to_save(work.model), task_type=work.spec.task_type
    )
    return adapter(work, HEAD_RATE, lora) | {"rate": HEAD_RATE}


def full(work: Work, rate: float | None) -> dict[str, Any]:
    """Trains every weight in a loop of its own: no adapter, nothing of loratune's but the rows, the task's loss and the
    schedule."""
    assert rate is not None
    model, config, rows = work.model, work.config, work.data["train"]
    made = TaskModel(model, work.task) if work.task else None
    model.requires_grad_(True)
    heads.begin(model, {path: model.get_submodule(path) for path in heads.new_modules(model)}, work.seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
    steps_per_epoch = -(-len(rows) // config.batch_size)
    num_steps = min(work.spec.epochs * steps_per_epoch, config.max_steps or 10**9)
    warmup, best, seconds = schedule.warmup_steps(config, num_steps), float("inf"), 0.0
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder) / "best.pt"
        for step in range(num_steps):
            start = time.perf_counter()
            chosen = step_rows(len(rows), config.batch_size, work.seed, *divmod(step, steps_per_epoch))
            _backward(work, made, [rows.documents[row] for row in chosen])
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.param_groups[0]["lr"] = schedule.rate(step, num_steps, warmup, rate)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            seconds += time.perf_counter() - start
            if (step + 1) % steps_per_epoch == 0 or step + 1 == num_steps:
                loss, _ = measured(work, work.data["validation"], made)
                if loss < best:
                    best = loss
                    torch.save(model.state_dict(), kept)
        peak = peak_bytes()
        model.load_state_dict(torch.load(kept))
    if made is not None:
        made.close()
    trainable = sum(parameter.numel() for parameter in model.parameters())
    return {
        "trainable": trainable, "seconds": seconds, "steps": num_steps, "validation_loss": best, "peak_bytes": peak
    }  # fmt: skip


def _backward(work: Work, made: TaskModel | None, documents: Sequence[Any]) -> None:
    """Adds up the gradient of a step's mean loss, micro-batch by micro-batch."""
    num_labels = sum(document.num_labels for document in documents)
    lengths = [document.num_tokens for document in documents]
    for pack in made.cut(documents, work.spec.micro) if made else length_groups(lengths, work.spec.micro):
        chosen = [documents[i] for i in pack]
        loss = made.losses(made.batch(chosen, pack))[0] if made else _text_loss(work, chosen)
        (loss / num_labels).backward()


def _text_loss(work: Work, documents: Sequence[Any]) -> torch.Tensor:
    """The plain model's loss of rows padded together; logits are made at labels only, which spares memory and time."""
    shape = len(documents), max(document.num_tokens for document in documents)
    ids, mask, trained = np.zeros(shape, np.int64), np.zeros(shape, np.int64), np.zeros(shape, bool)
    for row, document in enumerate(documents):
        ids[row, : document.num_tokens], mask[row, : document.num_tokens] = document.input_ids, 1
        trained[row, : document.num_tokens] = document.trained
    tokens, labels = torch.from_numpy(ids), torch.from_numpy(trained)
    states = work.model.model(input_ids=tokens, attention_mask=torch.from_numpy(mask)).last_hidden_state
    return F.cross_entropy(work.model.lm_head(states[:, :-1][labels[:, 1:]]), tokens[labels], reduction="sum")


def floor(name: str) -> Callable[[Work, float | None], dict[str, Any]]:
    """The commonest label, or the linear probe: what `loratune eval --baseline` says."""

    def method(work: Work, rate: float | None) -> dict[str, Any]:
        start = time.perf_counter()
        with runner(work) as made:
            train, test = work.data["train"].documents, work.data["test"].documents
            said = FLOORS[name](made, train, test, work.spec.micro)
        seconds = time.perf_counter() - start
        trainable = work.model.config.num_labels * (work.model.config.hidden_size + 1) if name == "probe" else 0
        scores = work.task.score(list(test), said)
        return {
            "trainable": trainable, "seconds": seconds, "steps": 0, "peak_bytes": peak_bytes(),
            **scored(scores.figures, scores.counts),
        }  # fmt: skip

    return method


def base(work: Work, rate: float | None) -> dict[str, Any]:
    """The model as it is."""
    return {"trainable": 0, "seconds": 0.0, "steps": 0, "peak_bytes": peak_bytes()}


# ---- what was reached ------------------------------------------------------------------------------------------------


def measured(work: Work, rows: Dataset, made: TaskModel | None = None) -> tuple[float, Any]:
    """Returns the loss of the model as it stands on rows, and its figures if it has a task."""
    with nullcontext(made) if made else runner(work) as runs:
        found = (evaluate_task if work.task else evaluate)(runs, list(rows.documents), work.spec.micro)
    return found.loss, getattr(found, "scores", None)


def corrections(work: Work) -> tuple[dict[str, Interval], Any]:
    """Returns F0.5 over the edits of what the model writes behind the test rows' prompts, and its counts."""
    documents = list(work.data["test"].documents)
    given = [row.value for row in iter_rows(str(work.folder / "test.jsonl"), None, None)]
    cuts = [prompt_length(document) for document in documents]
    prompts = [document.input_ids[:cut].tolist() for document, cut in zip(documents, cuts, strict=True)]
    longest = max(document.num_tokens - cut for document, cut in zip(documents, cuts, strict=True))
    answers = generate(work.model, work.tokenizer, prompts, longest + 4, stop_at_newline=True, batch_size=16)
    said = [text_of(work.tokenizer, each).strip() for each in answers]
    texts = [source_of(row) for row in given], said, [row["completion"].strip() for row in given]
    return text.correction_figures(*texts), text.edit_counts(*texts)


def test(work: Work) -> dict[str, Any]:
    """Returns the figures of the model as it stands on the test rows."""
    loss, scores = measured(work, work.data["test"])
    figures, counts = (scores.figures, scores.counts) if scores else corrections(work)
    return {"test_loss": loss, **scored(figures, counts)}


def scored(figures: dict[str, Interval], counts: Any) -> dict[str, Any]:
    told = {name: {key: metrics.defined(each) for key, each in value._asdict().items()}
            for name, value in figures.items()}  # fmt: skip
    return {"figures": told, "counts": np.asarray(counts).tolist()}


METHODS: dict[str, Callable[[Work, float | None], dict[str, Any]]] = {
    "LoRA fast": preset("fast"),
    "LoRA deep": preset("deep"),
    "full, lower rate": full,
    "full, higher rate": full,
    "head only": head_only,
    "linear probe": floor("probe"),
    "majority": floor("majority"),
    "base model": base,
}


def run(spec: Spec, folder: Path, method: str, seed: int, steps: int | None) -> dict[str, Any]:
    """Trains and tests one method."""
    work = prepare(spec, folder, seed, steps)
    rate = spec.rates[FULL.index(method)] if method in FULL else None
    found = METHODS[method](work, rate)
    return {"rate": rate, **found, **({} if "figures" in found else test(work))}
