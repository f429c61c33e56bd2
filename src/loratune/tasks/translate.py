"""SEQ_2_SEQ_LM: from a text to another: translation, summaries, corrections, by an encoder and a decoder.

The decoder reads the target shifted right, as the model's family does it. Encoder and decoder rows are padded to one
width, so that a token's dropout mask is the same wherever it stands.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig

from loratune.data.examples import Example
from loratune.data.rows import Row
from loratune.evaluate import text
from loratune.tasks.task import IGNORED, Scores, Task, TaskBatch, as_float, tokenized

_CORRECTION = 0.5  # where so much of a source stands in its target, edits are what is learnt, and counted
_ROOM = 1.5  # an answer may be this much longer than the longest reference of its batch


class Translate(Task):
    """Softmax over the vocabulary at each token of the target; the answer is decoded greedily where it is evaluated."""

    packs = False
    kinds = ("source_target", "prompt_completion")

    def encode(self, row: Row) -> list[Example]:
        source, target = _sides(row)
        ids = self.fits(tokenized(self.tokenizer, source)["input_ids"])
        labels = list(self.fits(tokenized(self.tokenizer, text_target=target)["input_ids"]))
        end = self.tokenizer.eos_token_id
        if end is not None and labels[-1] != end and labels[-2:-1] != [end]:  # mBART puts the language behind it
            labels.append(end)
        return [Example.of(ids, np.array(labels, dtype=np.int64), row, num_units=len(labels))]

    def extent(self, example: Example) -> int:
        return max(example.num_tokens, len(example.target))

    def inputs(self, examples: Sequence[Example], width: int) -> dict[str, Any]:
        labels = self.padded_targets(examples, width)
        return {"decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels), "use_cache": False}

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        asked = self.padded_targets(batch.examples, outputs.logits.shape[1])
        chosen = asked != IGNORED
        return F.cross_entropy(as_float(outputs.logits[chosen]), asked[chosen], reduction="none")

    def own_labels(self, example: Example) -> dict[str, Tensor]:
        target = self.padded_targets([example], self.extent(example))
        return {"labels": target}

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        longest = max(len(example.target) for example in batch.examples)
        config, own = self.model.config, self.model.generation_config
        settings = GenerationConfig(
            do_sample=False, num_beams=1, max_new_tokens=int(longest * _ROOM) + 8,
            pad_token_id=config.pad_token_id or 0,
            eos_token_id=own.eos_token_id if own.eos_token_id is not None else self.tokenizer.eos_token_id,
            decoder_start_token_id=config.decoder_start_token_id, forced_bos_token_id=own.forced_bos_token_id,
        )  # fmt: skip
        self.model.generation_config, mine = GenerationConfig(), own  # its penalties and beams have no part
        try:
            said = self.model.generate(
                batch.inputs["input_ids"], attention_mask=batch.inputs["attention_mask"], generation_config=settings
            )
        finally:
            self.model.generation_config = mine
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in said.tolist()]

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        sources, asked = (list(side) for side in zip(*(_sides(example.row) for example in examples), strict=True))
        figures = text.text_figures(predictions, asked)
        if text.likeness(sources, asked) >= _CORRECTION:
            figures |= text.correction_figures(sources, predictions, asked)
        return Scores(figures, text.chrf_counts(predictions, asked), text.chrf)

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        source, target = _sides(example.row)
        return {"source": source, "predicted": prediction, "label": target}


def _sides(row: Row) -> tuple[str, str]:
    first, second = ("source", "target") if row.kind == "source_target" else ("prompt", "completion")
    return row.value[first], row.value[second]
