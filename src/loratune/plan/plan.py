"""The plan: estimate and measurement side by side, the verdict, and the run.yaml that says so."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratune import files
from loratune.errors import ConfigError
from loratune.plan.estimate import UNCERTAINTY, Estimate, Subject, attached_skeleton, estimate
from loratune.plan.measure import Measurement
from loratune.plan.verdict import Advice, Consumer, Limits, advise, consumers_of, limits_of, warnings_of
from loratune.train.config import ResolvedConfig, RunConfig, dump

TIGHT = 0.1  # of the memory: an estimate may be that far off


@dataclass(frozen=True)
class Plan:
    """What a run will take on this machine, before it runs. `measured` is None where nothing was run; flops: of matrix
    products, a second."""

    flops: float
    estimate: Estimate
    measured: Measurement | None
    limits: Limits
    advice: Advice | None
    consumers: tuple[Consumer, ...]
    warnings: tuple[str, ...]

    @property
    def memory(self) -> int:
        """Bytes at the peak: as measured, else as estimated."""
        return self.estimate.memory.total if self.measured is None else self.measured.peak_bytes

    @property
    def fits(self) -> bool:
        return self.limits.hold(self.memory, self.estimate.disk.most)

    @property
    def is_tight(self) -> bool:
        """Whether it fits by less than an estimate may be off."""
        return self.fits and self.measured is None and self.memory * (1 + TIGHT) > self.limits.memory

    @property
    def step_seconds(self) -> tuple[float, float]:
        """The least and the most that a mean step takes."""
        if self.measured is None:
            return _around(self.estimate.seconds.step)
        return self.measured.step_seconds(self.estimate.work)

    @property
    def seconds(self) -> tuple[float, float]:
        """The least and the most that the whole run takes, to the end of its last file."""
        if self.measured is None:
            return self.estimated_seconds
        low, high = (self._measured_seconds(each, self.measured) for each in self.step_seconds)
        return low - self.measured.samples_seconds / 2, high  # a model may answer more briefly than the rows

    @property
    def estimated_seconds(self) -> tuple[float, float]:
        return _around(self.estimate.seconds.total)

    def _measured_seconds(self, step: float, measured: Measurement) -> float:
        parts = self.estimate.seconds
        return (
            measured.start_seconds
            + step * self.estimate.work.num_steps
            + parts.evaluations * step / parts.step
            + measured.samples_seconds
        )

    def to_json(self) -> dict[str, Any]:
        """Returns the plan as plain values."""
        return {
            "fits": self.fits,
            "memory_bytes": self.memory,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            **asdict(self),
        }


def _around(seconds: float) -> tuple[float, float]:
    return seconds * (1 - UNCERTAINTY), seconds * (1 + UNCERTAINTY)


def draft(subject: Subject, config: RunConfig, memory: int | None) -> Plan:
    """Returns the plan as estimated; memory: bytes that the process may take, instead of what is free now."""
    limits, found = limits_of(subject, config, memory), estimate(subject, config)
    with attached_skeleton(subject, config) as attached:
        consumers = consumers_of(attached)
        warnings = tuple(warnings_of(subject, config, attached, found))
    advice = None if limits.hold_all_of(found) else advise(subject, config, limits)
    return Plan(subject.machine.flops, found, None, limits, advice, consumers, warnings)


def with_measurement(plan: Plan, measured: Measurement, subject: Subject, config: RunConfig) -> Plan:
    """Returns the plan with what was measured; where that does not fit after all, with what to change."""
    plan = replace(plan, measured=measured)
    if plan.fits:
        return plan
    share = plan.estimate.memory.total / measured.peak_bytes
    limits = replace(plan.limits, memory=round(plan.limits.memory * share))  # what estimates are to be held against
    return replace(plan, advice=advise(subject, config, limits))


def check_new(path: Path, force: bool) -> None:
    """Raises ConfigError for a file that is there already, unless `force`."""
    if path.exists() and not force:
        raise ConfigError(
            f"{path} exists already and was not touched. Give another --output, or --force to replace it."
        )


def write(plan: Plan, resolved: ResolvedConfig, path: Path, *, force: bool = False) -> None:
    """Writes run.yaml: the configuration, each value with its origin, under the plan's figures as comments.

    Raises ConfigError for a run that does not fit, and for a file that is there already.
    """
    check_new(path, force)
    if not plan.fits:
        raise ConfigError(f"the run does not fit, so {path} was not written.")
    lines = [f"# {line}".rstrip() for line in comments(plan, path)]
    files.atomic_write(path, "\n".join(lines) + "\n" + dump(resolved))


def comments(plan: Plan, path: Path) -> Iterator[str]:
    """Yields what stands above the settings."""
    work = plan.estimate.work
    yield f"Planned by loratune plan; start it with: loratune train {path}"
    yield f"steps: {work.num_steps:,}, of {work.typical.tokens:,} tokens on average"
    yield f"memory: {gigabytes(plan.memory)} at the peak ({_source(plan)}); {gigabytes(plan.limits.memory)} were free"
    yield f"time: {span(plan.seconds)}"
    yield f"disk: {gigabytes(plan.estimate.disk.left)} stay"
    yield from (f"warning: {warning}" for warning in plan.warnings)
    yield "Behind each value: where it came from."


def _source(plan: Plan) -> str:
    if plan.measured is None:
        return "estimated"
    return f"measured; {gigabytes(plan.estimate.memory.total)} estimated"


def gigabytes(num_bytes: float) -> str:
    """Returns bytes as people read them: 2.09 GB, 34.8 MB."""
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.1f} MB"


def duration(seconds: float) -> str:
    """Returns a time as people read it: 45 s, 12 min, 3.4 h."""
    return " ".join(_duration(seconds))


def _duration(seconds: float) -> tuple[str, str]:
    if seconds < 100:
        return f"{seconds:.0f}", "s"
    return (f"{seconds / 60:.0f}", "min") if seconds < 100 * 60 else (f"{seconds / 3600:.1f}", "h")


def span(seconds: tuple[float, float]) -> str:
    """Returns a range of time: 50 to 80 s, 90 s to 2 min."""
    (low, low_unit), (high, high_unit) = map(_duration, seconds)
    if (low, low_unit) == (high, high_unit):
        return f"{high} {high_unit}"
    return f"{low} to {high} {high_unit}" if low_unit == high_unit else f"{low} {low_unit} to {high} {high_unit}"
