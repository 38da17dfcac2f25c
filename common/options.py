"""Options and arguments that several commands share, on either side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set train.local_steps=10")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run's TOML file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, such as runs/demo.")]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Also draw it: a .svg or .png to write.")]
