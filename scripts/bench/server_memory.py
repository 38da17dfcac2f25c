"""Measure the server's memory and the time of aggregation against the number of sites.

    python scripts/bench/server_memory.py [--floats 5e6,50e6] [--replies 4,16,64,256]
        [--kinds fedavg,fedavgm,fedadam,private]

Each case is a process of its own, which runs two rounds of the real loop with sites that train nothing and send random
updates. Memory is the peak resident set above that of the process with its run set up, in adapters of float32: what
the rounds themselves need, whatever the base. The set-up process holds the adapter that the run starts from, once; as
in a deployed run, nothing refers to it after the first round. Sites answer in this process; over a network, Flower
copies a reply once more while it puts its pieces together.

Aggregation is the CPU time of adding up the updates and taking the step, without the guard's checks and without drawing
the noise of a private run. It is compared with the time that `numpy.sum` takes over as many float32 updates of this
size, four at a time, in the same process.
"""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import numpy as np
from figures import Figure, show
from trivial import trivial_spec

ROUNDS = 2
KINDS = ("fedavg", "fedavgm", "fedadam", "private")
GROUP = 4
"""How many updates `numpy.sum` adds up at once: it holds all of them."""
CHUNK = 50_000
HEADER_BYTES = 128
"""Of a flat array in NumPy's format."""


def _stream(size_bytes: int) -> io.BytesIO:
    """Return a stream that takes its memory once: one that grows would hold some of it twice."""
    stream = io.BytesIO()
    stream.seek(size_bytes - 1)
    stream.write(bytes(1))
    stream.seek(0)
    return stream


def random_bytes(spec: Any, number: int) -> bytes:
    """Return an update of a site in NumPy's format, made in pieces, so that it is in memory only once."""
    draw = np.random.default_rng(number)
    stream = _stream(HEADER_BYTES + 4 * spec.size)
    np.lib.format.write_array_header_1_0(stream, {"descr": "<f4", "fortran_order": False, "shape": (spec.size,)})
    scale = np.float32(1 / np.sqrt(spec.size))
    for start in range(0, spec.size, CHUNK):
        piece = draw.standard_normal(min(CHUNK, spec.size - start), dtype=np.float32)
        piece *= scale
        stream.write(piece.data)
    return stream.getvalue()


def random_levels(spec: Any, number: int, bits: int) -> bytes:
    """Return a protected update of a site in NumPy's format: a few levels for each number."""
    from tsugiki.common.privacy.clipping import LEVELS

    width = bits // 8
    draw = np.random.default_rng(number)
    stream = _stream(HEADER_BYTES + width * spec.size)
    np.lib.format.write_array_header_1_0(
        stream, {"descr": "|u1", "fortran_order": False, "shape": (spec.size * width,)}
    )
    most = max(1, int(LEVELS / np.sqrt(spec.size)))
    for start in range(0, spec.size, CHUNK):
        piece = draw.integers(0, most, min(CHUNK, spec.size - start), dtype=np.int64)
        stream.write(np.ascontiguousarray(piece.view(np.uint8).reshape(-1, 8)[:, :width]).data)
    return stream.getvalue()


def random_app(spec: Any, plan: Any) -> Any:
    """Return a ClientApp whose sites answer with random updates."""
    from flwr.app import Array, ArrayRecord, Message
    from flwr.clientapp import ClientApp

    from tsugiki.common import __version__
    from tsugiki.common.wire.arrays import ARRAY_KEY
    from tsugiki.common.wire.messages import (
        HelloReply,
        PrivateReply,
        TrainReply,
        TrainRequest,
        from_record,
        to_record,
    )

    app = ClientApp()

    def name(context: Any) -> str:
        return f"site-{int(context.node_config['partition-id']):03d}"

    @app.query()
    def hello(message: Any, context: Any) -> Any:
        reply = HelloReply(name(context), __version__, 1, 10, 0, "0" * 64, spec.sha256, "", "")
        return Message(to_record(reply), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        request = from_record(TrainRequest, message.content)
        number = int(context.node_config["partition-id"])
        if plan is None:
            reply: Any = TrainReply(name(context), request.round, request.nonce, 10, 1, 0.0, True, 0.0)
            array = Array("float32", (spec.size,), "numpy.ndarray", random_bytes(spec, number))
        else:
            reply = PrivateReply(name(context), request.round, request.nonce)
            octets = random_levels(spec, number, plan.modulus_bits)
            array = Array("uint8", (spec.size * plan.modulus_bits // 8,), "numpy.ndarray", octets)
        return Message(to_record(reply, ArrayRecord({ARRAY_KEY: array})), reply_to=message)

    return app


def resident_bytes() -> int:
    """Return the resident set of this process now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Peak:
    """The largest resident set while a block runs, looked at every 2 ms."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._ended = threading.Event()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.size_bytes = max(self.size_bytes, resident_bytes())

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch inside a `with` block."""
        watcher = threading.Thread(target=self._watch)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()


class Timer:
    """CPU seconds spent inside wrapped functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def wrap(self, owner: Any, name: str) -> None:
        """Replace a function by itself, timed."""
        real = getattr(owner, name)

        def timed(*arguments: Any, **keywords: Any) -> Any:
            started = time.thread_time()
            result = real(*arguments, **keywords)
            self.seconds += time.thread_time() - started
            return result

        setattr(owner, name, timed)


def numpy_seconds(size: int) -> float:
    """Return the CPU seconds that `numpy.sum` takes for each float32 update of this size."""
    updates = [np.full(size, value, np.float32) for value in range(GROUP)]
    best = np.inf
    for _ in range(3):
        started = time.thread_time()
        np.sum(updates, axis=0)
        best = min(best, time.thread_time() - started)
    return best / GROUP


def loaded(*, private: bool) -> None:
    """Load what is part of the bare process too: Flower, and in a private run the accounting and the noise."""
    import flwr.app
    import flwr.serverapp.strategy  # noqa: F401

    from tsugiki.common.privacy.accounting import Release, epsilon
    from tsugiki.common.privacy.noise import noise_generator

    if private:
        epsilon([Release("gaussian", 1.0)], delta=1e-5)
        noise_generator().normal(size=1)


def measure(kind: str, size: int, sites: int) -> dict[str, float]:
    """Run one case in this process."""
    import tsugiki  # noqa: F401  (first: it switches off what would phone home)
    from tsugiki.common.audit import AuditLog
    from tsugiki.common.config.parse import parse
    from tsugiki.common.privacy.planning import make_plan
    from tsugiki.common.wire.arrays import packed_blocks
    from tsugiki.server.engines.grid import Stop
    from tsugiki.server.engines.in_process import InProcessGrid
    from tsugiki.server.run import rounds
    from tsugiki.server.run.context import RunContext
    from tsugiki.server.run.loop import initial_state, run_rounds
    from tsugiki.server.run.privacy import open_privacy
    from tsugiki.server.run.roster import Roster
    from tsugiki.server.run.sums import RunningMean, RunningSum

    private = {"mode": "central", "noise_multiplier": 1.0, "enrolled_clients": sites}
    name = "fedavg" if kind == "private" else kind
    sections: dict[str, Any] = {"run": {"rounds": ROUNDS}, "strategy": {"name": name, "min_clients": sites}}
    if kind == "private":
        sections["privacy"] = private
    config = parse(sections)
    spec = trivial_spec(size)
    plan = make_plan(config, size)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        audit, stop = AuditLog(folder / "audit.jsonl"), Stop()
        privacy = open_privacy(plan, config, folder / "ledger.jsonl", audit)
        grid = InProcessGrid(random_app(spec, plan), sites)
        roster = Roster(grid, config, spec, plan, audit, stop)
        roster.wait(lambda count: None)
        ctx = RunContext(config, spec, grid, roster, None, False, folder, audit, privacy=privacy)
        timer = Timer()
        for owner, function in (
            (RunningMean, "add"),
            (RunningMean, "value"),
            (RunningSum, "add"),
            (rounds, "aggregated_step"),
        ):
            timer.wrap(owner, function)
        import flwr.app
        import flwr.serverapp.strategy  # noqa: F401  (both are part of the bare process)

        loaded(private=privacy is not None)
        states = [initial_state(packed_blocks(size, lambda part: np.full(part.stop - part.start, 0.5)))]
        bare = resident_bytes()
        peak = Peak()
        with peak.watching():
            run_rounds(ctx, states.pop())
    updates = ROUNDS * sites
    return {
        "adapters": (peak.size_bytes - bare) / (4 * size),
        "bare_mib": bare / 2**20,
        "seconds": timer.seconds / updates,
        "ratio": timer.seconds / updates / numpy_seconds(size),
    }


def in_its_own_process(kind: str, size: int, sites: int) -> dict[str, float]:
    """Run one case in a fresh process, so that no memory of another case is counted."""
    command = [sys.executable, __file__, "--one", f"{kind},{size},{sites}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Run all cases and print their figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--floats", default="5e6,50e6", help="sizes of the adapter, in numbers")
    parser.add_argument("--replies", default="4,16,64,256", help="numbers of sites")
    parser.add_argument("--kinds", default=",".join(KINDS), help="strategies, or private")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, size, sites = options.one.split(",")
        print(json.dumps(measure(kind, int(size), int(sites))))
        return
    figures = []
    for kind in options.kinds.split(","):
        for size in (int(float(text)) for text in options.floats.split(",")):
            for sites in map(int, options.replies.split(",")):
                found = in_its_own_process(kind, size, sites)
                case = f"{kind}, {size / 1e6:g}M numbers, {sites} replies"
                bare = f"bare process {found['bare_mib']:.0f} MiB"
                figures.append(Figure(f"memory, {case}", found["adapters"], "adapters", "<= 4", bare))
                note = f"{found['seconds']:.4f} CPU s a reply"
                figures.append(Figure(f"aggregation, {case}", found["ratio"], "ratio", "<= 2", note))
                print(f"{case}: {found['adapters']:.2f} adapters, {found['ratio']:.2f} times numpy.sum", flush=True)
    show("Memory and time of the server's aggregation", figures)


if __name__ == "__main__":
    main()
