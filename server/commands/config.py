"""Run files: write one, show what one resolves to, describe all settings."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tsugiki.common.errors import UsageError
from tsugiki.common.files import to_json, unwritable
from tsugiki.common.options import Json, RunFile, Set

if TYPE_CHECKING:
    from tsugiki.common.config.run import TrainSection

app = typer.Typer()
config_app = typer.Typer(no_args_is_help=True, help="Write, show and describe run files.")
app.add_typer(config_app, name="config")


@config_app.command(epilog="Example: tsugiki config init clauses.toml --task sentence-embedding")
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("federation.toml"),
    task: Annotated[str, typer.Option(help="The task.")] = "sequence-classification",
    method: Annotated[str, typer.Option(help="The adapter method.")] = "lora",
    strategy: Annotated[str, typer.Option(help="The strategy.")] = "fedavg",
) -> None:
    """Write a run file with every setting, its default and its meaning."""
    from tsugiki.common.config.files import commented

    text = commented(task, method, strategy)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"the file {file} is there already", "a new file", "choose another name, or delete it"
        ) from None
    except OSError as error:
        raise unwritable(file, error) from error
    typer.echo(file)


@config_app.command(epilog="Example: tsugiki config show examples/sst2.toml --set train.learning_rate=1e-4")
def show(file: RunFile, overrides: Set = None, as_json: Json = False) -> None:
    """Show what a run file resolves to, and which settings differ from their defaults."""
    from tsugiki.common.config.files import changes, read, to_toml
    from tsugiki.common.model.rates import with_known_rates

    resolved = read(file, overrides or [])
    known = with_known_rates(resolved).train
    if as_json:
        typer.echo(to_json(resolved.model_dump(mode="json"), indent=1))
        return
    changed = {key for key, _, _ in changes(resolved)}
    given = {assignment.split("=", 1)[0] for assignment in overrides or []}
    section = ""
    # Each line of the TOML gets the source of its value as a comment.
    for line in to_toml(resolved).splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        if " = " not in line:
            typer.echo(line)
            continue
        key = f"{section}.{line.split(' = ')[0]}"
        setting = ".".join(key.split(".")[:2])  # the source of a table is also the source of its keys
        typer.echo(f"{line:<72}  # {_source(setting, file, given, changed)}{_taken(key, line, known)}")


def _taken(key: str, line: str, known: TrainSection) -> str:
    """Return what "auto" takes for a learning rate, if the base is on this machine; else an empty text."""
    section, _, name = key.partition(".")
    is_open = section == "train" and name.endswith("learning_rate") and line.endswith('"auto"')
    rate = getattr(known, name) if is_open else "auto"
    return "" if rate == "auto" else f"; takes {rate:g}"


def _source(setting: str, file: Path, given: Container[str], changed: Container[str]) -> str:
    """Return the source of a setting's value: `--set`, the run file or "default"."""
    if setting in given:
        return "--set"
    return str(file) if setting in changed else "default"


@config_app.command(epilog="Example: tsugiki config schema > schema.json")
def schema() -> None:
    """Print the JSON schema of all settings, of every task, method and strategy."""
    from tsugiki.common.config.files import json_schema

    typer.echo(to_json(json_schema(), indent=1))
