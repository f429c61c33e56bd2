"""What a run will compute, from its rows alone: the micro-batches of its steps, as the run will cut them.

Units: tokens are positions that the model computes (a beginning that rows share counts once, padding counts);
labels are tokens that are trained; squares are products of query and key positions, summed over documents.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from loratune.data.dataset import Dataset
from loratune.data.encode import Document
from loratune.data.pack import length_groups, micro_batches, step_rows
from loratune.model import prefixes
from loratune.train.config import TrainConfig
from loratune.train.rehearsal import _PROBE_SHARE

MAX_STEPS = 256  # looked at one by one; of a longer run so many, evenly spread


@dataclass(frozen=True)
class Pack:
    """What one micro-batch, or several added up, computes. `longest`: the most keys a query looks at."""

    tokens: int
    labels: int
    squares: int
    longest: int

    @staticmethod
    def total(packs: "Sequence[Pack]") -> "Pack":
        """Returns the sum of packs."""
        return Pack(
            sum(pack.tokens for pack in packs),
            sum(pack.labels for pack in packs),
            sum(pack.squares for pack in packs),
            max((pack.longest for pack in packs), default=0),
        )


Cut = Callable[[Sequence[Document], int], list[Pack]]


def packed(documents: Sequence[Document], max_tokens: int, *, share: bool) -> list[Pack]:
    """Returns the micro-batches of documents that are packed without padding; with `share`, as `model.prefixes`."""
    lengths = [document.num_tokens for document in documents]
    packs = prefixes.cut(documents, max_tokens) if share else micro_batches(lengths, max_tokens)
    return [_row([documents[i] for i in pack], share) for pack in packs]


def _row(documents: Sequence[Document], share: bool) -> Pack:
    row = prefixes.lay_out(documents, [_computed(document) for document in documents], share)
    own = [segment.end - segment.start for segment in row.segments]
    reach = [length + segment.from_end - segment.from_start for length, segment in zip(own, row.segments, strict=True)]
    squares = sum(length * keys for length, keys in zip(own, reach, strict=True))
    return Pack(len(row.ids), sum(document.num_labels for document in documents), squares, max(reach))


def padded(documents: Sequence[Document], max_tokens: int) -> list[Pack]:
    """Returns the micro-batches of documents of which each is a row, filled up to the longest."""
    groups = length_groups([document.num_tokens for document in documents], max_tokens)
    return [_rows([documents[i] for i in group]) for group in groups]


def _rows(documents: Sequence[Document]) -> Pack:
    width = max(_computed(document) for document in documents)
    count = len(documents)
    return Pack(count * width, sum(document.num_labels for document in documents), count * width * width, width)


def _computed(document: Document) -> int:
    """What follows the last predicting token is left out."""
    return int(np.flatnonzero(document.trained)[-1])


@dataclass(frozen=True)
class Work:
    """A run's steps. `typical`: the mean step; `usual`: the step nearest to it; `widest`: the step with the largest
    micro-batch, which is `largest`. The rows of both stand beside them."""

    num_steps: int
    typical: Pack
    usual: Pack
    usual_rows: list[int]
    largest: Pack
    widest: Pack
    widest_rows: list[int]


def of_training(rows: Dataset, config: TrainConfig, cut: Cut) -> Work:
    """Returns what training computes. Up to MAX_STEPS steps are cut as the run will cut them; of a longer run the
    largest micro-batch is that of its longest rows in one step, which the run itself tries before it begins."""
    steps_per_epoch = math.ceil(len(rows) / config.batch_size)
    num_steps = number_of_steps(len(rows), config)
    chosen = np.unique(np.linspace(0, num_steps - 1, min(num_steps, MAX_STEPS)).astype(int)).tolist()
    steps = [step_rows(len(rows), config.batch_size, config.seed, *divmod(step, steps_per_epoch)) for step in chosen]

    def packs(step: list[int]) -> list[Pack]:
        return cut([rows.documents[row] for row in step], config.micro_batch_tokens)

    cuts = [packs(step) for step in steps]
    totals = [Pack.total(each) for each in cuts]
    typical = _mean(totals)
    usual = min(range(len(totals)), key=lambda index: abs(totals[index].tokens - typical.tokens))
    candidates = list(zip(steps, cuts, strict=True))
    longest = longest_rows(rows, config.batch_size)
    if num_steps > MAX_STEPS or _is_probed(rows, longest, config, num_steps):
        candidates.append((longest, packs(longest)))
    widest_rows, widest = max(candidates, key=lambda one: _largest(one[1]).tokens)
    return Work(num_steps, typical, totals[usual], steps[usual], _largest(widest), Pack.total(widest), widest_rows)


def _largest(packs: Sequence[Pack]) -> Pack:
    return max(packs, key=lambda pack: pack.tokens)


def _mean(packs: Sequence[Pack]) -> Pack:
    total, count = Pack.total(packs), len(packs)
    return Pack(round(total.tokens / count), round(total.labels / count), round(total.squares / count), total.longest)


def number_of_steps(num_rows: int, config: TrainConfig) -> int:
    """Returns the optimizer steps of a run, as `train.loop.Run.num_steps` does."""
    steps = max(1, math.ceil(config.epochs * math.ceil(num_rows / config.batch_size) - 1e-9))
    return min(steps, config.max_steps or steps)


def longest_rows(rows: Dataset, count: int) -> list[int]:
    """Returns the longest rows, the longest first."""
    return np.argsort(-np.asarray(rows.lengths), kind="stable")[:count].tolist()


def _is_probed(rows: Dataset, longest: Sequence[int], config: TrainConfig, num_steps: int) -> bool:
    """Whether `train.rehearsal` runs the longest rows together before the first step."""
    lengths = np.asarray(rows.lengths)
    tokens = min(config.micro_batch_tokens, int(lengths[list(longest)].sum()))
    return tokens <= _PROBE_SHARE * num_steps * config.batch_size * float(lengths.mean())


def num_evaluations(num_steps: int, steps_per_epoch: int, eval_every: int | None) -> int:
    """Returns how often a run evaluates: before the first step, then as configured or at each epoch, and at the end."""
    every = eval_every or steps_per_epoch
    return 1 + math.ceil(num_steps / every)
