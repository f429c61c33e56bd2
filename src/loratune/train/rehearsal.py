"""What is proved before the first step, with nothing written: that the run can learn, and that it fits."""

import math
from collections.abc import Sequence

import numpy as np
from torch import nn

from loratune.data.encode import Document
from loratune.memory import memory_bytes
from loratune.model.causal import CausalModel
from loratune.tasks.model import TaskModel
from loratune.train import watch
from loratune.train.loop import Run, within_memory
from loratune.train.measure import check_space, checkpoint_bytes, is_out_of_memory

LOOKED_AT = 32  # documents, of which the longest and the shortest are used
_PROBE_SHARE = 0.01  # of the run's tokens; a shorter run finds out soon enough by itself
_AMPLE = 8  # times what the layers may keep of a micro-batch: where that is free, it is not tried


def rehearse(run: Run) -> None:
    """Passes every gate of `watch` that needs no update, runs the largest micro-batch, and looks for disk space.

    Raises TrainingError, or ConfigError for a disk that is too full.
    """
    watch.check_optimizer(run.optimizer, run.attached.adapter, run.config.lr_ratio)
    rows = {*run.rows_of_step()[:LOOKED_AT], *range(min(LOOKED_AT, len(run.train)))}
    candidates = sorted((run.train.documents[row] for row in sorted(rows)), key=lambda document: document.num_tokens)
    # One shows all that is reached, but a pair of texts is told from another; of the shortest two, so that rows that
    # see each other show.
    longest, shortest = candidates[-2 if isinstance(run.causal, TaskModel) else -1 :], candidates[:2]
    within_memory(run, longest, lambda: watch.check_reached(run.causal, run.attached, longest))
    _check_loss(run, shortest)
    _probe_memory(run)
    num_checkpoints = run.config.keep + 2  # the best; one that is being written
    check_space(run.output, num_checkpoints * checkpoint_bytes(run.attached.adapter))


def _check_loss(run: Run, documents: Sequence[Document]) -> None:
    try:
        note = watch.check_loss(run.causal, documents)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        note = "the loss was not compared with the model's own, whose full logits do not fit into the memory."
    if note is not None:
        run.on_event({"event": "notice", "message": note})


def _probe_memory(run: Run) -> None:
    """Runs the longest rows as one micro-batch, so that memory runs out now or not at all; a step's time, so not where
    it could not run out."""
    lengths = np.asarray(run.train.lengths)
    longest = np.argsort(-lengths, kind="stable")[: run.config.batch_size].tolist()
    documents = [run.train.documents[row] for row in longest]
    tokens = min(run.micro_batch_tokens, sum(document.num_tokens for document in documents))
    if tokens > _PROBE_SHARE * run.num_steps * run.config.batch_size * float(lengths.mean()):
        return
    if _AMPLE * tokens * _most_bytes_per_token(run) < memory_bytes()[0]:
        return

    def forward_and_backward() -> None:
        packs = run.causal.cut(documents, run.micro_batch_tokens)
        pack = max(packs, key=lambda pack: sum(documents[i].num_tokens for i in pack))
        batch = run.causal.batch([documents[i] for i in pack], keys=pack)
        run.attached.shared.noise = batch.noise(run.config.seed, run.step)
        total, _ = run.causal.losses(batch)
        total.backward()

    run.attached.train_mode(True)
    try:
        within_memory(run, documents, forward_and_backward)
    finally:
        run.attached.shared.noise = None
        run.attached.train_mode(False)
        run.optimizer.clear()


def _most_bytes_per_token(run: Run) -> float:
    """Returns the inputs and outputs of every linear layer below the head: more than the known blocks keep of a token.
    Of other models, and on a GPU, where a step takes no time, nothing is known."""
    causal = run.causal
    if not (isinstance(causal, CausalModel) and causal.is_lean and causal.device.type == "cpu"):
        return math.inf
    linears = [module for module in causal.model.base_model.modules() if isinstance(module, nn.Linear)]  # pyright: ignore
    size = next(causal.model.parameters()).element_size()
    return size * sum(linear.in_features + linear.out_features for linear in linears)
