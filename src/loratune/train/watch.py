"""The gates of a run: one that does not learn, or learns nonsense, stops and says why.

Before the first step: every factor reaches the loss, the optimizer holds what is trained, and the loss is the model's
own. Step 1: every B gets a gradient and moves; step 2: A too. Later: an expert is judged once it was used, and losses
that stay above the untuned model's stop the run.
"""

import math
import statistics
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import Attached, Attachments
from loratune.adapter.factor import LowRank, TokenRows
from loratune.adapter.wrapper import Adapted, AdaptedWeights
from loratune.data.encode import Document
from loratune.errors import TrainingError
from loratune.evaluate.loss import Evaluation
from loratune.evaluate.protocol import Runner
from loratune.train.optim import Optimizer

_MASTERS = (torch.float32, torch.float64)  # float64 where the base is
_MIN_TOKENS = 4  # with one position to look at, attention's query and key have no gradient
# Our loss and the model's own differ by rounding only: over 25 tiny families by 5e-7 in float32 (bfloat16 2e-3),
# on Gemma 3 270M by 1.3e-5; labels that are shifted by one, or rows that see each other, by percents.
_LOSS_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-4, torch.float16: 1e-3, torch.bfloat16: 5e-3}
BLOWN_UP_STEPS = 8  # in a row; a step that is high by chance alone has a low one among the next


def check_optimizer(optimizer: Optimizer, adapter: Adapter, lr_ratio: float) -> None:
    """Raises TrainingError unless every tensor of the adapter is trainable and in its group, and factors are float32.

    In bfloat16 an update below 2^-9 of the weight is lost: factors stay as they began.
    """
    ratios = optimizer.ratios()
    factors = {p for factor in adapter.factors.values() for p in factor.parameters()}
    for name, parameter in adapter.named_parameters():
        expected = lr_ratio if name.endswith(".B") else 1.0
        if not parameter.requires_grad:
            raise TrainingError(
                f"{name} is frozen (requires_grad is False), so it cannot be trained. Load an adapter that is to be "
                "trained on with load_adapter(..., trainable=True)."
            )
        if parameter in factors and parameter.dtype not in _MASTERS:
            raise TrainingError(
                f"{name} is {parameter.dtype}, whose rounding swallows small updates; expected torch.float32. "
                "Leave the factors in the type that attach() gives them."
            )
        if ratios.get(parameter) != expected:
            found = f"is updated with {ratios[parameter]:g} x" if parameter in ratios else "is in none, so it gets 0 x"
            raise TrainingError(f"wrong parameter group: {name} {found} the learning rate; expected {expected:g} x.")


def check_reached(causal: Runner, attached: Attached, documents: Sequence[Document]) -> None:
    """Runs documents forward and backward and raises TrainingError for factors that get no gradient.

    Where B is zero its gradient is s g^T (A x), which is zero only if the layer's output does not reach the loss. No
    parameter is changed; gradients are cleared again.
    """
    if not _can_judge(documents):
        return
    adapter, experts = attached.adapter, Experts(attached)
    with experts.watched():
        total, _ = causal.losses(causal.batch(documents, range(len(documents))))
        if total.requires_grad:
            total.backward()
    seen = np.unique(np.concatenate([document.input_ids for document in documents]))
    dead = [
        path
        for path, factor in adapter.factors.items()
        if path not in experts.layers and not (_is_reached(factor) or _is_unseen(factor, seen))
    ]
    dead += [path for path, module in adapter.saved.items() if not _has_gradient(list(module.parameters()))]
    try:
        if dead:
            raise TrainingError(
                f"{len(dead)} of {len(adapter.factors) + len(adapter.saved)} factors do not reach the loss; first: "
                f"{dead[0]}. The model does not call that layer, or reads its weight past the adapter. Leave it out of "
                "target_modules."
            )
        experts.judge()
    finally:
        for _, parameter in adapter.named_parameters():
            parameter.grad = None


def _can_judge(documents: Sequence[Document]) -> bool:
    """Whether a document is run on enough tokens; what follows its last label is left out."""
    return max(int(np.flatnonzero(document.trained)[-1]) for document in documents) >= _MIN_TOKENS


def _is_reached(factor: LowRank) -> bool:
    """Whether the loss depends on a factor: on A or B, and on its bias and magnitude where it has them."""
    rest = [each for each in (factor.bias, factor.magnitude) if each is not None]
    return _has_gradient(list(factor.parameters())) and all(each.grad is not None for each in rest)


def _has_gradient(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether any of them has one that is not zero; what shares another factor's tensors has none of its own."""
    return not parameters or any(p.grad is not None and bool(p.grad.count_nonzero()) for p in parameters)


def _is_unseen(factor: LowRank, seen: "np.ndarray[Any, Any]") -> bool:
    """Trained rows of an embedding cannot be judged by documents without their tokens."""
    indices: Any = factor.indices if isinstance(factor, TokenRows) else None
    return indices is not None and not np.isin(indices.cpu().numpy(), seen).any()


@torch.no_grad()
def check_loss(causal: Runner, documents: Sequence[Document]) -> str | None:
    """Raises TrainingError unless the loss of documents is what the model itself says with `labels=`.

    That is wrong labels (shifted by one), and documents that see each other. Returns why a model cannot be asked.
    """
    _, ours = causal.losses(causal.batch(documents, range(len(documents))))
    own = causal.own_losses(documents)
    if own is None:
        return f"{type(causal.model).__name__} has no loss of its own to compare with (it takes no `labels`)."
    found, expected = float(ours.double().mean()), sum(own) / len(ours)
    tolerance = _LOSS_TOLERANCE[next(causal.model.parameters()).dtype]
    if abs(found - expected) > tolerance * max(1.0, abs(expected)):
        raise TrainingError(
            f"the loss of {len(documents)} rows is {found:.6g}, but {type(causal.model).__name__} itself gives "
            f"{expected:.6g} for them: the labels stand at other tokens (shifted by one?), or rows see each other. "
            "Nothing was trained. This is a bug in loratune or in the model's code; please report it."
        )
    return None


class Experts:
    """Which experts have yet to show that they learn; one is judged once it served a token that the loss depends on.

    pending: path -> bool (E,), of stacked experts by the module that holds them, (1,) of an expert with layers of its
    own (`layers`). used: the same for the last backward pass.
    """

    def __init__(self, attached: Attached) -> None:
        everything = Attachments.of(attached.model)
        self._wrappers: Mapping[str, Any] = everything.wrappers if everything else {}
        self._factors: dict[str, list[LowRank]] = {}
        self.paths: set[str] = set()  # of the factors
        for path, factor in attached.adapter.factors.items():
            owner = path if path in self._wrappers else path.rpartition(".")[0]
            if _is_stacked(self._wrappers.get(owner), factor) or _is_expert_layer(self._wrappers.get(owner), path):
                self._factors.setdefault(owner, []).append(factor)
                self.paths.add(path)
        self.pending = {
            path: torch.ones(len(factors[0].B) if factors[0].B.ndim == 3 else 1, dtype=torch.bool)
            for path, factors in self._factors.items()
        }
        self.layers = {path for path in self.pending if isinstance(self._wrappers[path], Adapted)}
        self.used: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Generator[None]:
        """Within the block it is noted which experts the gradient comes back to; costs nothing once all are judged."""
        self.used.clear()
        with ExitStack() as hooks:
            for path in self.pending:
                hook = self._wrappers[path].register_forward_hook(self._hook(path), with_kwargs=True)
                hooks.callback(hook.remove)
            yield

    def _hook(self, path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            served = next((each for each in (*args, *kwargs.values()) if _is_index(each)), None)
            if not (isinstance(output, Tensor) and output.requires_grad):
                return
            by_token = served is not None and len(served) == output.numel() // output.shape[-1]
            if by_token or path in self.layers:
                output.register_hook(lambda gradient: self._note(path, gradient, served))

        return hook

    def _note(self, path: str, gradient: Tensor, served: Tensor | None) -> None:
        """Marks the experts, served (T, k), of the tokens whose gradient (T, H) is not zero."""
        matters_T = gradient.reshape(-1, gradient.shape[-1]).ne(0).any(1)
        num_experts = len(self.pending[path])
        used = torch.zeros(num_experts + 1, dtype=torch.bool, device=gradient.device)
        if served is None:
            used[0] = matters_T.any()
        else:
            which_TK = served.reshape(len(matters_T), -1)
            counts_TK = matters_T[:, None] & (which_TK >= 0) & (which_TK < num_experts)
            used[torch.where(counts_TK, which_TK, num_experts).flatten()] = True  # the last entry is for the others
        self.used[path] = used[:-1] | self.used[path] if path in self.used else used[:-1]

    def judge(self) -> None:
        """Raises TrainingError for an expert that was used and got no gradient; the others used are done with."""
        for path, used in self.used.items():
            pending = self.pending[path] & used.cpu()
            for factor in self._factors[path]:
                silent = pending & ~_expert_gradients(factor)
                if silent.any():
                    number = int(silent.nonzero()[0])
                    raise TrainingError(
                        f"{path}: expert {number} of {len(pending)} served tokens that the loss depends on, but its "
                        "factor got no gradient: the model computes it without the adapter."
                    )
            self.pending[path] &= ~pending
        self.used.clear()
        self.pending = {path: pending for path, pending in self.pending.items() if pending.any()}


def _is_stacked(wrapper: Any, factor: LowRank) -> bool:
    return isinstance(wrapper, AdaptedWeights) and factor.A.ndim == factor.B.ndim == 3


def _is_expert_layer(wrapper: Any, path: str) -> bool:
    """Experts kept as layers of their own stand in a list: "mlp.experts.3.gate_proj"; a shared one is always used."""
    return isinstance(wrapper, Adapted) and any(part.startswith("expert") for part in path.split("."))


def _is_index(value: Any) -> bool:
    """The routing that a module of experts is called with: which k experts serve each token, (T, k)."""
    return isinstance(value, Tensor) and not value.is_floating_point() and value.dtype != torch.bool


def _expert_gradients(factor: LowRank) -> Tensor:
    """Returns for each expert of a factor whether its B has a gradient."""
    gradient = factor.B.grad
    if gradient is None:
        return torch.zeros(1, dtype=torch.bool)
    return gradient.flatten(1 if factor.B.ndim == 3 else 0).ne(0).any(-1).reshape(-1).cpu()


class Gates:
    """What is looked at in the first steps, and in later ones until every expert was seen to learn."""

    def __init__(self, attached: Attached) -> None:
        self.experts = Experts(attached)
        self._adapter = attached.adapter

    @contextmanager
    def update(self, step: int, learning_rate: float, documents: Sequence[Document]) -> Generator[None]:
        """Wraps the optimizer's update after `step` steps: B must have a gradient and move in step 1, A and B in
        step 2.

        Raises TrainingError, with no parameter changed for a gradient that is missing.
        """
        self.experts.judge()
        if step > 1 or not _can_judge(documents):
            yield
            return
        judged = self._judged(step)
        silent = [name for name, parameter in judged.items() if not _has_gradient([parameter])]
        if silent:
            raise TrainingError(
                f"step {step + 1}: {len(silent)} of {len(judged)} matrices got no gradient; first: {silent[0]}. "
                "Stopped before the update: the layer's adapter does not reach the loss."
            )
        before = {name: parameter.detach().clone() for name, parameter in judged.items()}
        yield
        still = [name for name, parameter in judged.items() if torch.equal(parameter, before[name])]
        if still:
            raise TrainingError(
                f"step {step + 1}: {len(still)} of {len(judged)} matrices did not move; first: {still[0]}. "
                f"{_why_still(judged[still[0]], learning_rate)}"
            )

    def _judged(self, step: int) -> dict[str, nn.Parameter]:
        """Returns the side of each factor that begins at zero and so is first to get a gradient, then both.

        Left out is what the rows of one step may pass by: experts, and trained rows of an embedding.
        """
        judged: dict[str, nn.Parameter] = {}
        for path, factor in self._adapter.factors.items():
            if path in self.experts.paths or isinstance(factor, TokenRows):
                continue
            first = "B" if factor.A.count_nonzero() else "A"  # an embedding's A is zero, and its B random
            own = {name: factor._parameters.get(name) for name in ((first,) if step == 0 else ("A", "B"))}
            judged |= {f"{path}.{name}": each for name, each in own.items() if each is not None}
        return judged


def _why_still(parameter: nn.Parameter, learning_rate: float) -> str:
    if learning_rate == 0:
        return "The learning rate is 0."
    if parameter.dtype not in _MASTERS:
        return f"It is {parameter.dtype}, in which an update of {learning_rate:.1e} is lost; expected torch.float32."
    return "It has a gradient, but the optimizer does not hold it: a wrong parameter group."


@dataclass
class Course:
    """How the losses of a run stand to those of the untuned model. untuned: its held-out loss; ceiling: what a step's
    loss should stay below; above: how many steps in a row did not."""

    untuned: float | None = None
    ceiling: float | None = None
    above: int = 0

    def start(self, before: Evaluation, batch_size: int) -> None:
        """Sets the ceiling: 1 nat above the untuned model's loss, or 4 standard errors of a batch if that is more."""
        means = [loss / labels for loss, labels in zip(before.document_losses, before.document_labels, strict=True)]
        margin = max(1.0, 4 * statistics.stdev(means) / math.sqrt(batch_size))
        self.untuned, self.ceiling = before.loss, before.loss + margin

    def see(self, step: int, loss: float) -> str | None:
        """Takes in a step's loss; returns a remark on the first one. Raises TrainingError when a run has blown up."""
        if self.untuned is None or self.ceiling is None:
            return None
        if step == 1 and loss > self.ceiling:
            self.ceiling += loss - self.untuned
            return (
                f"the first step's loss is {loss:.2f}, far above the untuned model's {self.untuned:.2f} on the "
                "held-out rows: these are of another kind than those trained on. Is a template or format wrong?"
            )
        self.above = self.above + 1 if loss > self.ceiling else 0
        if self.above >= BLOWN_UP_STEPS:
            raise TrainingError(
                f"step {step}: the loss was above {self.ceiling:.2f} for {self.above} steps (now {loss:.2f}; untuned "
                f"{self.untuned:.2f}): the run has blown up, it knows less than the base model."
            )
        return None
