"""`tsugiki budget`: from a run file to numbers, words, JSON and a figure."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tsugiki
from tests.support.federation import tiny_config
from tsugiki import cli
from tsugiki.common.config.files import read, to_toml
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ConfigError, StorageError, UsageError
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.planning import make_plan
from tsugiki.server.budget import budget

PRIVATE = ["--set", "privacy.mode=distributed", "--set", "privacy.target_epsilon=8"]


@pytest.fixture
def file(tmp_path):
    """A tiny run's file, without privacy."""
    path = tmp_path / "run.toml"
    path.write_text(to_toml(tiny_config(tmp_path)))
    return path


def invoke(*arguments):
    """Run the command line in this process; an error of ours is raised."""
    result = CliRunner().invoke(cli.app, ["budget", *map(str, arguments)], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments):
    """Return what `--json` prints, which has to be standard JSON and nothing else."""

    def refuse(name):
        raise AssertionError(name)

    return json.loads(invoke(*arguments, "--json").stdout, parse_constant=refuse)


def test_the_plan_is_the_runs(file):
    """Catches: a plan for another adapter, another number of clients, or other noise than the run's."""
    found = as_json(file, *PRIVATE)
    config = read(file, PRIVATE[1::2])
    spec = load_graft(config, config.model.name, config.run.seed).spec
    plan = make_plan(config, spec.size)
    assert found["assessment"]["plan"] == json.loads(json.dumps(plan.__dict__))
    assert (found["clients"], found["rounds"], found["mode"], found["assumed"]) == (2, 2, "distributed", False)


def test_the_size_is_told_with_a_frozen_and_a_trained_factor(file):
    """Catches: the frozen factor counted, or the head forgotten."""
    size = as_json(file, *PRIVATE)["size"]
    assert size["total"] == size["adapter"] + size["head"]
    assert (size["freeze_a"], size["otherwise"] - size["head"]) == ("yes", 2 * size["adapter"])
    trained = as_json(file, *PRIVATE, "--set", "adapter.freeze_a=no")["size"]
    assert (trained["freeze_a"], trained["total"], trained["otherwise"]) == ("no", size["otherwise"], size["total"])
    base = tiny_config(file.parent).model_dump(mode="json", exclude={"adapter"})
    size = budget.measure(parse({**base, "adapter": {"method": "houlsby", "bottleneck": 2}}))
    assert (size.freeze_a, size.otherwise) == (None, None)


def test_json_is_the_table_with_null_for_what_is_infinite(file):
    """Catches: two accounts of one plan, and `Infinity`, which is no JSON."""
    found = as_json(file, *PRIVATE, "--dimension", 12_880)
    config, mode, assumed = budget.read(file, PRIVATE[1::2])
    expected = budget.make_budget(config, budget.Size(12_880), mode, assumed)
    assert len(found["table"]) == len(expected.table) == 12
    for row, one in zip(found["table"], expected.table, strict=True):
        assert (row["clients"], row["mode"], row["noise_multiplier"]) == (one.clients, one.mode, one.noise_multiplier)
        assert row["noise"]["bound"] == one.noise.bound
        assert row["epsilon"] == {who: None if math.isinf(value) else value for who, value in one.epsilon.items()}
    central = next(row for row in found["table"] if row["mode"] == "central")
    assert central["epsilon"]["uploads"] is None
    views = {view["who"]: view["epsilon"] for view in found["assessment"]["views"]}
    assert views == {view.who: view.epsilon for view in expected.assessment.views}
    text = invoke(file, *PRIVATE, "--dimension", 12_880).stdout
    assert f"{found['table'][-1]['noise_multiplier']:g}" in text


def test_a_mode_of_none_gets_the_comparison_at_an_assumed_epsilon(file):
    """Catches: nothing to say about the run that needs planning most."""
    found = as_json(file, "--dimension", 1_000)
    assert (found["mode"], found["assessment"], found["assumed"], found["target_epsilon"]) == ("none", None, True, 8.0)
    assert {row["mode"] for row in found["table"]} == {"central", "distributed", "local"}
    assert "--set privacy.mode=distributed --set privacy.target_epsilon=8" in invoke(file, "--dimension", 1_000).stdout


def test_a_mode_of_none_is_measured_as_it_would_be_with_privacy(file):
    """Catches: LoRA's A counted, which the modes freeze."""
    assert as_json(file)["size"] == as_json(file, *PRIVATE)["size"]


def test_a_mode_without_a_budget_gets_an_assumed_one(file):
    """Catches: `see tsugiki budget`, said by an error, answered by the same error."""
    found = as_json(file, "--set", "privacy.mode=local", "--dimension", 1_000)
    assert (found["assumed"], found["assessment"]["plan"]["target_epsilon"]) == (True, 8.0)
    given = as_json(file, "--set", "privacy.mode=local", "--set", "privacy.noise_multiplier=4.0", "--dimension", 1_000)
    assert (given["assumed"], given["assessment"]["calibrated"]) == (False, False)
    epsilons = {view["who"]: view["epsilon"] for view in given["assessment"]["views"]}
    assert given["target_epsilon"] == epsilons["uploads"]
    broken = as_json(
        file, "--set", "privacy.mode=local", "--set", "privacy.noise_multiplier=4.0", "--set",
        "privacy.target_epsilon=0.5", "--dimension", 1_000,
    )  # fmt: skip
    assert broken["target_epsilon"] == epsilons["uploads"] > 0.5
    sums = as_json(
        file, "--set", "privacy.mode=distributed", "--set", "privacy.secure_aggregation=true", "--dimension", 9
    )
    assert (sums["assumed"], sums["target_epsilon"], sums["assessment"]["calibrated"]) == (True, 8.0, False)
    assert {view["epsilon"] for view in sums["assessment"]["views"]} == {None}


def test_fewer_than_all_clients_may_be_asked(file):
    """Catches: a bound for clients who are not asked."""
    settings = ["privacy.enrolled_clients=50", "strategy.fraction_train=0.2", "privacy.sampling=fixed"]
    changes = [part for setting in settings for part in ("--set", setting)]
    assert as_json(file, *PRIVATE, *changes, "--dimension", 1_000)["clients"] == 10


@pytest.mark.parametrize("name", ["budget.svg", "budget.PNG"])
def test_a_figure_is_written_beside_the_numbers(file, name):
    """Catches: a figure in place of the output, or none."""
    target = file.parent / name
    assert f"plot: {target}" in invoke(file, *PRIVATE, "--dimension", 1_000, "--plot", target).stdout
    assert target.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    target.unlink()
    assert as_json(file, "--dimension", 1_000, "--plot", target)["mode"] == "none"
    assert target.stat().st_size > 10_000


def test_a_figure_that_cannot_be_written_is_refused(file):
    """Catches: a wrong name found out after the work, and a traceback."""
    for name in ("budget.pdf", "budget"):
        with pytest.raises(UsageError, match=r"\.png or \.svg"):
            invoke(file.parent / "missing.toml", "--plot", name)
    with pytest.raises(StorageError, match="Cannot write"):
        invoke(file, "--dimension", 1_000, "--plot", file.parent / "missing" / "budget.svg")


def test_a_bad_file_is_refused_with_its_problems(file):
    """Catches: a traceback, an error about settings that the user did not write, and a model loaded for nothing."""
    with pytest.raises(ConfigError, match="an existing file"):
        invoke(file.parent / "missing.toml")
    with pytest.raises(ConfigError, match=r"privacy\.delta.*below 1 / 2"):
        invoke(file, *PRIVATE, "--set", "privacy.delta=0.6")
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilon.*left out while privacy"):
        invoke(file, "--set", "privacy.target_epsilon=3.0")
    with pytest.raises(ConfigError, match="one of the sections"):
        invoke(file, "--set", "privacie.mode=local")
    with pytest.raises(ConfigError, match=r"privacy\.mode.*'central', 'local' or 'distributed'"):
        invoke(file, "--set", "privacy.mode=secret")


def test_a_run_that_cannot_be_private_is_told_why(file):
    """Catches: a comparison with modes that the run's other settings exclude."""
    with pytest.raises(ConfigError, match=r"(?s)with .*privacy\.mode=central.*strategy\.name"):
        invoke(file, "--set", "strategy.name=fedmedian", "--dimension", 1_000)


def test_a_budget_that_cannot_be_kept_is_an_error(file):
    """Catches: noise beyond what can be drawn, planned with."""
    with pytest.raises(ConfigError, match=r"privacy\.(target_epsilon|noise_multiplier)"):
        invoke(file, *PRIVATE, "--set", "privacy.target_epsilon=0.00001", "--dimension", 1_000)


def test_with_a_dimension_nothing_heavy_is_loaded(file):
    """Catches: seconds of waiting for a model or a drawing that nobody asked for."""
    script = (
        "import json, sys; from tsugiki import cli\n"
        "from typer.testing import CliRunner\n"
        "done = CliRunner().invoke(cli.app, sys.argv[1:])\n"
        "assert done.exit_code == 0, done.output\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))\n"
    )
    command = [sys.executable, "-c", script, "budget", str(file), *PRIVATE, "--dimension", "1000"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "peft", "flwr", "matplotlib"} & set(json.loads(done.stdout)) == set()


def test_errors_of_the_real_program_are_one_message(tmp_path):
    """Catches: a traceback instead of an exit status."""
    command = [sys.executable, "-m", "tsugiki", "budget", "missing.toml"]
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[0] == "tsugiki: config-invalid: missing.toml: 1 problem"


def test_a_split_by_column_is_planned_too(tmp_path):
    """Catches: the demo's own run file refused, because its number of clients is not told beforehand."""
    file = tmp_path / "run.toml"
    file.write_text(
        '[strategy]\nmin_clients = 4\n[simulation]\ndata = "a.csv"\npartition = "by-column"\ncolumn = "c"\n'
    )
    config, mode, assumed = budget.read(file, [])
    assert (mode, assumed, config.privacy.enrolled_clients) == ("none", True, 4)
