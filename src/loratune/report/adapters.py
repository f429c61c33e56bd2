"""What an adapter is and how two differ, as plain values for tables, figures and programs.

Sites are listed one by one and grouped: one group per module path with its numbers left out, so that a group is one
projection over the layers. Every measure of a group has its least, median and largest value, and one value per layer.
"""

import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter import analysis, peft_format, roles, sites, stored
from loratune.adapter.adapter import Adapter
from loratune.adapter.attach import load_adapter
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.errors import AdapterError
from loratune.model.load import load_model

INFO_MEASURES = ("norm_update", "effective_rank", "amplification")
DIFF_MEASURES = ("similarity_top", "similarity_span", "distance")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


# --- info -------------------------------------------------------------------------------------------------------------


def info(folder: Path, model: str | None = None, notify: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Returns what an adapter on disk is: settings, sites with ranks, norms and spectra, groups of sites, sizes.

    With a base `model`, which is loaded, also the amplification factor ||s B A||_F / ||U^T W V||_F of every site
    (Hu et al. 2021, section 7.3). Raises AdapterError for a damaged adapter, or one that is not for that model.
    """
    adapter = peft_format.read(folder)
    rows = [_site(path, adapter) for path in sorted(adapter.factors, key=_natural)]
    if model is not None:
        factors = _amplifications(folder, model, notify)
        rows = [{**row, "amplification": factors.get(row["path"])} for row in rows]
    config = json.loads((folder / peft_format.CONFIG).read_bytes())
    groups = grouped(rows, INFO_MEASURES if model is not None else INFO_MEASURES[:2])
    return {
        "path": str(folder),
        "config": {name: value for name, value in config.items() if value not in (None, {}, [], False)},
        "base": {"name": config.get("base_model_name_or_path"), "fingerprint": adapter.base is not None},
        "roles": {role: sum(role in roles.roles_of(path) for path in adapter.factors) for role in roles.ROLES},
        "num_parameters": adapter.num_parameters() + sum(tensor.numel() for tensor in adapter.loose.values()),
        "bytes": sum((folder / name).stat().st_size for name in (peft_format.WEIGHTS, peft_format.CONFIG)),
        "notes": _info_notes(adapter, rows),
        "groups": [{**group, "spectrum": _median_spectrum(group, rows)} for group in groups],
        "sites": rows,
    }


def _site(path: str, adapter: Adapter) -> dict[str, Any]:
    factor = adapter.factors[path]
    stacked = stored.is_stacked(adapter.config, path, factor)
    values = torch.zeros(0) if stacked else analysis.singular_values(stored.ungrouped(factor))
    return {
        **_placed(path),
        "r": adapter.config.rank(path) if stacked else factor.rank,
        "inputs": factor.A[0].numel(),
        "outputs": factor.B.shape[0],
        "scale": factor.scale,
        "norm_A": float(factor.A.detach().norm()),
        "norm_B": float(factor.B.detach().norm()),
        "norm_update": None if stacked else float(values.norm()),
        "effective_rank": None if stacked else analysis.effective_rank(values),
        "singular_values": [float(value) for value in values],
    }


def _info_notes(adapter: Adapter, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    notes: list[str] = []
    zero = [row["path"] for row in rows if row["norm_update"] == 0]
    stacked = [row["path"] for row in rows if row["norm_update"] is None]
    if zero:
        notes.append(f"{len(zero)} sites change nothing: s B A is 0 there. First: {zero[0]}.")
    if stacked:
        notes.append(f"{len(stacked)} sites hold stacked experts and are listed without norms. First: {stacked[0]}.")
    if any(factor.magnitude is not None for factor in adapter.factors.values()):
        notes.append("DoRA: the figures are those of s B A alone, without the magnitudes.")
    if adapter.loose:
        count = sum(tensor.numel() for tensor in adapter.loose.values())
        notes.append(f"{count:,} parameters are trained outside factors. First: {next(iter(adapter.loose))}.")
    return notes


def _amplifications(folder: Path, name: str, notify: Callable[[str], None] | None) -> dict[str, float | None]:
    """Loads the base and returns ||dW|| / ||U^T W V|| by the file's path; None where W has nothing there."""
    model, _ = load_model(name, notify=notify)
    attached = load_adapter(model, folder)
    found: dict[str, float | None] = {}
    for site in sites.find(model, attached.config):
        factor = attached.adapter.factors[site.path]
        if site.groups == 1 and factor.B.ndim == 2 and site.tokens is None and site.tied_to is None:
            value = analysis.amplification(factor, site.host.rows(site.weight))
            found[site.key] = value if math.isfinite(value) else None
    return found


def _median_spectrum(group: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Returns the median over a group's sites of S_i / S_1, for i = 1 to the smallest number of values."""
    found = [row["singular_values"] for row in rows if _same_group(row, group)]
    shares = [[value / values[0] for value in values] for values in found if values and values[0] > 0]
    return [statistics.median(each) for each in zip(*shares)]


# --- diff -------------------------------------------------------------------------------------------------------------


def diff(one: Path, other: Path) -> dict[str, Any]:
    """Returns how two adapters differ: settings, sites, and at every shared site the subspaces and the updates.

    similarity[i - 1][j - 1] = phi(A1, A2, i, j) (Hu et al. 2021, section 7.2, equation 4); similarity_top is phi(1, 1),
    similarity_span phi(r1, r2); chance is what two random spans of those sizes have on average, max(i, j) / inputs.
    distance = ||s1 B1 A1 - s2 B2 A2||_F / ||s1 B1 A1||_F, None where the first update is 0 and the other is not.
    Raises AdapterError if they share no site, or have other shapes at one.
    """
    adapters = peft_format.read(one), peft_format.read(other)
    first, second = adapters
    shared = sorted(first.factors.keys() & second.factors.keys(), key=_natural)
    if not shared:
        names = " and ".join(str(next(iter(adapter.factors), None)) for adapter in adapters)
        raise AdapterError(f"{one} and {other} share no site; first sites: {names}. There is nothing to compare.")
    stacked = [path for path in shared if any(stored.is_stacked(a.config, path, a.factors[path]) for a in adapters)]
    rows = [_compared(path, *(a.factors[path] for a in adapters)) for path in shared if path not in stacked]
    return {
        "one": str(one),
        "other": str(other),
        "settings": _settings(first.config, second.config),
        "num_shared": len(shared),
        "only_one": sorted(first.factors.keys() - second.factors.keys(), key=_natural),
        "only_other": sorted(second.factors.keys() - first.factors.keys(), key=_natural),
        "notes": [*_chance_notes(rows), *_diff_notes(first, second, stacked)],
        "groups": [{**group, **_mean_grid(group, rows)} for group in grouped(rows, DIFF_MEASURES)],
        "sites": rows,
    }


def _compared(path: str, one: LowRank, other: LowRank) -> dict[str, Any]:
    shapes = [(factor.B.shape[0], *factor.A.shape[1:]) for factor in (one, other)]
    if shapes[0] != shapes[1]:
        raise AdapterError(f"{path}: (outputs, inputs) is {shapes[0]} in one adapter, {shapes[1]} in the other.")
    grid = analysis.similarity_grid(one, other)
    inputs = one.A[0].numel()
    return {
        **_placed(path),
        "r": [one.rank, other.rank],
        "similarity_top": float(grid[0, 0]),
        "similarity_span": float(grid[-1, -1]),
        "chance_top": 1 / inputs,
        "chance_span": min(1.0, max(one.rank, other.rank) / inputs),
        "distance": relative_distance(stored.ungrouped(one), stored.ungrouped(other)),
        "similarity": [[round(float(value), 4) for value in row] for row in grid],
    }


def relative_distance(one: LowRank, other: LowRank) -> float | None:
    """Returns ||D1 - D2||_F / ||D1||_F of two updates D = s B A from matrices of their ranks; None for 0 against more.

    Shapes: A (R, I), B (O, R); D1 - D2 = [B1, B2] [s1 A1; -s2 A2].
    """
    (A1, B1), (A2, B2) = analysis.matrices(one), analysis.matrices(other)
    stack: tuple[Tensor, Tensor] = torch.cat([A1 * one.scale, -A2 * other.scale]), torch.cat([B1, B2], dim=1)
    apart, size = float(analysis.decompose(*stack).S.norm()), analysis.frobenius_norm(one)
    if size == 0:
        return 0.0 if apart == 0 else None
    return apart / size


def _settings(one: LoraConfig, other: LoraConfig) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for item in fields(LoraConfig):
        values = [_shown_setting(getattr(config, item.name)) for config in (one, other)]
        if values[0] != values[1]:
            found.append({"setting": item.name, "one": values[0], "other": values[1]})
    return found


def _shown_setting(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _shown_setting(item) for name, item in value.items()}
    return sorted(value) if isinstance(value, tuple) else value


def _chance_notes(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rows:
        return []
    top, span = (statistics.median(row[name] for row in rows) for name in ("chance_top", "chance_span"))
    return [
        f"Random spans of these sizes would have φ(1, 1) = {top:.2g} and φ(r, r) = {span:.2g} on average. Adapters "
        "that began from one seed share most of the span of A before any training."
    ]


def _diff_notes(one: Adapter, other: Adapter, stacked: Sequence[str]) -> list[str]:
    notes: list[str] = []
    if one.base is None or other.base is None:
        notes.append(
            "An adapter does not record its base model's weights, so that they are the same is taken on trust."
        )
    elif one.base.compare(other.base) == "different":
        notes.append("The two adapters were trained on different base models: their updates mean different things.")
    if stacked:
        notes.append(f"{len(stacked)} sites hold stacked experts and are not compared. First: {stacked[0]}.")
    if any(factor.magnitude is not None for a in (one, other) for factor in a.factors.values()):
        notes.append("DoRA: compared are A and s B A alone, without the magnitudes.")
    if one.loose or other.loose:
        notes.append("What is trained outside factors (biases, whole modules, token rows) is not compared.")
    return notes


def _mean_grid(group: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the mean phi(i, j) over a group's sites, up to the smallest ranks there, and the chance levels."""
    members = [row for row in rows if _same_group(row, group)]
    grids = [torch.tensor(row["similarity"]) for row in members]
    i, j = (min(grid.shape[side] for grid in grids) for side in (0, 1))
    mean = torch.stack([grid[:i, :j] for grid in grids]).mean(0)
    chances = {name: statistics.fmean(row[name] for row in members) for name in ("chance_top", "chance_span")}
    return {"similarity": [[round(float(value), 4) for value in row] for row in mean], **chances}


# --- Groups -----------------------------------------------------------------------------------------------------------


def _natural(path: str) -> list[tuple[bool, int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _placed(path: str) -> dict[str, Any]:
    """Returns a site's path, role, projection (the path with * for numbers) and layer: "7"; "7.3" for an expert."""
    role = " + ".join(roles.roles_of(path)) or path.rpartition(".")[2]
    return {"path": path, "role": role, "projection": _NUMBER.sub("*", path), "layer": ".".join(_NUMBER.findall(path))}


def _same_group(row: Mapping[str, Any], group: Mapping[str, Any]) -> bool:
    return row["projection"] == group["projection"]


def grouped(rows: Sequence[Mapping[str, Any]], measures: Iterable[str]) -> list[dict[str, Any]]:
    """Returns one entry per projection, in the order of the roles: its layers, ranks, and a summary of each measure."""
    members: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        members.setdefault(row["projection"], []).append(row)
    names = _short_names(members)
    found = [
        {
            "role": own[0]["role"],
            "name": names[projection],
            "projection": projection,
            "layers": [row["layer"] for row in own],
            "r": [r for index, r in enumerate(ranks) if r not in ranks[:index]],
            **{measure: _summary([row[measure] for row in own]) for measure in measures},
        }
        for projection, own in members.items()
        for ranks in [[row["r"] for row in own]]
    ]
    order = {role: index for index, role in enumerate(roles.ROLES)}
    return sorted(found, key=lambda group: order.get(group["role"].partition(" + ")[0], len(order)))


def _short_names(projections: Iterable[str]) -> dict[str, str]:
    """Returns what stands after the first number, or the whole where that is not unique (an encoder's, a decoder's)."""
    short = {projection: projection.partition("*.")[2] or projection for projection in projections}
    seen = Counter(short.values())
    return {projection: name if seen[name] == 1 else projection for projection, name in short.items()}


def _summary(values: Sequence[float | None]) -> dict[str, Any]:
    known = [value for value in values if value is not None]
    if not known:
        return {"min": None, "median": None, "max": None, "by_layer": list(values)}
    return {"min": min(known), "median": statistics.median(known), "max": max(known), "by_layer": list(values)}
