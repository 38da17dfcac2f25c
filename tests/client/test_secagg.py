"""A site's part of secure aggregation, as a server that may mean harm sees it."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, RecordDict

from tests.support.federation import tiny_config
from tsugiki.client import secagg
from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.privacy.secagg.protocol import new_session

NAMES = ("a", "b", "c", "d")
SIZE, BITS = 40, 32


@pytest.fixture
def plan(tmp_path):
    """A plan whose sums take three clients."""
    privacy = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 1.0, "delta": 1e-3}
    config = tiny_config(tmp_path, privacy=privacy, strategy={"min_clients": 3}, simulation={"clients": 4})
    return make_plan(config, SIZE)


class Sites:
    """Four sites in one session, brought as far as a test wants."""

    def __init__(self, plan):
        self.plan, self.session = plan, new_session()
        self.states = {name: RecordDict() for name in NAMES}
        self.keys = {name: secagg.answer_keys(self.states[name], self.session, name) for name in NAMES}

    def listed(self, **changes):
        """Return the list of keys as the server sends it."""
        fields = {
            "keys_names": sorted(NAMES),
            "keys_values": [self.keys[name]["public_keys"] for name in sorted(NAMES)],
            "clients": [1] * len(NAMES),
        }
        return {**fields, **changes}

    def share(self):
        """Exchange shares; return what each site gets beside its train request."""
        sent = {
            name: secagg.answer_shares(self.states[name], self.session, self.listed(), self.plan, 1) for name in NAMES
        }
        sealed = {name: dict(zip(one["sealed_names"], one["sealed_values"], strict=True)) for name, one in sent.items()}
        return {
            to: {
                "session": self.session,
                "sealed_names": sorted(set(NAMES) - {to}),
                "sealed_values": [sealed[sender][to] for sender in sorted(set(NAMES) - {to})],
            }
            for to in NAMES
        }

    def mask(self):
        """Go as far as masked vectors of zeros; return them."""
        masked = {}
        for name, fields in self.share().items():
            secagg.open_shares(self.states[name], fields)
            masked[name] = secagg.mask(self.states[name], self.session, np.zeros(SIZE, np.int64), BITS)
        return masked

    def unmask(self, name="a", session=None, **lists):
        """Ask a site to open the sum."""
        fields = {"survivors": sorted(NAMES), **lists}
        return secagg.answer_unmask(self.states[name], session or self.session, fields, self.plan)


def refused(code, call, *arguments, **options):
    """Check that a site refuses with a code."""
    with pytest.raises(SecureAggregationError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code


def test_an_honest_session_is_answered(plan):
    """Catches: tests below that pass because everything is refused."""
    sites = Sites(plan)
    assert all(np.any(vector) for vector in sites.mask().values())
    answer = sites.unmask(survivors=["a", "b", "c"], dropped=["d"])
    assert answer["seeds_names"] == ["a", "b", "c"]
    assert answer["mask_keys_names"] == ["d"]


@pytest.mark.parametrize(
    ("code", "lists"),
    [
        ("secagg-refused", {"survivors": list(NAMES), "dropped": ["d"]}),
        ("secagg-too-few", {"survivors": ["a", "b"], "dropped": ["c", "d"]}),
        ("secagg-refused", {"survivors": ["a", "b", "c"]}),
        ("secagg-refused", {"survivors": ["b", "c", "d"], "dropped": ["a"]}),
        ("secagg-refused", {"survivors": [*NAMES, "mallory"]}),
        ("secagg-message", {"survivors": ["a", "a", "b", "c", "d"]}),
        ("secagg-message", {"survivors": "abcd"}),
    ],
    ids=["overlap", "too few", "not all", "without itself", "a stranger", "twice", "no list"],
)
def test_lists_that_an_honest_server_does_not_send_are_refused(plan, code, lists):
    """Catches: both secrets of a site given away; a sum below n_min opened; another session's clients."""
    sites = Sites(plan)
    sites.mask()
    refused(code, sites.unmask, **lists)
    assert "seeds_names" in sites.unmask()  # refusing gave nothing away, and used nothing up


def test_the_sum_is_opened_once(plan):
    """Catches: a second, smaller list, whose sum differs from the first by one site."""
    sites = Sites(plan)
    sites.mask()
    sites.unmask()
    refused("secagg-refused", sites.unmask, survivors=["a", "b", "c"], dropped=["d"])


def test_nothing_is_masked_twice_and_no_secret_is_kept_after_its_use(plan):
    """Catches: two vectors under the same masks, whose difference is in the clear; seeds that lie about."""
    sites = Sites(plan)
    sites.mask()
    refused("secagg-refused", secagg.mask, sites.states["a"], sites.session, np.ones(SIZE, np.int64), BITS)
    kept = sites.states["a"].config_records[secagg.STATE]
    assert not {"mask_private", "share_private", "seed"} & set(kept)
    sites.unmask()
    assert "held_values" not in sites.states["a"].config_records[secagg.STATE]


def test_another_session_is_refused_and_a_new_one_forgets_the_old(plan):
    """Catches: shares of one round opened in another; old secrets kept for ever."""
    sites = Sites(plan)
    sites.mask()
    refused("secagg-refused", sites.unmask, session=new_session())
    refused("secagg-message", sites.unmask, session=b"short")
    secagg.answer_keys(sites.states["a"], new_session(), "a")
    refused("secagg-refused", sites.unmask)
    refused("secagg-refused", secagg.answer_unmask, RecordDict(), sites.session, {"survivors": list(NAMES)}, plan)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("secagg-message", {"clients": [1, 1, 1]}),
        ("secagg-message", {"clients": [0, 1, 1, 1]}),
        ("secagg-message", {"clients": [2, 1, 1, 1]}),
        ("secagg-refused", {"clients": [1, 2, 1, 1]}),
        ("secagg-message", {"clients": [True, 1, 1, 1]}),
        ("secagg-message", {"keys_values": [b"x"] * 4}),
        ("secagg-message", {"keys_names": ["../a", "b", "c", "d"]}),
    ],
    ids=["too short", "none", "not ours", "too many", "no number", "no keys", "no name"],
)
def test_a_list_of_keys_that_cannot_be_is_refused(plan, code, changes):
    """Catches: counts that make a small sum look large enough; names and sizes taken as they come."""
    sites = Sites(plan)
    refused(code, secagg.answer_shares, sites.states["a"], sites.session, sites.listed(**changes), plan, 1)


def test_too_few_sites_are_refused_before_anything_is_shared(plan):
    """Catches: a session in which the sum could never be opened, or over fewer clients than the plan's."""
    sites = Sites(plan)
    many = replace(plan, min_clients=5)
    refused("secagg-too-few", secagg.answer_shares, sites.states["a"], sites.session, sites.listed(), many, 1)


def test_too_few_sites_make_no_sum_however_many_clients_they_claim(plan):
    """Catches: two gateways, or one and a server that invents clients, where the plan wants three sites."""
    claimed = replace(plan, max_clients_per_site=50, min_sites=5)
    sites = Sites(plan)
    listed = sites.listed(clients=[1, 50, 50, 50])
    refused("secagg-too-few", secagg.answer_shares, sites.states["a"], sites.session, listed, claimed, 1)
    sites.plan = replace(plan, min_clients=2, min_sites=4)
    sites.mask()
    refused("secagg-too-few", sites.unmask, survivors=["a", "b", "c"], dropped=["d"])
    assert "seeds_names" in sites.unmask()


def test_a_stored_session_is_checked(plan):
    """Catches: a damaged state taken for a session."""
    sites = Sites(plan)
    sites.states["a"][secagg.STATE] = ConfigRecord({"step": "masked", "threshold": 3})
    refused("secagg-message", sites.unmask)


def test_a_session_keeps_its_plan(plan):
    """Catches: shares of noise for a thousand clients, in a sum that is opened for three."""
    state = RecordDict()
    refused("secagg-refused", secagg.check_bound, state, plan, 1)
    secagg.bind(state, plan, 1)
    secagg.check_bound(state, plan, 1)
    refused("secagg-refused", secagg.check_bound, state, replace(plan, min_clients=1000), 1)
    refused("secagg-refused", secagg.check_bound, state, plan, 2)
