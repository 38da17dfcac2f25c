"""LoRA's factors in an adapter: found by name, sent in part, truncated."""

import numpy as np
import pytest

from tests.support.federation import tiny_config
from tsugiki.common.model.load import load_graft
from tsugiki.common.strategies import STRATEGIES
from tsugiki.common.strategies.factors import Pair, narrow, pairs, truncate, widen
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec, unpack


def spec(*names):
    """Return a spec of pairs in two layers, a head, and further tensors by name."""
    tensors = [TensorSpec("head.weight", (2, 4), "head")]
    for layer in ("x", "y"):
        tensors.append(TensorSpec(f"{layer}.lora_A.default.weight", (3, 4), "adapter"))
        tensors.append(TensorSpec(f"{layer}.lora_B.default.weight", (5, 3), "adapter"))
    tensors += [TensorSpec(name, (2, 2), "merged") for name in names]
    return AdapterSpec("t", "lora", "{}", "0" * 64, "float32", tuple(sorted(tensors, key=lambda one: one.name)))


MERGED = ("x.lora_A.merged.weight", "x.lora_B.merged.weight")


def sent(whole, name, round_number):
    """Return the part of an adapter that sites send in a round."""
    kind = STRATEGIES.get(name)
    return kind(kind.Settings()).trained_part(whole, round_number)


def names(part):
    return [tensor.name for tensor in part.tensors]


def test_pairs_are_found_by_name():
    """Catches: A of one layer with B of another, merged factors among the trained ones, a head among factors."""
    whole = spec(*MERGED)
    assert pairs(whole) == [Pair(f"{n}.lora_A.default.weight", f"{n}.lora_B.default.weight") for n in "xy"]
    assert pairs(whole, "merged") == [Pair(*MERGED)]
    frozen = AdapterSpec("t", "lora", "{}", "0" * 64, "float32", tuple(t for t in whole.tensors if "_A." not in t.name))
    assert [pair.a for pair in pairs(frozen)] == ["", ""]
    assert pairs(AdapterSpec("t", "ia3", "{}", "0" * 64, "float32", whole.tensors[:1])) == []


def test_rolora_sends_b_first_and_then_a_and_heads_always():
    """Catches: A in round 1, where it cannot learn; a head that travels in every other round only."""
    odd, even = names(sent(spec(), "rolora", 1)), names(sent(spec(), "rolora", 2))
    assert odd == ["head.weight", "x.lora_B.default.weight", "y.lora_B.default.weight"]
    assert even == ["head.weight", "x.lora_A.default.weight", "y.lora_A.default.weight"]
    assert names(sent(spec(), "rolora", 3)) == odd


def test_merged_pairs_are_never_sent_and_other_strategies_send_all():
    """Catches: megabytes of zeros on their way up; a plain average that loses a factor."""
    assert names(sent(spec(*MERGED), "flora", 1)) == names(spec())
    assert sent(spec(), "fedavg", 1) == spec()


def test_a_part_goes_out_and_comes_back_in_its_place():
    """Catches: numbers of one tensor in the place of another, anything but zero where nothing was sent."""
    whole = spec(*MERGED)
    part = sent(whole, "rolora", 2)
    vector = np.arange(1, whole.size + 1, dtype=np.float32)
    there = narrow(vector, whole, part)
    assert there.shape == (part.size,)
    back, original = unpack(widen(there, part, whole), whole), unpack(vector, whole)
    for name, values in back.items():
        assert np.array_equal(values, original[name] if name in names(part) else np.zeros_like(values)), name
    assert narrow(vector, whole, whole) is vector


def test_a_truncated_adapter_has_the_first_components_only():
    """Catches: the last ones kept, rows of B cut instead of columns, the caller's own vector changed."""
    whole = spec()
    vector = np.ones(whole.size, np.float32)
    cut = unpack(truncate(vector, whole, 2), whole)
    assert cut["x.lora_A.default.weight"].sum(axis=1).tolist() == [4, 4, 0]
    assert cut["y.lora_B.default.weight"].sum(axis=0).tolist() == [5, 5, 0]
    assert cut["head.weight"].all()
    assert vector.all()
    assert truncate(vector, whole, 0) is vector


def test_only_a_part_is_trained_inside_and_all_of_it_after(tmp_path):
    """Catches: a factor that stays frozen for the rest of the run, also after an error."""
    config = tiny_config(tmp_path)
    graft = load_graft(config, config.model.name, config.run.seed)
    part = sent(graft.spec, "rolora", 1)
    assert part != graft.spec

    def fail():
        with graft.training_only(part):
            named = zip(graft.spec.tensors, graft.parameters, strict=True)
            assert [tensor.name for tensor, value in named if value.requires_grad] == names(part)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert all(value.requires_grad for value in graft.parameters)
