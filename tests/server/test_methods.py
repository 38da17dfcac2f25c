"""The menu on a base: true sizes, reasons for what does not go, and a base that is left as it was."""

import pytest
import torch

from tests.support.exports import to_fuse
from tests.support.tiny import tiny_bert, tiny_llama
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks import TASKS
from tsugiki.server import methods as module
from tsugiki.server.methods import compatibility, reasons


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """The folder of a tiny BERT. Read only."""
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def found(bert):
    """What can be chosen on it."""
    return compatibility(parse({"model": {"name": str(bert)}, "adapter": {"method": "lora", "rank": 2}}))


def test_every_pair_is_there(found):
    """Catches: a task or a method that is registered and not listed."""
    assert list(found.pairs) == list(TASKS.names())
    assert all(list(row) == list(ADAPTERS.names()) for row in found.pairs.values())


@pytest.mark.parametrize("method", ["lora", "houlsby", "bitfit", "vera"])
def test_sizes_are_those_of_a_run(found, bert, method):
    """Catches: numbers counted twice or not at all; heads among the adapter's; another method's tensors left over."""
    adapter = {"method": method, **({"rank": 2} if method == "lora" else {})}
    graft = load_graft(parse({"model": {"name": str(bert)}, "adapter": adapter}), str(bert), 1)
    pair = found.pairs["sequence-classification"][method]
    assert (pair.adapter, pair.head) == (graft.spec.parameters("adapter"), graft.spec.parameters("head"))
    assert pair.size_bytes == graft.spec.size_bytes
    assert pair.reason == ""


def test_what_does_not_go_has_a_reason(found, tmp_path):
    """Catches: an empty cell; a traceback of a library in the place of a reason."""
    assert all(pair.reason for pair in found.pairs["causal-lm"].values())
    assert all(pair.reason for pair in found.pairs["image-classification"].values())
    llama = compatibility(parse({"model": {"name": str(tiny_llama(tmp_path / "llama"))}}))
    assert llama.pairs["causal-lm"]["bitfit"].reason == "it has no bias terms"
    assert llama.pairs["causal-lm"]["lora"].adapter > 0
    numbers = reasons(llama.pairs)
    assert sorted(numbers.values()) == list(range(1, len(numbers) + 1))
    assert {pair.reason for row in llama.pairs.values() for pair in row.values() if pair.reason} == set(numbers)


def test_a_setting_that_does_not_go_says_what_would(bert):
    """Catches: a setting and its value in the place of a reason; candidates that are kept back."""
    reason = {}
    for key, value in (("rank", 33), ("target_modules", ["nope"])):
        listed = compatibility(parse({"model": {"name": str(bert)}, "adapter": {"method": "lora", key: value}}))
        reason[key] = listed.pairs["sequence-classification"]["lora"].reason
    assert reason["rank"] == "adapter.rank = 33 is too large; expected at most 32, the width of the layers"
    assert "expected some of dense, key, query, value" in reason["target_modules"]


def test_fusion_needs_adapters_and_is_listed_with_them(found, bert, tmp_path):
    """Catches: a method without a size or a reason; the adapters of the run's own settings ignored."""
    reason = found.pairs["sequence-classification"]["fusion"].reason
    assert reason.startswith("adapter.adapters names fewer than two; expected exports of two or more houlsby runs")
    adapter = {"method": "fusion", "adapters": to_fuse(tmp_path, bert, placement="pfeiffer")}
    fused = compatibility(parse({"model": {"name": str(bert)}, "adapter": adapter})).pairs["sequence-classification"][
        "fusion"
    ]
    assert (fused.adapter, fused.reason) == (2 * 3 * 32 * 32, "")


def test_adapters_of_another_base_do_not_go(bert, tmp_path):
    """Catches: a pair that is listed as possible, and refused as soon as it is run."""
    other = tiny_bert(tmp_path / "other", seed=8)
    adapter = {"method": "fusion", "adapters": to_fuse(tmp_path, other)}
    listed = compatibility(parse({"model": {"name": str(bert)}, "adapter": adapter})).pairs["sequence-classification"]
    assert "fingerprint" in listed["fusion"].reason
    assert listed["houlsby"].reason == ""


def test_one_base_serves_all_methods(bert, monkeypatch):
    """Catches: a base loaded for every method; an adapter that changes the base under the next one."""
    loads, load = [], module.load_base

    def watched(task, folder, dtype):
        loads.append(load(task, folder, dtype))
        return loads[-1]

    monkeypatch.setattr(module, "load_base", watched)
    compatibility(parse({"model": {"name": str(bert)}}))
    assert len(loads) < len(TASKS.names())  # those that do not load are not here
    for base in loads:
        fresh = load(
            TASKS.get("sequence-classification")(TASKS.get("sequence-classification").Settings()), bert, torch.float32
        )
        kept = dict(fresh.transformer.base_model.named_parameters())
        inner = dict(getattr(base.transformer, "base_model", base.transformer).named_parameters())
        assert all(torch.equal(inner[name], value) for name, value in kept.items() if name in inner)
        assert all(value.requires_grad for value in base.transformer.parameters())
        assert not [name for name, _ in base.transformer.named_parameters() if "lora" in name or "bottleneck" in name]


def test_memory_is_that_of_the_base_and_of_what_adam_keeps(found, bert):
    """Catches: gradients or moments left out; the head counted for another pair than its adapter; half a base."""
    base = module.load_base(
        TASKS.get("sequence-classification")(TASKS.get("sequence-classification").Settings()), bert, torch.float32
    )
    assert found.base_bytes == 4 * sum(value.numel() for value in base.transformer.parameters())
    most = max(pair.adapter + pair.head for row in found.pairs.values() for pair in row.values())
    value, gradient, moments = 4, 4, 2 * 4
    assert found.trained_bytes == (value + gradient + moments) * most


def test_a_base_that_is_not_there_is_an_error(tmp_path):
    """Catches: a table of nothing."""
    with pytest.raises(ModelError):
        compatibility(parse({"model": {"name": str(tmp_path / "gone")}}))
