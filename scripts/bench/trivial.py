"""A ClientApp that does nothing but answers with the same messages as the real one; and a resident node that runs it.

python scripts/bench/trivial.py HOST:PORT NUMBER [FLOATS]
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from flwr.app import Message
from flwr.clientapp import ClientApp

from tsugiki.common import __version__
from tsugiki.common.wire.arrays import encode
from tsugiki.common.wire.messages import HelloReply, TrainReply, TrainRequest, from_record, to_record
from tsugiki.common.wire.spec import AdapterSpec, TensorSpec

FLOATS = 75_000


def trivial_spec(size: int) -> AdapterSpec:
    """Return the spec of an adapter with one tensor of `size` numbers."""
    return AdapterSpec("trivial", "none", "{}", "0" * 64, "float32", (TensorSpec("w", (size,), "adapter"),))


def trivial_app(spec: AdapterSpec) -> ClientApp:
    """Return a ClientApp that sends zeros. `partition-id` in the node config numbers its sites."""
    app = ClientApp()
    arrays = encode(np.zeros(spec.size, np.float32), spec)

    @app.query()
    def hello(message: Any, context: Any) -> Any:
        reply = HelloReply(_name(context), __version__, 1, 10, 0, "0" * 64, spec.sha256, "", "")
        return Message(to_record(reply), reply_to=message)

    @app.train()
    def train(message: Any, context: Any) -> Any:
        request = from_record(TrainRequest, message.content)
        reply = TrainReply(_name(context), request.round, request.nonce, 10, 1, 0.0, True, 0.0)
        return Message(to_record(reply, arrays), reply_to=message)

    return app


def _name(context: Any) -> str:
    return f"site-{int(context.node_config['partition-id']):03d}"


app = trivial_app(trivial_spec(FLOATS))
"""The app that a stock SuperNode loads from the bundle."""


def main() -> None:
    """Run a resident node until a signal stops it."""
    from tsugiki.client.node.channel import Stopping
    from tsugiki.client.node.connection import Connection
    from tsugiki.client.node.link import Link
    from tsugiki.client.node.node import Ending, Node
    from tsugiki.client.node.status import Lines

    address, number, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else FLOATS
    ending, status = Ending(), Lines()
    with ending.handling_signals():
        connection = Connection(Link(address, None, None, 60.0), ending, status.note)
        try:
            connection.connect()
            Node(trivial_app(trivial_spec(size)), connection, {"partition-id": number}, status, ending).run()
        except Stopping:
            status.note("stopped while the server was away")
        finally:
            connection.close()


if __name__ == "__main__":
    main()
