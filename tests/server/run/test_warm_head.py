"""The head in closed form before round 1: what it is made from, who is left out, and what is done again."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord

from tests.support.federation import app_of_sites, leaks, run_tiny, site_folder, tiny_config
from tests.support.toy import ASKED, of_array
from tsugiki.client.app import simulated_app
from tsugiki.client.site.simulated import simulated_sites
from tsugiki.client.training.features import sum_features
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import changed
from tsugiki.common.errors import Interrupted
from tsugiki.common.files import read_lines
from tsugiki.common.head_sums import HeadSums, numbers_of, pack_sums, solve, zero_sums
from tsugiki.common.model.linear_head import linear_head, with_head
from tsugiki.common.model.load import load_graft
from tsugiki.common.wire.arrays import decode_numbers, encode_numbers
from tsugiki.common.wire.flower import identify_process
from tsugiki.common.wire.messages import HeadSumsReply, error_reply, to_record
from tsugiki.common.wire.spec import unpack
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run.checkpoint import read_best
from tsugiki.server.run.guard import check_head_sums
from tsugiki.server.run.measuring import LABEL_SKEW
from tsugiki.server.run.progress import Progress, describe
from tsugiki.server.run.replies import AcceptedStep

WARM = {"task": {"warm_head": "auto"}}
WIDTH = 3
CLASSES = 2


class Notes(Progress):
    """Keeps what the operator is shown."""

    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)

    def round_ends(self, record):
        self.lines.append(describe(record))


def warm_run(folder, fault=None, client=simulated_app, **sections):
    """Run the tiny federation with a warm head; return its outcome, what was shown, and round 0's line."""
    notes = Notes()
    sections = {**sections, "task": {**WARM["task"], **sections.get("task", {})}}
    outcome = run_tiny(tiny_config(folder, **sections), client, fault=fault, progress=notes)
    return outcome, notes.lines, read_lines(outcome.folder / "metrics.jsonl")[0]


def is_sums(reply):
    """Return whether a reply answers the request for sums."""
    return reply.metadata.message_type == "query.head_sums"


def test_training_starts_from_the_linear_probe_of_all_rows(tmp_path):
    """Catches: a head from one site's rows, or from a mean of heads; an adapter that moved before round 1."""
    outcome, lines, first = warm_run(tmp_path, run={"rounds": 1})
    config = tiny_config(tmp_path, **WARM)
    graft = load_graft(config, config.model.name, config.run.seed)
    graft.write(graft.initial)
    head = linear_head(graft)
    total = zero_sums(head.width, head.classes)
    for site in simulated_sites(config):
        encoded = graft.task.encode(site.train_shard(graft.task), graft.base)
        total = total.plus(sum_features(graft, head, encoded, range(len(encoded)), 64, 1))
    graft.write(with_head(graft.initial, graft, head, solve(total, bias=True)))
    with torch.no_grad():
        dev = graft.task.encode(simulated_sites(config)[0].train_shard(graft.task), graft.base)
        assert graft.task.evaluate(graft.base, dev, 8)["accuracy"] > 0.9
    assert first["warm_head"]["rows"] == total.rows == 24
    assert first["warm_head"]["sites"] == {"site-0": 12, "site-1": 12}
    assert outcome.summary["before"]["accuracy"] == first["eval"]["accuracy"]
    assert [line for line in lines if line.startswith("round 0, linear probe from 2 sites' sums, accuracy")]
    assert first["bytes_up"] == 2 * (8 * numbers_of(head.width, head.classes) + 128)
    events = [event["event"] for event in verify(outcome.folder / "audit.jsonl")]
    assert events == ["started", "hello", "hello", "warm-head", "round", "finished"]
    assert leaks(outcome.folder) == []
    assert not list(outcome.folder.glob(".sums-*"))


def state_of(outcome):
    """Return the bytes of the last adapter."""
    return outcome.state.vector.tobytes()


def test_the_order_of_the_sites_changes_no_byte(tmp_path):
    """Catches: sums in the order of arrival."""
    files = [site_folder(tmp_path / name, name) for name in ("beta", "alpha", "gamma")]
    for number, file in enumerate(files):
        rows = (file.parent / "train.csv").read_text().splitlines()
        (file.parent / "train.csv").write_text("\n".join([*rows[: 5 + number], ""]))
    runs = [
        warm_run(tmp_path, client=app_of_sites(order), run={"name": name, "rounds": 1})[0]
        for name, order in (("forth", files), ("back", files[::-1]))
    ]
    assert state_of(runs[0]) == state_of(runs[1])


class Once(Stop):
    """Asks to stop once, when `at` replies have come."""

    def __init__(self, at):
        super().__init__()
        self.left = at

    def fault(self, node, reply):
        self.left -= 1
        if self.left == 0:
            self.request()
        return [reply]


@pytest.mark.parametrize("at", [1, 3, 4, 5, 6])
def test_a_resumed_run_has_the_same_bytes(tmp_path, at):
    """Catches: a run stopped before, while or after the sums came that goes on with a random head, or with another."""
    whole = warm_run(tmp_path)[0]
    config = tiny_config(tmp_path, run={"name": "stopped"}, **WARM)
    stop = Once(at)
    with pytest.raises(Interrupted):
        run_tiny(config, stop=stop, fault=stop.fault)
    resumed = run_tiny(config, resume=True)
    assert state_of(resumed) == state_of(whole)
    lines = read_lines(resumed.folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[0]["warm_head"] == read_lines(whole.folder / "metrics.jsonl")[0]["warm_head"]


def test_a_site_that_keeps_its_sums_is_left_out_and_trains(tmp_path):
    """Catches: a policy that shuts a site out of the run; a refusal that stops all."""
    files = [site_folder(tmp_path / name, name) for name in ("alpha", "beta", "gamma")]
    files[1].write_text("[policy]\nhead_sums = false\n" + files[1].read_text())
    outcome, _, first = warm_run(tmp_path, client=app_of_sites(files), run={"rounds": 1})
    assert first["warm_head"]["sites"] == {"alpha": 8, "gamma": 8}
    assert first["warm_head"]["rejected"] == {"beta": "policy-head-sums"}
    assert set(read_lines(outcome.folder / "metrics.jsonl")[1]["accepted"]) == {"alpha", "beta", "gamma"}
    kept = verify(files[1].parent / "audit.jsonl")
    assert [event["code"] for event in kept if event["event"] == "refused"] == ["policy-head-sums"]
    sent = [event for event in verify(files[0].parent / "audit.jsonl") if event["event"] == "head-sums"]
    assert [(event["rows"], event["classes"]) for event in sent] == [(8, 2)]
    assert sent[0]["bytes"] == first["bytes_up"] / 2


def drop_sums(*nodes):
    """Return a fault that loses the sums of some nodes."""
    return lambda node, reply: [] if is_sums(reply) and node in nodes else [reply]


def test_too_few_sums_start_without_a_head(tmp_path):
    """Catches: a head from one site, whose rows it would show; a run that stops because of it."""
    outcome, lines, first = warm_run(
        tmp_path, drop_sums(1), run={"rounds": 1}, strategy={"round_timeout_s": 2.0, "min_clients": 2}
    )
    assert "warm_head" not in first
    assert any("no head before round 1: sums of 1 clients" in line for line in lines)
    event = next(event for event in verify(outcome.folder / "audit.jsonl") if event["event"] == "no-warm-head")
    assert (event["accepted"], event["rejected"]) == (["site-1"], {"site-0": "silent"})
    assert outcome.summary["rounds"] == 1


def test_sums_over_one_class_start_without_a_head(tmp_path):
    """Catches: a division by the number of other classes."""
    files = [site_folder(tmp_path / name, name) for name in ("alpha", "beta")]
    for file in files:
        rows = (file.parent / "train.csv").read_text().splitlines()
        (file.parent / "train.csv").write_text("\n".join([rows[0], *rows[1::2], ""]))
    _, lines, first = warm_run(tmp_path, client=app_of_sites(files), run={"rounds": 1})
    assert "warm_head" not in first
    assert any("one class" in line for line in lines)


def test_a_private_run_asks_for_nothing(tmp_path):
    """Catches: exact sums beside updates with noise on them."""
    asked = []

    def look(node, reply):
        asked.append(reply.metadata.message_type)
        return [reply]

    privacy = {"mode": "central", "noise_multiplier": 1.0, "delta": 1e-3}
    _, lines, first = warm_run(tmp_path, look, run={"rounds": 1}, privacy=privacy)
    assert asked
    assert "query.head_sums" not in asked
    assert "warm_head" not in first
    assert any("no head before round 1: the run is private" in line for line in lines)


def test_a_site_whose_features_outweigh_all_others_is_rejected(tmp_path):
    """Catches: one site that decides the head with features a thousand times as long."""
    config = tiny_config(tmp_path, **WARM)
    graft = load_graft(config, config.model.name, config.run.seed)
    head = linear_head(graft)
    size = numbers_of(head.width, head.classes)

    def boost(node, reply):
        if is_sums(reply) and node == 1:
            numbers = decode_numbers(reply.content.array_records["arrays"], size)
            width = head.width
            stretch = np.append(np.full(width, 1e3), 1.0)
            triangle = [np.outer(stretch, stretch)[row, row:] for row in range(width + 1)]
            factors = np.concatenate([*triangle, np.repeat(stretch, head.classes)])
            reply.content["arrays"] = encode_numbers(numbers * factors)
        return [reply]

    _, _, first = warm_run(tmp_path, boost, run={"rounds": 1}, simulation={"clients": 4}, strategy={"min_clients": 2})
    assert first["warm_head"]["rejected"] == {"site-0": "norm"}
    assert set(first["warm_head"]["sites"]) == {"site-1", "site-2", "site-3"}


@pytest.mark.parametrize("length", [1e3, 1e30])
def test_of_two_sites_the_longer_one_is_rejected(tmp_path, length):
    """Catches: a median of two that is half of the longer one, so that none looks long; a head that is not finite."""
    config = tiny_config(tmp_path, **WARM)
    head = linear_head(load_graft(config, config.model.name, config.run.seed))
    size = numbers_of(head.width, head.classes)

    def boost(node, reply):
        if is_sums(reply) and node == 1:
            numbers = decode_numbers(reply.content.array_records["arrays"], size)
            stretch = np.append(np.full(head.width, length), 1.0)
            triangle = [np.outer(stretch, stretch)[row, row:] for row in range(head.width + 1)]
            factors = np.concatenate([*triangle, np.repeat(stretch, head.classes)])
            reply.content["arrays"] = encode_numbers(numbers * factors)
        return [reply]

    outcome, _, first = warm_run(tmp_path, boost, run={"rounds": 1}, strategy={"min_clients": 1})
    assert list(first["warm_head"]["rejected"]) == ["site-0"]
    assert np.isfinite(outcome.state.vector).all()


def test_more_rows_than_an_honest_site_sends_are_rejected():
    """Catches: a site that multiplies its sums, and outweighs all others by a claim in its hello."""
    claimed = replace(ASKED, rows=10**6)
    sums = sums_of()
    multiplied = HeadSums(sums.gram * 1000, sums.moments * 1000)
    reply = sums_reply(encode_numbers(pack_sums(multiplied)), rows=10_000)
    assert check_head_sums(reply, claimed, WIDTH, CLASSES).reason == "weight"


def test_what_a_killed_process_left_is_removed(tmp_path):
    """Catches: the sums of single sites that stay in the folder of a run."""
    left = tmp_path / "runs" / "tiny" / ".sums-left"
    seen = []

    def look(node, reply):
        if is_sums(reply):
            seen.append(left.exists())
        else:
            left.mkdir(exist_ok=True)  # at the hello, before the head
        return [reply]

    outcome, _, _ = warm_run(tmp_path, look, run={"rounds": 1})
    assert seen == [False, False]
    assert outcome.folder == left.parent


def sums_of(rows=10):
    """Return honest sums of a small shape."""
    draw = np.random.default_rng(7)
    ones = np.column_stack([draw.normal(size=(rows, WIDTH)), np.ones(rows)])
    return HeadSums(ones.T @ ones, ones.T @ np.eye(CLASSES)[np.arange(rows) % CLASSES])


def sums_reply(arrays=None, **fields):
    """Return a reply with sums to `ASKED`."""
    identify_process()
    answer = {"site": "site-0", "round": 3, "nonce": ASKED.nonce, "rows": 10, **fields}
    content = to_record(HeadSumsReply(**answer), arrays or encode_numbers(pack_sums(sums_of())))
    return Message(content, 1, "query.head_sums")


def verdict(reply):
    """Check a reply to `ASKED`."""
    return check_head_sums(reply, ASKED, WIDTH, CLASSES)


def test_honest_sums_are_accepted():
    """Catches: another order of numbers at both sides."""
    accepted = verdict(sums_reply())
    assert isinstance(accepted, AcceptedStep)
    assert np.allclose(accepted.content.gram, sums_of().gram)
    assert np.array_equal(accepted.content.moments, sums_of().moments)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"site": "site-1"}, "site"),
        ({"round": 0}, "stale"),
        ({"nonce": "fedcba9876543210"}, "stale"),
        ({"rows": 0}, "weight"),
        ({"rows": 11}, "weight"),
        ({"rows": 9}, "head-sums"),
        ({"rows": True}, "type"),
    ],
)
def test_fields_that_do_not_fit_are_rejected(fields, reason):
    """Catches: more rows than in the hello; rows that the sums do not have."""
    assert verdict(sums_reply(**fields)).reason == reason


def test_arrays_that_do_not_fit_are_rejected():
    """Catches: another size, type or number of arrays; numbers that are not finite; a record that nobody asked for."""
    numbers = pack_sums(sums_of())
    assert verdict(sums_reply(of_array(numbers[:-1]))).reason == "shape"
    assert verdict(sums_reply(of_array(numbers.astype(np.float32)))).reason == "dtype"
    spoilt = numbers.copy()
    spoilt[3] = np.nan
    assert verdict(sums_reply(of_array(spoilt))).reason == "non-finite"
    bare = sums_reply()
    del bare.content["arrays"]
    assert verdict(bare).reason == "keys"
    more = sums_reply()
    more.content["more"] = MetricRecord({"a": 1})
    assert verdict(more).reason == "keys"
    forged = sums_of()
    forged.gram[0, 0] = -1.0
    assert verdict(sums_reply(encode_numbers(pack_sums(forged)))).reason == "head-sums"


def test_a_refusal_is_passed_on():
    """Catches: an error reply that is read as sums."""
    identify_process()
    reply = error_reply("policy-head-sums", sums_reply())
    assert verdict(reply).reason == "policy-head-sums"


@pytest.mark.parametrize(
    ("adapter", "strategy"),
    [
        ({}, {"name": "flora"}),
        ({}, {"name": "svd"}),
        ({}, {"name": "rolora"}),
        ({}, {"name": "fedadam"}),
        ({"method": "houlsby", "bottleneck": 4}, {}),
        ({"method": "ia3"}, {}),
        ({"wire_dtype": "float16"}, {}),
    ],
)
def test_every_kind_of_adapter_and_strategy_starts_from_it(tmp_path, adapter, strategy):
    """Catches: a strategy or a method under which the head is lost before the first round."""
    config = tiny_config(tmp_path, **WARM, run={"rounds": 1})
    raw = {"method": "lora", "rank": 2} | adapter
    if raw["method"] != "lora":
        raw.pop("rank")
    config = changed(config, {"adapter": raw, "strategy": {"name": "fedavg"} | strategy, "train.learning_rate": 1e-6})
    outcome = run_tiny(config)
    first = read_lines(outcome.folder / "metrics.jsonl")[0]
    assert first["warm_head"]["rows"] == 24
    graft = load_graft(config, config.model.name, config.run.seed)
    head = linear_head(graft)
    name = f"{head.name}.weight"
    random = unpack(graft.initial, graft.spec)[name]
    trained = unpack(outcome.state.vector, graft.spec)[name]
    best = unpack(read_best(outcome.folder / "checkpoint", outcome.state), graft.spec)[name]
    assert np.abs(best - random).max() > 0.01
    # FedAdam's own step is 0.1 or less a number
    assert np.abs(trained - best).max() < 0.2


@pytest.mark.parametrize(("alpha", "said"), [(100.0, False), (0.05, True)])
def test_sites_of_different_classes_are_told_apart_by_their_sums(tmp_path, alpha, said):
    """Catches: a note at alike sites, whose updates hardly agree after a linear probe; none where classes differ."""
    rows = "\n".join(f"the {('good', 'bad')[row % 2]} clause number {row},{row % 2}" for row in range(240))
    (tmp_path / "train.csv").write_text(f"text,label\n{rows}\n")
    (tmp_path / "dev.csv").write_text(f"text,label\n{rows}\n")
    split = {"clients": 4, "partition": "dirichlet", "dirichlet_alpha": alpha, "min_rows": 10}
    outcome, lines, first = warm_run(tmp_path, run={"rounds": 1}, simulation=split)
    assert bool(outcome.state.class_shares) == said
    assert (first["warm_head"]["label_skew"] > LABEL_SKEW) == said
    assert any("label skew" in line for line in lines) == said
    assert not any("hardly agree" in line for line in lines)


SKEWED = {"clients": 2, "partition": "by-column", "column": "company"}


def skewed_rows(folder):
    """Write rows of two companies that have different classes."""
    rows = "\n".join(
        f"the {('good', 'bad')[row % 2]} clause number {row},{row % 2},{'ab'[row % 2]}" for row in range(48)
    )
    for name in ("train", "dev"):
        (folder / f"{name}.csv").write_text(f"text,label,company\n{rows}\n")


def test_sites_of_different_classes_adjust_their_losses(tmp_path):
    """Catches: shares that are computed and never used; a setting that turns nothing off."""
    skewed_rows(tmp_path)
    adjusted, lines, _ = warm_run(tmp_path, simulation=SKEWED)
    assert adjusted.state.class_shares == pytest.approx((0.5, 0.5))
    assert any("task.logit_adjustment" in line for line in lines)
    plain, lines, _ = warm_run(tmp_path, run={"name": "plain"}, simulation=SKEWED, task={"logit_adjustment": "off"})
    assert plain.state.class_shares == ()
    assert any("What helps" in line for line in lines)
    # that a site has one class only is no longer for the network to explain
    losses = [read_lines(one.folder / "metrics.jsonl")[1]["train_loss"] for one in (adjusted, plain)]
    assert losses[0] < losses[1] - 1


def test_a_resumed_run_goes_on_adjusting(tmp_path):
    """Catches: shares that are lost with the process, so that a resumed run ends with other bytes."""
    skewed_rows(tmp_path)
    whole = warm_run(tmp_path, simulation=SKEWED)[0]
    config = tiny_config(tmp_path, run={"name": "stopped"}, simulation=SKEWED, **WARM)
    stop = Once(4)  # in round 1: two sums came before
    with pytest.raises(Interrupted):
        run_tiny(config, stop=stop, fault=stop.fault)
    resumed = run_tiny(config, resume=True)
    assert state_of(resumed) == state_of(whole)
    assert resumed.state.class_shares == whole.state.class_shares != ()


def test_a_run_that_validates_inside_a_round_adjusts_nothing(tmp_path):
    """Catches: an adjusted loss whose best step is then chosen on rows with the site's own shares."""
    skewed_rows(tmp_path)
    train = {"validate_every_steps": 1, "validation_fraction": 0.2}
    outcome, lines, _ = warm_run(tmp_path, run={"rounds": 1}, simulation=SKEWED, train=train)
    assert outcome.state.class_shares == ()
    assert any("What helps" in line for line in lines)
