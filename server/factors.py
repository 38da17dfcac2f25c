"""Aggregation that knows LoRA: what the mean of B A is, how far the server's choice is from it, and exact choices.

Products are kept as factors, (left, right) with shapes (out, k) and (k, in), and never multiplied out: with the QR
decompositions of both, whatever is asked of the product is a matter of a k x k matrix. All is done in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from common.factors import MERGED, TRAINED, Pair, pairs
from common.rng import generator
from common.wire import AdapterSpec, Vector, l2_norm, pack, unpack
from server.guard import Accepted

Matrix = npt.NDArray[np.float64]
Tensors = Mapping[str, npt.NDArray[Any]]
Product = tuple[Matrix, Matrix]

_ROW_NORM = 1 / np.sqrt(3)
"""The length of a row of A as LoRA draws it: uniform between -1/sqrt(in) and 1/sqrt(in)."""


def products(spec: AdapterSpec, tensors: Tensors) -> list[Product]:
    """Return B A of each adapted layer, with what `flora` has merged; A counts as the identity where it is frozen."""
    merged = {pair.b: pair for pair in pairs(spec, MERGED)}
    found = []
    for pair in pairs(spec):
        parts = [pair]
        if other := merged.get(pair.b.replace(f".{TRAINED}.", f".{MERGED}.")):
            parts.append(other)
        found.append(_joined([_product(one, tensors) for one in parts], [1.0] * len(parts)))
    return found


def _product(pair: Pair, tensors: Tensors) -> Product:
    left = tensors[pair.b].astype(np.float64)
    return left, tensors[pair.a].astype(np.float64) if pair.a else np.eye(left.shape[1])


def _joined(terms: Sequence[Product], weights: Sequence[float]) -> Product:
    """Return the weighted sum of products: left factors side by side, right factors on top of each other."""
    return (
        np.concatenate([weight * left for (left, _), weight in zip(terms, weights, strict=True)], axis=1),
        np.concatenate([right for _, right in terms]),
    )


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


def mean_products(spec: AdapterSpec, before: Vector, accepted: Sequence[Accepted]) -> list[Product]:
    """Return the mean of what sites have made of each layer, weighted by rows: the exact sum of their B A."""
    total = sum(reply.weight for reply in accepted)
    locals_ = [products(spec, unpack(_moved(before, reply.update), spec)) for reply in accepted]
    weights = [reply.weight / total for reply in accepted]
    return [_joined(terms, weights) for terms in zip(*locals_, strict=True)]


def _moved(before: Vector, update: Vector) -> Any:
    return before.astype(np.float64) + update


def aggregation_error(spec: AdapterSpec, before: Vector, after: Vector, accepted: Sequence[Accepted]) -> float | None:
    """Return how far the server's choice is from the mean of what sites have learned; None without LoRA.

    ||mean(B_i A_i) - B A|| / ||mean(B_i A_i)||, in Frobenius norms over all adapted layers; means are weighted by rows.

    Args:
        spec: of the adapter.
        before: what sites started from, shape (spec.size,).
        after: what the server has made of it.
        accepted: the sites' updates.
    """
    if not pairs(spec) or not accepted:
        return None
    means, chosen = mean_products(spec, before, accepted), products(spec, unpack(after, spec))
    apart = [norm(_joined([mean, one], [1.0, -1.0])) for mean, one in zip(means, chosen, strict=True)]
    whole = l2_norm(np.array([norm(mean) for mean in means]))
    return l2_norm(np.array(apart)) / whole if whole else 0.0


Combine = Callable[[AdapterSpec, Vector, Sequence[Accepted], np.random.Generator], dict[str, Matrix]]
"""From a spec, the adapter before, the updates and a source of initial values to new factors by name."""


def svd(
    spec: AdapterSpec, before: Vector, accepted: Sequence[Accepted], draw: np.random.Generator
) -> dict[str, Matrix]:
    """Return the best factors of the mean of B A. Source: Bai et al. 2024, arXiv:2402.11505, section 3 (FlexLoRA)."""
    found = {}
    for pair, mean in zip(pairs(spec), mean_products(spec, before, accepted), strict=True):
        found[pair.b], found[pair.a] = project(mean, len(unpack(before, spec)[pair.a]))
    return found


def flora(
    spec: AdapterSpec, before: Vector, accepted: Sequence[Accepted], draw: np.random.Generator
) -> dict[str, Matrix]:
    """Return a fresh pair, and the merged one with what all sites have learned: theirs stacked, rank by rank.

    Source: Wang et al. 2024, arXiv:2409.05976, section 3 (FLoRA). The paper adds the stack to the base's weights; here
    the base stays as it is, and a second pair that sites do not train holds the sum, exactly while its rank suffices.
    """
    found, tensors = {}, unpack(before, spec)
    means = mean_products(spec, before, accepted)
    for pair, merged, mean in zip(pairs(spec), pairs(spec, MERGED), means, strict=True):
        found[merged.b], found[merged.a] = project(mean, len(tensors[merged.a]))
        rank, width = tensors[pair.a].shape
        found[pair.b] = np.zeros_like(tensors[pair.b], np.float64)
        found[pair.a] = draw.uniform(-1, 1, (rank, width)) / np.sqrt(width)
    return found


COMBINE: Mapping[str, Combine] = {"svd": svd, "flora": flora}
"""By strategy: how pairs are combined that a mean of the factors would not do justice to."""


def combine(
    strategy: str,
    spec: AdapterSpec,
    before: Vector,
    update: Vector,
    accepted: Sequence[Accepted],
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
    new = COMBINE[strategy](spec, before, accepted, generator(seed, "fresh-factors", round_))
    tensors = {name: values.astype(np.float64) for name, values in unpack(update, spec).items()}
    old = unpack(before, spec)
    tensors |= {name: values - old[name] for name, values in new.items()}
    return pack({name: values.astype(np.float32) for name, values in tensors.items()}, spec)
