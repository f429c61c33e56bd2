"""A contest of configurations, from its settings to its files: what `loratune ladder --together` calls.

runs/NAME/
  together.json            where it stands
  configurations/EACH/     a run of its own: run.yaml, metrics.jsonl, checkpoints; adapter/ if it trained to the end
  ladder.json              what was decided, and why
  run.yaml, adapter/ ...   those of the best one, as of any run
"""

import json
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from loratune import api, files, outputs
from loratune.adapter.attach import Attached, attach
from loratune.errors import ConfigError, LoratuneError
from loratune.evaluate.samples import sample
from loratune.ladder import plan
from loratune.ladder.joint import JointModel
from loratune.ladder.lanes import Lane
from loratune.ladder.record import LADDER
from loratune.ladder.together import EACH, STATE, Together, num_looked_at, num_steps_of_all, plan_cuts
from loratune.prepare import check_coverage, load, notifier, prepare
from loratune.train import identity, loop, schedule
from loratune.train.config import ResolvedConfig, RunConfig, dump, load_run_config
from loratune.train.datasets import LEDGER, ledger_lines
from loratune.train.loop import OnEvent, Run
from loratune.train.optim import Optimizer
from loratune.train.rehearsal import rehearse
from loratune.train.signals import stop_on_signals

FINALISTS = 2


def run(output: Path, configurations: Mapping[str, ResolvedConfig], finalists: int, on_event: OnEvent) -> str:
    """Trains configurations of one model on the same rows; returns "done" or "stopped".

    Raises ConfigError, DataError or AdapterError before the first step, with nothing written; TrainingError during the
    run.
    """
    api.check_output(output)
    together, tokenizer = _prepared(output, configurations, on_event)
    together.cuts = plan_cuts(len(configurations), finalists, together.lead.num_steps)
    ledger = ledger_lines(together.lead.train, together.lead.validation)  # of all rows, before some are set apart
    _split(together)
    together.rehearse()
    with files.staged_directory(output) as staging:
        for name, resolved in configurations.items():
            files.make_directory(staging / EACH / name)
            files.atomic_write(staging / EACH / name / api.RUN_FILE, dump(resolved))
        files.atomic_write(staging / LEDGER, ledger)
        together.write_state(staging)
    with files.locked(output):
        return _finish(together, tokenizer, configurations)


def resume(output: Path, on_event: OnEvent) -> str:
    """Goes on with a contest that was stopped or has died, bit for bit as if it had not; raises as `api.resume`."""
    with files.locked(output):
        if (output / LADDER).exists():
            raise ConfigError(f"{output} has ended: there is nothing to go on with.")
        names = [each["name"] for each in json.loads((output / STATE).read_bytes())["all"]]
        configurations = {name: load_run_config(output / EACH / name / api.RUN_FILE, {}) for name in names}
        together, tokenizer = _prepared(output, configurations, on_event)
        together.restore()
        _split(together)
        on_event({"event": "notice", "message": f"resuming at step {together.lead.step} of {together.lead.num_steps}"})
        return _finish(together, tokenizer, configurations)


def _prepared(
    output: Path, configurations: Mapping[str, ResolvedConfig], on_event: OnEvent
) -> tuple[Together, PreTrainedTokenizerBase]:
    """Loads the model once, attaches an adapter for each configuration, and proves of each that it can learn."""
    (first, resolved), *others = configurations.items()
    quiet = _only_told_once(on_event)
    attached, tokenizer = load(resolved.config, notifier(on_event))
    attached.rename(first)
    lead = prepare(attached, tokenizer, resolved.config, output / EACH / first, quiet)
    lead.causal.close()
    with attached.disabled():  # or the model would keep the factors that are active now
        model = JointModel(attached.model, recompute=resolved.config.train.recompute)  # pyright: ignore[reportArgumentType]
    lead.causal = model
    runs = {first: lead}
    for name, other in others:
        config = other.config
        with _naming(name):
            attached = attach(model.model, config.adapter.to_lora_config(), name, seed=config.train.seed)
            runs[name] = _run_of(attached, tokenizer, config, lead, output / EACH / name)
            rehearse(runs[name])
    for name, each in runs.items():
        with _naming(name):
            _check(each.attached, configurations[name].config)
    lanes = [Lane(name, each, _figures(name, each)) for name, each in runs.items()]
    return Together(output, model, lanes, lead.validation, {}, on_event), tokenizer


def _run_of(attached: Attached, tokenizer: PreTrainedTokenizerBase, config: RunConfig, lead: Run, output: Path) -> Run:
    """Returns the run of another configuration: it shares the model and the rows with the first."""
    return Run(
        output=output,
        config=config.train,
        causal=lead.causal,
        attached=attached,
        optimizer=Optimizer(attached.adapter, config.train),
        train=lead.train,
        validation=lead.validation,
        identity=identity.identity(attached, tokenizer, config, lead.train, lead.validation),
        on_event=lead.on_event,
        num_parameters=lead.num_parameters,
    )


@contextmanager
def _naming(name: str) -> Generator[None]:
    """Within the block an error says which configuration it is of."""
    try:
        yield
    except LoratuneError as error:
        raise type(error)(f"configuration {name}: {error}") from error


def _check(attached: Attached, config: RunConfig) -> None:
    check_coverage(attached, config.train.allow_uneven)
    if attached.adapter.biases or attached.adapter.saved:
        raise ConfigError(
            "it trains biases or whole modules, of which a model has one copy for all. Leave them out (bias: none, no "
            "modules_to_save), or train it alone."
        )


def _figures(name: str, run: Run) -> dict[str, Any]:
    lora = run.attached.config
    targets = lora.target_modules if isinstance(lora.target_modules, str) else ",".join(lora.target_modules or ())
    rate = schedule.peak_rate(run.config, run.num_parameters)
    unknown = dict.fromkeys(("loss", "low", "high", "dropped", "failure", "difference"))
    return {
        "name": name, "r": lora.r, "targets": targets, "learning_rate": rate,
        "parameters": run.attached.adapter.num_parameters(), "steps": 0, **unknown,
    }  # fmt: skip


def _only_told_once(on_event: OnEvent) -> OnEvent:
    """Of the events of each configuration's run, what is new to a reader: each notice once, and memory."""
    told: set[str] = set()

    def tell(event: dict[str, Any]) -> None:
        text = str(event.get("message"))
        if event["event"] == "memory" or (event["event"] == "notice" and text not in told):
            told.add(text)
            on_event(event)

    return tell


def _split(together: Together) -> None:
    """Sets half of the held-out rows apart for the final test, and no more of either half than is worth its time."""
    lead, num = together.lead, len(together.configurations)
    cost = plan.row_cost(lead.validation, lead.train, lead.config.batch_size)
    budget = plan.EVALUATIONS * num_steps_of_all(together.cuts, num, lead.num_steps)
    most = max(plan.MIN_ROWS, int(budget / (cost * num_looked_at(together.cuts, num))))
    validation, together.test = plan.split_held_out(lead.validation, most)
    for lane in together.lanes:
        lane.run.validation = validation


def _finish(
    together: Together, tokenizer: PreTrainedTokenizerBase, configurations: Mapping[str, ResolvedConfig]
) -> str:
    """Trains to the end or a stop; then writes the adapters of what is left, and the run of the best one."""
    started, tell = time.perf_counter(), together.on_event
    _say_start(together)
    with stop_on_signals() as stop, closing(together.model):
        if together.train(stop) == "stopped":
            where = f"stopped and saved at step {together.lead.step}"
            message = f"{where}; go on with: loratune ladder --resume {together.output}"
            tell({"event": "notice", "message": message})
            return "stopped"
        record = together.finish()
        for lane in together.lanes:
            outputs.write_adapter(lane.run, tokenizer)
            outputs.write_evaluations(lane.run)
        _write_best(together, tokenizer, configurations[together.best.name])
        files.write_json(together.output / LADDER, record)
        api.write_report(together.output)
    seconds = time.perf_counter() - started
    end = {"event": "end", "status": "done", "steps": record["num_steps"], "output": str(together.output)}
    tell({**end, "seconds": seconds})
    tell({"event": "ladder", **record})
    return "done"


def _say_start(together: Together) -> None:
    lead, num = together.lead, len(together.lanes)
    ahead = sorted((step, count) for step, count in together.cuts.items() if step > lead.step)
    looks = ", ".join(f"{count} go on after step {step}" for step, count in ahead)
    message = (
        f"{num} configurations at the same time, on one copy of the model; {looks or 'all train to the end'}; "
        f"{len(lead.validation)} held-out rows decide, {len(together.test)} others test the result. Shown below: the "
        "one that leads"
    )
    together.on_event({"event": "notice", "message": message})
    together.on_event(
        {
            "event": "start",
            "step": lead.step,
            "num_steps": lead.num_steps,
            "num_documents": len(lead.train),
            "num_tokens": lead.train.num_tokens,
            "num_label_tokens": lead.train.num_labels,
            "num_validation": len(lead.validation),
        }
    )


def _write_best(together: Together, tokenizer: PreTrainedTokenizerBase, resolved: ResolvedConfig) -> None:
    """Makes the directory of the contest the run of its best configuration."""
    output, best = together.output, replace(together.best.run, output=together.output)
    before = sample(together.model.model, tokenizer, best.validation.documents)
    best.attached.activate()
    after = sample(together.model.model, tokenizer, best.validation.documents)
    outputs.write_adapter(best, tokenizer)
    outputs.write_samples(output, before, after)
    outputs.write_evaluations(best)
    files.atomic_write(output / loop.METRICS, (together.best.run.output / loop.METRICS).read_bytes())
    own = resolved.config.model_copy(update={"output": str(output)})
    files.atomic_write(output / api.RUN_FILE, dump(ResolvedConfig(own, resolved.origins)))
