"""Calls to the SuperLink's gRPC Fleet API, repeated while the network fails, for as long as a site wants.

Flower's own link leaves calls without deadlines and ends the process when something is wrong. Here every try has a
deadline, and a failure that repeating cannot mend becomes one error with its cause (`client/node/diagnosis.py`).

Until the server has accepted this node, a refusal is such a failure: a wrong key or clock would be refused for ever.
The network may fail for `retry_s` then. After that, every failure is temporary, and nothing but a request to stop ends
the wait: address, key and clock were right, so that what has changed, such as the server's clock or a name in DNS, may
be mended without this site, and the next run may be weeks away.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata

from tsugiki.client.node.link import Link
from tsugiki.client.node.proxy import grpc_options, proxy_for
from tsugiki.common.address import split_address
from tsugiki.common.errors import LinkError
from tsugiki.common.wire.flower import CALL_OPTIONS

CALL_TIMEOUT_S = 20.0
FIRST_RETRY_S = 0.5
LONGEST_RETRY_S = 5.0
LONGEST_REFUSED_RETRY_S = 30.0
"""A server that answers with a refusal is asked less often than one that does not answer."""
FIRST_REMINDER_S = 60.0
LONGEST_REMINDER_S = 3600.0
"""A failure that lasts is said again: after a minute, then each time it has lasted twice as long, or an hour longer."""
STOPPING_S = 1.0
"""How long an answer is still waited for after a request to stop."""
NAP_S = 0.1
"""How often a wait looks for a request to stop."""
RECONNECTION = (
    # gRPC's own pauses between attempts grow to two minutes, in which a run may begin and end without this site.
    ("grpc.initial_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 10_000),
    ("grpc.min_reconnect_backoff_ms", 10_000),  # how long one attempt may take
    ("grpc.use_local_subchannel_pool", 1),  # else a channel that is opened anew inherits the pause of the one before
)
"""gRPC's options of a client's channel, beside those of both sides and those about a proxy."""
OF_A_RUN = ("PullObject", "ConfirmMessageReceived", "PushMessages", "PushObject")
"""The calls about a message of a run."""
TEMPORARY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED,  # by a server that is shutting down
)
_NETWORK = "network"
"""A kind of failure beside the codes of refusals."""


class Stopping(Exception):
    """The node was asked to stop while the server did not answer."""


class RunOver(Exception):
    """The run of a message has ended, or the message is gone: there is nobody to answer."""


class MessageGone(RunOver):
    """The message alone is gone, for example because the server took this node for gone: it may ask again."""


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

    Raises:
        LinkError: `proxy-invalid`, the environment names a proxy that cannot be used.
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
        # Flower's interceptor for this also ends the process if the server has another version.
        self._version = RuntimeVersionMetadata.from_local_component("SuperNode").append_to_grpc_metadata(())
        self._channel: grpc.Channel | None = None
        self._open()

    def _open(self) -> None:
        """Open a channel whose calls are signed, in place of the channel before."""
        self.close()
        host, _ = split_address(self.link.address)
        options = (*CALL_OPTIONS, *RECONNECTION, *grpc_options(proxy_for(host)))
        if self.link.root_certificates is None:
            channel = grpc.insecure_channel(self.link.address, options)
        else:
            credentials = grpc.ssl_channel_credentials(self.link.root_certificates)
            channel = grpc.secure_channel(self.link.address, credentials, options)
        self._channel = channel
        self._stub = FleetStub(grpc.intercept_channel(channel, NodeAuthClientInterceptor(*self._keys)))

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
        return getattr(self._stub, method)(request, timeout=timeout_s, metadata=self._version)

    def call(self, method: str, request: Any, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """Call the server; repeat the call while the network fails, or the server refuses a node that it had accepted.

        Args:
            method: of the Fleet API.
            request: what to send.
            timeout_s: of one try.

        Raises:
            LinkError: the server has never accepted this node, and refuses it, or cannot be reached for `retry_s`.
            Forgotten: the server does not know this node.
            RunOver: the server answers a call of a run that the run has ended.
            Stopping: the node was asked to stop before an answer came.
        """
        from tsugiki.client.node.diagnosis import refused

        outage = _Outage()
        while True:
            try:
                answer = self._answer(method, request, timeout_s)
            except grpc.RpcError as error:
                status = error.code()
                details = str(error.details())
                if status == grpc.StatusCode.PERMISSION_DENIED and method in OF_A_RUN:
                    raise RunOver("the run has ended") from error
                if status == grpc.StatusCode.UNAUTHENTICATED and "node ID" in details:
                    raise Forgotten from error
                refusal = None
                if status not in TEMPORARY:
                    refusal = refused(self.link, details)
                self._give_up_or_wait(error, refusal, outage)
                # The old connection may lead nowhere without anybody having closed it, or wait before it tries again.
                if status in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE):
                    self._open()
            else:
                self.repeated = _NETWORK in outage.reminders_s
                if outage.reminders_s:
                    self._note(f"connected again after {outage.lasts_s():.0f} s")
                return answer

    def _answer(self, method: str, request: Any, timeout_s: float) -> Any:
        """Call the server once, and return its answer. The node itself ends a call of a run that takes too long."""
        stop_at = math.inf
        call = getattr(self._stub, method).future(request, timeout=timeout_s, metadata=self._version)
        try:
            while time.monotonic() < stop_at:
                try:
                    return call.result(timeout=NAP_S)
                except grpc.FutureTimeoutError:
                    if method not in OF_A_RUN and self._stopped():
                        stop_at = min(stop_at, time.monotonic() + STOPPING_S)
            raise Stopping
        finally:
            call.cancel()  # without effect on one that was answered

    def _give_up_or_wait(self, error: grpc.RpcError, refusal: LinkError | None, outage: _Outage) -> None:
        """Sleep before another try.

        Args:
            error: of the last try.
            refusal: what it means, if the server has answered; None: the network failed.
            outage: of this call.

        Raises:
            LinkError: the server has never accepted this node, and another try would not help, or `retry_s` is over.
            Stopping: the node was asked to stop.
        """
        kind = _NETWORK
        longest_s = LONGEST_RETRY_S
        if refusal is not None:
            kind = refusal.code
            longest_s = LONGEST_REFUSED_RETRY_S
        pause_s = min(outage.pause_s, longest_s)
        outage.pause_s = 2 * pause_s
        # The cause is looked for when it is said: it may have become one that no repetition mends.
        if outage.is_due(kind):
            cause = refusal or self._diagnosis()
            if cause.code != "server-unreachable" and not self.accepted:
                raise cause from error
            self._note(self._retrying(cause, outage.lasts_s()))
        if not self.accepted and outage.lasts_s() + pause_s > self.link.retry_s:
            raise (refusal or self._diagnosis()) from error
        ends = time.monotonic() + pause_s
        while time.monotonic() < ends:
            if self._stopped():
                raise Stopping
            time.sleep(NAP_S)

    def _diagnosis(self) -> LinkError:
        """Return why the server cannot be reached.

        A name may be looked for in DNS for half a minute, which nothing can interrupt; so another thread does it.

        Raises:
            Stopping: the node was asked to stop.
        """
        from tsugiki.client.node.diagnosis import why_not

        found: list[LinkError] = []
        looking = threading.Thread(target=lambda: found.append(why_not(self.link)), name="diagnosis", daemon=True)
        looking.start()
        while looking.is_alive():
            if self._stopped():
                raise Stopping
            looking.join(NAP_S)
        return found[0]

    def _retrying(self, cause: LinkError, lasts_s: float) -> str:
        """Return the line about a failure that is repeated: what is wrong, and what mends it if waiting may not."""
        how_long = "until this client is stopped" if self.accepted else f"for {self.link.retry_s:g} s"
        line = f"{cause.problem}: trying again {how_long}"
        if lasts_s >= FIRST_REMINDER_S:
            line += f", for {lasts_s / 60:.0f} min so far"
        if cause.code == "server-unreachable":
            return line
        return f"{line} ({cause.code}; expected {cause.expected}; {cause.hint})".replace("; )", ")")


class _Outage:
    """The failures of one call until it is answered.

    Attributes:
        pause_s: how long to sleep before the next try, at most.
        reminders_s: each kind of failure that the site's operator knows of -> when it is said again, in seconds since
            the first try.
    """

    def __init__(self) -> None:
        self.pause_s = FIRST_RETRY_S
        self.reminders_s: dict[str, float] = {}
        self._started = time.monotonic()

    def lasts_s(self) -> float:
        """Return the seconds since the first try."""
        return time.monotonic() - self._started

    def is_due(self, kind: str) -> bool:
        """Return whether a failure of this kind is to be said now. If so, it is said again after a longer time."""
        lasts_s = self.lasts_s()
        if lasts_s < self.reminders_s.get(kind, 0.0):
            return False
        self.reminders_s[kind] = lasts_s + min(max(lasts_s, FIRST_REMINDER_S), LONGEST_REMINDER_S)
        return True
