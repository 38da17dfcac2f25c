"""Fault 23: a wrong run file is refused before any message is sent, with all its problems at once."""

import pytest
import tomli_w
from typer.testing import CliRunner

from tsugiki import cli
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ConfigError

WRONG = [
    ({"train": {"learning_rte": 1.0}}, "train.learning_rte", "1.0", "learning_rate"),
    ({"trian": {}}, "trian", "{}", "train"),
    ({"train": 3}, "train", "3", "one of the sections"),
    ({"train": {"learning_rate": "fast"}}, "train.learning_rate", "'fast'", "number"),
    ({"train": {"local_steps": 2.5}}, "train.local_steps", "2.5", "integer"),
    ({"train": {"local_steps": True}}, "train.local_steps", "True", "integer"),
    ({"train": {"learning_rate": -1.0}}, "train.learning_rate", "-1.0", "greater than 0"),
    ({"train": {"learning_rate": float("nan")}}, "train.learning_rate", "nan", "finite"),
    ({"train": {"max_grad_norm": float("inf")}}, "train.max_grad_norm", "inf", "finite"),
    ({"adapter": {"method": "lora", "rank": 0}}, "adapter.rank", "0", "greater than or equal to 1"),
    ({"adapter": {"method": "magic"}}, "adapter.method", "'magic'", "one of"),
    ({"task": {"name": "telepathy"}}, "task.name", "'telepathy'", "one of"),
    ({"strategy": {"name": "fedmagic"}}, "strategy.name", "'fedmagic'", "one of"),
    ({"strategy": {"name": "fedavg", "beta_1": 0.9}}, "strategy.beta_1", "0.9", "a known key"),
    ({"strategy": {"min_clients": 9}, "simulation": {"data": "x.csv"}}, "strategy.min_clients", "9", "at most"),
    (
        {"privacy": {"mode": "none", "target_epsilon": 8.0}},
        "privacy.target_epsilon",
        "8.0",
        'left out while privacy.mode is "none"',
    ),
    ({"privacy": {"mode": "wishful"}}, "privacy.mode", "'wishful'", "none"),
    ({"run": {"name": "../../etc/x"}}, "run.name", "'../../etc/x'", "pattern"),
    ({"run": {"rounds": -1}}, "run.rounds", "-1", "greater than or equal to 0"),
]


@pytest.mark.parametrize(
    ("raw", "key", "value", "expected"), WRONG, ids=[f"{key}={value}" for _, key, value, _ in WRONG]
)
def test_a_wrong_setting_is_named_with_its_value_and_what_is_allowed(raw, key, value, expected):
    """Catches: a setting that is accepted, ignored, or refused without a word about what would be right."""
    with pytest.raises(ConfigError) as caught:
        parse(raw)
    (problem,) = [problem for problem in caught.value.problems if problem.key == key]
    assert problem.value == value
    assert expected in f"{problem.expected} {problem.hint}"
    assert (caught.value.code, caught.value.exit_status) == ("config-invalid", 2)


def test_all_problems_are_told_at_once_and_nothing_is_started(tmp_path, monkeypatch):
    """Catches: an operator who corrects one line after the other, and a run that has begun by then."""
    touched = []
    monkeypatch.setattr("tsugiki.client.app.simulated_app", lambda *arguments: touched.append(arguments))
    monkeypatch.chdir(tmp_path)
    raw = {
        "run": {"rounds": -1, "nmae": "x"},
        "train": {"learning_rate": -1.0},
        "adapter": {"method": "lora", "rank": 0},
        "strategy": {"name": "fedmagic"},
    }
    (tmp_path / "run.toml").write_text(tomli_w.dumps(raw))
    result = CliRunner().invoke(cli.app, ["simulate", "run.toml"])
    assert isinstance(result.exception, ConfigError)
    keys = {problem.key for problem in result.exception.problems}
    assert keys == {"run.rounds", "run.nmae", "train.learning_rate", "adapter.rank", "strategy.name"}
    assert "run.toml: 5 problems" in str(result.exception)
    assert touched == []
    assert [path.name for path in tmp_path.iterdir()] == ["run.toml"]
