"""The proxy between this machine and the server, if the environment names one.

gRPC sends HTTP CONNECT to a proxy, and then speaks with the server through it. It looks for the proxy in the
environment by itself, but in small letters only, and says little about what it found. So the proxy is looked for here,
and given to gRPC (`grpc_options`); the diagnosis of a failed connection goes through the same one.

Source: gRPC, doc/core/default_http_proxy_mapper.md.
"""

from __future__ import annotations

import os
import socket
from base64 import b64encode
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from ipaddress import ip_address, ip_network
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies_environment

from tsugiki.common.address import LOOPBACK
from tsugiki.common.errors import LinkError

_KINDS = ("grpc", "https", "http")
"""The variables KIND_proxy, in small or capital letters, in the order in which gRPC looks for them."""
_EXCLUSIONS = ("no_grpc", "no")
"""The variables with hosts that are reached without a proxy. The first that is set counts."""
_DEFAULT_PORT = 443
"""Of a proxy whose URL has no port, as in gRPC."""


class ConnectRefused(Exception):
    """A proxy has answered a CONNECT with something other than yes.

    Attributes:
        status: of its answer; 0: the answer was no HTTP.
    """

    def __init__(self, status: int) -> None:
        self.status = status
        phrases = {known.value: known.phrase for known in HTTPStatus}
        # the proxy's own words could be anything
        super().__init__(f"{status} {phrases.get(status, '')}".strip() if status else "no HTTP")


@dataclass(frozen=True)
class Proxy:
    """An HTTP proxy.

    Args:
        variable: where it was found, such as "https_proxy".
        host: its name or address.
        port: its port.
        url: with user and password, if the variable has them; not for people.
    """

    variable: str
    host: str
    port: int
    url: str = field(repr=False)

    def __str__(self) -> str:
        """Return its address and its variable, without user and password."""
        return f"the proxy {self.host}:{self.port} (variable {self.variable})"

    def connect(self, host: str, port: int, timeout_s: float) -> socket.socket:
        """Return a connection to a server through this proxy.

        Raises:
            ConnectRefused: the proxy does not connect to the server.
            OSError: the proxy cannot be reached.
        """
        target = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
        parts = urlsplit(self.url)
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            lines.append(f"Proxy-Authorization: Basic {b64encode(login.encode()).decode()}")
        raw = socket.create_connection((self.host, self.port), timeout_s)
        try:
            raw.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = HTTPResponse(raw, method="CONNECT")
            answer.begin()
            if not 200 <= answer.status < 300:
                raise ConnectRefused(answer.status)
        except HTTPException as error:
            raw.close()
            raise ConnectRefused(0) from error
        except BaseException:
            raw.close()
            raise
        return raw


def proxy_for(host: str) -> Proxy | None:
    """Return the proxy through which a host is reached; None: it is reached directly.

    Loopback is never reached through a proxy.

    Raises:
        LinkError: `proxy-invalid`, the variable's value is no HTTP proxy.
    """
    named = getproxies_environment()  # an empty variable counts as one that is not set
    excluded = next((named[kind] for kind in _EXCLUSIONS if kind in named), "")
    kind = next((kind for kind in _KINDS if kind in named), "")
    if not kind or host in LOOPBACK or _is_excluded(host, excluded):
        return None
    variable = f"{kind}_proxy" if os.environ.get(f"{kind}_proxy") else f"{kind}_PROXY".upper()
    url = named[kind] if "://" in named[kind] else f"http://{named[kind]}"
    try:
        parts = urlsplit(url)
        proxy = Proxy(variable, parts.hostname or "", parts.port or _DEFAULT_PORT, parts.geturl())
        is_http = parts.scheme == "http"
    except ValueError:  # a port that is no number, or a bracket without its other one
        is_http = False
    if not is_http or not proxy.host:
        raise LinkError(
            f"the variable {variable} names no HTTP proxy",
            "http://HOST:PORT, also for connections with TLS",
            f"correct it, or set no_proxy={host} if the server is reached without a proxy",
            code="proxy-invalid",
        )
    return proxy


def _is_excluded(host: str, excluded: str) -> bool:
    """Return whether a list of names, domains, addresses and networks has a host."""
    entries = [entry.strip().lower() for entry in excluded.split(",")]
    return any(_covers(entry, host.lower()) for entry in entries if entry)


def _covers(entry: str, host: str) -> bool:
    """Return whether an entry of such a list is for a host. An asterisk is for all; a domain for all names in it."""
    if "/" in entry:
        try:
            return ip_address(host) in ip_network(entry, strict=False)
        except ValueError:  # the host is a name, or the entry is no network
            return False
    domain = entry.lstrip("*.")
    return host == domain or host.endswith(f".{domain}") or entry == "*"


def grpc_options(proxy: Proxy | None) -> tuple[tuple[str, str | int], ...]:
    """Return gRPC's options of a channel through a proxy, or of one that is direct whatever the environment says."""
    if proxy is None:
        return (("grpc.enable_http_proxy", 0),)
    return (("grpc.http_proxy", proxy.url),)
