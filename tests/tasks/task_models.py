"""What the tests of tasks share: a tiny model with a task's head and adapter ready for rows, and the same in PEFT."""

from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from loratune.adapter.attach import attach
from loratune.adapter.config import LoraConfig
from loratune.data.formats import FORMATS
from loratune.data.rows import Row
from loratune.model import heads
from loratune.model.load import load_model
from loratune.tasks.model import TaskModel
from loratune.tasks.table import TASKS, task_of, with_head

# What PEFT and transformers call a task's models.
PEFT: dict[str, tuple[Any, Any]] = {
    "SEQ_CLS": (peft.PeftModelForSequenceClassification, transformers.AutoModelForSequenceClassification),
    "TOKEN_CLS": (peft.PeftModelForTokenClassification, transformers.AutoModelForTokenClassification),
    "QUESTION_ANS": (peft.PeftModelForQuestionAnswering, transformers.AutoModelForQuestionAnswering),
    "SEQ_2_SEQ_LM": (peft.PeftModelForSeq2SeqLM, transformers.AutoModelForSeq2SeqLM),
    "FEATURE_EXTRACTION": (peft.PeftModelForFeatureExtraction, transformers.AutoModel),
    "SEGMENTATION": (peft.PeftModel, transformers.AutoModelForSemanticSegmentation),
}
KINDS = {
    "SEQ_CLS": "classification", "TOKEN_CLS": "tagging", "QUESTION_ANS": "question", "SEQ_2_SEQ_LM": "source_target",
    "FEATURE_EXTRACTION": "pair",
}  # fmt: skip
_NAMED = ("SEQ_CLS", "TOKEN_CLS", "SEGMENTATION")  # heads of as many outputs as there are labels


def rows_of(kind: str, values: list[dict[str, Any]]) -> list[Row]:
    return [Row("rows.jsonl", n, *FORMATS[kind].convert(value)) for n, value in enumerate(values, 1)]


def prepared(
    task_type: str, base: Path, rows: list[Row], *, targets: str = "fast", dropout: float = 0.0, seed: int = 0,
    **settings: Any,
) -> tuple[Any, Any, TaskModel]:  # fmt: skip
    """Returns the attached adapter, the examples of the rows, and the model ready to run on them."""
    labels = TASKS[task_type].find(rows, "rows.jsonl")
    model, words = load_model(base, task_type=task_type, labels=labels.names, problem=labels.problem)
    lora = LoraConfig(r=4, lora_dropout=dropout, task_type=task_type, target_modules=targets)
    attached = attach(model, with_head(lora, model), seed=seed)
    task = task_of(task_type, model, words, labels, **settings)
    heads.begin(model, attached.adapter.saved, seed)
    assert task is not None
    return attached, [each for result in task.encode_many(rows) for each in result], TaskModel(model, task)


def set_random(attached: Any) -> None:
    """Moves every tensor of an adapter, so that B is not zero."""
    generator = torch.Generator().manual_seed(1)
    for _, parameter in attached.adapter.named_parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def backward(examples: Any, runner: TaskModel, max_tokens: int) -> float:
    """Adds up the gradient of a step in micro-batches, as the training loop does; returns its loss."""
    number, total = sum(example.num_labels for example in examples), 0.0
    for pack in runner.cut(examples, max_tokens):
        loss, _ = runner.losses(runner.batch([examples[i] for i in pack], pack))
        (loss / number).backward()
        total += float(loss.detach()) / number
    return total


def in_peft(task_type: str, base: Path, folder: Path, config: Any) -> Any:
    """Loads a saved adapter with PEFT onto the base, with a head for the labels of `config`."""
    wrapper, auto = PEFT[task_type]
    names = ("id2label", "problem_type", "pad_token_id") if task_type in _NAMED else ()
    with torch.random.fork_rng():
        model = auto.from_pretrained(base, **{name: getattr(config, name) for name in names if hasattr(config, name)})
    loaded = peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()
    assert type(loaded) is wrapper
    return loaded


def check_gradients(attached: Any, model: Any) -> None:
    """Compares an adapter's gradients with those of its copy in PEFT, one by one."""
    found = {name: parameter.grad for name, parameter in attached.adapter.named_parameters()}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            name = name.removeprefix("base_model.model.").replace(".modules_to_save.default", "")
            name = name.replace("lora_A.default.weight", "A").replace("lora_B.default.weight", "B")
            torch.testing.assert_close(found.pop(name), parameter.grad, atol=1e-5, rtol=1e-4)
    assert not found
