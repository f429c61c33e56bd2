"""What rounding loses of an update as it is merged, and when that is too much."""

from typing import Any

from loratune.adapter.merge import Loss
from loratune.errors import ExportError

MAX_LOSS = 0.05  # of the update: a merge to bfloat16 can lose a third of one that is small beside its weight
_NUM_WORST = 5


def loss_report(losses: dict[str, Loss], accept_loss: bool) -> dict[str, Any]:
    """Returns the share that was lost, of all and of the worst tensors; ExportError above MAX_LOSS unless accepted."""
    total = sum(losses.values(), Loss())
    worst = sorted(losses, key=lambda name: losses[name].share, reverse=True)[:_NUM_WORST]
    if total.share > MAX_LOSS and not accept_loss:
        raise ExportError(
            f"rounding would lose {total.share:.1%} of the update (limit {MAX_LOSS:.0%}; most in {worst[0]}: "
            f"{losses[worst[0]].share:.1%}). Nothing was written. Use --dtype float32, or --accept-loss to write it "
            "all the same."
        )
    shares = [{"tensor": name, "loss_share": losses[name].share} for name in worst]
    return {"loss_share": total.share, "worst_losses": shares}
