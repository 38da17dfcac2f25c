import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from tests.support.federation import leaks, run_tiny, tiny_config
from tests.support.toy import federate, toy_app, toy_config
from tsugiki.client.app import simulated_app
from tsugiki.client.prepare import SiteRun
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.common.audit import verify
from tsugiki.common.config.files import read as read_config
from tsugiki.common.config.files import to_run_config
from tsugiki.common.errors import ConfigError, ModelError, NotEnoughSites, StorageError
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.spec import sha256
from tsugiki.server.app import app
from tsugiki.server.engines.in_process import InProcessGrid
from tsugiki.server.run.checkpoint import read_best
from tsugiki.server.run.federation import deployed, run_federation
from tsugiki.server.run.kept import KeptUpdates
from tsugiki.server.run.progress import Progress

AT_SITES = {"evaluation": {"at_sites": True}, "simulation": {"evaluation_fraction": 0.25}}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A finished run."""
    return run_tiny(tiny_config(tmp_path_factory.mktemp("run"), **AT_SITES))


def read_json(path):
    """Return what a JSON file holds."""
    return json.loads(path.read_text())


def test_a_run_leaves_its_files(ran):
    """Catches: a file of the design's list that is not written, and one that nobody planned."""
    names = {path.name for path in ran.folder.iterdir()}
    assert names == {
        ".lock",
        "audit.jsonl",
        "best",
        "checkpoint",
        "config.toml",
        "metrics.jsonl",
        "spec.json",
        "summary.json",
    }
    assert leaks(ran.folder) == []


def test_the_summary_agrees_with_the_lines(ran):
    """Catches: metrics after training taken from before, sums over some of the rounds only."""
    summary, lines = read_json(ran.folder / "summary.json"), read_lines(ran.folder / "metrics.jsonl")
    assert summary == json.loads(json.dumps(ran.summary))
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert [line["sites_eval"]["site-1"]["rows"] for line in lines] == [3, 3, 3]
    # beside the operator's own figures, those of the sites
    assert summary["before"].items() > lines[0]["eval"].items()
    assert summary["after"].items() > lines[summary["best_round"]]["eval"].items()
    assert (summary["rounds"], summary["stopped"]) == (2, "finished")
    assert summary["bytes_up"] == sum(line.get("bytes_up", 0) for line in lines)
    assert summary["adapter_sha256"] == lines[-1]["adapter_sha256"] == sha256(ran.state.vector)
    assert (summary["threads"], summary["strategy"], summary["method"]) == (1, "fedavg", "lora")


def test_training_moves_the_model(ran):
    """Catches: updates that are sent and dropped."""
    lines = read_lines(ran.folder / "metrics.jsonl")
    assert lines[1]["update_norm"] > 0
    assert lines[0]["eval"]["loss"] != lines[-1]["eval"]["loss"]


def test_the_best_adapter_is_written_under_the_models_names(ran):
    """Catches: the last adapter in the best one's place, and tensors in another order or shape."""
    spec, tensors = read_json(ran.folder / "spec.json"), load_file(ran.folder / "best" / "adapter.safetensors")
    assert [[one["name"], tuple(one["shape"])] for one in spec["tensors"]] == [
        [name, tensors[name].shape] for name in sorted(tensors)
    ]
    written = np.concatenate([tensors[name].ravel() for name in sorted(tensors)])
    assert np.array_equal(written, read_best(ran.folder / "checkpoint", ran.state))
    assert sum(tensor.size for tensor in tensors.values()) == spec["adapter_parameters"] + spec["head_parameters"]


def test_the_stored_config_gives_the_same_run(ran):
    """Catches: paths that mean something else in another folder, and settings lost on their way to the file."""
    stored = read_config(ran.folder / "config.toml")
    assert Path(stored.run.output_dir) / stored.run.name == ran.folder
    assert all(Path(path).is_absolute() for path in (stored.evaluation.data, stored.simulation.data, stored.model.name))
    assert verify(ran.folder / "audit.jsonl")[0]["config_sha256"] == stored.sha256


def test_the_audit_log_tells_the_run(ran):
    """Catches: an event of the run that is not recorded."""
    events = [event["event"] for event in verify(ran.folder / "audit.jsonl")]
    assert events == ["started", "hello", "hello", "round", "round", "finished"]


def test_a_run_is_not_started_over_another(ran):
    """Catches: a finished run overwritten."""
    config = read_config(ran.folder / "config.toml")
    with pytest.raises(StorageError) as caught:
        run_tiny(config)
    assert (caught.value.code, caught.value.exit_status) == ("run-exists", 5)


def test_a_finished_run_resumed_is_the_same(ran):
    """Catches: a resume that trains on, or loses lines or the best adapter."""
    before = read_lines(ran.folder / "metrics.jsonl")
    again = run_tiny(read_config(ran.folder / "config.toml"), resume=True)
    assert read_lines(ran.folder / "metrics.jsonl") == before
    assert again.summary == ran.summary
    events = [event["event"] for event in verify(ran.folder / "audit.jsonl")]
    assert events[-4:] == ["resumed", "hello", "hello", "finished"]


def test_a_second_run_in_the_process_starts_where_the_first_did(ran, tmp_path):
    """Catches: a run that starts from the weights that the run before it left in the shared model."""
    config = tiny_config(tmp_path, run={"name": "other"}, **AT_SITES)
    for name in ("train.csv", "dev.csv"):
        (tmp_path / name).write_bytes((ran.folder.parent.parent / name).read_bytes())
    other = run_tiny(config)
    assert other.summary["adapter_sha256"] == ran.summary["adapter_sha256"]
    assert other.summary["before"] == ran.summary["before"]


def test_a_run_that_found_no_sites_can_be_resumed(tmp_path):
    """Catches: a run that can neither be started nor resumed, because its sites came too late for its first start."""
    config = tiny_config(tmp_path)
    with pytest.raises(NotEnoughSites):
        run_tiny(config, lambda config, only="": (simulated_app(config)[0], 1))
    assert run_tiny(config, resume=True).summary["rounds"] == 2


def test_a_start_that_failed_can_be_tried_again(tmp_path):
    """Catches: a mistyped model name that takes the run's name."""
    wrong = tiny_config(tmp_path, model={"name": str(tmp_path / "nowhere")})
    with pytest.raises(ModelError):
        run_tiny(wrong)
    assert run_tiny(tiny_config(tmp_path, run={"rounds": 1})).summary["rounds"] == 1


def test_lines_of_rounds_that_a_crash_undid_are_dropped_and_voided_ones_kept(ran, tmp_path):
    """Catches: two lines for one round after a resume, and attempts forgotten."""
    from tsugiki.server.run.federation import _drop_unfinished

    path = tmp_path / "metrics.jsonl"
    lines = [{"round": 0}, {"round": 1}, {"round": 2, "voided": True}, {"round": 2}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    state = replace(ran.state, round=1)
    assert _drop_unfinished(path, state, evaluated_too=True) == lines[:3]
    assert read_lines(path) == lines[:3]
    assert _drop_unfinished(path, replace(ran.state, round=0), evaluated_too=True) == [lines[0], lines[2]]
    assert read_lines(path) == [lines[0], lines[2]]


HELD_OUT = {"evaluation": {"data": "held-out.csv"}}
"""Of a run whose evaluator is replaced: nobody reads the file."""


def score(monkeypatch, values):
    """Let runs evaluate to these values, one after the other; one more evaluation is an error."""
    remaining = iter(values)

    def evaluate(vector):
        return {"accuracy": next(remaining)}

    monkeypatch.setattr("tsugiki.server.run.federation.make_evaluator", lambda *arguments: evaluate)


def test_a_resumed_run_evaluates_no_round_twice(tmp_path, monkeypatch):
    """Catches: an evaluation that is not in the checkpoint and therefore forgotten: it would be done again."""
    score(monkeypatch, [0.1, 0.5, 0.3, 0.2])
    app = toy_app(["a", "b"])
    whole = federate(monkeypatch, app, 2, toy_config(tmp_path, **HELD_OUT))
    resumed = federate(monkeypatch, app, 2, toy_config(tmp_path, **HELD_OUT), resume=True)
    assert (resumed.state.best_round, resumed.state.best_metric, resumed.state.evaluations_since_best) == (1, 0.5, 2)
    assert resumed.state.evaluated_round == 3
    assert resumed.summary["best_sha256"] == whole.summary["best_sha256"]


def test_a_run_whose_best_adapter_is_lost_is_not_resumed(tmp_path, monkeypatch):
    """Catches: rounds trained for hours, after which the best adapter cannot be written."""
    score(monkeypatch, [0.1, 0.5, 0.3, 0.2])
    done = federate(monkeypatch, toy_app(["a", "b"]), 2, toy_config(tmp_path, **HELD_OUT))
    (best,) = (done.folder / "checkpoint").glob("round-000001-*")
    best.write_bytes(best.read_bytes()[:-1])
    with pytest.raises(StorageError) as caught:
        federate(monkeypatch, toy_app(["a", "b"]), 2, toy_config(tmp_path, **HELD_OUT), resume=True)
    assert caught.value.code == "checkpoint-corrupt"


def test_a_deployed_run_counts_on_no_simulated_clients(tmp_path):
    """Catches: a plan over the clients of a simulation that real sites do not have."""
    privacy = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}
    config = tiny_config(tmp_path, privacy=privacy, simulation={"clients": 40, "clients_per_site": 10})
    found = make_plan(deployed(config), 10)
    assert (found.enrolled_clients, found.max_clients_per_site) == (config.strategy.min_clients, 1)
    found = make_plan(config, 10)
    assert (found.enrolled_clients, found.max_clients_per_site) == (40, 10)


def test_the_flower_app_reads_its_run_config(tmp_path, capsys):
    """Catches: a setting that Flower's run config does not carry to the ServerApp."""
    config = tiny_config(tmp_path, run={"rounds": 1}, evaluation={"data": ""})
    client, nodes = simulated_app(config)
    grid = InProcessGrid(client, nodes)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=to_run_config(config))
    app(grid, context)
    assert read_json(tmp_path / "runs" / "tiny" / "summary.json")["rounds"] == 1
    assert "round 1, loss" in capsys.readouterr().err


@pytest.mark.parametrize("has_bf16", [True, False])
def test_progress_is_told(tmp_path, monkeypatch, has_bf16):
    """Catches: a run that shows nothing; what is unusual about the rows told to the audit log alone.

    Also: bfloat16 that is there and that nobody hears of.
    """
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: has_bf16)
    told = []

    class Recorder(Progress):
        def note(self, text):
            told.append(text)

        def reply(self, site, outcome):
            told.append((site, outcome))

    run_tiny(tiny_config(tmp_path, run={"rounds": 1}, train={"device": "cpu"}), progress=Recorder())
    replies = [("site-0", "accepted"), ("site-1", "accepted")]
    assert [text for text in told[:1] if "this device has bfloat16" in text] == told[:has_bf16]
    del told[:has_bf16]
    cut = "shard-texts-cut: site-0 (8), site-1 (8)"
    start = ["2 of 2 nodes connected", cut, "rows: site-0 12, site-1 12", *replies]
    assert told[: len(start)] == start
    assert all("docs/skew.md" in note for note in told[len(start) :])  # so few rows may disagree


def test_auto_is_a_number_wherever_the_run_is_written_down(tmp_path):
    """Catches: sites or a resumed run that read "auto"; a number that only the log has, or only the files."""
    told = []

    class Recorder(Progress):
        def note(self, text):
            told.append(text)

    given = tiny_config(tmp_path, run={"rounds": 1}, train={"learning_rate": "auto"})
    ran = run_tiny(given, progress=Recorder())
    text = (ran.folder / "config.toml").read_text()
    written = read_config(ran.folder / "config.toml")
    rate = written.train.learning_rate
    assert isinstance(rate, float)
    line = f"train.learning_rate = {rate:g}, for the head {written.train.head_learning_rate:g}"
    assert any(note.startswith(line) for note in told)
    assert text.startswith("# train.learning_rate = ")
    assert (ran.summary["learning_rate"], ran.summary["head_learning_rate"]) == (rate, written.train.head_learning_rate)
    # resumed by its own file, and by the one that still says "auto"
    for config in (written, given):
        again = run_tiny(config, resume=True)
        assert again.summary["adapter_sha256"] == ran.summary["adapter_sha256"]


def test_a_site_refuses_a_rate_that_is_no_number(tmp_path):
    """Catches: a traceback, or a site that chooses a rate of its own."""
    config = tiny_config(tmp_path, train={"learning_rate": "auto"})
    site = simulated_sites(config)[0]
    with pytest.raises(ConfigError, match=r"train\.learning_rate = \"auto\": must be a number"):
        SiteRun.open(site, config)


def test_a_deployed_private_run_says_whom_it_will_refuse(tmp_path):
    """Catches: a third site refused by a default that nobody set; the same said of a simulation, which has all."""
    told = []

    class Recorder(Progress):
        def note(self, text):
            told.append(text)

    for enrolled in (0, 2):
        privacy = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3, "enrolled_clients": enrolled}
        folder = tmp_path / str(enrolled)
        folder.mkdir()
        config = tiny_config(folder, run={"rounds": 1}, privacy=privacy)
        run_federation(InProcessGrid(*simulated_app(config)), config, progress=Recorder())
        assert ("privacy.enrolled_clients is not set: no more than min_clients = 2 may join" in told) == (not enrolled)
        told.clear()
    run_tiny(
        config.model_copy(update={"run": config.run.model_copy(update={"name": "simulated"})}), progress=Recorder()
    )
    assert not [text for text in told if "enrolled_clients" in text]


@pytest.mark.parametrize(("strategy", "ends"), [("fedavg", True), ("svd", False)])
def test_a_full_disk_ends_only_what_needs_the_updates(tmp_path, monkeypatch, strategy, ends):
    """Catches: a run that ends for want of a measurement; a strategy that goes on without the updates it combines."""

    def full(kept, one):
        raise StorageError("the disk is full", code="disk-full")

    monkeypatch.setattr(KeptUpdates, "add", full)
    # with bounds on single sites, updates have to wait for the round's end, too
    unbounded = {"weighting": "rows", "norm_tolerance": 0.0}
    config = tiny_config(tmp_path, run={"rounds": 1}, strategy={"name": strategy, **unbounded})
    if ends:
        outcome = run_tiny(config)
        assert outcome.summary["rounds"] == 1
        assert "aggregation_error" not in read_lines(outcome.folder / "metrics.jsonl")[-1]
    else:
        with pytest.raises(StorageError):
            run_tiny(config)
