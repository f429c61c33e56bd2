"""SEGMENTATION: loss and gradients of transformers with PEFT, the same for any cut; figures; names; bad files."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratune import api
from loratune.adapter.dropout import Noise, Span
from loratune.cli.main import run as command
from loratune.data.rows import Row, read_rows
from loratune.errors import CheckpointError, DataError
from loratune.evaluate import metrics
from loratune.model.images import Images
from loratune.tasks.segment import NO_CLASS, find_masks
from loratune.train.config import load_run_config
from tasks.task_models import backward, check_gradients, in_peft, prepared, set_random
from tasks.toy_tasks import CLASSES, save_segformer, shapes, write


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_segformer(tmp_path_factory.mktemp("bases") / "segformer")


def by_hand(settings: Images, image: Any) -> torch.Tensor:
    """An image of the model's own size needs no resizing."""
    mean, deviation = np.array(settings.mean), np.array(settings.deviation)
    return torch.from_numpy(((image / 255 - mean) / deviation).transpose(2, 0, 1).astype(np.float32))


@pytest.mark.parametrize("targets", ["fast", "deep", "all-linear"])
def test_loss_and_gradients_are_those_of_peft(targets: str, base: Path, tmp_path: Path) -> None:
    data = shapes(tmp_path, 4)
    images, masks = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8), []
    for number, row in enumerate(read_rows(data)):  # of one size, so that nothing of ours stands between
        np.save(tmp_path / row.value["image"], images[number])
        masks.append(np.random.default_rng(number).choice([0, 1, 2, NO_CLASS], (64, 64)).astype(np.uint8))
        masks[-1][: 8 * number] = NO_CLASS  # images with fewer labelled pixels weigh less
        np.save(tmp_path / row.value["mask"], masks[-1])
    attached, examples, runner = prepared("SEGMENTATION", base, read_rows(data), targets=targets)
    set_random(attached)
    attached.save(tmp_path / "adapter")
    theirs = in_peft("SEGMENTATION", base, tmp_path / "adapter", attached.model.config)
    settings: Any = runner.task.tokenizer
    pixels = torch.stack([by_hand(settings, each) for each in images])
    expected = theirs(pixel_values=pixels, labels=torch.tensor(np.stack(masks)).long()).loss
    expected.backward()
    assert backward(examples, runner, 16) == pytest.approx(float(expected.detach()), abs=1e-5)  # image by image
    check_gradients(attached, theirs)
    own = runner.own_losses(examples)
    assert own is not None
    assert sum(own) == pytest.approx(float(expected.detach()) * sum(each.num_labels for each in examples), rel=1e-5)


def test_gradients_do_not_depend_on_the_cut_with_dropout(base: Path, tmp_path: Path) -> None:
    """Also in stages of fewer tokens, and where keys are reduced."""
    rows = read_rows(shapes(tmp_path, 5))
    attached, examples, runner = prepared("SEGMENTATION", base, rows, targets="deep", dropout=0.3)
    set_random(attached)
    attached.train_mode(True)

    def gradients(max_tokens: int) -> dict[str, torch.Tensor]:
        for pack in runner.cut(examples, max_tokens):
            batch = runner.batch([examples[i] for i in pack], [100 + i for i in pack])
            attached.shared.noise = batch.noise(7, 3)
            runner.losses(batch)[0].backward()
        found = {name: parameter.grad.clone() for name, parameter in attached.adapter.named_parameters()}
        for _, parameter in attached.adapter.named_parameters():
            parameter.grad = None
        return found

    together, apart = gradients(1000), gradients(16)
    for name, gradient in together.items():
        largest = float(gradient.abs().max())
        torch.testing.assert_close(apart[name], gradient, atol=1e-5 * largest, rtol=1e-3)


def test_noise_of_a_stage_knows_whose_tokens_are_whose() -> None:
    noise = Noise(1, 2, (Span(8, 0, 16), Span(3, 16, 16)), 32, alike=True)
    stage, alone = noise.at(8), Noise(1, 2, (Span(3, 0, 4),), 4)
    assert stage is not None
    both = stage.dropped(5, 10, 0.5, torch.device("cpu"))
    assert torch.equal(both[both >= 40] - 40, alone.dropped(5, 10, 0.5, torch.device("cpu")))
    assert noise.at(32) is noise and noise.at(7) is None
    assert Noise(1, 2, noise.spans, 32).at(8) is None  # documents of texts


@given(st.integers(0, 2**32), st.integers(2, 5))
def test_mean_iou_is_that_of_brute_force(seed: int, number: int) -> None:
    generator = np.random.default_rng(seed)
    pairs = generator.integers(0, number, (3, 2, 40))  # images, said and true
    pairs[pairs == generator.integers(0, number)] = 0  # a class that may be nowhere
    counts = np.stack([metrics.pixel_counts(said, true, number) for said, true in pairs])
    said, true = pairs[:, 0].ravel(), pairs[:, 1].ravel()
    shares = [
        np.mean((said == k)[(said == k) | (true == k)] & (true == k)[(said == k) | (true == k)])
        for k in range(number)
        if ((said == k) | (true == k)).any()
    ]
    assert float(metrics.mean_iou(counts.sum(0))) == pytest.approx(np.mean(shares))
    assert float(metrics.micro_recall(counts.sum(0))) == pytest.approx(np.mean(said == true))
    table = metrics.iou_table(counts, [str(k) for k in range(number)])
    assert [row["iou"] for row in table if row["iou"] is not None] == pytest.approx(shares)


def test_figures_are_of_the_mask_in_its_own_size(base: Path, tmp_path: Path) -> None:
    rows = read_rows(shapes(tmp_path, 3))
    attached, examples, runner = prepared("SEGMENTATION", base, rows)
    set_random(attached)
    batch = runner.batch(examples, range(3))
    _, predictions = runner.results(batch)
    logits = attached.model(**batch.inputs).logits
    for row, found, plane in zip(rows, predictions, logits, strict=True):
        mask = np.load(tmp_path / row.value["mask"])
        resized = torch.nn.functional.interpolate(plane[None], mask.shape, mode="bilinear", align_corners=False)
        said = resized.argmax(1)[0].numpy()[mask != NO_CLASS]
        true = mask[mask != NO_CLASS]
        assert found.tolist() == [
            *(((said == k) & (true == k)).sum() for k in range(3)),
            *((said == k).sum() for k in range(3)),
            *((true == k).sum() for k in range(3)),
        ]
    scores = runner.task.score(examples, predictions)
    interval = scores.figures["mean_iou"]
    assert interval.low <= interval.value <= interval.high
    assert [row["class"] for row in scores.tables["classes"]] == list(CLASSES)


def test_masks_are_resized_to_the_nearest_pixel(tmp_path: Path, base: Path) -> None:
    settings = Images.of(base)
    mask = np.random.default_rng(0).integers(0, 9, (50, 97))
    rows, columns = (np.floor((np.arange(64) + 0.5) * size / 64).astype(int) for size in mask.shape)
    assert np.array_equal(settings.classes(mask).numpy(), mask[rows][:, columns])


def test_images_are_prepared_as_transformers_does(base: Path) -> None:
    pytest.importorskip("PIL")
    from transformers.models.segformer.image_processing_pil_segformer import SegformerImageProcessorPil

    theirs = SegformerImageProcessorPil.from_pretrained(base)
    generator = np.random.default_rng(0)
    for size in ((50, 97), (64, 64), (200, 130)):
        image, mask = generator.integers(0, 256, (*size, 3), np.uint8), generator.integers(0, 5, size, np.uint8)
        expected = theirs(image, mask, return_tensors="pt")
        step = 1.01 / 255 / 0.224  # Pillow rounds to whole values on its way
        torch.testing.assert_close(Images.of(base).pixels(image), expected["pixel_values"][0], atol=step, rtol=0)
        assert torch.equal(Images.of(base).classes(mask), expected["labels"][0])


def test_classes_are_named_by_the_file_or_by_their_numbers(tmp_path: Path, base: Path) -> None:
    rows = read_rows(shapes(tmp_path, 3))
    assert find_masks(rows, "rows").names == CLASSES
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "ground", "2": "disc", "1": "square", "7": "sky"}))
    assert find_masks(rows, "rows").names == ("ground", "square", "disc", "sky")
    (tmp_path / "id2label.json").unlink()
    for row in rows:  # sparse numbers are as good
        mask = np.load(tmp_path / row.value["mask"]).astype(np.uint16)
        np.save(tmp_path / row.value["mask"], np.where(mask == NO_CLASS, NO_CLASS, mask * 300))
    assert find_masks(rows, "rows").names == ("0", "300", "600")
    _, examples, _ = prepared("SEGMENTATION", base, rows)
    assert all(example.target.all() and len(example.target) == 3 for example in examples)


def test_a_file_that_changes_is_noticed(base: Path, tmp_path: Path) -> None:
    data = shapes(tmp_path / "data", 20)
    config = load_run_config(
        None,
        {
            "model": str(base), "data.train": str(data), "output": str(tmp_path / "run"),
            "adapter.task_type": "SEGMENTATION", "train.max_steps": 4, "train.save_every": 2, "train.batch_size": 2,
        },
    )  # fmt: skip
    images, kept = sorted((tmp_path / "data" / "images").glob("*-mask.npy")), tmp_path / "kept"
    shutil.copytree(tmp_path / "data" / "images", kept)

    def changing(event: dict[str, Any]) -> None:
        if event["event"] == "checkpoint":
            for path in images:
                np.save(path, np.load(path)[::-1])

    with pytest.raises(DataError, match=r"-mask.npy changed while it was used"):
        api.run(config, changing)
    with pytest.raises(CheckpointError, match="files was "):
        api.resume(tmp_path / "run")
    shutil.rmtree(tmp_path / "data" / "images")
    shutil.copytree(kept, tmp_path / "data" / "images")
    assert api.resume(tmp_path / "run").status == "done"


def changed(key: str, change: Callable[[Path, Any], Any], at: int = 2) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / read_rows(folder / "rows.jsonl")[at].value[key]
        change(path, np.load(path))

    return spoil


def put(path: Path, array: Any) -> None:
    np.save(path, array)


def each_mask(value: int) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        for path in folder.glob("images/0-*-mask.npy"):
            np.save(path, np.full_like(np.load(path), value))

    return spoil


def without_names(then: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        (folder / "id2label.json").unlink()
        then(folder)

    return spoil


def named(content: str) -> Callable[[Path], None]:
    return lambda folder: [(folder / "id2label.json").write_text(content), None][1]


def with_class_7(path: Path, mask: Any) -> None:
    mask[5, 3] = 7
    np.save(path, mask)


def claiming_a_terapixel(path: Path, mask: Any) -> None:
    with path.open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (10**6, 10**6)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(mask.tobytes())


def to_png(folder: Path) -> None:
    rows = [row.value for row in read_rows(folder / "rows.jsonl")]
    rows[2]["image"] = "images/x.png"
    (folder / "images" / "x.png").write_bytes(b"\x89PNG")
    write(folder / "rows.jsonl", rows)


ROW = "rows.jsonl:3: "
BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "sizes": (changed("mask", lambda path, mask: put(path, mask[1:])), f"{ROW}the image is "),
    "unknown class": (
        changed("mask", with_class_7), "row 5, column 3: 7 is not in id2label.json beside the rows",
    ),
    "missing image": (changed("image", lambda path, _: path.unlink()), f"{ROW}the file "),
    "missing mask": (changed("mask", lambda path, _: path.unlink()), "cannot be read: No such file or directory"),
    "missing mask, unnamed": (without_names(changed("mask", lambda path, _: path.unlink())), f"{ROW}the file "),
    "floats": (
        changed("image", lambda path, image: put(path, image / 255)), "expected an image: uint8 (height, width, 3)",
    ),
    "colours": (
        changed("mask", lambda path, mask: put(path, np.stack([mask] * 3, 2))), "expected a mask: whole numbers",
    ),
    "below 0": (changed("mask", lambda path, mask: put(path, mask.astype(int) - 1)), "holds -1 to 254; expected 0"),
    "pickle": (
        changed("mask", lambda path, mask: np.save(path, np.array([{}]), allow_pickle=True)), "is no array that numpy",
    ),
    "a header that lies": (changed("mask", claiming_a_terapixel), "is no array that numpy saved: cannot reshape"),
    "cut short": (
        changed("image", lambda path, _: path.write_bytes(path.read_bytes()[:500])), f"{ROW}",
    ),
    "nothing labelled": (
        changed("mask", lambda path, mask: put(path, np.full_like(mask, NO_CLASS))),
        "every pixel of the mask",
    ),
    "one class, unnamed": (without_names(each_mask(1)), "rows.jsonl:1: every row has the same label, '1'"),
    "a class without a pixel": (each_mask(1), "hold no example of the class 'ground' (2 of 3 classes"),
    "names that are no object": (named("[1]"), 'is not understood'),
    "one name twice": (named('{"0": "a", "1": "a"}'), "expected two or more different names"),
    "too many": (named(json.dumps({k + 300: f"c{k}" for k in range(256)})), "rows.jsonl:1: there are 256 classes"),
    "no Pillow": (to_png, "Pillow, which is not installed: pip install 'loratune[images]'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused_before_training(
    name: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, message = BAD[name]
    data = shapes(tmp_path, 8)
    held = shapes(tmp_path, 4, seed=1, name="held.jsonl")
    spoil(tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)  # as if it was not there
    arguments = f"train --task SEGMENTATION --model {base} --data {data} --validation {held} --output {tmp_path}/run"
    assert command(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert message in shown and "Traceback" not in shown and shown.count("error: ") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_class_in_validation_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, held = shapes(tmp_path / "a", 8), shapes(tmp_path / "b", 4, seed=1)
    for folder in (tmp_path / "a", tmp_path / "b"):
        (folder / "id2label.json").unlink()
    changed("mask", with_class_7, at=1)(tmp_path / "b")
    arguments = f"train --task SEGMENTATION --model {base} --data {data} --validation {held} --output {tmp_path}/run"
    assert command(arguments.split()) == 2
    shown = capsys.readouterr().err
    assert f"{held}:2: " in shown and "the label '7' is not one of the 3 that are trained: 0, 1, 2" in shown


def test_pillow_reads_what_numpy_does(base: Path, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    rows = read_rows(shapes(tmp_path, 3))
    expected = prepared("SEGMENTATION", base, rows)[1]
    for row in rows:
        for key, kind in (("image", "png"), ("mask", "png")):
            array = np.load(tmp_path / row.value[key])
            saved = image_module.fromarray(array)
            if key == "mask":
                saved = saved.convert("P")
                saved.putpalette([k % 251 for k in range(768)])  # colours to look at; the numbers stay
            saved.save(tmp_path / f"{row.line}-{key}.{kind}")
    stored = [Row(row.source, row.line, row.kind, {key: f"{row.line}-{key}.png" for key in row.value}) for row in rows]
    _, found, runner = prepared("SEGMENTATION", base, stored)
    for one, other in zip(found, expected, strict=True):
        assert one.target.tolist() == other.target.tolist()
    ours, theirs = runner.batch(found, range(3)), runner.batch(expected, range(3))
    assert torch.equal(ours.inputs["pixel_values"], theirs.inputs["pixel_values"])
    image_module.fromarray(np.zeros((48, 48, 3), np.uint8)).save(tmp_path / "1-mask.png")
    [error, *_] = runner.task.encode_many(stored)
    assert isinstance(error, DataError) and "holds colours (RGB)" in str(error)
