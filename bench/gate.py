"""Whether what is compared is the same: loss and gradients of the first step against PEFT. Prints one JSON object.

    python bench/gate.py

Both sides: the same ids and labels, the same A, the same B other than zero (a zero B would hide A's gradient), the
eight documents of the first step of the training benchmark. The truth is PEFT in float64; PEFT's own float32 stands
beside ours, so that the figure shows what rounding alone does. Errors are relative to the truth: of the loss, and of
the gradients of all factors as one vector. Also: what the layers keep for the backward pass, bytes a token and layer.
Exits with 1 where our loss or gradient is off by more than 1e-5 and by more than PEFT's own.
"""

import json
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import work as shared

from train import settings

TOLERANCE = 1e-5
SETTINGS = settings(SimpleNamespace(preset="linear", dropout=0.0))
Factors = dict[str, torch.Tensor]  # PATH.A (R, I) and PATH.B (O, R)


def kept(model, function, *arguments, **named) -> int:
    """Returns the bytes of what a call keeps for its backward pass, the model's weights left out."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    storages: dict[int, torch.Tensor] = {}  # held, so that no other storage takes a place meanwhile

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        function(*arguments, **named)
    return sum(each.untyped_storage().nbytes() for place, each in storages.items() if place not in weights)


def ours(model, work) -> tuple[float, Factors, Factors, dict[str, int]]:
    """Returns (loss, gradients, the factors both sides begin with, bytes kept)."""
    import loratune
    from loratune.data.encode import Document
    from loratune.model.causal import CausalModel

    attached = loratune.attach(model, loratune.LoraConfig(**SETTINGS), seed=0)
    parameters = {f"{path}.{n}": getattr(f, n) for path, f in attached.adapter.factors.items() for n in "AB"}
    generator = torch.Generator().manual_seed(1)
    for name, parameter in parameters.items():
        if name.endswith(".B"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    documents = [Document(np.array(ids, np.int32), np.array(trained)) for ids, trained in work.documents]
    sizes = {}
    for name, recompute in (("ours", False), ("recompute", True)):
        causal = CausalModel(model, recompute=recompute)
        sizes[name] = kept(model, causal.hidden, causal.batch(documents, range(len(documents))))
        causal.close()
    causal = CausalModel(model)
    total, _ = causal.losses(causal.batch(documents, range(len(documents))))
    (total / work.num_labels).backward()
    causal.close()
    attached.detach()
    factors, grads = (
        {name: of(p).clone() for name, p in parameters.items()} for of in (lambda p: p.data, lambda p: p.grad)
    )
    return float(total) / work.num_labels, grads, factors, sizes


def peft(model, work, factors: Factors) -> tuple[float, Factors, int]:
    """Returns (loss, gradients, bytes kept) in the type of the model's weights, one document after the other."""
    import peft as library

    model = library.get_peft_model(model, library.LoraConfig(task_type="CAUSAL_LM", **SETTINGS))
    weights = {}
    for name, value in factors.items():
        path, _, letter = name.rpartition(".")
        weights[name] = model.get_submodule(f"base_model.model.{path}.lora_{letter}.default").weight
        weights[name].data = value.to(model.dtype)
    loss, size = 0.0, 0
    for ids, trained in work.documents:
        row, labels = torch.tensor([ids]), torch.tensor([[i if t else -100 for i, t in zip(ids, trained)]])
        size += kept(model, model.base_model.model.model, input_ids=row, use_cache=False)
        if model.dtype == torch.float32:
            each = model(input_ids=row, labels=labels, use_cache=False).loss
        else:  # transformers' own loss goes through float32, whose softmax over 262,144 tokens is off by 1e-5
            each = F.cross_entropy(model(input_ids=row, use_cache=False).logits[0, :-1], labels[0, 1:])
        each = each * (sum(trained) / work.num_labels)
        each.backward()
        loss += float(each)
    grads = {name: weight.grad.clone() for name, weight in weights.items()}
    model.unload()
    return loss, grads, size


def off(grads: Factors, truth: Factors) -> float:
    square = sum(float((grads[name].double() - truth[name]).square().sum()) for name in truth)
    return (square / sum(float(each.square().sum()) for each in truth.values())) ** 0.5


def main() -> dict:
    torch.set_num_threads(2)
    model, tokenizer = shared.load("gemma")
    vocabulary = min(model.get_input_embeddings().num_embeddings, len(tokenizer))
    work = shared.work(tokenizer, "short", shared.BATCH, vocabulary)
    our_loss, our_grads, factors, sizes = ours(model, work)
    their_loss, their_grads, sizes["peft"] = peft(model, work, factors)
    loss, grads, _ = peft(model.double(), work, factors)
    places = work.num_tokens * model.config.num_hidden_layers
    return {
        "our_loss_error": abs(our_loss / loss - 1),
        "our_gradient_error": off(our_grads, grads),
        "peft_loss_error": abs(their_loss / loss - 1),
        "peft_gradient_error": off(their_grads, grads),
        **{f"kept_bytes_{name}": size / places for name, size in sizes.items()},
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    found = main()
    print(json.dumps(found))
    if any(found[f"our_{what}_error"] > max(TOLERANCE, found[f"peft_{what}_error"]) for what in ("loss", "gradient")):
        sys.exit("ours is not what PEFT computes: nothing that is timed would mean anything.")
