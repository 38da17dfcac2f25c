"""Run files, overrides, and Flower's run config."""

import itertools
import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.config.files import (
    changes,
    commented,
    expand,
    from_run_config,
    override,
    read,
    run_config_defaults,
    to_run_config,
    to_toml,
    with_absolute_paths,
)
from tsugiki.common.config.parse import families, parse, section_classes
from tsugiki.common.errors import ConfigError
from tsugiki.common.privacy.settings import ExamplePrivacySection
from tsugiki.common.strategies import STRATEGIES
from tsugiki.common.tasks import TASKS

ROOT = Path(__file__).resolve().parents[3]
COMBINATIONS = [
    (task, method, strategy)
    for task, method, strategy in itertools.product(TASKS.names(), ADAPTERS.names(), STRATEGIES.names())
    if not STRATEGIES.get(strategy).needs_lora or method == "lora"
]

each_combination = pytest.mark.parametrize(("task", "method", "strategy"), COMBINATIONS)


def chosen(task, method, strategy, **more):
    """Return a raw run of one combination, with a quorum that suits every strategy."""
    names = {"task": {"name": task}, "adapter": {"method": method}, "strategy": {"name": strategy, "min_clients": 5}}
    return names | more


def refused(action, *arguments):
    """Return {key: problem} of what has to be refused."""
    with pytest.raises(ConfigError) as caught:
        action(*arguments)
    return {problem.key: problem for problem in caught.value.problems}


def test_another_strategy_drops_the_defaults_of_the_one_in_the_file():
    """Catches: a run's own file, which names every setting, refused with another strategy; a choice that is lost."""
    raw = tomllib.loads(to_toml(parse({"strategy": {"name": "fedavg", "min_clients": 3}})))
    assert "server_learning_rate" in raw["strategy"]
    other = override(raw, ["strategy.name=svd"])
    assert "server_learning_rate" not in other["strategy"]
    assert other["strategy"]["min_clients"] == 3
    raw["strategy"]["server_learning_rate"] = 0.5
    assert override(raw, ["strategy.name=svd"])["strategy"]["server_learning_rate"] == 0.5
    assert override(raw, ["strategy.min_clients=4"])["strategy"]["server_learning_rate"] == 0.5


def test_there_are_combinations():
    """Catches: empty registries, for which every test below would pass."""
    assert len(COMBINATIONS) >= 2 * 2 * 5


@each_combination
def test_toml_round_trip(task, method, strategy, tmp_path):
    """Catches: a type that TOML writes and strict settings do not read back (tuples, small floats, big numbers)."""
    config = parse(
        chosen(
            task,
            method,
            strategy,
            train={"learning_rate": 1e-07, "local_steps": 1_000_000},
            data={"columns": {"text": 'a "quoted", name', "label": 2}},
        )
    )
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), "utf-8")
    assert read(file) == config


@each_combination
def test_run_config_round_trip(task, method, strategy):
    """Catches: a key that is lost on the way through Flower's flat run config."""
    config = parse(chosen(task, method, strategy, data={"columns": {"text": "sentence", "label": 2}}))
    flat = to_run_config(config)
    assert {type(value) for value in flat.values()} <= {bool, int, float, str}
    assert from_run_config(flat) == config
    assert set(flat) <= set(run_config_defaults())  # Flower refuses overrides of keys that are not in pyproject.toml
    assert from_run_config(run_config_defaults() | flat) == config


TEXT = st.text(min_size=1, max_size=8).map(str.strip).filter(bool)


@given(
    st.lists(TEXT, min_size=2, max_size=4, unique=True),
    st.dictionaries(st.sampled_from(["text", "label"]), st.one_of(TEXT, st.integers(0, 99)), max_size=2),
)
def test_lists_and_tables_survive_the_run_config(labels, columns):
    """Catches: a class called "yes, no" that becomes two; a column called "2" that becomes the third one."""
    config = parse({"task": {"name": "sequence-classification", "labels": labels}, "data": {"columns": columns}})
    back = from_run_config(to_run_config(config))
    assert (back.task.labels, back.data.columns) == (tuple(labels), columns)


def test_a_person_may_write_lists_by_hand():
    """Catches: only JSON being read, when -c 'adapter.target_modules="query, key"' is what people type."""
    config = from_run_config({"adapter.target_modules": "query, key", "data.columns": "text=sentence, label=1"})
    assert config.adapter.target_modules == ("query", "key")
    assert config.data.columns == {"text": "sentence", "label": 1}


def test_an_empty_run_config_value_is_the_default():
    """Catches: "" taken for a value, so that Flower's mandatory defaults could not stand in pyproject.toml."""
    assert from_run_config(run_config_defaults()) == parse({})
    houlsby = run_config_defaults() | {"adapter.method": "houlsby", "adapter.bottleneck": 4}
    assert from_run_config(houlsby).adapter.bottleneck == 4


def test_wrong_run_config_lists_every_problem():
    """Catches: types that Flower does not check going through; keys without a section."""
    assert set(refused(from_run_config, {"train.threads": "'two'", "run.round": 3, "rounds": 1})) == {
        "train.threads",
        "run.round",
        "rounds",
    }


def flattened(table, prefix=""):
    """Return nested tables as dotted keys."""
    flat = {}
    for key, value in table.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_pyproject_holds_the_generated_defaults():
    """Catches: a setting added or changed without pyproject.toml, where Flower looks for known keys."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    found = flattened(pyproject["tool"]["flwr"]["app"]["config"])
    expected = run_config_defaults()
    assert found == expected
    assert {key: type(value) for key, value in found.items()} == {key: type(value) for key, value in expected.items()}


@each_combination
def test_commented_file_is_the_default_run(task, method, strategy):
    """Catches: a written default that differs from the real one, or that does not parse."""
    text = commented(task, method, strategy)
    raw = tomllib.loads(text)
    followed = {"ffa": ["adapter.freeze_a"], "flora": ["adapter.merged_rank"]}.get(strategy, [])
    assert [key for key, *_ in changes(parse(raw))] == followed
    written = {name: dict(table) for name, table in raw.items()}
    tables = {"privacy.examples": written["privacy"].pop("examples")}
    config = parse(raw)
    for name, settings in {**written, **tables}.items():
        section = config
        for part in name.split("."):
            section = getattr(section, part)
        nested = {key for key in type(section).model_fields if f"{name}.{key}" in tables}
        assert set(settings) == set(type(section).model_fields) - nested


def test_descriptions_are_sentences():
    """Catches: a description that continues the one above it, or breaks off."""
    known = families()
    classes = [section for name, section in section_classes({}).items() if name not in known]
    classes += [*known["task"], *known["adapter"], *known["strategy"], ExamplePrivacySection]
    found = [field.description for section in classes for field in section.model_fields.values()]
    assert len(found) > 100
    assert [text for text in found if text[0].islower() or not text.endswith(".")] == []


def test_commented_refuses_an_unknown_name():
    """Catches: a KeyError for a typing error on the command line."""
    assert set(refused(commented, "poetry", "lora", "fedavg")) == {"task.name"}


def test_every_example_file_is_right(monkeypatch):
    """Catches: examples that no longer run."""
    monkeypatch.setenv("TSUGIKI_DATA", "/data")
    files = sorted((ROOT / "examples").glob("*.toml"))
    assert files
    for file in files:
        if "run" in tomllib.loads(file.read_text("utf-8")):  # else a site.toml
            assert read(file).simulation.data


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("run.name=clauses", "clauses"),
        ('run.name="clauses"', "clauses"),
        ("run.rounds=3", 3),
        ("train.learning_rate=1e-4", 1e-4),
        ("train.persist_optimizer=true", True),
        ("task.labels=['a', 'b']", ["a", "b"]),
        ("data.columns={text='sentence'}", {"text": "sentence"}),
        ("evaluation.data=a=b.csv", "a=b.csv"),
        ("model.name=", ""),
        ("run.name=two words\nmore", "two words\nmore"),
    ],
)
def test_override_reads_toml_or_else_text(assignment, value):
    """Catches: numbers left as text; a value cut at its second equals sign."""
    section, key = assignment.split("=")[0].split(".")
    assert override({}, [assignment]) == {section: {key: value}}


def test_override_wins_and_leaves_the_rest():
    """Catches: a section replaced as a whole; the caller's dictionary changed."""
    raw = {"run": {"name": "a", "rounds": 1}, "train": {"threads": 1}}
    assert override(raw, ["run.rounds=2", "run.rounds=3"]) == {
        "run": {"name": "a", "rounds": 3},
        "train": {"threads": 1},
    }
    assert raw["run"]["rounds"] == 1


def test_wrong_overrides_are_listed():
    """Catches: an override without a section or without a value that is dropped silently."""
    with pytest.raises(ConfigError) as caught:
        override({}, ["rounds=3", "run.rounds", "run.rounds=3", "=x"])
    assert [problem.value for problem in caught.value.problems] == ["rounds=3", "run.rounds", "=x"]


@pytest.mark.parametrize(
    ("raw", "assignment", "key"),
    [
        ({"privacy": {"examples": '{"target_epsilon": 3.0}'}}, "privacy.examples.delta=1e-6", "privacy.examples"),
        ({"privacy": {"examples": 3}}, "privacy.examples.delta=1e-6", "privacy.examples"),
        ({"data": {"columns": "text=sentence"}}, "data.columns.label=y", "data.columns"),
    ],
)
def test_an_override_inside_of_what_is_no_table_is_refused(raw, assignment, key):
    """Catches: an override that empties what the file says, DP-SGD's budget above all, or that does nothing."""
    with pytest.raises(ConfigError, match="as a whole") as caught:
        override(raw, [assignment])
    assert [problem.key for problem in caught.value.problems] == [key]


def test_override_of_what_is_no_section(tmp_path):
    """Catches: a TypeError where the file says `run = 3` and the command line `--set run.rounds=2`."""
    file = tmp_path / "run.toml"
    file.write_text("run = 3\n")
    assert set(refused(read, file, ["run.rounds=2"])) == {"run"}


def test_expand_replaces_variables_and_home(monkeypatch):
    """Catches: expansion in values that are no paths, or in some path settings only."""
    monkeypatch.setenv("DATA", "/data")
    monkeypatch.setenv("HOME", "/home/me")
    raw = {
        "run": {"output_dir": "~/runs", "name": "$DATA"},
        "evaluation": {"data": "${DATA}/dev.csv"},
        "simulation": {"data": "$DATA/train.csv", "column": "$DATA"},
    }
    assert expand(raw) == (
        {
            "run": {"output_dir": "/home/me/runs", "name": "$DATA"},
            "evaluation": {"data": "/data/dev.csv"},
            "simulation": {"data": "/data/train.csv", "column": "$DATA"},
        },
        [],
    )


def test_a_missing_variable_is_one_problem_among_others(tmp_path, monkeypatch):
    """Catches: "$DATA/train.csv" taken for a path; a file of which only the missing variables are reported."""
    monkeypatch.delenv("DATA", raising=False)
    file = tmp_path / "run.toml"
    file.write_text('[run]\nrounds = -1\n[simulation]\ndata = "${DATA}/a.csv"\n[evaluation]\ndata = "$DATA/b.csv"\n')
    found = refused(read, file)
    assert set(found) == {"run.rounds", "simulation.data", "evaluation.data"}
    assert found["evaluation.data"].expected == "a path whose environment variables are set"


@pytest.mark.parametrize("content", [None, b"[run\n", b"\xff\xfe", b"a = 1\na = 2\n", b"a = " + b"[" * 100_000])
def test_a_file_that_cannot_be_read(tmp_path, content):
    """Catches: a traceback for a missing file, a syntax error or a file in another encoding."""
    file = tmp_path / "run.toml"
    if content is not None:
        file.write_bytes(content)
    assert set(refused(read, file)) == {"file"}
    assert set(refused(read, tmp_path)) == {"file"}


def test_an_exported_adapter_that_a_task_names_is_found_from_everywhere(tmp_path, monkeypatch):
    """Catches: a server in another folder that looks for the reward there; a name of a site's that becomes a path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reward").mkdir()
    for name, wanted in (("reward", str(tmp_path / "reward")), ("judge", "judge"), ("", "")):
        config = parse({"task": {"name": "rlhf", "reward_adapter": name}})
        assert with_absolute_paths(config).task.reward_adapter == wanted


def test_absolute_paths(tmp_path, monkeypatch):
    """Catches: a path left relative; an empty path, which means "none", turned into the current folder."""
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(parse({"evaluation": {"data": "dev.csv"}}))
    assert (config.run.output_dir, config.evaluation.data) == (str(tmp_path / "runs"), str(tmp_path / "dev.csv"))
    assert config.simulation.data == ""
    (tmp_path / "tone").mkdir()
    fused = with_absolute_paths(parse({"adapter": {"method": "fusion", "adapters": ["tone", "org/topic"]}}))
    assert fused.adapter.adapters == (str(tmp_path / "tone"), "org/topic")


def test_changes_lists_what_differs_in_the_order_of_the_file():
    """Catches: a changed setting that `config show` does not show."""
    config = parse({"train": {"threads": 1}, "run": {"rounds": 3}, "task": {"labels": ["a", "b"]}})
    assert changes(config) == [
        ("run.rounds", 3, 10),
        ("task.labels", ("a", "b"), ()),
        ("train.threads", 1, 2),
    ]
