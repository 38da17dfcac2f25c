"""Runs that start from an exported adapter."""

import shutil

import numpy as np
import pytest

from tests.support.exports import export_tiny
from tests.support.federation import model_folder, run_tiny, tiny_config
from tsugiki.common.audit import verify
from tsugiki.common.config.files import read as read_config
from tsugiki.common.errors import Interrupted, ModelError, QuorumNotMet, StorageError
from tsugiki.common.files import read_json, read_lines
from tsugiki.common.model.load import grafts
from tsugiki.common.wire.spec import sha256
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run import checkpoint, federation
from tsugiki.server.run.progress import Progress

CLASSES = {"name": "sequence-classification", "max_length": 16}


class Notes(Progress):
    """Keeps what the operator is shown."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture
def june(tmp_path):
    """An export, and the values in it."""
    folder = tmp_path / "june" / "adapter"
    graft = export_tiny(folder, model_folder(), CLASSES, {"method": "lora", "rank": 2})
    values = graft.read()
    grafts.clear()  # its values were stirred
    return folder, values


def run_from(folder, start, name="july", **sections):
    """Return the settings of a tiny run that starts from an export."""
    adapter = {"start_from": str(start), **sections.pop("adapter", {})}
    run = {"name": name, **sections.pop("run", {})}
    return tiny_config(folder, adapter=adapter, run=run, **sections)


def interrupted(config, replies):
    """Run until some replies have come, and stop."""
    stop = Stop()
    left = [replies]

    def fault(node, reply):
        left[0] -= 1
        if left[0] == 0:
            stop.request()
        return [reply]

    with pytest.raises(Interrupted):
        run_tiny(config, fault=fault, stop=stop)


def test_a_run_starts_from_the_export_and_its_records_name_it(tmp_path, june):
    """Catches: a run that starts from chance, or a head that the linear probe overwrites; a path in the records."""
    folder, values = june
    notes = Notes()
    config = run_from(tmp_path, folder, task={"warm_head": "auto"})
    outcome = run_tiny(config, progress=notes)
    start = {"start_from": "june/adapter", "start_sha256": sha256(values)}
    assert {key: outcome.summary[key] for key in start} == start
    events = verify(outcome.folder / "audit.jsonl")
    assert [event["event"] for event in events] == ["started", "hello", "hello", "round", "round", "finished"]
    assert {key: events[0][key] for key in start} == start
    assert f"starts from june/adapter, values {sha256(values)[:12]}" in notes.lines
    assert "no head before round 1: the run starts from an exported adapter, and keeps its head" in notes.lines
    assert read_lines(outcome.folder / "metrics.jsonl")[0]["round"] == 0
    assert read_config(outcome.folder / "config.toml").adapter.start_sha256 == sha256(values)
    other = run_tiny(tiny_config(tmp_path, run={"name": "chance"}))
    assert "start_from" not in other.summary
    assert other.summary["before"] != outcome.summary["before"]


def test_a_run_that_was_stopped_goes_on_without_the_export(tmp_path, june):
    """Catches: a resume that starts anew, needs a file that is gone, or ends with other bytes."""
    folder, values = june
    whole = run_tiny(run_from(tmp_path, folder, "whole"))
    config = run_from(tmp_path, folder, "parted")
    interrupted(config, 2)  # both hellos: no round is done
    place = tmp_path / "runs" / "parted"
    kept = read_config(place / "config.toml")
    spec = read_json(place / "spec.json")["sha256"]
    assert np.array_equal(checkpoint.load(place / "checkpoint", kept.fixed, spec).vector, values)
    shutil.rmtree(folder)
    parted = run_tiny(kept, resume=True)
    assert parted.summary["adapter_sha256"] == whole.summary["adapter_sha256"]
    assert parted.summary["start_sha256"] == sha256(values)
    with pytest.raises(StorageError) as caught:
        run_tiny(read_config(place / "config.toml", [f"adapter.start_from={tmp_path}"]), resume=True)
    assert (caught.value.code, "adapter.start_from" in caught.value.problem) == ("checkpoint-foreign", True)


def test_an_export_that_does_not_fit_leaves_no_run(tmp_path, june):
    """Catches: a run whose name is taken by a start that was refused."""
    with pytest.raises(ModelError) as caught:
        run_tiny(run_from(tmp_path, june[0], adapter={"rank": 4}))
    assert caught.value.code == "adapter-differs"
    assert not (tmp_path / "runs" / "july" / "config.toml").exists()


def test_a_site_refuses_another_adapter_than_the_run_names(tmp_path, june, monkeypatch):
    """Catches: a hash that only the server has ever compared."""
    honest = federation.started

    def lying(config, graft):
        config, values = honest(config, graft)
        return config, values + np.float32(1e-3)

    monkeypatch.setattr(federation, "started", lying)
    with pytest.raises(QuorumNotMet):
        run_tiny(run_from(tmp_path, june[0]))
    lines = read_lines(tmp_path / "runs" / "july" / "metrics.jsonl")
    reasons = {site: one["reason"] for line in lines for site, one in line.get("rejected", {}).items()}
    assert reasons == {"site-0": "adapter-differs", "site-1": "adapter-differs"}


def test_a_private_run_starts_from_an_export_with_its_frozen_factor(tmp_path):
    """Catches: a private run whose sites train B beside another A than the export's."""
    adapter = {"method": "lora", "rank": 2, "freeze_a": "yes"}
    config = tiny_config(tmp_path)
    values = export_tiny(tmp_path / "adapter", model_folder(), CLASSES, adapter, config.run.seed).read()
    grafts.clear()
    private = {"mode": "central", "noise_multiplier": 0.5, "delta": 1e-3}
    outcome = run_tiny(run_from(tmp_path, tmp_path / "adapter", privacy=private))
    assert outcome.summary["start_sha256"] == sha256(values)
    assert outcome.state.round == 2
