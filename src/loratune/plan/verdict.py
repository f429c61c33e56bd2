"""The verdict on an estimate: does it fit, which settings to change if not, and what is worth knowing before."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from loratune import files
from loratune.adapter.attach import Attached
from loratune.adapter.summary import notes
from loratune.export import consumers
from loratune.plan.costs import missing_roles
from loratune.plan.estimate import Estimate, Subject, estimate, without_long_rows
from loratune.train import schedule
from loratune.train.config import RunConfig

FEW_STEPS = 20  # with fewer, a rate that warms up and decays hardly moves the adapter
_LOWER = {"deep": ("quality", "fast"), "expert": ("quality", "fast"), "quality": ("fast",), "fast": ()}
_LEAST_RANK = 8
_LEAST_TOKENS = 64  # of a micro-batch; below, the products are thin


@dataclass(frozen=True)
class Limits:
    """What the machine gives: bytes of memory for the whole process, bytes of disk where the run goes."""

    memory: int
    disk: int

    def hold(self, memory: int, disk: int) -> bool:
        return memory <= self.memory and disk <= self.disk

    def hold_all_of(self, found: Estimate) -> bool:
        return self.hold(found.memory.total, found.disk.most)


@dataclass(frozen=True)
class Change:
    """Settings to change, in words, and what the run then takes."""

    what: str
    memory: int
    disk: int
    seconds: float
    fits: bool


@dataclass(frozen=True)
class Advice:
    """What to change where a run does not fit. kind: "either" (each change is enough), "both", or "none" (no two are).
    tried: every single change."""

    kind: str
    changes: tuple[Change, ...]
    tried: tuple[Change, ...]


@dataclass(frozen=True)
class _Option:
    """One way to make a run smaller: the configuration with it, and the longest row that stays."""

    what: str
    changes: dict[str, dict[str, object]]  # section -> settings
    longest: int | None = None


def advise(subject: Subject, config: RunConfig, limits: Limits) -> Advice:
    """Returns the two settings to change, found by computing what each change, and each pair of them, would give.

    Options stand in the order of what they cost: nothing (micro_batch_tokens), checkpoints, time, rows, quality.
    """
    options = list(_options(subject, config, limits))
    tried = tuple(_try(subject, config, limits, [option]) for option in options)
    if enough := [change for change in tried if change.fits]:
        return Advice("either", tuple(enough[:2]), tried)
    order = sorted(combinations(range(len(options)), 2), key=lambda pair: pair[::-1])  # by the dearer of the two
    apart = [[options[i] for i in pair] for pair in order if _are_apart(*(options[i] for i in pair))]
    pairs = [_try(subject, config, limits, pair) for pair in apart]
    if fitting := [pair for pair in pairs if pair.fits]:
        return Advice("both", tuple(fitting[:1]), tried)
    least = sorted(pairs or tried, key=lambda change: change.memory)[:1]
    return Advice("none", tuple(least), tried)


def _are_apart(one: _Option, other: _Option) -> bool:
    """Whether two options change different settings."""
    return not any(set(values) & set(other.changes.get(section, ())) for section, values in one.changes.items())


def _options(subject: Subject, config: RunConfig, limits: Limits) -> Iterator[_Option]:
    found, train = estimate(subject, config), config.train
    if found.memory.total > limits.memory:
        yield from _memory_options(subject, config, limits)
    if found.disk.most > limits.disk and train.keep > 1:
        yield _Option("keep: 1", {"train": {"keep": 1}})
    for preset in _LOWER[config.adapter.preset or "fast"]:
        fields = dict.fromkeys(("r", "lora_alpha", "lora_dropout", "target_modules"))
        yield _Option(f"preset: {preset}", {"adapter": {"preset": preset, **fields}})
    if (r := config.adapter.r or 0) > _LEAST_RANK and not _LOWER[config.adapter.preset or "fast"]:
        alpha = (config.adapter.lora_alpha or 2 * r) / 2
        yield _Option(f"r: {r // 2}, lora_alpha: {alpha:g}", {"adapter": {"r": r // 2, "lora_alpha": alpha}})


def _memory_options(subject: Subject, config: RunConfig, limits: Limits) -> Iterator[_Option]:
    smaller = _micro_batches(subject, config, limits)
    if smaller is not None:
        yield _Option(f"micro_batch_tokens: {smaller}", {"train": {"micro_batch_tokens": smaller}})
    if subject.base.stored.itemsize < subject.base.dtype.itemsize and config.train.dtype != "stored":
        yield _Option("dtype: stored", {"train": {"dtype": "stored"}})
    if subject.base.is_blocks and not config.train.recompute and not config.adapter.use_dora:
        yield _Option("recompute: true", {"train": {"recompute": True}})
    half = int(subject.rows.lengths.max()) // 2
    longer = int((subject.rows.lengths > half).sum())
    if half >= _LEAST_TOKENS and len(subject.rows) > longer:
        yield _Option(f"rows of at most {half:,} tokens ({longer:,} of {len(subject.rows):,} are longer)", {}, half)


def _micro_batches(subject: Subject, config: RunConfig, limits: Limits) -> int | None:
    """Returns the largest half, quarter ... that fits, else the smallest that still changes something."""
    before, tokens = estimate(subject, config), min(config.train.micro_batch_tokens, _most_tokens(subject, config))
    found: int | None = None
    while tokens // 2 >= _LEAST_TOKENS:
        tokens //= 2
        now = estimate(subject, _changed(config, {"train": {"micro_batch_tokens": tokens}}))
        if now.work.largest.tokens >= before.work.largest.tokens:
            break
        found, before = tokens, now
        if now.memory.total <= limits.memory:
            break
    return found


def _most_tokens(subject: Subject, config: RunConfig) -> int:
    """A whole step's tokens: a larger micro-batch changes nothing."""
    longest = sorted(subject.rows.lengths.tolist())[-config.train.batch_size :]
    return max(2 * _LEAST_TOKENS, sum(longest))


def _try(subject: Subject, config: RunConfig, limits: Limits, options: Sequence[_Option]) -> Change:
    for option in options:
        config = _changed(config, option.changes)
        subject = subject if option.longest is None else without_long_rows(subject, option.longest)
    found = estimate(subject, config)
    return Change(
        what=" and ".join(option.what for option in options),
        memory=found.memory.total,
        disk=found.disk.most,
        seconds=found.seconds.total,
        fits=limits.hold_all_of(found),
    )


def _changed(config: RunConfig, changes: dict[str, dict[str, object]]) -> RunConfig:
    sections = {name: getattr(config, name).model_copy(update=values) for name, values in changes.items()}
    return config.model_copy(update=sections)


# ---- what is worth knowing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Consumer:
    """Whether a program will load the adapter: "loads", "loads, with a note" or "refuses", and why."""

    name: str
    verdict: str
    findings: tuple[str, ...]


_WORDS = {frozenset[str](): "loads", frozenset(("note",)): "loads, with a note"}


def consumers_of(attached: Attached) -> tuple[Consumer, ...]:
    """Returns what each known consumer will do with the adapter that the run makes."""
    return tuple(
        Consumer(
            name,
            _WORDS.get(frozenset(each.severity for each in found), "refuses"),
            tuple(f"{each.what}. {each.advice}" for each in found),
        )
        for name, found in consumers.check(attached.adapter).items()
    )


def warnings_of(subject: Subject, config: RunConfig, attached: Attached, found: Estimate) -> Iterator[str]:
    """Yields what would not stop the run, but is hardly meant."""
    steps, train = found.work.num_steps, config.train
    if steps < FEW_STEPS:
        yield (
            f"the run has {steps} steps ({len(subject.rows):,} rows, {train.batch_size} a step): "
            f"below {FEW_STEPS} little is learnt. More epochs, more rows, or a smaller batch_size."
        )
    warmup = schedule.warmup_steps(train, steps)
    if warmup >= steps and train.warmup_steps is not None:
        yield f"the warm-up of {warmup} steps is as long as the run of {steps}: the full rate is hardly reached."
    if train.max_steps is not None and steps * train.batch_size < len(subject.rows):
        yield f"max_steps {train.max_steps} ends the run before every row was used once."
    for role in missing_roles(subject.base, config.adapter.preset or "fast"):
        yield f"preset {config.adapter.preset}: this model has no {role} layer."
    yield from (note.removeprefix("note: ") for note in notes(attached.model, attached.adapter))
    if Path(config.output).exists():
        yield f"the output directory {config.output} exists already: training will ask for another name."


def limits_of(subject: Subject, config: RunConfig, memory: int | None) -> Limits:
    """Returns the memory that is free now, or the one given, and the disk that is free where the run goes."""
    return Limits(memory or subject.machine.free_bytes, files.free_bytes(Path(config.output)))
