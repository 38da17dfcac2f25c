"""Secure aggregation with a site that spoils sums: it is found and left out, and each opened sum is paid for."""

from collections import Counter

import numpy as np
import pytest

from tests.support.federation import app_of_sites, distributed_config, run_tiny, site_folder
from tests.support.private import plan_of, private_app, private_config, private_context
from tsugiki.client import app as client
from tsugiki.client.site.records import BEGUN
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import BudgetError, NotEnoughSites, SecureAggregationError
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.ledger import EVENT as CHARGED
from tsugiki.common.privacy.mechanisms import mechanism_of
from tsugiki.common.wire.arrays import encode_levels
from tsugiki.server.report.page import write_report
from tsugiki.server.run.collect import sample
from tsugiki.server.run.progress import Lines
from tsugiki.server.run.roster import Member
from tsugiki.server.run.suspicion import SUSPECTED, Suspicion

BITS = 32


def config(folder, clients, least, rounds=3, **privacy):
    """Return a run under distributed noise and secure aggregation."""
    run = distributed_config(folder, clients, least, rounds, **privacy)
    return changed(run, {"train.local_steps": 1, "evaluation.every_rounds": rounds})


class Killed(BaseException):
    """What no part of the program catches, as a kill would be."""


class Liar:
    """A site that sends random integers under its mask: always, or in the sums whose turn it is.

    In the round `killed_in` the server is killed.
    """

    def __init__(self, node, turns=None, killed_in=0):
        self.node = node
        self.killed_in = killed_in
        self.turns = turns
        self.draw = np.random.default_rng(0)
        self.asked = Counter()  # who sent a masked sum, by round

    def __call__(self, node, reply):
        """Pass a reply on; the liar's masked sum is exchanged."""
        if reply.metadata.group_id == str(self.killed_in):
            raise Killed
        if reply.metadata.message_type == "train.masked" and not reply.has_error():
            self.asked[int(reply.content.config_records["reply"]["round"]), f"site-{node - 1}"] += 1
            if node == self.node and (self.turns is None or next(self.turns, False)):
                (array,) = reply.content["arrays"].values()
                size = array.numpy().size * 8 // BITS  # an octet each
                reply.content["arrays"] = encode_levels(self.draw.integers(0, 2**BITS, size), BITS)
        return [reply]


def attempts(folder):
    """Return the attempts in metrics.jsonl, as (round, attempt)."""
    seen = Counter()
    found = []
    for line in read_lines(folder / "metrics.jsonl"):
        if line["round"]:
            found.append((line["round"], seen[line["round"]]))
            seen[line["round"]] += 1
    return found


def charges(folder, adversary="sums"):
    """Return what an adversary's ledger was charged for, as (round, attempt)."""
    lines = verify(folder / "privacy-ledger.jsonl")
    return [(line["round"], line["attempt"]) for line in lines if line.get("adversary") == adversary]


def suspected(folder):
    """Return who was named, and until which round; 0: for good."""
    return [(event["site"], event["until"]) for event in verify(folder / "audit.jsonl") if event["event"] == SUSPECTED]


@pytest.mark.parametrize("node", [1, 5])
def test_one_liar_of_five_is_left_out_and_the_run_ends_well(tmp_path, capsys, node):
    """Catches: a run that ends because of one site that sends noise under its mask, with nobody named."""
    liar = Liar(node)
    ran = run_tiny(config(tmp_path, 5, 3), fault=liar, progress=Lines())
    name = f"site-{node - 1}"
    assert ran.summary["rounds"] == 3
    assert {site for site, _ in suspected(ran.folder)} == {name}
    assert f"{name} is suspected of spoiling sums" in capsys.readouterr().err
    last = read_lines(ran.folder / "metrics.jsonl")[-1]
    assert last["left_out"] == [name]
    assert sorted(last["accepted"]) == last["cohort"] == sorted({f"site-{n}" for n in range(5)} - {name})
    # every sum that was opened is on the ledger, in the order in which it was, and no other is
    voided = [line for line in read_lines(ran.folder / "metrics.jsonl") if line.get("voided")]
    assert voided
    assert charges(ran.folder) == attempts(ran.folder)
    for adversary in ("release", "outsiders"):  # that a sum failed follows from who is asked next
        assert charges(ran.folder, adversary) == attempts(ran.folder)
    failed = [event for event in verify(ran.folder / "audit.jsonl") if event["event"] == "secagg-ended"]
    assert [event["code"] for event in failed] == ["secagg-norm"] * len(voided)
    assert all(name in event["sites"] for event in failed)
    assert all(line["rejected"][name]["reason"] == "secagg-norm" for line in voided)
    assert "secagg-norm" in write_report(ran.folder).read_text("utf-8")


@pytest.mark.parametrize(("sites", "node"), [(4, 1), (4, 2), (4, 3), (4, 4), (5, 5)])
def test_with_one_site_more_than_a_sum_takes_any_liar_is_left_out(tmp_path, sites, node):
    """Catches: attempts counted against the sites without the liar, so that the run ends as soon as it is named."""
    ran = run_tiny(config(tmp_path, sites, sites - 1, rounds=1), fault=Liar(node))
    assert {site for site, _ in suspected(ran.folder)} == {f"site-{node - 1}"}
    last = read_lines(ran.folder / "metrics.jsonl")[-1]
    assert sorted(last["accepted"]) == sorted({f"site-{n}" for n in range(sites)} - {f"site-{node - 1}"})
    assert charges(ran.folder) == attempts(ran.folder)


def test_disjoint_groups_find_the_liar_while_rounds_go_on(tmp_path):
    """Catches: an honest half that has to wait; groups that share a site, which would then be in two sums for one."""
    liar = Liar(4)
    ran = run_tiny(config(tmp_path, 6, 3), fault=liar)
    assert suspected(ran.folder) == [("site-3", 0)]
    lines = read_lines(ran.folder / "metrics.jsonl")[1:]
    assert [(line["round"], len(line["accepted"])) for line in lines] == [(1, 0), (1, 3), (2, 3), (3, 5)]
    assert charges(ran.folder) == charges(ran.folder, "release") == [(1, 0), (1, 1), (2, 0), (3, 0)]
    honest = [liar.asked[number, f"site-{n}"] for number in (1, 2, 3) for n in (0, 1, 2, 4, 5)]
    assert honest == [2] * 5 + [1] * 10  # in each attempt, a site is in one sum
    assert [liar.asked[number, "site-3"] for number in (1, 2, 3)] == [2, 1, 0]


def test_a_single_lie_expels_nobody(tmp_path):
    """Catches: an honest site that never comes back, because sums without it happened to pass."""
    ran = run_tiny(config(tmp_path, 4, 3, rounds=7), fault=Liar(4, turns=iter([True])))
    verdicts = suspected(ran.folder)
    assert [site for site, until in verdicts if not until] == []
    last = read_lines(ran.folder / "metrics.jsonl")[-1]
    assert sorted(last["accepted"]) == [f"site-{n}" for n in range(4)]
    assert charges(ran.folder) == attempts(ran.folder)
    assert len(charges(ran.folder)) == 7 + 1


def test_three_sites_are_too_few_to_find_a_liar(tmp_path):
    """Catches: the same sum asked for again, which costs a release and cannot show more; an end without a reason."""
    with pytest.raises(SecureAggregationError, match="3 sites are too few to find it") as caught:
        run_tiny(config(tmp_path, 3, 3), fault=Liar(2))
    assert (caught.value.code, caught.value.exit_status) == ("secagg-search-too-few", 14)
    assert "more than strategy.min_clients = 3" in caught.value.expected
    folder = tmp_path / "runs" / "tiny"
    assert charges(folder) == [(1, 0)]
    assert suspected(folder) == []
    ran = run_tiny(config(tmp_path, 3, 3), resume=True)  # the operator has put the site right
    assert ran.summary["rounds"] == 3


def test_sums_that_fail_with_any_sites_in_them_end_the_run(tmp_path):
    """Catches: a search without end where more than one site lies; honest sites expelled by it for good."""
    liars = [Liar(node) for node in range(1, 6)]
    with pytest.raises(SecureAggregationError) as caught:
        run_tiny(config(tmp_path, 5, 3), fault=lambda node, reply: liars[node - 1](node, reply))
    assert caught.value.code == "secagg-search-failed"
    folder = tmp_path / "runs" / "tiny"
    assert charges(folder) == attempts(folder)
    assert 2 < len(charges(folder)) <= 6


def test_without_budget_for_another_sum_the_run_says_so(tmp_path):
    """Catches: a search that spends more than the clients agreed to."""
    run = config(tmp_path, 5, 3, rounds=1, noise_multiplier=0.0, target_epsilon=8.0)
    with pytest.raises(BudgetError, match="no budget to find it") as caught:
        run_tiny(run, fault=Liar(2))
    assert caught.value.expected == "at most 8"
    assert "audit.jsonl" in caught.value.hint
    assert charges(tmp_path / "runs" / "tiny") == [(1, 0)]


@pytest.mark.parametrize(
    ("policy", "most", "code"), [("max_rounds = 3", 3, "policy-rounds"), ("max_epsilon = 5.5", 2, "policy-epsilon")]
)
def test_no_site_is_asked_for_more_than_its_policy_allows(tmp_path, policy, most, code):
    """Catches: sums of the search that a site does not count or charge, because they are of a round that it has had."""
    names = [f"site-{number}" for number in range(5)]
    files = [site_folder(tmp_path / name, name) for name in names]
    files[3].write_text(f"{files[3].read_text()}\n[policy]\ndelta = 1e-3\n{policy}\n")
    run = config(tmp_path, 5, 3, noise_multiplier=1.2)
    ran = run_tiny(run, app_of_sites(files), fault=(liar := Liar(1)))
    assert ran.summary["rounds"] == 3
    for number, name in enumerate(names):
        events = read_lines(tmp_path / name / "audit.jsonl")
        begun = sum(event["event"] == BEGUN for event in events)
        sent = sum(count for (_, site), count in liar.asked.items() if site == name)
        spent = Counter(
            line["adversary"]
            for line in read_lines(tmp_path / name / "privacy-ledger.jsonl")
            if line["event"] == CHARGED
        )
        assert spent["sums"] == spent["release"] == sent
        if number == 3:
            assert sent == most
            assert code in {event["code"] for event in events if event["event"] == "refused"}
        else:
            assert begun == sent > 0


def test_a_site_draws_its_noise_anew_for_each_sum(tmp_path, monkeypatch):
    """Catches: an update or noise that is kept for the next attempt: two sums would differ by a bare update."""
    drawn = {}
    honest = client.protected_sum

    def recording(run, job, plan, protect=None):
        total = honest(run, job, plan)
        drawn.setdefault((run.site.name, job.request.round), []).append(total.levels.copy())
        plans.append(plan)
        return total

    plans = []
    monkeypatch.setattr(client, "protected_sum", recording)
    run_tiny(config(tmp_path, 5, 3, rounds=1, noise_multiplier=20.0), fault=Liar(5))
    twice = [levels for levels in drawn.values() if len(levels) > 1]
    assert twice
    variance = mechanism_of(plans[0]).client_variance(plans[0])
    for first, second, *_ in twice:  # the update is the same, so the difference is that of two independent shares
        assert 1.5 < np.mean((first - second) ** 2) / variance < 2.5


def members(clients):
    """Return members of a roster with so many clients, by their names."""
    return [Member(name, node, 0, 0, count) for node, (name, count) in enumerate(clients.items(), 1)]


def test_groups_are_sums_in_the_view_of_each_of_their_sites():
    """Catches: a group with enough clients by the server's count, which a site that counts on fewer refuses."""
    plan = plan_of("distributed", clients=6, secure_aggregation=True, max_clients_per_site=2)
    cohort = members(dict.fromkeys("abcdef", 3))
    trusting, doubting = Suspicion(), Suspicion()
    trusting.counts_on(dict.fromkeys("abcdef", 3))
    doubting.counts_on(dict.fromkeys("abcdef", 1))
    for suspicion in (trusting, doubting):
        suspicion.learn([tuple("abcdef")], [], 1)
    assert [len(group) for group in trusting.groups(cohort, plan)] == [2, 2, 2]
    assert [len(group) for group in doubting.groups(cohort, plan)] == [4]  # 3 of its own, and 1 at each other


def test_a_resumed_run_remembers_its_verdicts(tmp_path):
    """Catches: a liar that is asked again after a restart, which costs a sum; a suspect whose time is over left out."""
    run = config(tmp_path, 6, 3, rounds=4)
    with pytest.raises(Killed):
        run_tiny(run, fault=Liar(4, killed_in=3))
    again = Liar(4)
    ran = run_tiny(run, fault=again, resume=True)
    assert {site for _, site in again.asked} == {f"site-{n}" for n in (0, 1, 2, 4, 5)}
    assert charges(ran.folder) == [(1, 0), (1, 1), (2, 0), (3, 0), (4, 0)]
    events = verify(ran.folder / "audit.jsonl")
    later = [*events, {"event": SUSPECTED, "site": "site-5", "until": 7, "times": 1}]
    assert Suspicion(later).left_out(6) == {"site-3", "site-5"}
    assert Suspicion(later).left_out(7) == {"site-3"}


def test_a_run_does_not_go_on_with_a_liar_because_others_are_away(tmp_path):
    """Catches: connected sites counted with those that are left out, and a cohort that is no sum."""
    run = private_config("distributed", clients=3, folder=tmp_path, secure_aggregation=True, noise_multiplier=1.0)
    ctx = private_context(tmp_path, private_app(["a", "b", "c"]), 3, run)
    ctx.roster.wait(lambda count: None)
    ctx.suspicion.learn([("a", "b", "d"), ("a", "c", "d"), ("a", "e", "f")], [("b", "c", "d", "e", "f")], 1)
    assert ctx.suspicion.left_out(9) == {"a"}
    with pytest.raises(NotEnoughSites, match="without 1 that spoiled sums"):
        sample(ctx, 9, 0)


def test_a_cohort_is_large_enough_to_be_divided(tmp_path):
    """Catches: with a cohort of the least size, a search that ends as if there were no other sites."""
    run = changed(config(tmp_path, 6, 3, rounds=6), {"strategy.fraction_train": 0.5})
    liar = Liar(4)
    ran = run_tiny(run, fault=liar)
    assert {site for site, _ in suspected(ran.folder)} == {"site-3"}
    lines = read_lines(ran.folder / "metrics.jsonl")[1:]
    assert [line["round"] for line in lines if not line.get("voided")] == [1, 2, 3, 4, 5, 6]
    assert charges(ran.folder) == attempts(ran.folder)
    assert min(len(line["cohort"]) for line in lines) == 3
