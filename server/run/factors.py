"""Aggregation that knows LoRA: what the mean of B A is, how far the server's choice is from it, and exact choices.

Products are kept as factors, (left, right) with shapes (out, k) and (k, in): with the QR decompositions of both,
whatever is asked of the product is a matter of a k x k matrix. They are multiplied out only where k would exceed the
layer's smaller side. All is done in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tsugiki.common.adapters.base import MERGED, TRAINED
from tsugiki.common.rng import generator
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.strategies.factors import Pair, pairs
from tsugiki.common.wire.spec import AdapterSpec, Vector, l2_norm, pack, unpack

Matrix = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[Any]]
Product = tuple[Matrix, Matrix]

_ROW_NORM = 1 / np.sqrt(3)
"""The length of a row of A as LoRA draws it: uniform between -1/sqrt(in) and 1/sqrt(in)."""


@dataclass(frozen=True)
class Layer:
    """An adapted layer: the pair that sites train, and the merged one of `flora`, if it is there."""

    pair: Pair
    merged: Pair | None


def layers(spec: AdapterSpec) -> list[Layer]:
    """Return the adapted layers of a spec, in its order; none without LoRA."""
    merged = {pair.b: pair for pair in pairs(spec, MERGED)}
    return [Layer(pair, merged.get(pair.b.replace(f".{TRAINED}.", f".{MERGED}."))) for pair in pairs(spec)]


def change(layer: Layer, tensors: Tensors) -> Product:
    """Return B A of a layer, with what is merged; A counts as the identity where it is frozen."""
    return _joined([_product(pair, tensors) for pair in (layer.pair, layer.merged) if pair])


def _product(pair: Pair, tensors: Tensors) -> Product:
    left = tensors[pair.b].astype(np.float64)
    return left, tensors[pair.a].astype(np.float64) if pair.a else np.eye(left.shape[1])


def _joined(terms: Sequence[Product], weights: Sequence[float] = ()) -> Product:
    """Return the weighted sum of products: left factors side by side, right factors on top of each other.

    Where that is longer than the layer is wide, the sum is multiplied out, so that no product outgrows its layer.
    """
    weights = weights or [1.0] * len(terms)
    (left, right), inner = terms[0], sum(left.shape[1] for left, _ in terms)
    shape = len(left), right.shape[1]
    if inner <= min(shape):
        scaled = [weight * left for (left, _), weight in zip(terms, weights, strict=True)]
        return np.concatenate(scaled, axis=1), np.concatenate([right for _, right in terms])
    total = np.zeros(shape)
    for (left, right), weight in zip(terms, weights, strict=True):
        total += weight * (left @ right)
    return (np.eye(shape[0]), total) if shape[0] <= shape[1] else (total, np.eye(shape[1]))


def norm(product: Product) -> float:
    """Return the Frobenius norm of a product."""
    left: Matrix = np.linalg.qr(product[0], mode="r")  # type: ignore[assignment]  # an array, in this mode
    right: Matrix = np.linalg.qr(product[1].T, mode="r")  # type: ignore[assignment]
    return l2_norm(left @ right.T)


def project(product: Product, rank: int) -> tuple[Matrix, Matrix]:
    """Return the best factors B, A of a rank, shapes (out, rank) and (rank, in), of a product.

    By Eckart and Young, the first `rank` components of its singular value decomposition. They are in order: the first
    say most. Rows of A are orthogonal and as long as when LoRA draws them, also where nothing has been learned yet, so
    that B, which has the rest, can learn there.

    Args:
        product: of inner size `rank` at least.
        rank: at most the smaller side of the layer.
    """
    (q_left, r_left), (q_right, r_right) = np.linalg.qr(product[0]), np.linalg.qr(product[1].T)
    u, values, v = np.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, :rank] * values[:rank] / _ROW_NORM, _ROW_NORM * v[:rank] @ q_right.T


def mean_change(layer: Layer, before: Tensors, accepted: Sequence[Tensors], weights: Sequence[float]) -> Product:
    """Return the mean of what sites have made of a layer: the exact sum of their B A, and what was merged before.

    Args:
        layer: the layer.
        before: what sites started from, by name.
        accepted: the sites' updates, by name.
        weights: of the sites; their sum is 1.
    """
    names = [name for name in (layer.pair.a, layer.pair.b) if name]
    terms = [_product(layer.pair, {n: before[n].astype(np.float64) + one[n] for n in names}) for one in accepted]
    mean = _joined(terms, weights)
    return mean if layer.merged is None else _joined([mean, _product(layer.merged, before)])


def aggregation_error(
    spec: AdapterSpec, before: Vector, after: Vector, accepted: Sequence[WeightedUpdate]
) -> float | None:
    """Return how far the server's choice is from the mean of what sites have learned.

    ||mean(B_i A_i) - B A|| / ||mean(B_i A_i)||, in Frobenius norms over all adapted layers; means are weighted by rows.
    Where A is frozen, it is that of B.

    Args:
        spec: of the adapter.
        before: what sites started from, shape (spec.size,).
        after: what the server has made of it.
        accepted: the sites' updates.

    Returns:
        None without LoRA, and where a gateway has averaged the factors of its clients before they came here.
    """
    if not pairs(spec) or not accepted or any(reply.clients > 1 for reply in accepted):
        return None
    start, end, updates, weights = _opened(spec, before, after, accepted)
    apart, whole = [], []
    with threadpool_limits(1, "blas"):  # its threads cost more than they save here
        for layer in layers(spec):
            mean = mean_change(layer, start, updates, weights)
            apart.append(norm(_joined([mean, change(layer, end)], [1.0, -1.0])))
            whole.append(norm(mean))
    total = l2_norm(np.array(whole))
    return l2_norm(np.array(apart)) / total if total else 0.0


def _opened(
    spec: AdapterSpec, before: Vector, after: Vector, accepted: Sequence[WeightedUpdate]
) -> tuple[Tensors, Tensors, list[Tensors], list[float]]:
    """Return everything by name, and the sites' weights."""
    total = sum(reply.weight for reply in accepted)
    updates: list[Tensors] = [unpack(reply.update, spec) for reply in accepted]
    return unpack(before, spec), unpack(after, spec), updates, [reply.weight / total for reply in accepted]


Combine = Callable[[Layer, Tensors, Product, np.random.Generator], dict[str, Matrix]]
"""From a layer, the adapter before, the mean of what sites made of it and a source of numbers to factors by name."""


def svd(layer: Layer, before: Tensors, mean: Product, draw: np.random.Generator) -> dict[str, Matrix]:
    """Return the best factors of the mean of B A. Source: Bai et al. 2024, arXiv:2402.11505, section 3 (FlexLoRA)."""
    b, a = project(mean, len(before[layer.pair.a]))
    return {layer.pair.b: b, layer.pair.a: a}


def flora(layer: Layer, before: Tensors, mean: Product, draw: np.random.Generator) -> dict[str, Matrix]:
    """Return a fresh pair, and the merged one with what all sites have learned: theirs stacked, rank by rank.

    Source: Wang et al. 2024, arXiv:2409.05976, section 3 (FLoRA). The paper adds the stack to the base's weights; here
    the base stays as it is, and a second pair that sites do not train holds the sum, exactly while its rank suffices.
    """
    pair, merged = layer.pair, layer.merged
    assert merged is not None  # noqa: S101  # `flora` sets adapter.merged_rank
    b, a = project(mean, len(before[merged.a]))
    rank, width = before[pair.a].shape
    fresh = draw.uniform(-1, 1, (rank, width)) / np.sqrt(width)
    return {merged.b: b, merged.a: a, pair.b: np.zeros((len(b), rank)), pair.a: fresh}


COMBINE: Mapping[str, Combine] = {"svd": svd, "flora": flora}
"""By strategy: how pairs are combined that a mean of the factors would not do justice to."""


def combine(
    strategy: str,
    spec: AdapterSpec,
    before: Vector,
    update: Vector,
    accepted: Sequence[WeightedUpdate],
    seed: int,
    round_: int,
) -> Vector:
    """Return the update with the pairs as the strategy combines them; heads and other tensors stay as they are in it.

    Args:
        strategy: its name; one without an entry in `COMBINE` changes nothing.
        spec: of the adapter.
        before: the adapter that sites started from, shape (spec.size,).
        update: the mean of the updates, shape (spec.size,).
        accepted: the updates.
        seed: the run's, for fresh factors.
        round_: counted from 1.
    """
    if strategy not in COMBINE:
        return update
    draw = generator(seed, "fresh-factors", round_)
    old, mean, updates, weights = _opened(spec, before, update, accepted)
    new: dict[str, Matrix] = {}
    with threadpool_limits(1, "blas"):
        for layer in layers(spec):
            new |= COMBINE[strategy](layer, old, mean_change(layer, old, updates, weights), draw)
    moved = {name: (values - old[name]).astype(np.float32) for name, values in new.items()}
    return pack({**mean, **moved}, spec)
