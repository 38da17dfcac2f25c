"""Fault 16: the server is killed at every point of a round; a resumed run ends with the same bytes.

One child process loads the libraries once, and forks for every kill: a fork wraps one function so that the process
kills itself there, and runs the federation until then.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tsugiki
from tests.support.federation import leaks, run_tiny, tiny_config
from tests.support.tiny import tiny_bert
from tsugiki.common.audit import verify
from tsugiki.common.files import read_lines

ROUNDS, KILLED = 3, 2

CHILD = """
import os, signal, sys
from pathlib import Path
import torch, transformers, peft, sklearn.metrics
from tsugiki.server.run import aggregate, checkpoint, loop, open_round
from tests.faults.test_fault_16_resume_after_kill import CASES, KILLED, config
from tests.support.federation import run_tiny

rounds = [0]

def wrap(module, name, dies):
    function = getattr(module, name)
    def wrapped(*arguments):
        here = dies(*arguments)
        if here == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments)
        if here == "after":
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    setattr(module, name, wrapped)

def collected(ctx, state, number, cohort, judge):
    rounds[0] = number
    return "after" if point == "after collect" and number == KILLED else ""

def aggregated(settings, state, number, accepted):
    return "after" if point == "after aggregate" and number == KILLED else ""

def written(path, content):
    if rounds[0] != KILLED or path.parent.name != "checkpoint":
        return ""
    return "before" if point == "between the two files" and path.name == "current.json" else ""

def saved(folder, state, *hashes):
    first = state.round == KILLED and state.evaluated_round < KILLED
    return "after" if point == "after the checkpoint" and first else ""

def appended(path, record):
    return "after" if point == "before the second checkpoint" and record["round"] == KILLED else ""

def run():
    wrap(open_round, "collect", collected)
    wrap(aggregate, "aggregate", aggregated)
    wrap(checkpoint, "write_atomically", written)
    wrap(checkpoint, "save", saved)
    wrap(loop, "append_line", appended)
    run_tiny(config(Path(sys.argv[1]), name, strategy))

for strategy, point, name in CASES:
    child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status)
"""

POINTS = (
    "after collect",
    "after aggregate",
    "between the two files",
    "after the checkpoint",
    "before the second checkpoint",
)
CASES = [
    *(("fedavg", point, f"fedavg-{number}") for number, point in enumerate(POINTS)),
    *(("fedadam", point, f"fedadam-{number}") for number, point in enumerate(POINTS) if number in (2, 3)),
]


def config(folder, name, strategy):
    """Return the run that is killed, or the one that is not."""
    model = {"name": str(folder / "model")}  # for both processes the same, or the configurations differ
    return tiny_config(folder, run={"name": name, "rounds": ROUNDS}, model=model, strategy={"name": strategy})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the killed runs are, and one of each strategy that was not killed."""
    folder = tmp_path_factory.mktemp("runs")
    tiny_bert(folder / "model")
    for strategy in ("fedavg", "fedadam"):
        run_tiny(config(folder, strategy, strategy))
    environment = {**os.environ, "PYTHONPATH": str(Path(tsugiki.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"{name} killed" for _, _, name in CASES], done.stderr[-2000:]
    return folder


def lines_of(folder, name):
    """Return the lines of metrics.jsonl without what differs between any two runs: seconds."""
    lines = read_lines(folder / "runs" / name / "metrics.jsonl")
    for line in lines:
        line.pop("seconds")
        line.pop("train_seconds", None)
        for site in line.get("accepted", {}).values():
            site.pop("seconds")
    return lines


@pytest.mark.parametrize(("strategy", "point", "name"), CASES, ids=[f"{one} {point}" for one, point, _ in CASES])
def test_the_resumed_run_ends_with_the_same_bytes(folder, strategy, point, name):
    """Catches: moments, best adapter or counts that a checkpoint forgets, and rounds done twice or recorded twice."""
    run = folder / "runs" / name
    assert len(lines_of(folder, name)) <= KILLED + 1
    assert verify(run / "audit.jsonl")
    whole = run_tiny(config(folder, strategy, strategy), resume=True)  # a finished run: it only loads
    resumed = run_tiny(config(folder, name, strategy), resume=True)
    assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert resumed.summary["best_sha256"] == whole.summary["best_sha256"]
    assert resumed.state.strategy.keys() == whole.state.strategy.keys()
    for moment, value in whole.state.strategy.items():
        assert resumed.state.strategy[moment].tobytes() == value.tobytes()

    assert [line["round"] for line in lines_of(folder, name)] == list(range(ROUNDS + 1))
    assert lines_of(folder, name) == lines_of(folder, strategy)
    events = verify(run / "audit.jsonl")
    assert {event["round"] for event in events if event["event"] == "round"} == {1, 2, 3}
    assert [event["event"] for event in events].count("resumed") == 1
    assert leaks(run) == []


def test_moments_are_what_makes_the_difference(folder):
    """Catches: a FedAdam case that would also pass if its moments were lost."""
    whole = run_tiny(config(folder, "fedadam", "fedadam"), resume=True)
    assert set(whole.state.strategy) == {"m_t", "v_t"}
    assert all(value.any() for value in whole.state.strategy.values())
