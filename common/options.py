"""Options and arguments that several commands share, on either side."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def _set_grpc_log(verbose: bool) -> bool:
    """Keep gRPC's own log lines from stderr, unless the user asks for them here or in GRPC_VERBOSITY.

    They are raw lines of its C++ core. What they mean for the user is in our own messages.
    """
    # gRPC reads the variable when it is imported, which no command has done yet
    os.environ.setdefault("GRPC_VERBOSITY", "INFO" if verbose else "NONE")
    return verbose


Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set train.local_steps=10")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run's TOML file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, such as runs/demo.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: a .svg or .png to write.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_set_grpc_log, help="Also show gRPC's own log lines, for a bug report.")
]
