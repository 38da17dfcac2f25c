"""`tsugiki` at a site or server that means harm or is broken: `hostile.py TRICK client ...`, a process of its own."""

from __future__ import annotations

import sys
import time
from typing import Any

from tsugiki.cli import main
from tsugiki.client import app
from tsugiki.client.node.channel import RunOver
from tsugiki.client.node.connection import Connection
from tsugiki.client.training import cohort
from tsugiki.server.run import secagg

PRIVATE = "Patient Jane hf_abc123"


def replay() -> None:
    """Answer every round with the first round's reply."""
    first, honest = [], app._train

    def train(*arguments: Any) -> Any:
        first.append(honest(*arguments))
        return first[0]

    app._train = train


def twice() -> None:
    """Send every reply twice."""
    once = Connection.send

    def send(self: Connection, reply: Any) -> None:
        once(self, reply)
        try:
            once(self, reply)
        except RunOver as error:
            print(f"the second was not taken: {error}")

    Connection.send = send  # type: ignore[method-assign]


def fail() -> None:
    """Raise something private in training."""

    def train(*arguments: Any) -> Any:
        raise ValueError(PRIVATE)

    cohort.train = train


def silent() -> None:
    """Say hello, and never train."""

    def train(*arguments: Any) -> Any:
        while True:  # the process is asked to end by a signal
            time.sleep(60.0)

    cohort.train = train


def counts() -> None:
    """At a server: invent clients at the other sites."""
    from lying import invent_counts, lying  # beside this file, which runs as a script

    secagg.address = lying(invent_counts)


def told() -> None:
    """At a server: send all sites but site-0 a rate with which they do not learn."""
    from lying import lying, told_to_others

    secagg.address = lying(told_to_others("site-0", "train", "learning_rate", 1e-30))


TRICKS = {"replay": replay, "twice": twice, "fail": fail, "silent": silent, "counts": counts, "told": told}

if __name__ == "__main__":
    TRICKS[sys.argv.pop(1)]()
    main()
