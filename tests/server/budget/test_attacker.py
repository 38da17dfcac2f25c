"""The attacker of an audit: what each adversary may know, and no more."""

import numpy as np
import pytest

from tests.support.private import plan_of
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.server.budget.attacker import Attacker, pooled

SIZE = 60
CLIENTS = {"a": ["a/0", "a/1"], "b": ["b/0", "b/1"], "c": ["c/0", "c/1"]}
HIDDEN = 1000 * LEVELS


def attack(clients=None, size=SIZE, plan=None, **noise):
    """Let an attacker see a run of two rounds; return it with its trials.

    Args:
        clients: names by site; by default three sites of two, of which `a` is curious.
        size: of an update; at most so many clients are canaries.
        plan: of the run; by default in mode distributed.
        noise: levels that a site adds to its upload in each round, by site name.
    """
    clients = clients or CLIENTS
    plan = plan or plan_of("distributed", size, clients=6, noise_multiplier=1.0, clip_norm=0.5)
    attacker = Attacker(np.random.default_rng(4))
    attacker.meet(clients)
    canaries = attacker.canaries(size)
    draw = np.random.default_rng(5)
    divisor = plan.denominator or sum(map(len, clients.values()))
    adapter = draw.normal(size=size).astype(np.float32)
    for number in (1, 2):
        total = np.zeros(size, np.int64)
        for site, names in clients.items():
            marked = [name for name in names if name in canaries.numbers]
            known = np.zeros(size, np.int64)
            if len(marked) < len(names):  # an ordinary client's update, far longer than any canary's
                known = draw.integers(-100 * LEVELS, 100 * LEVELS, size)
            sent = canaries.updates(marked, plan).sum(axis=0) * (LEVELS / 10 / plan.clip_norm)
            upload = known + np.rint(sent).astype(np.int64) + noise.get(site, 0)
            attacker.see(names, number, adapter, plan, upload, known)
            total += upload
        adapter = (adapter + total * (plan.clip_norm / LEVELS / divisor)).astype(np.float32)
    return attacker, attacker.trials(adapter)


def told_apart(trials):
    """Return whether the scores are those of two rounds: 2 of clients that took part, 0 of the others."""
    assert 0 < trials.included.sum() < len(trials.included)
    return np.abs(trials.scores - 2.0 * trials.included).max() < 0.01


def test_without_noise_every_adversary_sees_everything():
    """Catches: ordinary clients that hide canaries; a round or a site that is not looked at; sums of wrong sign."""
    attacker, found = attack()
    assert attacker.canaries(SIZE).names == ("b/0", "b/1", "c/0", "c/1")
    assert set(found) == {"release", "outsiders", "sums", "uploads"}
    assert all(told_apart(trials) for trials in found.values())


def test_the_curious_site_alone_knows_its_own_noise():
    """Catches: a member that is as blind as an outsider, or an outsider that knows a member's noise."""
    _, found = attack(a=HIDDEN * np.arange(SIZE))
    assert told_apart(found["release"])
    assert told_apart(found["uploads"])  # of the canaries' sites
    assert not told_apart(found["outsiders"])
    assert not told_apart(found["sums"])


def test_the_noise_of_others_hides_canaries_from_all():
    """Catches: an attacker that is told the noise it has to find its way through."""
    _, found = attack(b=HIDDEN * np.arange(SIZE))
    assert not any(told_apart(trials) for trials in found.values())


def test_a_site_alone_has_canaries():
    """Catches: no canary at all where there is no other site to be curious."""
    attacker, found = attack({"a": ["a/0", "a/1", "a/2", "a/3"]})
    assert len(attacker.canaries(SIZE).names) == 4
    assert all(told_apart(trials) for trials in found.values())


def test_what_ordinary_clients_send_is_known_at_every_site():
    """Catches: clients that are too many to be canaries, and whose updates then hide those of the others."""
    attacker, found = attack(size=3)
    assert len(attacker.canaries(3).names) == 3
    assert all(told_apart(trials) for trials in found.values())


def test_a_sampled_sum_has_a_denominator_of_its_own():
    """Catches: a mean over the expected number of clients taken for one over those that were asked."""
    sampling = {"sampling": "poisson", "strategy": {"fraction_train": 0.5}}
    plan = plan_of("central", SIZE, clients=6, noise_multiplier=1.0, clip_norm=0.5, **sampling)
    assert plan.denominator == 3
    assert told_apart(attack(plan=plan)[1]["outsiders"])


def test_runs_are_pooled_in_order():
    """Catches: coins of one run beside the scores of another."""
    _, found = attack()
    both = pooled([found, found], "release")
    assert len(both.scores) == len(both.included) == 8
    assert told_apart(both)
    with pytest.raises(KeyError):
        pooled([found], "rows")
