"""SEGMENTATION: the class of every pixel, by a model such as SegFormer whose decoding head is trained whole.

A row names an image and a mask, whose numbers are classes; 255 is of none and makes no loss. Both files are read again
for every step, and must be as they were. An image counts as one token for each 16 by 16 pixels.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loratune.adapter.dropout import Noise, Span
from loratune.data import images
from loratune.data.examples import Example
from loratune.data.images import ImageFile, Mask
from loratune.data.rows import Row
from loratune.errors import DataError
from loratune.evaluate import metrics
from loratune.model.images import Images
from loratune.tasks.classify import refuse_empty
from loratune.tasks.labels import Labels, checked_names
from loratune.tasks.task import Scores, Task, TaskBatch, as_float

NO_CLASS = 255  # as Pascal VOC, ADE20k and Cityscapes have it, and SegFormer's semantic_loss_ignore_index
NAMES = "id2label.json"
_PATCH = 16


def find_masks(rows: Iterable[Row], data: str) -> Labels:
    """Finds the classes of masks: those that id2label.json beside the rows names, else the numbers in the masks.

    Raises DataError that names file and line for masks that cannot be read, and where all pixels are of one class.
    """
    seen, first = Counter[int](), None
    for row in rows:
        first = first or row.where
        if named := given_names(_folder(row)):
            return _few_enough(tuple(named[number] for number in sorted(named)), row.where)
        try:
            content = ImageFile.of(_folder(row) / row.value["mask"])[1]
            seen.update(_numbers(images.mask(content, Path(row.value["mask"]))))
        except DataError as error:
            raise DataError(f"{row.where}: {error}") from error
    return _few_enough(checked_names(seen, data, first or data), first or data)


def _few_enough(names: tuple[str, ...], where: str) -> Labels:
    if len(names) > NO_CLASS:
        raise DataError(
            f"{where}: there are {len(names)} classes; expected {NO_CLASS} at most, {NO_CLASS} is no class."
        )
    return Labels(names)


def _folder(row: Row) -> Path:
    """Returns what the paths of a row are relative to: where its file is."""
    return Path(row.source).parent


def _numbers(mask: Mask) -> list[int]:
    return [number for number in np.flatnonzero(np.bincount(mask.ravel())).tolist() if number != NO_CLASS]


def given_names(folder: Path) -> Mapping[int, str]:
    """Returns the names of the numbers in masks that id2label.json in a folder gives, if there is one.

    Raises DataError for a file that is no object of numbers and different names.
    """
    file = folder / NAMES
    if not file.is_file():
        return {}
    try:
        named = {int(number): str(name) for number, name in json.loads(file.read_bytes()).items()}
    except (ValueError, AttributeError) as error:
        raise DataError(f'{file} is not understood: {error}; expected {{"0": "road", "1": "car", ...}}.') from error
    if len(set(named.values())) < max(2, len(named)) or NO_CLASS in named:
        raise DataError(f"{file}: expected two or more different names, and none for {NO_CLASS}, which is no class.")
    return named


@dataclass(frozen=True)
class ImageBatch(TaskBatch):
    """masks: of each image, with the model's numbers for the classes, in its own size."""

    masks: Sequence[Mask] = ()

    def noise(self, seed: int, step: int) -> Noise:
        """Every stage of the model has fewer places for an image, as many for each."""
        return Noise(seed, step, self.spans, self.num_positions, alike=True)


@dataclass(frozen=True, slots=True)
class _Files:
    """What an example is made of; numbers: the model's number of each that stands in the mask."""

    image: ImageFile
    mask: ImageFile
    numbers: NDArray[np.int64]


class Segment(Task):
    """Softmax over classes at each labelled pixel of the resized mask; figures are of the mask in its own size.

    `target` of an example: the labelled pixels of each class, (C,); `extra`: its files.
    """

    kinds = ("segmentation",)
    packs = False
    tokens = False

    @property
    def images(self) -> Images:
        """How images are prepared, which the model brings in a tokenizer's stead."""
        return cast(Images, self.tokenizer)

    def encode(self, row: Row) -> list[Example]:
        image_file, content = ImageFile.of(_folder(row) / row.value["image"])
        image = images.image(content, image_file.path)
        mask_file, content = ImageFile.of(_folder(row) / row.value["mask"])
        mask = images.mask(content, mask_file.path)
        if image.shape[:2] != mask.shape:
            raise DataError(f"the image is {_told(image)} and its mask is {_told(mask)}; expected the same size.")
        files = _Files(image_file, mask_file, self._table(mask, mask_file.path, given_names(_folder(row))))
        resized = self.images.classes(files.numbers[mask]).numpy().ravel()
        target = np.bincount(resized[resized != NO_CLASS], minlength=len(self.labels.names))
        if not target.any():
            raise DataError(f"every pixel of the mask {mask_file.path} is {NO_CLASS}, of no class; remove the row.")
        ids = [0] * max(1, self.images.height * self.images.width // _PATCH**2)
        return [Example.of(ids, target, row, num_units=int(target.sum()), extra=files)]

    def _table(self, mask: Mask, path: Path, named: Mapping[int, str]) -> NDArray[np.int64]:
        """Returns the model's number of each number in a mask; raises DataError, with the first place, for others."""
        table = np.full(int(mask.max()) + 1, NO_CLASS, np.int64)
        for number in _numbers(mask):
            try:
                if named and number not in named:
                    raise DataError(f"{number} is not in {NAMES} beside the rows.")
                table[number] = self.labels.number(named.get(number, number))
            except DataError as error:
                row, column = np.argwhere(mask == number)[0].tolist()
                raise DataError(f"{path}, row {row}, column {column}: {error}") from error
        return table

    def check(self, training: Sequence[Any], sources: Sequence[str]) -> None:
        """Every class needs a pixel to learn from."""
        pixels = np.sum([example.target for example in training], axis=0)
        refuse_empty(self.labels, Counter(dict(enumerate(pixels.tolist()))), sources)

    def digest(self, *examples: Sequence[Any]) -> str:
        """The rows name files, which are part of the data."""
        state = hashlib.sha256()
        for files in (example.extra for part in examples for example in part):
            state.update(f"{files.image.digest} {files.mask.digest} {files.numbers.tolist()}\n".encode())
        return state.hexdigest()

    def batch(self, examples: Sequence[Example], keys: Sequence[int]) -> ImageBatch:
        contents = [(example.extra.image.content(), example.extra.image.path) for example in examples]
        pixels = torch.stack([self.images.pixels(images.image(*each)) for each in contents])
        size = examples[0].num_tokens
        return ImageBatch(
            inputs={"pixel_values": pixels.to(self.model.device, self.model.dtype)},
            examples=examples,
            owners=torch.from_numpy(np.repeat(np.arange(len(examples)), [each.num_labels for each in examples])),
            spans=tuple(Span(key, number * size, size) for number, key in enumerate(keys)),
            num_positions=len(examples) * size,
            masks=[_mask_of(example) for example in examples],
        )

    def losses(self, outputs: Any, batch: TaskBatch) -> Tensor:
        asked = torch.stack([self.images.classes(mask) for mask in cast(ImageBatch, batch).masks])
        asked = asked.to(outputs.logits.device)
        losses = F.cross_entropy(
            _resized(outputs.logits, asked.shape[-2:]), asked, ignore_index=NO_CLASS, reduction="none"
        )
        return losses[asked != NO_CLASS]

    def own_labels(self, example: Example) -> dict[str, Tensor]:
        return {"labels": self.images.classes(_mask_of(example)).to(self.model.device)[None]}

    def predict(self, outputs: Any, batch: TaskBatch) -> list[Any]:
        """Returns for each image the labelled pixels of each class, (3 C,): both, predicted, true."""
        found: list[Any] = []
        for logits, mask in zip(outputs.logits, cast(ImageBatch, batch).masks, strict=True):
            said = _resized(logits[None], mask.shape).argmax(1)[0].cpu().numpy()
            found.append(metrics.pixel_counts(said[mask != NO_CLASS], mask[mask != NO_CLASS], len(self.labels.names)))
        return found

    def score(self, examples: Sequence[Example], predictions: Sequence[Any]) -> Scores:
        counts = np.stack(predictions)
        figures = {
            "mean_iou": metrics.additive(counts, metrics.mean_iou),
            "pixel_accuracy": metrics.additive(counts, metrics.micro_recall),
        }
        tables = {"classes": metrics.iou_table(counts, self.labels.names)}
        return Scores(figures, counts, metrics.mean_iou, tables)

    def record(self, example: Example, prediction: Any) -> dict[str, Any]:
        _, said, asked = (dict(zip(self.labels.names, map(int, each))) for each in np.split(prediction, 3))
        return {
            "image": example.row.value["image"], "mask": example.row.value["mask"],
            "predicted": {name: count for name, count in said.items() if count},
            "label": {name: count for name, count in asked.items() if count},
        }  # fmt: skip


def _mask_of(example: Example) -> Mask:
    files: _Files = example.extra
    return files.numbers[images.mask(files.mask.content(), files.mask.path)]


def _resized(logits: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(as_float(logits), tuple(size), mode="bilinear", align_corners=False)


def _told(array: NDArray[Any]) -> str:
    return f"{array.shape[0]} high and {array.shape[1]} wide"
