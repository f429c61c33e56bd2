"""Independent computations that the adapter's tests compare with: brute-force merged weights, and small measures."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from families import CAUSAL, FAMILIES, SEQ2SEQ
from loratune.adapter.adapter import Adapter
from loratune.adapter.roles import minimal_targets, select


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest entry."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())


def worst(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest difference between tensors of the same names, relative to the largest entry of all."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    scale = max(float(tensor.abs().max()) for tensor in expected.values())
    return max(float((found[name] - expected[name]).abs().max()) for name in expected) / scale


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    return model(**inputs).logits


def double(family: str) -> PreTrainedModel:
    """A family's model in float64; mixtures run expert by expert: torch's grouped product has no float64."""
    model = FAMILIES[family]().double()
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


class ExactNorm(nn.Module):
    """A norm that computes in the type of its input; transformers' go through float32 in any model."""

    def __init__(self, norm: Any, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = norm.weight, offset
        self.eps = float(getattr(norm, "eps", getattr(norm, "variance_epsilon", 0.0)))

    def forward(self, x: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (self.weight + self.offset)


def exact(family: str) -> PreTrainedModel:
    """A family's model in float64 throughout."""
    model = FAMILIES[family]().double()
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, ExactNorm(module, 1.0 if family.startswith("gemma") else 0.0))
    return model


def task_of(family: str) -> str | None:
    return "CAUSAL_LM" if family in CAUSAL else "SEQ_2_SEQ_LM" if family in SEQ2SEQ else None


def targets_of(model: nn.Module, preset: str) -> list[str]:
    return minimal_targets(select(model, preset), [path for path, _ in model.named_modules()])


def objective(logits: Tensor) -> Tensor:
    """A scalar whose gradient reaches every logit differently: the sum of seeded noise times the logits."""
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return (logits * noise.to(logits.dtype)).sum()


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """The gradients that a backward pass left on an adapter, by name."""
    grads = {name: parameter.grad for name, parameter in adapter.named_parameters()}
    assert all(grad is not None for grad in grads.values()), [name for name, grad in grads.items() if grad is None]
    return {name: grad for name, grad in grads.items() if grad is not None}


def brute_force(
    plain: nn.Module, adapter: Adapter, inputs: Mapping[str, Tensor], paths: Iterable[str] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients with W + s B A put in for each W, the sum written out; weights that are tied stay apart.

    `plain` is the model without any wrapper, `adapter` gives the values of A and B, which are copied.
    """
    leaves = {
        name: parameter.detach().clone().requires_grad_()
        for path in (paths or adapter.factors)
        for name, parameter in ((f"{path}.A", adapter.factors[path].A), (f"{path}.B", adapter.factors[path].B))
    }
    weights: dict[str, Tensor] = {}
    for path in paths or adapter.factors:
        module, scale = plain.get_submodule(path), adapter.factors[path].scale
        delta = scale * (leaves[f"{path}.B"] @ leaves[f"{path}.A"])
        weight = module.weight.detach()
        stored_as_out_in = isinstance(module, nn.Linear)
        weights[f"{path}.weight"] = weight + (delta if stored_as_out_in else delta.T)
    logits = functional_call(plain, weights, kwargs=dict(inputs), tie_weights=False).logits
    objective(logits).backward()
    return logits.detach(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same_state(model: nn.Module, before: Mapping[str, Tensor]) -> bool:
    """Whether a model holds the same tensors under the same names, bit for bit."""
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.c_fc = Conv1D(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c_fc(torch.tanh(self.q_proj(x)) * self.v_proj(x))


class Toy(nn.Module):
    """Every kind of host in float64, no transformers model: an embedding, two blocks, and a head that may be tied."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(6, 11, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        generator = torch.Generator().manual_seed(0)
        self.double().eval()
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.tensor([[1, 4, 2, 10], [3, 3, 0, 7], [9, 8, 1, 1]])


def randomise(parameters: Iterable[Tensor], seed: int = 11, std: float = 0.3) -> None:
    """Adds seeded noise, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_((noise * std).to(parameter.dtype))
