"""`tsugiki audit privacy`: the whole pipeline under attack, as it is and broken on purpose."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.support.tiny import tiny_cnn
from tsugiki import cli
from tsugiki.client.app import audited_app
from tsugiki.client.training import update
from tsugiki.common.config.files import to_toml
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.data.images import write_idx
from tsugiki.common.errors import ConfigError, TsugikiError
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.clipping import LEVELS
from tsugiki.common.privacy.mechanisms import Distributed
from tsugiki.common.privacy.planning import make_plan
from tsugiki.server.budget import privacy_audit
from tsugiki.server.budget.privacy_audit import audit_privacy, check_claims
from tsugiki.server.run.storage import AUDIT_FILE, run_folder

CLIENTS, EACH, TRIALS = 100, 10, 270
CLAIMED = 1.0


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A private run of ten gateways over pictures of noise, two rounds."""
    folder = tmp_path_factory.mktemp("audit")
    draw = np.random.default_rng(1)
    name = write_idx(folder, "train", draw.integers(0, 256, (2 * CLIENTS, 12, 12), np.uint8), [0, 1] * CLIENTS)
    return parse(
        {
            "run": {"name": "tiny", "rounds": 2, "output_dir": str(folder / "runs")},
            "model": {"name": str(tiny_cnn(folder / "model"))},
            "task": {"name": "image-classification", "num_labels": 2},
            "adapter": {"rank": 2, "freeze_a": "no"},
            "train": {"learning_rate": 1e-2, "local_steps": 1, "per_device_train_batch_size": 2, "threads": 1},
            "strategy": {"min_clients": CLIENTS},
            "privacy": {
                "mode": "distributed",
                "secure_aggregation": True,
                "target_epsilon": CLAIMED,
                "delta": 1e-5,
                "ledger": str(folder / "ledger-of-real-clients.jsonl"),
            },
            "simulation": {"clients": CLIENTS, "clients_per_site": EACH, "data": str(folder / name)},
        }
    )


def audit(config, trials=TRIALS):
    """Return what an attacker finds."""
    return audit_privacy(config, audited_app, trials, seed=1)


def by_adversary(found):
    """Return the ledgers of an audit by adversary."""
    return {ledger.adversary: ledger for ledger in found.ledgers}


def command(config, folder, *options):
    """Run the command on a file with this run; return its result, with any error as its exception."""
    path = folder / "run.toml"
    path.write_text(to_toml(config))
    return CliRunner().invoke(cli.app, ["audit", "privacy", str(path), "--trials", str(TRIALS), *options])


def test_a_right_account_holds_and_the_control_shows_that_the_attack_works(config, tmp_path):
    """Catches: an attack without power, a claim that is not the ledger's, a ledger that is not attacked.

    Also: the real clients' ledger charged for an audit, and an audit that takes the name of the run that it is for.
    """
    config = changed(config, {"run.output_dir": str(tmp_path)})
    result = command(config, tmp_path, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    ledgers = {ledger["adversary"]: ledger for ledger in told["ledgers"]}
    assert list(ledgers) == ["release", "outsiders", "sums"]
    for ledger in ledgers.values():
        assert ledger["holds"]
        assert ledger["found"]["largest"] < ledger["claimed"] <= CLAIMED
        assert min(ledger["control"]["clopper_pearson"], ledger["control"]["one_run"]) > 2.0
    assert ledgers["release"]["claimed"] == pytest.approx(CLAIMED, rel=1e-3)
    assert ledgers["outsiders"]["claimed"] == ledgers["sums"]["claimed"] < ledgers["release"]["claimed"]
    assert told["trials"] >= TRIALS
    assert (told["runs"], told["rounds"], told["confidence"]) == (3, 2, 0.99)

    folder = tmp_path / "tiny"
    assert json.loads((folder / AUDIT_FILE).read_text()) == told
    assert told["plan_sha256"] == make_plan(config, _size(config)).sha256
    assert [path.name for path in folder.iterdir()] == [AUDIT_FILE]
    with run_folder(folder, resume=False):
        pass
    assert not (tmp_path / "ledger-of-real-clients.jsonl").exists()
    assert not list(tmp_path.parent.rglob("ledger-of-real-clients.jsonl"))


def _size(config):
    """Return the number of coordinates of an update."""
    return load_graft(config, config.model.name, config.run.seed).spec.size


def test_less_noise_than_was_claimed_breaks_the_claim(config, tmp_path, monkeypatch):
    """Catches: an audit that looks at the plan in place of what the clients send."""
    whole = Distributed.client_noise

    def little(plan, draw, clients=1):
        return whole(plan, draw, clients) // 20

    monkeypatch.setattr(Distributed, "client_noise", little)
    config = changed(config, {"run.output_dir": str(tmp_path)})
    result = command(config, tmp_path)
    assert isinstance(result.exception, TsugikiError)
    assert (result.exception.code, result.exception.exit_status) == ("claim-broken", 1)
    assert "WHICH BREAKS THE CLAIM" in result.stdout
    told = json.loads((tmp_path / "tiny" / AUDIT_FILE).read_text())
    assert not any(ledger["holds"] for ledger in told["ledgers"])


def test_updates_that_are_not_clipped_break_the_claim(config, monkeypatch):
    """Catches: canaries that are short already, so that nobody sees whether they are clipped."""
    clip = update.clip
    monkeypatch.setattr(update, "clip", lambda updates, norm: _unclipped(clip, updates, norm))
    with pytest.raises(TsugikiError) as caught:
        check_claims(audit(config))
    assert caught.value.code == "claim-broken"
    assert caught.value.hint


def _unclipped(clip, updates, norm):
    """Return the updates in levels, however long they are."""
    return replace(clip(updates, norm), levels=np.trunc(updates * (LEVELS / norm)).astype(np.int64))


@pytest.mark.parametrize(
    ("changes", "claims"),
    [
        ({"privacy.mode": "central", "privacy.secure_aggregation": False}, {"release": True, "uploads": False}),
        ({"privacy.mode": "local", "privacy.secure_aggregation": False}, {"release": True, "uploads": True}),
        ({"privacy.secure_aggregation": False}, {"release": True, "outsiders": True, "uploads": True}),
        (
            {
                "privacy.mode": "central",
                "privacy.secure_aggregation": False,
                "privacy.sampling": "poisson",
                "strategy.fraction_train": 0.5,
                "strategy.min_clients": 2,
                "strategy.name": "fedadam",
            },
            {"release": True, "uploads": False},
        ),
    ],
)
def test_each_mode_can_be_audited(config, changes, claims):
    """Catches: a mode whose uploads are not seen, or whose sums have another denominator; no claim that is broken."""
    found = by_adversary(audit(changed(config, changes), 180))
    assert {adversary: ledger.claimed is not None for adversary, ledger in found.items()} == claims
    for ledger in found.values():
        assert ledger.holds
        assert ledger.control.largest > CLAIMED  # also where a canary is asked in half of the rounds only
        if ledger.claimed is None:  # no noise is on it
            assert ledger.found.largest > CLAIMED


def test_the_audited_run_is_that_of_the_file(config):
    """Catches: an audit under another plan, with other cohorts, or of a step that hides what the mean shows."""
    settings = {"name": "fedadam", "min_clients": CLIENTS - EACH, "fraction_train": 0.9}
    wanted = changed(config, {"strategy": settings, "evaluation.data": "", "simulation.engine": "ray"})
    audited = privacy_audit._simulated(wanted, "elsewhere")
    assert make_plan(audited, 70) == make_plan(wanted, 70)
    assert (audited.strategy.name, audited.strategy.server_learning_rate) == ("fedavg", 1.0)
    assert (audited.strategy.min_clients, audited.strategy.fraction_train) == (CLIENTS - EACH, 0.9)
    assert audited.run.output_dir == "elsewhere"
    assert audited.simulation.engine == "in-process"
    control = make_plan(privacy_audit._simulated(wanted, "elsewhere", 1e-3), 70)
    assert replace(control, noise_multiplier=0.0, target_epsilon=0.0) == replace(
        make_plan(wanted, 70), noise_multiplier=0.0, target_epsilon=0.0
    )


def test_the_coins_follow_from_the_seed_and_the_noise_does_not(config, monkeypatch):
    """Catches: an audit with the same canaries for every seed; noise that the auditor's seed gives away."""
    seen = []
    pooled = privacy_audit.pooled
    monkeypatch.setattr(privacy_audit, "pooled", lambda *given: seen.append(pooled(*given)) or seen[-1])
    for seed in (1, 1, 2):
        audit_privacy(config, audited_app, 100, seed)
    first, again, other = seen[0], seen[6], seen[12]
    assert np.array_equal(first.included, again.included)
    assert not np.array_equal(first.included, other.included)
    assert not np.array_equal(first.scores, again.scores)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"privacy": {}}, "privacy.mode"),
        ({"privacy.target_epsilon": 0.0}, "privacy.target_epsilon"),
        ({"privacy.insecure_noise_seed": 3}, "privacy.insecure_noise_seed"),
        ({"simulation": {}, "strategy.min_clients": 50}, "simulation.data"),
    ],
)
def test_what_claims_nothing_is_refused(config, changes, key):
    """Catches: a run without privacy that is audited, and passes."""
    with pytest.raises(ConfigError) as caught:
        audit(changed(config, changes))
    assert key in [problem.key for problem in caught.value.problems]
    assert all(problem.hint for problem in caught.value.problems)


def test_the_time_that_is_left_is_shown(monkeypatch):
    """Catches: minutes of silence; a time that grows with what is done; a line for every round of short ones."""
    now, lines = [0.0], []
    monkeypatch.setattr(privacy_audit.time, "monotonic", lambda: now[0])
    clock = privacy_audit._Clock(lines.append, rounds=4)
    for seconds, round_ in ((20.0, 1), (25.0, 2), (80.0, 4)):
        now[0] = seconds
        clock.round_ends({"round": round_})
    clock.run_ends()
    clock.expect(4)
    now[0] = 120.0
    clock.round_ends({"round": 2})
    assert lines == [
        "run 1, round 1 of 4",
        "run 1, round 4 of 4",
        "run 2 of 4, round 2 of 4, about 3 min left",
    ]
