"""Why a node cannot connect. gRPC only reports that a handshake failed; TLS itself knows why.

After a failed call, the server's port is tried with Python's own TLS, whose verdict becomes an error. If gRPC goes
through a proxy, so does this.
"""

from __future__ import annotations

import socket
import ssl
from typing import TYPE_CHECKING

from flwr.supercore.error import ApiErrorCode, FlowerError

from tsugiki.client.node.proxy import ConnectRefused, Proxy, proxy_for
from tsugiki.common.address import split_address
from tsugiki.common.errors import LinkError

if TYPE_CHECKING:
    from tsugiki.client.node.link import Link

PROBE_TIMEOUT_S = 4.0

_EXPIRED = 10
_NOT_YET = 9
_UNKNOWN_NAMES = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))
"""What DNS answers about a name that does not exist. Its other errors are of the network."""
_WRONG_NAMES = (62, 64)  # X509_V_ERR_* of OpenSSL's x509_vfy.h
_AUTHENTICATION_REQUIRED = 407
_SERVER_ERRORS = 500


def why_not(link: Link) -> LinkError:
    """Return why this node cannot connect to the server; `server-unreachable` if the network is the only cause."""
    host, port = split_address(link.address)
    try:
        proxy = proxy_for(host)
    except LinkError as error:
        return error
    try:
        with _connected(host, port, proxy) as raw:
            return _without_tls(link, raw) if link.root_certificates is None else _with_tls(link, raw, host, proxy)
    except ConnectRefused as refusal:
        return _proxy_refusal(link, f"{proxy} answers {refusal}", refusal.status)
    except OSError as error:
        return _network_problem(link, host, proxy, error)
    except UnicodeError:  # a part of the name is empty, or longer than DNS allows
        return _unknown(host)


def _connected(host: str, port: int, proxy: Proxy | None) -> socket.socket:
    """Return a connection to a server, through a proxy or directly.

    Raises:
        ConnectRefused: the proxy does not connect to the server.
        OSError: the proxy, or the server without a proxy, cannot be reached.
    """
    if proxy is None:
        return socket.create_connection((host, port), PROBE_TIMEOUT_S)
    return proxy.connect(host, port, PROBE_TIMEOUT_S)


def _network_problem(link: Link, host: str, proxy: Proxy | None, error: OSError) -> LinkError:
    """Return the error of a connection that cannot be opened."""
    if proxy is not None:
        return _unreachable(link, f"{proxy} does not answer: {_reason(error)}")
    if isinstance(error, socket.gaierror) and error.errno in _UNKNOWN_NAMES:
        return _unknown(host)
    if isinstance(error, socket.gaierror):
        return _unreachable(link, f"DNS does not answer for {host!r}")
    return _unreachable(link, _reason(error))


def _reason(error: OSError) -> str:
    """Return why a machine cannot be reached, in words."""
    if isinstance(error, socket.gaierror):
        return "DNS does not know its name" if error.errno in _UNKNOWN_NAMES else "DNS does not answer"
    if isinstance(error, TimeoutError):
        return "timed out"
    return (error.strerror or type(error).__name__).lower()


def _proxy_refusal(link: Link, problem: str, status: int) -> LinkError:
    """Return the error of a proxy that answers, and does not connect to the server.

    Args:
        link: the server.
        problem: the proxy and its answer, in words.
        status: of its answer, as in HTTP.
    """
    if status >= _SERVER_ERRORS:  # perhaps the server is away, and comes back
        return _unreachable(link, problem)
    hint = "ask those who run the proxy to allow it, or name the server in no_proxy if it is reached without"
    if status == _AUTHENTICATION_REQUIRED:
        hint = "put user and password into the variable, as in http://USER:PASSWORD@HOST:PORT"
    return LinkError(
        f"{problem} when it is asked for {link.address}",
        "a proxy that lets CONNECT through to the server's host and port",
        hint,
        code="proxy-refused",
    )


def _unknown(host: str) -> LinkError:
    return LinkError(
        f"no machine is called {host!r}",
        "the server's host name or address",
        "check --server",
        code="server-unknown",
    )


def _without_tls(link: Link, raw: socket.socket) -> LinkError:
    """Return the error of a connection without TLS: the server requires TLS, or does not answer."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    # A handshake that succeeds shows that the server speaks TLS; no certificate is checked.
    try:
        with context.wrap_socket(raw):
            return LinkError(
                f"{link.address} speaks TLS, this client does not",
                "the same on both sides",
                "give the CA's certificate with --ca, and leave --insecure out",
                code="tls-required",
            )
    except (OSError, ssl.SSLError):
        return _unreachable(link, "it does not answer as a server of this kind")


def _with_tls(link: Link, raw: socket.socket, host: str, proxy: Proxy | None) -> LinkError:
    """Return the error of a connection with TLS, such as a bad certificate. `proxy` is what it leads through."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["h2"])
    try:
        context.load_verify_locations(cadata=(link.root_certificates or b"").decode("ascii"))
    except (ssl.SSLError, ValueError):
        return LinkError("the file given with --ca holds no certificate", "a PEM file", code="tls-ca-invalid")
    try:
        with context.wrap_socket(raw, server_hostname=host):
            return _unreachable(link, "it does not answer as a server of this kind")
    except ssl.SSLCertVerificationError as error:
        return _certificate_problem(link, host, proxy, error)
    except ssl.SSLError as error:
        if error.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return LinkError(
                f"{link.address} does not speak TLS",
                "a server with a certificate",
                "start the server without --insecure; --insecure here is for loopback only",
                code="tls-missing",
            )
        return _unreachable(link, f"TLS fails: {error.reason}")


def _certificate_problem(link: Link, host: str, proxy: Proxy | None, error: ssl.SSLCertVerificationError) -> LinkError:
    """Return the error of a bad certificate, by OpenSSL's code."""
    if error.verify_code in (_EXPIRED, _NOT_YET):
        word = "has expired" if error.verify_code == _EXPIRED else "is not valid yet"
        return LinkError(
            f"the certificate of {link.address} {word}",
            "a valid one, and the right time on both machines",
            "have the operator run `tsugiki certs` again and restart the server",
            code="tls-expired",
        )
    if error.verify_code in _WRONG_NAMES:
        return LinkError(
            f"the certificate of {link.address} is not for {host!r}",
            "a server certificate with this name or address in it (subjectAltName)",
            f"have the operator run `tsugiki certs --host {host}`, or connect by a name that is in it",
            code="tls-wrong-name",
        )
    hint = (
        "ask the operator for its ca.crt, over a channel that you trust, and whether the server sends the certificates "
        "of intermediate CAs"
    )
    if proxy is not None:
        hint += f"; or {proxy} opens connections (TLS inspection): then ask those who run it to leave this host out"
    return LinkError(
        f"the certificate of {link.address} was not signed by the CA given with --ca",
        "the CA of this federation",
        hint,
        code="tls-wrong-ca",
    )


def refused(link: Link, details: str) -> LinkError:
    """Return why a server that answered refuses this node."""
    error = FlowerError.from_json(details)
    if error is not None and error.code == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED:
        return LinkError(
            f"{link.address} takes registered keys only, and this client has none",
            "the private key of a registered node",
            "`tsugiki keys new`, send the public part to the operator, then --key",
            code="key-required",
        )
    if error is not None and error.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
        return LinkError(
            f"{link.address} does not accept this node's key: not registered, revoked, or in use by another process",
            "the key of a registered node, used once at a time",
            "have the operator run `tsugiki keys list`, and see that no other client runs with it",
            code="key-refused",
        )
    if "timestamp" in details:
        return LinkError(
            "the clocks of this machine and the server differ too much",
            "at most 5 s ahead of the server, or 5 minutes behind",
            "set the time, best with NTP",
            code="clock-skew",
        )
    if error is not None and error.code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
        return LinkError("the server runs another version of Flower", "the same version", code="version-mismatch")
    said = f"{error.code}: {error.message}" if error is not None else details[:120]
    return LinkError(f"{link.address} refuses this node ({said})", "a server that takes it", code="server-refused")


def _unreachable(link: Link, reason: str) -> LinkError:
    return LinkError(
        f"{link.address} cannot be reached: {reason}",
        "a running server",
        "check the address, the firewall, and that the server runs",
        code="server-unreachable",
    )
