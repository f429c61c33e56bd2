"""Wrong settings are caught before a run, and what is advised does what it says."""

from pathlib import Path
from typing import Any

import pytest

import tiny_run
from loratune.errors import ConfigError, DataError
from loratune.plan.estimate import Subject, attached_skeleton, estimate, subject_of
from loratune.plan.plan import Plan, draft
from loratune.plan.verdict import Limits, advise, consumers_of, warnings_of
from loratune.train.config import RunConfig, load_run_config

DISK = 10**15


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    tiny_run.save_model(folder / "model", hidden_size=64, intermediate_size=256, max_position_embeddings=512)
    generator = tiny_run.random.Random(0)
    rows = [
        {"prompt": "say", "completion": " ".join(str(generator.randrange(10)) for _ in range(number % 90 + 3))}
        for number in range(120)
    ]
    tiny_run.write_rows(folder / "rows.jsonl", rows)
    return folder


def configured(folder: Path, **settings: Any) -> RunConfig:
    given = {"model": str(folder / "model"), "data.train": str(folder / "rows.jsonl"), "output": str(folder / "run")}
    return load_run_config(None, given | {key.replace("__", "."): value for key, value in settings.items()}).config


@pytest.fixture(scope="module")
def subject(folder: Path) -> Subject:
    return subject_of(configured(folder), lambda message: None)


def limits(bytes_less: int, subject: Subject, config: RunConfig) -> Limits:
    return Limits(estimate(subject, config).memory.total - bytes_less, DISK)


def test_a_run_that_fits_needs_no_advice(folder: Path, subject: Subject) -> None:
    made = draft(subject, configured(folder), 10**12)
    assert made.fits and made.advice is None and not made.is_tight


def test_one_gigabyte_too_few_is_told(folder: Path, subject: Subject) -> None:
    need = estimate(subject, configured(folder)).memory.total
    made = draft(subject, configured(folder), need - 1)
    assert not made.fits and made.advice is not None
    assert draft(subject, configured(folder), need).fits
    assert draft(subject, configured(folder), need).is_tight


def test_what_costs_nothing_is_advised_first(folder: Path, subject: Subject) -> None:
    config = configured(folder, adapter__preset="deep", train__batch_size=16)
    found = advise(subject, config, limits(1, subject, config))
    assert found.kind == "either"
    assert found.changes[0].what.startswith("micro_batch_tokens")
    assert [change.fits for change in found.changes] == [True, True]


def test_each_change_is_what_the_run_with_it_takes(folder: Path, subject: Subject) -> None:
    config = configured(folder, adapter__preset="deep")
    found = {change.what: change for change in advise(subject, config, limits(1, subject, config)).tried}
    assert {what.partition(":")[0] for what in found} >= {"micro_batch_tokens", "recompute", "preset"}
    changed = configured(folder, adapter__preset="deep", train__recompute=True)
    assert found["recompute: true"].memory == estimate(subject, changed).memory.total
    changed = configured(folder, adapter__preset="fast")
    assert found["preset: fast"].memory == estimate(subject, changed).memory.total
    assert found["preset: fast"].seconds == pytest.approx(estimate(subject, changed).seconds.total)


def test_half_precision_weights_may_stay_as_they_are_stored(folder: Path, subject: Subject, tmp_path: Path) -> None:
    assert not any(change.what == "dtype: stored" for change in advise(subject, configured(folder), Limits(1, 1)).tried)
    model = tiny_run.tiny_llama(hidden_size=64, intermediate_size=256, max_position_embeddings=512)
    model.bfloat16().save_pretrained(tmp_path)
    tiny_run.tokenizer().save_pretrained(tmp_path)
    config = configured(folder, model=str(tmp_path))
    half = subject_of(config, lambda message: None)
    [found] = [change for change in advise(half, config, Limits(1, 1)).tried if change.what == "dtype: stored"]
    assert estimate(half, config).memory.total - found.memory == 2 * half.base.num_parameters


def test_where_one_change_is_not_enough_two_are_given(folder: Path, subject: Subject) -> None:
    config = configured(folder, adapter__preset="deep")
    tried = advise(subject, config, Limits(10**6, DISK)).tried
    best = min(change.memory for change in tried)
    found = advise(subject, config, Limits(best - 1, DISK))
    assert found.kind == "both"
    [pair] = found.changes
    assert pair.fits and pair.memory < best and " and " in pair.what


def test_the_two_are_those_that_cost_least(folder: Path, subject: Subject) -> None:
    """Memory and disk are both short: smaller micro-batches and fewer checkpoints, not a lower preset for the disk."""
    config = configured(folder, adapter__preset="deep", train__keep=8)
    disk = estimate(subject, configured(folder, adapter__preset="deep", train__keep=1)).disk.most
    lower = estimate(subject, configured(folder, adapter__preset="fast", train__keep=8)).disk.most
    found = advise(subject, config, Limits(estimate(subject, config).memory.total - 1, max(disk, lower)))
    assert found.kind == "both"
    assert found.changes[0].what == "micro_batch_tokens: 402 and keep: 1"


def test_what_can_never_fit_is_said_with_the_least_it_takes(folder: Path, subject: Subject) -> None:
    config = configured(folder, adapter__preset="deep")
    found = advise(subject, config, Limits(10**6, DISK))
    assert found.kind == "none"
    assert found.changes[0].memory <= min(change.memory for change in found.tried)


def test_a_full_disk_is_a_matter_of_checkpoints(folder: Path, subject: Subject) -> None:
    config = configured(folder, adapter__preset="deep", train__keep=8)
    found = advise(subject, config, Limits(10**12, estimate(subject, config).disk.most - 1))
    assert found.kind == "either" and found.changes[0].what == "keep: 1"


def test_a_target_that_the_model_lacks_is_an_error_that_names_what_it_has(folder: Path) -> None:
    config = configured(folder, adapter__target_modules=["q_prj"])
    subject = subject_of(config, lambda message: None)
    with pytest.raises(ConfigError, match=r"q_prj.*q_proj"):
        draft(subject, config, None)


def test_rows_beyond_the_context_stop_a_plan_as_they_stop_a_run(folder: Path, tmp_path: Path) -> None:
    rows = tiny_run.write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b " * 600}] * 4)
    with pytest.raises(DataError, match=r"rows.jsonl:1: the row is \d+ tokens long, the limit is 512"):
        subject_of(configured(folder, data__train=str(rows)), lambda message: None)


def warned(folder: Path, subject: Subject, **settings: Any) -> str:
    config = configured(folder, **settings)
    found = estimate(subject, config)
    with attached_skeleton(subject, config) as attached:
        return "\n".join(warnings_of(subject, config, attached, found))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train__max_steps": 5}, "the run has 5 steps"),
        ({"train__max_steps": 5}, "max_steps 5 ends the run before every row"),
        ({"train__epochs": 3, "train__warmup_steps": 90}, "the warm-up of 90 steps"),
        ({"adapter__r": 48, "adapter__preset": "quality"}, "more than full rank"),
    ],
)
def test_what_is_hardly_meant_is_said(folder: Path, subject: Subject, settings: dict[str, Any], words: str) -> None:
    assert words in warned(folder, subject, **settings)
    assert warned(folder, subject, train__epochs=3) == ""


def test_an_output_that_exists_is_said(folder: Path, subject: Subject) -> None:
    assert "exists already" in warned(folder, subject, output=str(folder), train__epochs=3)


@pytest.mark.parametrize(("r", "verdict"), [(16, "loads"), (32, "loads, with a note"), (1024, "refuses")])
def test_a_rank_above_a_consumers_limit_is_said(folder: Path, subject: Subject, r: int, verdict: str) -> None:
    config = configured(folder, adapter__r=r)
    with attached_skeleton(subject, config) as attached:
        found = {each.name: each for each in consumers_of(attached)}
    assert found["vllm"].verdict == verdict
    assert found["peft"].verdict == "loads"
    assert (f"rank {r}" in " ".join(found["vllm"].findings)) is (r > 16)


def test_estimating_leaves_the_model_as_it_was(folder: Path, subject: Subject) -> None:
    before = [name for name, _ in subject.base.model.named_modules()]
    made = draft(subject, configured(folder, adapter__preset="deep"), 10**6)
    assert isinstance(made, Plan) and not made.fits
    assert [name for name, _ in subject.base.model.named_modules()] == before
