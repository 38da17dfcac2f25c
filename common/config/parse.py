"""From tables of raw settings to a `RunConfig`, with every problem of the file at once."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from tsugiki.common.adapters import ADAPTERS, REFUSED
from tsugiki.common.config.rules import cross_checks, privacy_problems, strategy_problems
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ConfigError, Problem
from tsugiki.common.registry import Registry
from tsugiki.common.settings import Section
from tsugiki.common.strategies.settings import STRATEGY_SETTINGS, WHOLE_RANK
from tsugiki.common.tasks import TASKS


def _chosen(raw: Mapping[str, Any], section: str, key: str, registry: Registry[Any], default: str) -> Any:
    """Return the registered class that a section names, or a Problem."""
    name = raw.get(section, {}).get(key, default)
    if isinstance(name, str) and name in registry.names():
        return registry.get(name)
    known = (f"one of {', '.join(registry.names())}", "choose one of these")
    expected, do = REFUSED.get(str(name), known) if registry is ADAPTERS else known
    return Problem(f"{section}.{key}", repr(name)[:80], expected, do)


def families() -> dict[str, list[type[Section]]]:
    """Return all settings classes of the sections that have one for each name: task, adapter and strategy."""
    return {
        "task": [TASKS.get(name).Settings for name in TASKS.names()],
        "adapter": [ADAPTERS.get(name).Settings for name in ADAPTERS.names()],
        "strategy": [STRATEGY_SETTINGS.get(name) for name in STRATEGY_SETTINGS.names()],
    }


def section_classes(raw: Mapping[str, Any]) -> dict[str, type[Section] | Problem]:
    """Return the settings class of each section, given the names that `raw` chooses."""
    classes: dict[str, type[Section] | Problem] = {}
    for name, field in RunConfig.model_fields.items():
        classes[name] = field.annotation  # type: ignore[assignment]  # pydantic types it as Any | None
    task = _chosen(raw, "task", "name", TASKS, "sequence-classification")
    method = _chosen(raw, "adapter", "method", ADAPTERS, "lora")
    classes["task"] = task if isinstance(task, Problem) else task.Settings
    classes["adapter"] = method if isinstance(method, Problem) else method.Settings
    classes["strategy"] = _chosen(raw, "strategy", "name", STRATEGY_SETTINGS, "fedavg")
    return classes


def parse(raw: Mapping[str, Any], source: str = "run file", found: Sequence[Problem] = ()) -> RunConfig:
    """Return the validated configuration.

    Args:
        raw: sections of settings.
        source: where they come from.
        found: problems that are known already.

    Raises:
        ConfigError: with every problem of the file, not only the first.
    """
    problems = list(found)
    raw = dict(raw)
    for name in [name for name in raw if name not in RunConfig.model_fields or not isinstance(raw[name], Mapping)]:
        known = ", ".join(RunConfig.model_fields)
        problems.append(
            Problem(name, repr(raw.pop(name))[:80], f"one of the sections {known}", _did_you_mean(name, known))
        )
    sections: dict[str, Any] = {}
    for name, section in section_classes(raw).items():
        if isinstance(section, Problem):
            problems.append(section)
            continue
        try:
            sections[name] = section.model_validate(raw.get(name, {}))
        except ValidationError as error:
            problems += [explain(name, section, detail) for detail in error.errors()]
    if not problems:
        config = _with_factors(RunConfig(**sections))
        problems = cross_checks(config) + strategy_problems(config) + privacy_problems(config)
    if problems:
        raise ConfigError(source, problems)
    return config


def _with_factors(config: RunConfig) -> RunConfig:
    """Set what follows for LoRA's factors from strategy and privacy.

    A is frozen under privacy unless told otherwise: noise on both factors multiplies in their product.
    """
    private = config.privacy.mode != "none" or config.privacy.examples.enabled
    chosen: dict[str, Any] = {}
    if (private or config.strategy.name == "ffa") and getattr(config.adapter, "freeze_a", "") == "auto":
        chosen["freeze_a"] = "yes"
    if config.strategy.name == "flora" and config.adapter.method == "lora":
        wanted = config.strategy.merged_rank or config.adapter.merged_rank  # type: ignore[attr-defined]  # both have it
        chosen["merged_rank"] = wanted or WHOLE_RANK
    return config.model_copy(update={"adapter": config.adapter.model_copy(update=chosen)})


def explain(prefix: str, section: type[Section], detail: Any) -> Problem:
    """Turn one of pydantic's errors into a Problem."""
    key = ".".join([prefix, *map(str, detail["loc"])]).rstrip(".")
    value = repr(detail["input"])[:80]
    if detail["type"] == "extra_forbidden":
        known = ", ".join(section.model_fields)
        return Problem(key, value, f"a known key: {known}", _did_you_mean(str(detail["loc"][-1]), known))
    if detail["type"] == "tuple_type":  # TOML has no tuples
        return Problem(key, value, "a list in brackets")
    if detail["type"] == "missing":
        return Problem(key, "nothing", "set: it has no default")
    return Problem(key, value, _after_must_be(detail["msg"]))


_PYDANTIC_WORDS = {
    r"^value error, ": "",
    r"^input should be ": "",
    r"^(\w+) should have ": r"a \1 with ",
    r"^(\w+) should match pattern ": r"a \1 of the pattern ",
}


def _after_must_be(message: str) -> str:
    """Return one of pydantic's messages, `String should have at least 1 character`, as what a value must be."""
    message = message[:1].lower() + message[1:]
    for pattern, words in _PYDANTIC_WORDS.items():
        message = re.sub(pattern, words, message)
    return message


def _did_you_mean(name: str, known: str) -> str:
    close = difflib.get_close_matches(name, known.split(", "), 1)
    return f"write {close[0]!r}, if that is what you mean" if close else "remove it"


@lru_cache(maxsize=4)
def site_config(text: str) -> RunConfig:
    """Return the run as sites see it; parsed once for each distinct text.

    Raises:
        ConfigError: a setting is unknown here or out of range.
    """
    return parse(json.loads(text), "run received from the server")
