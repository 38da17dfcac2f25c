import os
from dataclasses import fields, replace

import numpy as np
import pytest

from tsugiki.common.errors import StorageError
from tsugiki.server.run import checkpoint
from tsugiki.server.run.checkpoint import State, load, promote_previous, read_best, save

CONFIG, SPEC = {"train.learning_rate": 0.01}, "d" * 64


def state(round_=1, **changes):
    """Return a state whose every field differs from its default."""
    vector = changes.pop("vector", np.arange(6, dtype=np.float32) + round_)
    moments = {"m_t": np.linspace(0, 1, 6), "v_t": np.linspace(1, 2, 6) + 1e-12}
    known = {
        "evaluated_round": round_ - 1,
        "best_metric": 0.1 + 0.2,
        "best_round": round_ - 1,
        "evaluations_since_best": 4,
        "strategy": moments,
        "record": {"round": round_, "accepted": {"site-0": {"loss": 0.3}}},
        "norms": (0.1 + 0.2, 2.0),
        "measured_by": "accuracy on dev.csv",
    }
    return State(vector, round_, **{**known, **changes})


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
    arrays = [(one.vector, other.vector)]
    arrays += [(one.strategy[name], other.strategy[name]) for name in one.strategy]
    names = {part.name for part in fields(State)} - {"vector", "strategy"}
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
    empty = State(np.zeros(2, np.float32))
    save(tmp_path, empty, CONFIG, SPEC)
    assert same(load(tmp_path, CONFIG, SPEC), empty)


def kept(folder):
    """Return the rounds whose checkpoints are in a folder."""
    return sorted(checkpoint._round_of(path) for path in folder.iterdir())


def damage(folder, round_):
    """Cut the last byte off the checkpoint of a round."""
    path = next(path for path in folder.iterdir() if checkpoint._round_of(path) == round_)
    path.write_bytes(path.read_bytes()[:-1])


def test_only_the_last_two_rounds_are_kept(folder):
    """Catches: a folder that grows with every round, and one that loses the round before."""
    for number in (3, 4, 5):
        save(folder, state(number), CONFIG, SPEC)
    assert kept(folder) == [3, 4, 5]  # state 4 refers to round 3 as its best
    save(folder, state(6, best_round=6), CONFIG, SPEC)
    save(folder, state(7, best_round=7), CONFIG, SPEC)
    assert kept(folder) == [6, 7]


def test_the_best_rounds_file_is_kept_as_long_as_one_of_the_last_two_refers_to_it(folder):
    """Catches: a best adapter that is deleted as an old one, also where only `--previous` would still need it."""
    best = state(2).vector
    for number in range(3, 7):
        save(folder, state(number, best_round=2), CONFIG, SPEC)
        assert np.array_equal(read_best(folder, load(folder, CONFIG, SPEC)), best)
    assert kept(folder) == [2, 5, 6]
    save(folder, state(7, best_round=6), CONFIG, SPEC)
    assert kept(folder) == [2, 6, 7]
    promote_previous(folder)
    assert np.array_equal(read_best(folder, load(folder, CONFIG, SPEC)), best)
    save(folder, state(7, best_round=6), CONFIG, SPEC)
    save(folder, state(8, best_round=6), CONFIG, SPEC)
    assert kept(folder) == [6, 7, 8]


def test_the_adapter_of_the_state_itself_is_not_read_from_its_file(folder):
    """Catches: a best adapter of another round, where the last round is the best."""
    last = state(2, best_round=2)
    assert read_best(folder, last) is last.vector


def test_of_two_files_of_round_0_the_newer_one_counts(tmp_path):
    """Catches: a random head taken for the best adapter, after a kill between the two saves of round 0."""
    first = State(np.zeros(3, np.float32))
    second = replace(first, vector=np.ones(3, np.float32), record={"warm_head": {}})
    save(tmp_path, first, CONFIG, SPEC)
    kept = next(tmp_path.glob("round-*"))
    content = kept.read_bytes()
    save(tmp_path, second, CONFIG, SPEC)
    kept.write_bytes(content)  # as if it had not been removed any more
    os.utime(kept, ns=(0, 0))
    assert np.array_equal(load(tmp_path, CONFIG, SPEC).vector, second.vector)
    later = replace(second, round=1, best_round=0)
    save(tmp_path, later, "a", "b")
    assert len(list(tmp_path.glob("round-000000-*"))) == 1
    assert np.array_equal(read_best(tmp_path, later), second.vector)


def test_a_damaged_length_beside_a_new_checkpoint_is_no_error(folder):
    """Catches: a MemoryError that ends the run, after its round is safe."""
    files = sorted(folder.glob("round-*"))
    content = bytearray(files[-1].read_bytes())
    content[7] = 64
    files[-1].write_bytes(content)
    save(folder, state(3), CONFIG, SPEC)
    assert same(load(folder, CONFIG, SPEC), state(3))


@pytest.mark.parametrize("lost", [True, False], ids=["missing", "damaged"])
def test_a_lost_best_adapter_is_an_error_that_says_what_is_left(folder, lost):
    """Catches: another adapter taken for the best one, and a StopIteration."""
    for number in range(3, 6):
        save(folder, state(number, best_round=2), CONFIG, SPEC)
    if lost:
        checkpoint._files(folder)[0].unlink()
    else:
        damage(folder, 2)
    last = load(folder, CONFIG, SPEC)  # the last round itself is whole
    with pytest.raises(StorageError, match=r"round 2 .* best adapter.*--which last") as caught:
        read_best(folder, last)
    assert caught.value.code == "checkpoint-corrupt"


def test_a_state_is_written_with_two_flushes_and_one_hash_of_the_adapter(tmp_path, monkeypatch):
    """Catches: a second file with its own flushes, the adapter written or hashed twice, a rename before the flush."""
    happened, hashed = [], []
    flush, rename, sha256 = os.fsync, os.replace, checkpoint._sha256
    monkeypatch.setattr(os, "fsync", lambda number: happened.append("flush") or flush(number))
    monkeypatch.setattr("pathlib.os.replace", lambda *paths: happened.append("rename") or rename(*paths))
    monkeypatch.setattr(checkpoint, "_sha256", lambda content: hashed.append(len(content)) or sha256(content))
    large = state(1, vector=np.zeros(100_000, np.float32), strategy={})
    save(tmp_path, large, CONFIG, SPEC)
    assert happened == ["flush", "rename", "flush"]
    assert hashed.count(100_000) == 1
    hashed.clear()
    save(tmp_path, replace(large, round=2), CONFIG, SPEC, sha256(large.vector.data))
    assert hashed.count(100_000) == 0
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * large.vector.nbytes + 4000
    assert same(load(tmp_path, CONFIG, SPEC), replace(large, round=2, evaluated_round=1))


def test_other_programs_can_read_the_tensors(folder):
    """Catches: a header that only our own reader takes for safetensors."""
    from safetensors.numpy import load_file

    tensors = load_file(checkpoint._newest(folder))
    assert set(tensors) == {"vector", "strategy.m_t", "strategy.v_t"}
    assert tensors["strategy.m_t"].tobytes() == state(2).strategy["m_t"].tobytes()


def test_numbers_are_little_endian_and_contiguous_in_the_file(tmp_path):
    """Catches: bytes written in the order in which they happen to be in memory."""
    moment = np.arange(12, dtype=">f8")[::2]
    save(tmp_path, state(1, strategy={"m_t": moment}), CONFIG, SPEC)
    assert load(tmp_path, CONFIG, SPEC).strategy["m_t"].tobytes() == moment.astype("<f8").tobytes()


def test_temporary_files_of_interrupted_writes_are_removed(folder):
    """Catches: a disk that fills up with half-written adapters, one for each kill."""
    (folder / ".round-000003-x.safetensors.tmp").write_bytes(b"half")
    save(folder, state(3), CONFIG, SPEC)
    assert not list(folder.glob(".*"))


def test_the_previous_checkpoint_is_that_of_the_round_before(folder):
    """Catches: a second checkpoint of the same round counted as the round before it."""
    save(folder, state(2, evaluations_since_best=0), CONFIG, SPEC)
    assert kept(folder) == [1, 2]
    assert load(folder, CONFIG, SPEC).evaluations_since_best == 0
    promote_previous(folder)
    assert same(load(folder, CONFIG, SPEC), state(1))


def test_the_previous_one_is_taken_only_when_that_is_asked(folder):
    """Catches: a silent fall-back, which would train a round again without anyone noticing."""
    damage(folder, 2)
    assert code(folder) == "checkpoint-corrupt"
    promote_previous(folder)
    assert load(folder, CONFIG, SPEC).round == 1


def test_promoting_needs_a_whole_previous_checkpoint(folder):
    """Catches: a good newest checkpoint deleted, when the one before it is damaged or missing."""
    damage(folder, 1)
    with pytest.raises(StorageError) as caught:
        promote_previous(folder)
    assert caught.value.code == "checkpoint-corrupt"
    assert load(folder, CONFIG, SPEC).round == 2
    checkpoint._files(folder)[0].unlink()
    with pytest.raises(StorageError) as caught:
        promote_previous(folder)
    assert caught.value.code == "checkpoint-missing"
    assert load(folder, CONFIG, SPEC).round == 2


def test_nothing_is_removed_beside_a_damaged_checkpoint(folder):
    """Catches: the best adapter deleted, because the damaged checkpoint cannot say that it refers to it."""
    path = checkpoint._newest(folder)
    path.write_bytes(b"x" + path.read_bytes()[1:])
    save(folder, state(3), CONFIG, SPEC)
    assert kept(folder) == [1, 2, 3]


def test_a_missing_checkpoint_is_refused(tmp_path):
    """Catches: a FileNotFoundError."""
    assert code(tmp_path) == "checkpoint-missing"
    with pytest.raises(StorageError) as caught:
        promote_previous(tmp_path)
    assert (caught.value.code, caught.value.exit_status) == ("checkpoint-missing", 5)


def test_a_linked_checkpoint_folder_is_refused(tmp_path):
    """Catches: checkpoints written into the folder behind a link, and its temporary files removed."""
    target = tmp_path / "target"
    target.mkdir()
    (target / ".theirs.tmp").touch()
    (tmp_path / "checkpoint").symlink_to(target)
    with pytest.raises(StorageError) as caught:
        save(tmp_path / "checkpoint", state(), CONFIG, SPEC)
    assert caught.value.code == "linked"
    assert [path.name for path in target.iterdir()] == [".theirs.tmp"]


def test_another_runs_checkpoint_is_refused(folder):
    """Catches: a run that goes on with other settings or another base model."""
    assert code(folder, config={"train.learning_rate": 0.1}) == "checkpoint-foreign"
    assert code(folder, spec="e" * 64) == "checkpoint-foreign"
