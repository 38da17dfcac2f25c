"""A site's two records, its audit log and its privacy ledger, which anchor each other.

Each line of one holds the length and the last hash that the other had when the line was written. A file that is
deleted, cut off or put back from an old backup is therefore behind what the other says of it, and the site refuses to
go on: budgets and counts would begin at zero again. So it does if `site.toml` names a new file in the place of one of
them; the same file may have a new name or place. If both are moved away, the site begins a new life.

An anchor names lines only that are on the disk already. So a crash between two writes, in either order, leaves both
files consistent: the last line of each may be one that the other does not know of yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, Literal

from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.audit import Anchor, AuditLog
from tsugiki.common.errors import Code, StorageError
from tsugiki.common.files import lock_of, locked

BEGUN = "training"
"""The event of a round that a site begins to train, written before it does."""
ANSWERED = "settings"
"""The event of settings that the site has not answered in the last 24 hours, written before it answers."""
_DAY = timedelta(days=1)
_BEHIND: dict[str, Code] = {"audit": "audit-behind", "ledger": "ledger-behind"}


class _AnchoredLog(AuditLog):
    """One of the two records: it remembers its hashes, and what its lines say of the other.

    Args:
        path: of this record.
        key: the field of a line that holds the anchor.
        is_ours: whether an anchor is one of this pair of records.
    """

    def __init__(self, path: Path, key: str, is_ours: Callable[[Mapping[str, Any]], bool]) -> None:
        self._key = key
        self._is_ours = is_ours
        self._hashes: list[bytes] = []
        self._forgot_anchor()
        super().__init__(path)

    def had(self, anchor: Anchor) -> bool:
        """Return whether the record still begins with what it had at the time of an anchor."""
        if not anchor.lines:
            return True
        return len(self._hashes) >= anchor.lines and self._hashes[anchor.lines - 1].hex() == anchor.hash

    def _saw(self, records: Iterable[Mapping[str, Any]]) -> None:
        for record in records:
            try:
                self._see(record)
            except (KeyError, TypeError, ValueError) as error:  # a chain that is intact does not ensure what it holds
                raise StorageError(
                    f"a line of {self._path} is none of ours",
                    "the file as it was written",
                    "put the file back from a backup",
                    code="run-corrupt",
                ) from error

    def _see(self, record: Mapping[str, Any]) -> None:
        """Remember what a line says."""
        self._hashes.append(bytes.fromhex(record["hash"]))
        anchor = record.get(self._key)
        if isinstance(anchor, dict) and self._is_ours(anchor):
            if type(anchor["lines"]) is not int or anchor["lines"] < 0:
                raise ValueError("no number of lines")
            self.anchor = Anchor(anchor["lines"], str(anchor["hash"]))
            self.anchored_file = str(anchor["file"])

    def _forgot(self) -> None:
        self._hashes.clear()
        self._forgot_anchor()

    def _forgot_anchor(self) -> None:
        self.anchor = Anchor()
        self.anchored_file = ""


class _SiteAudit(_AnchoredLog):
    """A site's audit log, with what its policy counts."""

    def __init__(self, path: Path) -> None:
        self.rounds = 0
        self._recent_rounds: deque[datetime] = deque()
        self._recent_settings: dict[str, datetime] = {}
        # An audit log belongs to one site, and a site has one ledger, whatever its file is called today.
        super().__init__(path, "ledger", lambda anchor: True)

    def rounds_of_last_day(self) -> int:
        """Return how many rounds the site has begun in the last 24 hours."""
        since = datetime.now(UTC) - _DAY
        while self._recent_rounds and self._recent_rounds[0] <= since:
            self._recent_rounds.popleft()
        return len(self._recent_rounds)

    def settings_of_last_day(self) -> set[str]:
        """Return the hashes of the settings that the site has answered anew in the last 24 hours."""
        since = datetime.now(UTC) - _DAY
        self._recent_settings = {one: time for one, time in self._recent_settings.items() if time > since}
        return set(self._recent_settings)

    def _see(self, record: Mapping[str, Any]) -> None:
        super()._see(record)
        if record["event"] == BEGUN:
            self.rounds += 1
            self._recent_rounds.append(_time_of(record))
        if record["event"] == ANSWERED:
            self._recent_settings[str(record["settings_sha256"])] = _time_of(record)

    def _forgot(self) -> None:
        super()._forgot()
        self.rounds = 0
        self._recent_rounds.clear()
        self._recent_settings.clear()


class SiteRecords:
    """The audit log and the ledger of a site, for one process; others may write to the same files.

    To write to either, a process takes the audit log's lock first and the ledger's inside it, never in the other order.

    Args:
        audit: path of the audit log; None: the site keeps none, and nothing is counted or anchored in it.
        ledger: path of the ledger; None: the site keeps none. Several sites may share it.
        site: name of the site.
    """

    def __init__(self, audit: Path | None, ledger: Path | None, site: str) -> None:
        self._site = site
        self._audit_path = audit
        self._ledger_path = ledger
        self._audit: _SiteAudit | None = None
        self._ledger: _AnchoredLog | None = None

    def check(self) -> None:
        """Check that neither record has lost lines.

        Raises:
            StorageError: `audit-behind` or `ledger-behind`; `audit-broken`, a line was changed.
        """
        # A new site has neither, and its folder may be one that only the client can write.
        if any(path is not None and path.exists() for path in (self._audit_path, self._ledger_path)):
            with self._open():
                pass

    def write(self, event: str, **details: Any) -> None:
        """Append to the audit log. No-op if the site keeps none.

        Raises:
            StorageError: see `check`; or the log cannot be written.
        """
        with self._open() as audit:
            self._append(audit, event, details)

    def admit(self, settings_sha256: str, policy: SitePolicy) -> None:
        """Count settings that the site is to answer, unless it has counted them in the last 24 hours.

        Raises:
            PolicyError: `policy-settings`, too many in that time.
            StorageError: see `write`.
        """
        with self._open() as audit:
            if audit is None or settings_sha256 in audit.settings_of_last_day():
                return
            policy.check_settings(len(audit.settings_of_last_day()))
            self._append(audit, ANSWERED, {"settings_sha256": settings_sha256})

    def begin_round(self, run: str, round_number: int, policy: SitePolicy) -> None:
        """Count a round before it is trained. Two processes of one site cannot both begin the last one.

        Raises:
            PolicyError: `policy-rounds`, the policy allows no further round.
            StorageError: see `write`.
        """
        with self._open() as audit:
            if audit is not None:
                policy.check_rounds(audit.rounds, audit.rounds_of_last_day())
            self._append(audit, BEGUN, {"run": run, "round": round_number})

    @contextmanager
    def charging(self) -> Iterator[dict[str, Any]]:
        """Yield the fields that anchor the audit log in the lines that are written to the ledger meanwhile.

        Raises:
            StorageError: see `check`.
        """
        with self._open() as audit:
            if audit is None or self._audit_path is None:
                yield {}
            else:
                yield {"audit": {"site": self._site, **_anchor_field(self._audit_path, audit.head())}}

    @contextmanager
    def _open(self) -> Iterator[_SiteAudit | None]:
        """Lock the audit log, and check both records against each other."""
        if self._audit_path is None:
            yield None
            return
        with locked(lock_of(self._audit_path)):
            if self._audit is None:
                self._audit = _SiteAudit(self._audit_path)
            self._audit.head()  # with the lines of other processes
            self._read_ledger()
            if self._ledger is not None and self._ledger_path is not None:
                if not self._ledger.had(self._audit.anchor):
                    raise _behind("ledger", self._ledger_path, self._ledger, self._audit, self._audit_path)
                if not self._audit.had(self._ledger.anchor):
                    raise _behind("audit", self._audit_path, self._audit, self._ledger, self._ledger_path)
            yield self._audit

    def _read_ledger(self) -> Anchor:
        """Return the ledger's length and last hash. Its lock keeps out lines that are not on the disk yet."""
        if self._ledger_path is None:
            return Anchor()
        # Without a file there is nothing to wait for, and no lock has to be made.
        with locked(lock_of(self._ledger_path)) if self._ledger_path.exists() else nullcontext():
            if self._ledger is None:
                self._ledger = _AnchoredLog(self._ledger_path, "audit", self._is_of_this_site)
            return self._ledger.head()

    def _is_of_this_site(self, anchor: Mapping[str, Any]) -> bool:
        """Return whether a line of the ledger, which other sites may share, anchors this site's audit log."""
        if "site" in anchor:
            return bool(anchor["site"] == self._site)
        # Lines of earlier versions do not say whose log they mean.
        return self._audit_path is not None and anchor.get("file") == self._audit_path.name

    def _append(self, audit: _SiteAudit | None, event: str, details: Mapping[str, Any]) -> None:
        if audit is None:
            return
        anchor = {}
        if self._ledger_path is not None:
            anchor = {"ledger": _anchor_field(self._ledger_path, self._read_ledger())}
        audit.write(event, **details, **anchor)


@cache
def records_of(audit: Path | None, ledger: Path | None, site: str) -> SiteRecords:
    """Return a site's records at these paths, opened once in a process: to open them is to verify all of both."""
    return SiteRecords(audit, ledger, site)


def _time_of(record: Mapping[str, Any]) -> datetime:
    """Return when a line was written.

    Raises:
        ValueError: it does not say so, with a time zone.
    """
    time = datetime.fromisoformat(record["time"])
    if time.tzinfo is None:
        raise ValueError("no time zone")
    return time


def _anchor_field(path: Path, anchor: Anchor) -> dict[str, Any]:
    return {"file": path.name, **asdict(anchor)}


def _behind(
    which: Literal["audit", "ledger"], path: Path, log: _AnchoredLog, witness: _AnchoredLog, witness_path: Path
) -> StorageError:
    """Return the error for a record that has lost what the other says of it, or has another file in its place."""
    hint = "put the file back from a backup"
    if witness.anchored_file != path.name:
        hint = f"name {witness.anchored_file} as site.{which} in site.toml again, or rename it to {path.name}"
    return StorageError(
        f"{path} has {log.head().lines} lines, and not the first {witness.anchor.lines} of "
        f"{witness.anchored_file}, which {witness_path.name} remembers",
        "the file as it was written: what was spent and counted cannot be forgotten",
        f"{hint}. To begin a new life on purpose, move both {path.name} and {witness_path.name} away: this site then "
        "forgets its budget and its rounds",
        code=_BEHIND[which],
    )
