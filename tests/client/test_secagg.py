"""A site's part of secure aggregation, as a server that may mean harm sees it."""

from dataclasses import replace

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, RecordDict

from tests.support.federation import tiny_config
from tsugiki.client import secagg
from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.errors import SecureAggregationError, TsugikiError
from tsugiki.common.keys import POINT_BYTES, fingerprint
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.privacy.secagg.binding import hash_order
from tsugiki.common.privacy.secagg.protocol import new_session
from tsugiki.common.wire.arrays import encode_numbers
from tsugiki.common.wire.messages import StageRequest, TrainRequest

NAMES = ("a", "b", "c", "d")
SIZE, BITS = 40, 32
ORDER = TrainRequest("{}", 1, "5" * 64, 0.0, 0.5, 600.0, "nonce", "")
ADAPTER = encode_numbers(np.zeros(3))


@pytest.fixture
def plan(tmp_path):
    """A plan whose sums take three clients."""
    privacy = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 1.0, "delta": 1e-3}
    config = tiny_config(tmp_path, privacy=privacy, strategy={"min_clients": 3}, simulation={"clients": 4})
    return make_plan(config, SIZE)


class Sites:
    """Four sites in one session, brought as far as a test wants.

    Args:
        plan: of all sites.
        told: by site name, what a site is sent instead: `config`, `plan` or `order`.
        policy: of all sites.
        node_keys: by site name, of the sites that have one.
    """

    def __init__(self, plan, told=None, policy=None, node_keys=None):
        self.plan, self.told, self.policy = plan, told or {}, policy or SitePolicy()
        self.session, self.needed = new_session(), 3
        self.states = {name: RecordDict() for name in NAMES}
        self.keys = {name: self.begin(name, self.states[name], (node_keys or {}).get(name)) for name in NAMES}

    def request(self, name):
        """Return a step's request as this site receives it."""
        return StageRequest(self.told.get(name, {}).get("config", "{}"), 1, self.session, "nonce")

    def plan_of(self, name):
        """Return the plan that this site makes."""
        return self.told.get(name, {}).get("plan", self.plan)

    def begin(self, name, state, key=None):
        """Let a site announce its keys."""
        order = self.told.get(name, {}).get("order", hash_order(ORDER, ADAPTER))
        fields = {"order": order}
        return secagg.answer_keys(state, self.request(name), fields, name, self.plan_of(name), self.policy, key)

    def listed(self, **changes):
        """Return the list of keys as the server sends it."""
        fields = {
            "keys_names": sorted(NAMES),
            "keys_values": [self.keys[name]["public_keys"] for name in sorted(NAMES)],
            "clients": [1] * len(NAMES),
            "needed": self.needed,
        }
        signed = [name for name in sorted(NAMES) if "signed" in self.keys[name]]
        if signed:
            fields |= {"signed_names": signed, "signed_values": [self.keys[name]["signed"] for name in signed]}
        return {**fields, **changes}

    def answer_shares(self, name, plan=None, own_clients=1, policy=None, **changes):
        """Let a site make its shares, from the list or a changed one."""
        wanted = plan or self.plan_of(name)
        state = self.states[name]
        terms = secagg.check_bound(state, self.request(name), self.plan_of(name))
        listed = self.listed(**changes)
        return secagg.answer_shares(state, self.session, listed, wanted, own_clients, terms, policy or self.policy)

    def share(self, **changes_of_a):
        """Exchange shares; return what each site gets beside its train request. Only the first site's list differs."""
        sent = {name: self.answer_shares(name, **(changes_of_a if name == "a" else {})) for name in NAMES}
        sealed = {name: dict(zip(one["sealed_names"], one["sealed_values"], strict=True)) for name, one in sent.items()}
        return {
            to: {
                "session": self.session,
                "sealed_names": sorted(set(NAMES) - {to}),
                "sealed_values": [sealed[sender][to] for sender in sorted(set(NAMES) - {to})],
            }
            for to in NAMES
        }

    def mask(self, needed=3):
        """Go as far as masked vectors of zeros; return them."""
        self.needed = needed
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
    with pytest.raises(TsugikiError) as caught:
        call(*arguments, **options)
    assert caught.value.code == code
    assert isinstance(caught.value, SecureAggregationError) or "site.toml" in str(caught.value)


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
    first, sites.session = sites.session, new_session()
    sites.begin("a", sites.states["a"])
    refused("secagg-refused", sites.unmask, session=first)
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
        ("secagg-refused", {"needed": 2}),
        ("secagg-refused", {"needed": 5}),
        ("secagg-refused", {"needed": "3"}),
    ],
    ids=["too short", "none", "not ours", "too many", "no number", "no keys", "no name", "low", "high", "no threshold"],
)
def test_a_list_of_keys_that_cannot_be_is_refused(plan, code, changes):
    """Catches: counts that make a small sum look large enough; names and sizes taken as they come."""
    sites = Sites(plan)
    refused(code, sites.answer_shares, "a", **changes)


def test_too_few_sites_are_refused_before_anything_is_shared(plan):
    """Catches: a session in which the sum could never be opened, or over fewer clients than the plan's."""
    sites = Sites(plan)
    refused("secagg-too-few", sites.answer_shares, "a", replace(plan, min_clients=5))


def test_too_few_sites_make_no_sum_however_many_clients_they_claim(plan):
    """Catches: two gateways, or one and a server that invents clients, where the plan wants three sites."""
    claimed = replace(plan, max_clients_per_site=50, min_sites=5)
    sites = Sites(plan)
    refused("secagg-too-few", sites.answer_shares, "a", claimed, clients=[1, 50, 50, 50])
    sites = Sites(replace(plan, min_clients=2, min_sites=4))
    sites.mask(needed=4)
    refused("secagg-too-few", sites.unmask, survivors=["a", "b", "c"], dropped=["d"])
    assert "seeds_names" in sites.unmask()


def test_a_stored_session_is_checked(plan):
    """Catches: a damaged state taken for a session."""
    sites = Sites(plan)
    sites.states["a"][secagg.STATE] = ConfigRecord({"step": "masked", "threshold": 3})
    refused("secagg-message", sites.unmask)


def test_a_session_keeps_its_terms(plan):
    """Catches: shares of noise for a thousand clients, in a sum that is opened for three; another adapter later."""
    request = StageRequest("{}", 1, new_session(), "nonce")
    refused("secagg-mismatch", secagg.check_bound, RecordDict(), request, plan)
    sites = Sites(plan)
    state, request = sites.states["a"], sites.request("a")
    assert len(secagg.check_bound(state, request, plan)) == 32
    refused("secagg-mismatch", secagg.check_bound, state, request, replace(plan, min_clients=1000))
    refused("secagg-mismatch", secagg.check_bound, state, replace(request, round=2), plan)
    refused("secagg-mismatch", secagg.check_bound, state, replace(request, config='{"train": 1}'), plan)
    secagg.check_order(state, ORDER, ADAPTER)
    refused("secagg-mismatch", secagg.check_order, state, ORDER, encode_numbers(np.ones(3)))
    refused("secagg-mismatch", secagg.check_order, state, ORDER, None)
    refused("secagg-mismatch", secagg.check_order, state, replace(ORDER, schedule_start=0.4), ADAPTER)
    refused("secagg-message", secagg.answer_keys, state, request, {}, "a", plan, SitePolicy(), None)


TOLD = {
    "other settings": {"config": '{"train": {"learning_rate": 1e-30}}'},
    "another adapter": {"order": hash_order(ORDER, encode_numbers(np.ones(3)))},
    "another schedule": {"order": hash_order(replace(ORDER, schedule_start=0.49), ADAPTER)},
    "another plan": {"plan": {"noise_multiplier": 1e-6}},
}


@pytest.mark.parametrize("told", TOLD.values(), ids=TOLD)
def test_sites_that_were_sent_different_things_open_no_shares(plan, told):
    """Catches: a victim whose update is the sum of three, because the others were made to send zeros or no noise."""
    if "plan" in told:
        told = {"plan": replace(plan, **told["plan"])}
    sites = Sites(plan, told={name: told for name in NAMES if name != "a"})
    received = sites.share()
    for name in NAMES:
        refused("secagg-mismatch", secagg.open_shares, sites.states[name], received[name])
        refused("secagg-refused", secagg.mask, sites.states[name], sites.session, np.zeros(SIZE, np.int64), BITS)


@pytest.mark.parametrize("changes", [{"clients": [1, 2, 1, 1]}, {"needed": 4}], ids=["counts", "threshold"])
def test_sites_that_were_sent_different_lists_open_no_shares(plan, changes):
    """Catches: one site that is sent larger numbers of clients than the others."""
    sites = Sites(replace(plan, max_clients_per_site=2))
    received = sites.share(**changes)
    refused("secagg-mismatch", secagg.open_shares, sites.states["a"], received["a"])
    refused("secagg-mismatch", secagg.open_shares, sites.states["b"], received["b"])


def test_sites_that_were_sent_other_members_open_no_shares(plan):
    """Catches: keys of the server's own in the list of one site alone, in the place of a member's."""
    sites = Sites(plan)
    keys = sites.listed()["keys_values"]
    received = sites.share(keys_values=[*keys[:3], secagg.secagg.start(sites.session, "d").public_keys])
    for name in NAMES:
        refused("secagg-mismatch", secagg.open_shares, sites.states[name], received[name])


def test_clients_at_other_sites_count_as_far_as_the_policy_says(plan, caplog):
    """Catches: counts of the server believed at the shares, or believed again when the sum is opened."""
    claimed = replace(plan, max_clients_per_site=30_000, min_clients=60_001)
    sites = Sites(claimed)
    counts = {"clients": [1, 30_000, 30_000, 30_000]}
    refused("policy-clients", sites.answer_shares, "a", **counts)
    gateways = SitePolicy(clients_counted_per_site=30_000)
    with caplog.at_level("INFO", "tsugiki.client"):
        sites.answer_shares("a", policy=gateways, **counts)
    assert "up to 30000 at each other site, on the server's word" in caplog.text
    few = SitePolicy(clients_counted_per_site=19_999)
    refused("policy-clients", Sites(claimed).answer_shares, "a", policy=few, **counts)


def test_a_sum_takes_the_clients_that_the_site_counts_on(plan):
    """Catches: a threshold by the server's counts, with which a sum is opened that is too small for a site in it."""
    twenty = SitePolicy(clients_counted_per_site=20)
    sites = Sites(replace(plan, max_clients_per_site=30, min_clients=61), policy=twenty)
    counts = {"clients": [1, 30, 30, 30]}
    refused("secagg-refused", sites.answer_shares, "a", needed=3, **counts)
    for name in NAMES:
        sites.answer_shares(name, own_clients=1 if name == "a" else 30, needed=4, **counts)
    record = sites.states["a"].config_records[secagg.COUNTS]
    assert dict(record) == {"a": 1, "b": 20, "c": 20, "d": 20}


# Members


@pytest.fixture(scope="module")
def node_keys():
    """A node key for each site, and one of a site that the server invents."""
    return {name: ec.generate_private_key(ec.SECP384R1()) for name in (*NAMES, "invented")}


def pins(node_keys, *names):
    """Return a policy that pins these sites."""
    return SitePolicy(members=[f"{name} {fingerprint(node_keys[name].public_key())}" for name in names])


def test_pinned_members_share_a_sum(plan, node_keys):
    """Catches: signatures that no honest site can check; a site that has to pin itself."""
    sites = Sites(plan, policy=pins(node_keys, *NAMES), node_keys=node_keys)
    assert all(len(one["signed"]) == 145 for one in sites.keys.values())
    received = sites.share()
    secagg.open_shares(sites.states["a"], received["a"])
    others = pins(node_keys, "b", "c", "d")
    assert Sites(plan, node_keys=node_keys).answer_shares("a", policy=others)["sealed_names"] == ["b", "c", "d"]


def test_a_site_that_the_server_invents_is_refused(plan, node_keys):
    """Catches: a sum of one real site and three of the server's, which opens what the real one sends."""
    policy = pins(node_keys, "a", "b", "c")
    sites = Sites(plan, policy=policy, node_keys=node_keys)
    refused("policy-members:d", sites.answer_shares, "a")  # d is a stranger
    # The server signs with a key of its own in the place of d's.
    with_own = {**node_keys, "d": node_keys["invented"]}
    refused("policy-members:d", Sites(plan, policy=pins(node_keys, *NAMES), node_keys=with_own).answer_shares, "a")
    # Or it does not sign at all.
    bare = Sites(plan, policy=pins(node_keys, *NAMES), node_keys={name: node_keys[name] for name in "abc"})
    refused("policy-members:d", bare.answer_shares, "a")
    assert secagg.COUNTS not in bare.states["a"]


def test_a_key_that_the_server_exchanges_is_refused(plan, node_keys):
    """Catches: the server's own X25519 keys beside a member's node key; a signature of another session or terms."""
    policy = pins(node_keys, *NAMES)
    sites = Sites(plan, policy=policy, node_keys=node_keys)
    listed = sites.listed()
    keys, signed = listed["keys_values"], listed["signed_values"]
    own = secagg.secagg.start(sites.session, "d").public_keys
    refused("secagg-signature", sites.answer_shares, "a", keys_values=[*keys[:3], own])
    old = Sites(plan, policy=policy, node_keys=node_keys).keys["d"]
    exchanged = {
        "keys_values": [*keys[:3], old["public_keys"]],
        "signed_values": [*signed[:3], old["signed"]],
    }
    refused("secagg-signature", sites.answer_shares, "a", **exchanged)
    told = Sites(plan, told={"d": {"config": '{"train": 1}'}}, policy=policy, node_keys=node_keys)
    refused("secagg-signature", told.answer_shares, "a")
    damaged = bytes(POINT_BYTES) + signed[3][POINT_BYTES:]
    refused("secagg-message", sites.answer_shares, "a", signed_values=[*signed[:3], damaged])
    zeros = signed[3][:POINT_BYTES] + bytes(96)
    refused("secagg-signature", sites.answer_shares, "a", signed_values=[*signed[:3], zeros])
    assert sites.answer_shares("a")["sealed_names"] == ["b", "c", "d"]
