"""A plan in figures and in a file: what is added up, what is written, and that training reads it back."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny_run
from loratune import api
from loratune.errors import ConfigError
from loratune.plan import machine
from loratune.plan.measure import Measurement
from loratune.plan.plan import Plan, check_new, duration, gigabytes, span, with_measurement, write
from loratune.train.config import ResolvedConfig, load_run_config


@pytest.fixture(scope="module")
def resolved(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    folder = tmp_path_factory.mktemp("plan")
    given = {
        "model": str(tiny_run.save_model(folder / "model")),
        "data.train": str(tiny_run.write_rows(folder / "rows.jsonl", tiny_run.copy_rows(120))),
        "output": str(folder / "run"),
        "adapter.preset": "deep",
        "train.learning_rate": 1e-3,
        "train.recompute": True,
    }
    return load_run_config(None, given)


@pytest.fixture(scope="module")
def estimated(resolved: ResolvedConfig) -> Plan:
    return api.plan(resolved, measure=False)


def test_an_estimate_runs_nothing_and_writes_nothing(resolved: ResolvedConfig, estimated: Plan) -> None:
    assert estimated.measured is None and estimated.fits
    assert not Path(resolved.config.output).exists()
    assert estimated.memory == estimated.estimate.memory.total
    low, high = estimated.seconds
    assert low < estimated.estimate.seconds.total < high


def test_a_measurement_stands_beside_the_estimate_and_writes_nothing(resolved: ResolvedConfig) -> None:
    said: list[str] = []
    made = api.plan(resolved, on_event=lambda event: said.append(event["message"]))
    assert made.measured is not None
    assert made.memory == made.measured.peak_bytes > 0
    assert made.measured.micro_batch_tokens == resolved.config.train.micro_batch_tokens
    low, high = made.step_seconds
    assert 0 < low <= high
    assert made.seconds[0] > made.measured.start_seconds
    assert not Path(resolved.config.output).exists()
    assert len(said) == len(set(said)), "each notice once, though rows are read twice"


def test_the_file_reads_back_to_the_same_run(resolved: ResolvedConfig, estimated: Plan, tmp_path: Path) -> None:
    path = tmp_path / "new" / "run.yaml"
    write(estimated, resolved, path)
    text = path.read_text("utf-8")
    assert load_run_config(path, {}).config == resolved.config
    assert f"start it with: loratune train {path}" in text.splitlines()[0]
    assert "at the peak (estimated)" in text
    assert "r: 32  # preset deep" in text and "recompute: true  # --recompute" in text


def test_a_file_is_replaced_only_if_asked(resolved: ResolvedConfig, estimated: Plan, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"exists already and was not touched.*--force"):
        write(estimated, resolved, path)
    assert path.read_text() == "mine"
    write(estimated, resolved, path, force=True)
    assert path.read_text() != "mine"
    check_new(tmp_path / "other.yaml", force=False)


def test_a_run_that_does_not_fit_is_not_written(resolved: ResolvedConfig, tmp_path: Path) -> None:
    made = api.plan(resolved, memory=10**6)
    assert not made.fits and made.measured is None, "what would not fit is not tried"
    with pytest.raises(ConfigError, match="does not fit"):
        write(made, resolved, tmp_path / "run.yaml")
    assert not (tmp_path / "run.yaml").exists()


def measured(peak: int, **seconds: float) -> Measurement:
    return Measurement(peak, seconds.get("widest", 4.0), (1.0, 1.5), 10.0, 6.0, 2048)


def test_time_is_start_steps_evaluations_and_samples(estimated: Plan) -> None:
    made = replace(estimated, measured=measured(10**9))
    work, parts = made.estimate.work, made.estimate.seconds
    low, high = made.step_seconds
    assert low == pytest.approx(1.0 / work.usual.tokens * work.typical.tokens)
    assert high == pytest.approx(4.0 / work.widest.tokens * work.typical.tokens)
    evaluation = parts.evaluations / parts.step
    assert made.seconds[0] == pytest.approx(10 + low * (work.num_steps + evaluation) + 6 / 2)
    assert made.seconds[1] == pytest.approx(10 + high * (work.num_steps + evaluation) + 6)


def test_a_measurement_overrules_the_estimate(resolved: ResolvedConfig, estimated: Plan) -> None:
    from loratune.plan.estimate import subject_of

    subject = subject_of(resolved.config, lambda message: None)
    limits = replace(estimated.limits, memory=estimated.estimate.memory.total + 1)
    plan = replace(estimated, limits=limits)
    assert plan.fits
    over = with_measurement(plan, measured(2 * limits.memory), subject, resolved.config)
    assert not over.fits and over.advice is not None
    assert with_measurement(plan, measured(1000), subject, resolved.config).advice is None


@pytest.mark.slow
def test_the_estimate_is_near_the_measurement_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A small model whose micro-batches weigh as much as Python and its libraries; real ones: bench/plan.py."""
    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 1024}
    model = tiny_run.save_model(tmp_path / "model", **shape)
    rows = [{"prompt": "say", "completion": " 1 2 3 4 5 6 7 8 9" * (20 + number % 20)} for number in range(80)]
    data = tiny_run.write_rows(tmp_path / "rows.jsonl", rows)
    words = ["plan", "--model", model, "--data", data, "--micro-batch-tokens", "4096", "--json"]
    code = "from loratune.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=True)
    plan = json.loads(done.stdout)
    memory = plan["estimate"]["memory"]
    assert memory["step"] > 0.3 * sum(memory.values()), "the step must weigh"
    assert sum(memory.values()) == pytest.approx(plan["measured"]["peak_bytes"], rel=0.1)


def test_other_tasks_are_refused_by_name(resolved: ResolvedConfig) -> None:
    adapter = resolved.config.adapter.model_copy(update={"task_type": "SEQ_CLS"})
    other = replace(resolved, config=resolved.config.model_copy(update={"adapter": adapter}))
    with pytest.raises(ConfigError, match="SEQ_CLS"):
        api.plan(other, measure=False)


def test_the_machine_is_measured_in_the_models_own_shapes() -> None:
    import torch

    rate = machine.matrix_rate(torch.device("cpu"), torch.float32, [(256, 128), (128, 256)], 64)
    assert 1e8 < rate < 1e14
    assert 1e8 < machine.read_rate(torch.device("cpu"), torch.float32) < 1e13
    assert 10**7 < machine.live_bytes() < machine.peak_memory_bytes(torch.device("cpu")) + 2**24


def test_quantities_are_written_as_people_read_them() -> None:
    assert [gigabytes(each) for each in (2.09e9, 34.8e6)] == ["2.09 GB", "34.8 MB"]
    assert [duration(each) for each in (45, 720, 12000)] == ["45 s", "12 min", "3.3 h"]
    assert [span(each) for each in ((50, 80), (90, 130), (44.9, 45.2))] == ["50 to 80 s", "90 s to 2 min", "45 s"]
