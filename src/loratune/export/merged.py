"""`export --to merged`: an adapter added into the files of its base, tensor by tensor, and proved on a probe.

W' = W + s B A is formed in float32 and rounded once. The folder appears whole or not at all.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune import files
from loratune.adapter import peft_format
from loratune.adapter.adapter import Adapter
from loratune.adapter.merge import Loss, added
from loratune.errors import ConfigError, ExportError
from loratune.export import companions, probe
from loratune.export.loss import MAX_LOSS, loss_report
from loratune.export.plan import Group, Operation, Plan, make_plan
from loratune.export.task import export_task, require_space
from loratune.export.tensors import FLOATS, Entry, shard_names, write_file, write_index
from loratune.model.load import Source, resolve
from loratune.tasks.judge import task_beside
from loratune.tasks.table import TASKS

Notify = Callable[[str], None]

DTYPES = ("float32", "bfloat16", "float16")
REPORT = "merge.json"
SHARD_BYTES = 5_000_000_000  # transformers' 50 GB is more than most file systems and links take kindly


def export_merged(
    adapter: Path,
    output: Path,
    *,
    model: str | None = None,
    dtype: str | None = None,
    accept_loss: bool = False,
    dry_run: bool = False,
    notify: Notify | None = None,
) -> dict[str, Any]:
    """Writes the base model with an adapter added into its weights, and returns the report: operations, bytes, what
    rounding lost of the update, the probe's figures.

    `dtype` (float32, bfloat16, float16) converts all weights, None keeps their types; `dry_run` returns the plan.
    Raises ConfigError for an output that exists or an unknown base, AdapterError for an adapter that does not fit,
    ExportError where the result would not be the model that was trained: the files cannot be merged into, rounding
    loses over 5% of the update (unless `accept_loss`), or the probe differs. Then nothing is left behind.
    """
    _check(output, dtype)
    say = notify or _silent
    value = peft_format.read(adapter)
    if task_beside(adapter, value.config.task_type) in TASKS:  # with a head that its files lack: in memory
        return export_task(
            adapter, output, model=model, dtype=dtype, accept_loss=accept_loss, dry_run=dry_run, notify=notify
        )
    name = model or value.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{adapter / peft_format.CONFIG} names no base model. Give it with --model.")
    source = resolve(name, notify)
    plan = make_plan(source, value, dtype)
    report = _outline(adapter, output, source, plan, dtype)
    if dry_run:
        return report | {"changes": [each.to_json() for each in plan.operations if each.kind != "copy"]}
    require_space(output, plan.num_bytes)
    task = value.config.task_type or "CAUSAL_LM"
    say(f"computing what {source.name} gives with the adapter attached, to compare with")
    wanted = probe.expected(name, value, task)
    with files.staged_directory(output) as staging:
        losses = _write_weights(plan, wanted.adapter, staging, say)
        report |= loss_report(losses, accept_loss)
        companions.write(staging, source, adapter, untied=bool(plan.untied), dtype=dtype)
        say("comparing the merged model with it")
        only_update = dtype is None and report["loss_share"] <= MAX_LOSS
        report["probe"] = probe.check(staging, wanted, _coarsest(plan), task, only_update=only_update)
        shares = {name: loss.share for name, loss in losses.items()}
        files.write_json(staging / REPORT, report | {"loss_shares": shares})
    return report


def _silent(message: str) -> None:
    pass


def _check(output: Path, dtype: str | None) -> None:
    if output.exists():
        raise ConfigError(f"the output {output} exists already. Choose another name, or remove it first.")
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"dtype {dtype!r} is not known; expected one of {', '.join(DTYPES)}.")


def _coarsest(plan: Plan) -> torch.dtype:
    """Returns, of the types that something was rounded to, the one that moves the logits most."""
    rounded = [each for each in plan.operations if each.is_rounded]
    return max((FLOATS[each.dtype] for each in rounded), key=lambda each: probe.LIMITS[each].difference)


def _outline(adapter: Path, output: Path, source: Source, plan: Plan, dtype: str | None) -> dict[str, Any]:
    return {
        "output": str(output),
        "model": source.name,
        "adapter": str(adapter),
        "dtype": dtype or "as stored",
        "bytes": plan.num_bytes,
        "files": len(_shards(plan.operations)),
        "operations": plan.counts(),
        "untied": list(plan.untied),
    }


# ---- writing --------------------------------------------------------------------------------------------------------


def _shards(operations: Sequence[Operation]) -> list[list[Operation]]:
    """Returns the operations in files of at most SHARD_BYTES, in order; a larger tensor has a file of its own.

    Within a file wider types come first, so that every tensor is aligned to its type.
    """
    shards: list[list[Operation]] = [[]]
    size = 0
    for operation in operations:
        if shards[-1] and size + operation.num_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(operation)
        size += operation.num_bytes
    return [sorted(shard, key=_alignment, reverse=True) for shard in shards]


def _alignment(operation: Operation) -> int:
    return operation.num_bytes // max(1, math.prod(operation.shape))


def _write_weights(plan: Plan, adapter: Adapter, folder: Path, say: Notify) -> dict[str, Loss]:
    """Writes the model's files tensor by tensor, and returns what rounding lost in each that changed."""
    contents = _Contents(adapter)
    shards = _shards(plan.operations)
    names = shard_names(len(shards))
    written = [(name, [_entry(each) for each in shard]) for name, shard in zip(names, shards, strict=True)]
    for (name, entries), shard in zip(written, shards, strict=True):
        say(f"writing {name}: {len(entries)} tensors, {sum(each.num_bytes for each in entries) / 1e9:.2f} GB")
        try:
            write_file(folder / name, entries, map(contents.of, shard))
        except OSError as error:
            if not files.is_disk_full(error):
                raise
            raise ExportError(f"the disk of {folder.parent} is full. Nothing was written. Choose another.") from error
    if len(shards) > 1:
        write_index(folder, written)
    return contents.losses


def _entry(operation: Operation) -> Entry:
    return Entry(operation.name, operation.dtype, operation.shape, operation.num_bytes)


class _Contents:
    """Computes the bytes of each operation's tensor, block by block, and keeps account of what rounding lost."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.losses: dict[str, Loss] = {}
        # Experts are stored one by one, the tensors of each together, but are two parameters in memory: gate_up, down.
        self._deltas = lru_cache(maxsize=2)(self._group_deltas)
        self._kinds = {"copy": self._copied, "untie": self._copied, "merge": self._merged, "replace": self._replaced}

    def of(self, operation: Operation) -> Iterator[Any]:
        return self._kinds[operation.kind](operation)

    def _group_deltas(self, group: Group) -> dict[str, Tensor]:
        return group.deltas(self.adapter)

    def _lost(self, name: str, loss: Loss) -> None:
        self.losses[name] = self.losses.get(name, Loss()) + loss

    def _copied(self, operation: Operation) -> Iterator[Any]:
        source = operation.source
        assert source is not None
        if operation.dtype == source.dtype:
            yield from source.blocks()
        else:
            for _, rows in source.rows():
                yield _bytes(rows.to(FLOATS[operation.dtype]), operation)

    def _merged(self, operation: Operation) -> Iterator[Any]:
        source, change, group = operation.source, operation.change, operation.group
        assert source is not None
        if group is not None:
            delta = self._deltas(group)[operation.name]
        else:
            assert change is not None
            delta = change.delta(self.adapter, source)
        exact = torch.promote_types(FLOATS[source.dtype], delta.dtype)
        for start, rows in source.rows():
            part = delta[start : start + len(rows)].to(exact)
            rounded, loss = added(rows, part, FLOATS[operation.dtype])
            self._lost(operation.name, loss)
            yield _bytes(rounded, operation)

    def _replaced(self, operation: Operation) -> Iterator[Any]:
        source, change = operation.source, operation.change
        assert change is not None and change.trained is not None
        value = change.trained
        if source is None:
            yield _bytes(value.to(FLOATS[operation.dtype]), operation)
            return
        for start, rows in source.rows():
            trained = value.reshape(-1, *rows.shape[1:])[start : start + len(rows)]
            rounded = trained.to(FLOATS[operation.dtype])
            exact = torch.promote_types(trained.dtype, torch.float32)
            self._lost(
                operation.name, Loss.of(rounded.to(exact) - trained.to(exact), trained.to(exact) - rows.to(exact))
            )
            yield _bytes(rounded, operation)


def _bytes(tensor: Tensor, operation: Operation) -> Any:
    if not torch.isfinite(tensor).all():
        raise ExportError(
            f"{operation.name} holds values that {operation.dtype} cannot hold, or that are not finite. Nothing was "
            "written. Use --dtype float32."
        )
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
