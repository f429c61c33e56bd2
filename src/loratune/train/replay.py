"""Proof that a run repeats itself: the last steps done again from the checkpoint before, compared bit for bit."""

from loratune.errors import CheckpointError
from loratune.train import checkpoint
from loratune.train.checkpoint import Checkpoint
from loratune.train.loop import Run, parameters, restore, train_step


def verify(run: Run, saved: Checkpoint) -> int:
    """Replays the steps from the complete checkpoint before `saved` to it; returns where they began.

    Raises CheckpointError if there is none, or if any bit of the parameters or moments differs. The run stands
    somewhere else afterwards: restore it.
    """
    before = _before(run, saved)
    restore(run, before)
    run.attached.train_mode(True)
    try:
        while run.step < saved.step:
            train_step(run)
    finally:
        run.attached.shared.noise = None
        run.attached.train_mode(False)
    found, expected = {**parameters(run), **run.optimizer.state()}, saved.training_state()
    different = [name for name, tensor in expected.items() if not checkpoint.same_bits(found[name].cpu(), tensor)]
    if different:
        raise CheckpointError(
            f"the steps from {before.path.name} do not lead to {saved.path.name} again: {len(different)} of "
            f"{len(expected)} tensors differ; first: {different[0]}. The machine does not repeat itself here, so the "
            "run would not be continued bit for bit. Resume without --verify-resume to go on all the same."
        )
    return before.step


def _before(run: Run, saved: Checkpoint) -> Checkpoint:
    for folder in reversed(checkpoint.folders(run.output)):
        if folder < saved.path:
            try:
                return checkpoint.read(folder)
            except CheckpointError as error:
                run.on_event({"event": "notice", "message": f"skipped: {error}"})
    raise CheckpointError(
        f"--verify-resume needs a complete checkpoint before {saved.path}; there is none. Resume without it."
    )
