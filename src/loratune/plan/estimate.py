"""The estimate: from a model's shapes, the rows and the machine's rates to memory, time and disk. Nothing is run.

Time is operations over the measured rate of matrix products times EFFICIENCY, as measured by bench/train.py.
"""

import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import torch

from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import Attached, attach
from loratune.data.dataset import Dataset
from loratune.data.encode import Document, Encoder
from loratune.data.tokenise import Notify
from loratune.evaluate.samples import NUM_SAMPLES, prompt_length
from loratune.explain.skeleton import skeleton
from loratune.model import load
from loratune.model.gguf import cache_root
from loratune.plan import machine, work
from loratune.plan.costs import Base, Costs, base_of, costs_of, shapes_to_measure
from loratune.plan.machine import Machine
from loratune.plan.work import Cut, Pack, Work
from loratune.train.config import RunConfig
from loratune.train.datasets import load_datasets
from loratune.train.rehearsal import LOOKED_AT

# What is left of the rate of plain products: a run on Gemma 3 270M reached 75% of it, attention's products not counted
# (bench/results/train.md); they are 4% of its operations, and are counted here.
EFFICIENCY = 0.78
EVALUATION_SHARE = 0.48  # of a training step's time a token: README, "Measured"
UNCERTAINTY = 0.2  # of an estimated time, each way: what bench/results/plan.md holds it to
LIBRARY_SECONDS = 4.0  # importing torch and transformers
_LOAD_BYTES_PER_SECOND = 0.4e9  # reading, checking and fingerprinting weights that are in the page cache
_PROBES = 12  # short forward passes that CausalModel makes at start
_LAYER_SECONDS = 1.2e-3  # what a layer costs a generated token beside reading its weights


@dataclass(frozen=True)
class Subject:
    """What is planned for: a model's shapes, the rows as documents, the machine. tokenizer_bytes: of its files."""

    base: Base
    rows: Dataset
    validation: Dataset
    machine: Machine
    tokenizer_bytes: int
    tokenise_seconds: float


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak. held: Python, libraries, tokenizer, rows and what is kept of frozen layers; trained: numbers,
    gradients, moments; step: what the largest micro-batch keeps, and its loss."""

    held: int
    weights: int
    trained: int
    step: int

    @property
    def total(self) -> int:
        return self.held + self.weights + self.trained + self.step


@dataclass(frozen=True)
class Seconds:
    """Time of the parts of a run, `step` that of the mean step."""

    start: float
    step: float
    steps: float
    evaluations: float
    samples: float

    @property
    def total(self) -> float:
        return self.start + self.steps + self.evaluations + self.samples


@dataclass(frozen=True)
class Disk:
    """Bytes. most: while a checkpoint is written; left: what stays of the run."""

    checkpoint: int
    adapter: int
    most: int
    left: int


@dataclass(frozen=True)
class Estimate:
    """What a run takes. `typical` and `largest` are the tokens of a mean step and of the largest micro-batch."""

    memory: Memory
    seconds: Seconds
    disk: Disk
    work: Work
    num_evaluations: int
    num_trained: int


def subject_of(config: RunConfig, notify: Notify) -> Subject:
    """Builds the model without weights, tokenises the rows as the run will, and measures the machine.

    Raises ConfigError or DataError as the run would.
    """
    device = load._device("cuda" if torch.cuda.is_available() else "cpu")
    bones = skeleton(config.model, notify)
    base = base_of(bones.model, torch.float32 if device.type == "cpu" else bones.dtype, device, bones.dtype)
    source = load.resolve(config.model, notify)
    tokenizer = load.tokenizer_of(source)
    begun = time.perf_counter()
    limit = getattr(bones.model.config.get_text_config(), "max_position_embeddings", None)
    num_ids = cast(torch.nn.Embedding, bones.model.get_input_embeddings()).num_embeddings
    encoder = Encoder(tokenizer, limit, train_on=config.data.train_on, long=config.data.long, num_ids=num_ids)
    rows, validation = load_datasets(config.data, encoder, cache_root() / "tokens", notify)
    seconds = time.perf_counter() - begun
    tokens = min(4096, max(16, work.packed(rows.documents[:8], config.train.micro_batch_tokens, share=False)[0].tokens))
    found = machine.look(device, base.dtype, shapes_to_measure(base), tokens)
    files = sum(each.stat().st_size for each in source.path.iterdir() if _is_tokenizer_file(each))
    return Subject(base, rows, validation, found, files, seconds)


def _is_tokenizer_file(path: Path) -> bool:
    return path.is_file() and (path.name.startswith("tokenizer") or path.name in load._TOKENIZER_FILES)


def estimate(subject: Subject, config: RunConfig) -> Estimate:
    """Returns what a run takes."""
    with attached_skeleton(subject, config) as attached:
        return _estimate(subject, config, attached.adapter)


@contextmanager
def attached_skeleton(subject: Subject, config: RunConfig) -> Generator[Attached]:
    """Attaches the run's adapter, without values, to the model without weights, and takes it off again."""
    attached = attach(subject.base.model, config.adapter.to_lora_config(), seed=config.train.seed)
    try:
        yield attached
    finally:
        attached.detach()


def _estimate(subject: Subject, config: RunConfig, adapter: Adapter) -> Estimate:
    costs = costs_of(subject.base, adapter, recompute=config.train.recompute, as_stored=config.train.dtype == "stored")
    todo = work.of_training(subject.rows, config.train, cutter(subject.base, adapter))
    steps_per_epoch = -(-len(subject.rows) // config.train.batch_size)
    evaluations = work.num_evaluations(todo.num_steps, steps_per_epoch, config.train.eval_every)
    return Estimate(
        memory=_memory(subject, costs, todo, config.train.keep_frozen_mb * 10**6),
        seconds=_seconds(subject, costs, todo, evaluations, config),
        disk=_disk(subject, costs, config.train.keep),
        work=todo,
        num_evaluations=evaluations,
        num_trained=costs.num_trained,
    )


def cutter(base: Base, adapter: Adapter) -> Cut:
    """Returns how training cuts documents on this model: beginnings are shared only without dropout."""
    if not base.packs:
        return work.padded
    share = not adapter.config.lora_dropout
    return lambda documents, max_tokens: work.packed(documents, max_tokens, share=share)


def _memory(subject: Subject, costs: Costs, todo: Work, keep_frozen: int) -> Memory:
    """The peak is in a step; or, where even the shortest rows are long, in the proof of the loss before the first."""
    tokens = int(subject.rows.lengths.sum() + subject.validation.lengths.sum())
    states = min(keep_frozen, tokens * subject.base.hidden * subject.base.bytes_per_float)
    proof = costs.own_loss * _second_shortest(subject.rows)
    held = 0 if subject.base.device.type == "cuda" else subject.machine.held_bytes
    return Memory(held + states, costs.weights, costs.trained, max(costs.step_bytes(todo.largest), proof))


def _second_shortest(rows: Dataset) -> int:
    """Tokens of the longer of the two rows whose loss `train.rehearsal` compares with the model's own."""
    return sorted(int(length) for length in rows.lengths[:LOOKED_AT])[:2][-1]


def _seconds(subject: Subject, costs: Costs, todo: Work, num_evaluations: int, config: RunConfig) -> Seconds:
    rate, read = subject.machine.flops * EFFICIENCY, subject.machine.read
    step = costs.step_flops(todo.typical) / rate + costs.trained / read
    held_out = _total(subject.base, subject.validation.documents, config.train.micro_batch_tokens)
    evaluation = EVALUATION_SHARE * costs.step_flops(held_out) / rate
    token = costs.weights / read + _LAYER_SECONDS * subject.base.num_layers
    start = (
        LIBRARY_SECONDS
        + costs.weights / _LOAD_BYTES_PER_SECOND
        + _PROBES * token
        + subject.tokenise_seconds
        + costs.step_flops(todo.largest) / rate
    )
    return Seconds(
        start,
        step,
        step * todo.num_steps,
        evaluation * num_evaluations,
        generated_tokens(subject.validation.documents) * token,
    )


def _total(base: Base, documents: Sequence[Document], max_tokens: int) -> Pack:
    packs = work.packed(documents, max_tokens, share=True) if base.packs else work.padded(documents, max_tokens)
    return Pack.total(packs)


def generated_tokens(documents: Sequence[Document]) -> int:
    """Returns the most tokens, one after the other, that a run generates for its samples before and after.

    A model that is tuned stops where the rows' own answers do.
    """
    longest = max(document.num_tokens - prompt_length(document) for document in documents[:NUM_SAMPLES])
    return min(128, longest + longest // 4 + 4) + min(128, longest)


def _disk(subject: Subject, costs: Costs, keep: int) -> Disk:
    """As `train.rehearsal`: the best is kept too, and one is written beside the others."""
    return Disk(
        checkpoint=costs.checkpoint,
        adapter=costs.adapter + subject.tokenizer_bytes,
        most=(keep + 2) * costs.checkpoint,
        left=(keep + 1) * costs.checkpoint + costs.adapter + subject.tokenizer_bytes,
    )


def without_long_rows(subject: Subject, max_tokens: int) -> Subject:
    """Returns the subject with the training rows of at most so many tokens."""
    short = (subject.rows.lengths <= max_tokens).nonzero()[0]
    return replace(subject, rows=subject.rows.select(short))
