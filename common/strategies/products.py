"""Products B A of LoRA's factors: their mean over sites, its best factors, and an adapter's distance from it.

A product is kept as factors (left, right) of shapes (out, k) and (k, in). Its norm follows from the Gram matrices of
both, and its best factors from their QR decompositions: all of shape (k, k). Factors are multiplied out only where k
would exceed the layer's smaller side. All arithmetic is in float64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

from tsugiki.common.adapters.base import MERGED, TRAINED
from tsugiki.common.strategies.base import WeightedUpdate
from tsugiki.common.strategies.factors import Pair, pairs
from tsugiki.common.wire.spec import AdapterSpec, Vector, unpack

Matrix = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[Any]]
Product = tuple[Matrix, Matrix]

_ROW_NORM = 1 / np.sqrt(3)
"""The length of a row of A as LoRA draws it: uniform between -1/sqrt(in) and 1/sqrt(in)."""


@dataclass(frozen=True)
class Layer:
    """An adapted layer: the pair that sites train, and the merged pair that `flora` fills, if there is one."""

    pair: Pair
    merged: Pair | None


def layers(spec: AdapterSpec) -> list[Layer]:
    """Return the adapted layers of a spec, in its order; none without LoRA."""
    merged = {pair.b: pair for pair in pairs(spec, MERGED)}
    return [Layer(pair, merged.get(pair.b.replace(f".{TRAINED}.", f".{MERGED}."))) for pair in pairs(spec)]


def change(layer: Layer, tensors: Tensors) -> Product:
    """Return B A of a layer, merged pair included. Where A is frozen, the identity takes its place."""
    return _joined([_product(pair, tensors) for pair in (layer.pair, layer.merged) if pair])


def _product(pair: Pair, tensors: Tensors) -> Product:
    left = tensors[pair.b].astype(np.float64)
    if not pair.a:  # A is frozen and not exchanged
        return left, np.eye(left.shape[1])
    return left, tensors[pair.a].astype(np.float64)


def _joined(terms: Sequence[Product], weights: Sequence[float] = ()) -> Product:
    """Return the weighted sum of products: left factors side by side, right factors on top of each other.

    Where that is longer than the layer is wide, the sum is multiplied out, so that no product outgrows its layer.
    """
    weights = weights or [1.0] * len(terms)
    left, right = terms[0]
    shape = len(left), right.shape[1]
    inner = sum(left.shape[1] for left, _ in terms)
    if inner <= min(shape):
        scaled = [weight * left for (left, _), weight in zip(terms, weights, strict=True)]
        return np.concatenate(scaled, axis=1), np.concatenate([right for _, right in terms])
    # Multiplied out, the sum is one factor, and the identity is the other.
    total = np.zeros(shape)
    for (left, right), weight in zip(terms, weights, strict=True):
        total += weight * (left @ right)
    if shape[0] <= shape[1]:
        return np.eye(shape[0]), total
    return total, np.eye(shape[1])


def _squares(terms: Sequence[Product], weights: Sequence[float], other: Product) -> tuple[float, float]:
    """Return the squared Frobenius norms of a weighted sum of products, and of its difference from another product.

    ||L R||^2 is the sum over the elementwise product of the Gram matrices L'L and R R'. These are small while the
    factors together are narrower than the layer. Where they are not, the products are multiplied out.
    """
    rows, columns = len(other[0]), other[1].shape[1]
    inner = sum(left.shape[1] for left, _ in terms)
    if inner * (rows + columns) > rows * columns:
        total = np.zeros((rows, columns))
        for (left, right), weight in zip(terms, weights, strict=True):
            total += weight * (left @ right)
        return float(np.square(total).sum()), float(np.square(total - other[0] @ other[1]).sum())
    scaled = [weight * left for (left, _), weight in zip(terms, weights, strict=True)]
    lefts = np.concatenate([*scaled, -other[0]], axis=1)
    rights = np.concatenate([*(right for _, right in terms), other[1]])
    grams = (lefts.T @ lefts) * (rights @ rights.T)
    # where the terms cancel, rounding may leave a little less than zero
    return float(grams[:inner, :inner].sum()), max(0.0, float(grams.sum()))


def project(product: Product, rank: int) -> tuple[Matrix, Matrix]:
    """Return the best factors B, A of a rank, shapes (out, rank) and (rank, in), of a product.

    By Eckart and Young, these are the first `rank` components of its singular value decomposition, the largest first.
    Rows of A are orthogonal and as long as LoRA draws them, also where nothing has been learned yet; B contains the
    scale. So B can learn everywhere.

    Args:
        product: its inner size is at least `rank`.
        rank: at most the smaller side of the layer.
    """
    q_left, r_left = np.linalg.qr(product[0])
    q_right, r_right = np.linalg.qr(product[1].T)
    u, values, v = np.linalg.svd(r_left @ r_right.T)
    return q_left @ u[:, :rank] * values[:rank] / _ROW_NORM, _ROW_NORM * v[:rank] @ q_right.T


def mean_change(layer: Layer, before: Tensors, accepted: Sequence[Tensors], weights: Sequence[float]) -> Product:
    """Return the mean of a layer over the sites: the exact weighted sum of their B A, plus the merged pair.

    Args:
        layer: the layer.
        before: the adapter that sites started from, by tensor name.
        accepted: the sites' updates, by tensor name.
        weights: the weights of the sites; their sum is 1.
    """
    mean = _joined(_changes(layer, before, accepted), weights)
    if layer.merged is None:
        return mean
    return _joined([mean, _product(layer.merged, before)])


def _changes(layer: Layer, before: Tensors, accepted: Sequence[Tensors]) -> list[Product]:
    """Return the B A of the trained pair of a layer at each site."""
    names = [name for name in (layer.pair.a, layer.pair.b) if name]
    terms = []
    for update in accepted:
        trained = {name: before[name].astype(np.float64) + update[name] for name in names}
        terms.append(_product(layer.pair, trained))
    return terms


def aggregation_error(
    spec: AdapterSpec, before: Vector, after: Vector, updates: Sequence[WeightedUpdate]
) -> float | None:
    """Return the relative distance of the server's new adapter from the mean of the sites' products.

    ||mean(B_i A_i) - B A|| / ||mean(B_i A_i)||, in Frobenius norms over all adapted layers; means are weighted by rows.
    Where A is frozen, B alone is compared.

    Args:
        spec: the spec of the adapter.
        before: the adapter that sites started from, shape (spec.size,).
        after: the server's new adapter, shape (spec.size,).
        updates: the sites' updates.

    Returns:
        The distance; None without LoRA, without updates, or if a gateway has averaged its clients' factors.
    """
    if not pairs(spec) or not updates or any(one.clients > 1 for one in updates):
        return None
    start = unpack(before, spec)
    end = unpack(after, spec)
    changes = [unpack(one.update, spec) for one in updates]
    weights = shares(updates)
    length = 0.0
    distance = 0.0
    with threadpool_limits(1, "blas"):  # its threads cost more than they save here
        for layer in layers(spec):
            terms = _changes(layer, start, changes)
            merged = [_product(layer.merged, start)] if layer.merged else []
            layer_squares = _squares(terms + merged, weights + [1.0] * len(merged), change(layer, end))
            length += layer_squares[0]
            distance += layer_squares[1]
    return math.sqrt(distance / length) if length else 0.0


def shares(updates: Sequence[WeightedUpdate]) -> list[float]:
    """Return the updates' weights, scaled so that their sum is 1."""
    total = sum(one.weight for one in updates)
    return [one.weight / total for one in updates]
