"""How a causal language model runs on documents: packed without padding where that is exact, else one document a row.

Everything the training loop and the evaluation ask of a model is here: cut documents into micro-batches, make a batch,
run it, and return the loss of its label tokens.

Shapes: T tokens of a packed row, N rows of a padded batch, L their length, n label tokens, H hidden, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from loratune.adapter.dropout import Noise, Span, zero_
from loratune.adapter.wrapper import Adapted, Slot, unwrapped
from loratune.data.encode import Document
from loratune.data.pack import length_groups, micro_batches
from loratune.model import attention, prefixes
from loratune.model.frozen import Frozen, stack_of
from loratune.model.layers import Blocks
from loratune.model.loss import HeadShape, label_log_probs, label_loss, loss_memory

_BLOCKS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 0.0, torch.float16: 0.0}
_PROBE_LENGTHS = (5, 9, 2)
# Packed and apart may differ by rounding only; a document that sees another moves the result by more than 1 %.
_PROBE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Batch:
    """A micro-batch. predicting: positions on the flattened token axis (n,) whose next token is a label; labels (n,);
    owners (n,): which document of the batch each label belongs to; spans: where each document's tokens stand."""

    inputs: dict[str, Any]
    predicting: Tensor
    labels: Tensor
    owners: Tensor
    spans: tuple[Span, ...]
    num_documents: int

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def packed(self) -> bool:
        return attention.SEGMENTS in self.inputs

    @property
    def num_positions(self) -> int:
        return self.inputs["input_ids"].numel()

    def noise(self, seed: int, step: int) -> Noise:
        """Returns what the dropout masks of this batch depend on."""
        return Noise(seed, step, self.spans, self.num_positions)


class CausalModel:
    """A causal language model made ready for documents. `notes` says what could not be done the fast way, and why.

    With `recompute`, gate, up and P of blocks run as one function are computed again in the backward pass: about half
    the activation memory for about a seventh more time. `keep_frozen`: bytes in which to keep what the layers below the
    first adapted one make of rows.
    """

    def __init__(self, model: nn.Module, *, recompute: bool = False, keep_frozen: int = 0) -> None:
        self.model = model
        self.notes: list[str] = []
        self._attention_before = getattr(model.config, "_attn_implementation", None)
        self.shares = False
        self.blocks: Blocks | None = None
        self.frozen: Frozen | None = None
        self.packs = self._probe_packing()
        self.shares = self.packs and self._probe_sharing()
        if self.packs:
            self._probe_blocks(recompute)
        self.frozen = self._frozen(keep_frozen) if keep_frozen else None
        self._shape = self._probe_head()
        self._memory: Tensor | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def is_lean(self) -> bool:
        """Whether layers and loss are computed by functions that are known to keep little."""
        return self.blocks is not None and self._shape is not None

    def close(self) -> None:
        """Gives the model the attention and the layers' forwards it had before."""
        self.frozen = None
        if self.blocks is not None:
            self.blocks.close()
        if getattr(self.model.config, "_attn_implementation", None) != self._attention_before:
            self.model.set_attn_implementation(self._attention_before)  # type: ignore[operator]

    def cut(self, documents: Sequence[Document], max_tokens: int) -> list[list[int]]:
        """Returns the positions of the documents of each micro-batch; every document is in one of them."""
        if self._shares_now():
            return prefixes.cut(documents, max_tokens)
        lengths = [document.num_tokens for document in documents]
        return micro_batches(lengths, max_tokens) if self.packs else length_groups(lengths, max_tokens)

    def _shares_now(self) -> bool:
        """Whether common beginnings are computed once: not where dropout gives each document its own."""
        return self.shares and not any(
            module.training and factor.dropout
            for module in self.model.modules()
            if isinstance(module, Slot)
            for factor in module.factors()
        )

    def batch(self, documents: Sequence[Document], keys: Sequence[int]) -> Batch:
        """Makes a micro-batch of documents; `keys` name them for the dropout masks.

        What follows a document's last predicting token predicts nothing and is left out.
        """
        lengths = [int(np.flatnonzero(document.trained)[-1]) for document in documents]
        if self.packs:
            row = prefixes.lay_out(documents, lengths, self._shares_now())
            starts, inputs = row.offsets, self._packed(row)
        else:
            width = max(lengths)
            starts, inputs = [width * row for row in range(len(documents))], self._padded(documents, lengths, width)
        predicting = [
            start + np.flatnonzero(document.trained) - 1 for start, document in zip(starts, documents, strict=True)
        ]
        labels = [document.input_ids[document.trained] for document in documents]
        owners = np.repeat(np.arange(len(documents)), [len(each) for each in labels])
        return Batch(
            inputs=inputs,
            predicting=self._tensor(np.concatenate(predicting)),
            labels=self._tensor(np.concatenate(labels)),
            owners=self._tensor(owners),
            spans=tuple(Span(key, start, length) for key, start, length in zip(keys, starts, lengths, strict=True)),
            num_documents=len(documents),
        )

    def _tensor(self, array: "np.ndarray[Any, Any]") -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self.device)

    def _packed(self, row: prefixes.Layout) -> dict[str, Any]:
        return {
            "input_ids": self._tensor(row.ids)[None],
            "position_ids": self._tensor(row.positions)[None],
            attention.SEGMENTS: row.segments,
        }

    def _padded(self, documents: Sequence[Document], lengths: Sequence[int], width: int) -> dict[str, Any]:
        rows = np.zeros((len(documents), width), np.int64)
        mask = np.zeros((len(documents), width), np.int64)
        for row, (document, length) in enumerate(zip(documents, lengths, strict=True)):
            rows[row, :length], mask[row, :length] = document.input_ids[:length], 1
        return {"input_ids": self._tensor(rows), "attention_mask": self._tensor(mask)}

    def hidden(self, batch: Batch) -> Tensor:
        """Runs the trunk; returns what the head sees at the predicting positions, (n, H)."""
        trunk: Any = self.model.base_model
        blocks, frozen = self.blocks, self.frozen
        with (
            attention.packed_row() if batch.packed else nullcontext(),
            nullcontext() if frozen is None else frozen.standing_in(batch.inputs),
            nullcontext() if blocks is None else blocks.only(batch.predicting),
        ):
            states: Tensor = trunk(**batch.inputs, use_cache=False).last_hidden_state
        rows = states.reshape(-1, states.shape[-1])
        return rows if blocks is not None and blocks.is_narrowed else rows[batch.predicting]

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Returns (the sum of the batch's label losses, differentiable; each label's loss, (n,) detached)."""
        if self._shape is None or self._head_is_more():
            return self._losses_by_logits(batch)
        return label_loss(*self._at_head(batch, self._shape))

    def log_probs(self, batch: Batch) -> Tensor:
        """Returns log p(label | what stands before it) of each label, (n,), differentiable: a loss that is more than
        their sum, as of preferences, is made of these. Logits are formed twice, and not kept."""
        if self._shape is None or self._head_is_more():
            return self._log_probs_by_logits(batch)
        return label_log_probs(*self._at_head(batch, self._shape))

    def _head_is_more(self) -> bool:
        """Whether the head has more than one factor, or one that is more than s B A (DoRA, PiSSA, a bias): the layer's
        own to compute."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        return isinstance(head, Adapted) and (len(head.active) > 1 or not all(each.is_plain for each in head.factors()))

    def _at_head(self, batch: Batch, shape: HeadShape) -> tuple[Any, ...]:
        """Runs the trunk; returns what `label_loss` and `label_log_probs` take."""
        h_nH = self.hidden(batch)
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        frozen: Any = unwrapped(head)
        z_nR: Tensor | None = None
        up: Tensor | None = None  # B of the head's own adapter
        if isinstance(head, Adapted) and len(head.active) == 1:
            factor: Any = head.active[0]
            z_nR, up = self._dropped(head, factor, h_nH, batch) @ factor.A.to(h_nH.dtype).T, factor.B
            shape = HeadShape(shape.logit_scale, shape.softcap, factor.scale)
        if self._memory is None and (z_nR is not None or frozen.weight.requires_grad):
            self._memory = loss_memory(frozen.weight)
        return h_nH, batch.labels, frozen.weight, getattr(frozen, "bias", None), z_nR, up, shape, self._memory

    def _dropped(self, head: Adapted, factor: Any, h_nH: Tensor, batch: Batch) -> Tensor:
        """The head sees label rows only: its dropout mask is drawn for all positions and the same rows are taken."""
        noise = head.shared.noise
        if noise is None or not (head.training and factor.dropout):
            return head.dropped(factor, h_nH)
        width, p = h_nH.shape[-1], factor.dropout
        kept = h_nH.new_ones(batch.num_positions, width)
        zero_(kept, noise.dropped(head.site, width, p, h_nH.device))
        return h_nH * kept[batch.predicting] * (1 / (1 - p))

    def _losses_by_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        each = -self._log_probs_by_logits(batch)
        return each.sum(), each.detach()

    def _log_probs_by_logits(self, batch: Batch) -> Tensor:
        """The plain way, for heads that are more than a matrix: the model's own logits of every position."""
        with attention.packed_row() if batch.packed else nullcontext():
            logits: Tensor = self.model(**batch.inputs, use_cache=False).logits
        rows = logits.reshape(-1, logits.shape[-1])[batch.predicting]
        return -F.cross_entropy(rows.to(torch.promote_types(rows.dtype, torch.float32)), batch.labels, reduction="none")

    def own_losses(self, documents: Sequence[Document]) -> list[float] | None:
        """Returns the sum of each document's label losses as the model computes it, alone; None where it does not."""
        losses: list[float] = []
        for document in documents:
            ids = self._tensor(document.input_ids)
            labels = torch.where(self._tensor(document.trained).bool(), ids, -100)
            try:
                loss = self.model(input_ids=ids[None], labels=labels[None], use_cache=False).loss
            except TypeError:  # a model whose forward takes no labels
                return None
            if loss is None:
                return None
            losses.append(float(loss) * document.num_labels)
        return losses

    @torch.no_grad()
    def _probe_packing(self) -> bool:
        """Compares three short documents packed with the same apart; a family that mixes them is run one a row."""
        name = type(self.model).__name__
        if not attention.install(self.model):
            self.notes.append(
                f"{name} cannot be packed (it has an attention of its own): one document a row, by length."
            )
            return False
        self.packs = True
        documents = [_probe_document(self.model, length, seed) for seed, length in enumerate(_PROBE_LENGTHS)]
        try:
            together = self.hidden(self.batch(documents, range(len(documents))))
        except (TypeError, ValueError, RuntimeError) as error:  # a family that does not take positions or boundaries
            return self._refuse_packing(f"it refuses a packed row: {type(error).__name__}")
        self.packs = False
        apart = torch.cat([self.hidden(self.batch([document], [0])) for document in documents])
        difference = _relative(together, apart)
        if not difference <= _PROBE_TOLERANCE[apart.dtype]:
            return self._refuse_packing(f"packed and apart differ by {difference:.1e}")
        return True

    @torch.no_grad()
    def _probe_sharing(self) -> bool:
        """Compares documents that begin alike, that beginning computed once, with the same documents apart."""
        begin = _probe_document(self.model, prefixes.MIN_TOKENS, 7).input_ids
        ends = [_probe_document(self.model, length, seed).input_ids for seed, length in enumerate(_PROBE_LENGTHS)]
        ids = [np.concatenate([begin, end]) for end in ends]
        documents = [Document(each, np.arange(len(each)) > len(begin)) for each in ids]
        apart = self.hidden(self.batch(documents, range(len(documents))))
        self.shares = True
        together = self.hidden(self.batch(documents, range(len(documents))))
        difference = _relative(together, apart)
        if not difference <= _PROBE_TOLERANCE[apart.dtype]:
            self.notes.append(
                f"{type(self.model).__name__}: a beginning that rows share is computed for each of them "
                f"(computed once, they would differ by {difference:.1e})."
            )
            return False
        return True

    @torch.no_grad()
    def _probe_blocks(self, recompute: bool) -> None:
        """Lets layers of a known structure run as one function, where that gives what they give."""
        documents = [_probe_document(self.model, length, seed) for seed, length in enumerate(_PROBE_LENGTHS)]
        documents[0].trained[1:3] = False  # rows that nobody looks at
        batch = self.batch(documents, range(len(documents)))
        with attention.recording() as settings:
            plain = self.hidden(batch)
        self.blocks = blocks = Blocks(self.model, settings, recompute)
        blocks.use()
        try:
            same = _relative(self.hidden(batch), plain) <= _BLOCKS_TOLERANCE[plain.dtype]
        except RuntimeError:  # shapes that do not fit, a partial rotary embedding for one: not the structure it seemed
            same = False
        if not (same and blocks.num_used == len(blocks.found) > 0):
            blocks.close()
            self.blocks = None

    def _frozen(self, max_bytes: int) -> Frozen | None:
        """Returns what keeps the states below the first adapted layer, or None, and notes why."""
        trunk: Any = self.model.base_model
        stack = stack_of(trunk, [block.layer for block in self.blocks.found]) if self.blocks else None
        frozen = None if stack is None else Frozen(trunk, stack, max_bytes)
        if frozen is not None and frozen.depth:
            return frozen
        reason = (
            "its layers have no known structure" if frozen is None else "no layer stands below the first adapted one"
        )
        self.notes.append(f"{type(self.model).__name__}: keep_frozen_mb changes nothing, {reason}.")
        return frozen

    def _refuse_packing(self, reason: str) -> bool:
        self.model.set_attn_implementation(self._attention_before)  # type: ignore[operator]
        self.notes.append(f"{type(self.model).__name__} cannot be packed ({reason}): one document a row, by length.")
        return False

    @torch.no_grad()
    def _probe_head(self) -> HeadShape | None:
        """Finds what stands between the hidden state and the logits by comparing the two on one short row."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        if head is None or not isinstance(unwrapped(head), nn.Linear):
            self.notes.append(f"{type(self.model).__name__} has no linear head: the loss is computed from full logits.")
            return None
        ids = self._tensor(_probe_document(self.model, 6, 0).input_ids)[None]
        trunk: Any = self.model.base_model
        logits: Tensor = self.model(input_ids=ids, use_cache=False).logits
        raw: Tensor = head(trunk(input_ids=ids, use_cache=False).last_hidden_state)
        config: Any = self.model.config
        cap = getattr(config, "final_logit_softcapping", None)
        scale = float((logits * raw).sum() / raw.square().sum())
        for shape in (HeadShape(), HeadShape(logit_scale=scale), *([HeadShape(softcap=float(cap))] if cap else [])):
            if _relative(_shaped(raw, shape), logits) <= _PROBE_TOLERANCE[logits.dtype]:
                return shape
        self.notes.append(f"{type(self.model).__name__} changes its logits in its own way: they are computed in full.")
        return None


def _shaped(raw: Tensor, shape: HeadShape) -> Tensor:
    logits = raw * shape.logit_scale
    return logits if shape.softcap is None else torch.tanh(logits / shape.softcap) * shape.softcap


def _probe_document(model: nn.Module, length: int, seed: int) -> Document:
    """Makes a document of arbitrary tokens, all but the first trained."""
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    ids = np.random.RandomState(seed).randint(0, rows, length + 1).astype(np.int32)
    return Document(ids, np.arange(length + 1) > 0)


def _relative(a: Tensor, b: Tensor) -> float:
    """Returns the largest difference relative to the largest entry; NaN where something is not finite."""
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
