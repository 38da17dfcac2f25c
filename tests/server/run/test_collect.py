"""Who is asked in a private round, and that the account is written before anybody is."""

import numpy as np
import pytest
from flwr.app import RecordDict

from tests.support.federation import hurry
from tests.support.private import LEDGER, private_app, private_config, private_context
from tests.support.toy import SPEC, toy_app, toy_config, toy_context, toy_state
from tsugiki.common.audit import verify
from tsugiki.common.errors import NotEnoughSites, StorageError
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.messages import TrainRequest, from_record, to_record
from tsugiki.server.run.collect import address, receive, sample, train_request
from tsugiki.server.run.private_round import collect_uploads
from tsugiki.server.run.replies import Accepted, Rejected
from tsugiki.server.run.roster import Member

SITES = ["a", "b", "c", "d"]
POISSON = {
    "mode": "central",
    "noise_multiplier": 1.0,
    "sampling": "poisson",
    "clients": 200,
    "strategy": {"fraction_train": 0.25, "min_clients": 2},
}


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def greeted(ctx):
    """Return the context once all sites have said hello."""
    ctx.roster.wait(lambda count: None)
    return ctx


def round_of(folder, app, nodes, number=1, fault=None, **options):
    """Collect one private round; return what was collected."""
    ctx = greeted(private_context(folder, app, nodes, private_config(**options), fault))
    return collect_uploads(ctx, ctx.privacy, toy_state(), number, sample(ctx, number, 0), 0)


# Who is asked


@pytest.mark.parametrize("mode", ["central", "local", "distributed"])
def test_all_clients_of_the_cohort_are_asked_without_sampling(mode, tmp_path):
    """Catches: a list of clients where all are meant: secure aggregation refuses it, and it says who is there."""
    asked = []
    options = {"mode": mode, "noise_multiplier": 1.0, "clients": 12, "max_clients_per_site": 3}
    collected = round_of(tmp_path, private_app(SITES, clients=3, asked=asked), 4, **options)
    assert asked == [(site, 1, "") for site in SITES]
    assert [(reply.site, reply.clients) for reply in collected.accepted] == [(site, 3) for site in SITES]
    assert collected.clients == 12
    assert not collected.rejected


def test_a_share_of_the_sites_follows_from_the_seed_without_sampling(tmp_path):
    """Catches: fraction_train taken for a probability in a run that claims no amplification."""
    ctx = greeted(
        private_context(
            tmp_path,
            private_app(SITES),
            4,
            private_config("local", noise_multiplier=1.0, strategy={"fraction_train": 0.5, "min_clients": 2}),
        )
    )
    cohorts = [[member.name for member in sample(ctx, 3, 0)] for _ in range(5)]
    assert len(cohorts[0]) == 2
    assert all(cohort == cohorts[0] for cohort in cohorts)


def test_under_poisson_sampling_each_client_has_a_coin_of_its_own(tmp_path):
    """Catches: sites drawn instead of clients, a fixed number of them, the same ones again, or a reply of others."""
    asked, totals = [], []
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        app = private_app(["a", "b"], clients=100, asked=asked)
        collected = round_of(tmp_path / str(number), app, 2, **POISSON)
        assert [reply.site for reply in collected.accepted] == ["a", "b"]
        totals.append(collected.clients)
    drawn = [[int(client) for client in clients.split(",")] for _, _, clients in asked]
    assert all(one == sorted(set(one)) and one[0] >= 0 and one[-1] < 100 for one in drawn)
    assert totals == [len(drawn[n]) + len(drawn[n + 1]) for n in (0, 2, 4)]
    assert all(5 < total < 110 for total in totals)  # 50 on average; beyond is 7 sigma
    assert len({tuple(one) for one in drawn}) == 6


def test_a_site_of_which_nobody_was_drawn_is_not_asked(tmp_path, monkeypatch):
    """Catches: an empty list, which means all clients."""
    asked, draws = [], iter([[], [4, 7], [0], []])
    monkeypatch.setattr("tsugiki.server.run.privacy.Privacy.sampled", lambda self, clients, site, number: next(draws))
    collected = round_of(tmp_path, private_app(SITES, clients=50, asked=asked), 4, **POISSON)
    assert asked == [("b", 1, "4,7"), ("c", 1, "0")]
    assert [(reply.site, reply.clients) for reply in collected.accepted] == [("b", 2), ("c", 1)]
    assert collected.rejected == []


def test_all_connected_sites_are_candidates_under_poisson_sampling(tmp_path):
    """Catches: sites drawn by the run's seed first, so that a client is in with probability q squared."""
    ctx = greeted(private_context(tmp_path, private_app(SITES, clients=50), 4, private_config(**POISSON)))
    assert [member.name for member in sample(ctx, 1, 0)] == SITES


def test_too_few_connected_clients_stop_a_private_run(tmp_path):
    """Catches: sites counted where clients are meant, or the other way round."""
    config = private_config("local", noise_multiplier=1.0, clients=7, strategy={"min_clients": 6})
    ctx = greeted(private_context(tmp_path, private_app(["a", "b"], clients=3), 2, config))
    assert len(sample(ctx, 1, 0)) == 2
    ctx.roster.drop([1])
    ctx.roster.gather = lambda: None
    with pytest.raises(NotEnoughSites, match="3 clients"):
        sample(ctx, 1, 0)


# The account


@pytest.mark.parametrize("mode", ["central", "local", "distributed"])
def test_uploads_are_in_the_ledger_before_anybody_is_asked(mode, tmp_path):
    """Catches: a charge after the replies are there, which a crash in between would save."""
    seen = []

    def update(site, round_, received):
        seen.append([(line["adversary"], line["round"], line["attempt"]) for line in verify(tmp_path / LEDGER)])
        return np.zeros(SPEC.size, np.float32)

    round_of(tmp_path, private_app(SITES, update), 4, number=2, mode=mode, noise_multiplier=1.0)
    assert seen == [[("uploads", 2, 0)]] * 4


def test_a_ledger_that_cannot_be_written_stops_the_round_before_anybody_is_asked(tmp_path, monkeypatch):
    """Catches: uploads that nobody has written down."""
    asked = []
    ctx = greeted(
        private_context(tmp_path, private_app(SITES, asked=asked), 4, private_config("local", noise_multiplier=1.0))
    )

    def fail(*arguments):
        raise StorageError("no disk", code="disk-full")

    monkeypatch.setattr("tsugiki.common.audit.append_lines", fail)
    with pytest.raises(StorageError):
        collect_uploads(ctx, ctx.privacy, toy_state(), 1, sample(ctx, 1, 0), 0)
    assert asked == []


def test_private_uploads_are_judged_as_such(tmp_path):
    """Catches: an open update taken into a private sum."""
    collected = round_of(tmp_path, toy_app(SITES, rows=10), 4, mode="local", noise_multiplier=1.0)
    assert collected.accepted == []
    assert {reply.reason for reply in collected.rejected} == {"keys"}


# Messages


def test_every_request_has_a_nonce_and_an_addressee_of_its_own():
    """Catches: a nonce for a round, with which one site could answer for another."""
    identify_process()
    members = [Member(site, node, 10, 4, clients=node) for node, site in enumerate(SITES, 1)]
    told = {}

    def content(nonce, node):
        told[node] = nonce
        return RecordDict()

    asked, messages = address(members, 7, "train", content, 30.0)
    assert {node: one.nonce for node, one in asked.items()} == told
    assert len(set(told.values())) == 4
    assert [(one.site, one.rows, one.clients, one.round_number) for one in asked.values()] == [
        (site, 10, node, 7) for node, site in enumerate(SITES, 1)
    ]
    assert [(one.metadata.dst_node_id, one.metadata.ttl) for one in messages] == [(node, 60.0) for node in range(1, 5)]
    evaluated, _ = address(members, 7, "evaluate", content, 30.0)
    assert {one.rows for one in evaluated.values()} == {4}


def test_what_a_site_is_asked(tmp_path):
    """Catches: a schedule that is off by one round; client 0 lost, being false."""
    ctx = toy_context(tmp_path, toy_app(SITES), 4, toy_config(tmp_path, run={"rounds": 4}))
    request = train_request(ctx, 3, "nonce", [0, 5])
    assert (request.round, request.schedule_start, request.schedule_stop) == (3, 0.5, 0.75)
    assert (request.nonce, request.clients, request.deadline_s) == ("nonce", "0,5", 30.0)
    assert request.spec_sha256 == SPEC.sha256
    assert train_request(ctx, 3, "nonce", [0]).clients == "0"
    assert train_request(ctx, 3, "nonce").clients == ""


def test_the_first_reply_that_passes_counts_and_who_is_silent_is_a_dropout(tmp_path):
    """Catches: a second reply averaged again, a good one lost to a later bad one, an end that waits for the silent."""

    def fault(node, reply):
        return {1: [reply, reply], 2: []}.get(node, [reply]) if reply.metadata.message_type == "train" else [reply]

    ctx = greeted(toy_context(tmp_path, toy_app(SITES), 4, fault=fault))
    cohort, verdicts = sample(ctx, 1, 0), iter([1, 2, 3])

    def judge(reply, one):
        good = next(verdicts) != 2
        update = np.ones(SPEC.size, np.float32)
        return Accepted(one.site, update, 1, None, 1, 0.0, 1.0, 0) if good else Rejected(one.site, "norm")

    def content(nonce, node):
        return to_record(train_request(ctx, 1, nonce), encode(toy_state().vector, SPEC))

    asked, messages = address(cohort, 1, "train", content, 30.0)
    assert from_record(TrainRequest, messages[0].content).nonce == asked[1].nonce
    passed, failed = receive(ctx, 1, asked, messages, judge)
    assert [reply.site for reply in passed] == ["a", "d"]
    assert [(reply.site, reply.reason) for reply in failed] == [("b", "silent"), ("c", "norm"), ("a", "duplicate")]
    assert list(ctx.roster.members()) == ["a", "c", "d"]


def test_a_gateway_that_stands_for_too_many_clients_is_refused(tmp_path):
    """Catches: a number of clients that is believed, whatever a site says: its noise would count for all of them."""
    app = private_app(SITES, clients=2)
    options = {"noise_multiplier": 1.0, "clients": 8, "max_clients_per_site": 1, "strategy": {"connect_timeout_s": 1.0}}
    ctx = private_context(tmp_path, app, 4, private_config("distributed", **options))
    with pytest.raises(NotEnoughSites, match="4 refused: clients"):
        ctx.roster.wait(lambda count: None)


def test_waiting_for_sites_is_no_busy_loop(tmp_path, monkeypatch):
    """Catches: a server that asks for nodes as fast as it can while there are enough nodes, but not enough sites."""
    strategy = {"min_clients": 11, "connect_timeout_s": 1.0}
    options = {"secure_aggregation": True, "noise_multiplier": 1.0, "clients": 40, "min_sites": 3, "strategy": strategy}
    options["max_clients_per_site"] = 10
    ctx = private_context(tmp_path, private_app(["a", "b"], clients=10), 2, private_config("distributed", **options))
    calls, look = [], ctx.grid.get_node_ids
    monkeypatch.setattr(ctx.grid, "get_node_ids", lambda: calls.append(1) or look())
    monkeypatch.setattr(type(ctx.grid), "sequential", False, raising=False)
    with pytest.raises(NotEnoughSites, match=r"privacy\.min_sites = 3"):
        ctx.roster.wait(lambda count: None)
    assert len(calls) < 200


def test_a_sum_waits_for_enough_sites(tmp_path):
    """Catches: two gateways that start a round alone where the plan wants three sites: it can only be voided."""
    strategy = {"min_clients": 11, "fraction_train": 0.1, "connect_timeout_s": 1.0}
    options = {"secure_aggregation": True, "noise_multiplier": 1.0, "clients": 40, "min_sites": 3, "strategy": strategy}
    options["max_clients_per_site"] = 10
    (tmp_path / "two").mkdir()
    config = private_config("distributed", **options)
    two = private_context(tmp_path / "two", private_app(["a", "b"], clients=10), 2, config)
    with pytest.raises(NotEnoughSites, match="at 2 of 3 sites"):
        two.roster.wait(lambda count: None)
    four = greeted(private_context(tmp_path, private_app(SITES, clients=10), 4, config))
    assert len(sample(four, 1, 0)) == 3


def test_clients_beyond_the_enrolled_are_refused_and_the_others_go_on(tmp_path):
    """Catches: more clients in a sum than delta and its width allow for; a run that one site too many can end."""
    config = private_config("local", noise_multiplier=1.0, clients=5, strategy={"min_clients": 4})
    ctx = greeted(private_context(tmp_path, private_app(["a", "b", "c"], clients=2), 3, config))
    assert list(ctx.roster.members()) == ["a", "b"]
    assert list(ctx.roster.refused().values()) == ["too-many-clients"]
    assert [member.name for member in sample(ctx, 1, 0)] == ["a", "b"]
