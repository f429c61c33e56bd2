"""Configurations trained together: each ends as alone, the losers are dropped, a stop changes nothing."""

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from ladder.tiny_ladder import untimed
from loratune import contest
from loratune.adapter.attach import Attachments, attach
from loratune.cli import main
from loratune.errors import CheckpointError, ConfigError, TrainingError
from loratune.ladder.configurations import resolve
from loratune.ladder.joint import JointModel
from loratune.ladder.lanes import Lane, step
from loratune.ladder.together import EACH, STATE, num_steps_of_all, plan_cuts
from loratune.report.ladder_page import section, terminal
from loratune.train import loop
from loratune.train.config import ResolvedConfig
from loratune.train.loop import Run
from loratune.train.optim import Optimizer
from tiny_run import copy_rows, lines_of, make_run, save_model, tree, write_rows

OnEvent = Callable[[dict[str, Any]], None]
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
# Different ranks, targets, rates, schedules and clipping.
CONFIGURATIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "small": ({"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"learning_rate": 5e-3}),
    "wide": ({"r": 8, "target_modules": _ALL}, {"learning_rate": 1e-3, "warmup_steps": 4, "lr_ratio": 4.0}),
    "clipped": ({"r": 4, "target_modules": ["down_proj"]}, {"learning_rate": 2e-2, "max_grad_norm": 0.01}),
}
NUM_STEPS = 5


def made(folder: Path, name: str, dropout: float, dtype: torch.dtype, **settings: Any) -> Run:
    """The run of a configuration alone."""
    adapter, train = CONFIGURATIONS[name]
    common: dict[str, Any] = {"epochs": 100.0, "max_steps": NUM_STEPS, "micro_batch_tokens": 60, "seed": 3}
    return make_run(folder, adapter={**adapter, "lora_dropout": dropout}, dtype=dtype, **common | train | settings)


def together(folder: Path, dropout: float, dtype: torch.dtype) -> tuple[JointModel, list[Lane]]:
    """All configurations on one model, as a contest makes them."""
    first, *others = CONFIGURATIONS
    lead = made(folder, first, dropout, dtype)
    lead.attached.rename(first)
    lead.causal.close()  # type: ignore[attr-defined]
    lead.causal = model = JointModel(lead.attached.model)  # type: ignore[arg-type]
    runs = {first: lead}
    for name in others:
        alone = made(folder, name, dropout, dtype)
        attached = attach(model.model, alone.attached.config, name, seed=alone.config.seed)
        for _, parameter in attached.adapter.named_parameters():
            parameter.data = parameter.data.to(dtype)
        alone.attached, alone.causal = attached, model
        alone.optimizer, alone.gates = Optimizer(attached.adapter, alone.config), loop.watch.Gates(attached)
        runs[name] = alone
    everything = Attachments.of(model.model)
    assert everything is not None
    everything.activate(model.model, ())
    for run in runs.values():
        run.attached.train_mode(True)
    return model, [Lane(name, run, {}) for name, run in runs.items()]


def parameters(run: Run) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in run.attached.adapter.named_parameters()}


def furthest(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).abs().max()) for name in expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["64", "32"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_each_ends_where_it_ends_alone(dropout: float, dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    model, lanes = together(tmp_path, dropout, dtype)
    lines = [step(model, lanes) for _ in range(NUM_STEPS)]
    for lane in lanes:
        alone = made(tmp_path, lane.name, dropout, dtype)
        start = parameters(alone)
        alone.attached.train_mode(True)
        expected = [loop.train_step(alone) for _ in range(NUM_STEPS)]
        assert furthest(parameters(lane.run), parameters(alone)) < tolerance < 1e-3 < furthest(start, parameters(alone))
        for line, own in zip((each[lane.name] for each in lines), expected, strict=True):
            assert line == pytest.approx(own, abs=10 * tolerance)


def test_one_that_fails_leaves_the_others_as_they_are_alone(tmp_path: Path) -> None:
    model, lanes = together(tmp_path, 0.0, torch.float64)
    with torch.no_grad():
        lanes[1].run.attached.adapter.factors["model.layers.0.self_attn.q_proj"].B.fill_(torch.inf)
    before = parameters(lanes[1].run)
    found = step(model, lanes)
    assert found["wide"] == "step 1: loss nan with gradient norm nan is not finite"
    assert all(torch.equal(each, before[name]) for name, each in parameters(lanes[1].run).items())
    for lane in (lanes[0], lanes[2]):
        alone = made(tmp_path, lane.name, 0.0, torch.float64)
        alone.attached.train_mode(True)
        loop.train_step(alone)
        assert furthest(parameters(lane.run), parameters(alone)) < 1e-12


def test_a_pass_that_ran_out_of_memory_is_done_again_from_its_beginning(tmp_path: Path) -> None:
    model, lanes = together(tmp_path, 0.1, torch.float64)
    plain, calls = model.losses, 0

    def losses(batch: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:  # the first micro-batch has left gradients
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return plain(batch)

    model.losses = losses  # type: ignore[method-assign]
    step(model, lanes)
    assert [lane.run.micro_batch_tokens for lane in lanes] == [30] * 3
    for lane in lanes:
        alone = made(tmp_path, lane.name, 0.1, torch.float64)
        alone.attached.train_mode(True)
        loop.train_step(alone)
        assert furthest(parameters(lane.run), parameters(alone)) < 1e-10


# ---- how long which are trained -------------------------------------------------------------------------------------


@given(st.integers(2, 40), st.integers(1, 8), st.integers(64, 500))
def test_each_cut_leaves_the_better_half_down_to_the_finalists(num: int, finalists: int, num_steps: int) -> None:
    cuts = plan_cuts(num, finalists, num_steps)
    steps, counts = list(cuts), list(cuts.values())
    assert steps == sorted(set(steps)) and all(0 < each < num_steps for each in steps)
    assert ([num, *counts])[-1] == max(1, min(num, finalists))
    assert all(after == max(finalists, -(-before // 2)) for before, after in zip([num, *counts], counts, strict=False))
    alive, total = num, 0
    for each in range(num_steps):
        alive = cuts.get(each, alive)
        total += alive
    assert num_steps_of_all(cuts, num, num_steps) == total


def test_few_steps_are_refused() -> None:
    assert plan_cuts(8, 2, 4) == {1: 4, 2: 2}
    with pytest.raises(ConfigError, match=r"3 steps are too few for 2 looks: expected 4 or more."):
        plan_cuts(8, 2, 3)


# ---- from the command line -------------------------------------------------------------------------------------------

_FILE = """\
small: {preset: fast, r: 2, learning_rate: 5e-3}
wide: {preset: expert, r: 4, learning_rate: 1e-2}
slow: {r: 2, target_modules: all-linear, learning_rate: 1e-5}
other: {r: 4, target_modules: [down_proj], learning_rate: 5e-3, lora_dropout: 0.2, use_dora: true}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("together")
    save_model(folder / "model", num_hidden_layers=1)
    write_rows(folder / "train.jsonl", copy_rows(200))
    write_rows(folder / "held.jsonl", copy_rows(80, seed=1))
    (folder / "configs.yaml").write_text(_FILE)
    return folder


def arguments(project: Path, output: Path) -> list[str]:
    return [
        "ladder", "--together", "--configs", str(project / "configs.yaml"), "--model", str(project / "model"),
        "--data", str(project / "train.jsonl"), "--validation", str(project / "held.jsonl"), "--output", str(output),
        "--epochs", "5", "--max-steps", "12",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A contest of four that nobody stopped: two go on after step 6."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert main.run(arguments(project, output)) == 0
    return output


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "ladder.json").read_text())


def adapter_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_what_trained_to_the_end_is_what_train_makes_of_it(project: Path, whole: Path, tmp_path: Path) -> None:
    for name in record_of(whole)["survivors"]:
        settings = str(whole / EACH / name / "run.yaml")
        assert main.run(["train", settings, "--output", str(tmp_path / name), "--eval-every", "12"]) == 0
        own, alone = (adapter_of(folder / "adapter") for folder in (whole / EACH / name, tmp_path / name))
        assert furthest(own, alone) < 1e-5


def test_the_losers_are_dropped_and_can_be_trained_to_their_end(whole: Path) -> None:
    record = record_of(whole)
    (decision,) = record["decisions"]
    figures = {each["name"]: each for each in record["configurations"]}
    assert decision["step"] == 6 and set(decision["kept"]) == set(record["survivors"])
    assert {each["name"] for each in decision["dropped"]} == figures.keys() - set(record["survivors"])
    kept = [lines_of(whole / EACH / name / "metrics.jsonl", "evaluation")[1] for name in decision["kept"]]
    worst_kept = max(each["loss"] for each in kept)
    for each in decision["dropped"]:
        assert figures[each["name"]]["dropped"] == 6 and each["loss"] > worst_kept and each["difference"]["value"] > 0
        assert main.run(["train", "--resume", str(whole / EACH / each["name"])]) == 0
    assert record["steps"] == 4 * 6 + 2 * 6 and record["chosen"] in record["survivors"]


def test_the_directory_is_a_run_of_the_best_one(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = record_of(whole)
    assert adapter_of(whole / "adapter").keys() == adapter_of(whole / EACH / record["chosen"] / "adapter").keys()
    assert furthest(adapter_of(whole / "adapter"), adapter_of(whole / EACH / record["chosen"] / "adapter")) == 0
    assert main.run(["runs", "show", str(whole), "--lang", "en"]) == 0
    page = (whole / "report.html").read_text()
    assert "Configurations trained at the same time" in page and f"{record['chosen']} is the best of 4" in page
    assert record["test_rows"] >= 20 and record["test"]["final"]["loss"] < record["test"]["base"]["loss"]


def test_it_is_told_in_both_languages_and_in_80_columns(whole: Path) -> None:
    english, ukrainian = section(whole), section(whole, "uk")
    assert "go on. Dropped, with held-out losses above" in english and "Далі йдуть" in ukrainian
    assert english.count("<circle") == ukrainian.count("<circle") == 4
    assert max(map(len, terminal(record_of(whole)).splitlines())) <= 80


# ---- stopped and taken up again -------------------------------------------------------------------------------------


class Killed(Exception):
    """Stands for a process that ends at once."""


def configurations(project: Path, output: Path) -> dict[str, ResolvedConfig]:
    given = {
        "model": str(project / "model"), "data.train": str(project / "train.jsonl"), "output": str(output),
        "data.validation": str(project / "held.jsonl"), "train.epochs": 5.0, "train.max_steps": 12,
    }  # fmt: skip
    return resolve(None, given, project / "configs.yaml")[1]


def _latest(found: dict[str, bytes | None]) -> dict[str, bytes | None]:
    """Of the checkpoints of each configuration the last: a stop leaves another before it."""
    last: dict[str, str] = {}
    for name in sorted(name for name in found if "/checkpoints/step-" in name):
        parts = name.split("/")
        last[parts[1]] = parts[3]
    kept = {"/".join((EACH, name, "checkpoints", step)) for name, step in last.items()}
    return {name: each for name, each in found.items() if "/checkpoints/" not in name or name.startswith(tuple(kept))}


def same_files(output: Path, whole: Path) -> None:
    """Adapters and checkpoints are the same bytes, metrics and the record the same but for the clock."""
    ours, theirs = _latest(tree(output)), _latest(tree(whole))
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        if name.endswith((".safetensors", "adapter_config.json")):
            assert ours[name] == content, name
    assert untimed(record_of(output)) == untimed(record_of(whole))
    for name in record_of(whole)["survivors"]:
        own, expected = (lines_of(folder / EACH / name / "metrics.jsonl") for folder in (output, whole))
        assert untimed(own) == untimed(expected)


@pytest.fixture(scope="module")
def unbroken(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("unbroken") / "run"
    assert contest.run(output, configurations(project, output), 2, lambda event: None) == "done"
    return output


@pytest.mark.parametrize("step", [3, 9])
def test_a_contest_that_was_stopped_goes_on_as_if_it_had_not_been(
    step: int, project: Path, unbroken: Path, tmp_path: Path
) -> None:
    output, told = tmp_path / "run", []

    def stop(event: dict[str, Any]) -> None:
        told.append(event)
        if event["event"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    assert contest.run(output, configurations(project, output), 2, stop) == "stopped"
    assert told[-1]["message"].endswith(f"go on with: loratune ladder --resume {output}")
    assert main.run(["ladder", "--resume", str(output)]) == 0
    same_files(output, unbroken)


@pytest.mark.parametrize(("event", "step"), [("step", 2), ("decision", 6), ("step", 10)])
def test_a_contest_that_died_goes_on_from_its_last_save(
    event: str, step: int, project: Path, unbroken: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"

    def die(found: dict[str, Any]) -> None:
        if found["event"] == event and found["step"] == step:
            raise Killed

    with pytest.raises(Killed):
        contest.run(output, configurations(project, output), 2, die)
    assert contest.resume(output, lambda event: None) == "done"
    same_files(output, unbroken)
    with pytest.raises(ConfigError, match="has ended"):
        contest.resume(output, lambda event: None)


def test_a_checkpoint_that_is_damaged_is_not_gone_on_from(project: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def die(found: dict[str, Any]) -> None:
        if found["event"] == "step" and found["step"] == 7:
            raise Killed

    with pytest.raises(Killed):
        contest.run(output, configurations(project, output), 2, die)
    name = next(iter(json.loads((output / STATE).read_text())["lanes"]))
    file = output / EACH / name / "checkpoints" / "step-000006" / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors"):
        contest.resume(output, lambda event: None)


def test_what_is_dropped_leaves_the_memory(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors: list[weakref.ref[Tensor]] = []  # one of each adapter, which its optimizer and the model hold
    left: dict[int, int] = {}
    monkeypatch.setattr(Optimizer, "__init__", _noting(Optimizer.__init__, tensors))

    def see(event: dict[str, Any]) -> None:
        if event["event"] == "step":
            gc.collect()
            left[event["step"]] = sum(each() is not None for each in tensors)

    output = tmp_path / "run"
    contest.run(output, configurations(project, output), 1, see)
    assert (left[3], left[4], left[7]) == (4, 2, 1)


def _noting(init: Any, made: list[weakref.ref[Tensor]]) -> Any:
    def noting(self: Optimizer, *args: Any) -> None:
        init(self, *args)
        made.append(weakref.ref(next(iter(self.parameters.values()))))

    return noting


# ---- what goes wrong ------------------------------------------------------------------------------------------------

_WILD = "{}: {{target_modules: [lm_head], lora_alpha: 100000, learning_rate: {}}}\n"


def test_a_configuration_that_blows_up_is_dropped_and_the_rest_goes_on(project: Path, tmp_path: Path) -> None:
    file = project / "wild.yaml"
    file.write_text("a: {r: 2, learning_rate: 1e-3}\n" + _WILD.format("wild", 1.0))
    given = {"train.max_steps": 12, "train.epochs": 20.0, "train.max_grad_norm": 1e6}
    output = tmp_path / "run"
    base = _given(project, output) | given
    contest.run(output, resolve(None, base, file)[1], 2, lambda event: None)
    wild = next(each for each in record_of(output)["configurations"] if each["name"] == "wild")
    assert wild["dropped"] < 12 and ("blown up" in wild["failure"] or "not finite" in wild["failure"])
    assert record_of(output)["chosen"] == "a" and f"{wild['dropped']}, failed" in section(output)


def _given(project: Path, output: Path) -> dict[str, Any]:
    return {
        "model": str(project / "model"), "data.train": str(project / "train.jsonl"), "output": str(output),
        "data.validation": str(project / "held.jsonl"),
    }  # fmt: skip


def test_all_that_fail_end_the_contest(project: Path, tmp_path: Path) -> None:
    file = project / "all-wild.yaml"
    file.write_text(_WILD.format("a", 1.0) + _WILD.format("b", 0.9))
    base = _given(project, tmp_path / "run") | {"train.max_steps": 12, "train.epochs": 30.0, "train.max_grad_norm": 1e6}
    with pytest.raises(TrainingError, match="every configuration has failed"):
        contest.run(tmp_path / "run", resolve(None, base, file)[1], 2, lambda event: None)


_NEEDED = ["--together", "--model", "m", "--data", "d", "--output", "o"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {r: 2}\n", "{file}: found 1 configurations; expected two or more."),
        ("a: {r: 2}\nb: 5\n", "{file}:2: b is 5; expected settings, such as b: {{r: 8, learning_rate: 5e-4}}."),
        ("a: {r: 2}\nb:\n  rr: 3\n", "{file}:3: b: 'rr' cannot differ between configurations; did you mean 'r'?"),
        ("a: {r: 2}\nb: {seed: 3}\n", "{file}:2: b: 'seed' cannot differ between configurations; what may differ: pre"),
        ("a: {r: 2}\nb: {r: 0}\n", "{file}:2: adapter.r is 0; expected a whole number, at least 1."),
        ("a: {r: 2}\na/b: {r: 3}\n", "adapter name 'a/b': expected 1 to 64 letters"),
        ("a: {r: 2}\na: {r: 3}\n", "{file}:2: key 'a' is given twice, first on line 1."),
    ],
)
def test_a_wrong_file_is_answered_at_once(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert main.run(["ladder", *_NEEDED, "--configs", str(file)]) == 2
    assert capsys.readouterr().err.startswith("error: " + message.format(file=file))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--finalists", "3"], "--configs and --finalists belong to --together, which is not given."),
        (["--together", "--rungs", "fast,quality"], "--rungs and --price are of a climb"),
        ([*_NEEDED, "--eval-every", "5"], "eval_every (--eval-every) has no meaning with --together: leave it out."),
        ([*_NEEDED, "--task", "SEQ_CLS"], "--together trains CAUSAL_LM only, not SEQ_CLS."),
        (["--together"], "no base model is set"),
    ],
)
def test_wrong_usage_is_answered_at_once(args: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["ladder", *args]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_without_a_file_it_is_a_grid_around_the_rate() -> None:
    given = {"model": "m", "data.train": "d", "output": "o", "train.learning_rate": 0.004, "train.seed": 7}
    _, found = resolve(None, given, None)
    settings = {
        (each.config.adapter.r, each.config.adapter.lora_alpha, str(each.config.adapter.target_modules),
         each.config.train.learning_rate) for each in found.values()
    }  # fmt: skip
    assert len(found) == len(settings) == 8 and {rate for *_, rate in settings} == {0.002, 0.008}
    assert all(r is not None and alpha == 2 * r for r, alpha, *_ in settings)
    first = found["fast-r8-0.002"]
    assert first.config.output == "o/configurations/fast-r8-0.002" and first.config.train.seed == 7
    assert first.origins["train.seed"] == "--seed" and first.origins["adapter.r"] == "grid"


def test_what_has_one_copy_for_all_is_refused(project: Path, tmp_path: Path) -> None:
    file = project / "saved.yaml"
    file.write_text("a: {r: 2}\nb: {r: 2, modules_to_save: [norm]}\n")
    with pytest.raises(ConfigError, match="configuration b: it trains biases or whole modules, of which"):
        contest.run(tmp_path / "run", resolve(None, _given(project, tmp_path / "run"), file)[1], 2, lambda event: None)
    assert not (tmp_path / "run").exists()


def test_a_cache_of_one_adapter_s_frozen_layers_is_refused(project: Path, tmp_path: Path) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(f"model: {project}\ndata: {{train: rows.jsonl}}\ntrain: {{keep_frozen_mb: 100}}\n")
    with pytest.raises(ConfigError, match=r"keep_frozen_mb .* has no meaning with --together"):
        resolve(settings, {"output": str(tmp_path / "run")}, None)
