"""`tsugiki audit verify`: what it accepts after honest runs, and that it finds each kind of difference."""

import json
import shutil

import pytest

from tests.support.command_line import invoke
from tests.support.federation import app_of_sites, run_tiny, site_folder, tiny_config
from tests.support.private import LEDGER
from tsugiki.client.site.records import records_of
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.errors import UsageError
from tsugiki.server.report.verification import _ledger_of_run, check_run, check_site, verify_folder

MODES = {
    "open": {"mode": "none"},
    "bare": {"mode": "distributed", "noise_multiplier": 4.0, "delta": 1e-3},
    "local": {"mode": "local", "noise_multiplier": 4.0, "delta": 1e-3},
    "masked": {"mode": "distributed", "noise_multiplier": 4.0, "delta": 1e-3, "secure_aggregation": True},
}


def run_of(folder, mode):
    """Let two real sites take part in a run; return the run's folder and that of the site acme."""
    records_of.cache_clear()
    names = ("acme", "bolt", "carl")
    files = [site_folder(folder / name, name) for name in names]
    config = tiny_config(
        folder,
        privacy={"enrolled_clients": 3, **MODES[mode]},
        strategy={"min_clients": 3},
        simulation={"clients": 3},
    )
    return run_tiny(config, app_of_sites(files)).folder, folder / "acme"


@pytest.fixture(scope="module", params=MODES)
def kept(request, tmp_path_factory):
    """The folders of a run and of a site, never changed."""
    return request.param, *run_of(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The same, of a run in mode local."""
    return run_of(tmp_path_factory.mktemp("local"), "local")


@pytest.fixture
def folders(local, tmp_path):
    """Copies of both, to be changed."""
    run, site = (shutil.copytree(path, tmp_path / path.name) for path in local)
    return run, site


def differences(checks):
    """Return what differs."""
    return [check.what for check in checks if check.holds is False]


def rewritten(path, change):
    """Write a log anew with changed lines and an intact chain, as somebody who knows how it is made."""
    lines = verify(path)
    path.unlink()
    log = AuditLog(path)
    for line in lines:
        changed = change(dict(line))
        if changed is not None:
            details = {key: value for key, value in changed.items() if key not in ("sequence", "time", "previous")}
            details.pop("hash")
            log.write(details.pop("event"), **details)


def test_the_records_of_an_honest_run_agree(kept):
    """Catches: a check that no run passes; one that compares nothing."""
    mode, run, site = kept
    checks = verify_folder(run, site)
    assert differences(checks) == []
    compared = {check.what: check for check in checks if check.holds}
    of_run = {f"run: {what}" for what in ("chain of audit.jsonl", "metrics.jsonl by checkpoint")}
    of_site = {f"site: {what}" for what in ("chain of audit.jsonl", f"{LEDGER} by audit.jsonl")}
    assert of_run | of_site | {"spec", "rounds", "bytes"} <= set(compared)
    assert compared["rounds"].first == compared["rounds"].second == "rounds 1-2"
    assert compared["bytes"].first == compared["bytes"].second != "0 bytes"
    adversaries = {
        "open": [],
        "bare": ["uploads"],
        "local": ["release", "uploads"],
        "masked": ["outsiders", "release", "sums"],
    }[mode]
    epsilons = [what for what in compared if what.startswith("epsilon")]
    assert epsilons == [f"epsilon of {one}, rounds 1-2" for one in adversaries]


def test_the_command_prints_a_table_and_ends_with_a_status(folders):
    """Catches: an exit status of 0 for records that differ; output that a script cannot read."""
    run, site = folders
    good = invoke("audit", "verify", run, "--with", site)
    assert good.exit_code == 0
    assert "DIFFER" not in good.stdout
    (site / LEDGER).unlink()
    bad = invoke("audit", "verify", site)
    assert bad.exit_code == 1
    assert "DIFFER" in bad.stdout
    shown = json.loads(invoke("audit", "verify", site, "--json").stdout)
    assert [one["what"] for one in shown if one["holds"] is False] == [f"{LEDGER} by audit.jsonl"]


@pytest.mark.parametrize("name", ["audit.jsonl", LEDGER])
def test_a_site_alone_shows_what_it_has_lost(folders, name):
    """Catches: a cut log that is whole by its own chain."""
    _, site = folders
    assert differences(check_site(site)) == []
    lines = (site / name).read_text().splitlines(keepends=True)
    (site / name).write_text("".join(lines[:2]))
    assert differences(check_site(site)) == [f"{name} by {'audit.jsonl' if name == LEDGER else LEDGER}"]
    (site / name).write_text("".join([*lines[:1], *lines[2:]]))
    assert differences(check_site(site)) == [f"chain of {name}"]
    (site / name).write_bytes(b"\x80" + "".join(lines).encode())
    assert differences(check_site(site)) == [f"chain of {name}"]


def test_a_run_alone_shows_what_it_has_lost(folders):
    """Catches: a line of metrics.jsonl that is gone or changed; an audit log without the last rounds."""
    run, _ = folders
    metrics = run / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text("".join(whole.splitlines(keepends=True)[:1]))
    assert {"metrics.jsonl by checkpoint", "metrics.jsonl by audit.jsonl"} <= set(differences(check_run(run)))
    metrics.write_text(whole.replace('"adapter_sha256": "', '"adapter_sha256": "0'))
    assert "rounds of audit.jsonl and metrics.jsonl" in differences(check_run(run))
    metrics.write_text(whole)
    assert differences(check_run(run)) == []
    log = run / "audit.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]))
    assert "audit.jsonl by checkpoint" in differences(check_run(run))


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("audit.jsonl", lambda line: line | {"bytes": 1} if line["event"] == "trained" else line, "bytes"),
        ("audit.jsonl", lambda line: None if line["event"] == "trained" else line, "rounds"),
        ("audit.jsonl", lambda line: line | {"spec_sha256": "f" * 64} if line["event"] == "hello" else line, "spec"),
        (
            LEDGER,
            lambda line: line | {"release": line["release"] | {"noise_multiplier": 9.0}},
            "epsilon of uploads, rounds 1-2",
        ),
    ],
)
def test_a_site_that_records_something_else_is_found(folders, name, change, expected):
    """Catches: a comparison that looks at the chains alone, which somebody who rewrites a log makes anew."""
    run, site = folders
    rewritten(site / name, change)
    assert expected in differences(verify_folder(run, site))


@pytest.mark.parametrize(
    ("who", "adversary", "expected"),
    [
        ("site", "uploads", ["attempts of uploads, rounds 1-2"]),  # it has sent more than it was asked for
        ("operator", "release", ["attempts of release, rounds 1-2"]),  # it has released more than the site has sent
        ("site", "release", []),  # what it has sent may have been voided
        ("operator", "uploads", []),  # what it has asked for may not have come
    ],
)
def test_attempts_that_one_side_left_out_are_found(folders, who, adversary, expected):
    """Catches: a round that was tried again, and is charged once at one of the two; honest retries taken for lies."""
    run, site = folders
    ledger = site / LEDGER if who == "site" else _ledger_of_run(run)
    rewritten(ledger, lambda line: line | {"count": 2} if line["adversary"] == adversary else line)
    assert [what for what in differences(verify_folder(run, site)) if what.startswith("attempts")] == expected


def test_a_ledger_of_other_runs_only_is_not_compared(folders):
    """Catches: a traceback for a run without privacy whose folder is beside the ledger of private ones."""
    run, site = folders
    rewritten(_ledger_of_run(run), lambda line: line | {"run": "another"})
    assert [check.holds for check in verify_folder(run, site) if check.what == "epsilons"] == [None]


def _last_line(line):
    """Return what puts another last line into a file."""

    def change(path):
        path.write_text("\n".join([*path.read_text().splitlines()[:-1], line]) + "\n")

    return change


def _without(field):
    """Return what writes a log anew without a field, with an intact chain."""
    return lambda path: rewritten(path, lambda line: {key: value for key, value in line.items() if key != field})


DAMAGE = [("metrics.jsonl", _last_line(line)) for line in ("3", "{}", '{"round": "x"}', '{"round": 1, "accepted": 3}')]
DAMAGE += [("audit.jsonl", change) for change in (_last_line("[]"), _without("round"), _without("spec_sha256"))]
DAMAGE += [("config.toml", lambda path: path.write_text("run = 3\nprivacy = 4"))]
DAMAGE_OF_SITE = [("audit.jsonl", _last_line("null")), ("audit.jsonl", _without("round"))]
DAMAGE_OF_SITE += [(LEDGER, _last_line("3")), (LEDGER, _without("release")), (LEDGER, _without("adversary"))]
DAMAGE_OF_SITE += [("site.toml", lambda path: path.write_text("site = 3"))]


@pytest.mark.parametrize(
    ("of_site", "name", "damage"),
    [(False, *case) for case in DAMAGE] + [(True, *case) for case in DAMAGE_OF_SITE],
)
def test_damage_of_any_kind_is_a_difference(folders, of_site, name, damage):
    """Catches: a traceback for a file whose lines are not records, or lack what the comparison needs."""
    damage(folders[of_site] / name)
    assert differences(verify_folder(*folders))


def test_folders_without_logs_are_refused(tmp_path, folders):
    """Catches: an empty table, and status 0, for a folder with nothing in it."""
    run, site = folders
    with pytest.raises(UsageError):
        verify_folder(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="not the folder of a run"):
        verify_folder(site, run)
