"""The keys of the nodes that may take part: a folder of public keys, one file a node, which the operator can read.

A node is registered by adding its file, and revoked by removing it. A running server reads the folder again and again,
and passes changes on to the SuperLink.
"""

from __future__ import annotations

import re
from pathlib import Path

from tsugiki.common.errors import UsageError
from tsugiki.common.files import unwritable, write_atomically
from tsugiki.common.keys import fingerprint, read_public_key
from tsugiki.common.settings import NAME_PATTERN


def register(folder: Path, public: Path, name: str = "") -> tuple[str, str]:
    """Add a node; return its name and fingerprint.

    Args:
        folder: the keyring, created if missing.
        public: the node's public key.
        name: by default the name of the file.

    Raises:
        UsageError: the name is taken or not valid, or the file has no public key of a node.
        StorageError: the folder cannot be written.
    """
    name = name or public.name.removesuffix(".pub")
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(
            f"{name!r:.80} is no name of a node", "lower-case letters, digits, . _ -, at most 64", "use --name"
        )
    key = read_public_key(public)
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
    """Remove a node.

    Raises:
        UsageError: no node has this name.
    """
    target = folder / f"{name}.pub"
    if not re.fullmatch(NAME_PATTERN, name) or not target.is_file():
        known = ", ".join(registered(folder)) or "none is registered"
        raise UsageError(f"there is no node {name!r:.80} in {folder}", f"a registered node: {known}")
    target.unlink()


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
