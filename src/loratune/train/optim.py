"""The optimizer: AdamW over the adapter's tensors, state by parameter name, a step count for each block that grew."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.grow import corner
from loratune.errors import CheckpointError
from loratune.train.config import TrainConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) in float32 on an adapter's parameters.

    The state is two moments a parameter and one number, the steps done. A parameter that has done fewer (it was added
    when the adapter grew, or some steps had no gradient for it) has a count of its own; one that has grown has one for
    each row of A, (R, 1), or column of B, (1, R). So every block is updated as if it had always stood alone.
    B's learning rate is `lr_ratio` times that of the rest (LoRA+, Hayou et al. 2024, arXiv 2402.12354). `warmup`: the
    steps over which what was added when the adapter grew rises to its rate; what was there before keeps its own.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self.parameters = dict(adapter.named_parameters())
        self.max_grad_norm = config.max_grad_norm
        self.warmup = 0
        self._config = config
        self._ratios = {name: config.lr_ratio if name.endswith(".B") else 1.0 for name in self.parameters}
        self._moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in self.parameters.items()}
        self._steps = 0
        self._counts: dict[str, int | Tensor] = dict.fromkeys(self.parameters, 0)
        is_cuda = next(iter(self.parameters.values())).is_cuda
        # On a GPU few calls; elsewhere what fits a cache: with 8 a fifth faster than torch's loop over 252 tensors.
        self._at_once = len(self.parameters) if is_cuda else 8

    def clip(self) -> Tensor:
        """Scales the gradient down to the largest norm allowed; returns the norm it had. Changes no parameter."""
        return torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.max_grad_norm)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Updates every parameter that has a gradient with it and clears the gradients."""
        self._steps += 1
        even: list[str] = []
        for name in self._ratios:
            if self.parameters[name].grad is not None:
                self._counts[name] += 1
                if isinstance(self._counts[name], int):
                    even.append(name)
                else:
                    self._update_grown(name, learning_rate)
        for start in range(0, len(even), self._at_once):
            self._update(even[start : start + self._at_once], learning_rate)
        self.clear()

    def _update(self, names: Sequence[str], learning_rate: float) -> None:
        """Algorithm 2 of the paper in the operations and the order of torch's AdamW: its result, bit for bit."""
        config, parameters = self._config, [self.parameters[name].detach() for name in names]
        counts = [int(self._counts[name]) for name in names]
        rates = [
            learning_rate * self._ratios[name] * (count / self.warmup if count < self.warmup else 1)
            for name, count in zip(names, counts)
        ]
        if config.weight_decay:
            torch._foreach_mul_(parameters, [1 - rate * config.weight_decay for rate in rates])
        averages, roots = self._advance(names)
        torch._foreach_div_(roots, [(1 - config.adam_beta2**count) ** 0.5 for count in counts])
        torch._foreach_add_(roots, config.adam_epsilon)
        sizes = [-(rate / (1 - config.adam_beta1**count)) for rate, count in zip(rates, counts)]
        torch._foreach_addcdiv_(parameters, averages, roots, sizes)

    def _update_grown(self, name: str, learning_rate: float) -> None:
        """The same for a parameter whose blocks have done different numbers of steps."""
        config, parameter = self._config, self.parameters[name]
        count = torch.as_tensor(self._counts[name]).double()
        rate = learning_rate * self._ratios[name] * (count / max(1, self.warmup)).clamp(max=1)
        if config.weight_decay:
            parameter.mul_((1 - rate * config.weight_decay).to(parameter.dtype))
        (average,), (root,) = self._advance([name])
        first, second = (1 - beta**count for beta in (config.adam_beta1, config.adam_beta2))
        denominator = root.div_(second.sqrt().to(root.dtype)).add_(config.adam_epsilon)
        parameter.sub_(average.div(denominator).mul_((rate / first).to(root.dtype)))

    def _advance(self, names: Sequence[str]) -> tuple[list[Tensor], list[Tensor]]:
        """Takes the gradients into the moments; returns the averages and the roots of the squares."""
        config = self._config
        gradients = [gradient for name in names if (gradient := self.parameters[name].grad) is not None]
        averages, squares = ([self._moments[name][i] for name in names] for i in (0, 1))
        torch._foreach_lerp_(averages, gradients, 1 - config.adam_beta1)
        torch._foreach_mul_(squares, config.adam_beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - config.adam_beta2)
        return averages, list(torch._foreach_sqrt(squares))

    def clear(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def ratios(self) -> dict[Tensor, float]:
        """Returns for each tensor that is updated its share of the learning rate."""
        return {self.parameters[name]: ratio for name, ratio in self._ratios.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns the moments as "<moment>.<parameter name>", the steps done as "step" and, of parameters that have
        done others, as "step.<parameter name>"; empty before step 1."""
        if not self._steps:
            return {}
        tensors = {f"{_MOMENTS[i]}.{name}": both[i] for name, both in self._moments.items() for i in (0, 1)}
        own = {name: count for name, count in self._counts.items() if isinstance(count, Tensor) or count != self._steps}
        counts = {f"step.{name}": torch.as_tensor(count, dtype=torch.float32).clone() for name, count in own.items()}
        return {**tensors, **counts, "step": torch.tensor(float(self._steps))}

    def load(self, tensors: Mapping[str, Tensor], *, grown: bool = False) -> None:
        """Takes a saved state back; raises CheckpointError unless it is exactly this optimizer's.

        With `grown`, it may be that of an adapter that this one's has grown from: what is new begins at step 0.
        """
        expected = {f"{moment}.{name}" for moment in _MOMENTS for name in self.parameters} | {"step"}
        counts = {f"step.{name}" for name in self.parameters}
        odd = sorted((tensors.keys() - counts) - expected if grown else (tensors.keys() - counts) ^ expected)
        if odd:
            raise CheckpointError(f"the optimizer's state does not fit: {len(odd)} entries differ; first: {odd[0]}.")
        self._steps = int(tensors["step"])
        for name, parameter in self.parameters.items():
            self._load_one(name, parameter, tensors, grown)

    def _load_one(self, name: str, parameter: Tensor, tensors: Mapping[str, Tensor], grown: bool) -> None:
        stored = [tensors[f"{moment}.{name}"] for moment in _MOMENTS if f"{moment}.{name}" in tensors]
        if not grown and any(each.shape != parameter.shape for each in stored):
            raise CheckpointError(f"the optimizer's state of {name} has another shape than the parameter.")
        self._moments[name] = (torch.zeros_like(parameter), torch.zeros_like(parameter))
        for moment, each in zip(self._moments[name], stored):
            corner(moment, each.shape).copy_(each)
        count = tensors.get(f"step.{name}", tensors["step"])
        self._counts[name] = _count(count, stored[0].shape, parameter) if stored else 0


def _count(saved: Tensor, shape: torch.Size, parameter: Tensor) -> int | Tensor:
    """Returns the steps a parameter has done, `saved` being those of its block of a shape; the rest has done none."""
    if shape == parameter.shape:
        return saved.to(parameter.device, copy=True) if saved.ndim else int(saved)
    axis = next(i for i, size in enumerate(shape) if size != parameter.shape[i])
    count = torch.zeros([size if i == axis else 1 for i, size in enumerate(parameter.shape)], device=parameter.device)
    count.narrow(axis, 0, shape[axis]).copy_(saved)
    return count
