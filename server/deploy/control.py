"""A run on a SuperLink, executed in this process: submitted, claimed, kept alive, and its end reported.

Flower would start a process for the ServerApp and let it install the bundle. Here the process that the operator started
runs the federation, so that errors, signals and progress reach the operator directly.
"""

from __future__ import annotations

import hashlib
import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.common.constant import SubStatus
from flwr.common.serde import fab_to_proto, run_from_proto, user_config_to_proto
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    StartRunRequest,
    UnregisterNodeRequest,
)
from flwr.proto.runtime_pb2 import (
    ClaimTaskRequest,
    PullPendingTasksRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import NodeStatus, TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.protobuf.client import ProtobufClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from tsugiki.common.address import LOOPBACK, split_address
from tsugiki.common.errors import DeployError, UsageError
from tsugiki.common.keys import fingerprint, read_public_key
from tsugiki.common.wire.flower import identify_process
from tsugiki.server.deploy.keyring import registered, revoked
from tsugiki.server.deploy.superlink_process import Endpoint
from tsugiki.server.engines.superlink import SuperlinkGrid

log = logging.getLogger("tsugiki.server")

CLAIM_TIMEOUT_S = 20.0
HEARTBEAT_S = 10.0
RETRY_S = 10.0
"""How long a call may fail before the SuperLink counts as gone."""

CALL_TIMEOUT_S = 30.0

T = TypeVar("T")
Client = TypeVar("Client", bound=ProtobufClient)


class Control:
    """The SuperLink's API for its operator."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._client = _direct(
            ControlHttpClient.from_server_address(
                endpoint.address,
                endpoint.root_certificates is None,
                endpoint.root_certificates,
                [RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
            ),
            endpoint,
        )
        self._nodes: dict[str, tuple[bytes, int]] = {}
        self._revoked: set[bytes] = set()
        self._activated: Mapping[int, str] = {}

    def submit(self, bundle: bytes, run_config: Mapping[str, Any]) -> int:
        """Submit a run; return its id.

        Raises:
            DeployError: the SuperLink does not accept it.
        """
        fab = fab_to_proto(Fab(hashlib.sha256(bundle).hexdigest(), bundle, {}))
        request = StartRunRequest(fab=fab, override_config=user_config_to_proto(dict(run_config)))
        return _answer(lambda: self._client.StartRun(request)).run_id

    def synchronise(self, keyring: Path) -> list[str]:
        """Register and unregister nodes until the SuperLink knows the keys in the folder; return what was done.

        A node that somebody else registered is removed, and one that somebody else unregistered is registered again.
        A key that cannot be registered is reported as "key NAME: ...". The other keys are registered all the same.

        Raises:
            DeployError: the SuperLink cannot be reached, or does not let a node be unregistered.
            StorageError: the folder, or its list of revoked keys, cannot be read.
        """
        done = self._mend()
        wanted: dict[str, bytes] = {}
        unreadable = set()  # perhaps for a moment only, so their nodes are not revoked
        shut_out = revoked(keyring)
        for name, path in registered(keyring).items():
            try:
                public = read_public_key(path)
            except UsageError as error:
                unreadable.add(name)
                done.append(f"key {name}: {error}")
                continue
            revocation = shut_out.get(fingerprint(public))
            if revocation is None:
                wanted[name] = public_key_to_bytes(public)
            else:
                done.append(f"key {name}: not taken; it was revoked on {revocation.date}")
        # revoked first: a node whose key has changed is registered again below
        changed = [name for name, (key, _) in self._nodes.items() if wanted.get(name) != key]
        for name in [name for name in changed if name not in unreadable]:
            key, node_id = self._nodes[name]
            self._unregister(node_id)
            self._revoked.add(key)
            self._nodes = {other: node for other, node in self._nodes.items() if other != name}
            done.append(f"{name} revoked")
        for name, key in wanted.items():
            if name not in self._nodes:
                done.append(self._register(name, key))
        return done

    def _mend(self) -> list[str]:
        """Undo what somebody else did to the SuperLink's nodes, and return what was undone."""
        nodes = _answer(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        known = {node.node_id for node in nodes if node.status != NodeStatus.UNREGISTERED}
        done = []
        for node_id in sorted(known - self.node_names().keys()):
            self._unregister(node_id)
            done.append(f"node {node_id} was registered by somebody else, and is removed")
        for name, (key, node_id) in self._nodes.items():
            if node_id not in known:
                done += [f"{name} was unregistered by somebody else", self._register(name, key)]
        return done

    def _register(self, name: str, key: bytes) -> str:
        """Register a node, unless its key was revoked or the SuperLink refuses it; return what was done.

        Raises:
            DeployError: the SuperLink cannot be reached.
        """
        refusal = f"key {name}: not taken; a key that was revoked, or is used twice, needs to be a new one"
        if key in self._revoked:
            return refusal
        request = RegisterNodeRequest(public_key=key, name=name)
        try:
            node_id = _answer(lambda: self._client.RegisterNode(request)).node_id
        except DeployError as error:
            # only the refusal of this one key is passed over
            cause = error.__cause__
            if not isinstance(cause, httpx.HTTPStatusError) or cause.response.status_code >= 500:
                raise
            return refusal
        self._nodes = {**self._nodes, name: (key, node_id)}
        return f"{name} registered"

    def _unregister(self, node_id: int) -> None:
        _answer(lambda: self._client.UnregisterNode(UnregisterNodeRequest(node_id=node_id)))

    def node_names(self) -> dict[int, str]:
        """Return the names of the registered nodes by node id. May be called by any thread."""
        return {node_id: name for name, (_, node_id) in self._nodes.items()}

    def sessions(self) -> Mapping[int, str]:
        """Return since when each node is connected, by node id. May be called by any thread.

        The time changes whenever a node connects anew, also with the same key and the same id. While the SuperLink does
        not answer it is what was last seen: the calls of the run itself find out whether the SuperLink is gone.
        """
        try:
            nodes = _answer(lambda: self._client.ListNodes(ListNodesRequest())).nodes_info
        except DeployError as error:
            log.warning("cannot see who has reconnected: %s", error)
        else:
            self._activated = {node.node_id: node.last_activated_at for node in nodes}
        return self._activated

    def close(self) -> None:
        """Close the connection."""
        self._client.close()


def _direct(client: Client, endpoint: Endpoint) -> Client:
    """Return one of Flower's HTTP clients, which from now on reaches a SuperLink on this machine without a proxy.

    A proxy that the environment names would see the run, and could not reach this machine's loopback.
    """
    transport: httpx.HTTPTransport
    if endpoint.socket is not None:
        transport = httpx.HTTPTransport(uds=str(endpoint.socket))
    elif split_address(endpoint.address)[0] in LOOPBACK:
        transport = httpx.HTTPTransport(verify=_tls_context(endpoint.root_certificates), trust_env=False)
    else:
        return client
    client._client.close()
    client._client = httpx.Client(transport=transport, timeout=CALL_TIMEOUT_S, trust_env=False)
    return client


def _tls_context(root_certificates: bytes | None) -> ssl.SSLContext:
    """Return what TLS needs to check a server's certificate; without certificates nothing uses it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if root_certificates is not None:
        context.load_verify_locations(cadata=root_certificates.decode("ascii"))
    return context


def _answer(call: Callable[[], T]) -> T:
    """Return the SuperLink's answer.

    Raises:
        DeployError: it cannot be reached, or answers with an error.
    """
    try:
        return call()
    except httpx.HTTPStatusError as error:
        detail = error.response.text[:300]
        raise DeployError(
            f"the SuperLink says {error.response.status_code}: {detail}", "an answer without an error"
        ) from error
    except httpx.HTTPError as error:
        why = f"{type(error).__name__}: {error}"[:200]
        raise DeployError(f"the SuperLink does not answer ({why})", "a running SuperLink") from error


@contextmanager
def executed(endpoint: Endpoint, run_id: int) -> Iterator[SuperlinkGrid]:
    """Claim a submitted run and yield its grid inside a `with` block. The run's outcome is the block's.

    Raises:
        DeployError: another process has claimed the run.
    """
    grid = HttpGrid(
        endpoint.address, endpoint.root_certificates is None, endpoint.root_certificates, token=_claim(endpoint, run_id)
    )
    _direct(grid._runtime_client, endpoint)
    grid._retry_invoker.max_time = RETRY_S
    grid._retry_invoker.should_giveup = _is_final
    client = grid._runtime_client
    given = _answer(lambda: client.PullTaskInput(PullTaskInputRequest()))
    identify_process(given.run.run_id, given.context.node_id, given.task_id)
    grid.set_run(run_from_proto(given.run))
    # without heartbeats, the SuperLink takes the run for dead
    over = threading.Event()
    threading.Thread(target=_beat, args=(client, over), name="heartbeat", daemon=True).start()
    outcome = SubStatus.FAILED
    details = "ended"
    adopted = SuperlinkGrid.adopt(grid)
    try:
        yield adopted
        outcome = SubStatus.COMPLETED
        details = ""
    except (httpx.HTTPError, ObjectPushError) as error:
        status = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else type(error).__name__
        raise DeployError(
            f"the SuperLink ended this run, or does not answer any more ({status})",
            "a SuperLink that runs as long as the run",
            "`tsugiki serve --resume RUN`, with the same options, which goes on from the last checkpoint",
            code="superlink-gone",
        ) from error
    except BaseException as error:
        outcome = SubStatus.FAILED
        details = str(getattr(error, "code", type(error).__name__))
        raise
    finally:
        over.set()
        grid._retry_invoker.max_tries = 1
        with suppress(httpx.HTTPError):  # the SuperLink may be gone, which is reported elsewhere
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=outcome, details=details))
        adopted.close()
        grid.close()


def _is_final(error: Exception) -> bool:
    """Return whether an answer is final. Flower's own check would send this process a signal."""
    return isinstance(error, httpx.HTTPStatusError) and error.response.status_code not in (503, 504)


def _claim(endpoint: Endpoint, run_id: int) -> str:
    """Claim a run; return the token of its ServerApp.

    Raises:
        DeployError: another process has claimed the run.
    """
    interceptors: list[Any] = [RuntimeVersionHttpInterceptor(component_name="SuperExec")]
    if endpoint.secret:
        methods = ["/flwr.proto.Runtime/PullPendingTasks", "/flwr.proto.Runtime/ClaimTask"]
        interceptors.append(SuperExecAuthHttpInterceptor(master_secret=endpoint.secret, protected_methods=methods))
    client = _direct(
        RuntimeHttpClient.from_server_address(
            endpoint.address, endpoint.root_certificates is None, endpoint.root_certificates, interceptors
        ),
        endpoint,
    )
    # a run's task appears some time after the run was submitted
    ends = time.monotonic() + CLAIM_TIMEOUT_S
    try:
        while time.monotonic() < ends:
            for task in _answer(lambda: client.PullPendingTasks(PullPendingTasksRequest())).tasks:
                if task.run_id == run_id and task.type == TaskType.SERVER_APP:
                    request = ClaimTaskRequest(task_id=task.task_id)
                    token = _answer(lambda request=request: client.ClaimTask(request)).token  # type: ignore[misc]  # bound at once
                    if token:
                        return str(token)
            time.sleep(0.1)
    finally:
        client.close()
    raise DeployError(
        f"run {run_id} was taken by another process",
        "a SuperLink that leaves its runs to us",
        "start it with --isolation process, or let `tsugiki serve` start its own",
        code="run-taken",
    )


def _beat(client: RuntimeHttpClient, over: threading.Event) -> None:
    """Send the ServerApp's heartbeats. Failures are left to the calls of the main thread."""
    while not over.wait(HEARTBEAT_S):
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.HTTPError:
            continue
