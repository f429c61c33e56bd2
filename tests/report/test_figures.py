"""The figure of similarities: well-formed, of its own, and every cell and point where the numbers say."""

import re
from typing import Any
from xml.etree import ElementTree

import pytest

from loratune.report.figures import similarity_figure

_SVG = "{http://www.w3.org/2000/svg}"


def report(rank: int = 3, layers: int = 4, name: str = "self_attn.q_proj") -> dict[str, Any]:
    grid = [[(i + 1) * (j + 1) / rank**2 for j in range(rank)] for i in range(rank)]
    values = [(index + 1) / layers for index in range(layers)]
    group = {"role": "query", "name": name, "layers": [str(index) for index in range(layers)]}
    curves = {key: {"by_layer": values} for key in ("similarity_top", "similarity_span")}
    group |= {"similarity": grid, "chance_span": 0.1, "chance_top": 0.01, **curves}
    return {"one": "runs/a", "other": "runs/b", "groups": [group, group]}


def test_cells_stand_in_rows_of_i_and_columns_of_j() -> None:
    root = ElementTree.fromstring(similarity_figure(report(rank=4)))
    for rect in root.iter(f"{_SVG}rect"):
        tip = rect.find(f"{_SVG}title")
        if tip is not None:
            i, j = map(int, re.findall(r"\d+", (tip.text or "").partition("=")[0]))
            assert (float(rect.attrib["y"]), float(rect.attrib["x"])) == ((i - 1) * 42, 68 + (j - 1) * 42)


def cells(svg: str) -> dict[str, float]:
    """The heat maps' cells: what they are called -> their opacity."""
    root = ElementTree.fromstring(svg)
    found = [(rect.find(f"{_SVG}title"), rect) for rect in root.iter(f"{_SVG}rect")]
    return {tip.text or "": float(rect.attrib["fill-opacity"]) for tip, rect in found if tip is not None}


def test_every_cell_shows_its_number() -> None:
    found = cells(similarity_figure(report()))
    assert len(found) == 9
    for text, opacity in found.items():
        i, j, value = re.fullmatch(r"φ\((\d), (\d)\) = ([\d.]+)", text).groups()  # type: ignore[union-attr]
        assert float(value) == pytest.approx(int(i) * int(j) / 9, abs=1e-3)
        assert opacity == pytest.approx(float(value), abs=0.006)


def test_points_stand_at_their_values() -> None:
    root = ElementTree.fromstring(similarity_figure(report(layers=4)))
    first = next(iter(root.iter(f"{_SVG}polyline")))
    points = [tuple(map(float, point.split(","))) for point in first.attrib["points"].split()]
    xs, ys = zip(*points)
    assert list(xs) == sorted(xs) and [1 - y / 168 for y in ys] == pytest.approx([0.25, 0.5, 0.75, 1.0], abs=1e-3)
    assert len(list(root.iter(f"{_SVG}circle"))) == 2 * 2 * 4  # groups x curves x layers


def test_large_ranks_are_thinned_to_the_last(rank: int = 100) -> None:
    found = cells(similarity_figure(report(rank=rank, layers=1)))
    assert len(found) == 32 * 32 and f"φ({rank}, {rank}) = 1.000" in found


def test_it_needs_nothing_else_and_follows_the_screen() -> None:
    svg = similarity_figure(report())
    assert "prefers-color-scheme: dark" in svg
    without_namespace = svg.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?:|url\(|<script|@import|href", without_namespace)


def test_names_are_text_never_markup() -> None:
    svg = similarity_figure(report(name='<b>&"'))
    texts = [node.text for node in ElementTree.fromstring(svg).iter(f"{_SVG}text")]
    assert 'query · <b>&"' in texts


def test_many_experts_are_a_line_without_dots() -> None:
    root = ElementTree.fromstring(similarity_figure(report(layers=65)))
    assert not list(root.iter(f"{_SVG}circle")) and len(list(root.iter(f"{_SVG}polyline"))) == 4
