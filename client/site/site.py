"""A site: its name, its data, and which models it is willing to load, as its `site.toml` says; it stays there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, ValidationError

from tsugiki.client.site.policy import SitePolicy
from tsugiki.common.audit import AuditLog, locked
from tsugiki.common.config.files import read_toml
from tsugiki.common.config.parse import explain
from tsugiki.common.data import images
from tsugiki.common.data.shard import Shard
from tsugiki.common.data.shard import read as read_shard
from tsugiki.common.errors import ConfigError, ModelError, Problem
from tsugiki.common.settings import DataFormat, Name, Section
from tsugiki.common.tasks import Task

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

    @property
    def max_rank(self) -> int:
        """How many components of a LoRA pair this site can train; 0: any."""

    def record(self, event: str, **details: Any) -> None:
        """Write to the site's own audit log, if it keeps one."""

    def model_source(self, model_name: str) -> str:
        """Return what stands behind a model name here."""

    def train_shard(self, task: Task) -> Shard:
        """Return the rows to train on."""

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Return the rows to evaluate on, if the site keeps any."""

    def clients(self, shard: Shard) -> list[list[int]]:
        """Return which rows of the training shard belong to each client of this site, in a fixed order."""

    def ledger_path(self) -> Path | None:
        """Return the file of this site's own privacy account; None: it keeps none."""


class SiteSection(Section):
    """Who this is."""

    name: Name = Field(description="the stable name of this site in the federation; letters, digits, . _ -")
    audit: str = Field(default="audit.jsonl", description="this site's own log; relative to this file; empty: none")
    ledger: str = Field(
        default="privacy-ledger.jsonl",
        description="this site's own privacy account; relative to this file; empty: none",
    )
    max_rank: int = Field(
        default=0, ge=0, description="train at most so many components of a LoRA adapter, under strategy svd; 0: all"
    )


class SiteData(DataFormat):
    """The private data; it never leaves the site."""

    train: str = Field(
        min_length=1, description="rows to train on: .csv, .tsv, .jsonl, .parquet or .txt; images: idx or a folder"
    )
    evaluation: str = Field(default="", description="rows to evaluate on; empty: none")
    min_rows: int = Field(default=2, ge=1, description="refuse to train on fewer rows")
    client_column: str = Field(
        default="", description="a gateway's: the column that says whose a row is; each is a client; empty: one client"
    )


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

    @property
    def max_rank(self) -> int:
        """As in `site.toml`."""
        return self.site.max_rank

    def record(self, event: str, **details: Any) -> None:
        """Append to the audit log.

        Raises:
            StorageError: it cannot be written, or was tampered with.
        """
        if self.site.audit:
            with locked(self.folder / f".{Path(self.site.audit).name}.lock"):  # processes of one folder share a log
                AuditLog(self.folder / self.site.audit).write(event, **details)

    def identity(self) -> str:
        """Path, size and time of the files, also of those in a folder of images."""
        named = [self.folder / path for path in (self.data.train, self.data.evaluation) if path]
        body = json.dumps([images.stamp(file) for path in named for file in images.files(path)])
        return json.dumps([self.name, str(self.folder), hashlib.sha256(body.encode()).hexdigest()])

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

    def clients(self, shard: Shard) -> list[list[int]]:
        """Return the rows of each value of `data.client_column`, in the order of the values."""
        if not self.data.client_column:
            return [list(range(len(shard)))]
        owners: dict[str, list[int]] = {}
        for row, owner in enumerate(shard.extra[self.data.client_column]):
            owners.setdefault(owner, []).append(row)
        return [owners[owner] for owner in sorted(owners)]

    def ledger_path(self) -> Path | None:
        """Return where `site.ledger` is."""
        return self.folder / self.site.ledger if self.site.ledger else None

    def _read(self, path: str, task: Task) -> Shard:
        return read_shard(
            self.folder / path,
            task.columns,
            self.data,
            labels=task.labels,
            extra_columns=(self.data.client_column,) if self.data.client_column and path == self.data.train else (),
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
        problems.append(
            Problem("models", repr(models)[:80], 'lines such as "model name" = "folder, package:module/path or hub id"')
        )
    policy, about = parts.get("policy"), parts.get("site")
    if policy and about and (policy.max_epsilon or policy.max_row_epsilon) and not about.ledger:
        problems.append(
            Problem("site.ledger", "''", "a file if policy.max_epsilon or max_row_epsilon is set", "name one")
        )
    problems += [
        Problem(name, "...", f"one of the sections {', '.join(_SECTIONS)} and models", "remove it") for name in raw
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return FileSite(path.resolve().parent, **parts, models=models)


_SECTIONS: dict[str, type[Section]] = {
    "site": SiteSection,
    "data": SiteData,
    "server": SiteServer,
    "policy": SitePolicy,
}


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
