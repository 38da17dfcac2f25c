"""Updates that are kept one by one, and moments: in memory or in a file without a name."""

import numpy as np
import pytest

from tsugiki.common.errors import StorageError
from tsugiki.common.strategies import WeightedUpdate
from tsugiki.server.run.kept import KeptMoment, KeptUpdates, let_go

SIZE = 1000


def drawn(count):
    """Return updates of several sites, in an order of arrival that is not that of their names."""
    draw = np.random.default_rng(2)
    names = [f"site-{number}" for number in draw.permutation(count)]
    found = []
    for number, name in enumerate(names):
        update = draw.normal(size=SIZE).astype(np.float32)
        found.append(WeightedUpdate(name, update, 10 + number, 1 + number % 2))
    return found


@pytest.mark.parametrize("held_bytes", [0, 10_000, 10**6])
def test_what_was_kept_comes_back_by_name(held_bytes, tmp_path):
    """Catches: a row of the file under another name; updates lost when the file is begun; weights left out."""
    kept = KeptUpdates(tmp_path, SIZE, held_bytes)
    given = drawn(7)
    for one in given:
        kept.add(one)
    found = kept.updates()
    assert [one.site for one in found] == sorted(one.site for one in given)
    for one, other in zip(found, sorted(given, key=lambda one: one.site), strict=True):
        assert (one.weight, one.clients) == (other.weight, other.clients)
        assert one.update.dtype == np.float32
        assert np.array_equal(one.update, other.update)


def test_beyond_the_bound_nothing_stays_in_memory_and_no_file_has_a_name(tmp_path):
    """Catches: updates that are both written and kept; a file that a killed run leaves behind."""
    kept = KeptUpdates(tmp_path, SIZE, 4 * SIZE * 2)
    for number, one in enumerate(drawn(5), 1):
        kept.add(one)
        held = [other for other in kept._updates if other.update.size]
        assert len(held) == (number if number <= 2 else 0)
    assert kept.write_s > 0
    assert list(tmp_path.iterdir()) == []
    assert len(kept.updates()) == 5


def test_a_full_disk_ends_the_run_with_its_code(tmp_path):
    """Catches: an OSError that reaches the user as a traceback."""
    with pytest.raises(StorageError):
        KeptUpdates(tmp_path / "missing", SIZE, 0).add(drawn(1)[0])


@pytest.mark.parametrize("held_bytes", [0, 10**6])
def test_a_moment_comes_back_as_it_was_written(held_bytes, tmp_path):
    """Catches: blocks in another order; a last block that is still in a buffer; a file with a name."""
    given = np.random.default_rng(3).normal(size=SIZE)
    moment = KeptMoment(tmp_path, SIZE, held_bytes)
    for start in range(0, SIZE, 300):
        moment.add(given[start : start + 300])
    found = moment.vector()
    assert isinstance(found, np.memmap) == (held_bytes == 0)
    assert found.dtype == np.float32
    assert np.array_equal(found, given.astype(np.float32))
    assert list(tmp_path.iterdir()) == []


def test_a_moment_without_a_folder_stays_in_memory():
    """Catches: a file in the current folder."""
    moment = KeptMoment(None, SIZE, 0)
    moment.add(np.ones(SIZE))
    assert not isinstance(moment.vector(), np.memmap)


def test_what_was_let_go_is_read_again(tmp_path):
    """Catches: a mapping whose pages are dropped for good; an array in memory that is touched."""
    moment = KeptMoment(tmp_path, SIZE, 0)
    moment.add(np.arange(SIZE))
    mapped = moment.vector()
    plain = np.arange(SIZE, dtype=np.float32)
    assert mapped[5] == 5
    let_go([mapped, plain])
    assert np.array_equal(mapped, plain)
    assert np.array_equal(plain, np.arange(SIZE))


def test_a_full_disk_under_a_moment_has_its_code(tmp_path):
    """Catches: an OSError that reaches the user as a traceback."""
    with pytest.raises(StorageError):
        KeptMoment(tmp_path / "missing", SIZE, 0)
    moment = KeptMoment(tmp_path, SIZE, 0)
    full = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  # every write to it fails
    moment._file.close()
    moment._file = full
    with full, pytest.raises(StorageError):
        moment.add(np.ones(SIZE))


@pytest.mark.parametrize("held_bytes", [0, 10**6])
def test_updates_are_scaled_where_they_are(held_bytes, tmp_path):
    """Catches: a neighbour's row scaled; a scaled update with its old weight; memory and file that differ in a bit."""
    kept = KeptUpdates(tmp_path, SIZE, held_bytes)
    given = {one.site: one for one in drawn(5)}
    for one in given.values():
        kept.add(one)
    kept.settle({site: number for number, site in enumerate(sorted(given))}, {"site-1": 0.3, "site-4": 0.7})
    factors = {"site-1": np.float32(0.3), "site-4": np.float32(0.7)}
    streamed = {one.site: one for one in kept.one_by_one()}
    assert list(streamed) == list(given)
    for number, one in enumerate(kept.updates()):
        expected = given[one.site].update * factors.get(one.site, np.float32(1))
        assert one.weight == streamed[one.site].weight == number
        assert np.array_equal(one.update, expected)
        assert np.array_equal(streamed[one.site].update, expected)
