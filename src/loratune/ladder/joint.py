"""A batch that holds documents of several adapters, each document served by its own: what they share is computed once.

The gradient of each adapter is that of its own documents alone: no token sees those of another document.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapter.attach import Attached, Attachments
from loratune.adapter.dropout import Noise, Span
from loratune.adapter.factor import LowRank
from loratune.adapter.segments import Segment, Segments
from loratune.adapter.wrapper import Adapted, Shared, unwrapped
from loratune.data.encode import Document
from loratune.model.causal import Batch, CausalModel
from loratune.model.loss import HeadShape, label_loss, loss_memory


class Server:
    """One attached adapter, and the number of each of its sites as where it is attached alone."""

    def __init__(self, attached: Attached) -> None:
        everything = Attachments.of(attached.model)
        assert everything is not None
        self.name = attached.name
        self.sites: dict[nn.Module, int] = {
            everything.slots[path]: number for number, path in enumerate(attached.adapter.factors)
        }


class JointModel(CausalModel):
    """A causal language model that can compute the losses of several attached adapters at once."""

    @property
    def _shared(self) -> Shared:
        everything = Attachments.of(self.model)
        assert everything is not None
        return everything.shared

    def add_gradients(
        self, servers: Sequence[Server], documents: Sequence[Document], keys: Sequence[int], max_tokens: int, seed: int,
        step: int,
    ) -> list[float]:  # fmt: skip
        """Adds to each adapter the gradient of its mean label loss over the documents; returns those means.

        `max_tokens` bounds a micro-batch as in training alone; so do `keys`, seed and step the dropout masks. No
        adapter may be active, and none may have a gradient yet.
        """
        count, num_labels = len(documents), sum(document.num_labels for document in documents)
        sums = torch.zeros(len(servers), dtype=torch.float64)
        with self._jointly():
            for pack in self.cut([*documents] * len(servers), max_tokens):
                batch = self.batch([documents[at % count] for at in pack], [keys[at % count] for at in pack])
                owners = [at // count for at in pack]  # ascending, as positions in a pack are
                self._shared.segments = segments_of([servers[owner] for owner in owners], batch, seed, step)
                total, losses = self.losses(batch)
                (total / num_labels).backward()
                sums.index_add_(0, torch.tensor(owners)[batch.owners.cpu()], losses.double().cpu())
        return (sums / num_labels).tolist()

    @contextmanager
    def _jointly(self) -> Generator[None]:
        """Within the block no beginnings are shared: what begins alike may belong to two adapters."""
        shares, self.shares = self.shares, False
        try:
            yield
        finally:
            self.shares, self._shared.segments = shares, None

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """As CausalModel's; with segments, a head that is adapted computes each one's rows with its own adapter."""
        head: Any = self.model.get_output_embeddings()  # type: ignore[operator]
        segments = self._shared.segments
        if segments is None or not isinstance(head, Adapted):
            return super().losses(batch)
        factors = [factor for part in segments.parts for factor in head.placed.get(part.name, ())]
        if not factors:
            return super().losses(batch)
        if self._shape is None or not all(factor.is_plain for factor in factors):
            return self._losses_by_logits(batch)
        h_nH, shape = self.hidden(batch), self._shape
        found = [self._losses_of(part, head, h_nH[part.rows], batch, shape) for part in segments.parts]
        return torch.stack([total for total, _ in found]).sum(), torch.cat([losses for _, losses in found])

    def _losses_of(
        self, part: Segment, head: Adapted, h_nH: Tensor, batch: Batch, shape: HeadShape
    ) -> tuple[Tensor, Tensor]:
        """Returns the losses of a segment's rows, with its own adapter of the head if it has one."""
        frozen: Any = unwrapped(head)
        z_nR: Tensor | None = None
        up: Tensor | None = None
        for factor in head.placed.get(part.name, ()):
            z_nR, up = self._dropped_rows(part, head, factor, h_nH, batch) @ factor.A.to(h_nH.dtype).T, factor.B
            shape = HeadShape(shape.logit_scale, shape.softcap, factor.scale)
            if self._memory is None:
                self._memory = loss_memory(frozen.weight)
        bias, labels = getattr(frozen, "bias", None), batch.labels[part.rows]
        return label_loss(h_nH, labels, frozen.weight, bias, z_nR, up, shape, self._memory)

    @staticmethod
    def _dropped_rows(part: Segment, head: Adapted, factor: LowRank, h_nH: Tensor, batch: Batch) -> Tensor:
        """A mask is drawn for all tokens of a segment, and the rows that predict are taken."""
        mask = Segments.mask(head, part, factor, h_nH.device)
        if mask is None:
            return h_nH
        kept_TH = mask.apply(h_nH.new_ones(part.noise.num_tokens, h_nH.shape[-1]))
        return h_nH * kept_TH[batch.predicting[part.rows] - part.tokens.start]


def segments_of(servers: Sequence[Server], batch: Batch, seed: int, step: int) -> Segments:
    """Returns the segments of a batch whose document i is served by servers[i], those of one server side by side."""
    counts = torch.bincount(batch.owners.cpu(), minlength=batch.num_documents)
    rows = [0, *counts.cumsum(0).tolist()]
    starts = [*(span.start for span in batch.spans), batch.num_positions]
    parts: list[Segment] = []
    for _, group in groupby(range(len(servers)), key=lambda position: servers[position].name):
        own = list(group)
        first, end = own[0], own[-1] + 1
        tokens = slice(starts[first], starts[end])
        spans = [Span(each.document, each.start - tokens.start, each.length) for each in batch.spans[first:end]]
        noise = Noise(seed, step, tuple(spans), tokens.stop - tokens.start)
        server = servers[first]
        parts.append(Segment(server.name, server.sites, tokens, slice(rows[first], rows[end]), noise))
    return Segments(parts)
