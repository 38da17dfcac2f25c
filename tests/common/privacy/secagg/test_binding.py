"""The hashes that keys, masks and shares are bound to."""

from dataclasses import fields, replace

import numpy as np
import pytest

from tests.support.federation import tiny_config
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.privacy.secagg.binding import hash_context, hash_order, hash_terms, signed_text
from tsugiki.common.wire.arrays import encode_numbers
from tsugiki.common.wire.messages import TrainRequest

ORDER = TrainRequest("{}", 1, "5" * 64, 0.0, 0.5, 600.0, "nonce", "")
ADAPTER = encode_numbers(np.arange(3.0))
KEYS = {"a": bytes(64), "b": b"b" * 64}
COUNTS = {"a": 1, "b": 2}


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """A plan with noise."""
    privacy = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 1.0, "delta": 1e-3}
    return make_plan(tiny_config(tmp_path_factory.mktemp("plan"), privacy=privacy), 40)


def changed(value):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + "0" if isinstance(value, str) else value + 1


def test_every_part_of_a_request_is_bound_but_its_nonce_and_settings():
    """Catches: others that are sent another rate's place in the schedule, a deadline of zero, or another adapter."""
    same = hash_order(ORDER, ADAPTER)
    names = [field.name for field in fields(TrainRequest)]
    assert len(names) > 6
    for name in names:
        other = replace(ORDER, **{name: changed(getattr(ORDER, name))})
        assert (hash_order(other, ADAPTER) == same) == (name in ("nonce", "config"))
    assert hash_order(ORDER, encode_numbers(np.arange(3.0) + 1e-9)) != same
    assert hash_order(ORDER, None) != same
    assert len(same) == 32


def test_every_number_of_a_plan_is_bound_but_its_versions(plan):
    """Catches: another noise or another number of clients at the others; sites that a patch release keeps apart."""
    same = hash_terms(bytes(16), 1, "{}", plan, bytes(32))
    names = [field.name for field in fields(plan)]
    assert len(names) > 15
    for name in names:
        other = replace(plan, **{name: changed(getattr(plan, name))})
        assert (hash_terms(bytes(16), 1, "{}", other, bytes(32)) == same) == (name == "versions")
    others = [(b"1" * 16, 1, "{}", bytes(32)), (bytes(16), 2, "{}", bytes(32)), (bytes(16), 1, "{ }", bytes(32))]
    others.append((bytes(16), 1, "{}", b"1" * 32))
    for session, round_number, settings, order in others:
        assert hash_terms(session, round_number, settings, plan, order) != same


def test_every_member_is_bound():
    """Catches: sites that are sent other lists, other counts, or signatures that were exchanged."""
    seen = {
        hash_context(bytes(32), KEYS, COUNTS, {}, 2),
        hash_context(b"1" * 32, KEYS, COUNTS, {}, 2),
        hash_context(bytes(32), KEYS | {"b": b"c" * 64}, COUNTS, {}, 2),
        hash_context(bytes(32), {"a": bytes(64), "c": b"b" * 64}, {"a": 1, "c": 2}, {}, 2),
        hash_context(bytes(32), {"a": bytes(64)}, COUNTS, {}, 2),
        hash_context(bytes(32), KEYS, COUNTS | {"a": 2}, {}, 2),
        hash_context(bytes(32), KEYS, COUNTS, {"a": b"s"}, 2),
        hash_context(bytes(32), KEYS, COUNTS, {"b": b"s"}, 2),
        hash_context(bytes(32), KEYS, COUNTS, {}, 3),
    }
    assert len(seen) == 9


def test_what_is_signed_names_the_site_and_its_keys():
    """Catches: a signature that another site, another session or other keys can be shown with."""
    seen = {signed_text(bytes(32), "a", KEYS["a"]), signed_text(b"1" * 32, "a", KEYS["a"])}
    seen |= {signed_text(bytes(32), "b", KEYS["a"]), signed_text(bytes(32), "a", KEYS["b"])}
    assert len(seen) == 4
