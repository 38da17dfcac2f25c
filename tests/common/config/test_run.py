"""The run's configuration and what is checked before any site is contacted."""

import json
import math
import warnings

import pytest

from tsugiki.common.config.parse import changed, parse, section_classes
from tsugiki.common.config.run import EvaluationSection, RunConfig
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.privacy.settings import PrivacySection
from tsugiki.common.settings import OPERATORS_WAITS

EMBEDDING = {"name": "sentence-embedding", "loss": "cosine-similarity"}


def problems(raw):
    """Return {key: problem} of a file that has to be refused."""
    with pytest.raises(ConfigError) as caught:
        parse(raw, "run.toml")
    assert (caught.value.code, caught.value.exit_status) == ("config-invalid", 2)
    return {problem.key: problem for problem in caught.value.problems}


def test_an_empty_file_is_the_default_run():
    """Catches: a setting without a default; another default task, method or strategy."""
    config = parse({})
    assert (config.task.name, config.adapter.method, config.strategy.name) == (
        "sequence-classification",
        "lora",
        "fedavg",
    )
    assert (config.adapter.rank, config.train.learning_rate, config.privacy.mode) == (8, "auto", "none")
    assert all(
        field.description
        for name in RunConfig.model_fields
        for field in type(getattr(config, name)).model_fields.values()
    )


def test_the_chosen_names_bring_their_own_settings():
    """Catches: settings of one method accepted for another; names that do not choose the class."""
    raw = {
        "task": EMBEDDING,
        "adapter": {"method": "houlsby", "bottleneck": 4},
        "strategy": {"name": "fedadam", "tau": 0.1},
    }
    config = parse(raw)
    assert (config.task.scale, config.adapter.bottleneck, config.strategy.tau) == (20.0, 4, 0.1)
    assert set(problems({"adapter": {"method": "houlsby", "rank": 4}})) == {"adapter.rank"}
    assert set(problems({"task": {"name": "causal-lm", "num_labels": 3}})) == {"task.num_labels"}


def test_every_problem_at_once():
    """Catches: a parser that stops at the first section, the first key, or at an unknown name."""
    found = problems(
        {
            "run": {"rounds": -1, "name": "../../etc/x", "seed": -1},
            "model": {"name": ""},
            "adapter": {"rank": 0},
            "train": {"learning_rate": -1.0, "local_steps": "ten", "warmup": 0.1},
            "strategy": {"name": "fedsgd"},
            "privacy": {"mode": "none", "epsilon": 0.0},
            "evaluation": {"every_rounds": True},
            "simulation": 3,
            "servre": {},
        }
    )
    assert set(found) == {
        *("run.rounds", "run.name", "run.seed", "model.name", "adapter.rank", "strategy.name", "privacy.epsilon"),
        *(
            "train.learning_rate",
            "train.local_steps",
            "train.warmup",
            "evaluation.every_rounds",
            "simulation",
            "servre",
        ),
    }
    assert str(found["run.rounds"]) == "run.rounds = -1: must be greater than or equal to 0."
    assert found["strategy.name"].value == "'fedsgd'"
    assert found["strategy.name"].expected.startswith("one of fedadam, fedavg,")


@pytest.mark.parametrize(
    ("section", "values"),
    [
        ("run", {"rounds": 100_001, "seed": 2**31, "name": "a" * 65, "output_dir": ""}),
        ("model", {"dtype": "float64", "public_name": 3}),
        ("task", {"name": 3, "max_length": 7}),
        ("adapter", {"method": ["lora"], "wire_dtype": "int8"}),
        ("adapter", {"alpha": 0.0, "dropout": 1.0, "rank": 4097}),
        ("train", {"learning_rate": math.nan, "max_grad_norm": math.inf, "warmup_ratio": 1.0, "momentum": -0.1}),
        ("strategy", {"fraction_train": 0.0, "round_timeout_s": 0, "max_update_norm": math.nan, "min_clients": 0}),
        ("privacy", {"mode": "federal", "clip_norm": 0.0, "delta": 1.0, "honest_fraction": 0.0, "sampling": "wor"}),
        ("simulation", {"clients": 0, "partition": "random", "engine": "dask", "evaluation_fraction": 1.0}),
        ("data", {"columns": {"text": 1.5}, "quoting": "all", "header": 1}),
    ],
)
def test_values_out_of_range(section, values):
    """Catches: a bound dropped or moved; NaN, which no comparison catches; True taken for 1."""
    for key, value in values.items():
        assert any(found.startswith(f"{section}.{key}") for found in problems({section: {key: value}})), key


@pytest.mark.parametrize(
    ("raw", "key", "hint"),
    [
        ({"train": {"learning_rte": 0.1}}, "train.learning_rte", "write 'learning_rate', if that is what you mean"),
        ({"adapter": {"Rank": 4}}, "adapter.Rank", "write 'rank', if that is what you mean"),
        ({"simulaton": {}}, "simulaton", "write 'simulation', if that is what you mean"),
        ({"train": {"qqq": 1}}, "train.qqq", "remove it"),
    ],
)
def test_an_unknown_key_is_named_with_what_may_be_meant(raw, key, hint):
    """Catches: a typing error that is ignored, so that the run goes on with the default."""
    found = problems(raw)
    assert set(found) == {key}
    assert found[key].hint == hint


def test_a_list_is_asked_for_in_the_words_of_a_file():
    """Catches: "expected tuple", which a TOML file does not have."""
    found = problems({"strategy": {"name": "svd"}, "simulation": {"ranks": 8}, "task": {"labels": 3}})
    assert {key: found[key].expected for key in found} == dict.fromkeys(
        ("simulation.ranks", "task.labels"), "a list in brackets"
    )


def test_long_values_are_cut():
    """Catches: a whole file pasted into a message."""
    found = problems({"run": {"name": "x" * 5000}, "task": {"name": "y" * 5000}, "z" * 9: "w" * 5000})
    assert len(found) == 3
    assert all(len(problem.value) <= 80 for problem in found.values())


def test_sha256_leaves_out_what_does_not_shape_the_result():
    """Catches: a setting that shapes the result and is not hashed; a run that cannot go on with a lower quorum."""
    config = parse({"simulation": {"data": "a.csv"}})
    same, other = [], []
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        for key, value in section.model_dump(mode="json").items():
            changed = section.model_copy(update={key: [value, "other"]})
            hashed = config.model_copy(update={name: changed})
            with warnings.catch_warnings(action="ignore"):  # pydantic notes the type, which is wrong on purpose
                (same if hashed.sha256 == config.sha256 else other).append(f"{name}.{key}")
    waits = [f"strategy.{name}" for name in ("min_clients", "round_timeout_s", "connect_timeout_s", *OPERATORS_WAITS)]
    planned = [f"privacy.{name}" for name in PrivacySection.model_fields if name not in ("mode", "examples")]
    measured = [f"evaluation.{name}" for name in EvaluationSection.model_fields]
    here = ["run.rounds", "run.output_dir", "model.public_name", "train.threads"]
    assert same == [*here, *waits, *planned, *measured, "simulation.engine"]
    assert len(other) > 40


def test_sha256_does_not_depend_on_order_or_on_what_is_written_out():
    """Catches: a hash over the file's text."""
    raw = {"run": {"name": "x", "rounds": 3}, "train": {"local_steps": 2}}
    assert (
        parse(raw).sha256 == parse({"train": {"local_steps": 2}, "run": {"rounds": 3, "name": "x", "seed": 42}}).sha256
    )


def test_sites_get_what_they_need_and_nothing_of_the_operators_files():
    """Catches: paths, columns or evaluation settings of the operator in every hello."""
    raw = {
        "run": {"name": "r1", "rounds": 7, "seed": 5, "output_dir": "/secret/out"},
        "model": {"name": "org/model"},
        "task": EMBEDDING | {"scale": 10.0},
        "adapter": {"method": "houlsby", "bottleneck": 4},
        "train": {"local_steps": 3, "threads": 1},
        "strategy": {"name": "fedprox", "proximal_mu": 0.5, "start_with": ["secret"]},
        "evaluation": {"data": "/secret/dev.csv", "batch_size": 13, "monitor": "eval_loss"},
        "data": {"columns": {"sentence1": "secret"}},
        "simulation": {"data": "/secret/train.csv", "column": "secret"},
    }
    config = parse(raw)
    text = config.for_sites()
    assert "secret" not in text
    assert set(json.loads(text)) == {"run", "model", "task", "adapter", "train", "strategy", "privacy", "evaluation"}
    assert json.loads(text)["evaluation"] == {"batch_size": 13, "monitor": "eval_loss"}
    there = parse(json.loads(text))
    assert there.strategy == config.strategy.model_copy(update={"start_with": 0})
    for section in ("model", "task", "adapter", "train", "privacy"):
        assert getattr(there, section) == getattr(config, section), section
    assert there.metric == config.metric == "loss"  # by which a site validates
    assert (there.run.name, there.run.rounds, there.run.seed) == ("r1", 7, 5)


@pytest.mark.parametrize(
    ("model", "exported"),
    [
        ({"name": "org/model"}, "org/model"),
        ({"name": "package:wheel/model"}, ""),
        ({"name": "/home/me/model"}, ""),
        ({"name": "./model"}, ""),
        ({"name": "~/model"}, ""),
        ({"name": "/home/me/model", "public_name": "org/model"}, "org/model"),
    ],
)
def test_an_export_never_names_a_path(model, exported):
    """Catches: the operator's home folder in a published adapter."""
    assert parse({"model": model}).model.exported_name == exported


@pytest.mark.parametrize(
    ("raw", "monitor"),
    [
        ({}, "accuracy"),
        ({"task": EMBEDDING}, "spearman"),
        ({"task": {"name": "sentence-embedding", "recall_at": 5}}, "recall_at_5"),
        ({"evaluation": {"monitor": "eval_loss"}}, "loss"),
        ({"evaluation": {"monitor": "macro_f1"}}, "macro_f1"),
        ({"evaluation": {"monitor": "sites_macro_f1"}}, "macro_f1"),
    ],
)
def test_monitor(raw, monitor):
    """Catches: Hugging Face's prefix or that of the sites kept; the task's own choice lost; rows that are ignored."""
    assert parse(raw).metric == monitor
    assert parse(raw).monitor == f"sites_{monitor}"
    held_out = parse(raw | {"evaluation": {**raw.get("evaluation", {}), "data": "dev.csv"}})
    named = raw.get("evaluation", {}).get("monitor", "").startswith("sites_")
    assert held_out.monitor == (f"sites_{monitor}" if named else monitor)
    apart = parse(raw | {"evaluation": {"at_sites": False, "monitor": f"eval_{monitor}"}})
    assert apart.monitor == monitor


def test_an_unknown_name_becomes_a_problem_in_its_section():
    """Catches: a KeyError for whoever asks for the classes of a broken file."""
    classes = section_classes({"task": {"name": "poetry"}})
    assert isinstance(classes["task"], Problem)
    assert not isinstance(classes["adapter"], Problem)


@pytest.mark.parametrize(
    ("method", "reason"),
    [("adalora", "adalora's shapes change during training"), ("pissa", "pissa rewrites the base's weights")],
)
def test_methods_that_cannot_be_averaged_are_refused_with_the_reason(method, reason):
    """Catches: a bare list of names for somebody who asks for a method that peft has."""
    with pytest.raises(ConfigError, match=reason) as caught:
        parse({"adapter": {"method": method, "rank": 4}})
    assert [problem.key for problem in caught.value.problems] == ["adapter.method"]
    assert '"lora"' in caught.value.problems[0].hint


def test_pissa_is_refused_with_the_reason_where_peft_has_it_too():
    """Catches: a bare list of names for somebody who writes what peft calls an initialisation."""
    with pytest.raises(ConfigError, match="pissa rewrites the base's weights") as caught:
        parse({"adapter": {"method": "lora", "init": "pissa_niter_4"}})
    assert [problem.key for problem in caught.value.problems] == ["adapter.init"]


def test_a_changed_run_is_the_one_whose_file_says_so():
    """Catches: a change without its rules or what follows from it; a table's other keys lost; the first run touched."""
    raw = {"run": {"rounds": 3}, "privacy": {"examples": {"noise_multiplier": 1.5, "delta": 1e-6}}}
    config = parse(raw)
    found = changed(config, {"run.seed": 7, "privacy.examples.delta": 1e-7, "train": {"local_steps": 9}})
    examples = {"noise_multiplier": 1.5, "delta": 1e-7}
    assert found == parse(
        {"run": {"rounds": 3, "seed": 7}, "privacy": {"examples": examples}, "train": {"local_steps": 9}}
    )
    assert config == parse(raw)
    private = changed(parse({}), {"privacy.mode": "central", "privacy.noise_multiplier": 1.0})
    assert private.adapter.freeze_a == "yes"
    assert changed(config, {}) == config


@pytest.mark.parametrize(
    "changes", [{"train.epochs": 3}, {"trian.rounds": 3}, {"run.rounds": -1}, {"run": 3}, {"run.rounds.first": 3}]
)
def test_a_change_that_does_not_fit_is_refused(changes):
    """Catches: values that no file could have, which are found out in the middle of a run."""
    with pytest.raises(ConfigError):
        changed(parse({}), changes)
