"""A company's proxy on loopback: it answers HTTP CONNECT, and leads to a loopback port or refuses."""

from __future__ import annotations

import socketserver
import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socket import create_connection, socket
from typing import Any


@dataclass
class Asked:
    """What a proxy was asked: hosts with ports, and who asked, in order; other methods than CONNECT, too."""

    port: int
    targets: list[str] = field(default_factory=list)
    logins: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


@contextmanager
def connect_proxy(status: int = 200, target: int = 0) -> Iterator[Asked]:
    """Run a proxy inside a `with` block.

    Args:
        status: of its answers.
        target: the loopback port to which it leads, whatever host it is asked for.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_CONNECT(self) -> None:
            asked.targets.append(self.path)
            kind, _, login = self.headers.get("Proxy-Authorization", "").partition(" ")
            if kind == "Basic":
                asked.logins.append(b64decode(login).decode())
            if status != 200:
                self.send_error(status)
                return
            try:
                there = create_connection(("127.0.0.1", target))
            except OSError:
                self.send_error(502)
                return
            with there:
                self.send_response(status)
                self.end_headers()
                _join(self.connection, there)

        def do_POST(self) -> None:
            asked.others.append(self.path)
            self.send_error(403)

        do_GET = do_POST

        def log_message(self, *_: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        handle_error = lambda *_: None  # noqa: E731  # a client that hangs up is no error here

    server: socketserver.BaseServer = Server(("127.0.0.1", 0), Handler)
    asked = Asked(int(server.server_address[1]))
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def _join(one: socket, other: socket) -> None:
    """Pass bytes both ways until one side ends."""

    def pump(source: socket, sink: socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                try:
                    end.shutdown(2)
                except OSError:
                    continue

    back = threading.Thread(target=pump, args=(other, one), daemon=True)
    back.start()
    pump(one, other)
    back.join(5)
