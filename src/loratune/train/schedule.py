"""Learning rates: linear decay to zero after a short linear warm-up, as a pure function of the step."""

from loratune.train.config import TrainConfig

# LoRA wants about ten times the rate of full fine-tuning, and larger models a smaller one; measured on 1B to 8B models
# by Thinking Machines' sweep (best rates 3e-4 to 1e-3 for 1B to 3B, 3e-4 for 8B).
SMALL_MODEL_RATE, LARGE_MODEL_RATE, LARGE_MODEL_PARAMETERS = 5e-4, 3e-4, 4_000_000_000
WARMUP_SHARE = 0.05


def peak_rate(config: TrainConfig, num_parameters: int) -> float:
    """Returns the highest learning rate: the given one, else 5e-4 up to 4e9 parameters and 3e-4 above."""
    if config.learning_rate is not None:
        return config.learning_rate
    return SMALL_MODEL_RATE if num_parameters <= LARGE_MODEL_PARAMETERS else LARGE_MODEL_RATE


def warmup_steps(config: TrainConfig, num_steps: int) -> int:
    """Returns the length of the warm-up: the given one, else 5% of the steps, at least 1."""
    return max(1, round(num_steps * WARMUP_SHARE)) if config.warmup_steps is None else config.warmup_steps


def rate(step: int, num_steps: int, warmup: int, peak: float, settled: int | None = 0) -> float:
    """Returns the learning rate of step 0..num_steps-1: peak (step + 1) / warmup, then linearly to 0 after the last.

    It falls from step `settled` on, if that is later than the end of the warm-up; None: it stays at its peak, because
    the adapter may grow.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if settled is None:
        return peak
    return peak * (num_steps - step) / (num_steps - max(settled, warmup))
