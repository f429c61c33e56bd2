"""The climb: where it goes, what it costs, and that a stop anywhere changes nothing."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftConfig
from safetensors.torch import load_file

from ladder.tiny_ladder import Project, copying, make_climb, metrics, record, save_pretrained, switch_rows, untimed
from loratune import api
from loratune.adapter import peft_format
from loratune.errors import CheckpointError, ConfigError
from loratune.ladder.climb import Climb
from loratune.train import checkpoint, loop
from loratune.train.config import load_run_config
from loratune.train.loop import Run
from tasks import toy_tasks as tasks
from tiny_run import copy_rows, lines_of, tree

STEPS = 64  # a look after 8 steps, trials of 4
COPY = {"learning_rate": 0.01, "max_steps": STEPS, "batch_size": 16}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    return copying(tmp_path_factory.mktemp("copying"))


@pytest.fixture(scope="module")
def whole(project: Project, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ladder that nobody stopped."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert project.run(output, **COPY)["chosen"] == "expert"
    return output


# ---- proof: the data decides ---------------------------------------------------------------------------------------


SEEDS = [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def switching(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("switching")
    return save_pretrained(folder, switch_rows(4000, 5, "xy"), num_steps=200)


@pytest.mark.parametrize("seed", SEEDS)
def test_it_stops_where_the_basic_rung_suffices(switching: Path, tmp_path: Path, seed: int) -> None:
    """A known behaviour at a new mark: two projections learn it, and the rest of the loss is chance (4 ln 5 a row)."""
    rows = switch_rows(1500, seed, "z"), switch_rows(200, 100 + seed, "z")
    found = Project(tmp_path, switching, *rows).run(tmp_path / "run", learning_rate=0.005, max_steps=240, seed=seed)
    assert found["chosen"] == "fast"
    kinds = [each["kind"] for each in found["decisions"]]
    # A climb that is taken back is within the rules: at 95% one look in forty shows a gain that is none.
    assert kinds[-1] in {"stay", "back"} and set(kinds[:-1]) <= {"open", "climb"}
    assert len(found["decisions"][0]["arms"]) == 3  # it has looked one rung further
    floor = 4 * math.log(5) / 5
    base, final = found["test"]["base"]["loss"], found["test"]["final"]["loss"]
    assert base - floor > 0.5 and final - floor < 0.03  # the base's training ends elsewhere on other processors


@pytest.mark.parametrize("seed", SEEDS)
def test_it_climbs_where_the_basic_rung_does_not_suffice(project: Project, tmp_path: Path, seed: int) -> None:
    """And the result is as good as the top rung's from scratch in as many steps."""
    settings = {"learning_rate": 0.01, "max_steps": 192, "seed": seed}
    found = project.run(tmp_path / "run", **settings)
    assert found["chosen"] == "expert"
    kinds = [each["kind"] for each in found["decisions"]]
    assert kinds[0] == "climb" and set(kinds) <= {"climb", "confirmed"}
    assert found["test"]["first"]["loss"] - found["test"]["final"]["loss"] > 2
    given = {**project.settings, "output": str(tmp_path / "alone"), "adapter.preset": "expert"}
    api.run(api.load_run_config(None, given | {f"train.{name}": value for name, value in settings.items()}))
    alone = lines_of(tmp_path / "alone" / "metrics.jsonl", "evaluation")[-1]
    assert found["test"]["final"]["loss"] < alone["high"] + 0.05


def test_a_price_that_is_too_high_is_not_paid(tmp_path: Path) -> None:
    events: list[dict[str, Any]] = []
    run = make_climb(tmp_path, events.append, price={"doubling": 50.0})
    assert loop.train(run) == "done"
    (decision,) = [event for event in events if event["event"] == "decision"]
    gains = [arm["difference"] for arm in decision["arms"][1:]]
    assert decision["kind"] == "stay" and any(each["high"] < 0 for each in gains)
    doublings = math.log2(decision["arms"][1]["parameters"] / decision["arms"][0]["parameters"])
    assert decision["arms"][1]["price"] == pytest.approx(50 * doublings)


# ---- what a climb is -----------------------------------------------------------------------------------------------


def test_the_path_has_each_step_once_and_every_arm_is_on_record(whole: Path) -> None:
    lines, found = lines_of(whole / "metrics.jsonl"), record(whole)
    assert [line["step"] for line in lines if line["event"] == "step"] == list(range(1, STEPS + 1))
    trials = [each for each in found["decisions"] if "arms" in each]
    for trial in trials:
        steps = list(range(trial["step"] + 1, trial["step"] + 1 + found["trial_steps"]))
        for arm in trial["arms"]:
            own = [line for line in lines if line["event"] == "arm" and line["rung"] == arm["rung"]]
            assert [line["step"] for line in own if line["step"] in steps] == steps
    num_arms = sum(len(trial["arms"]) for trial in trials)
    assert found["overhead_steps"] == (num_arms - len(trials)) * found["trial_steps"]
    assert sum(rung["steps"] for rung in found["rungs"]) == found["steps"] == STEPS


def test_both_arms_train_on_the_same_rows(whole: Path) -> None:
    """The same numbers of tokens and labels, step by step."""
    arms: dict[str, list[Any]] = {}
    trial = record(whole)["decisions"][0]
    for line in lines_of(whole / "metrics.jsonl", "arm"):
        if trial["step"] < line["step"] <= trial["step"] + trial["steps"]:
            arms.setdefault(line["rung"], []).append((line["step"], line["num_tokens"], line["num_label_tokens"]))
    lower, *upper = arms.values()
    assert upper and all(each == lower for each in upper)


def test_every_arm_starts_from_one_and_the_same_state(tmp_path: Path) -> None:
    """Without dropout, the first loss of an arm is that of the state it starts from, which growing does not change."""
    run = make_climb(tmp_path, dropout=0.0)
    loop.train(run)
    lines = lines_of(run.output / "metrics.jsonl", "arm")
    trials = [each for each in lines_of(run.output / "metrics.jsonl", "decision") if "arms" in each]
    for trial in trials:
        first = [line for line in lines if line["step"] == trial["step"] + 1]
        assert len(first) == len(trial["arms"]) >= 2
        assert [line["loss"] for line in first] == pytest.approx([first[0]["loss"]] * len(first), rel=1e-6)
        norms = {line["grad_norm"] for line in first}
        assert len(norms) == len(first)  # but its gradient has new parts


def test_the_best_is_never_that_of_a_rung_that_was_left(tmp_path: Path) -> None:
    """On the first rung an evaluation was better than all that came later, as where a run begins to learn by heart."""
    run = make_climb(tmp_path)
    after: list[Any] = []

    def on_event(event: dict[str, Any]) -> None:
        if (event["event"], event.get("step")) == ("step", 7):
            run.best = {"step": 4, "loss": 0.0}
        if (event["event"], event.get("step")) == ("checkpoint", 12):
            after.append(run.best)

    run.on_event = on_event
    loop.train(run)
    assert climb_of(run).rung > 0 and after[0]["step"] == 12
    loop.use_best(run)


def test_the_rate_is_constant_until_the_last_rung_and_then_falls(whole: Path) -> None:
    steps, climbs = lines_of(whole / "metrics.jsonl", "step"), lines_of(whole / "metrics.jsonl", "rung")
    rates = [line["learning_rate"] for line in steps]
    settled = climbs[-1]["step"] + record(whole)["trial_steps"]
    assert rates[:3] == pytest.approx([0.01 * i / 3 for i in range(1, 4)])  # the warm-up, 5% of 64 steps
    assert rates[3:settled] == [0.01] * (settled - 3)
    assert rates[settled:] == sorted(rates[settled:], reverse=True) and 0 < rates[-1] < 0.0003


def test_the_adapter_is_that_of_the_last_rung_and_peft_reads_it(whole: Path) -> None:
    config = PeftConfig.from_pretrained(str(whole / "adapter"))
    adapter = peft_format.read(whole / "adapter")
    assert config.to_dict()["r"] == 32 and {factor.rank for factor in adapter.factors.values()} == {32}
    assert "report.html" in os.listdir(whole)


def test_the_final_figure_is_on_rows_that_no_decision_saw(whole: Path) -> None:
    found = record(whole)
    labels = json.loads((whole / "evaluations.json").read_text())["labels"]
    assert len(labels) == found["validation_rows"] >= 20 <= found["test_rows"]
    evaluations = lines_of(whole / "metrics.jsonl", "evaluation")
    assert found["test"]["final"]["loss"] not in [line["loss"] for line in evaluations]
    assert found["test"]["base"]["loss"] > found["test"]["first"]["loss"] > found["test"]["final"]["loss"]


@pytest.mark.slow
def test_two_ladders_are_the_same(project: Project, whole: Path, tmp_path: Path) -> None:
    project.run(tmp_path / "run", **COPY)
    assert_same(tmp_path / "run", whole)


# ---- faults --------------------------------------------------------------------------------------------------------


def climb_of(run: Run) -> Climb:
    assert isinstance(run.guide, Climb)
    return run.guide


def spoil_after_the_climb(run: Run, at: int) -> Callable[[dict[str, Any]], None]:
    """After a step of the path, everything that was learnt counts against itself; once."""

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == at and climb_of(run).rung:
            with torch.no_grad():
                for name, parameter in run.optimizer.parameters.items():
                    if name.endswith(".B"):
                        parameter.mul_(-2)

    return on_event


def test_a_climb_that_is_not_confirmed_is_taken_back(tmp_path: Path) -> None:
    run = make_climb(tmp_path)
    guide, trial = climb_of(run), climb_of(run).lengths.trial
    look = guide.lengths.rung
    run.on_event = spoil_after_the_climb(run, 2 * look - 1)
    assert loop.train(run) == "done"
    lines = lines_of(run.output / "metrics.jsonl")
    decisions = [line for line in lines if line["event"] == "decision"]
    assert [each["kind"] for each in decisions] == ["climb", "back"]
    upper, lower = decisions[0]["to"], decisions[0]["rung"]
    assert (guide.rung, guide.settled, guide.look, guide.kept) == (0, look + trial, None, None)
    assert run.attached.config == guide.rungs[0].config
    steps = [line["step"] for line in lines if line["event"] == "step"]
    assert steps == list(range(1, STEPS + 1))
    undone = [line["step"] for line in lines if line["event"] == "abandoned_step"]
    assert undone == list(range(look + 1, 2 * look + 1))
    arm = [line for line in lines if line["event"] == "arm" and line["rung"] == lower]
    again = [line for line in lines if line["event"] == "step" and look < line["step"] <= look + trial]
    assert [line["loss"] for line in again] == [line["loss"] for line in arm] and upper != lower
    num_arms = len(decisions[0]["arms"])
    assert guide.overhead_steps == (num_arms - 1) * trial + trial
    assert all(int(folder.name[5:]) <= STEPS for folder in checkpoint.folders(run.output))
    loop.use_best(run)


def test_a_run_that_went_back_is_the_run_that_stayed(tmp_path: Path) -> None:
    """From the arm that was left on, bit for bit: the same parameters, moments, rows and masks."""
    back = make_climb(tmp_path / "back")
    back.on_event = spoil_after_the_climb(back, 2 * climb_of(back).lengths.rung - 1)
    stay = make_climb(tmp_path / "stay", price={"doubling": 1e9})
    for run in (back, stay):
        loop.train(run)
    assert climb_of(stay).rung == 0 == climb_of(back).rung
    mine, theirs = ({**loop.parameters(run), **run.optimizer.state()} for run in (back, stay))
    assert mine.keys() == theirs.keys() and all(torch.equal(each, theirs[name]) for name, each in mine.items())


def barely_too_high(folder: Path, rungs: tuple[str, ...]) -> dict[str, float]:
    """A price just above what the best of a first look's arms gains, so that it is within the interval."""
    run = make_climb(folder, price={"doubling": 1e9}, rungs=rungs)
    loop.train(run)
    lower, *others = lines_of(run.output / "metrics.jsonl", "decision")[0]["arms"]
    doublings = [math.log2(arm["parameters"] / lower["parameters"]) for arm in others]
    gains = [-arm["difference"]["value"] / times for arm, times in zip(others, doublings, strict=True)]
    return {"doubling": max(gains) * 1.001}


def test_what_chance_leaves_open_is_looked_at_again(tmp_path: Path) -> None:
    """And may pay then: here because it has become free."""
    rungs = "fast", "expert"
    run = make_climb(tmp_path / "run", price=barely_too_high(tmp_path / "first", rungs), rungs=rungs)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "decision":
            climb_of(run).price = {}

    run.on_event = on_event
    loop.train(run)
    guide, (first, second) = climb_of(run), lines_of(run.output / "metrics.jsonl", "decision")
    assert [first["kind"], second["kind"]] == ["open", "climb"] and second["step"] == first["again"]
    assert not first["arms"][1]["pays"] and first["arms"][1]["may_pay"]
    assert guide.rung == 1 and guide.kept is None  # no arm is left for a step back
    assert guide.settled == second["step"] + guide.lengths.trial and guide.overhead_steps == 2 * guide.lengths.trial
    steps = lines_of(run.output / "metrics.jsonl", "step")
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    peak = max(line["learning_rate"] for line in steps)
    assert all(line["learning_rate"] == peak for line in steps[10 : guide.settled])


def test_what_stays_open_ends_when_no_arm_is_left(tmp_path: Path) -> None:
    """Three arms may lose: two at the first look, one at the second."""
    rungs = "fast", "quality", "expert"
    run = make_climb(tmp_path / "run", price=barely_too_high(tmp_path / "first", rungs), rungs=rungs)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "decision":
            climb_of(run).price = {"doubling": 1e9}

    run.on_event = on_event
    loop.train(run)
    guide, decisions = climb_of(run), lines_of(run.output / "metrics.jsonl", "decision")
    assert [(each["kind"], len(each["arms"])) for each in decisions] == [("open", 3), ("stay", 2)]
    assert guide.overhead_steps == 3 * guide.lengths.trial
    assert guide.settled == decisions[0]["again"] + guide.lengths.trial and guide.state()["again"] is True


def test_an_arm_that_blows_up_loses_and_says_why(tmp_path: Path) -> None:
    """Every larger arm gets a parameter that is not finite."""
    run = make_climb(tmp_path)

    def on_event(event: dict[str, Any]) -> None:
        if event["event"] == "arm" and event["rung"] != "fast":
            next(iter(run.optimizer.parameters.values())).data.fill_(math.nan)

    run.on_event = on_event
    assert loop.train(run) == "done" and climb_of(run).rung == 0
    (decision,) = lines_of(run.output / "metrics.jsonl", "decision")
    assert decision["kind"] == "stay"
    assert ["is not finite" in arm.get("failure", "") for arm in decision["arms"]] == [False, True, True]
    assert all(torch.isfinite(each).all() for each in loop.parameters(run).values())


# ---- stopped and taken up again ------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, Any]:
    """Every byte under a folder but for the clock's; of safetensors the header as JSON and the rest."""
    found: dict[str, Any] = tree(folder)
    found.pop("MANIFEST.json", None)
    for name in found:
        if name.endswith(".safetensors"):
            end = 8 + int.from_bytes(found[name][:8], "little")
            found[name] = json.loads(found[name][8:end]), found[name][end:]
        elif name.endswith(".json"):
            found[name] = untimed(json.loads(found[name]))
    return found


def assert_same(run: Path, whole: Path) -> None:
    for folder in ("adapter", f"checkpoints/step-{STEPS:06d}"):
        found, expected = content(run / folder), content(whole / folder)
        assert found.keys() == expected.keys() != set()
        assert [name for name in found if found[name] != expected[name]] == []
    assert metrics(run) == metrics(whole)
    assert untimed(record(run)) == untimed(record(whole))


def at(event: str, step: int, rung: str | None = None, number: int = signal.SIGINT) -> Callable[[dict[str, Any]], None]:
    """Sends a signal to this process at an event of a step (and of an arm)."""

    def on_event(found: dict[str, Any]) -> None:
        if (found["event"], found.get("step")) == (event, step) and rung in (None, found.get("rung")):
            os.kill(os.getpid(), number)

    return on_event


# A look at 8: arms of fast and quality to 12; the climb is confirmed, and the next one tried, at 16.
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("where", "saved"),
    [
        pytest.param(("step", 5), 5, marks=SLOW),
        (("arm", 10, "fast"), 8),
        pytest.param(("arm", 12, "quality"), None, marks=SLOW),
        pytest.param(("decision", 8), None, marks=SLOW),
        pytest.param(("checkpoint", 8), 8, marks=SLOW),
        (("checkpoint", 12), None),
        pytest.param(("step", 14), 14, marks=SLOW),
        pytest.param(("decision", 16), None, marks=SLOW),
        pytest.param(("step", 40), 40, marks=SLOW),
    ],
    ids=str,
)
def test_a_stopped_ladder_goes_on_bit_for_bit(
    project: Project, whole: Path, tmp_path: Path, where: Any, saved: int | None
) -> None:
    run = tmp_path / "run"
    project.run(run, at(*where), **COPY)
    assert not record(run) and lines_of(run / "metrics.jsonl")[-1]["step"] < STEPS
    assert saved is None or checkpoint.newest(run)[0].step == saved
    assert api.resume(run).status == "done"
    assert_same(run, whole)


@pytest.mark.slow
def test_a_ladder_that_is_stopped_again_and_again(project: Project, whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run, at("arm", 9), **COPY)
    for where in (("arm", 11, "quality"), ("step", 14), ("arm", 18), ("step", 40)):
        assert api.resume(run, at(*where)).status == "stopped"
    api.resume(run)
    assert_same(run, whole)


def test_a_ladder_that_dies_in_a_trial_goes_on_from_the_look(project: Project, whole: Path, tmp_path: Path) -> None:
    """A second signal interrupts at once: nothing is saved, as in a crash."""

    def twice(event: dict[str, Any]) -> None:
        if (event["event"], event.get("step")) == ("arm", 10):
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        project.run(run, twice, **COPY)
    assert checkpoint.newest(run)[0].step == 8
    api.resume(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_a_ladder_that_went_back_is_taken_up_again(tmp_path: Path) -> None:
    """The same spoilt run, stopped between the climb and the step back, and after it."""

    def climbed(folder: Path) -> Run:
        run = make_climb(folder)
        run.on_event = spoil_after_the_climb(run, 2 * climb_of(run).lengths.rung - 1)
        return run

    once = climbed(tmp_path / "once")
    loop.train(once)
    for name, rung in (("between", 1), ("after", 0)):  # both at step 14; the climb was tried from 8, its look was at 16
        first = climbed(tmp_path / name)
        spoil = first.on_event

        def on_event(event: dict[str, Any], run: Run = first, rung: int = rung, spoil: Any = spoil) -> None:
            spoil(event)
            if event["event"] == "step" and climb_of(run).rung == rung:
                at("step", 14)(event)

        first.on_event = on_event
        assert loop.train(first) == "stopped"
        again = climbed(tmp_path / name)
        newest, _ = checkpoint.newest(again.output)
        assert newest.step == 14
        loop.restore(again, newest)
        loop.train(again)
        mine, theirs = ({**loop.parameters(run), **run.optimizer.state()} for run in (again, once))
        assert mine.keys() == theirs.keys() and all(torch.equal(each, theirs[key]) for key, each in mine.items())
        assert metrics(again.output) == metrics(once.output)


def test_what_is_another_ladder_is_refused(project: Project, tmp_path: Path) -> None:
    run = tmp_path / "run"
    project.run(run, at("step", 5), **COPY)
    text = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text(text.replace("price: {}", "price: {doubling: 0.1}"))
    with pytest.raises(CheckpointError, match=r"ladder\.price\.doubling was null, is 0\.1"):
        api.resume(run)
    (run / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match="the steps of a ladder cannot be verified"):
        api.resume(run, verify=True)


def test_a_checkpoint_of_a_plain_run_is_no_ladders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of a run without a ladder"):
        climb_of(run := make_climb(tmp_path)).restore(run, None, {})


def test_rows_are_few(project: Project, tmp_path: Path) -> None:
    """The message reaches the user before anything is written."""
    from tiny_run import write_rows

    given = {**project.settings, "output": str(tmp_path / "run"), "train.max_steps": STEPS}
    given["data.validation"] = str(write_rows(tmp_path / "few.jsonl", copy_rows(12)))
    with pytest.raises(ValueError, match="a ladder needs 20 held-out rows to decide on"):
        api.run(api.load_run_config(None, given, ladder=True))
    assert not (tmp_path / "run").exists()


def test_the_page_of_a_ladder_has_its_section_and_not_every_step_of_every_trial(whole: Path) -> None:
    from loratune.report.run_page import run_page

    page = run_page(whole, "en")
    assert "The ladder" in page and record(whole)["verdict"] in page
    assert ">arm<" not in page and ">decision<" not in page.replace("<th>decision<", "")


def test_a_task_with_a_new_head_climbs_and_keeps_its_head(tmp_path: Path) -> None:
    """Where a head of zeros would let nothing through, each rung begins with the head that was drawn for it."""
    given = {
        "model": str(tasks.save_model(tmp_path / "model")), "output": str(tmp_path / "run"),
        "data.train": str(tasks.write(tmp_path / "train.jsonl", tasks.sentiment(200))),
        "data.validation": str(tasks.write(tmp_path / "held.jsonl", tasks.sentiment(60, seed=1))),
        "adapter.task_type": "SEQ_CLS", "train.epochs": 100.0, "train.max_steps": 80, "train.learning_rate": 0.01,
    }  # fmt: skip
    api.run(load_run_config(None, given, ladder=True))
    found = record(tmp_path / "run")
    assert found["decisions"] and found["test"]["final"]["loss"] < found["test"]["base"]["loss"]
    config = PeftConfig.from_pretrained(str(tmp_path / "run" / "adapter"))
    assert config.task_type == "SEQ_CLS"
    assert any("classifier" in name for name in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors"))
