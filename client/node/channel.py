"""Calls to the SuperLink's gRPC Fleet API, repeated while the network fails, for as long as a site wants.

Flower's own link leaves calls without deadlines and ends the process when something is wrong. Here every try has a
deadline, and a failure that repeating cannot mend becomes one error with its cause (`client/node/diagnosis.py`).

Until the server has accepted this node, a refusal is such a failure: a wrong key or clock would be refused for ever.
After that, each refusal is repeated like a failure of the network: address, key and clock were right, so that what has
changed, such as the server's clock, may be mended without this site.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import grpc
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor

from tsugiki.client.node.link import Link
from tsugiki.common.errors import LinkError
from tsugiki.common.wire.flower import CALL_OPTIONS

CALL_TIMEOUT_S = 20.0
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 10.0
TEMPORARY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,  # by a server that is shutting down
)
_NETWORK = "network"
"""A kind of failure beside the codes of refusals."""


class Stopping(Exception):
    """The node was asked to stop while the server could not be reached."""


class RunOver(Exception):
    """The run of a message has ended, or the message is gone: there is nobody to answer."""


class Forgotten(Exception):
    """The server does not know this node any more: it was restarted."""


class Channel:
    """An open channel.

    Attributes:
        repeated: whether the network failed before the last answer, so that an earlier one may be lost.
        accepted: whether the server has accepted this node; set by the connection.

    Args:
        link: the SuperLink.
        keys: the node's private and public key, with which every call is signed.
        stopped: asked between tries; True ends them.
        note: called with each message for the site's operator.
    """

    def __init__(
        self, link: Link, keys: tuple[Any, Any], stopped: Callable[[], bool], note: Callable[[str], None]
    ) -> None:
        self.link = link
        self._keys = keys
        self._stopped = stopped
        self._note = note
        self.repeated = False
        self.accepted = False
        self._channel: grpc.Channel | None = None
        self._open()

    def _open(self) -> None:
        """Open a channel with Flower's interceptors, in place of the channel before."""
        self.close()
        if self.link.root_certificates is None:
            channel = grpc.insecure_channel(self.link.address, CALL_OPTIONS)
        else:
            credentials = grpc.ssl_channel_credentials(self.link.root_certificates)
            channel = grpc.secure_channel(self.link.address, credentials, CALL_OPTIONS)
        interceptors = [RuntimeVersionClientInterceptor("SuperNode"), NodeAuthClientInterceptor(*self._keys)]
        self._channel = channel
        self._stub = FleetStub(grpc.intercept_channel(channel, *interceptors))

    def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            self._channel.close()

    def once(self, method: str, request: Any, timeout_s: float) -> Any:
        """Call the server once.

        Raises:
            grpc.RpcError: the server does not answer, or refuses.
            ValueError: the channel was replaced meanwhile.
        """
        return getattr(self._stub, method)(request, timeout=timeout_s)

    def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the server; repeat the call while the network fails, or the server refuses a node that it had accepted.

        Args:
            method: of the Fleet API.
            request: what to send.
            timeout_s: of one try.

        Raises:
            LinkError: the server refuses a node that it has never accepted; or it refuses, or cannot be reached, for
                `retry_s`.
            Forgotten: the server does not know this node.
            RunOver: the server answers that the run has ended.
            Stopping: the node was asked to stop before an answer came.
        """
        from tsugiki.client.node.diagnosis import refused

        started = time.monotonic()
        pause_s = FIRST_RETRY_S
        noted: set[str] = set()
        while True:
            try:
                answer = self.once(method, request, timeout_s)
            except grpc.RpcError as error:
                status = error.code()
                details = str(error.details())
                if status == grpc.StatusCode.PERMISSION_DENIED:
                    raise RunOver("the run has ended") from error
                if status == grpc.StatusCode.UNAUTHENTICATED and "node ID" in details:
                    raise Forgotten from error
                refusal = None
                if status not in TEMPORARY:
                    refusal = refused(self.link, details)
                self._give_up_or_wait(error, refusal, started, pause_s, noted)
                if status == grpc.StatusCode.DEADLINE_EXCEEDED:
                    self._open()  # the old connection may lead nowhere, without anybody having closed it
                pause_s = min(2 * pause_s, LONGEST_RETRY_S)
            else:
                self.repeated = _NETWORK in noted
                if noted:
                    self._note(f"connected again after {time.monotonic() - started:.0f} s")
                return answer

    def _give_up_or_wait(
        self, error: grpc.RpcError, refusal: LinkError | None, started: float, pause_s: float, noted: set[str]
    ) -> None:
        """Sleep before another try.

        Args:
            error: of the last try.
            refusal: what it means, if the server has answered; None: the network failed.
            started: when the first try began.
            pause_s: how long to sleep.
            noted: the kinds of failures that the site's operator knows of; a new kind is added.

        Raises:
            LinkError: another try would not help, or `retry_s` is over.
            Stopping: the node was asked to stop.
        """
        from tsugiki.client.node.diagnosis import why_not

        kind = refusal.code if refusal is not None else _NETWORK
        # Only the first failure of a kind is diagnosed: it may have a cause that no repetition mends.
        if kind not in noted:
            noted.add(kind)
            cause = refusal or why_not(self.link)
            if cause.code != "server-unreachable" and not self.accepted:
                raise cause from error
            self._note(_retrying(cause, self.link.retry_s))
        if time.monotonic() - started + pause_s > self.link.retry_s:
            raise (refusal or why_not(self.link)) from error
        # In short naps, so that a request to stop is soon seen.
        ends = time.monotonic() + pause_s
        while time.monotonic() < ends:
            if self._stopped():
                raise Stopping
            time.sleep(0.1)


def _retrying(cause: LinkError, retry_s: float) -> str:
    """Return the line about a failure that is repeated: what is wrong, and what mends it if waiting may not."""
    line = f"{cause.problem}: trying again for {retry_s:g} s"
    if cause.code == "server-unreachable":
        return line
    return f"{line} ({cause.code}; expected {cause.expected}; {cause.hint})".replace("; )", ")")
