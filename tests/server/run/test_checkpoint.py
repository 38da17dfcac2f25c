import json
import os
from dataclasses import fields, replace

import numpy as np
import pytest

from tsugiki.common.errors import StorageError
from tsugiki.server.run import checkpoint
from tsugiki.server.run.checkpoint import State, load, promote_previous, save

CONFIG, SPEC = "c" * 64, "d" * 64


def state(round_=1, **changes):
    """Return a state whose every field differs from its default."""
    vector = np.arange(6, dtype=np.float32) + round_
    moments = {"m_t": np.linspace(0, 1, 6), "v_t": np.linspace(1, 2, 6) + 1e-12}
    known = {
        "evaluated_round": round_,
        "best_metric": 0.1 + 0.2,
        "best_round": round_ - 1,
        "evaluations_since_best": 4,
        "strategy": moments,
        "record": {"round": round_, "accepted": {"site-0": {"loss": 0.3}}},
    }
    return State(vector, vector - 1, round_, **{**known, **changes})


@pytest.fixture
def folder(tmp_path):
    """A folder with the checkpoints of rounds 1 and 2."""
    save(tmp_path, state(1), CONFIG, SPEC)
    save(tmp_path, state(2), CONFIG, SPEC)
    return tmp_path


def code(folder, config=CONFIG, spec=SPEC):
    """Return the code with which a checkpoint is refused."""
    with pytest.raises(StorageError) as caught:
        load(folder, config, spec)
    return caught.value.code


def same(one, other):
    """Whether two states are equal, bit for bit."""
    arrays = [(one.vector, other.vector), (one.best_vector, other.best_vector)]
    arrays += [(one.strategy[name], other.strategy[name]) for name in one.strategy]
    names = {part.name for part in fields(State)} - {"vector", "best_vector", "strategy"}
    plain = {name: (getattr(one, name), getattr(other, name)) for name in names}
    return (
        set(one.strategy) == set(other.strategy)
        and all(a.dtype == b.dtype and a.tobytes() == b.tobytes() for a, b in arrays)
        and all(a == b for a, b in plain.values())
    )


def test_what_is_saved_is_loaded(folder):
    """Catches: a field that is left out, moments cut to float32, a metric rounded on its way."""
    assert same(load(folder, CONFIG, SPEC), state(2))


def test_a_state_without_anything_is_loaded_too(tmp_path):
    """Catches: None or an empty strategy that does not come back."""
    empty = State(np.zeros(2, np.float32), np.zeros(2, np.float32))
    save(tmp_path, empty, CONFIG, SPEC)
    assert same(load(tmp_path, CONFIG, SPEC), empty)


def test_only_the_last_two_rounds_are_kept(folder):
    """Catches: a folder that grows with every round, and one that loses the round before."""
    save(folder, state(3), CONFIG, SPEC)
    save(folder, replace(state(3), evaluated_round=2), CONFIG, SPEC)
    names = sorted(path.name.split("-")[1] for path in folder.glob("*.safetensors"))
    assert names == ["000002", "000003"]
    assert sorted(path.name for path in folder.glob("*.json")) == ["current.json", "previous.json"]


def test_the_previous_checkpoint_is_that_of_the_round_before(folder):
    """Catches: a second checkpoint of the same round pushing out the round before it."""
    save(folder, replace(state(2), evaluations_since_best=0), CONFIG, SPEC)
    promote_previous(folder)
    assert same(load(folder, CONFIG, SPEC), state(1))


def test_the_previous_one_is_taken_only_when_that_is_asked(folder):
    """Catches: a silent fall-back, which would train a round again without anyone noticing."""
    damaged = folder / json.loads((folder / "current.json").read_bytes())["tensors"]
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert code(folder) == "checkpoint-corrupt"
    promote_previous(folder)
    assert load(folder, CONFIG, SPEC).round == 1


def test_promoting_needs_a_whole_previous_checkpoint(folder):
    """Catches: a good current checkpoint replaced by a damaged previous one."""
    damaged = folder / json.loads((folder / "previous.json").read_bytes())["tensors"]
    damaged.write_bytes(b"")
    with pytest.raises(StorageError) as caught:
        promote_previous(folder)
    assert caught.value.code == "checkpoint-corrupt"
    assert load(folder, CONFIG, SPEC).round == 2


def test_a_missing_checkpoint_is_refused(tmp_path):
    """Catches: a FileNotFoundError."""
    assert code(tmp_path) == "checkpoint-missing"
    with pytest.raises(StorageError) as caught:
        promote_previous(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("checkpoint-missing", 5)


def test_another_runs_checkpoint_is_refused(folder):
    """Catches: a run that goes on with other settings or another base model."""
    assert code(folder, config="e" * 64) == "checkpoint-foreign"
    assert code(folder, spec="e" * 64) == "checkpoint-foreign"


def test_tensors_outside_the_folder_are_not_read(folder):
    """Catches: a path in the manifest that is followed out of the folder."""
    manifest = json.loads((folder / "current.json").read_bytes())
    (folder / "inner").mkdir()
    os.replace(folder / manifest["tensors"], folder / "inner" / "x.safetensors")
    manifest["tensors"] = "inner/x.safetensors"
    manifest.pop("sha256")
    manifest["sha256"] = checkpoint._hash(manifest)
    (folder / "current.json").write_text(json.dumps(manifest))
    assert code(folder) == "checkpoint-corrupt"
