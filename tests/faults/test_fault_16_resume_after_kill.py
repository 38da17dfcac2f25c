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
from tsugiki.common import audit
from tsugiki.server.run import aggregate, checkpoint, loop, open_round
from tests.faults.test_fault_16_resume_after_kill import CASES, KILLED, WATCHED, config
from tests.support.federation import run_tiny

rounds = [0]
events = []

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(module, name, before=None, after=None):
    function = getattr(module, name)
    def wrapped(*arguments):
        if before:
            before(*arguments)
        result = function(*arguments)
        if after:
            after(*arguments)
        return result
    setattr(module, name, wrapped)

def collected(ctx, state, number, cohort, judge):
    rounds[0] = number
    if point == "after collect" and number == KILLED:
        kill()

def aggregated(settings, state, number, accepted, folder):
    if point == "after aggregate" and number == KILLED:
        kill()

def happens(event):
    if rounds[0] == KILLED:
        events.append(event)
        if point == "before " + event:
            kill()

def flushed(descriptor):
    name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
    happens("the flush of " + ("the tensors" if name.startswith(".round-") else name))

def renamed(source, target):
    happens("the rename")

def half(path, content):
    with open(path, "ab") as file:
        file.write(content[: len(content) // 2])
    kill()

def written(path, *parts):
    if point == "in the middle of the tensors" and rounds[0] == KILLED:
        half(path.with_name(f".{path.name}.tmp"), b"".join(parts))

def appended(path, records):
    records = [records] if isinstance(records, dict) else records
    if point == f"in the middle of {path.name}" and rounds[0] == KILLED:
        half(path, repr(records[0]).encode())

def saved(*arguments):
    if point == "after the checkpoint" and rounds[0] == KILLED:
        kill()

def finished(*arguments):
    if point == "after the round" and rounds[0] == KILLED:
        kill()

def run():
    wrap(open_round, "collect", after=collected)
    wrap(aggregate, "aggregate", after=aggregated)
    wrap(os, "fsync", flushed)
    wrap(os, "replace", renamed)
    wrap(checkpoint, "write_atomically", written)
    wrap(audit, "append_lines", appended)
    wrap(loop, "append_line", appended)
    wrap(checkpoint, "save", after=saved)
    wrap(loop, "finish_round", after=finished)
    run_tiny(config(Path(sys.argv[1]), name, strategy))

for strategy, point, name in [*CASES, WATCHED]:
    child = os.fork()
    if not child:
        try:
            run()
            if point == "watched":
                Path(sys.argv[1], "events").write_text("\\n".join(events))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    print(name, "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else status)
"""

WRITES = (
    "the flush of audit.jsonl",
    "the flush of the tensors",
    "the rename",
    "the flush of checkpoint",
    "the flush of metrics.jsonl",
)
"""What reaches the disk in one round, in this order."""
POINTS = (
    "after collect",
    "after aggregate",
    "in the middle of audit.jsonl",
    "in the middle of the tensors",
    "after the checkpoint",
    "in the middle of metrics.jsonl",
    "after the round",
    *(f"before {write}" for write in WRITES),
)
MOMENTS = ("after the checkpoint", "after the round", "before the rename", "before the flush of metrics.jsonl")
CASES = [
    *(("fedavg", point, f"fedavg-{number}") for number, point in enumerate(POINTS)),
    *(("fedadam", point, f"fedadam-{number}") for number, point in enumerate(MOMENTS)),
]
WATCHED = ("fedavg", "watched", "watched")
"""A run that is not killed, and notes its writes."""


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
    ended = [*(f"{name} killed" for _, _, name in CASES), "watched 0"]
    assert done.stdout.splitlines() == ended, done.stderr[-2000:]
    return folder


def test_a_round_writes_each_thing_once(folder):
    """Catches: a second save of a round, or a write between which no case here kills the run."""
    events = (folder / "events").read_text().splitlines()
    assert events == list(WRITES)


def lines_of(folder, name):
    """Return the lines of metrics.jsonl without what differs between any two runs: seconds, and what follows from them.

    The aggregation error is measured only in rounds in which there is time for it.
    """
    lines = read_lines(folder / "runs" / name / "metrics.jsonl")
    for line in lines:
        line.pop("seconds")
        line.pop("aggregation_error", None)
        line.pop("train_seconds", None)
        for site in line.get("accepted", {}).values():
            site.pop("seconds")
    return lines


@pytest.mark.parametrize(("strategy", "point", "name"), CASES, ids=[f"{one} {point}" for one, point, _ in CASES])
def test_the_resumed_run_ends_with_the_same_bytes(folder, strategy, point, name):
    """Catches: moments, best round or counts that a checkpoint forgets; half a file taken for whole; doubled rounds."""
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
