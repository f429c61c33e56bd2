"""The demo: Gemma 3 270M learns to put marks and capitals back into Ukrainian sentences, and shows before and after."""

import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratune import api
from loratune.adapter import roles
from loratune.adapter.attach import Attached, attach
from loratune.adapter.config import LoraConfig
from loratune.api import RunResult
from loratune.demo.corpus import ATTRIBUTION, restoration_sentences, write_rows
from loratune.demo.corpus import restoration_row as row_of
from loratune.demo.measure import Marks, compare
from loratune.evaluate.generate import generate, text_of
from loratune.evaluate.interval import bootstrap_ratio
from loratune.model import embedded
from loratune.model.load import load_model
from loratune.train.loop import OnEvent

MODEL = "google/gemma-3-270m"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How much of everything: optimizer steps of 8 rows, and rows to train, validate and test on."""

    steps: int
    train: int
    validation: int
    test: int


FULL = Size(steps=60, train=480, validation=48, test=32)
QUICK = Size(steps=15, train=120, validation=16, test=8)


def run_demo(*, model: str | None = None, output: Path, quick: bool = False, on_event: OnEvent, say: Say) -> RunResult:
    """Does the whole demo; `output` gets the run, and "<output>-data" the rows. Raises ConfigError if either exists."""
    size, name, data = (QUICK if quick else FULL), model or MODEL, _data_folder(output)
    api.check_output(output)
    say(_introduction(name))
    base, tokenizer = load_model(name, notify=lambda message: on_event({"event": "notice", "message": message}))
    if notice := embedded.notice(name):
        say(notice)
    files = write_rows(data, size.train, size.validation, size.test, seed=0)
    test = restoration_sentences(size.train, size.validation, size.test, seed=0)["test"]
    references = [sentence.text for sentence in test]

    say(f"\nThe base model first: it answers {len(references)} test prompts as it is ...")
    answers_before = _answers(base, tokenizer, references)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=("q_proj", "v_proj") if model is None else "fast",
        lora_dropout=0.05, bias="none", task_type="CAUSAL_LM",
    )  # fmt: skip
    attached = attach(base, config, seed=0)
    say(_what_is_trained(attached))
    result = api.train(
        base, tokenizer, data=files["train"], validation=files["validation"], output=output,
        max_steps=size.steps, on_event=on_event,
    )  # fmt: skip

    say(f"\nNow the tuned model: the same {len(references)} prompts ...")
    answers_after = _answers(base, tokenizer, references)
    say(_comparison(result, references, answers_before, answers_after, [sentence.doc_id for sentence in test]))
    say(_go_on(name, files["train"], files["validation"], output, size))
    return result


def next_free(path: Path) -> Path:
    """Returns the path if neither it nor its data exist yet, else the first of path-2, path-3, ... that is free."""
    names = (path.name, *(f"{path.name}-{number}" for number in range(2, 10_000)))
    paths = (path.with_name(name) for name in names)
    return next(each for each in paths if not each.exists() and not _data_folder(each).exists())


def _data_folder(output: Path) -> Path:
    return output.with_name(output.name + "-data")


def _introduction(name: str) -> str:
    story = (
        "LoRA keeps the pretrained weights W frozen and adds two small matrices beside some of them, so that a layer "
        f"computes W x + s B A x; only A and B are trained. Here {name} learns to put punctuation and capitals back "
        "into Ukrainian sentences."
    )
    return "\n\n".join(textwrap.fill(part, 100) for part in (story, ATTRIBUTION)) + "\n"


def _what_is_trained(attached: Attached) -> str:
    """Returns the summary with a line of reason for each role that is trained, and the settings in plain words."""
    trained = {role for path in attached.adapter.factors for role in roles.roles_of(path)}
    config = attached.config
    return "\n".join(
        [
            "",
            "What will be trained, and why (the basic settings; richer ones are the next step up):",
            *(f"  {roles.describe(role)}" for role in roles.ROLES if role in trained),
            f"  r = {config.r}: the rank of A and B, how much new the adapter can learn.",
            f"  lora_alpha = {config.lora_alpha:g}: with it s = lora_alpha / r = {config.lora_alpha / config.r:g}.",
            f"  lora_dropout = {config.lora_dropout:g}: against learning the rows by heart.",
            f'  bias = "{config.bias}": the biases stay as they are.',
            "  B starts at zero, so that step 0 equals the base model.",
            "",
        ]
    )


def _answers(model: Any, tokenizer: Any, references: Sequence[str]) -> list[str]:
    """Returns the model's greedy answers to the prompts made of the references, one line each."""
    from loratune.data.encode import Encoder

    encoder = Encoder(tokenizer, None)
    prompts = [encoder.prompt(row_of(reference)["prompt"]) for reference in references]
    longest = max(len(encoder.tokens(reference)) for reference in references)
    new = generate(model, tokenizer, prompts, longest + 12, stop_at_newline=True)
    return [text_of(tokenizer, ids).strip() for ids in new]


def _comparison(
    result: RunResult,
    references: Sequence[str],
    before: Sequence[str],
    after: Sequence[str],
    documents: Sequence[str],
) -> str:
    """Returns the table of before and after, and a few sentences to look at."""
    counts = [
        [compare(answer, reference) for answer, reference in zip(answers, references)] for answers in (before, after)
    ]
    shares = [_shares(each, documents) for each in counts]
    lines = ["", f"{'on held-out text':<34}{'base':>20}{'tuned':>20}"]
    if result.before and result.after:
        first, last = result.before, result.after
        lines.append(f"{'loss per token':<34}{first.loss:>20.3f}{last.loss:>20.3f}")
        lines.append(f"{'perplexity':<34}{first.perplexity:>20.2f}{last.perplexity:>20.2f}")
    for label, index in (("marks restored", 0), ("sentences exactly right", 1)):
        lines.append(f"{label:<34}{shares[0][index]:>20}{shares[1][index]:>20}")
    lines.append("(in brackets: 95% intervals, whole documents drawn again)")
    for i in range(min(3, len(references))):
        lines += ["", f"  asked   {references[i]}", f"  base    {_cut(before[i])}", f"  tuned   {_cut(after[i])}"]
    return "\n".join(lines)


def _shares(counts: Sequence[Marks], documents: Sequence[str]) -> tuple[str, str]:
    """Returns the share of marks restored and of sentences exactly right, each with its interval."""
    groups = [
        [mark for mark, owner in zip(counts, documents) if owner == document] for document in dict.fromkeys(documents)
    ]
    marks = bootstrap_ratio([sum(m.restored for m in g) for g in groups], [sum(m.total for m in g) for g in groups])
    exact = bootstrap_ratio([sum(m.exact for m in g) for g in groups], [len(g) for g in groups])
    return tuple(f"{each.value:.0%} ({each.low:.0%}-{each.high:.0%})" for each in (marks, exact))  # type: ignore[return-value]


def _cut(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def _go_on(name: str, train: Path, validation: Path, output: Path, size: Size) -> str:
    question = row_of("Коли ти приїдеш, ми підемо до лісу.")["prompt"].replace("\n", "\\n")
    return "\n".join(
        [
            "",
            "Go on from here. The same training by hand, then one step richer, and the result at work:",
            *(["  . .venv/bin/activate"] if shutil.which("loratune") is None else []),
            f"  loratune train --model {name} --data {train} --validation {validation} --preset fast \\",
            f"      --max-steps {size.steps} --output {output}-again",
            f"  loratune train --model {name} --data {train} --validation {validation} --preset quality \\",
            f"      --max-steps {size.steps} --output {output}-quality",
            f"  loratune chat {output} --prompt $'{question}'",
            f"  loratune export {output} --to merged --output {output}-merged",
            f"  loratune adapters info {output}",
        ]
    )
