"""`loratune ladder`: a run that begins with the basic adapter and climbs only as far as the data pays for."""

from contextlib import chdir
from pathlib import Path
from typing import Annotated, Any

import typer

from loratune.cli import train as plain
from loratune.cli.options import borrow_options, mapping
from loratune.errors import ConfigError

# What the rungs set, and what has no meaning where a run grows.
_NOT_HERE = ("preset", "r", "lora_alpha", "target_modules", "patience", "verify_resume")
_KEYS = {name: key for name, key in plain.KEYS.items() if name not in _NOT_HERE}
_PRICES = ("doubling", "second", "gb")


def ladder(
    context: typer.Context,
    config: Path | None,
    rungs: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES", show_default=False, rich_help_panel="Ladder",
            help="From the lowest: presets, with a rank if not their own: fast,fast:16,expert "
            "(default: fast,quality,expert).",
        ),
    ] = None,
    price: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=NATS", show_default=False, rich_help_panel="Ladder",
            help="What a climb must lower the held-out loss by, for each doubling of the parameters, second per step, "
            "gb of memory: doubling=0.01 (default: any real gain will do).",
        ),
    ] = None,
    together: Annotated[
        bool,
        typer.Option(
            "--together", rich_help_panel="Together",
            help="Train several configurations at the same time on one copy of the model, and drop the losers.",
        ),
    ] = False,
    configs: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", show_default=False, rich_help_panel="Together",
            help="YAML of names and what each sets: wide: {r: 32, learning_rate: 5e-4} "
            "(default: 2 ranks x 2 sets of targets x 2 rates).",
        ),
    ] = None,
    finalists: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, show_default=False, rich_help_panel="Together",
            help="How many train to the end (default: 2).",
        ),
    ] = None,
    **shared: Any,
) -> int:  # fmt: skip
    """Start basic, then climb: train the lowest rung, and a richer one only where a paired trial shows that it pays.

    A climb keeps what was learnt. Held-out rows decide, others test the result. Ctrl-C saves, and --resume goes on.
    """
    given = {key: shared[name] for name, key in _KEYS.items() if shared[name] is not None}
    if shared["column"]:
        given["data.columns"] = mapping(shared["column"], "--column", "prompt=question_text")
    if rungs is not None:
        given["ladder.rungs"] = [name.strip() for name in rungs.split(",")]
    if price:
        given["ladder.price"] = _prices(price)
    as_json, allow_changed = shared["as_json"], shared["allow_changed"]
    if (configs is not None or finalists is not None) and not together:
        raise ConfigError("--configs and --finalists belong to --together, which is not given.")
    if together and (rungs is not None or price):
        raise ConfigError("--rungs and --price are of a climb; with --together, give --configs FILE.")
    if shared["resume"] is not None and (shared["resume"] / "together.json").exists():
        return _resume_together(shared["resume"], config, given, as_json)
    if shared["resume"] is not None:
        return plain.resume_run(shared["resume"], config, given, as_json, allow_changed=allow_changed, verify=False)
    if allow_changed:
        raise ConfigError("--allow-changed belongs to --resume RUN, which is not given.")
    if together:
        return _train_together(config, given, configs, finalists, as_json)
    from loratune.train.config import load_run_config

    resolved = load_run_config(config, given, ladder=True)  # before anything heavy: a wrong key is answered at once
    from loratune import api
    from loratune.cli.panel import Panel, exit_code

    with Panel(resolved.config.output, as_json=as_json) as panel:
        result = api.run(resolved, panel)
    return exit_code(result)


def _train_together(
    config: Path | None, given: dict[str, Any], configs: Path | None, finalists: int | None, as_json: bool
) -> int:
    from loratune.ladder.configurations import resolve

    base, configurations = resolve(config, given, configs)
    from loratune import contest
    from loratune.cli.panel import STOPPED_RESUMABLE, Panel

    output = base.config.output
    with Panel(output, as_json=as_json) as panel:
        status = contest.run(Path(output), configurations, finalists or contest.FINALISTS, panel)
    return STOPPED_RESUMABLE if status == "stopped" else 0


def _resume_together(run: Path, config: Path | None, given: dict[str, Any], as_json: bool) -> int:
    if config is not None or given:
        raise ConfigError("--resume goes on with the configurations of the run; give nothing else.")
    from loratune import api, contest
    from loratune.cli.panel import STOPPED_RESUMABLE, Panel

    here, home = Path.cwd(), api.working_directory(next((run / contest.EACH).iterdir()))
    with Panel(str(run), as_json=as_json) as panel, chdir(home or "."):
        status = contest.resume(run if home in (None, here) else here / run, panel)
    return STOPPED_RESUMABLE if status == "stopped" else 0


def _prices(pairs: list[str]) -> dict[str, float]:
    prices: dict[str, float] = {}
    for name, text in mapping(pairs, "--price", "doubling=0.01").items():
        try:
            prices[name] = float(text)
        except ValueError:
            raise ConfigError(f"--price {name}={text}: expected a number of nats, such as {name}=0.01.") from None
        if name not in _PRICES:
            raise ConfigError(f"--price {name}={text}: unknown; expected {', '.join(_PRICES)}.")
    return prices


borrow_options(ladder, plain.train, without=_NOT_HERE)
