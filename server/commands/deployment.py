"""The bodies of the operator's commands for a federation over a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from tsugiki.common.config import files as config_file
from tsugiki.common.errors import UsageError


def serve(
    file: Path | None,
    resume: Path | None,
    previous: bool,
    listen: str,
    tls: Path,
    keys: Path,
    insecure: bool,
    superlink: str,
    wait_s: float,
    overrides: Sequence[str],
    with_export: bool,
    as_json: bool,
) -> None:
    """Serve a federation, or go on with one; then export and report."""
    from tsugiki.server.commands.runs import at_folder, finish, stop_on_signals
    from tsugiki.server.deploy.certs import CertificateFiles
    from tsugiki.server.deploy.serve import Deployment
    from tsugiki.server.deploy.serve import serve as run
    from tsugiki.server.run import progress

    if (file is None) == (resume is None):
        raise UsageError("the command takes either FILE or --resume RUN", do="`tsugiki serve --help`")
    if previous and resume is None:
        raise UsageError("--previous goes with --resume RUN")
    waiting = [f"strategy.connect_timeout_s={wait_s}"] if wait_s else []
    config = config_file.read(file or Path(str(resume)) / "config.toml", [*overrides, *waiting])
    if resume is not None:
        config = at_folder(config, resume)
    shown = progress.choose()
    certificates = None if insecure else CertificateFiles(tls)
    deployment = Deployment(listen, certificates, keys, superlink, shown.note)
    with stop_on_signals() as stop:
        outcome = run(config, deployment, resume=resume is not None, previous=previous, progress=shown, stop=stop)
    finish(outcome.folder, outcome.summary, with_export, as_json)


def certs(folder: Path, hosts: Sequence[str], days: int) -> None:
    """Make the server's certificate."""
    from tsugiki.server.deploy.certs import make_certificates, names_in

    fresh = not (folder / "ca.crt").exists()
    files = make_certificates(folder, list(hosts), days)
    if fresh:
        _say(f"{files.ca}: the CA's certificate; give it to every site")
        _say(f"{files.ca_key}: the CA's key; keep it safe, the running server does not need it")
    _say(f"{files.server}, {files.server_key}: the server's, for {', '.join(names_in(files))}")


def keys_new(path: Path) -> None:
    """Make a key pair."""
    from tsugiki.common.keys import fingerprint, new_key_pair, read_public_key

    public = new_key_pair(path)
    _say(f"{path}: the private key; it stays here")
    _say(f"{public}: the public key; send it to the operator")
    _say(fingerprint(read_public_key(public)))


def keys_register(public: Path, name: str, folder: Path) -> None:
    """Add a node to the keyring."""
    from tsugiki.server.deploy.keyring import register

    registered_name, shown = register(folder, public, name)
    _say(f"{registered_name} {shown}")
    _say("compare this fingerprint with the site's over another channel")


def keys_list(folder: Path) -> None:
    """Print the keyring."""
    from tsugiki.common.keys import fingerprint, read_public_key
    from tsugiki.server.deploy.keyring import registered

    for name, path in registered(folder).items():
        _say(f"{name:<24} {fingerprint(read_public_key(path))}")


def keys_revoke(name: str, folder: Path) -> None:
    """Remove a node from the keyring."""
    from tsugiki.server.deploy.keyring import revoke

    revoke(folder, name)
    _say(f"{name} is revoked; a running server shuts it out within seconds")


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
