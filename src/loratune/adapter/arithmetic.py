"""Arithmetic on adapters: weighted combinations, differences, multiples and compression, as functions over values.

Every result has scale 1 at every site: the true scale of each input (alpha / r, or alpha / sqrt(r) with rsLoRA; its own
where a pattern says so) is folded into its tensors first. Computed in float64 on the CPU, rounded once.
Shapes: I inputs, O outputs, R rank, N adapters.  A convolution's A (R, I, *k) counts as (R, I k...).
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from loratune.adapter.adapter import Adapter
from loratune.adapter.analysis import Decomposition, decompose, decomposition, matrices
from loratune.adapter.config import LoraConfig
from loratune.adapter.factor import LowRank
from loratune.adapter.fingerprint import Fingerprint
from loratune.errors import AdapterError, ConfigError

# What the pruning methods keep unless told: the top 20% that Yadav et al. 2023 recommend where nothing can be tuned.
DENSITY = 0.2

_Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Options:
    """rank: the largest rank of a truncated result, None for the inputs' largest. density: the share that is kept."""

    rank: int | None
    density: float
    majority_sign_method: str


# --- Task tensors: sparsify each, then merge them ---------------------------------------------------------------------


def keep_all(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns the tensor as it is."""
    return tensor


def keep_largest(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns the tensor with all but its floor(density n) largest magnitudes set to 0 (Yadav et al. 2023, "trim")."""
    flat = tensor.flatten()
    kept = flat.abs().topk(int(density * flat.numel())).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def keep_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Returns the tensor with each entry kept with probability `density`, divided by it: the mean stays.

    Yu et al. 2023, arXiv 2311.03099, equation 1 ("drop and rescale").
    """
    return tensor * torch.bernoulli(torch.full_like(tensor, density), generator=generator) / density


def weighted_sum(tensors: Tensor, weights: Tensor, majority_sign_method: str) -> Tensor:
    """Returns sum_n w_n t_n of tensors (N, ...) and weights (N,)."""
    return torch.tensordot(weights, tensors, dims=1)


_ELECTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "total": lambda tensors: tensors.sum(0),
    "frequency": lambda tensors: tensors.sign().sum(0),
}


def disjoint_mean(tensors: Tensor, weights: Tensor, majority_sign_method: str) -> Tensor:
    """Returns, entry by entry, the mean of w_n t_n over those n whose t_n has the elected sign; 0 if there is none.

    The elected sign is that of the sum of the t_n ("total") or of their signs ("frequency"); a sum of 0 elects +.
    Yadav et al. 2023, arXiv 2306.01708, algorithm 1; weights come after the election, as in PEFT.
    """
    elected = torch.where(_ELECTIONS[majority_sign_method](tensors) >= 0, 1.0, -1.0)
    agree = (tensors.sign() == elected).to(tensors.dtype)
    return torch.tensordot(weights, tensors * agree, dims=1) / agree.sum(0).clamp(min=1)


@dataclass(frozen=True)
class Blend:
    """How tensors of N adapters become one: each made sparse, then all merged."""

    sparsify: Callable[[Tensor, float, torch.Generator], Tensor]
    merge: Callable[[Tensor, Tensor, str], Tensor]

    def __call__(
        self, tensors: Sequence[Tensor], weights: Sequence[float], options: _Options, generator: torch.Generator
    ) -> Tensor:
        sparse = torch.stack([self.sparsify(tensor, options.density, generator) for tensor in tensors])
        return self.merge(sparse, torch.tensor(weights, dtype=sparse.dtype), options.majority_sign_method)


BLENDS: dict[str, Blend] = {
    "linear": Blend(keep_all, weighted_sum),
    "magnitude_prune": Blend(keep_largest, weighted_sum),
    "ties": Blend(keep_largest, disjoint_mean),
    "dare_linear": Blend(keep_random, weighted_sum),
    "dare_ties": Blend(keep_random, disjoint_mean),
}


# --- Methods: factors of one site and their weights -> A (R, I), B (O, R) ---------------------------------------------


def _by_factors(
    blend: Blend, factors: Sequence[LowRank], weights: Sequence[float], options: _Options, generator: torch.Generator
) -> _Pair:
    """A's and B's apart: sqrt|s| A and sqrt|s| B are the task tensors, with weights sign(w s) sqrt|w| and sqrt|w|."""
    pairs = [(root * A, root * B) for f in factors for root in [abs(f.scale) ** 0.5] for A, B in [matrices(f)]]
    roots = [abs(weight) ** 0.5 for weight in weights]
    signed = [math.copysign(root, w * factor.scale) for root, w, factor in zip(roots, weights, factors)]
    A = blend([A for A, _ in pairs], signed, options, generator)
    return A, blend([B for _, B in pairs], roots, options, generator)


def _by_deltas(
    blend: Blend, factors: Sequence[LowRank], weights: Sequence[float], options: _Options, generator: torch.Generator
) -> _Pair:
    """The s B A in full are the task tensors; the result is the best approximation of their blend (Eckart-Young)."""
    deltas = [factor.scale * B @ A for factor in factors for A, B in [matrices(factor)]]
    parts = Decomposition(*torch.linalg.svd(blend(deltas, weights, options, generator), full_matrices=False))
    return _truncated(parts, options.rank or _largest_rank(factors))


def _cat(factors: Sequence[LowRank], weights: Sequence[float], options: _Options, generator: torch.Generator) -> _Pair:
    """sum_n w_n s_n B_n A_n exactly: the A's, times w s, below and the B's beside each other; ranks add up."""
    pairs = [matrices(factor) for factor in factors]
    scaled = [weight * factor.scale * A for weight, factor, (A, _) in zip(weights, factors, pairs)]
    return torch.cat(scaled, 0), torch.cat([B for _, B in pairs], 1)


def _svd(factors: Sequence[LowRank], weights: Sequence[float], options: _Options, generator: torch.Generator) -> _Pair:
    """The best approximation of the weighted sum of deltas (Eckart-Young), from matrices of the summed ranks only."""
    return _truncated(decompose(*_cat(factors, weights, options, generator)), options.rank or _largest_rank(factors))


def _truncated(parts: Decomposition, rank: int) -> _Pair:
    """Returns A = V^T (orthonormal rows) and B = U S of the first `rank` singular values, as PEFT divides them."""
    return parts.Vt[:rank], parts.U[:, :rank] * parts.S[:rank]


def _largest_rank(factors: Sequence[LowRank]) -> int:
    return max(factor.rank for factor in factors)


@dataclass(frozen=True)
class Method:
    """A way to combine.

    aligned: A's are added to A's, so sites and ranks must agree; truncates: takes `rank`; prunes: takes `density`.
    """

    apply: Callable[[Sequence[LowRank], Sequence[float], _Options, torch.Generator], _Pair]
    aligned: bool = False
    truncates: bool = False
    prunes: bool = False


_PRUNING = {name: blend for name, blend in BLENDS.items() if name != "linear"}
METHODS: dict[str, Method] = {
    "cat": Method(_cat),
    "svd": Method(_svd, truncates=True),
    "linear": Method(partial(_by_factors, BLENDS["linear"]), aligned=True),
    **{name: Method(partial(_by_factors, blend), aligned=True, prunes=True) for name, blend in _PRUNING.items()},
    **{
        f"{name}_svd": Method(partial(_by_deltas, blend), truncates=True, prunes=True)
        for name, blend in _PRUNING.items()
    },
}


def combine(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    how: str = "linear",
    *,
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    seed: int = 0,
) -> Adapter:
    """Returns one adapter made of several; the inputs are not touched. `how` is a name of METHODS:

    - cat: sum w s B A exactly; the ranks add up.
    - svd: the best approximation of that sum of rank `rank` at most (default: the largest at the site).
    - linear: A = sum sign(w) sqrt|w s| A_n, B = sum sqrt|w s| B_n, as in PEFT: not the sum of the updates, since it has
      cross terms B_m A_n.
    - magnitude_prune, ties, dare_linear, dare_ties: A's and B's apart as in linear, pruned to `density` (default 0.2).
    - the same with _svd: the full updates are pruned and merged, then approximated; needs O x I matrices.

    Weights may be negative. A site that an adapter lacks counts as 0 there; methods that work on A and B apart need the
    same sites and ranks. Where all inputs use alpha / r with one scale, the values are PEFT's `add_weighted_adapter`'s.
    Settings that do not matter any more (dropout, task type, base model's name) are the first adapter's.
    Raises ConfigError for settings that do not go together, AdapterError for adapters that cannot be combined.
    """
    method, options = _checked(how, len(adapters), weights, rank, density, majority_sign_method)
    base = _common_base(adapters)
    for index, adapter in enumerate(adapters):
        _refuse_more_than_factors(adapter, index)
    if method.aligned:
        _check_aligned(adapters, how)
    combined: dict[str, LowRank] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.factors):
        present = [(a.factors[path], w) for a, w in zip(adapters, weights) if path in a.factors]
        factors = _same_shape(path, [factor for factor, _ in present])
        pair = method.apply(factors, [weight for _, weight in present], options, _generator(seed, path))
        combined[path] = _factor(pair, factors, adapters[0].config.lora_dropout)
    return Adapter(_config(adapters[0].config, combined), combined, base=base)


def subtract(one: Adapter, other: Adapter) -> Adapter:
    """Returns the adapter whose update is s B A of `one` minus that of `other`, exactly; ranks add up (see `compress`).

    Raises AdapterError as `combine`.
    """
    return combine([one, other], [1.0, -1.0], "cat")


def rescale(adapter: Adapter, by: float) -> Adapter:
    """Returns the adapter whose update is `by` times s B A; raises as `combine`."""
    return combine([adapter], [by], "cat")


def compress(
    adapter: Adapter, rank: int | None = None, *, energy: float | None = None
) -> tuple[Adapter, dict[str, float]]:
    """Returns the best approximation of lower rank at every site, and the share of the energy kept there, by path.

    energy kept = sum_{i <= r} S_i^2 / sum_i S_i^2 over the singular values of s B A; 1 if the update is 0. Give `rank`,
    the largest rank at any site, or `energy`, a share: each site gets the smallest rank that keeps that much.
    Raises ConfigError unless exactly one of them is given, AdapterError as `combine`.
    """
    if (rank is None) == (energy is None):
        raise ConfigError(f"compress takes either rank or energy; found rank={rank}, energy={energy}.")
    if rank is not None:
        _check_rank(rank)
    if energy is not None and not 0 < energy <= 1:
        raise ConfigError(f"energy is {energy}; expected a share above 0, up to 1, such as 0.99.")
    wanted = 1.0 if energy is None else energy
    _refuse_more_than_factors(adapter, 0)
    compressed: dict[str, LowRank] = {}
    kept: dict[str, float] = {}
    for path, factor in adapter.factors.items():
        parts = decomposition(factor)
        shares = _energy_shares(parts.S)
        chosen = min(rank or int((shares < wanted).sum()) + 1, len(shares))
        compressed[path] = _factor(_truncated(parts, chosen), [factor], adapter.config.lora_dropout)
        kept[path] = float(shares[chosen - 1])
    return Adapter(_config(adapter.config, compressed), compressed, base=adapter.base), kept


def _energy_shares(S: Tensor) -> Tensor:
    """Returns the share of sum S^2 that the first i + 1 singular values hold, at [i]."""
    sums = S.square().cumsum(0)
    return sums / sums[-1] if float(sums[-1]) > 0 else torch.ones_like(sums)


# --- Checks and results -----------------------------------------------------------------------------------------------


def _checked(
    how: str,
    num_adapters: int,
    weights: Sequence[float],
    rank: int | None,
    density: float | None,
    majority_sign_method: str,
) -> tuple[Method, _Options]:
    if how not in METHODS:
        raise ConfigError(f"how is {how!r}; expected one of {', '.join(METHODS)}.")
    method = METHODS[how]
    if not num_adapters or num_adapters != len(weights):
        raise ConfigError(f"{num_adapters} adapters and {len(weights)} weights; expected at least one, and as many.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"weights are {list(weights)}; expected finite numbers.")
    if majority_sign_method not in _ELECTIONS:
        raise ConfigError(f"majority_sign_method is {majority_sign_method!r}; expected one of {', '.join(_ELECTIONS)}.")
    if rank is not None:
        _check_rank(rank)
        _check_applies("rank", rank, how, [name for name, other in METHODS.items() if other.truncates])
    if density is not None:
        if not 0 < density <= 1:
            raise ConfigError(f"density is {density}; expected the share of entries to keep, above 0, up to 1.")
        _check_applies("density", density, how, [name for name, other in METHODS.items() if other.prunes])
    return method, _Options(rank, DENSITY if density is None else density, majority_sign_method)


def _check_rank(rank: int) -> None:
    if rank <= 0:
        raise ConfigError(f"rank is {rank}; expected a whole number above 0.")


def _check_applies(name: str, value: float, how: str, methods: Sequence[str]) -> None:
    if how not in methods:
        raise ConfigError(f"{name}={value} means nothing to {how!r}; it is for {', '.join(methods)}. Leave it out.")


def _common_base(adapters: Sequence[Adapter]) -> Fingerprint | None:
    """Returns the fingerprint of the base that all adapters share; an adapter without one is taken on trust."""
    known = [(index, adapter.base) for index, adapter in enumerate(adapters) if adapter.base is not None]
    for index, base in known[1:]:
        if base.compare(known[0][1]) == "different":
            raise AdapterError(
                f"adapters[{known[0][0]}] and adapters[{index}] were trained on different base models; their updates "
                "cannot be combined. Retrain one of them on the other's base."
            )
    return known[0][1] if known else None


def _refuse_more_than_factors(adapter: Adapter, index: int) -> None:
    """Combining is defined on s B A alone; anything else an adapter changes would be lost in silence."""
    dora = [path for path, factor in adapter.factors.items() if getattr(factor, "magnitude", None) is not None]
    broken = [path for path, factor in adapter.factors.items() if not _finite(factor)]
    reasons = {
        "a value that is not finite (NaN or infinity)": broken,
        "a DoRA magnitude, which makes the update nonlinear: a sum of updates is not defined": dora,
        "a trained bias; train with bias='none' to combine": list(adapter.biases),
        "a module saved in full; train without modules_to_save to combine": list(adapter.saved),
        "a tensor whose place only its model knows; load it onto that model first": list(adapter.loose),
    }
    for reason, names in reasons.items():
        if names:
            raise AdapterError(f"adapters[{index}]: {names[0]} has {reason}. Nothing was combined.")


def _finite(factor: LowRank) -> bool:
    return all(bool(tensor.detach().isfinite().all()) for tensor in (factor.A, factor.B))


def _check_aligned(adapters: Sequence[Adapter], how: str) -> None:
    """A's are added to A's entry by entry, so every adapter must have every site, at the same rank."""
    first = adapters[0].factors
    hint = f"{how!r} adds A's and B's apart; use 'cat' or 'svd' instead."
    for index, adapter in enumerate(adapters[1:], 1):
        for path in [*first, *adapter.factors]:
            if path not in first or path not in adapter.factors:
                lacking = index if path in first else 0
                raise AdapterError(f"adapters[{lacking}] has no factor at {path}, another adapter has. {hint}")
            ranks = first[path].rank, adapter.factors[path].rank
            if ranks[0] != ranks[1]:
                raise AdapterError(f"{path}: rank {ranks[0]} in adapters[0], {ranks[1]} in adapters[{index}]. {hint}")


def _same_shape(path: str, factors: list[LowRank]) -> list[LowRank]:
    shapes = [(*factor.B.shape[:1], *factor.A.shape[1:]) for factor in factors]
    for shape in shapes:
        if shape != shapes[0]:
            raise AdapterError(
                f"{path}: (outputs, inputs) is {shapes[0]} in one adapter, {shape} in another; they are of different "
                "models. Nothing was combined."
            )
    return factors


def _generator(seed: int, path: str) -> torch.Generator:
    """One generator a site, keyed by the seed and the path: other sites and their order do not matter."""
    key = hashlib.sha256(f"{seed} {path}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(key, "big") & (2**63 - 1))


def _factor(pair: _Pair, sources: Sequence[LowRank], dropout: float) -> LowRank:
    """Makes a factor of scale 1 in the sources' own type, on the first one's device, in the shapes of its kind."""
    first, rank = sources[0], len(pair[0])
    dtype = max((source.A.dtype for source in sources), key=lambda dtype: dtype.itemsize)
    A = pair[0].reshape(rank, *first.A.shape[1:]).to(first.A.device, dtype)
    B = pair[1].reshape(first.B.shape[0], rank, *first.B.shape[2:]).to(first.B.device, dtype)
    return LowRank(A.contiguous(), B.contiguous(), 1.0, dropout)


def _config(first: LoraConfig, factors: Mapping[str, LowRank]) -> LoraConfig:
    """Returns the settings under which every path has its factor's rank, and scale alpha / r = 1.

    r is the most frequent rank; other sites are named in the patterns by their whole paths ("^" keeps out a longer path
    that ends in the same words).
    """
    ranks = {path: factor.rank for path, factor in factors.items()}
    r = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != r}
    return first.with_(
        r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=others, target_modules=tuple(ranks), exclude_modules=None,
        layers_to_transform=None, layers_pattern=None, use_rslora=False, init_lora_weights=True,
    )  # fmt: skip
