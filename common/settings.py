"""The base classes of all settings, and types that several sections share.

A task, an adapter method or a strategy brings a class of its own that adds fields to `TaskSettings`,
`AdapterSettings` or `StrategySettings`; `common/config/run.py` finds it through the registries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]{0,63}$"
"""Pattern of names that become part of a path or a log line: of runs, sites and files."""

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]


class Section(BaseModel):
    """A frozen, strict group of settings: unknown keys and wrong types are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


def _split(value: Any) -> Any:
    """Turn "a, b" or '["a", "b"]' into ("a", "b"): Flower's run config carries no lists."""
    if isinstance(value, str) and value.startswith("["):  # as `to_run_config` writes a list
        value = json.loads(value)
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value) if isinstance(value, list) else value


def _split_pairs(value: Any) -> Any:
    """Turn "text=sentence, label=2", or the same in JSON, into {"text": "sentence", "label": 2}."""
    if not isinstance(value, str):
        return value
    if value.startswith("{"):
        return json.loads(value)
    parts = [str(part).partition("=") for part in _split(value)]
    pairs = {key: name for key, _, name in parts}
    return {key.strip(): _name_or_position(name.strip()) for key, name in pairs.items()}


def _name_or_position(text: str) -> str | int:
    return int(text) if text.isdigit() else text


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]


def _split_numbers(value: Any) -> Any:
    """Turn "2, 4" into (2, 4). A part that is not a number is kept, so that pydantic reports it."""
    parts = _split(value)
    if not isinstance(parts, tuple):
        return value
    return tuple(map(_number, parts))


def _number(part: Any) -> Any:
    is_number = isinstance(part, str) and part.isdecimal()
    return int(part) if is_number else part


def _auto_or_rate(value: Any) -> Any:
    """Return "auto", or a rate in range. One check, because pydantic reports a union once for each of its types."""
    in_range = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 10
    if value == "auto" or in_range:
        return value
    raise ValueError('"auto", or a finite number greater than 0 and at most 10')


Rate = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_rate)]
"""A learning rate; "auto": `tsugiki.common.model.rates.with_rates` puts a number in its place."""


MOST_SECONDS = 604_800
"""The longest time that a setting may hold: a week."""


def _auto_or_seconds(value: Any) -> Any:
    """Return "auto", or a time in range, in seconds."""
    in_range = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= MOST_SECONDS
    if value == "auto" or in_range:
        return value
    raise ValueError(f'"auto", or a number of seconds from 0 to {MOST_SECONDS}')


AutoSeconds = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_seconds)]
"""A time in seconds; "auto": it follows from the run."""


def _auto_or_time(value: Any) -> Any:
    """Return "auto", or a time above 0, in seconds."""
    if value == 0 and not isinstance(value, bool):
        raise ValueError(f'"auto", or a number of seconds above 0, to {MOST_SECONDS}')
    return _auto_or_seconds(value)


RoundTimeout = Annotated[float | Literal["auto"], BeforeValidator(_auto_or_time)]
"""A time above 0, in seconds; "auto": it follows from the pace of the sites."""


def _number_or_names(value: Any) -> Any:
    """Return a number of sites, or a tuple of their names, from a number, a list or a text."""
    if isinstance(value, str):
        value = int(value) if value.isdecimal() else _split(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_SITES:
        return value
    names = tuple(value) if isinstance(value, list | tuple) else ()
    right = all(isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) for name in names)
    if names and right and len(set(names)) == len(names):
        return names
    raise ValueError(f"a number of sites from 0 to {MOST_SITES}, or a list of different names of sites")


MOST_SITES = 100_000

StartWith = Annotated[int | tuple[str, ...], BeforeValidator(_number_or_names)]
"""A number of sites, or their names."""


Ranks = Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_split_numbers)]
Columns = Annotated[dict[str, str | int], BeforeValidator(_split_pairs)]


class DataFormat(Section):
    """How tables are read; the ending decides the rest: .csv, .tsv, .jsonl, .parquet, or .txt with a text a line.

    These settings have no effect on images.
    """

    columns: Columns = Field(
        default={},
        description='Which column of the file holds what the task reads, as { text = "sentence" }; a number counts '
        "columns from 0. Set it if the file has other names. Empty: the columns have the task's own "
        "names.",
    )
    header: bool = Field(
        default=True,
        description="CSV and TSV: the first line holds the column names. Set false for files without such a line, "
        "and name columns by number.",
    )
    quoting: Literal["standard", "none"] = Field(
        default="standard",
        description='CSV and TSV: "none" reads quotation marks as ordinary characters. Use it if the texts hold '
        "single, unpaired quotation marks.",
    )


class NamingSettings(Section):
    """Settings that may name models beside the base."""

    @property
    def models(self) -> tuple[str, ...]:
        """The model names in these settings, which a site resolves like `model.name`; empty for most classes."""
        return ()

    def resolved(self, source: Callable[[str], str]) -> Self:
        """Return these settings with each of `models` replaced by the name that `source` returns for it."""
        return self


class TaskSettings(NamingSettings):
    """What every task has."""

    name: str = Field(description="The task.")
    max_length: int = Field(
        default=128,
        ge=8,
        le=8192,
        description="Most tokens of a text; longer texts are cut. Raise it if many texts are longer; time and memory "
        "grow with it.",
    )


class ClassesSettings(TaskSettings):
    """What every task with classes has."""

    num_labels: int = Field(
        default=2, ge=2, le=10_000, description="Number of classes, if the files name them by plain numbers."
    )
    labels: Names = Field(
        default=(),
        description="Names of the classes, in order. Set it if the files name the classes. Empty: 0 to num_labels - 1.",
    )

    @model_validator(mode="after")
    def _labels_differ(self) -> ClassesSettings:
        if self.labels and (len(set(self.labels)) != len(self.labels) or len(self.labels) < 2):
            raise ValueError("given at least two class names, all different")
        return self


class HeadedSettings(ClassesSettings):
    """What every task has whose result includes a head with classes."""

    warm_head: Literal["auto", "off"] = Field(
        default="auto",
        description="Compute the head before round 1, from sums of the base's features that every site sends once "
        '(a linear probe), so that training does not begin with a random head. "auto": yes if the head is one '
        "linear layer of at most 4,096 features and the sums are at most 10 million numbers; not in private "
        "runs, because the sums have no noise. The sums tell how many rows of each class a site has. Set "
        '"off" to begin with a random head.',
    )
    logit_adjustment: Literal["auto", "off"] = Field(
        default="auto",
        description="In training, adjust the loss at each site to that site's shares of the classes, so that a site "
        "with mostly one class does not teach all others to expect that class. "
        '"auto": yes if the shares of the sites differ much. The server knows that from the sums for `warm_head`; '
        'without them nothing is adjusted. Each site is sent the shares of the whole federation. "off": never.',
    )


class AdapterSettings(NamingSettings):
    """What every adapter method has."""

    method: str = Field(description="The adapter method.")
    wire_dtype: Literal["float32", "float16"] = Field(
        default="float32",
        description="Type of the numbers that travel. Use float16 if bandwidth is scarce: it halves the bytes and "
        "rounds the numbers.",
    )
    start_from: str = Field(
        default="",
        description="Folder of an exported adapter, as runs/june/adapter, whose values and head the run starts from. "
        "It needs the same base, task, labels, method and shape. Only the server reads it: sites receive its values "
        "with the first round. Empty: the method's own initial values.",
    )
    start_sha256: str = Field(
        default="",
        pattern=r"^([0-9a-f]{64})?$",
        description="SHA-256 of the values that the run starts from. The server sets it, and each site compares what "
        "it receives in round 1. Set it to refuse any other adapter in start_from. Empty: any adapter.",
    )


STARTS = frozenset({"start_from", "start_sha256"})
"""The settings of an adapter that say only from which values a run starts: no spec and no export has them."""


FIRST_TIMEOUT_S = 14_400.0
"""With `strategy.round_timeout_s = "auto"`: how long a round lasts at most as long as nobody's pace is known."""

OPERATORS_WAITS = ("start_with", "wait_for_quorum_s", "grace_s", "partial_updates", "late_updates")
"""The settings of a strategy that say how the server waits: sites do not receive them, and no result is hashed with
them."""


class StrategySettings(Section):
    """What every strategy has: who is asked, how long, and what is accepted."""

    name: str = Field(description="The strategy: how the server combines updates.")
    fraction_train: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the sites that are asked in each round. Lower it when there are many sites, and each "
        "round would wait for the slowest of them.",
    )
    min_clients: int = Field(
        default=2,
        ge=1,
        le=100_000,
        description="The quorum: with fewer accepted replies a round is void, and is tried once more. Raise it so "
        "that a few sites cannot decide a round.",
    )
    round_timeout_s: RoundTimeout = Field(
        default="auto",
        description="How long the server waits for replies in a round; later replies count as dropouts. "
        '"auto" is four times what the slowest site needed the last time, at least ten minutes; as long as no site '
        "has trained, it is four hours, and from the first quorum on four times what that took. Set a number if rounds "
        "must end at a known time.",
    )
    connect_timeout_s: float = Field(
        default=120.0,
        gt=0,
        le=604_800,
        description="How long the server waits at the start for min_clients clients, or for start_with. Raise it when "
        "sites are started by hand.",
    )
    start_with: StartWith = Field(
        default=0,
        description="Sites that the server waits for at the start, for up to connect_timeout_s: a number, or names as "
        '["acme", "bolt"]. Then it starts without those that are missing, if the others are a quorum, and names them. '
        "Set it to all sites of the federation, so that nobody misses a round by connecting a second late. 0: "
        "min_clients clients are enough.",
    )
    wait_for_quorum_s: AutoSeconds = Field(
        default="auto",
        description="How long a round, and the time between rounds, waits for sites to come back when fewer than the "
        'quorum are left; then the run ends. "auto" is an hour for real sites, and 0 in simulation. Lower it if '
        "somebody watches the run, and can resume it.",
    )
    grace_s: AutoSeconds = Field(
        default="auto",
        description="How long a round stays open after its quorum (min_clients, and privacy.min_sites) is in; the "
        'sites that are missing then are dropouts. "auto" waits as long again as the quorum took, at least 30 s and '
        "twice as long as each missing site took the last time, and for a site that has never answered to the end of "
        "round_timeout_s. A number waits that long for each missing site. What all rounds wait for one silent site "
        "adds up to one round_timeout_s in both cases. Set 0 if a few fast sites are enough. Simulations and Poisson "
        "sampling wait for everybody.",
    )
    partial_updates: bool = Field(
        default=True,
        description="A site that would not be done when its round closes sends what it has by then; its update weighs "
        "the rows that it has seen. Set false if every update must be of all local steps: a slow site is then a "
        "dropout. Simulations and private runs always wait for all steps.",
    )
    late_updates: Literal["discard", "next-round"] = Field(
        default="discard",
        description='What becomes of an update that comes after its round has closed. "next-round": it counts in the '
        "round that is open then, and weighs the less the later it is. Set it if lines are dead for longer than a "
        "round takes. A run is then repeatable only with the log of who was late; private runs cannot have it.",
    )
    max_update_norm: float = Field(
        default=100.0,
        gt=0,
        description="The server rejects updates with a larger L2 norm: a ceiling above whatever norm_tolerance allows. "
        "Lower it towards the norms in metrics.jsonl if few sites are asked in a round, because then their own median "
        "says little. The clip of a private run is privacy.clip_norm.",
    )
    norm_tolerance: float = Field(
        default=1.0,
        ge=0,
        description="The server scales an update down to this many times a typical L2 norm (the median of the round, "
        "or of the last round if it is larger); a site far beyond that is named. At 1, no site moves the model further "
        "than a typical one. Raise it if honest sites train very different numbers of steps, for example because they "
        "have very different numbers of rows and local_epochs is set. Private runs ignore it. 0: off.",
    )
    weighting: Literal["capped", "rows", "equal"] = Field(
        default="capped",
        description='How much a site\'s update weighs in a mean. "capped": its rows, but no more than '
        'max_site_share of the round; "rows": its rows, which is a number that nobody can check; "equal": each site '
        'the same. Set "rows" if all sites are trusted to count, "equal" if none is. In private runs each '
        "client weighs the same.",
    )
    max_site_share: float = Field(
        default=0.5,
        gt=0,
        le=1,
        description='Largest share of a round\'s mean that one site may have with weighting = "capped"; an equal '
        "share of the sites that replied is always allowed. Of two sites each therefore weighs one half, whatever "
        "their rows. Lower it if no site should decide much, raise it if one site rightly has most of the rows.",
    )
    aggregation_error: Literal["auto", "off"] = Field(
        default="auto",
        description="Whether the server measures, with LoRA, how far its new adapter is from the mean of what the "
        'sites have learned. "auto" measures in round 1 and then as often as it takes at most 5 % of the time. It '
        'measures nothing where updates are only added up and those of a round are larger than 1 GiB. Set "off" if '
        "nobody reads the number.",
    )
    proximal_mu: float = Field(
        default=0.0,
        ge=0,
        description="Weight of FedProx's term (mu/2)*||local - global||^2 in the loss at a site. Raise it when "
        "sites with different data drift apart in a round.",
    )

    @property
    def sites_at_start(self) -> int:
        """How many sites the server waits for at the start; 0: as many as have min_clients clients."""
        return self.start_with if isinstance(self.start_with, int) else len(self.start_with)
