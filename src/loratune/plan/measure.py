"""The measurement: real optimizer steps on the run's own rows, and some generated tokens. Nothing is written.

The run that is given is used up: its adapter has moved, and it must not be trained.
"""

import time
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from loratune.evaluate.generate import generate
from loratune.evaluate.samples import NUM_SAMPLES
from loratune.plan.estimate import LIBRARY_SECONDS, generated_tokens
from loratune.plan.work import Work
from loratune.train import loop
from loratune.train.loop import Run
from loratune.train.measure import peak_memory_bytes

_TOKENS = 8  # generated to time one
_USUAL_STEPS = 2


@dataclass(frozen=True)
class Measurement:
    """What was measured. peak_bytes: of this whole process, loading included; widest_seconds: of the step with the
    largest micro-batch; usual_seconds: of steps near the mean, each; start_seconds: until the first step;
    micro_batch_tokens: less than configured where memory ran out.
    """

    peak_bytes: int
    widest_seconds: float
    usual_seconds: tuple[float, ...]
    start_seconds: float
    samples_seconds: float
    micro_batch_tokens: int

    def step_seconds(self, work: Work) -> tuple[float, float]:
        """Returns the least and the most that a mean step takes, judged by the steps measured, token by token."""
        rates = [seconds / work.usual.tokens for seconds in self.usual_seconds]
        rates.append(self.widest_seconds / work.widest.tokens)
        return min(rates) * work.typical.tokens, max(rates) * work.typical.tokens


def measure(run: Run, tokenizer: PreTrainedTokenizerBase, work: Work, prepared_seconds: float) -> Measurement:
    """Does the step with the largest micro-batch, then steps near the mean; raises TrainingError as a run would.

    prepared_seconds: what it took to load the model and to prepare the run.
    """
    run.attached.train_mode(True)
    try:
        widest = _step(run, work.widest_rows)
        usual = tuple(_step(run, work.usual_rows) for _ in range(_USUAL_STEPS))
    finally:
        run.attached.shared.noise = None
        run.attached.train_mode(False)
    peak = peak_memory_bytes(run.causal.device)
    return Measurement(
        peak_bytes=peak,
        widest_seconds=widest,
        usual_seconds=usual,
        start_seconds=LIBRARY_SECONDS + prepared_seconds,
        samples_seconds=_token_seconds(run, tokenizer) * generated_tokens(run.validation.documents),
        micro_batch_tokens=run.micro_batch_tokens,
    )


def _step(run: Run, rows: list[int]) -> float:
    """Returns the seconds of one optimizer step on rows."""
    begun = time.perf_counter()
    documents = [run.train.documents[row] for row in rows]
    num_labels = sum(document.num_labels for document in documents)
    loop.within_memory(run, documents, lambda: loop._accumulate(run, rows, documents, num_labels))
    run.optimizer.clip()
    run.optimizer.step(run.learning_rate())
    float(next(iter(run.optimizer.parameters.values())).detach().flatten()[0])  # waits for the device
    return time.perf_counter() - begun


def _token_seconds(run: Run, tokenizer: PreTrainedTokenizerBase) -> float:
    """Returns the seconds of one step of generating, for as many prompts as a run samples."""
    prompts = [document.input_ids[:2].tolist() for document in run.validation.documents[:NUM_SAMPLES]]
    begun = time.perf_counter()
    generate(run.causal.model, tokenizer, prompts, _TOKENS, stop_ids=())  # pyright: ignore[reportArgumentType]
    return (time.perf_counter() - begun) / _TOKENS
