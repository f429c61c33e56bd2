"""`loratune train`: one run, from a YAML file, flags, or both; or a stopped run taken up again."""

from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import typer

from loratune.cli.options import AsJson, mapping
from loratune.errors import ConfigError

# Option of this verb -> key of the run's configuration.
KEYS = {
    "model": "model",
    "data": "data.train",
    "validation": "data.validation",
    "format": "data.format",
    "train_on": "data.train_on",
    "long": "data.long",
    "reject": "data.reject",
    "output": "output",
    "task": "adapter.task_type",
    "preset": "adapter.preset",
    "r": "adapter.r",
    "lora_alpha": "adapter.lora_alpha",
    "target_modules": "adapter.target_modules",
    "lora_dropout": "adapter.lora_dropout",
    "bias": "adapter.bias",
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "batch_size": "train.batch_size",
    "micro_batch_tokens": "train.micro_batch_tokens",
    "learning_rate": "train.learning_rate",
    "seed": "train.seed",
    "allow_uneven": "train.allow_uneven",
    "eval_every": "train.eval_every",
    "save_every": "train.save_every",
    "patience": "train.patience",
}


def _option(help_text: str, metavar: str | None = None, panel: str = "Options") -> Any:
    return typer.Option(help=help_text, metavar=metavar, rich_help_panel=panel, show_default=False)


def train(
    context: typer.Context,
    config: Annotated[
        Path | None, typer.Argument(metavar="RUN.YAML", help="The run's YAML file.", show_default=False)
    ] = None,
    model: Annotated[str | None, _option("Base model: folder, hub id or GGUF file.", "MODEL")] = None,
    data: Annotated[str | None, _option("Training rows: a file, FILE#500, a folder, hub:NAME.", "FILE")] = None,
    validation: Annotated[str | None, _option("Rows to evaluate on (default: 5% held out).", "FILE")] = None,
    output: Annotated[str | None, _option("The run directory.", "DIR")] = None,
    task: Annotated[
        str | None, _option("What the rows teach, such as SEQ_CLS (default: CAUSAL_LM, continuing text).", "TASK")
    ] = None,
    resume: Annotated[Path | None, _option("Take up a stopped run where it was.", "RUN")] = None,
    allow_changed: Annotated[
        bool, typer.Option("--allow-changed", help="Resume with what has changed; the run is labelled so.")
    ] = False,
    verify_resume: Annotated[
        bool, typer.Option("--verify-resume", help="Before it goes on, repeat the last steps and compare.")
    ] = False,
    as_json: AsJson = False,
    format: Annotated[str | None, _option("The rows' format, where their keys do not tell.", "NAME", "Data")] = None,
    column: Annotated[
        list[str] | None, _option("Which key is which column: prompt=question_text.", "COLUMN=KEY", "Data")
    ] = None,
    train_on: Annotated[str | None, _option("completion, all or last (default: completion).", "WHICH", "Data")] = None,
    long: Annotated[
        str | None, _option("Rows beyond the limit: stop, drop or split (default: stop).", "WHAT", "Data")
    ] = None,
    reject: Annotated[
        bool | None,
        typer.Option(
            "--reject", help="Go on without the rows that cannot be used, and list them.", rich_help_panel="Data"
        ),
    ] = None,
    preset: Annotated[str | None, _option("fast, quality or deep (default: fast).", "NAME", "Adapter")] = None,
    r: Annotated[int | None, _option("Rank: how much new it can learn (default: 8).", "N", "Adapter")] = None,
    lora_alpha: Annotated[float | None, _option("Scale of its contribution (default: 2 r).", "N", "Adapter")] = None,
    target_modules: Annotated[
        str | None, _option("Layers to adapt: names with commas, a preset, or all-linear.", "NAMES", "Adapter")
    ] = None,
    lora_dropout: Annotated[float | None, _option("Against over-fitting (default: 0.05).", "P", "Adapter")] = None,
    bias: Annotated[str | None, _option("Biases to train: none, lora_only, all.", "WHICH", "Adapter")] = None,
    epochs: Annotated[float | None, _option("Passes over the rows (default: 1).", "N", "Training")] = None,
    max_steps: Annotated[int | None, _option("Stop after so many steps.", "N", "Training")] = None,
    batch_size: Annotated[int | None, _option("Documents per optimizer step (default: 8).", "N", "Training")] = None,
    micro_batch_tokens: Annotated[
        int | None, _option("Tokens at a time: memory only, not the result (default: 2048).", "N", "Training")
    ] = None,
    learning_rate: Annotated[
        float | None, _option("Peak rate (default: 5e-4; 3e-4 above 4e9 parameters).", "X", "Training")
    ] = None,
    seed: Annotated[int | None, _option("Of initial values, order and dropout (default: 0).", "N", "Training")] = None,
    eval_every: Annotated[int | None, _option("Steps between evaluations.", "N", "Training")] = None,
    save_every: Annotated[int | None, _option("Steps between checkpoints.", "N", "Training")] = None,
    patience: Annotated[int | None, _option("Stop after N evaluations without a best.", "N", "Training")] = None,
    allow_uneven: Annotated[
        bool | None,
        typer.Option("--allow-uneven", help="Train a target that only some layers have.", rich_help_panel="Adapter"),
    ] = None,
) -> int:
    """Tune a model on your rows. Flags override the YAML file; Ctrl-C saves, and --resume goes on from there."""
    given = {key: context.params[name] for name, key in KEYS.items() if context.params[name] is not None}
    if column:
        given["data.columns"] = mapping(column, "--column", "prompt=question_text")
    if resume is not None:
        return resume_run(resume, config, given, as_json, allow_changed=allow_changed, verify=verify_resume)
    if allow_changed or verify_resume:
        raise ConfigError("--allow-changed and --verify-resume belong to --resume RUN, which is not given.")
    if target_modules is not None:
        given["adapter.target_modules"] = targets_of(target_modules)
    from loratune.train.config import load_run_config

    resolved = load_run_config(config, given)  # before anything heavy: a wrong key is answered at once
    from loratune import api
    from loratune.cli.panel import Panel, exit_code

    with Panel(resolved.config.output, as_json=as_json) as panel:
        result = api.run(resolved, panel)
    return exit_code(result)


def resume_run(run: Path, config: Path | None, given: dict[str, Any], as_json: bool, **how: bool) -> int:
    """Takes a run up again from the command line; ConfigError for settings, which the run has already."""
    from loratune.train.config import flag_of

    extra = ([str(config)] if config else []) + [flag_of(key) for key in given]
    if extra:
        raise ConfigError(f"--resume goes on with the run's own configuration; remove {', '.join(extra)}.")
    if not run.is_dir():
        raise ConfigError(f"{run} is not a run directory. Give the folder that the stopped run wrote to.")
    from loratune import api
    from loratune.cli.panel import Panel, exit_code

    here = Path.cwd()
    home = api.working_directory(run) if (run / api.RUN_FILE).is_file() else None
    with Panel(str(run), as_json=as_json) as panel, chdir(home or "."):
        result = api.resume(run if home in (None, here) else here / run, panel, **how)
    return exit_code(result)


def targets_of(text: str) -> str | list[str]:
    """Returns a preset's name or "all-linear" as it is, else the names between the commas."""
    from typing import get_args

    from loratune.train.config import Preset

    if text == "all-linear" or text in get_args(Preset):
        return text
    return [name.strip() for name in text.split(",") if name.strip()]
