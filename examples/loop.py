"""LoRA (Hu et al. 2021) with no abstraction: inject, train, merge, in plain PyTorch. Run: python examples/loop.py

Without --model a tiny random Llama that reads bytes is made, so it runs in seconds. With --model FOLDER_OR_HUB_ID it
tunes a real model on the same three rows. What the library adds to this: exactness, speed, checks, checkpoints.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

ROWS = [("Україна, столиця:", " Київ"), ("France, capital:", " Paris"), ("Italia, capitale:", " Roma")]
TARGETS = ("q_proj", "v_proj")  # what to look for, and what is read out: the two the paper found to matter most
R, ALPHA, STEPS = 8, 16, 60


class Lora(nn.Module):
    """y = W x + s B A x with s = alpha / r. W (out, in) is frozen; A (r, in) and B (out, r) are what is trained."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.s = base, ALPHA / R
        self.A = nn.Parameter(torch.empty(R, base.in_features))
        self.B = nn.Parameter(torch.zeros(base.out_features, R))  # zero: step 0 is the base model exactly
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))  # not zero too, or no gradient would reach B

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.s * (x @ self.A.T) @ self.B.T  # two thin products; B A is never formed

    def merged(self) -> nn.Linear:
        """W' = W + s B A: one plain layer again, which costs nothing more than the base."""
        linear = copy.deepcopy(self.base)
        with torch.no_grad():
            linear.weight += self.s * self.B @ self.A
        return linear


def replace(model: nn.Module, kind: type[nn.Module], names: tuple[str, ...], make) -> int:
    """Puts make(layer) in the place of every layer of a kind whose own name is in `names`; returns how many."""
    sites = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()
             if name in names and isinstance(child, kind)]  # fmt: skip  # listed first: we change what we walk
    for parent, name, child in sites:
        setattr(parent, name, make(child))
    return len(sites)


def load(name: str | None):
    """Returns (model, a function from text to token ids, the id that ends a text)."""
    torch.manual_seed(0)
    if name is None:  # bytes are the tokens, 256 ends a text
        config = LlamaConfig(vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                             num_attention_heads=4, initializer_range=0.2)  # fmt: skip
        return LlamaForCausalLM(config), lambda text: list(text.encode()), 256
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    return model, lambda text: tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id


def loss_of(model: nn.Module, rows) -> torch.Tensor:
    """The mean over all label tokens of -log p(token | what stands before it): completions only, never prompts."""
    total = torch.zeros(())
    for prompt, completion in rows:
        ids = torch.tensor([prompt + completion])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]  # position i predicts token i + 1
        total = total + F.cross_entropy(logits, torch.tensor(completion), reduction="sum")
    return total / sum(len(completion) for _, completion in rows)  # one division: however the rows are cut up


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", help="folder or hub id")
    parser.add_argument("--rate", type=float, default=1e-2, help="of learning; a real model wants about 5e-4")
    options = parser.parse_args()
    model, encode, end = load(options.model)
    rows = [(encode(prompt), [*encode(completion), end]) for prompt, completion in ROWS]
    model.eval().requires_grad_(False)  # the base is frozen, its own dropout off
    before = loss_of(model, rows)
    sites = replace(model, nn.Linear, TARGETS, Lora)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    print(f"{sites} layers adapted, {sum(p.numel() for p in trained):,} parameters trained")
    assert torch.equal(loss_of(model, rows), before)  # B is zero
    optimizer = torch.optim.AdamW(trained, lr=options.rate, weight_decay=0.0)
    for _ in range(STEPS):
        loss_of(model, rows).backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted = model(input_ids=torch.tensor([rows[0][0]])).logits
    print(f"loss before {before.item():.3f}, after {loss_of(model, rows).item():.3f}")
    replace(model, Lora, TARGETS, Lora.merged)
    merged = model(input_ids=torch.tensor([rows[0][0]])).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)  # equal up to rounding
    print(f"merged: largest difference {(merged - adapted).abs().max().item():.1e}")


if __name__ == "__main__":
    main()
