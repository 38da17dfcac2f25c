"""The keys of the nodes that may take part: a folder of public keys, one file a node, which the operator can read.

A running server reads the folder again and again, and passes changes on to the SuperLink. The file `revoked` in it has
the fingerprints of revoked keys: none of them is registered or accepted until it is restored. A key whose file is
removed by hand is shut out, but not remembered.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from tsugiki.common.errors import StorageError, UsageError
from tsugiki.common.files import locked, read_lines, to_json, unwritable, write_atomically
from tsugiki.common.keys import fingerprint, read_public_key
from tsugiki.common.settings import NAME_PATTERN

REVOKED = "revoked"
"""The file's name: one JSON line for each key that was revoked or restored; the last line of a key counts."""


@dataclass(frozen=True)
class Revocation:
    """A revoked key.

    Args:
        fingerprint: of the key.
        name: of the node that had it.
        date: when it was revoked, in UTC and ISO format.
    """

    fingerprint: str
    name: str
    date: str


def register(folder: Path, public: Path, name: str = "") -> tuple[str, str]:
    """Add a node; return its name and fingerprint.

    Args:
        folder: the keyring, created if missing.
        public: the node's public key.
        name: by default the name of the file.

    Raises:
        UsageError: the name is taken or not valid, or the file has no public key of a node; `key-revoked`.
        StorageError: the folder cannot be written.
    """
    name = name or public.name.removesuffix(".pub")
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(
            f"{name!r:.80} is no name of a node", "lower-case letters, digits, . _ -, at most 64", "use --name"
        )
    key = read_public_key(public)
    revocation = revoked(folder).get(fingerprint(key))
    if revocation is not None:
        raise UsageError(
            f"this key was revoked on {revocation.date}, as {revocation.name}",
            "a key that was never revoked",
            f"have the site make a new key, or `tsugiki keys restore {revocation.fingerprint}` if it is safe after all",
            code="key-revoked",
        )
    known = {fingerprint(read_public_key(path)): other for other, path in registered(folder).items()}
    if fingerprint(key) in known:
        raise UsageError(
            f"this key is registered already, as {known[fingerprint(key)]}", "a key of its own for each node"
        )
    target = folder / f"{name}.pub"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(folder, error) from error
    if target.exists():
        raise UsageError(f"the node {name} has a key already", "a new name", f"`tsugiki keys revoke {name}` first")
    write_atomically(target, public.read_bytes())  # a running server reads the folder all the time
    return name, fingerprint(key)


def revoke(folder: Path, name: str) -> None:
    """Remove a node, and remember its key as revoked.

    Raises:
        UsageError: no node has this name.
        StorageError: the key cannot be remembered; the node is still registered.
    """
    target = folder / f"{name}.pub"
    if not re.fullmatch(NAME_PATTERN, name) or not target.is_file():
        known = ", ".join(registered(folder)) or "none is registered"
        raise UsageError(f"there is no node {name!r:.80} in {folder}", f"a registered node: {known}")
    try:
        key = read_public_key(target)
    except UsageError:
        pass  # a file without a key lets nobody in, and there is nothing to remember
    else:
        _remember(folder, "revoked", fingerprint(key), name)  # before the file goes: no crash may forget it
    target.unlink()


def restore(folder: Path, key: str) -> Revocation:
    """Forget that a key was revoked, so that it can be registered again; return what was forgotten.

    Args:
        folder: the keyring.
        key: its fingerprint, or the name of its node if one key alone was revoked under it.

    Raises:
        UsageError: no revoked key is meant, or more than one.
        StorageError: the folder cannot be written.
    """
    found = find_revoked(folder, key)
    _remember(folder, "restored", found.fingerprint, found.name)
    return found


def find_revoked(folder: Path, key: str) -> Revocation:
    """Return the revoked key with this fingerprint, or with the name of its node.

    Raises:
        UsageError: no revoked key is meant, or more than one.
    """
    known = revoked(folder)
    found = [revocation for revocation in known.values() if key in (revocation.fingerprint, revocation.name)]
    if len(found) != 1:
        shown = ", ".join(f"{one.name} {one.fingerprint}" for one in known.values()) or "none is revoked"
        raise UsageError(f"{key!r:.80} is not one revoked key in {folder}", f"a fingerprint or a name: {shown}")
    return found[0]


def revoked(folder: Path) -> dict[str, Revocation]:
    """Return the revoked keys by fingerprint, in the order of their revocation.

    Raises:
        StorageError: `run-corrupt`, the list cannot be read. It must not be taken for an empty one.
    """
    found: dict[str, Revocation] = {}
    path = folder / REVOKED
    for line in read_lines(path):
        event = line.get("event")
        about = [line.get(part) for part in ("fingerprint", "name", "date")]
        if event not in ("revoked", "restored") or not all(isinstance(part, str) for part in about):
            raise StorageError(
                f"a line of {path} is none of ours", "the file as `tsugiki keys` wrote it", code="run-corrupt"
            )
        revocation = Revocation(*map(str, about))
        found.pop(revocation.fingerprint, None)
        if event == "revoked":
            found[revocation.fingerprint] = revocation
    return found


def _remember(folder: Path, event: str, key: str, name: str) -> None:
    """Add what happened to a key to the list."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    added = {"event": event, "fingerprint": key, "name": name, "date": date}
    path = folder / REVOKED
    with locked(folder / f".{REVOKED}.lock"):
        lines = [*read_lines(path), added]
        write_atomically(path, "".join(to_json(line) + "\n" for line in lines).encode())


def registered(folder: Path) -> dict[str, Path]:
    """Return the files of the registered nodes by name, sorted; empty if the folder does not exist.

    Raises:
        StorageError: the folder exists and cannot be read. It must not be taken for an empty one.
    """
    try:
        files = sorted(folder.iterdir()) if folder.exists() else []
    except OSError as error:
        raise unwritable(folder, error) from error
    return {path.stem: path for path in files if path.suffix == ".pub"}
