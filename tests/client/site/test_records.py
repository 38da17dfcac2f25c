"""A site's audit log and its ledger remember each other: neither is forgotten in silence, and both count for life."""

import shutil
from datetime import UTC, datetime, timedelta

import pytest
from flwr.app import Message

from tests.support.federation import app_of_sites, leaks, site_folder, tiny_config
from tests.support.private import LEDGER
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.records import SiteRecords, records_of
from tsugiki.client.site.site import read_site
from tsugiki.common import __version__, audit
from tsugiki.common.audit import verify
from tsugiki.common.errors import ConfigError, PolicyError, StorageError
from tsugiki.common.model.load import load_graft
from tsugiki.common.privacy.planning import make_plan
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import (
    HelloReply,
    HelloRequest,
    TrainReply,
    TrainRequest,
    error_code,
    from_record,
    to_record,
)
from tsugiki.server.engines.in_process import InProcessGrid

AUDIT = "audit.jsonl"
LOCAL = {"mode": "local", "noise_multiplier": 4.0, "enrolled_clients": 4}


@pytest.fixture
def acme(tmp_path):
    """Makes a real site with a policy; returns its folder and a function that sends it a hello or a round."""

    def make(policy="", rows=None):
        file = site_folder(tmp_path / "acme", "acme")
        file.write_text(f"[policy]\n{policy}\n{file.read_text()}")
        if rows is not None:
            (tmp_path / "acme" / "train.csv").write_text(rows)

        def ask(kind="train", round_=1, run="one", hurried=False, **sections):
            config = tiny_config(tmp_path, run={"name": run}, simulation={"clients": 4}, **sections)
            graft = load_graft(config, config.model.name, config.run.seed)
            text = config.for_sites(make_plan(config, graft.spec.size))
            content = to_record(HelloRequest(text, __version__))
            if kind == "train":
                deadline_s = 0.0 if hurried else 600.0
                request = TrainRequest(
                    text, round_, graft.spec.sha256, 0.0, 0.5, deadline_s, "0" * 16, "", partial=hurried
                )
                content = to_record(request, encode(graft.initial, graft.spec))
            grid = InProcessGrid(*app_of_sites([file])(config))
            return grid.pull_messages(grid.push_messages([Message(content, 1, kind)]))[0]

        return tmp_path / "acme", ask

    records_of.cache_clear()
    return make


def code(reply):
    """Return the code of a refusal, or "" for an answer."""
    return error_code(reply) if reply.has_error() else ""


def restarted():
    """Forget what this process knows of the records, as a new process does."""
    records_of.cache_clear()


# What a policy counts


def test_rounds_count_over_all_runs(acme):
    """Catches: rounds counted by the run's own words: with a new name, a server gets as many rounds as it likes."""
    _, ask = acme("max_rounds = 3")
    answers = [code(ask(run=name, round_=number)) for name, number in (("one", 1), ("one", 2), ("two", 1), ("six", 1))]
    assert answers == ["", "", "", "policy-rounds"]
    restarted()
    assert code(ask(run="seven")) == "policy-rounds"


def test_rounds_of_a_day_count_beside_those_of_a_life(acme, monkeypatch):
    """Catches: a limit that a server gets anew with each run, or that is never free again."""
    _, ask = acme("max_rounds_per_day = 2")
    assert [code(ask(run=name)) for name in ("one", "two", "three")] == ["", "", "policy-rounds"]
    later(monkeypatch, hours=25)
    assert code(ask(run="three")) == ""


def later(monkeypatch, hours):
    """Let the site's clock be some hours ahead."""

    class Later(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime.now(UTC) + timedelta(hours=hours)

    monkeypatch.setattr(audit, "datetime", Later)
    monkeypatch.setattr("tsugiki.client.site.records.datetime", Later)


def test_accumulated_batches_count_as_work(acme):
    """Catches: two optimizer steps of 1,024 batches each, taken for two batches."""
    _, ask = acme("max_local_steps = 2")
    assert code(ask(train={"local_steps": 2})) == ""
    assert code(ask(train={"local_steps": 2, "gradient_accumulation_steps": 1024})) == "policy-steps"


def test_large_batches_count_as_work(acme):
    """Catches: a limit on batches alone, whose size the server chooses."""
    _, ask = acme("max_rows_per_round = 8")
    assert code(ask(train={"local_steps": 2, "per_device_train_batch_size": 4})) == ""
    assert code(ask(train={"local_steps": 2, "per_device_train_batch_size": 8})) == "policy-rows"


def test_a_refused_round_is_not_counted(acme):
    """Catches: a life that is used up by requests that the site has refused."""
    folder, ask = acme("max_local_steps = 1")
    assert code(ask(train={"local_steps": 2})) == "policy-steps"
    assert [line for line in verify(folder / AUDIT) if line["event"] == "training"] == []


def test_what_is_counted_needs_a_log(tmp_path):
    """Catches: a limit by count that nothing counts."""
    file = site_folder(tmp_path, "acme")
    text = file.read_text().replace("[data]", 'audit = ""\n[data]')
    file.write_text(text)
    assert read_site(file).policy.max_settings_per_day == 50
    for policy in ("max_rounds = 3", "max_rounds_per_day = 3", "max_settings_per_day = 3"):
        file.write_text(f"{text}[policy]\n{policy}\n")
        with pytest.raises(ConfigError, match=r"site\.audit"):
            read_site(file)


def test_an_epsilon_for_all_is_no_epsilon_for_some(acme):
    """Catches: max_epsilon = 8 in mode "central", where the server gets the update without any noise."""
    _, ask = acme("max_epsilon = 8.0")
    central = {"mode": "central", "noise_multiplier": 4.0, "enrolled_clients": 4}
    assert code(ask(privacy=central)) == "policy-epsilon"
    assert code(ask(privacy=LOCAL)) == ""
    _, ask = acme('max_epsilon = 8.0\nprivacy_modes = ["central"]')
    assert code(ask(privacy=central)) == ""


# A life that cannot be forgotten in silence


def cut(path, lines=1):
    """Cut off the last lines of a file."""
    kept = path.read_text().splitlines(keepends=True)
    path.write_text("".join(kept[: len(kept) - lines]))


@pytest.mark.parametrize("privacy", [{"mode": "none"}, LOCAL])
@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (LEDGER, lambda path: path.unlink(), "ledger-behind"),
        (LEDGER, cut, "ledger-behind"),
        (AUDIT, lambda path: path.unlink(), "audit-behind"),
        (AUDIT, lambda path: cut(path, 3), "audit-behind"),
    ],
)
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_record_that_has_lost_lines_is_refused(acme, privacy, name, damage, expected, goes_on):
    """Catches: a deleted or cut file that begins at zero again: a budget and a count that are whole once more."""
    folder, ask = acme()
    for number in (1, 2):
        assert code(ask(round_=number, privacy=privacy)) == ""
    damage(folder / name)
    if not goes_on:
        restarted()
    assert code(ask("query", privacy=privacy)) == expected
    assert code(ask(round_=3, privacy=privacy)) == expected
    with pytest.raises(StorageError, match="move both") as caught:
        read_site(folder / "site.toml").check_records()
    assert caught.value.code == expected


def test_an_old_backup_of_one_is_refused(acme):
    """Catches: a ledger that is put back from before the last rounds: a chain that is intact, and too short."""
    folder, ask = acme()
    assert code(ask(privacy=LOCAL)) == ""
    shutil.copy(folder / LEDGER, folder / "backup")
    assert code(ask(round_=2, privacy=LOCAL)) == ""
    shutil.copy(folder / "backup", folder / LEDGER)
    restarted()
    assert code(ask(round_=3, privacy=LOCAL)) == "ledger-behind"


def test_a_ledger_of_another_life_is_refused(acme):
    """Catches: an anchor that compares lengths alone: another site's ledger, as long, would do."""
    folder, ask = acme()
    assert code(ask(privacy=LOCAL)) == ""
    own = (folder / LEDGER).read_bytes()
    shutil.move(folder / LEDGER, folder / "first-ledger")
    shutil.move(folder / AUDIT, folder / "first-audit")
    restarted()
    assert code(ask(privacy=LOCAL)) == ""
    (folder / LEDGER).write_bytes(own)
    restarted()
    assert code(ask(round_=2, privacy=LOCAL)) == "ledger-behind"


def test_a_new_life_begins_with_both_files_moved_away(acme):
    """Catches: a site that can never begin anew, or one whose new audit log hides that it did."""
    folder, ask = acme("max_rounds = 2")
    assert [code(ask(run=name)) for name in ("one", "two", "three")] == ["", "", "policy-rounds"]
    for name in (AUDIT, LEDGER):
        (folder / name).rename(folder / f"{name}.old")
    assert code(ask(run="three")) == ""
    assert verify(folder / AUDIT)[0]["ledger"]["lines"] == 0


@pytest.mark.parametrize("privacy", [{"mode": "none"}, LOCAL])
def test_a_crash_between_two_writes_is_no_attack(acme, monkeypatch, privacy):
    """Catches: a site that refuses for ever after its process was killed between the two files, in either order."""
    _, ask = acme()
    assert code(ask(privacy=privacy)) == ""
    append = audit.append_lines
    lines_of_a_round = 8
    points = 0
    for point in range(lines_of_a_round):
        written = []

        def stops(path, records, written=written, point=point):
            if len(written) >= point:
                raise StorageError("killed", code="disk-full")
            written.append(path.name)
            append(path, records)

        monkeypatch.setattr(audit, "append_lines", stops)
        reply = ask(round_=2 + point, privacy=privacy)
        monkeypatch.setattr(audit, "append_lines", append)
        points += code(reply) == "disk-full"
        restarted()
        assert code(ask("query", privacy=privacy)) == "", f"after {written}"
    assert points >= 3  # training, the ledger, trained


@pytest.mark.parametrize(
    ("event", "details"),
    [
        ("hello", {"ledger": {"lines": 1}}),
        ("hello", {"ledger": {"file": LEDGER, "lines": None, "hash": ""}}),
        ("hello", {"ledger": {"file": LEDGER, "lines": -1, "hash": ""}}),
        ("training", {"time": "yesterday"}),
        ("training", {"time": "2026-01-01T00:00:00"}),
        ("settings", {}),
    ],
)
def test_a_line_that_holds_what_no_version_writes_is_damage(tmp_path, event, details):
    """Catches: a traceback, or a code without what to do, for a log whose chain is whole."""
    audit.AuditLog(tmp_path / AUDIT).write(event, **details)
    with pytest.raises(StorageError) as caught:
        SiteRecords(tmp_path / AUDIT, tmp_path / LEDGER, "acme").check()
    assert caught.value.code == "run-corrupt"


def test_half_a_line_is_no_attack(acme):
    """Catches: a line that a power cut has halved, taken for one that was anchored."""
    folder, ask = acme()
    assert code(ask(privacy=LOCAL)) == ""
    for name in (LEDGER, AUDIT):
        with (folder / name).open("a") as file:
            file.write('{"sequence": 9, "ev')
    restarted()
    assert code(ask(round_=2, privacy=LOCAL)) == ""


def test_two_processes_of_a_site_share_its_records(tmp_path):
    """Catches: a second process that overlooks what the first has counted."""
    paths = (tmp_path / AUDIT, tmp_path / LEDGER)
    one, two = SiteRecords(*paths, "acme"), SiteRecords(*paths, "acme")
    policy = SitePolicy(max_rounds=2)
    one.begin_round("one", 1, policy)
    two.begin_round("two", 1, policy)
    for records in (one, two):
        with pytest.raises(PolicyError):
            records.begin_round("three", 1, policy)


def test_a_change_of_file_is_no_attack(tmp_path):
    """Catches: two sites in one folder with a log each and one ledger, each of which takes the other for an attack."""
    ledger = tmp_path / LEDGER
    one, two = (SiteRecords(tmp_path / f"{name}.jsonl", ledger, name) for name in ("one", "two"))
    for records in (one, two, one, two):
        records.write("hello")
        records.check()


@pytest.mark.parametrize("privacy", [{"mode": "none"}, LOCAL])
@pytest.mark.parametrize(
    ("key", "name", "expected"), [("ledger", LEDGER, "ledger-behind"), ("audit", AUDIT, "audit-behind")]
)
def test_a_record_under_another_name_is_refused(acme, privacy, key, name, expected):
    """Catches: a new life, with a whole budget, for a site whose site.toml names a file that is not there yet."""
    folder, ask = acme()
    file = folder / "site.toml"
    own = file.read_text()
    assert code(ask(privacy=privacy)) == ""
    file.write_text(own.replace("[site]", f'[site]\n{key} = "other.jsonl"'))
    restarted()
    assert code(ask("query", privacy=privacy)) == expected
    with pytest.raises(StorageError, match=f"name {name} as site.{key} in site.toml again"):
        read_site(file).check_records()
    (folder / name).rename(folder / "other.jsonl")  # what was spent has come along
    restarted()
    assert code(ask(round_=2, privacy=privacy)) == ""


def test_sites_that_share_a_ledger_keep_their_own_logs(tmp_path):
    """Catches: a log that is new to a shared ledger taken for that of another site."""
    ledger = tmp_path / LEDGER
    paths = {name: tmp_path / name / AUDIT for name in ("one", "two")}
    for path in paths.values():
        path.parent.mkdir()
    for name in ("one", "two", "one", "two"):
        records = SiteRecords(paths[name], ledger, name)
        records.write("hello")
        with records.charging() as anchor:
            audit.AuditLog(ledger).write("unprotected", **anchor)
        records.check()
    with pytest.raises(StorageError) as caught:
        SiteRecords(tmp_path / "new.jsonl", ledger, "two").check()
    assert caught.value.code == "audit-behind"


# What leaves is no oracle

PRIVATE_TASK = {"num_labels": 2, "labels": ["0", "1"]}


@pytest.mark.parametrize(
    ("rows", "own"),
    [
        ("text,label\nfine,0\nbad,2\n", "shard-label-range"),
        ("text,label\n", "shard-empty"),
        ("text,label\nfine,0\n", "shard-too-small"),
        ("text,label\nfine,0\n,1\n", "shard-empty-text"),
        ("text\nfine\n", "shard-columns"),
    ],
)
@pytest.mark.parametrize("kind", ["query", "train"])
def test_in_a_private_run_all_that_follows_from_rows_is_one_code(acme, rows, own, kind):
    """Catches: hellos with other labels, which ask whether the site has a label, and are answered exactly."""
    folder, ask = acme("", rows)
    assert code(ask(kind)) == own
    assert code(ask(kind, privacy=LOCAL)) == "shard-unusable"
    assert verify(folder / AUDIT)[-1]["code"] == own
    assert code(ask(kind, privacy={"examples": {"noise_multiplier": 1.0}})) == "shard-unusable"


def test_no_loss_leaves_under_dp_sgd_alone(acme):
    """Catches: an exact loss of rows beside gradients with noise on them."""
    _, ask = acme()
    examples = {"examples": {"noise_multiplier": 1.0}}
    reply = from_record(TrainReply, ask(privacy=examples).content)
    assert (reply.rows, reply.loss, reply.loss_shared, reply.seconds) == (8, 0.0, False, 0.0)
    assert from_record(TrainReply, ask(round_=2).content).loss_shared  # a look that would see one


def test_work_that_follows_from_rows_is_that_code_too(acme):
    """Catches: local_epochs with a limit on batches: an exact answer about the number of rows."""
    _, ask = acme("max_local_steps = 3\nmax_rows_per_round = 100")
    assert code(ask(train={"local_epochs": 2}, privacy=LOCAL)) == "shard-unusable"
    assert code(ask(train={"local_epochs": 2})) == "policy-steps"


@pytest.mark.parametrize("privacy", [{"mode": "none"}, LOCAL])
def test_a_day_has_only_so_many_different_settings(acme, monkeypatch, privacy):
    """Catches: an oracle that may be asked without limit: each max_length, each list of labels one more answer."""
    folder, ask = acme("max_settings_per_day = 3")
    answers = [code(ask("query", task={"max_length": length}, privacy=privacy)) for length in (8, 9, 10, 11)]
    assert answers == ["", "", "", "policy-settings"]
    assert code(ask("query", task={"max_length": 9}, privacy=privacy)) == ""  # what it has answered already
    assert code(ask("train", task={"max_length": 12}, privacy=privacy)) == "policy-settings"
    restarted()
    assert code(ask("query", task={"max_length": 12}, privacy=privacy)) == "policy-settings"
    assert len([line for line in verify(folder / AUDIT) if line["event"] == "settings"]) == 3
    later(monkeypatch, hours=25)
    assert code(ask("query", task={"max_length": 12}, privacy=privacy)) == ""


def test_by_default_notes_stay_at_the_site(acme):
    """Catches: shard-texts-cut:N for each max_length: the whole histogram of lengths, although metrics = []."""
    _, ask = acme("metrics = []")
    hello = from_record(HelloReply, ask("query").content)
    assert (hello.rows, hello.notes) == (8, "")
    _, ask = acme('tell = ["notes"]')
    hello = from_record(HelloReply, ask("query").content)
    assert (hello.rows, hello.notes) == (1, "shard-texts-cut:8")


def test_a_site_may_keep_everything_but_its_update(acme):
    """Catches: a number of rows that leaves in the reply, or in the number of steps of its passes."""
    folder, ask = acme("tell = []")
    hello = from_record(HelloReply, ask("query").content)
    assert (hello.rows, hello.evaluation_rows, hello.notes) == (1, 0, "")
    reply = from_record(TrainReply, ask(train={"local_epochs": 2}).content)
    assert (reply.rows, reply.steps, reply.loss_shared) == (1, 1, False)
    assert from_record(TrainReply, ask(train={"local_steps": 2}).content).steps == 2
    # a server that gives the site no time would count the steps of a pass, and so its rows
    passes = {"local_epochs": 1, "per_device_train_batch_size": 1}
    reply = from_record(TrainReply, ask(train=passes, hurried=True).content)
    assert (reply.rows, reply.steps, reply.missed_steps) == (1, 1, 0)
    reply = from_record(TrainReply, ask(train={"local_steps": 9}, hurried=True).content)
    assert (reply.steps, reply.missed_steps) == (1, 8)
    assert leaks(folder) == ["train.csv"]
