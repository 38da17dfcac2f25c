"""Network addresses of the form HOST:PORT, and URLs that stand for them."""

from __future__ import annotations

from tsugiki.common.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WITH_TLS = ("https", "grpcs")
_WITHOUT_TLS = ("http", "grpc")
HTTPS_PORT = 443


def split_address(address: str) -> tuple[str, int]:
    """Return the host and the port of an address.

    Raises:
        UsageError: the address is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")  # the last colon: an IPv6 address has others
    is_port = port.isascii() and port.isdigit() and 0 < int(port) < 65_536
    if not host or set(host) & set("/@ ") or not is_port:
        raise UsageError(f"{address!r:.80} is no address", "HOST:PORT, such as 0.0.0.0:9092")
    return host.strip("[]"), int(port)


def server_address(text: str, *, tls: bool) -> str:
    """Return the address of a server as HOST:PORT.

    Args:
        text: HOST:PORT, or a URL such as https://HOST:PORT. The port of an https URL may be left out: 443.
        tls: whether the connection is encrypted.

    Raises:
        UsageError: the text is neither, or its scheme contradicts `tls`.
    """
    scheme, is_url, address = text.partition("://")
    if not is_url:
        split_address(text)
        return text
    scheme = scheme.lower()
    address = address.removesuffix("/")
    if scheme in _WITHOUT_TLS and tls:
        raise UsageError(
            f"{scheme}:// is a connection without encryption",
            f"https://{address:.80}, or HOST:PORT",
            "leave the scheme out: connections are encrypted unless --insecure is given, which is for loopback only",
        )
    if scheme in _WITH_TLS and not tls:
        raise UsageError(
            f"--insecure is given, and {scheme}:// is a connection with TLS",
            "one of them",
            "leave --insecure out, or the scheme",
        )
    if scheme not in (*_WITH_TLS, *_WITHOUT_TLS):
        raise UsageError(f"{text!r:.80} is no address of a server", "HOST:PORT or https://HOST:PORT")
    has_port = address.rpartition("]")[2].count(":") == 1
    if scheme == "https" and not has_port:
        address = f"{address}:{HTTPS_PORT}"
    split_address(address)
    return address
