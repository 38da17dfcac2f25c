"""Network addresses of the form HOST:PORT."""

from __future__ import annotations

from tsugiki.common.errors import UsageError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def split_address(address: str) -> tuple[str, int]:
    """Return the host and the port of an address.

    Raises:
        UsageError: the address is not HOST:PORT.
    """
    host, _, port = address.rpartition(":")  # the last colon: an IPv6 address has others
    if not host or not port.isdigit() or not 0 < int(port) < 65_536:
        raise UsageError(f"{address!r:.80} is no address", "HOST:PORT, such as 0.0.0.0:9092")
    return host.strip("[]"), int(port)
