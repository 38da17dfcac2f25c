"""Settings that do not go together."""

import pytest

from tsugiki.common.config.parse import parse
from tsugiki.common.config.rules import cross_checks
from tsugiki.common.errors import ConfigError


def problems(raw):
    """Return {key: problem} of a file that has to be refused."""
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    return {problem.key: problem for problem in caught.value.problems}


CROSS = {
    "train.persist_optimizer": {"train": {"persist_optimizer": True}, "privacy": {"examples": {"target_epsilon": 1.0}}},
    "strategy.min_clients": {"simulation": {"data": "a.csv", "clients": 2}, "strategy": {"min_clients": 3}},
    "simulation.column": {"simulation": {"partition": "by-column"}},
    "evaluation.data": {"evaluation": {"early_stopping_patience": 2, "at_sites": False}},
    "train.precision": {"train": {"precision": "bf16"}, "model": {"dtype": "float16"}},
    "train.momentum": {"train": {"momentum": 0.9}},
    "model.quantization": {"model": {"quantization": "nf4"}, "train": {"device": "cpu"}},
    "model.gradient_checkpointing": {
        "model": {"gradient_checkpointing": True},
        "privacy": {"examples": {"target_epsilon": 1.0}},
    },
    "train.local_patience": {"train": {"local_patience": 2}},
    "adapter.merged_rank": {"adapter": {"merged_rank": 4}},
}


@pytest.mark.parametrize("key", CROSS)
def test_settings_that_do_not_go_together(key):
    """Catches: a check between sections that was dropped, or that fires for something else too."""
    assert set(problems(CROSS[key])) == {key}


@pytest.mark.parametrize(
    "others",
    [
        {"privacy": {"examples": {"target_epsilon": 1.0}}},
        {"task": {"name": "image-classification"}, "adapter": {"method": "lora"}},
        {"task": {"name": "causal-lm", "packing": True}},
    ],
    ids=["DP-SGD", "images", "packed"],
)
def test_batches_by_length_where_there_are_none(others):
    """Catches: DP-SGD's batches chosen by private lengths; a setting that has no effect and says nothing."""
    assert set(problems({"train": {"group_by_length": True}, **others})) == {"train.group_by_length"}
    for value in ("auto", False):
        assert parse({"train": {"group_by_length": value}, **others}).train.group_by_length == value
    assert parse({"train": {"group_by_length": True}, "task": {"name": "sentence-embedding"}})


def test_krum_needs_enough_sites():
    """Catches: Krum run with so few sites that the honest have no neighbour to be compared with."""
    assert set(problems({"strategy": {"name": "krum", "num_malicious_sites": 2, "min_clients": 6}})) == {
        "strategy.min_clients"
    }
    assert parse({"strategy": {"name": "krum", "num_malicious_sites": 2, "min_clients": 7}})


def test_moments_are_not_kept_where_workers_share_sites():
    """Catches: moments that depend on which worker serves a site."""
    simulation = {"data": "a.csv", "engine": "ray"}
    found = problems({"train": {"persist_optimizer": True}, "simulation": simulation})
    assert set(found) == {"train.persist_optimizer"}
    dp_sgd = {"examples": {"target_epsilon": 1.0}}
    assert set(problems({"train": {"divergence_factor": 3.0}, "privacy": dp_sgd})) == {"train.divergence_factor"}


@pytest.mark.parametrize(
    "others",
    [
        {"privacy": {"examples": {"target_epsilon": 1.0}}},
        {"privacy": {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-9}},
        {"simulation": {"data": "a.csv", "clients": 8, "clients_per_site": 2}},
    ],
)
def test_validation_inside_a_round_takes_rows_that_nobody_protects(others):
    """Catches: a choice that follows from private rows and that no account has; clients trained without it."""
    assert set(problems({"train": {"validate_every_steps": 5}, **others})) == {"train.validate_every_steps"}
    assert parse({"train": {"validate_every_steps": 5, "local_patience": 2}})


@pytest.mark.parametrize(
    "raw",
    [
        {"adapter": {"method": "houlsby"}},
        {"train": {"device": "mps"}},
        {"privacy": {"examples": {"target_epsilon": 1.0}}},
        {"task": {"name": "rlhf"}},
    ],
)
def test_four_bits_are_for_lora_on_cuda_without_dp_sgd(raw):
    """Catches: an adapter of ours trained on packed weights; row gradients of layers that Opacus does not know."""
    assert set(problems({"model": {"quantization": "nf4"}, **raw})) == {"model.quantization"}
    assert parse({"model": {"quantization": "nf4"}}).train.device == "auto"


def test_activations_are_not_computed_twice_where_eval_mode_keeps_them():
    """Catches: a setting that does nothing, accepted."""
    raw = {"model": {"gradient_checkpointing": True}, "task": {"name": "rlhf"}}
    assert set(problems(raw)) == {"model.gradient_checkpointing"}


def test_only_adam_has_a_bias_correction():
    """Catches: a setting that does nothing, accepted."""
    assert set(problems({"train": {"optimizer": "sgd", "bias_correction": False}})) == {"train.bias_correction"}
    assert parse({"train": {"bias_correction": False}}).train.optimizer == "adamw"


def test_all_cross_checks_are_reported_together():
    """Catches: a chain of if and return."""
    raw = {}
    for changes in CROSS.values():
        for section, values in changes.items():
            raw[section] = {**raw.get(section, {}), **values}
    raw["simulation"].pop("partition")  # a by-column split has as many sites as the column has values
    assert set(problems(raw)) == set(CROSS) - {"simulation.column"}


@pytest.mark.parametrize(
    "raw",
    [
        {"strategy": {"min_clients": 5}},  # a deployment: simulation.clients means nothing
        {"strategy": {"min_clients": 9}, "simulation": {"data": "a.csv", "partition": "by-column", "column": "org"}},
        {"train": {"momentum": 0.9, "optimizer": "sgd"}},
        {"train": {"precision": "bf16", "device": "cpu"}, "model": {"dtype": "bfloat16"}},
        {"strategy": {"name": "flora"}, "adapter": {"merged_rank": 4}},
        {"evaluation": {"early_stopping_patience": 2, "data": "dev.csv"}},
        {"train": {"learning_rate": 1, "local_epochs": 2}},  # TOML's 1 is a fine learning rate
    ],
)
def test_settings_that_do_go_together(raw):
    """Catches: a cross check that is too strict."""
    assert cross_checks(parse(raw)) == []


def test_a_setting_of_an_earlier_version_says_what_replaced_it():
    """Catches: an old file whose owner is told to delete what has another name now."""
    (problem,) = problems({"train": {"bf16": True}}).values()
    assert problem.key == "train.bf16"
    assert 'write train.precision = "bf16"' in problem.hint
