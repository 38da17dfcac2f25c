"""The demo's run as a deployment has it: three of its four companies."""

from __future__ import annotations

import csv
from pathlib import Path

from tsugiki.common.config.files import read
from tsugiki.common.config.run import RunConfig
from tsugiki.server.demo.demo import write_files

COMPANIES = ("clinic", "logistics", "software")


def demo_of_three(folder: Path) -> RunConfig:
    """Write the data of three companies; return the demo's run on them."""
    file, files = write_files(folder, 42)
    with files.train.open(newline="", encoding="utf-8") as stream:
        names, *rows = list(csv.reader(stream))
    with files.train.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([names, *(row for row in rows if row[-1] in COMPANIES)])
    return read(file, ["strategy.min_clients=3", "train.threads=1"])
