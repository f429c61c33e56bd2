"""The optimizer: AdamW over the adapter's tensors, its state by parameter name."""

from collections.abc import Mapping

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.errors import CheckpointError
from loratune.train.config import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in float32 on an adapter's parameters.

    All parameters share one step count, so the state is two moments a parameter and one number. B's learning rate is
    `lr_ratio` times that of the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354).
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.parameters = dict(adapter.named_parameters())
        self.max_grad_norm = config.max_grad_norm
        ups = [parameter for name, parameter in self.parameters.items() if name.endswith(".B")]
        rest = [parameter for name, parameter in self.parameters.items() if not name.endswith(".B")]
        groups = [{"params": rest, "ratio": 1.0}, {"params": ups, "ratio": config.lr_ratio}]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=0.0,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
            weight_decay=config.weight_decay,
            foreach=next(iter(self.parameters.values())).is_cuda,
        )

    def clip(self) -> Tensor:
        """Scales the gradient down to the largest norm allowed; returns the norm it had. Changes no parameter."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)

    def step(self, learning_rate: float) -> None:
        """Updates every parameter with its gradient and clears the gradients."""
        for group in self._adamw.param_groups:
            group["lr"] = learning_rate * group["ratio"]
        self._adamw.step()
        self.clear()

    def clear(self) -> None:
        self._adamw.zero_grad(set_to_none=True)

    def ratios(self) -> dict[Tensor, float]:
        """Returns for each tensor that is updated its share of the learning rate."""
        return {parameter: group["ratio"] for group in self._adamw.param_groups for parameter in group["params"]}

    def state(self) -> dict[str, Tensor]:
        """Returns the moments as "<moment>.<parameter name>" and the step count as "step"; empty before step 1."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            own = self._adamw.state.get(parameter)
            if own:
                tensors.update({f"{moment}.{name}": own[moment] for moment in _MOMENTS})
                tensors["step"] = own["step"]
        return tensors

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes a saved state back; raises CheckpointError unless it is exactly this optimizer's."""
        expected = {f"{moment}.{name}" for moment in _MOMENTS for name in self.parameters} | {"step"}
        if set(tensors) != expected:
            odd = sorted(set(tensors) ^ expected)
            raise CheckpointError(f"the optimizer's state does not fit: {len(odd)} entries differ; first: {odd[0]}.")
        for name, parameter in self.parameters.items():
            moments = {moment: tensors[f"{moment}.{name}"].to(parameter.device, copy=True) for moment in _MOMENTS}
            if moments["exp_avg"].shape != parameter.shape:
                raise CheckpointError(f"the optimizer's state of {name} has another shape than the parameter.")
            self._adamw.state[parameter] = {"step": tensors["step"].clone(), **moments}
