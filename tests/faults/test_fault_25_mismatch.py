"""Fault 25: a site with another base, and names that are paths: refused before training, nothing written elsewhere."""

import pytest
import tomli_w

from tests.support.federation import app_of_sites, leaks, model_folder, run_tiny, site_folder, tiny_config, write_rows
from tests.support.tiny import tiny_bert
from tests.support.toy import federate, rewritten, toy_app, toy_config
from tsugiki.client.site.site import read_site
from tsugiki.common.audit import verify
from tsugiki.common.config.parse import parse
from tsugiki.common.data.partition import by_column
from tsugiki.common.errors import ConfigError, DataError, ModelError
from tsugiki.common.files import read_lines
from tsugiki.common.model.find import find

NAMES = ["../../etc/x", "a/b", "CON", "x" * 300, "..", ".", "", " ", "a\nb", "a\0b", "~root", "C:\\x", "\u202ea", "a b"]


def tree(folder):
    """Return every path under a folder, with its size."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


def test_a_site_with_another_base_is_refused_with_both_fingerprints(tmp_path, capfd):
    """Catches: updates for another base averaged in: their shapes fit."""
    files = [site_folder(tmp_path / "sites" / name, name) for name in ("a", "b", "c")]
    other = tiny_bert(tmp_path / "other", seed=8)
    files[1].write_text(files[1].read_text().replace(f'= "{model_folder()}"', f'= "{other}"'))
    done = run_tiny(tiny_config(tmp_path), app_of_sites(files))
    events = verify(done.folder / "audit.jsonl")
    (refused,) = [event for event in events if event["event"] == "refused"]
    assert refused["code"] == "base-mismatch"
    assert len({refused["theirs"], refused["ours"]}) == 2
    assert done.summary["base_fingerprint"].startswith(refused["ours"])
    lines = [line for line in read_lines(done.folder / "metrics.jsonl") if line["round"]]
    assert [list(line["accepted"]) for line in lines] == [["a", "c"]] * 2
    assert leaks(done.folder, *capfd.readouterr()) == []


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("spec_sha256", "1" * 64, "spec-mismatch"),
        ("base_fingerprint", "1" * 64, "base-mismatch"),
        ("version", "99.0.0", "version-mismatch"),
    ],
)
def test_a_mismatch_is_refused_before_training_with_both_values(tmp_path, monkeypatch, field, value, code):
    """Catches: another rank or method (in the spec), base or release noticed in the middle of a round, or never."""
    trained = []

    def update(site, round_, received):
        trained.append(site)
        return received * 0

    def fault(node, reply):
        is_hello = reply.metadata.message_type == "query"
        return [rewritten(reply, **{field: value}) if node == 2 and is_hello else reply]

    done = federate(monkeypatch, toy_app(["a", "b", "c"], update), 3, toy_config(tmp_path), fault)
    (refused,) = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "refused"]
    assert refused["code"] == code
    assert value.startswith(refused["theirs"])
    assert refused["ours"]
    assert set(trained) == {"a", "c"}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_name_of_a_run(tmp_path, monkeypatch, name):
    """Catches: a run's folder made anywhere else."""
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as caught:
        parse({"run": {"name": name, "output_dir": str(tmp_path / "runs")}})
    assert [problem.key for problem in caught.value.problems] == ["run.name"]
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_name_of_a_site_at_the_site(tmp_path, name):
    """Catches: a site that learns of its bad name from the server."""
    (tmp_path / "site.toml").write_text(tomli_w.dumps({"site": {"name": name}, "data": {"train": "x.csv"}}))
    with pytest.raises(ConfigError) as caught:
        read_site(tmp_path / "site.toml")
    assert [problem.key for problem in caught.value.problems] == ["site.name"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_no_name_of_a_site_at_the_server(tmp_path, monkeypatch, name):
    """Catches: a name from the network in a path, a log line or the audit log."""

    def fault(node, reply):
        is_hello = reply.metadata.message_type == "query"
        return [rewritten(reply, site=name) if node == 2 and is_hello else reply]

    done = federate(monkeypatch, toy_app(["a", "b", "c"]), 3, toy_config(tmp_path / "runs"), fault)
    (refused,) = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "refused"]
    assert (refused["code"], refused["theirs"]) == ("site-name", "")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["toy"]
    known = {".lock", "audit.jsonl", "best", "checkpoint", "config.toml", "metrics.jsonl", "spec.json", "summary.json"}
    assert {path.name for path in done.folder.iterdir()} == known


@pytest.mark.parametrize("name", [*NAMES, "package:../../etc", "package:os/../..", "package:tests.x", "package:"])
def test_a_name_of_a_model_leads_nowhere_else(tmp_path, monkeypatch, name):
    """Catches: a model read from outside its package, an OSError's traceback, and a cache written for a wrong name."""
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(ModelError) as caught:
        find(name)
    assert caught.value.exit_status == 7
    assert tree(tmp_path) == before


def test_a_run_with_an_unknown_model_leaves_nothing_but_its_lock(tmp_path):
    """Catches: half a run's files for a run that never was."""
    config = tiny_config(tmp_path, model={"name": "../../etc/x"})
    before = set(tree(tmp_path))
    with pytest.raises(ModelError):
        run_tiny(config)
    assert set(tree(tmp_path)) - before == {"runs", "runs/tiny", "runs/tiny/.lock"}


def test_values_of_a_column_become_names_or_are_refused(tmp_path):
    """Catches: a cell of the data file used as a path."""
    values = ["../../etc/x", "a/b", "CON", "x" * 300, "..", "\u202e"]
    names = list(by_column(values))
    assert len(names) == len(values)
    parsed = [parse({"run": {"name": name}}).run.name for name in names]  # the same rule as for runs
    assert parsed == names
    with pytest.raises(DataError):
        by_column(["a b", "a/b"])


def test_a_split_by_such_a_column_writes_inside_the_runs_folder_only(tmp_path):
    """Catches: site names from data that lead out of the run's folder."""
    values = ("../../etc/x", "a/b")
    write_rows(tmp_path / "train.csv", company=lambda row: values[row % 4 // 2])
    write_rows(tmp_path / "dev.csv", 8)
    before = set(tree(tmp_path))
    done = run_tiny(tiny_config(tmp_path, simulation={"partition": "by-column", "column": "company"}))
    assert list(read_lines(done.folder / "metrics.jsonl")[1]["accepted"]) == ["a-b", "etc-x"]
    added = set(tree(tmp_path)) - before
    assert {path for path in added if not path.startswith("runs/tiny")} == {"runs"}
