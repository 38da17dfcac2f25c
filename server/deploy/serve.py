"""`tsugiki serve`: start a SuperLink and runs on it, and watch both until they are over."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tsugiki.common.address import LOOPBACK, split_address
from tsugiki.common.config.files import with_absolute_paths
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import TsugikiError, UsageError
from tsugiki.server.deploy import bundle
from tsugiki.server.deploy.certs import CertificateFiles
from tsugiki.server.deploy.control import Control, executed
from tsugiki.server.deploy.identity import Identity, Passphrase, read_identity
from tsugiki.server.deploy.superlink_process import Endpoint, Superlink, superlink
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run.federation import Outcome, run_federation
from tsugiki.server.run.progress import Progress

log = logging.getLogger("tsugiki.server")

WATCH_S = 1.0


@dataclass(frozen=True)
class Deployment:
    """How sites reach the server.

    Args:
        listen: HOST:PORT for the sites.
        certificates: the server's; None: no TLS and no node keys.
        keyring: folder of registered nodes' public keys.
        superlink: HOST:PORT of a SuperLink that runs already; empty: start one.
        announce: called with each message for the operator.
        passphrase: returns that of the server's key, if it has one.
    """

    listen: str
    certificates: CertificateFiles | None
    keyring: Path
    superlink: str
    announce: Callable[[str], None]
    passphrase: Passphrase


@dataclass(frozen=True)
class Service:
    """A SuperLink on which runs are executed, one after the other. Its sites stay connected between them.

    Args:
        endpoint: its API.
        control: its API for the operator.
        names: returns the names under which nodes' keys are registered, by node id; None: nodes have no keys here.
        failure: holds an error once the SuperLink has ended.
    """

    endpoint: Endpoint
    control: Control
    names: Callable[[], Mapping[int, str]] | None
    failure: list[TsugikiError]

    def run(
        self,
        config: RunConfig,
        *,
        resume: bool,
        previous: bool,
        progress: Progress,
        stop: Stop,
        accept_hopeless: bool,
    ) -> Outcome:
        """Execute a run; arguments as for `serve`.

        Raises:
            TsugikiError: it cannot start or go on. What was finished is kept.
        """
        run_id = self.control.submit(bundle.build(), shown_to_nodes(config))
        with executed(self.endpoint, run_id) as grid:
            return run_federation(
                grid,
                config,
                resume=resume,
                previous=previous,
                progress=progress,
                stop=stop,
                names=self.names,
                sessions=self.control.sessions,
                accept_hopeless=accept_hopeless,
            )


def serve(
    config: RunConfig,
    deployment: Deployment,
    *,
    resume: bool,
    previous: bool,
    progress: Progress,
    stop: Stop,
    accept_hopeless: bool = True,
) -> Outcome:
    """Run a federation over a network.

    Args:
        config: the run.
        deployment: where and how.
        resume: go on from the last checkpoint.
        previous: with `resume`, from the one before it.
        progress: shows what happens.
        stop: set to end the run at the next chance.
        accept_hopeless: start a run also if nothing can be learned under its privacy plan.

    Raises:
        TsugikiError: it cannot start or go on. What was finished is kept.
    """
    config = with_absolute_paths(config)
    with serving(deployment, Path(config.run.output_dir) / ".superlink" / config.run.name, stop) as service:
        return service.run(
            config,
            resume=resume,
            previous=previous,
            progress=progress,
            stop=stop,
            accept_hopeless=accept_hopeless,
        )


@contextmanager
def serving(deployment: Deployment, folder: Path, stop: Stop) -> Iterator[Service]:
    """Start a SuperLink, or use the one that the deployment names, inside a `with` block.

    Args:
        deployment: where and how.
        folder: for the log of a SuperLink that is started.
        stop: set to end the current run at the next chance.

    Raises:
        TsugikiError: it cannot be started, or has ended.
    """
    identity = _identity(deployment)
    if identity and deployment.certificates and not deployment.certificates.ca.is_file():
        deployment.announce(f"there is no {deployment.certificates.ca}: sites connect with --ca system")
    with _endpoint(folder, deployment, identity) as (endpoint, child):
        control = Control(endpoint)
        # a node may use the name of its key only; the names are known only if this server registers the keys
        names = None
        if deployment.certificates is not None and child is not None:
            names = control.node_names
        try:
            with _watching(control, deployment, child, stop) as failure:
                yield Service(endpoint, control, names, failure)
        except TsugikiError:
            # the SuperLink's end is the cause, and the run's error a consequence
            if failure:
                raise failure[0] from None
            raise
        finally:
            control.close()


def shown_to_nodes(config: RunConfig) -> dict[str, str]:
    """Return what the SuperLink is given of a run, and shows to every node that asks: the run's name.

    This process executes the run, so the SuperLink needs no settings. Sites receive theirs in their messages.
    """
    return {"run.name": config.run.name}


def _identity(deployment: Deployment) -> Identity | None:
    """Return the certificates and the key of a SuperLink that is started here; None: it has none.

    Raises:
        UsageError: a file is missing, or cannot be used; see `read_identity`.
    """
    files = deployment.certificates
    if files is None:
        return None
    # a SuperLink that runs already has its certificate itself; sites of one with a public CA need no file of ours
    needed = [files.ca] if deployment.superlink else [files.server, files.server_key]
    missing = [path for path in needed if not path.is_file()]
    if missing:
        raise UsageError(
            f"there is no {missing[0]}",
            "a server certificate",
            "`tsugiki certs --host NAME`, which makes one; --insecure is for trying things out on loopback",
        )
    if deployment.superlink:
        return None
    return read_identity(files, deployment.passphrase)


@contextmanager
def _endpoint(
    folder: Path, deployment: Deployment, identity: Identity | None
) -> Iterator[tuple[Endpoint, Superlink | None]]:
    """Yield the SuperLink's address inside a `with` block, and the SuperLink itself if it was started here."""
    files = deployment.certificates
    if deployment.superlink:
        if files is None and split_address(deployment.superlink)[0] not in LOOPBACK:
            raise UsageError(
                f"--insecure is given, and {deployment.superlink} is another machine",
                "a SuperLink on loopback",
                "leave --insecure out",
            )
        authority = files.ca.read_bytes() if files else None
        yield Endpoint(deployment.superlink, authority), None
        return
    with superlink(deployment.listen, files, folder, identity.key if identity else b"") as child:
        security = "" if files else " (insecure: loopback only)"
        deployment.announce(f"sites connect to {child.listen}{security}")
        yield child.endpoint, child


@contextmanager
def _watching(
    control: Control, deployment: Deployment, child: Superlink | None, stop: Stop
) -> Iterator[list[TsugikiError]]:
    """Watch the SuperLink and the keyring from a thread, inside a `with` block.

    If the SuperLink ends, the run is stopped, and the yielded list has the error. A key that cannot be registered is
    announced, and the run goes on.
    """
    failure: list[TsugikiError] = []
    over = threading.Event()
    announced: set[str] = set()

    def look_at_keys() -> None:
        if deployment.certificates is None or child is None:  # another SuperLink has a keyring of its own
            return
        for done in control.synchronise(deployment.keyring):
            # a bad key fails again at every look, and is announced once
            if done not in announced or not done.startswith("key "):
                deployment.announce(done)
            announced.add(done)

    def watch() -> None:
        while not over.wait(WATCH_S):
            try:
                if child is not None:
                    child.check()
                look_at_keys()
            except Exception as error:  # noqa: BLE001  # whatever it is, revoking keys and watching must go on
                gone = child is not None and child.process.poll() is not None
                if gone and isinstance(error, TsugikiError):
                    failure.append(error)
                    stop.request()
                    return
                log.warning("the keyring cannot be looked at now: %s: %s", type(error).__name__, error)

    # once before the run, so that registered nodes can connect at once
    look_at_keys()
    thread = threading.Thread(target=watch, name="watch", daemon=True)
    thread.start()
    try:
        yield failure
    finally:
        over.set()
        thread.join(WATCH_S)
