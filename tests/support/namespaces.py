"""Hosts on one machine: a server and clients in network namespaces, each client on a cable of its own to the server."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


def why_not() -> str:
    """Return why no namespaces can be made here; empty if they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "iptables") if not shutil.which(tool)]
    return f"network namespaces need {' and '.join(missing)} (packages iproute2 and iptables)" if missing else ""


@dataclass(frozen=True)
class Host:
    """A namespace, and the server's address as it is seen from there (the server's own: all of them)."""

    namespace: str
    server_address: str

    def program(self, *command: str | os.PathLike[str]) -> tuple[str, ...]:
        """Return a command that runs here."""
        return ("ip", "netns", "exec", self.namespace, *map(str, command))

    def cut(self) -> None:
        """Drop every packet that comes or goes, as a dead line does: nobody is told."""
        for chain in ("INPUT", "OUTPUT"):
            _do(
                *self.program(
                    "iptables",
                    "--append",
                    chain,
                    "!",
                    "--in-interface" if chain == "INPUT" else "--out-interface",
                    "lo",
                    "--jump",
                    "DROP",
                )
            )

    def heal(self) -> None:
        """Let packets through again."""
        _do(*self.program("iptables", "--flush"))


@contextmanager
def hosts(clients: int) -> Iterator[tuple[Host, list[Host]]]:
    """Lay out one server and some clients inside a `with` block; gives (server, clients)."""
    server = Host(f"tsugiki-{os.getpid()}-server", "0.0.0.0")  # inside its own namespace
    others = [Host(f"tsugiki-{os.getpid()}-{n}", f"10.77.{n}.1") for n in range(clients)]
    made = []
    try:
        for host in (server, *others):
            _do("ip", "netns", "add", host.namespace)
            made.append(host.namespace)
            _do("ip", "-n", host.namespace, "link", "set", "lo", "up")
        for number, host in enumerate(others):
            there, here = f"to-{number}", "eth0"
            cable = ("ip", "link", "add", there, "netns", server.namespace, "type", "veth")
            _do(*cable, "peer", "name", here, "netns", host.namespace)
            for namespace, name, last in ((server.namespace, there, 1), (host.namespace, here, 2)):
                _do("ip", "-n", namespace, "address", "add", f"10.77.{number}.{last}/24", "dev", name)
                _do("ip", "-n", namespace, "link", "set", name, "up")
        yield server, others
    finally:
        for namespace in made:
            _do("ip", "netns", "delete", namespace)


def _do(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
