"""Parse tables of raw settings into a `RunConfig`, and report every problem of the file at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from tsugiki.common.adapters import ADAPTERS, REFUSED
from tsugiki.common.adapters.lora import LoraSettings
from tsugiki.common.config.rules import cross_checks, privacy_problems, strategy_problems
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.registry import Registry
from tsugiki.common.settings import Section
from tsugiki.common.strategies import STRATEGIES, strategy_of
from tsugiki.common.tasks import TASKS


def _settings_class(
    raw: Mapping[str, Any], section: str, key: str, registry: Registry[Any], default: str
) -> type[Section] | Problem:
    """Return the settings class of the name that a section chooses; a Problem if the name is unknown."""
    name = raw.get(section, {}).get(key, default)
    if isinstance(name, str) and name in registry.names():
        settings: type[Section] = registry.get(name).Settings
        return settings
    advice = (registry.expected(), "choose one of these")
    if registry is ADAPTERS:
        advice = REFUSED.get(str(name), advice)
    expected, hint = advice
    return Problem(f"{section}.{key}", repr(name)[:80], expected, hint)


def families() -> dict[str, list[type[Section]]]:
    """Return all settings classes of task, adapter and strategy, which have one class for each name."""
    return {
        "task": [TASKS.get(name).Settings for name in TASKS.names()],
        "adapter": [ADAPTERS.get(name).Settings for name in ADAPTERS.names()],
        "strategy": [STRATEGIES.get(name).Settings for name in STRATEGIES.names()],
    }


def section_classes(raw: Mapping[str, Any]) -> dict[str, type[Section] | Problem]:
    """Return the settings class of each section, given the names that `raw` chooses."""
    classes: dict[str, type[Section] | Problem] = {}
    for name, field in RunConfig.model_fields.items():
        classes[name] = field.annotation  # type: ignore[assignment]  # pydantic types it as Any | None
    # The settings of these three sections depend on the name in the section.
    classes["task"] = _settings_class(raw, "task", "name", TASKS, "sequence-classification")
    classes["adapter"] = _settings_class(raw, "adapter", "method", ADAPTERS, "lora")
    classes["strategy"] = _settings_class(raw, "strategy", "name", STRATEGIES, "fedavg")
    return classes


def parse(raw: Mapping[str, Any], source: str = "run file", found: Sequence[Problem] = ()) -> RunConfig:
    """Return the validated configuration.

    Args:
        raw: settings by section.
        source: where the settings come from, for the error message.
        found: problems that are known already.

    Raises:
        ConfigError: with every problem of the file, not only the first.
    """
    problems = list(found)
    raw = dict(raw)
    known = ", ".join(RunConfig.model_fields)
    unusable = [name for name in raw if name not in RunConfig.model_fields or not isinstance(raw[name], Mapping)]
    for name in unusable:
        problems.append(
            Problem(name, repr(raw.pop(name))[:80], f"one of the sections {known}", _did_you_mean(name, known))
        )
    # Each section is validated by itself, so that one mistake does not hide those in other sections.
    sections: dict[str, Any] = {}
    for name, section in section_classes(raw).items():
        if isinstance(section, Problem):
            problems.append(section)
            continue
        try:
            sections[name] = section.model_validate(raw.get(name, {}))
        except ValidationError as error:
            problems += [explain(name, section, detail) for detail in error.errors()]
    if not problems:  # rules between settings need a whole run
        config = _with_factors(RunConfig(**sections))
        problems = cross_checks(config) + strategy_problems(config) + privacy_problems(config)
    if problems:
        raise ConfigError(source, problems)
    return config


def changed(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return a configuration with some of its settings changed, and validated as a file would be.

    Args:
        config: the configuration to start from; it is not modified.
        changes: new values by dotted key, such as `{"train.device": "cpu"}`. The name of a section alone replaces the
            whole section; what its new table leaves out gets its default.

    Raises:
        ConfigError: a key is unknown, or a value does not fit; with every problem.
    """
    return parse(with_changes(config.model_dump(mode="json"), changes), "changed settings")


def with_changes(raw: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables of raw settings with values set by dotted key.

    Args:
        raw: settings by section, not modified. A section that is not a table is kept, so that `parse` reports it.
        changes: new values by dotted key.

    Raises:
        ConfigError: a key leads into a setting that is not a table.
    """
    result = dict(raw)
    for dotted, value in changes.items():
        section, *inner = dotted.split(".")
        if not inner:
            result[section] = value
        elif isinstance(table := result.get(section, {}), Mapping):
            result[section] = _with_value(section, table, inner, value)
    return result


def _with_value(name: str, table: Mapping[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    """Return a copy of the table `name` with one value set, at any depth."""
    first, *rest = keys
    if not rest:
        return {**table, first: value}
    key = f"{name}.{first}"
    inner = table.get(first, {})
    if not isinstance(inner, Mapping):
        hint = f"set {key} as a whole, or write it as a table"
        raise ConfigError("changed settings", [Problem(key, repr(inner)[:80], f"a table with {'.'.join(rest)}", hint)])
    return {**table, first: _with_value(key, inner, rest, value)}


def _with_factors(config: RunConfig) -> RunConfig:
    """Return the run with the LoRA settings that follow from its strategy and privacy."""
    strategy = strategy_of(config.strategy)
    adapter = strategy.complete(config.adapter)
    private = config.privacy.mode != "none" or config.privacy.examples.enabled
    if isinstance(adapter, LoraSettings) and adapter.freeze_a == "auto" and (private or strategy.freezes_a):
        # Noise on both factors multiplies in their product, so A is frozen in private runs.
        adapter = adapter.model_copy(update={"freeze_a": "yes"})
    return config.model_copy(update={"adapter": adapter})


def explain(prefix: str, section: type[Section], detail: Any) -> Problem:
    """Turn one of pydantic's errors into a Problem."""
    key = ".".join([prefix, *map(str, detail["loc"])]).rstrip(".")
    value = repr(detail["input"])[:80]
    if detail["type"] == "extra_forbidden":
        known = ", ".join(section.model_fields)
        hint = _REPLACED.get(key) or _did_you_mean(str(detail["loc"][-1]), known)
        return Problem(key, value, f"a known key: {known}", hint)
    if detail["type"] == "tuple_type":  # TOML has no tuples
        return Problem(key, value, "a list in brackets")
    if detail["type"] == "missing":
        return Problem(key, "nothing", "set: it has no default")
    return Problem(key, value, _after_must_be(detail["msg"]))


_REPLACED = {
    "train.bf16": 'write train.precision = "bf16" for true; remove it for false',
    "policy.max_clients_per_site": "write clients_counted_per_site, its new name",
}
"""What to write in place of settings of earlier versions."""

_PYDANTIC_WORDS = {
    r"^value error, ": "",
    r"^input should be ": "",
    r"^(\w+) should have ": r"a \1 with ",
    r"^(\w+) should match pattern ": r"a \1 of the pattern ",
}


def _after_must_be(message: str) -> str:
    """Turn a message of pydantic, such as `String should have at least 1 character`, into words after "must be"."""
    message = message[:1].lower() + message[1:]
    for pattern, words in _PYDANTIC_WORDS.items():
        message = re.sub(pattern, words, message)
    return message


def _did_you_mean(name: str, known: str) -> str:
    close = difflib.get_close_matches(name, known.split(", "), 1)
    if close:
        return f"write {close[0]!r}, if that is what you mean"
    return "remove it"


@lru_cache(maxsize=4)
def site_config(text: str) -> RunConfig:
    """Return the run as sites see it; parsed once for each distinct text.

    Raises:
        ConfigError: the text is no JSON object, or a setting is unknown here or out of range.
    """
    source = "run received from the server"
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):  # the latter from thousands of brackets
        raw = None
    if not isinstance(raw, dict):
        raise ConfigError(source, [Problem("config", f"{len(text)} characters", "a JSON object")])
    return parse(raw, source)
