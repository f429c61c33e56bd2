"""Models with one layer of each kind, built the same way twice: for PEFT and for loratune under PEFT's names."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Experts(nn.Module):
    """Two stacked matrices, each applied to every input and the results added: (E, O, I)."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(2, 9, 12) / 4)
        self.down = nn.Parameter(torch.randn(2, 12, 9) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("eoi,...ei->...o", self.down, torch.einsum("eoi,...i->...eo", self.up, x))


class Toy(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.lin0 = nn.Linear(12, 16)
        self.c1d = Conv1D(12, 16)
        self.conv1d = nn.Conv1d(12, 8, 3, stride=2, padding=1)
        self.conv2d = nn.Conv2d(1, 6, 3, padding=1)
        self.mha = nn.MultiheadAttention(12, 2, batch_first=True)
        self.experts = Experts()
        self.head = nn.Linear(12, 5)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.c1d(torch.tanh(self.lin0(self.emb(ids))))
        h = h + self.mha(h, h, h)[0] + self.experts(h)
        one = self.conv1d(h.transpose(1, 2)).flatten(1).sum(1, keepdim=True)
        two = torch.tanh(self.conv2d(h[:, None])).flatten(1).sum(1, keepdim=True)
        return torch.cat([self.head(h).flatten(1), one, two], 1)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().eval()


def ids() -> Tensor:
    return torch.arange(12).view(3, 4)


LAYERS = ["emb", "lin0", "c1d", "conv1d", "conv2d", "mha"]
SETTINGS = {
    "plain": {"target_modules": LAYERS},
    "regex": {"target_modules": r"lin0|conv\dd"},
    "ranks": {"target_modules": ["lin0", "c1d"], "rank_pattern": {"c1d": 2}, "alpha_pattern": {"lin0": 3}},
    "rslora": {"target_modules": ["lin0", "emb"], "use_rslora": True},
    "dora": {"target_modules": ["emb", "lin0", "c1d", "conv1d", "conv2d"], "use_dora": True},
    "lora_bias": {"target_modules": ["lin0", "conv1d", "conv2d"], "lora_bias": True, "lora_alpha": 6},
    "biases": {"target_modules": ["lin0"], "bias": "lora_only"},
    "all biases": {"target_modules": ["lin0", "conv2d"], "bias": "all"},
    "saved": {"target_modules": ["lin0"], "modules_to_save": ["head"]},
    "tokens": {"target_modules": ["lin0"], "trainable_token_indices": {"emb": [1, 5]}},
    "parameter": {"target_modules": [], "target_parameters": ["lin0.weight"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.up", "experts.down"]},
}


def config_of(kind: type, name: str, **more: object) -> object:
    """A configuration of either library's class."""
    random = {} if "tokens" in name else {"init_lora_weights": False}
    return kind(**{"r": 4, "lora_alpha": 8, **random, **SETTINGS[name], **more})
