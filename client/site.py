"""A site: its name, its data, and which models it is willing to load.

`site.toml` describes a real one and never leaves it; in simulation the sites are parts of one file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
from pydantic import Field, ValidationError

from client.policy import SitePolicy
from common.audit import AuditLog, locked
from common.config import RunConfig, explain, parse
from common.config_file import read_toml
from common.data import partition
from common.data.shard import Shard
from common.data.shard import read as read_shard
from common.errors import ConfigError, DataError, ModelError, Problem
from common.rng import generator
from common.settings import DataFormat, Name, Section
from common.tasks import TASKS, Task

if TYPE_CHECKING:
    from flwr.app import Context


class Site(Protocol):
    """What the client asks of its site."""

    @property
    def name(self) -> str:
        """The stable name under which the server knows this site."""

    def identity(self) -> str:
        """Changes whenever the data that `train_shard` and `evaluation_shard` would return does."""

    @property
    def policy(self) -> SitePolicy:
        """What this site allows."""

    def record(self, event: str, **details: Any) -> None:
        """Write to the site's own audit log, if it keeps one."""

    def model_source(self, model_name: str) -> str:
        """Return what stands behind a model name here."""

    def train_shard(self, task: Task) -> Shard:
        """Return the rows to train on."""

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Return the rows to evaluate on, if the site keeps any."""


class SiteSection(Section):
    """Who this is."""

    name: Name = Field(description="the stable name of this site in the federation; letters, digits, . _ -")
    audit: str = Field(default="audit.jsonl", description="this site's own log; relative to this file; empty: none")


class SiteData(DataFormat):
    """The private data; it never leaves the site."""

    train: str = Field(min_length=1, description="rows to train on: .csv, .tsv, .jsonl or .parquet")
    evaluation: str = Field(default="", description="rows to evaluate on; empty: none")
    min_rows: int = Field(default=2, ge=1, description="refuse to train on fewer rows")


class SiteServer(Section):
    """The server to connect to; the command line has the last word."""

    address: str = Field(default="", description="HOST:PORT")
    ca: str = Field(default="", description="the federation's CA certificate; relative to this file")
    key: str = Field(default="", description="this node's private key; relative to this file")

    def path(self, folder: Path, name: Literal["ca", "key"]) -> Path | None:
        """Return where a file is, if it is named."""
        value: str = getattr(self, name)
        return folder / value if value else None


@dataclass(frozen=True)
class FileSite:
    """A real site, as `site.toml` describes it."""

    folder: Path
    site: SiteSection
    data: SiteData
    server: SiteServer
    policy: SitePolicy
    models: Mapping[str, str]

    @property
    def name(self) -> str:
        """The name in `site.toml`."""
        return self.site.name

    def record(self, event: str, **details: Any) -> None:
        """Append to the audit log.

        Raises:
            StorageError: it cannot be written, or was tampered with.
        """
        if self.site.audit:
            with locked(self.folder / f".{Path(self.site.audit).name}.lock"):  # processes of one folder share a log
                AuditLog(self.folder / self.site.audit).write(event, **details)

    def identity(self) -> str:
        """Path, size and time of the files."""
        stats = [
            (path, (self.folder / path).stat().st_size, (self.folder / path).stat().st_mtime_ns)
            for path in (self.data.train, self.data.evaluation)
            if path and (self.folder / path).is_file()
        ]
        return json.dumps([self.name, str(self.folder), stats])

    def model_source(self, model_name: str) -> str:
        """Resolve a model name through [models]; a name that is not there is refused.

        Raises:
            ModelError: `model-unknown`.
        """
        if model_name not in self.models:
            raise ModelError(
                f"the run asks for the model {model_name!r}, which [models] of site.toml does not have",
                "a name that this site allows",
                f'add "{model_name}" = "a local folder, package:module/path or hub id" to [models], if you trust it',
                code="model-unknown",
            )
        return self.models[model_name]

    def train_shard(self, task: Task) -> Shard:
        """Read the training rows."""
        return self._read(self.data.train, task)

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Read the evaluation rows."""
        return self._read(self.data.evaluation, task) if self.data.evaluation else None

    def _read(self, path: str, task: Task) -> Shard:
        return read_shard(
            self.folder / path,
            task.columns,
            self.data,
            labels=task.labels,
            min_rows=self.data.min_rows,
            inside=None if Path(path).is_absolute() else self.folder,
        )


def read_site(path: Path) -> FileSite:
    """Return the site that a `site.toml` describes.

    Raises:
        ConfigError: with every problem of the file.
    """
    raw = read_toml(path)
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    for name, section in _SECTIONS.items():
        try:
            parts[name] = section.model_validate(raw.pop(name, {}))
        except ValidationError as error:
            problems += [explain(name, section, detail) for detail in error.errors()]
    models = raw.pop("models", {})
    if not isinstance(models, dict) or not all(isinstance(source, str) and source for source in models.values()):
        problems.append(Problem("models", repr(models)[:80], '"model name" = "folder, package:module/path or hub id"'))
    problems += [Problem(name, "...", f"one of {', '.join(_SECTIONS)}, models", "remove it") for name in raw]
    if problems:
        raise ConfigError(str(path), problems)
    return FileSite(path.resolve().parent, **parts, models=models)


_SECTIONS: dict[str, type[Section]] = {
    "site": SiteSection,
    "data": SiteData,
    "server": SiteServer,
    "policy": SitePolicy,
}


@dataclass(frozen=True)
class SimulatedSite:
    """One part of the file that a simulation splits."""

    name: str
    config: RunConfig
    rows: tuple[int, ...]

    policy = SitePolicy()

    def record(self, event: str, **details: Any) -> None:
        """Keep no log: the operator's says it all."""

    def identity(self) -> str:
        """The split and the part."""
        return self._identity

    @cached_property
    def _identity(self) -> str:
        body = self.config.model_dump_json(include={"simulation", "data", "task", "run"})
        return f"{self.name}:{hashlib.sha256(body.encode()).hexdigest()}"

    def model_source(self, model_name: str) -> str:
        """Everything is on one machine here: the operator's model is the site's."""
        return model_name

    def train_shard(self, task: Task) -> Shard:
        """Return this site's rows but for those kept for evaluation."""
        return _whole(self.config).take(self._parts()[0])

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Return the share `simulation.evaluation_fraction` of this site's rows."""
        kept = self._parts()[1]
        return _whole(self.config).take(kept) if kept else None

    def _parts(self) -> tuple[list[int], list[int]]:
        kept = int(len(self.rows) * self.config.simulation.evaluation_fraction)
        order = generator(self.config.run.seed, "evaluation-rows", self.name).permutation(len(self.rows))
        chosen = {self.rows[index] for index in order[:kept]}
        return [row for row in self.rows if row not in chosen], [row for row in self.rows if row in chosen]


def _whole(config: RunConfig) -> Shard:
    """Return the file that a simulation splits, read once per process."""
    return _read_whole(config.model_dump_json())


@lru_cache(maxsize=2)
def _read_whole(text: str) -> Shard:
    config = parse(json.loads(text))
    task = TASKS.get(config.task.name)(config.task)
    column = config.simulation.column
    shard = read_shard(
        Path(config.simulation.data),
        task.columns,
        config.data,
        labels=task.labels,
        extra_columns=(column,) if config.simulation.partition == "by-column" else (),
    )
    wanted = config.simulation.rows
    if wanted > len(shard):
        raise DataError(
            f"simulation.rows = {wanted}", f"at most the {len(shard)} rows of the file", code="shard-too-small"
        )
    if wanted:
        drawn = generator(config.run.seed, "rows").choice(len(shard), wanted, replace=False)
        return shard.take(sorted(int(row) for row in drawn))
    return shard


def simulated_sites(config: RunConfig) -> tuple[SimulatedSite, ...]:
    """Split the simulation's file over its sites, by name; the same split in every process of a run.

    Raises:
        ConfigError, DataError: the file cannot be split as asked.
    """
    return _split(config.model_dump_json())


@lru_cache(maxsize=2)
def _split(text: str) -> tuple[SimulatedSite, ...]:
    config = parse(json.loads(text))
    if not config.simulation.data:
        problem = Problem("simulation.data", "''", "the file to split over the sites", "name it")
        raise ConfigError("run file", [problem])
    shard, simulation, seed = _whole(config), config.simulation, config.run.seed
    parts: dict[str, Any]
    if simulation.partition == "by-column":
        parts = dict(partition.by_column(shard.extra[simulation.column]))
    elif simulation.partition == "dirichlet":
        labels = shard.columns.get("label")
        if labels is None:
            problem = Problem("simulation.partition", "'dirichlet'", "a task with a label column", 'use "iid"')
            raise ConfigError("run file", [problem])
        split = partition.dirichlet(
            np.asarray(labels), simulation.clients, simulation.dirichlet_alpha, simulation.min_rows, seed
        )
        parts = dict(zip(partition.site_names(simulation.clients), split, strict=True))
    else:
        split = partition.iid(len(shard), simulation.clients, seed)
        parts = dict(zip(partition.site_names(simulation.clients), split, strict=True))
    return tuple(SimulatedSite(name, config, tuple(int(row) for row in parts[name])) for name in sorted(parts))


def site_of_node(context: Context) -> Site:
    """Return the site behind a deployed node, whose node config names its `site.toml` as `site`.

    Raises:
        ConfigError: it does not, or the file has problems.
    """
    path = context.node_config.get("site")
    if not isinstance(path, str):
        problem = Problem(
            "site", "missing", "the path of site.toml", "start the node with --node-config 'site=\"...\"'"
        )
        raise ConfigError("node config", [problem])
    return read_site(Path(path))
