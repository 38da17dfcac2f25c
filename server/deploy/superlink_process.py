"""The SuperLink as a child process: bound to given addresses only, watched, and ended with this process."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tsugiki.common.address import LOOPBACK, split_address
from tsugiki.common.errors import DeployError, UsageError
from tsugiki.common.files import make_folder, open_to_append, refuse_links_in
from tsugiki.common.keys import write_private
from tsugiki.server.deploy.certs import CertificateFiles

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 8.0

_CHILD = "tsugiki.server.deploy.bounded_superlink"
"""Flower's SuperLink with our bounds. It ends when this process ends, for any reason."""


@dataclass(frozen=True)
class Endpoint:
    """Where a SuperLink's HTTP API for runs and for control is, and how to talk to it.

    Args:
        address: HOST:PORT; with a socket, a name for its log only.
        root_certificates: PEM of the CA; None: no TLS.
        secret: shared with processes that may execute runs; empty: none is needed.
        socket: path of the Unix socket on which it is; None: it is on TCP.
    """

    address: str
    root_certificates: bytes | None
    secret: bytes = b""
    socket: Path | None = None


@dataclass(frozen=True)
class Superlink:
    """A running SuperLink that was started here."""

    endpoint: Endpoint
    listen: str
    log: Path
    process: subprocess.Popen[bytes]

    def check(self) -> None:
        """Check that the SuperLink is running.

        Raises:
            DeployError: `superlink-gone`, it has ended.
        """
        status = self.process.poll()
        if status is not None:
            raise DeployError(
                f"the SuperLink ended with status {status}",
                "a SuperLink that runs as long as the run",
                f"`tsugiki serve --resume RUN`, with the same options, which goes on; {self.log} says why it ended",
                code="superlink-gone",
            )


@contextmanager
def superlink(
    listen: str, certificates: CertificateFiles | None, folder: Path, key: bytes = b""
) -> Iterator[Superlink]:
    """Run a SuperLink inside a `with` block.

    Args:
        listen: HOST:PORT of the Fleet API, where sites connect. Everything else is on a Unix socket, which only this
            process's user can reach.
        certificates: of the server; None: no TLS and no node keys, on loopback only.
        folder: for its log and Flower's own files, created if missing.
        key: PEM of the server's private key, if that in `certificates` has a passphrase.

    Raises:
        UsageError: an address cannot be used.
        DeployError: the SuperLink does not start.
    """
    host, port = split_address(listen)
    if certificates is None and host not in LOOPBACK:
        raise UsageError(
            f"--insecure is given, and {listen} is open to others",
            "an address on loopback",
            "`tsugiki certs`, which makes certificates; then leave --insecure out",
        )
    # checked here, because the SuperLink's own error would be in its log only
    _check_free(host, port)
    make_folder(folder, parents=True)
    refuse_links_in(folder)  # Flower writes files of its own there
    (folder / "secret").unlink(missing_ok=True)
    secret = secrets.token_bytes(48)
    write_private(folder / "secret", secret)
    log = folder / "superlink.log"
    # a short path, because that of a socket has at most 107 bytes; others cannot enter the folder (mode 0700)
    private = Path(tempfile.mkdtemp(prefix="tsugiki-"))
    api = private / "api"
    # a process group of its own, so that a Ctrl-C ends the run first, and the SuperLink after it
    command = [sys.executable, "-m", _CHILD, str(os.getpid()), str(api), *_arguments(listen, certificates, folder)]
    with open_to_append(log) as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(os.environ, folder),
            cwd=folder,
            start_new_session=True,
        )
    try:
        _hand_over(process, key)
        running = Superlink(Endpoint("superlink", None, secret, api), listen, log, process)
        _wait_for(running, [str(api), (_reachable(host), port)])
        yield running
    finally:
        _end(process)
        (folder / "secret").unlink(missing_ok=True)
        shutil.rmtree(private, ignore_errors=True)


def _hand_over(process: subprocess.Popen[bytes], key: bytes) -> None:
    """Give the SuperLink a private key, which is then on no disk and in no list of processes."""
    with suppress(BrokenPipeError), process.stdin as pipe:  # type: ignore[union-attr]  # opened above
        pipe.write(key)


def _arguments(listen: str, certificates: CertificateFiles | None, folder: Path) -> list[str]:
    """Return the SuperLink's arguments; the run's ServerApp is executed by us, not by it."""
    arguments = ["--fleet-api-address", listen]
    arguments += ["--isolation", "process", "--superexec-auth-secret-file", str(folder / "secret")]
    arguments += ["--disable-runtime-dependency-installation"]
    if certificates is None:
        return [*arguments, "--insecure"]
    # Flower wants a CA's file, and does nothing with it here
    authority = certificates.ca if certificates.ca.is_file() else certificates.server
    arguments += ["--ssl-ca-certfile", str(authority.absolute())]
    arguments += ["--ssl-certfile", str(certificates.server.absolute())]
    arguments += ["--ssl-keyfile", str(certificates.server_key.absolute())]
    return [*arguments, "--enable-supernode-auth"]


def _environment(base: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of a SuperLink without telemetry and update checks, with its files in `folder`."""
    quiet = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_HOME": str(folder.absolute())}
    return {**base, **quiet}


def free_port() -> int:
    """Return a loopback port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_free(host: str, port: int) -> None:
    """Check that this process can listen on an address.

    Raises:
        UsageError: it cannot.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}:{port}: {error.strerror}",
            "an address of this machine and a free port",
            "choose another with --listen",
        ) from error


def _reachable(host: str) -> str:
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  # where to look, not where to listen


def _wait_for(running: Superlink, addresses: list[str | tuple[str, int]]) -> None:
    """Wait until the SuperLink listens on all addresses, which are paths of Unix sockets or hosts and ports.

    Raises:
        DeployError: it ended, or takes too long.
    """
    ends = time.monotonic() + START_TIMEOUT_S
    for address in addresses:
        while True:
            running.check()
            try:
                _connect(address)
                break
            except OSError as error:
                if time.monotonic() > ends:
                    raise DeployError(
                        f"the SuperLink does not listen after {START_TIMEOUT_S:g} s", hint=f"see {running.log}"
                    ) from error
                time.sleep(0.05)


def _connect(address: str | tuple[str, int]) -> None:
    """Connect to an address once.

    Raises:
        OSError: nothing listens there.
    """
    if isinstance(address, str):
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(address)
    else:
        socket.create_connection(address, 1.0).close()


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the whole process group: by SIGTERM, and by SIGKILL if that takes too long."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_TIMEOUT_S)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()
