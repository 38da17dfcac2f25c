"""Fault 24, in a whole federation: a site whose shard is wrong answers with a code, and the others go on."""

import logging

import pytest

from tests.faults.test_fault_24_data_shard import FAULTS, one_class
from tests.support.federation import app_of_sites, leaks, run_tiny, server_log, site_folder, tiny_config
from tests.support.toy import is_train
from tsugiki.common.audit import verify
from tsugiki.common.files import read_lines
from tsugiki.server.run.progress import Lines


def federation(folder, spoil):
    """Return the site.toml files of three sites; what the second's shard.csv holds is up to `spoil`."""
    files = [site_folder(folder / name, name, "shard.csv") for name in ("a", "b", "c")]
    for file in files:
        (file.parent / "train.csv").rename(file.parent / "shard.csv")
    (folder / "b" / "shard.csv").unlink()
    spoil(folder / "b")
    return files


def run(folder, spoil, rounds=2, **options):
    """Run the federation with its classes by name, as the spoiled shards have them."""
    config = tiny_config(folder, run={"rounds": rounds}, task={"labels": ["no", "yes"]})
    return run_tiny(config, app_of_sites(federation(folder / "sites", spoil)), **options)


def rounds_of(done):
    """Return the lines of the rounds with training."""
    return [line for line in read_lines(done.folder / "metrics.jsonl") if line["round"]]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_the_site_is_refused_with_a_code_and_the_others_go_on(tmp_path, caplog, capfd, fault):
    """Catches: a run that ends with one site's data, a weight from an empty shard, and a cell's text at the server."""
    with caplog.at_level(logging.DEBUG):
        done = run(tmp_path, fault, progress=Lines())
    assert [list(line["accepted"]) for line in rounds_of(done)] == [["a", "c"]] * 2
    events = verify(done.folder / "audit.jsonl")
    assert [event["code"] for event in events if event["event"] == "refused"] == [FAULTS[fault]]
    assert sorted(event["site"] for event in events if event["event"] == "hello") == ["a", "c"]
    assert leaks(done.folder, *capfd.readouterr(), server_log(caplog)) == []


def test_a_site_of_one_class_takes_part_with_a_note(tmp_path):
    """Catches: a site of one class, which others complement, refused; and a note that the operator does not see."""

    def one_class_that_tells(folder):
        one_class(folder)
        file = folder / "site.toml"
        file.write_text(file.read_text() + '\n[policy]\ntell = ["rows", "notes", "metrics"]\n')

    done = run(tmp_path, one_class_that_tells, 1)
    assert list(rounds_of(done)[0]["accepted"]) == ["a", "b", "c"]
    hellos = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "hello"]
    one_class_at = {event["site"]: "shard-one-class" in event["notes"].split(",") for event in hellos}
    assert one_class_at == {"a": False, "b": True, "c": False}
    assert leaks(done.folder) == []


def test_a_shard_that_is_gone_later_costs_its_site_the_round(tmp_path, capfd):
    """Catches: rows kept in memory after their file was taken away, and a run that ends with it."""

    def fault(node, reply):
        if is_train(reply):
            (tmp_path / "sites" / "b" / "shard.csv").unlink(missing_ok=True)
        return [reply]

    done = run(tmp_path, one_class, fault=fault)
    assert [list(line["accepted"]) for line in rounds_of(done)] == [["a", "c"]] * 2
    assert [line["rejected"]["b"]["reason"] for line in rounds_of(done)] == ["shard-missing"] * 2
    assert leaks(done.folder, *capfd.readouterr()) == []
