"""Aggregation that knows LoRA, compared with products that are multiplied out."""

from dataclasses import replace

import numpy as np
import pytest

from tsugiki.common.rng import generator
from tsugiki.common.strategies import STRATEGIES, WeightedUpdate
from tsugiki.common.strategies.products import aggregation_error, layers, project, shares
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec, pack, unpack

OUT, IN = 6, 7
WEIGHTS = {"a": 10, "b": 30, "c": 5}


def spec(rank, merged=0):
    """Return a spec of two layers and a head."""
    tensors = [TensorSpec("head.weight", (2, 3), "head")]
    for layer in ("x", "y"):
        for which, r in (("default", rank), ("merged", merged)):
            if r:
                part = "merged" if which == "merged" else "adapter"
                tensors.append(TensorSpec(f"{layer}.lora_A.{which}.weight", (r, IN), part))
                tensors.append(TensorSpec(f"{layer}.lora_B.{which}.weight", (OUT, r), part))
    return AdapterSpec("t", "lora", "{}", "0" * 64, "float32", tuple(sorted(tensors, key=lambda one: one.name)))


def drawn(whole, *purpose):
    """Return an adapter, or an update, of random numbers; merged pairs are what they are at all sites."""
    return generator(1, *purpose).normal(size=whole.size).astype(np.float32)


def accepted(whole):
    """Return the updates of three sites that have trained no merged pair."""
    found = []
    for site, rows in WEIGHTS.items():
        tensors = {n: v * (".merged." not in n) for n, v in unpack(drawn(whole, "update", site), whole).items()}
        update = pack({name: values.astype(np.float32) for name, values in tensors.items()}, whole)
        found.append(WeightedUpdate(site, update, rows))
    return found


def change(vector, whole, layer):
    """Return what an adapter adds to a layer's weight, multiplied out."""
    tensors = {name: values.astype(np.float64) for name, values in unpack(vector, whole).items()}
    kinds = [kind for kind in ("default", "merged") if f"{layer}.lora_A.{kind}.weight" in tensors]
    return sum(tensors[f"{layer}.lora_B.{kind}.weight"] @ tensors[f"{layer}.lora_A.{kind}.weight"] for kind in kinds)


def exact(before, replies, whole, layer):
    """Return the mean of what the sites add to a layer, weighted by rows."""
    total = sum(WEIGHTS.values())
    moved = [before.astype(np.float64) + one.update for one in replies]
    return sum(one.weight / total * change(m, whole, layer) for one, m in zip(replies, moved, strict=True))


def after(strategy, before, whole, replies, round_=1):
    """Return what the server makes of it."""
    mean = np.average([one.update for one in replies], axis=0, weights=[one.weight for one in replies])
    kind = STRATEGIES.get(strategy)
    draw = generator(5, "fresh-factors", round_)
    return before + kind(kind.Settings()).combine(whole, before, mean.astype(np.float32), replies, draw)


def slow_error(whole, before, new, replies):
    """Return the aggregation error by QR decompositions of all factors side by side."""
    distances, norms = [], []
    for layer in layers(whole):
        lefts, rights = [], []
        for share, one in zip(shares(replies), replies, strict=True):
            trained = unpack(before.astype(np.float64) + one.update, whole)
            lefts.append(share * trained[layer.pair.b])
            rights.append(trained[layer.pair.a])
        merged = [layer.merged] if layer.merged else []
        for pair in merged:
            lefts.append(unpack(before, whole)[pair.b])
            rights.append(unpack(before, whole)[pair.a])
        norms.append(qr_norm(lefts, rights))
        for pair in [layer.pair, *merged]:
            lefts.append(-unpack(new, whole)[pair.b])
            rights.append(unpack(new, whole)[pair.a])
        distances.append(qr_norm(lefts, rights))
    return np.linalg.norm(distances) / np.linalg.norm(norms)


def qr_norm(lefts, rights):
    """Return the norm of a product from the triangles of its factors."""
    left = np.linalg.qr(np.concatenate(lefts, axis=1).astype(np.float64), mode="r")
    right = np.linalg.qr(np.concatenate(rights).astype(np.float64).T, mode="r")
    return np.linalg.norm(left @ right.T)


@pytest.mark.parametrize("copies", [1, 9])
@pytest.mark.parametrize("merged", [0, 3])
def test_the_error_from_gram_matrices_is_that_of_the_decompositions(copies, merged):
    """Catches: Gram matrices with a sign or a weight lost; digits lost beside products that are multiplied out."""
    whole = spec(2, merged)
    before = drawn(whole, "before")
    replies = [replace(one, site=f"{one.site}{n}") for one in accepted(whole) for n in range(copies)]
    new = after("fedavg", before, whole, replies)
    assert aggregation_error(whole, before, new, replies) == pytest.approx(
        slow_error(whole, before, new, replies), 1e-8
    )


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_projection_is_the_best_of_its_rank_in_order(rank):
    """Catches: any other factors of that rank; components out of order, of which small ranks would get the last."""
    left, right = generator(1).normal(size=(OUT, 9)), generator(2).normal(size=(9, IN))
    u, values, v = np.linalg.svd(left @ right, full_matrices=False)
    b, a = project((left, right), rank)
    assert (b.shape, a.shape) == ((OUT, rank), (rank, IN))
    assert np.allclose(b @ a, (u[:, :rank] * values[:rank]) @ v[:rank])
    sizes = np.linalg.norm(b, axis=0)
    assert (np.diff(sizes) <= 0).all()
    assert np.allclose(a @ a.T, np.eye(rank) / 3)


def test_what_has_learned_nothing_yet_can_still_learn():
    """Catches: rows of A at zero beside columns of B at zero, whose gradients vanish for good."""
    left, right = generator(1).normal(size=(OUT, 1)), generator(2).normal(size=(1, IN))
    product = np.hstack([left, np.zeros((OUT, 3))]), np.vstack([right, np.zeros((3, IN))])
    b, a = project(product, 4)
    assert np.allclose(b @ a, left @ right)
    assert np.allclose(b[:, 1:], 0)
    assert np.allclose(np.linalg.norm(a, axis=1), 1 / np.sqrt(3))


def test_the_error_of_averaged_factors_is_that_of_the_products_multiplied_out():
    """Catches: sites weighted alike, an error of the factors, layers counted one by one."""
    whole = spec(2)
    before, replies = drawn(whole, "before"), accepted(whole)
    averaged = after("fedavg", before, whole, replies)
    means = {layer: exact(before, replies, whole, layer) for layer in "xy"}
    apart = np.sqrt(sum(np.sum((means[layer] - change(averaged, whole, layer)) ** 2) for layer in "xy"))
    expected = apart / np.sqrt(sum(np.sum(mean**2) for mean in means.values()))
    assert expected > 0.1
    assert aggregation_error(whole, before, averaged, replies) == pytest.approx(expected, rel=1e-5)


def test_one_site_alone_has_no_error_and_no_lora_has_none_to_tell():
    """Catches: an error out of rounding, a division by zero, a figure for methods that have no factors."""
    whole = spec(2)
    before, replies = drawn(whole, "before"), accepted(whole)[:1]
    assert aggregation_error(whole, before, after("fedavg", before, whole, replies), replies) < 1e-6
    zero = np.zeros(whole.size, np.float32)
    nothing = [WeightedUpdate("a", zero, 1)]
    assert aggregation_error(whole, zero, zero, nothing) == 0
    head = AdapterSpec("t", "ia3", "{}", "0" * 64, "float32", whole.tensors[:1])
    assert aggregation_error(head, zero[: head.size], zero[: head.size], nothing) is None


def test_a_frozen_a_makes_the_mean_of_b_exact():
    """Catches: an error told for `ffa`, which has none."""
    tensors = tuple(one for one in spec(2).tensors if ".lora_A." not in one.name)
    whole = AdapterSpec("t", "lora", "{}", "0" * 64, "float32", tensors)
    before, replies = drawn(whole, "before"), accepted(whole)
    assert aggregation_error(whole, before, after("ffa", before, whole, replies), replies) < 1e-6


@pytest.mark.parametrize("rank", [2, 6])
def test_svd_is_the_best_pair_of_the_rank_and_exact_at_the_full_one(rank):
    """Catches: a projection of the mean of the factors; an error that stays at full rank."""
    whole = spec(rank)
    before, replies = drawn(whole, "before"), accepted(whole)
    new = after("svd", before, whole, replies)
    for layer in "xy":
        u, values, v = np.linalg.svd(exact(before, replies, whole, layer), full_matrices=False)
        assert np.allclose(change(new, whole, layer), (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-4), layer
    error = aggregation_error(whole, before, new, replies)
    assert error < 1e-5 if rank == 6 else 0.01 < error < 1


def test_svd_beats_the_mean_of_the_factors():
    """Catches: a projection that is not the best."""
    whole = spec(2)
    before, replies = drawn(whole, "before"), accepted(whole)
    errors = [
        aggregation_error(whole, before, after(name, before, whole, replies), replies) for name in ("svd", "fedavg")
    ]
    assert errors[0] < errors[1]


def test_flora_merges_all_that_was_learned_and_draws_a_fresh_pair():
    """Catches: what was merged before forgotten, or counted for each site; a fresh pair that changes the model."""
    whole = spec(2, merged=6)
    before, replies = drawn(whole, "before"), accepted(whole)
    new = after("flora", before, whole, replies)
    tensors = unpack(new, whole)
    for layer in "xy":
        assert np.allclose(change(new, whole, layer), exact(before, replies, whole, layer), atol=1e-4), layer
        assert np.allclose(tensors[f"{layer}.lora_B.default.weight"], 0, atol=1e-6)
        fresh = tensors[f"{layer}.lora_A.default.weight"]
        assert 0.1 < np.abs(fresh).max() <= 1 / np.sqrt(IN) + 1e-6
    assert aggregation_error(whole, before, new, replies) < 1e-5
    again = unpack(after("flora", before, whole, replies, round_=2), whole)
    assert not np.allclose(again["x.lora_A.default.weight"], tensors["x.lora_A.default.weight"])


def test_flora_with_too_small_a_merged_rank_tells_its_error():
    """Catches: an error that is taken for zero because the strategy is exact in the paper."""
    whole = spec(2, merged=3)
    before, replies = drawn(whole, "before"), accepted(whole)
    assert aggregation_error(whole, before, after("flora", before, whole, replies), replies) > 0.01


@pytest.mark.parametrize("strategy", ["svd", "flora"])
def test_heads_are_averaged_as_ever(strategy):
    """Catches: a head that is lost or projected."""
    whole = spec(2, merged=6 if strategy == "flora" else 0)
    before, replies = drawn(whole, "before"), accepted(whole)
    there, here = (unpack(after(name, before, whole, replies), whole) for name in (strategy, "fedavg"))
    assert np.allclose(there["head.weight"], here["head.weight"])


def test_a_gateways_mean_of_factors_has_no_error_to_tell():
    """Catches: an error of nothing, where the factors of a gateway's clients were averaged before."""
    whole = spec(2)
    before, replies = drawn(whole, "before"), accepted(whole)
    replies[1] = replace(replies[1], clients=3)
    assert aggregation_error(whole, before, before, replies) is None


def test_sums_longer_than_a_layer_is_wide_are_the_same():
    """Catches: a product that is multiplied out wrongly, or with its weights lost."""
    whole = spec(2)
    before, replies = drawn(whole, "before"), accepted(whole)
    many = [replace(one, site=f"{one.site}{n}", weight=one.weight) for one in replies for n in range(9)]
    few, more = (aggregation_error(whole, before, before, chosen) for chosen in (replies, many))
    assert few == pytest.approx(more)
