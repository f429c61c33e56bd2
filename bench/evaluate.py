"""Evaluation and generation against a training step and the bare base model. Prints one JSON object.

Evaluation: time per token of `evaluate` over that of a training step on the same documents. Generation: tokens a second
of our batched greedy decoding with an adapter, and of transformers' `generate` of the base model, eight prompts.
"""

import argparse
import json
import sys
import time
import warnings

import numpy as np
import torch
import work as shared


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main(options) -> dict:
    import loratune
    from loratune.data.encode import Document
    from loratune.evaluate.generate import generate
    from loratune.evaluate.loss import evaluate
    from loratune.model.causal import CausalModel

    torch.set_num_threads(2)
    model, tokenizer = shared.load("gemma")
    work = shared.work(tokenizer, "short", options.documents, len(tokenizer) - 1)
    documents = [Document(np.array(ids, np.int32), np.array(trained)) for ids, trained in work.documents]
    prompts = [ids[: trained.index(True)] for ids, trained in work.documents[:8]]

    def bare() -> None:
        width = max(map(len, prompts))
        rows = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        model.generate(
            rows, attention_mask=mask, do_sample=False, max_new_tokens=options.new, min_new_tokens=options.new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    bare()
    bare_seconds = timed(bare)
    config = loratune.LoraConfig(r=shared.RANK, lora_alpha=shared.ALPHA, target_modules=shared.TARGETS)
    attached = loratune.attach(model, config, seed=0)
    causal = CausalModel(model)

    def training() -> None:
        for start in range(0, len(documents), shared.BATCH):
            rows = documents[start : start + shared.BATCH]
            for pack in causal.cut(rows, 2048):
                causal.losses(causal.batch([rows[i] for i in pack], pack))[0].backward()

    training()
    step = timed(training)
    held_out = timed(evaluate, causal, documents, 2048)
    causal.close()
    ours = lambda: generate(model, tokenizer, prompts, options.new, stop_ids=[])  # noqa: E731
    ours()
    ours_seconds = timed(ours)
    attached.detach()
    tokens = options.new * len(prompts)
    return {
        "training_tokens_per_second": work.num_tokens / step,
        "evaluation_tokens_per_second": work.num_tokens / held_out,
        "evaluation_over_training": held_out / step,
        "generated_with_adapter_per_second": tokens / ours_seconds,
        "generated_by_bare_base_per_second": tokens / bare_seconds,
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    print(json.dumps(main(parser.parse_args())), file=sys.stdout)
