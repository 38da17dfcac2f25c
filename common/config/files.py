"""Read and write run configurations: TOML files, command-line overrides and Flower's flat run config."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

from tsugiki.common.config.commented import commented_table
from tsugiki.common.config.parse import changed, families, parse, section_classes, with_changes
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.settings import Section

PATH_KEYS = ("run.output_dir", "adapter.start_from", "privacy.ledger", "evaluation.data", "simulation.data")


def read(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Return the configuration in a TOML file, with `section.key=value` overrides applied.

    Environment variables in paths, as in "${DATA}/train.csv", are replaced; paths are relative to the current folder.

    Raises:
        ConfigError: the file cannot be read or parsed, or has problems; all of them are listed.
    """
    raw, problems = expand(override(read_toml(path), overrides))
    return parse(raw, str(path), problems)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        ConfigError: there is no such file, or it is not TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            str(path), [Problem("file", str(path), "an existing file", "`tsugiki config init`, which writes one")]
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(str(path), [Problem("file", path.name, f"readable TOML in UTF-8 ({error})")]) from None


def override(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `raw` with every `section.key=value` applied. A value that is not TOML is taken as a string."""
    changes: dict[str, Any] = {}
    problems = []
    for assignment in overrides:
        matched = re.fullmatch(r"([a-z_]+\.[a-z0-9_.]+)=(.*)", assignment, re.DOTALL)
        if not matched:
            problems.append(Problem("--set", assignment[:80], "section.key=value", "--set run.rounds=3"))
            continue
        key, text = matched.groups()
        changes.pop(key, None)  # the last one wins, also over a table that holds its key
        changes[key] = _value(text)
    if problems:
        raise ConfigError("command line", problems)
    return with_changes(_without_other_defaults(raw, changes), changes)


def _without_other_defaults(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `raw` without the defaults of a task, method or strategy that `changes` replaces by another one.

    A file that names every setting, as a run's own config.toml does, can then be run with another strategy. Settings
    that somebody chose stay: `parse` refuses them if the other one does not have them.
    """
    result = dict(raw)
    for key in ("task.name", "adapter.method", "strategy.name"):
        section = key.split(".")[0]
        given = raw.get(section, {})
        before = section_classes(raw)[section]
        after = section_classes(with_changes(raw, changes))[section]
        # `parse` reports names that do not exist, and a section that is no table.
        if key not in changes or isinstance(before, Problem) or isinstance(after, Problem):
            continue
        if not isinstance(given, Mapping):
            continue
        defaults = before().model_dump(mode="json")
        others = {name: value for name, value in defaults.items() if name not in after.model_fields}
        replaced = {name for name, value in others.items() if given.get(name) == value}
        result[section] = {name: value for name, value in given.items() if name not in replaced}
    return result


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # --set run.name=clauses reads better than --set 'run.name="clauses"'


def expand(raw: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """Return `raw` with environment variables and ~ in path settings replaced, and the variables that are not set."""
    result = {name: dict(table) if isinstance(table, Mapping) else table for name, table in raw.items()}
    problems = []
    for dotted in PATH_KEYS:
        section, key = dotted.split(".")
        table = result.get(section)
        if not isinstance(table, dict):
            continue  # `parse` reports a section that is not a table
        value = table.get(key)
        if isinstance(value, str) and value:
            expanded = os.path.expanduser(os.path.expandvars(value))
            # `expandvars` keeps the name of a variable that is not set.
            if "$" in expanded:
                problems.append(
                    Problem(dotted, value, "a path whose environment variables are set", "set them, or write the path")
                )
            table[key] = expanded
    return result, problems


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration with absolute paths, so that it means the same in every folder."""
    changes: dict[str, Any] = {
        "model.name": _absolute(config.model.name),
        "task": config.task.resolved(_absolute).model_dump(mode="json"),
        "adapter": config.adapter.resolved(_absolute).model_dump(mode="json"),
    }
    for dotted in PATH_KEYS:
        section, key = dotted.split(".")
        if path := getattr(getattr(config, section), key):
            changes[dotted] = str(Path(path).absolute())
    return changed(config, changes)


def _absolute(name: str) -> str:
    """Return the name of a model; if it names a local folder, as an absolute path."""
    folder = os.path.expanduser(name)
    return os.path.abspath(folder) if os.path.isdir(folder) else name


def to_toml(config: RunConfig) -> str:
    """Return the resolved configuration as TOML; `read` gives the same configuration back."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def to_run_config(config: RunConfig) -> dict[str, bool | float | int | str]:
    """Return the configuration as Flower's flat run config; lists and tables become text."""
    return {
        f"{section}.{key}": _flat(value)
        for section, table in config.model_dump(mode="json").items()
        for key, value in table.items()
    }


def _flat(value: Any) -> bool | float | int | str:
    if isinstance(value, dict | list):
        return json.dumps(value) if value else ""  # a name may hold commas, or be a number in quotes
    result: bool | float | int | str = value
    return result


def run_config_defaults() -> dict[str, bool | float | int | str]:
    """Return the table [tool.flwr.app.config] of pyproject.toml: every key of every task, method and strategy.

    Flower accepts overrides only for keys in this table. A key is empty if only some tasks, methods or strategies
    have it, or if its default depends on them: `from_run_config` leaves empty values to the default.
    """
    known = families()
    result: dict[str, bool | float | int | str] = {}
    for name, chosen in section_classes({}).items():
        members = known.get(name, [] if isinstance(chosen, Problem) else [chosen])
        keys = dict.fromkeys(key for member in members for key in member.model_fields)
        for key in keys:
            defaults = [member.model_fields[key].default for member in members if key in member.model_fields]
            shared = len(defaults) == len(members) and all(default == defaults[0] for default in defaults)
            if key in ("name", "method") and name in known:
                # The name differs between the members of a family, but Flower's table needs one choice.
                result[f"{name}.{key}"] = _default_name(name)
            elif shared:
                result[f"{name}.{key}"] = _jsonable(defaults[0])
            else:
                result[f"{name}.{key}"] = ""
    return result


def _default_name(section: str) -> str:
    return {"task": "sequence-classification", "adapter": "lora", "strategy": "fedavg"}[section]


def _jsonable(value: Any) -> bool | float | int | str:
    if isinstance(value, Section):
        return ""  # the default of a nested table; an override gives it as text
    return _flat(list(value) if isinstance(value, tuple) else value)


def from_run_config(flat: Mapping[str, Any]) -> RunConfig:
    """Return the configuration in Flower's flat run config; empty values mean the default.

    Raises:
        ConfigError: with every problem.
    """
    raw: dict[str, Any] = {}
    for dotted, value in flat.items():
        section, _, key = dotted.partition(".")
        if value != "":
            raw.setdefault(section, {})[key] = value
    raw, problems = expand(raw)
    return parse(raw, "Flower run config", problems)


def commented(task: str, method: str, strategy: str) -> str:
    """Return a run file with every setting at its default, below its description.

    Raises:
        ConfigError: there is no such task, adapter method or strategy.
    """
    chosen = {"task": {"name": task}, "adapter": {"method": method}, "strategy": {"name": strategy}}
    parts = ["# A Tsugiki run. Every setting has its default here; delete what you do not change.\n"]
    for name, section in section_classes(chosen).items():
        if isinstance(section, Problem):
            raise ConfigError("command line", [section])
        parts.append(commented_table(name, section))
    return "\n".join(parts)


def json_schema() -> dict[str, Any]:
    """Return a JSON schema of run files; task, adapter and strategy allow every registered name."""
    properties: dict[str, Any] = {}
    known = families()
    for name, section in section_classes({}).items():
        if name in known:
            properties[name] = {"anyOf": [member.model_json_schema() for member in known[name]]}
        elif not isinstance(section, Problem):
            properties[name] = section.model_json_schema()
    return {"title": "Tsugiki run", "type": "object", "properties": properties, "additionalProperties": False}


def changes(config: RunConfig) -> list[tuple[str, Any, Any]]:
    """Return (key, value, default) for every setting that is not at its default, in file order."""
    found = []
    for name in RunConfig.model_fields:
        section = getattr(config, name)
        for key, field in type(section).model_fields.items():
            if getattr(section, key) != field.default:
                found.append((f"{name}.{key}", getattr(section, key), field.default))
    return found
