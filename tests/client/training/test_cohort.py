"""The clients of a site, each trained by itself; and what leaves a site in a private run, key by key."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest

from tests.support.federation import leaks, run_tiny, tiny_config
from tests.support.private import plan_of
from tsugiki.client.app import simulated_app
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training import cohort, dp_sgd
from tsugiki.client.training.cohort import asked_clients, row_releases, train_openly, train_protecting_clients
from tsugiki.client.training.job import Job
from tsugiki.common.errors import TrainingError, WireError
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.accounting import epsilon
from tsugiki.common.privacy.clipping import LEVELS, clip
from tsugiki.common.wire.arrays import decode_levels
from tsugiki.common.wire.messages import TrainRequest

ROWS = {"site-0/0": [0, 1, 2, 3], "site-0/1": [4, 5, 6, 7, 8, 9], "site-0/2": [10, 11]}


# Who is asked


@pytest.mark.parametrize(
    ("count", "wanted", "names"),
    [
        (1, "", ["acme"]),
        (1, "0", ["acme"]),
        (3, "", ["acme/0", "acme/1", "acme/2"]),
        (3, "1", ["acme/1"]),
        (3, "2,0", ["acme/2", "acme/0"]),
    ],
)
def test_the_clients_that_are_asked(count, wanted, names):
    """Catches: all clients trained where some were asked; one client's rows under another's name."""
    clients = [[10 * number] for number in range(count)]
    found = asked_clients("acme", clients, wanted)
    assert list(found) == names
    assert all(rows == [10 * int(name.partition("/")[2] or 0)] for name, rows in found.items())


@pytest.mark.parametrize("wanted", ["3", "-1", "0,0", "0,", ",", "a", " 1", "1.0", "\u0661", "9" * 400, "0;1"])
def test_a_list_of_clients_that_cannot_be_is_refused(wanted):
    """Catches: the last client for -1, a client that counts twice, and an IndexError instead of a code."""
    with pytest.raises(WireError) as caught:
        asked_clients("acme", [[0], [1], [2]], wanted)
    assert caught.value.code == "clients"


def test_a_client_under_two_spellings_is_refused():
    """Catches: a server that counts two clients where the site trains one."""
    with pytest.raises(WireError):
        asked_clients("acme", [[0], [1], [2]], "1,01")


# Training


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A gateway of all 24 rows."""
    folder = tmp_path_factory.mktemp("cohort")
    return tiny_config(folder, simulation={"clients": 1}, strategy={"min_clients": 1})


@pytest.fixture
def job(config):
    """Makes the job of a site whose clients have `ROWS`, or other rows."""
    graft = load_graft(config, config.model.name, config.run.seed)
    (site,) = simulated_sites(config)
    encoded = graft.task.encode(site.train_shard(graft.task), graft.base)

    def make(clients=ROWS, received=None, deadline_s=600.0, round_=1, run=config):
        request = TrainRequest("", round_, graft.spec.sha256, 0.0, 0.5, deadline_s, "", "")
        start = graft.initial if received is None else received
        return Job(graft, encoded, clients, run, request, start, lambda *arguments: None)

    return make


def alone(job, name, rows):
    """Return one client's update, with what training reports."""
    update, trained, _ = train_openly(job({name: rows}))
    return update.astype(np.float64), trained


def diverging(name):
    """Return what trains as the client does, but for one client, whose training diverges."""

    def train(graft, encoded, settings, local_round, watch):
        if local_round.site == name:
            raise TrainingError("the loss is not finite", code="diverged")
        return trained(graft, encoded, settings, local_round, watch)

    trained = cohort.train
    return train


def test_a_gateways_open_update_is_the_mean_of_its_clients_by_rows(job):
    """Catches: a mean of clients instead of rows, clients that go on from one another, rows of others."""
    update, told, rows = train_openly(job())
    each = {name: alone(job, name, chosen) for name, chosen in ROWS.items()}
    wanted = sum(len(ROWS[name]) * one for name, (one, _) in each.items()) / 12
    assert (rows, told.steps) == (12, 6)
    assert update.dtype == np.float32
    assert np.allclose(update, wanted, atol=1e-7)
    assert np.abs(update).max() > 1e-3
    assert told.loss == pytest.approx(sum(len(ROWS[name]) * one.loss for name, (_, one) in each.items()) / 12)
    unweighted = sum(one for one, _ in each.values()) / 3
    assert not np.allclose(update, unweighted, atol=1e-7)


def test_a_private_sum_is_that_of_its_clients_each_clipped(job):
    """Catches: the sum or the mean clipped in the place of each client; an update that went through float32."""
    plan = quiet(job().graft.spec.size, clip_norm=0.05)
    levels = train_protecting_clients(job(), plan).levels
    updates = [alone(job, name, chosen)[0] for name, chosen in ROWS.items()]
    wanted = sum(clip(update, 0.05).levels for update in updates)
    assert all(np.linalg.norm(update) > 0.05 for update in updates)
    assert np.abs(levels - wanted).max() <= 3  # a level a client: the single ones went through float32
    assert np.abs(levels).sum() > 100


def quiet(size, **options):
    """Return a plan of three clients without noise."""
    return replace(plan_of("distributed", size, clients=3, noise_multiplier=1.0, **options), noise_multiplier=0.0)


def test_a_diverged_client_is_null_in_a_private_run_and_an_error_in_an_open_one(job, monkeypatch):
    """Catches: an error that tells the server something about a client's data; NaN in everybody's sum."""
    plan = quiet(job().graft.spec.size)
    others = {name: rows for name, rows in ROWS.items() if name != "site-0/1"}
    wanted = train_protecting_clients(job(others), plan).levels
    monkeypatch.setattr(cohort, "train", diverging("site-0/1"))
    assert np.array_equal(train_protecting_clients(job(), plan).levels, wanted)
    with pytest.raises(TrainingError) as caught:
        train_openly(job())
    assert caught.value.code == "diverged"


@pytest.mark.parametrize("error", [ValueError("row 7"), RuntimeError("row 7"), KeyError("row 7")])
def test_a_client_whose_training_fails_is_null_in_a_private_run(job, monkeypatch, caplog, error):
    """Catches: the class of an exception, which a client's data has raised, told to the server; a failure unseen."""
    plan, train = quiet(job().graft.spec.size), cohort.train
    others = {name: rows for name, rows in ROWS.items() if name != "site-0/1"}
    wanted = train_protecting_clients(job(others), plan).levels

    def fail(graft, encoded, settings, plan, watch):
        if plan.site == "site-0/1":
            raise error
        return train(graft, encoded, settings, plan, watch)

    monkeypatch.setattr(cohort, "train", fail)
    total = train_protecting_clients(job(), plan)
    assert np.array_equal(total.levels, wanted)
    assert (total.clients, total.null) == (3, 1)
    assert "a client failed" in caplog.text
    with pytest.raises(type(error)):
        train_openly(job())


@pytest.mark.parametrize("error", [MemoryError(), type("OutOfMemoryError", (RuntimeError,), {})()])
def test_a_machine_without_memory_is_told(job, monkeypatch, error):
    """Catches: a federation that spends its whole budget on noise, because no site has the memory for a batch."""

    def fail(*arguments):
        raise error

    monkeypatch.setattr(cohort, "train", fail)
    with pytest.raises(type(error)):
        train_protecting_clients(job(), quiet(job().graft.spec.size))


def test_clients_that_cannot_be_trained_together_are_trained_alone(job, monkeypatch):
    """Catches: a gateway whose clients are all lost because the batched path fails; some of them counted twice."""
    plan, one = quiet(job().graft.spec.size), job()
    wanted = train_protecting_clients(one, plan).levels

    def breaks(job, tail):
        name = next(iter(job.clients))
        yield cohort._alone(job, name, math.inf, True)
        raise IndexError("row 7")

    monkeypatch.setattr(cohort, "can_train_together", lambda job: True)
    monkeypatch.setattr(cohort, "train_together", breaks)
    total = train_protecting_clients(replace(one, tail=lambda: "a tail"), plan)
    assert (total.clients, total.null) == (3, 0)
    assert np.array_equal(total.levels, wanted)
    with pytest.raises(IndexError):
        train_openly(replace(one, tail=lambda: "a tail"))


def test_a_model_that_makes_all_diverge_gives_noise_and_nothing_else(job):
    """Catches: a server that learns by its own poisoned adapter which sites it breaks."""
    one, size = job(), job().graft.spec.size
    broken = np.full(size, 1e38, np.float32)
    assert not train_protecting_clients(job(received=broken), quiet(size)).levels.any()
    noisy = plan_of("local", size, clients=3, noise_multiplier=2.0)
    levels = train_protecting_clients(job(received=broken), noisy).levels
    ratio = float(np.mean(levels.astype(float) ** 2)) / (3 * 4.0 * LEVELS**2)
    assert abs(ratio - 1) < 5.4 * math.sqrt(2 / size)
    assert one.graft.spec.size > 100


def test_a_client_without_rows_adds_noise_only(job):
    """Catches: a division by no rows; a client that is left out, and its noise with it."""
    size = job().graft.spec.size
    assert not train_protecting_clients(job({"site-0/0": []}), quiet(size)).levels.any()
    assert train_protecting_clients(job({"site-0/0": []}), plan_of("local", size, noise_multiplier=1.0)).levels.any()
    both = train_protecting_clients(job({**ROWS, "site-0/3": []}), quiet(size)).levels
    assert np.array_equal(both, train_protecting_clients(job(), quiet(size)).levels)


def test_a_deadline_ends_a_private_site_too(job):
    """Catches: a gateway that trains on for a round that is over."""
    plan = quiet(job().graft.spec.size)
    with pytest.raises(TrainingError) as caught:
        train_protecting_clients(job(deadline_s=0.0), plan)
    assert caught.value.code == "deadline"


def test_noise_is_new_in_every_round_and_seeded_noise_follows_from_it(job, config):
    """Catches: a round repeated with the same noise: the difference of two replies would be without any."""
    size = job().graft.spec.size
    plan = plan_of("local", size, noise_multiplier=1.0)
    assert not np.array_equal(
        train_protecting_clients(job(), plan).levels, train_protecting_clients(job(), plan).levels
    )
    seeded = config.model_copy(update={"privacy": config.privacy.model_copy(update={"insecure_noise_seed": 7})})
    first, again, later = (
        train_protecting_clients(job({"a": []}, round_=n, run=seeded), plan).levels for n in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert not np.array_equal(first, later)


# What leaves


HELLO = {
    "site",
    "version",
    "clients",
    "rows",
    "evaluation_rows",
    "base_fingerprint",
    "spec_sha256",
    "libraries",
    "notes",
    "precision",
}
PRIVATE, OPEN = {"site", "round", "nonce"}, {"rows", "steps", "missed_steps", "loss", "loss_shared", "seconds"}
MODES = {
    "central": {"mode": "central", "noise_multiplier": 1.0},
    "local": {"mode": "local", "noise_multiplier": 1.0},
    "distributed": {"mode": "distributed", "noise_multiplier": 1.0},
}


def replies(folder, privacy):
    """Return the replies of a tiny run with two gateways of two clients, hellos and training apart."""
    seen = []

    def tap(node, reply):
        seen.append(copy.deepcopy(reply))  # the server drops what it has read
        return [reply]

    simulation = {"clients": 4, "clients_per_site": 2, "evaluation_fraction": 0.25}
    strategy = {"min_clients": 4}
    config = tiny_config(folder, privacy=privacy, strategy=strategy, simulation=simulation, run={"rounds": 1})
    run_tiny(config, simulated_app, fault=tap)
    return [[one for one in seen if one.metadata.message_type == kind] for kind in ("query", "train")]


@pytest.mark.parametrize("privacy", MODES.values(), ids=list(MODES))
def test_nothing_leaves_a_private_site_but_its_protected_sum(tmp_path, privacy):
    """Catches: rows, losses, norms, seconds or the share of clipped clients beside the vector; a plain vector."""
    hellos, trained = replies(tmp_path, privacy)
    assert [len(hellos), len(trained)] == [2, 2]
    for reply in hellos:
        assert set(reply.content) == {"reply"}
        said = dict(reply.content.config_records["reply"])
        assert set(said) == HELLO
        assert (said["clients"], said["rows"], said["evaluation_rows"], said["notes"]) == (2, 0, 0, "")
    for reply in trained:
        assert not reply.has_error()
        assert set(reply.content) == {"reply", "arrays"}
        assert set(reply.content.config_records["reply"]) == PRIVATE
        (array,) = reply.content.array_records["arrays"].values()
        assert (array.dtype, array.stype) == ("uint8", "numpy.ndarray")
        assert decode_levels(reply.content.array_records["arrays"], array.shape[0] // 4, 32).unpacked().any()
    assert [file for file in leaks(tmp_path) if file not in ("train.csv", "dev.csv")] == []


def test_the_same_look_at_an_open_run_finds_more(tmp_path):
    """Catches: a look at the replies that sees nothing, whatever is in them."""
    hellos, trained = replies(tmp_path, {})
    assert all(reply.content.config_records["reply"]["rows"] == 9 for reply in hellos)
    assert all(set(reply.content.config_records["reply"]) == PRIVATE | OPEN for reply in trained)
    (array,) = trained[0].content.array_records["arrays"].values()
    assert array.dtype == "float32"


def test_a_gateways_rows_are_charged_as_the_client_that_shows_most(tmp_path):
    """Catches: the client with the fewest rows taken for it: with whole passes, more rows may mean more steps."""
    train = {"local_epochs": 1, "per_device_train_batch_size": 16}
    config = tiny_config(tmp_path, train=train, privacy={"examples": {"noise_multiplier": 1.0}})
    few, more = list(range(8)), list(range(8, 25))
    request = TrainRequest("", 1, "", 0.0, 0.5, 60.0, "", "")
    job = Job(None, None, {"a": few, "b": more}, config, request, None, lambda *_: None)
    seen = {rows: dp_sgd.release_of_round(rows, config.train, config.privacy.examples) for rows in (8, 17)}
    spent = {rows: epsilon({release: count}, 1e-5) for rows, (release, count) in seen.items()}
    assert spent[17] > spent[8]
    assert row_releases(job.clients, job.config) == {"rows": seen[17]}
