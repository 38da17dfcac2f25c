"""Updates that are kept one by one, in memory or in a file without a name."""

import numpy as np
import pytest

from tsugiki.common.errors import StorageError
from tsugiki.common.strategies import WeightedUpdate
from tsugiki.server.run.kept import KeptUpdates

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
