"""A TCP proxy on loopback that can be slow, hold bytes back, hang up, count and listen in."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

Direction = Literal["up", "down"]
Chunk = tuple[float, bytes]
"""When it may go on, and what it is; empty at the end."""
CHUNK_BYTES = 4096


@dataclass
class Proxy:
    """What a test sets and reads while bytes pass; "up" is towards the server.

    Args:
        target: port of the server.
        delay_s: every chunk waits so long, each way.
        bytes_per_s: of each connection and way; 0: unlimited.
        held: ways on which nothing gets through until the way is removed.
        passed: bytes so far.
        heard: the bytes themselves, if `listening`.
        trap: called once, in place of the chunk that brings the bytes sent up to `trap_at`.
    """

    target: int
    delay_s: float = 0.0
    bytes_per_s: float = 0.0
    held: set[Direction] = field(default_factory=set)
    passed: dict[Direction, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    listening: bool = False
    heard: dict[Direction, bytearray] = field(default_factory=lambda: {"up": bytearray(), "down": bytearray()})
    trap_at: int = 0
    trap: Callable[[Proxy], None] | None = None
    sprung: bool = False
    port: int = 0
    _open: set[asyncio.StreamWriter] = field(default_factory=set)

    def hang_up(self) -> None:
        """Reset every connection, from inside the proxy's loop: as a trap."""
        for writer in list(self._open):
            writer.transport.abort()

    def hold(self) -> None:
        """Let nothing through any more, either way."""
        self.held |= {"up", "down"}

    def release(self) -> None:
        """Let everything through again, what was held back first."""
        self.held.clear()

    def after(self, size_bytes: int, trap: Callable[[Proxy], None]) -> None:
        """Call `trap` when so many more bytes have been sent up."""
        self.trap_at, self.sprung, self.trap = self.passed["up"] + size_bytes, False, trap

    def wait_until_sprung(self, timeout_s: float) -> None:
        """Wait for the trap."""
        ends = time.monotonic() + timeout_s
        while not self.sprung:
            assert time.monotonic() < ends, f"only {self.passed['up']} of {self.trap_at} bytes were sent up"
            time.sleep(0.02)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        self._open |= {writer, back}
        up, down = asyncio.Queue[Chunk](), asyncio.Queue[Chunk]()
        parts = [
            self._receive(reader, up),
            self._send("up", up, back),
            self._receive(there, down),
            self._send("down", down, writer),
        ]
        tasks = [asyncio.create_task(part) for part in parts]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        for end in (writer, back):  # if one end broke off, the other learns it, and all four parts end
            end.transport.abort()
            self._open.discard(end)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self, source: asyncio.StreamReader, queue: asyncio.Queue[Chunk]) -> None:
        while chunk := await source.read(CHUNK_BYTES):
            queue.put_nowait((time.monotonic() + self.delay_s, chunk))
            while queue.qsize() > 16:  # then the sender's own buffers fill, as on a slow line
                await asyncio.sleep(0.005)
        queue.put_nowait((0.0, b""))

    async def _send(self, way: Direction, queue: asyncio.Queue[Chunk], sink: asyncio.StreamWriter) -> None:
        while True:
            due, chunk = await queue.get()
            if not chunk:
                sink.close()
                return
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            if self.bytes_per_s:
                await asyncio.sleep(len(chunk) / self.bytes_per_s)
            self.passed[way] += len(chunk)
            if self.listening:
                self.heard[way] += chunk
            if way == "up" and self.trap is not None and self.passed["up"] >= self.trap_at:
                trap, self.trap = self.trap, None
                trap(self)
                self.sprung = True
            while way in self.held:
                await asyncio.sleep(0.02)
            sink.write(chunk)
            await sink.drain()


@contextmanager
def proxied(target: int, **settings: float | bool) -> Iterator[Proxy]:
    """Run a proxy to a loopback port inside a `with` block."""
    proxy, loop, over, started = Proxy(target), asyncio.new_event_loop(), asyncio.Event(), threading.Event()
    for name, value in settings.items():
        setattr(proxy, name, value)

    async def run() -> None:
        server = await asyncio.start_server(proxy._accept, "127.0.0.1", 0)
        proxy.port = server.sockets[0].getsockname()[1]
        started.set()
        await over.wait()
        server.close()
        proxy.release()
        proxy.hang_up()
        await server.wait_closed()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        if others:
            await asyncio.wait(others, timeout=2)

    def work() -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:
            runner.run(run())

    thread = threading.Thread(target=work, name="proxy")
    thread.start()
    assert started.wait(5)
    try:
        yield proxy
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join(5)
        assert not thread.is_alive()
