"""Secure aggregation end to end: real sites, real training, and a server that records all it gets."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import Error, RecordDict
from flwr.app.message import make_message
from scipy import stats

from tests.support.federation import distributed_config, hurry, run_tiny
from tests.support.private import plan_of
from tsugiki.common.audit import verify
from tsugiki.common.errors import QuorumNotMet, SecureAggregationError
from tsugiki.common.files import read_lines
from tsugiki.common.keys import point_of
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.wire.arrays import decode_levels
from tsugiki.common.wire.messages import SITE_ERROR
from tsugiki.server.run import secagg

BITS = 32
STEPS = ("query.keys", "query.shares", "train.masked", "query.unmask")


def config(folder, clients=5, least=3, secure=True, seed=0, **privacy):
    """Return a run under distributed noise; a seed makes the noise the same in two runs."""
    changes = {"secure_aggregation": secure, "insecure_noise_seed": seed, **privacy}
    return distributed_config(folder, clients, least, **changes)


def refuse_with(step, nodes):
    """Return a fault: these nodes answer one step with an error."""

    def fault(node, reply):
        failed = reply.metadata.message_type == step and node in nodes
        return [make_message(reply.metadata, error=Error(SITE_ERROR, "site-stopping")) if failed else reply]

    return fault


def lost(step, nodes):
    """Return a fault: the replies of these nodes to one step never arrive."""
    return lambda node, reply: [] if reply.metadata.message_type == step and node in nodes else [reply]


def ledger(folder):
    """Return the epsilons of a run's ledger."""
    return Ledger(folder / "privacy-ledger.jsonl", 1e-3, {}).epsilons()


def test_the_opened_sum_is_the_sum(tmp_path):
    """Catches: masks that do not cancel exactly, or a sum opened with another sign, width or order of names."""
    masked = run_tiny(config(tmp_path / "masked", seed=7))
    plain = run_tiny(config(tmp_path / "plain", secure=False, seed=7))
    assert masked.summary["adapter_sha256"] == plain.summary["adapter_sha256"]
    sites = run_tiny(config(tmp_path / "sites", least=2, min_sites=5, seed=7))  # the most shares that there are
    few = run_tiny(config(tmp_path / "few", least=2, secure=False, seed=7))
    assert sites.summary["adapter_sha256"] == few.summary["adapter_sha256"]
    other = run_tiny(config(tmp_path / "other", seed=8))
    assert other.summary["adapter_sha256"] != plain.summary["adapter_sha256"]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("how", [refuse_with, lost])
def test_dropouts_at_each_step_are_survived(tmp_path, monkeypatch, step, how):
    """Catches: a sum lost with one site; a dropped site's masks left in the sum; a site in it that dropped before."""
    if how is lost:
        hurry(monkeypatch)
    masked = run_tiny(config(tmp_path / "masked", seed=7), fault=how(step, (2, 4)))
    if step == "query.unmask":  # they are in the sum already
        expected = run_tiny(config(tmp_path / "plain", secure=False, seed=7))
    else:
        expected = run_tiny(config(tmp_path / "plain", secure=False, seed=7), fault=how("train", (2, 4)))
    assert masked.summary["adapter_sha256"] == expected.summary["adapter_sha256"]
    line = read_lines(masked.folder / "metrics.jsonl")[-1]
    assert len(line["accepted"]) == (5 if step == "query.unmask" else 3)
    assert sorted(line["rejected"]) == ["site-1", "site-3"]


@pytest.mark.parametrize("step", STEPS[:3])
@pytest.mark.parametrize("least", [{"least": 4}, {"least": 2, "min_sites": 4}], ids=["clients", "sites"])
def test_below_the_least_number_nothing_is_opened_and_nothing_charged(tmp_path, step, least):
    """Catches: a sum over too few clients or sites opened all the same; a charge for masks that say nothing."""
    run = config(tmp_path, **least)
    with pytest.raises(QuorumNotMet):
        run_tiny(run, fault=refuse_with(step, (2, 4)))
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "privacy-ledger.jsonl").exists()
    ended = [event for event in verify(folder / "audit.jsonl") if event["event"] == "secagg-ended"]
    assert [event["code"] for event in ended] == ["secagg-too-few"] * 2
    assert "privacy" not in read_lines(folder / "metrics.jsonl")[-1]


def test_a_sum_that_may_have_been_opened_stays_charged(tmp_path):
    """Catches: a server that asks for the shares, fails, and forgets that it could have opened the sum."""
    run = config(tmp_path, least=4)
    with pytest.raises(QuorumNotMet):
        run_tiny(run, fault=refuse_with("query.unmask", (1, 2)))
    epsilons = ledger(tmp_path / "runs" / "tiny")
    assert set(epsilons) == {"sums"}
    lines = verify(tmp_path / "runs" / "tiny" / "privacy-ledger.jsonl")
    assert [(line["round"], line["attempt"]) for line in lines] == [(1, 0), (1, 1)]


def test_the_charge_is_written_before_the_shares_are_asked_for(tmp_path, monkeypatch):
    """Catches: a sum opened first and accounted later, which a crash between them would forget."""
    seen = []
    ask = secagg.Attempt.ask

    def watching(self, step, fields, read):
        path = self.ctx.folder / "privacy-ledger.jsonl"
        seen.append((step, path.exists()))
        return ask(self, step, fields, read)

    monkeypatch.setattr(secagg.Attempt, "ask", watching)
    run_tiny(config(tmp_path))
    assert seen == [("keys", False), ("shares", False), ("unmask", True)]


class Server:
    """Records every reply that reaches the server."""

    def __init__(self):
        self.replies = []

    def __call__(self, node, reply):
        """Note a reply and let it pass."""
        content = RecordDict(dict(reply.content))  # the server removes the arrays from its own
        self.replies.append((reply.metadata.message_type, content))
        return [reply]

    def uploads(self, kind, size):
        """Return the integers of all uploads."""
        found = [content["arrays"] for seen, content in self.replies if seen == kind]
        assert found
        levels = [decode_levels(record, size, BITS).unpacked() for record in found]
        return [one.view(np.uint64) & np.uint64(2**BITS - 1) for one in levels]


def uniform(values):
    """Return the least p-value of a chi-square test of each byte."""
    octets = [((values >> np.uint64(8 * n)) & np.uint64(255)).astype(int) for n in range(BITS // 8)]
    return min(stats.chisquare(np.bincount(one, minlength=256)).pvalue for one in octets)


def test_the_server_sees_uniform_integers_and_nothing_else(tmp_path):
    """Catches: an upload without masks, which fails the same test; a loss, a count or a norm beside it."""
    views = {}
    for secure in (True, False):
        run, server = config(tmp_path / str(secure), secure=secure), Server()
        size = run_tiny(run, fault=server).state.vector.size
        uploads = server.uploads("train.masked" if secure else "train", size)
        views[secure] = uniform(np.concatenate(uploads))
        for kind, content in server.replies:
            extra = {"arrays"} if kind.startswith("train") else {"secagg"}
            if kind == "query":
                assert content.config_records["reply"]["rows"] == 0
                assert content.config_records["reply"]["evaluation_rows"] == 0
                assert content.config_records["reply"]["notes"] == ""
            else:
                assert set(content) == {"reply", *extra}
                assert set(content.config_records["reply"]) == {"site", "round", "nonce"}
    assert views[True] > 1e-6
    assert views[False] < 1e-6


def test_a_sum_that_cannot_be_is_not_added(tmp_path, monkeypatch):
    """Catches: one wrong share of a seed, which opens a random sum, taken for an update; a search without end."""
    opened = secagg.secagg.unmask

    def wrong(total, *arguments):
        return opened(total + np.uint64(2**30), *arguments)

    monkeypatch.setattr(secagg.secagg, "unmask", wrong)
    with pytest.raises(SecureAggregationError) as caught:
        run_tiny(config(tmp_path))
    assert caught.value.code == "secagg-search-failed"
    ended = [event for event in verify(tmp_path / "runs" / "tiny" / "audit.jsonl") if event["event"] == "secagg-ended"]
    assert len(ended) > 2
    assert {event["code"] for event in ended} == {"secagg-norm"}


@pytest.mark.parametrize(
    "keys", [bytes(64), b"\1" + bytes(63), b"\7" * 64], ids=["zero", "low order", "twice the same"]
)
def test_keys_that_the_others_would_refuse_cost_their_site_the_round(tmp_path, keys):
    """Catches: one site's bad keys in everybody's list, which then nobody takes: the run ends."""

    def fault(node, reply):
        if node == 2 and reply.metadata.message_type == "query.keys":
            reply.content.config_records["secagg"]["public_keys"] = keys
        return [reply]

    line = read_lines(run_tiny(config(tmp_path), fault=fault).folder / "metrics.jsonl")[-1]
    assert (len(line["accepted"]), list(line["rejected"])) == (4, ["site-1"])
    assert line["rejected"]["site-1"]["reason"] == "secagg-message"


def announce(**changes):
    """Return a fault: one site's answer to the step keys has other fields."""

    def fault(node, reply):
        if node == 2 and reply.metadata.message_type == "query.keys":
            reply.content.config_records["secagg"].update(changes)
        return [reply]

    return fault


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"counts_on": 0}, "secagg-message"),
        ({"counts_on": True}, "secagg-message"),
        ({"signed": b"short"}, "secagg-message"),
        ({"signed": bytes(145)}, "secagg-message"),
        ({"signed": point_of(ec.generate_private_key(ec.SECP384R1()).public_key()) + bytes(96)}, "secagg-signature"),
    ],
    ids=["no clients", "no number", "short", "no key", "not signed"],
)
def test_an_announcement_that_others_would_refuse_costs_its_site_the_round(tmp_path, changes, code):
    """Catches: one site's bad signature in everybody's list, which those who check it then refuse: the run ends."""
    line = read_lines(run_tiny(config(tmp_path), fault=announce(**changes)).folder / "metrics.jsonl")[-1]
    assert (len(line["accepted"]), list(line["rejected"])) == (4, ["site-1"])
    assert line["rejected"]["site-1"]["reason"] == code


def test_the_threshold_is_that_of_the_site_that_counts_on_least():
    """Catches: a threshold by the counts that sites state, with which a sum is opened that is too small for one."""
    plan = plan_of("distributed", clients=61, secure_aggregation=True)
    counts = {"a": 1, "b": 30, "c": 30, "d": 30}
    assert secagg._threshold(counts, dict.fromkeys(counts, 30), plan) == 3
    assert secagg._threshold(counts, dict.fromkeys(counts, 30) | {"a": 20}, plan) == 4
    assert secagg._threshold(counts, dict.fromkeys(counts, 30) | {"a": 1}, plan) == 3  # it refuses by itself


def test_too_few_to_open_a_sum_are_not_asked_to(tmp_path):
    """Catches: a charge for a sum that cannot be opened, because fewer are left than its threshold."""
    run = config(tmp_path, least=2)
    with pytest.raises(QuorumNotMet):
        run_tiny(run, fault=refuse_with("train.masked", (2, 3, 4)))
    assert not (tmp_path / "runs" / "tiny" / "privacy-ledger.jsonl").exists()


def seal_garbage(others):
    """Return a fault: what site-1 seals for these sites does not open."""

    def fault(node, reply):
        if node == 2 and reply.metadata.message_type == "query.shares":
            fields = reply.content.config_records["secagg"]
            pairs = list(zip(fields["sealed_names"], fields["sealed_values"], strict=True))
            fields["sealed_values"] = [bytes(len(value)) if name in others else value for name, value in pairs]
        return [reply]

    return fault


def test_garbage_for_one_site_makes_that_site_drop_out(tmp_path):
    """Catches: a sum lost, or garbage masked with, because one site's shares do not open at another."""
    run = run_tiny(config(tmp_path, least=4), fault=seal_garbage({"site-3"}))
    line = read_lines(run.folder / "metrics.jsonl")[-1]
    assert sorted(line["accepted"]) == ["site-0", "site-1", "site-2", "site-4"]
    assert {site: one["reason"] for site, one in line["rejected"].items()} == {"site-3": "secagg-mismatch"}


def test_garbage_for_all_ends_the_run_and_the_sites_logs_say_whose_it_was(tmp_path, caplog):
    """Catches: a charge for a sum that nobody can open; a log that hides the only trace of the site that did it."""
    with pytest.raises(QuorumNotMet):
        run_tiny(config(tmp_path, least=4), fault=seal_garbage({"site-0", "site-2", "site-3", "site-4"}))
    folder = tmp_path / "runs" / "tiny"
    assert not (folder / "privacy-ledger.jsonl").exists()
    ended = [event for event in verify(folder / "audit.jsonl") if event["event"] == "secagg-ended"]
    assert [event["code"] for event in ended] == ["secagg-too-few"] * 2
    refusals = [record.getMessage() for record in caplog.records if "do not open" in record.getMessage()]
    assert len(refusals) == 4 * 2
    assert all("as those of 'site-1' do not open" in refusal for refusal in refusals)


def test_a_wrong_share_of_a_dropped_sites_key_opens_nothing_and_is_charged(tmp_path):
    """Catches: masks taken out with a key that is not the dropped site's; shares that were sent, and are free."""

    def fault(node, reply):
        kind = reply.metadata.message_type
        if node == 2 and kind == "query.unmask":
            fields = reply.content.config_records["secagg"]
            fields["mask_keys_values"] = [bytes(len(value)) for value in fields["mask_keys_values"]]
        return refuse_with("train.masked", (4,))(node, reply)

    with pytest.raises(QuorumNotMet):
        run_tiny(config(tmp_path, least=4), fault=fault)
    folder = tmp_path / "runs" / "tiny"
    ended = [event for event in verify(folder / "audit.jsonl") if event["event"] == "secagg-ended"]
    assert [event["code"] for event in ended] == ["secagg-message"] * 2
    assert set(ledger(folder)) == {"sums"}
