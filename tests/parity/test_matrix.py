"""The parity matrix, kinds of layer x settings: an adapter written by each side, read by the other, equal outputs."""

import warnings

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import loratune
from loratune import LoraConfig

TOLERANCE = 1e-5


class Toy(nn.Module):
    """One layer of each kind, so that every host meets every setting."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 12)
        self.lin = nn.Linear(12, 16)
        self.nobias = nn.Linear(16, 16, bias=False)
        self.c1d = Conv1D(12, 16)
        self.conv1 = nn.Conv1d(12, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv3 = nn.Conv3d(1, 4, (1, 2, 3))
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.c1d(torch.tanh(self.nobias(torch.tanh(self.lin(self.emb(ids))))))
        one = self.conv1(h.transpose(1, 2)).flatten(1).sum(1)
        two = torch.tanh(self.conv2(h[:, None])).flatten(1).sum(1)
        three = self.conv3(h[:, None, None].expand(-1, 1, 3, -1, -1)).flatten(1).sum(1)
        return torch.cat([self.head(self.norm(h)).flatten(1), one[:, None], two[:, None], three[:, None]], 1)


def toy(seed: int = 0) -> Toy:
    torch.manual_seed(seed)
    return Toy().eval()


KINDS = {
    "linear": ["lin", "nobias"],
    "conv1d-gpt2": ["c1d"],
    "conv1": ["conv1"],
    "conv2": ["conv2"],
    "conv3": ["conv3"],
    "embedding": ["emb"],
    "all": ["emb", "lin", "nobias", "c1d", "conv1", "conv2", "conv3"],
}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"[a-z0-9]+": 2}, "alpha_pattern": {"[a-z0-9]+": 5}},
    "bias": {"bias": "lora_only"},
    "all-biases": {"bias": "all"},
    "saved": {"modules_to_save": ["head"]},
    "lora-bias": {"lora_bias": True},
    "tokens": {"trainable_token_indices": {"emb": [3, 7]}},
}


def refuses(kind: str, setting: str) -> bool:
    """What PEFT cannot do, or what has no meaning: no bias to train, an embedding that is adapted twice."""
    no_bias = setting == "bias" and kind == "embedding"
    lora_bias = setting == "lora-bias" and kind in ("embedding", "all")
    tokens = setting == "tokens" and kind in ("embedding", "all")
    return no_bias or lora_bias or tokens


CASES = [(kind, setting) for kind in KINDS for setting in SETTINGS if not refuses(kind, setting)]


def shaken(module: nn.Module) -> None:
    """Moves every trained tensor off its beginning, so that nothing agrees by being zero."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max())


def settings_of(kind: str, setting: str) -> dict:
    return {"r": 4, "lora_alpha": 6, "lora_dropout": 0.0, "target_modules": KINDS[kind], **SETTINGS[setting]}


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_peft_writes_and_we_read(kind, setting, tmp_path):
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(**settings_of(kind, setting)))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    model = toy()
    before = model(ids)
    attached = loratune.load_adapter(model, tmp_path / "a")
    ours, expected = model(ids), theirs.eval()(ids)
    assert not torch.equal(ours, before)
    assert close(ours, expected)
    if setting == "lora-bias" and kind == "linear":  # one of the two layers has no bias to merge into
        with pytest.raises(loratune.LoratuneError, match="nobias has no bias"):
            attached.merge()
    else:
        assert close(attached.merge()(ids), expected)


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_we_write_and_peft_reads(kind, setting, tmp_path):
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    model = toy()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    attached = loratune.attach(model, LoraConfig(**settings_of(kind, setting)), seed=0)
    shaken(model)
    ours = model(ids)
    attached.save(tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(toy(), str(tmp_path / "a")).eval()
    assert close(ours, theirs(ids))
    attached.detach()
    assert all(torch.equal(value, base[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("kind", "setting"), CASES)
def test_gradients_equal_pefts(kind, setting, tmp_path):
    ids = torch.randint(0, 20, (3, 6), generator=torch.Generator().manual_seed(1))
    theirs = peft.get_peft_model(toy(), peft.LoraConfig(**settings_of(kind, setting)))
    shaken(theirs)
    theirs.save_pretrained(str(tmp_path / "a"))
    model = toy()
    attached = loratune.load_adapter(model, tmp_path / "a", trainable=True)
    model(ids).square().sum().backward()
    theirs.eval()(ids).square().sum().backward()
    expected = sorted(float(p.grad.norm()) for p in theirs.parameters() if p.requires_grad and p.grad is not None)
    found = sorted(float(p.grad.norm()) for _, p in attached.adapter.named_parameters() if p.grad is not None)
    assert len(found) == len(expected)
    assert found == pytest.approx(expected, rel=1e-4)
