"""Check the logs of a run or of a site: each by itself, or the operator's and a site's against each other.

A check compares what two records say of the same thing. Nothing here trusts either side: a difference shows that one of
the records is wrong, not which.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tsugiki.common.audit import Anchor, verify
from tsugiki.common.config.files import read_toml
from tsugiki.common.errors import StorageError, UsageError
from tsugiki.common.files import read_lines
from tsugiki.common.privacy.accounting import Release, epsilon
from tsugiki.common.privacy.ledger import EVENT as CHARGED
from tsugiki.server.run import checkpoint
from tsugiki.server.run.anchors import AUDIT, METRICS, metrics_hold

LEDGER = "privacy-ledger.jsonl"
Lines = list[dict[str, Any]]


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        what: is compared.
        first: what the first record says.
        second: what the other record says of it.
        holds: whether they agree; None: one of them says nothing, so nothing was compared.
    """

    what: str
    first: str
    second: str
    holds: bool | None

    def as_json(self) -> dict[str, Any]:
        """Return the check for scripts."""
        return asdict(self)


def verify_folder(folder: Path, site: Path | None = None) -> list[Check]:
    """Return the checks of a folder, and of a site's folder against it.

    Args:
        folder: of a run, or of a site.
        site: the folder of a site that took part in the run; None: `folder` is checked alone.

    Raises:
        UsageError: a folder holds no such logs, or `site` is given and `folder` is no run's.
    """
    if site is None:
        alone = check_run if _is_run(folder) else check_site
        return _readable(lambda: alone(folder))
    if not _is_run(folder):
        raise UsageError(f"{folder} is not the folder of a run", f"a folder with {METRICS}", "name the run's first")
    run = [replace(check, what=f"run: {check.what}") for check in _readable(lambda: check_run(folder))]
    own = [replace(check, what=f"site: {check.what}") for check in _readable(lambda: check_site(site))]
    return run + own + _readable(lambda: compare(folder, site))


def _readable(checks: Callable[[], list[Check]]) -> list[Check]:
    """Return the checks, or one that fails if a file lacks what they need; an intact chain does not ensure that."""
    try:
        return checks()
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        return [Check("files", f"a value is missing or of another kind ({error!r:.60})", "as they were written", False)]


def check_run(folder: Path) -> list[Check]:
    """Return the checks of a run's folder: chains, anchors, and the audit log against metrics.jsonl."""
    events, checks = _chain(folder / AUDIT)
    lines, read = _metrics(folder / METRICS)
    checks += read
    ledger = _ledger_of_run(folder)
    charges: Lines | None = None
    if ledger is not None:
        charges, read = _chain(ledger)
        checks += read
    if events is None or lines is None:
        return checks
    checks += _checkpoint_anchors(folder, events, charges)
    finished = [event["metrics"] for event in events[-1:] if event["event"] == "finished" and "metrics" in event]
    checks += [_anchored(METRICS, AUDIT, anchor, metrics_hold(folder, anchor)) for anchor in finished]
    return [*checks, _rounds_of_run(events, lines)]


def check_site(folder: Path) -> list[Check]:
    """Return the checks of a site's folder: both chains, and what each record remembers of the other."""
    audit, ledger = _records_of_site(folder)
    if not audit.is_file() and not ledger.is_file():
        raise UsageError(f"{folder} holds no logs of a run or of a site", f"{audit.name} or {ledger.name}")
    events, checks = _chain(audit)
    charges, read = _chain(ledger)
    checks += read
    if events is None or charges is None:
        return checks
    for here, there, key, other, name in (
        (events, charges, "ledger", ledger, audit.name),
        (charges, events, "audit", audit, ledger.name),
    ):
        anchors = [line[key] for line in here if line.get(key, {}).get("file") == other.name]
        if key == "ledger":  # a site has one ledger, whatever its file was called when the last line was written
            anchors += [line[key] for line in here if key in line][-1:]
        lost = [one for one in anchors if not Anchor(one["lines"], one["hash"]).holds(there)]
        last = (lost or anchors)[-1:] or [{"lines": 0}]
        checks.append(_anchored(other.name, name, last[0], not lost))
    return checks


def compare(folder: Path, site_folder: Path) -> list[Check]:
    """Return the checks of what an operator and a site both record about a run: specs, rounds, bytes and epsilons."""
    audit, ledger = _records_of_site(site_folder)
    try:
        ours = verify(folder / AUDIT)
        theirs = verify(audit)
        charges = verify(ledger)
        lines = read_lines(folder / METRICS)
    except StorageError:
        return []  # the checks of the single files say which is broken
    run = str(read_toml(folder / "config.toml").get("run", {}).get("name", folder.name))
    site = _name_of_site(site_folder, theirs)
    taken = [(line["round"], line["accepted"][site]) for line in lines if site in line.get("accepted", {})]
    # an update that came late was trained in an earlier round
    accepted = {number - one.get("late_by", 0): one for number, one in taken}
    trained = [event for event in theirs if event["event"] == "trained" and event.get("run") == run]
    return [
        _specs(ours, [event for event in theirs if event["event"] == "hello" and event.get("run") == run]),
        _rounds(accepted, trained),
        _bytes(accepted, trained),
        *_epsilons(_ledger_of_run(folder), charges, run, sorted(accepted)),
    ]


# Of one folder


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).is_file() or (folder / "checkpoint").is_dir()


def _chain(path: Path) -> tuple[Lines | None, list[Check]]:
    """Return the lines of a chained log, or None if it is broken, with the check."""
    what = f"chain of {path.name}"
    if not path.is_file():
        return [], [Check(what, "no file", "", None)]
    try:
        lines = verify(path)
    except StorageError as error:
        return None, [Check(what, error.problem, "an untouched log", False)]
    return lines, [Check(what, f"{len(lines)} lines", "whole", True)]


def _metrics(path: Path) -> tuple[Lines | None, list[Check]]:
    try:
        return read_lines(path), []
    except StorageError:
        return None, [Check(f"lines of {path.name}", "a line is no JSON", "the file as the run wrote it", False)]


def _checkpoint_anchors(folder: Path, events: Lines, charges: Lines | None) -> list[Check]:
    """Return the checks of what the last checkpoint remembers of the logs."""
    try:
        anchors = checkpoint.read_anchors(folder / "checkpoint")
    except StorageError as error:
        return [Check("checkpoint", error.problem, "a whole checkpoint", False)]
    checks = []
    for name, lines, path in (("audit", events, AUDIT), ("ledger", charges, LEDGER)):
        if name in anchors and lines is not None:
            checks.append(_anchored(path, "checkpoint", anchors[name], Anchor(**anchors[name]).holds(lines)))
    if "metrics" in anchors:
        checks.append(_anchored(METRICS, "checkpoint", anchors["metrics"], metrics_hold(folder, anchors["metrics"])))
    return checks


def _anchored(name: str, witness: str, anchor: Mapping[str, Any], holds: bool) -> Check:
    said = "has them" if holds else "has lost or changed some"
    return Check(f"{name} by {witness}", f"the first {anchor['lines']} lines", said, holds)


def _rounds_of_run(events: Lines, lines: Lines) -> Check:
    """Check that the audit log and metrics.jsonl have the same rounds, with the same sites and adapters."""
    # A crash between the two may leave a round twice in the audit log, or a last one there alone.
    logged = {event["round"]: event for event in events if event["event"] == "round"}
    rounds = {line["round"]: line for line in lines if line["round"] and not line.get("voided")}
    wrong = [
        number
        for number, line in rounds.items()
        if number not in logged
        or logged[number]["adapter_sha256"] != line["adapter_sha256"]
        or logged[number]["accepted"] != sorted(line["accepted"])
    ]
    missing = [number for number in logged if number not in rounds and number < max(rounds, default=0)]
    differ = sorted({*wrong, *missing})
    said = f"rounds {_shown(differ)} differ" if differ else f"{len(rounds)} rounds"
    return Check(f"rounds of {AUDIT} and {METRICS}", f"{len(logged)} rounds", said, not differ)


def _ledger_of_run(folder: Path) -> Path | None:
    """Return the clients' ledger, by the run's settings or in its usual places; None if it is not there."""
    config = folder / "config.toml"
    named = read_toml(config).get("privacy", {}).get("ledger", "") if config.is_file() else ""
    places = [Path(named)] if named else [folder / LEDGER, folder.parent / LEDGER]
    return next((path for path in places if path.is_file()), None)


def _records_of_site(folder: Path) -> tuple[Path, Path]:
    """Return the paths of a site's audit log and ledger, by its site.toml, if that is there."""
    file = folder / "site.toml"
    about = read_toml(file).get("site", {}) if file.is_file() else {}
    return folder / (about.get("audit") or AUDIT), folder / (about.get("ledger") or LEDGER)


def _name_of_site(folder: Path, events: Lines) -> str:
    """Return the site's name, by its own log, or else by its site.toml.

    Raises:
        UsageError: neither has it.
    """
    names = [str(event["site"]) for event in events if event["event"] == "hello" and "site" in event]
    if names:
        return names[-1]
    file = folder / "site.toml"
    name = read_toml(file).get("site", {}).get("name", "") if file.is_file() else ""
    if not name:
        raise UsageError(f"{folder} does not say which site it belongs to", "an audit log with a hello, or site.toml")
    return str(name)


# Of an operator and a site


def _specs(ours: Lines, hellos: Lines) -> Check:
    """Check that both have the same spec of the adapter, in the whole run."""
    here = {str(event["spec_sha256"]) for event in ours if event["event"] in ("started", "resumed")}
    there = {str(event["spec_sha256"]) for event in hellos}
    said = [", ".join(sorted(one[:12] for one in specs)) for specs in (here, there)]
    if not there:
        return Check("spec", said[0], "no hello of this run", None)
    # A site may have said hello with another spec, and was refused then: its last one counts.
    return Check("spec", said[0], said[1], {str(hellos[-1]["spec_sha256"])} == here)


def _rounds(accepted: Mapping[int, Any], trained: Lines) -> Check:
    """Check that the site has trained each round in which the operator has its update."""
    own = {int(event["round"]) for event in trained}
    if not accepted:
        return Check("rounds", "no update of this site", f"rounds {_shown(own)}", None)
    return Check("rounds", f"rounds {_shown(accepted)}", f"rounds {_shown(own)}", accepted.keys() <= own)


def _bytes(accepted: Mapping[int, Mapping[str, Any]], trained: Lines) -> Check:
    """Check that as many bytes were received in each round as the site has sent in one of its attempts."""
    sent: dict[int, list[int]] = {}
    for event in trained:
        if "bytes" in event:
            sent.setdefault(int(event["round"]), []).append(int(event["bytes"]))
    both = [number for number in accepted if number in sent and "bytes_up" in accepted[number]]
    if not both:
        return Check("bytes", "none that both record", "", None)
    differ = [number for number in both if accepted[number]["bytes_up"] not in sent[number]]
    received = sum(int(accepted[number]["bytes_up"]) for number in both)
    said = f"rounds {_shown(differ)} differ" if differ else f"{sum(sent[number][-1] for number in both):,} bytes"
    return Check("bytes", f"{received:,} bytes", said, not differ)


def _epsilons(ledger: Path | None, charges: Lines, run: str, rounds: Sequence[int]) -> list[Check]:
    """Check, for each adversary, that both have charged the same noise, and so the same epsilon, for these rounds."""
    if ledger is None:
        return [Check("epsilons", "no ledger", "", None)]
    try:
        ours = _charged(verify(ledger), run)
    except StorageError:
        return []
    theirs = _charged(charges, run)
    if not ours.keys() & theirs.keys():  # as for a run without privacy beside the ledger of others
        return [Check("epsilons", "none that both record", "", None)]
    # Where a site sends a share of the noise without a mask, it counts each model as its upload; the operator does not.
    if any(release.noise == "skellam" for found in theirs.get("uploads", {}).values() for release in found):
        theirs = {"uploads": theirs["uploads"]}
    delta = _delta(verify(ledger), run)
    checks = []
    for adversary in sorted(ours.keys() & theirs.keys()):
        both = [number for number in rounds if number in ours[adversary] and number in theirs[adversary]]
        here, there = ([charges[adversary][number] for number in both] for charges in (ours, theirs))
        same = all(one.keys() == other.keys() for one, other in zip(here, there, strict=True))
        what = f"{adversary}, rounds {_shown(both)}"
        first, second = (_epsilon([release for found in one for release in found], delta) for one in (here, there))
        checks.append(Check(f"epsilon of {what}", first, second, same if both else None))
        checks.append(_attempts(adversary, what, both, here, there))
    return checks


def _attempts(
    adversary: str,
    what: str,
    rounds: Sequence[int],
    ours: Sequence[Counter[Release]],
    theirs: Sequence[Counter[Release]],
) -> Check:
    """Check that neither has left out attempts at a round that the other has charged.

    The operator charges uploads when it asks for them, so a site may have fewer. The site charges all else when it
    sends something, so the operator, who charges what is opened or released, may have fewer.

    Args:
        adversary: whose charges these are.
        what: the charges are, for the reader.
        rounds: that both have charged.
        ours: the operator's charges of each of these rounds.
        theirs: the site's.
    """
    charged_first, charged_later = (ours, theirs) if adversary == "uploads" else (theirs, ours)
    totals = [[found.total() for found in charges] for charges in (charged_first, charged_later)]
    differ = [number for number, first, later in zip(rounds, *totals, strict=True) if first < later]
    here, there = (f"{sum(found.total() for found in charges)} charges" for charges in (ours, theirs))
    if differ:
        there += f": rounds {_shown(differ)} differ"
    return Check(f"attempts of {what}", here, there, not differ if rounds else None)


def _charged(lines: Lines, run: str) -> dict[str, dict[int, Counter[Release]]]:
    """Return the releases of each round of a run with their counts, over all attempts, by adversary.

    The sampling of clients is left out: a site that was asked knows it, and counts the round in full.
    """
    found: dict[str, dict[int, Counter[Release]]] = {}
    for line in lines:
        if line["event"] == CHARGED and line.get("run") == run:
            release = Release(**{**line["release"], "sampling_probability": 1.0})
            of_round = found.setdefault(line["adversary"], {}).setdefault(int(line["round"]), Counter())
            of_round[release] += int(line["count"])
    return found


def _delta(lines: Lines, run: str) -> float:
    return next(float(line["delta"]) for line in lines if line["event"] == CHARGED and line.get("run") == run)


def _epsilon(releases: Sequence[Release], delta: float) -> str:
    return f"{epsilon(Counter(releases), delta):.4g}"


def _shown(numbers: Iterable[int]) -> str:
    """Return numbers of rounds as ranges: 1-3, 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts) or "none"
