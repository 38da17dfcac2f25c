"""A site: its name, its data, and the models that it loads, as in its `site.toml`. The file stays at the site."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field, ValidationError

from tsugiki.client.site import approvals
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.records import SiteRecords, records_of
from tsugiki.common.config.files import read_toml
from tsugiki.common.config.parse import explain
from tsugiki.common.data import images
from tsugiki.common.data.shard import Shard
from tsugiki.common.data.shard import read as read_shard
from tsugiki.common.errors import ConfigError, ModelError, Problem, TsugikiError
from tsugiki.common.keys import read_private_key
from tsugiki.common.settings import DataFormat, Name, Section
from tsugiki.common.tasks import Task

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from flwr.app import Context

    from tsugiki.common.config.run import RunConfig
    from tsugiki.common.privacy.plan import Plan


class Site(Protocol):
    """The interface of a site for the client."""

    @property
    def name(self) -> str:
        """The stable name under which the server knows this site."""

    def identity(self) -> str:
        """Return a text that changes whenever the data change that `train_shard` and `evaluation_shard` return."""

    @property
    def policy(self) -> SitePolicy:
        """The limits that this site sets to runs."""

    @property
    def max_rank(self) -> int:
        """How many components of a LoRA pair this site can train; 0: any number."""

    def record(self, event: str, **details: Any) -> None:
        """Write to the site's own audit log, if it keeps one."""

    def node_key(self) -> EllipticCurvePrivateKey | None:
        """Return the private key of this site's node, or None if it has none."""

    def admit(self, config: RunConfig) -> None:
        """Count a run's settings before they are answered, if the site has not answered them in the last 24 hours.

        Raises:
            PolicyError: `policy-settings`, too many in that time.
        """

    def check_approved(self, config: RunConfig, plan: Plan | None) -> None:
        """Check that somebody at the site has said yes to a run, if its policy asks for that.

        Raises:
            PolicyError: `policy-ask`, nobody has.
        """

    def begin_round(self, run: str, round_number: int) -> None:
        """Count a round before it is trained.

        Raises:
            PolicyError: `policy-rounds`, the policy allows no further round.
        """

    def charging(self) -> AbstractContextManager[dict[str, Any]]:
        """Return a context in which the ledger is written, with the fields that each of its lines needs."""

    def model_source(self, model_name: str) -> str:
        """Return the hub id, folder or `package:...` that this site loads for a model name."""

    def train_shard(self, task: Task) -> Shard:
        """Return the rows to train on."""

    def evaluation_shard(self, task: Task) -> Shard | None:
        """Return the rows to evaluate on, or None if the site keeps none."""

    def clients(self, shard: Shard) -> list[list[int]]:
        """Return the row numbers of each client of this site in the training shard, in a fixed order."""

    def ledger_path(self) -> Path | None:
        """Return the file of this site's own privacy ledger, or None if it keeps none."""


class SiteSection(Section):
    """The site itself."""

    name: Name = Field(
        description="This site's name: lower-case letters, digits, . _ - (at most 64). It must be unique in the "
        "federation and stay the same."
    )
    audit: str = Field(
        default="audit.jsonl",
        description="File for this site's own log of what it was asked and what it answered. It counts rounds and "
        "settings for the policy. Keep it as long as the ledger: each shows if the other has lost lines, and the site "
        "then refuses to go on. Empty: no log, and no limits by count.",
    )
    ledger: str = Field(
        default="privacy-ledger.jsonl",
        description="File for this site's own privacy account. Keep it as long as the site has its data. Empty: no "
        "account, no limits by epsilon, and nothing that shows if the audit log has lost lines.",
    )
    max_rank: int = Field(
        default=0,
        ge=0,
        description='Most components of a LoRA adapter that this site trains, under strategy "svd". Set it if this '
        "machine cannot train the whole rank; runs with a larger rank and another strategy are then "
        "refused. 0: no limit.",
    )


class SiteData(DataFormat):
    """The private data; it never leaves the site."""

    train: str = Field(
        min_length=1,
        description="Rows to train on: a .csv, .tsv, .jsonl, .parquet or .txt file; for images, an idx file or a "
        "folder.",
    )
    evaluation: str = Field(
        default="",
        description="Rows to evaluate on, in the same format. Set it to learn how well a run's model serves this "
        "site. Empty: none.",
    )
    min_rows: int = Field(
        default=2,
        ge=1,
        description="Least number of rows to train on. Raise it if an update from few rows would tell too much about "
        "them.",
    )
    client_column: str = Field(
        default="",
        description="Column that says whose a row is; each of its values is a client. Set it if this site is a "
        "gateway for many clients. Empty: the site is one client.",
    )


SYSTEM_CAS = "system"
"""In place of a CA's file: the CAs that this machine trusts."""


class SiteServer(Section):
    """The server to connect to. Options of the command line override it."""

    address: str = Field(default="", description="Address of the server, as HOST:PORT or https://HOST:PORT.")
    ca: str = Field(
        default="",
        description="File with the federation's CA certificate, which its operator hands out. system: the CAs that "
        "this machine trusts, if a public or company CA has signed the server's certificate.",
    )
    key: str = Field(
        default="", description="File with this node's private key, from `tsugiki keys new`. Let nobody else read it."
    )

    def key_path(self, folder: Path) -> Path | None:
        """Return the path of the private key, or None if `site.toml` does not name it."""
        return folder / self.key if self.key else None

    def authority(self, folder: Path) -> str:
        """Return the path of the CA's certificate, or "system"; empty if `site.toml` names neither."""
        return self.ca if self.ca in ("", SYSTEM_CAS) else str(folder / self.ca)


SECTIONS: dict[str, type[Section]] = {
    "site": SiteSection,
    "data": SiteData,
    "server": SiteServer,
    "policy": SitePolicy,
}
"""The tables of a site.toml, beside [models]."""


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
        """`site.name` of `site.toml`."""
        return self.site.name

    @property
    def max_rank(self) -> int:
        """`site.max_rank` of `site.toml`."""
        return self.site.max_rank

    def record(self, event: str, **details: Any) -> None:
        """Append to the audit log.

        Raises:
            StorageError: the log cannot be written, or was tampered with; see `check_records`.
        """
        self._records().write(event, **details)

    def admit(self, config: RunConfig) -> None:
        """Count a run's settings in the audit log, if they are not among those of the last 24 hours."""
        settings_sha256 = hashlib.sha256(config.for_sites().encode()).hexdigest()
        self._records().admit(settings_sha256, self.policy)

    def check_approved(self, config: RunConfig, plan: Plan | None) -> None:
        """Check that somebody here has said yes to the run, if the policy asks for that."""
        if self.policy.ask:
            approvals.check_approved(self.folder, config, plan)

    def begin_round(self, run: str, round_number: int) -> None:
        """Count a round in the audit log."""
        self._records().begin_round(run, round_number, self.policy)

    def charging(self) -> AbstractContextManager[dict[str, Any]]:
        """Anchor the audit log in the lines that are written to the ledger."""
        return self._records().charging()

    def check_records(self) -> None:
        """Check that audit log and ledger have all the lines that each remembers of the other.

        Raises:
            StorageError: `audit-behind`, `ledger-behind` or `audit-broken`.
        """
        self._records().check()

    def _records(self) -> SiteRecords:
        audit = self.folder / self.site.audit if self.site.audit else None
        return records_of(audit, self.ledger_path(), self.name)

    def identity(self) -> str:
        """Return name, folder, and a hash of path, size and time of all files, also of those in a folder of images."""
        named = [self.folder / path for path in (self.data.train, self.data.evaluation) if path]
        body = json.dumps([images.stamp(file) for path in named for file in images.files(path)])
        return json.dumps([self.name, str(self.folder), hashlib.sha256(body.encode()).hexdigest()])

    def node_key(self) -> EllipticCurvePrivateKey | None:
        """Read `server.key`.

        Raises:
            LinkError: the key cannot be read; see `read_private_key`.
        """
        path = self.server.key_path(self.folder)
        return None if path is None else read_private_key(path)

    def model_source(self, model_name: str) -> str:
        """Return the source of a model name from [models].

        Raises:
            ModelError: `model-unknown`, [models] does not have the name.
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
        if not self.data.evaluation:
            return None
        return self._read(self.data.evaluation, task)

    def clients(self, shard: Shard) -> list[list[int]]:
        """Return the rows of each value of `data.client_column`, in the order of the values."""
        if not self.data.client_column:
            return [list(range(len(shard)))]
        owners: dict[str, list[int]] = {}
        for row, owner in enumerate(shard.extra[self.data.client_column]):
            owners.setdefault(owner, []).append(row)
        return [owners[owner] for owner in sorted(owners)]

    def ledger_path(self) -> Path | None:
        """Return the path of `site.ledger`, or None if it is empty."""
        if not self.site.ledger:
            return None
        return self.folder / self.site.ledger

    def _read(self, path: str, task: Task) -> Shard:
        # Only training rows are split by client.
        extra_columns: tuple[str, ...] = ()
        if self.data.client_column and path == self.data.train:
            extra_columns = (self.data.client_column,)
        # A relative path must not lead out of the site's folder.
        inside = None if Path(path).is_absolute() else self.folder
        return read_shard(
            self.folder / path,
            task.columns,
            self.data,
            labels=task.labels,
            extra_columns=extra_columns,
            min_rows=self.data.min_rows,
            inside=inside,
        )


def read_site(path: Path) -> FileSite:
    """Return the site that a `site.toml` describes.

    Raises:
        ConfigError: with every problem of the file.
    """
    raw = read_toml(path)
    # All problems are collected, so that one look at the error is enough.
    problems: list[Problem] = []
    parts: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        try:
            parts[name] = section.model_validate(raw.pop(name, {}))
        except ValidationError as error:
            problems += [explain(name, section, detail) for detail in error.errors()]
    models = raw.pop("models", {})
    if not isinstance(models, dict) or not all(isinstance(source, str) and source for source in models.values()):
        problems.append(
            Problem("models", repr(models)[:80], 'lines such as "model name" = "folder, package:module/path or hub id"')
        )
    # A budget needs a ledger to count against.
    policy = parts.get("policy")
    about = parts.get("site")
    if policy and about and (policy.max_epsilon or policy.max_row_epsilon) and not about.ledger:
        problems.append(
            Problem("site.ledger", "''", "a file if policy.max_epsilon or max_row_epsilon is set", "name one")
        )
    problems += _uncounted(policy, about)
    problems += [
        Problem(name, "...", f"one of the sections {', '.join(SECTIONS)} and models", "remove it") for name in raw
    ]
    if problems:
        raise ConfigError(str(path), problems)
    return FileSite(path.resolve().parent, **parts, models=models)


def stamp(path: Path) -> str:
    """Return a text that changes whenever a `site.toml`, which may have mistakes, or the data that it names change."""
    about = images.stamp(path)
    try:
        return f"{about} {read_site(path).identity()}"
    except TsugikiError:
        return f"{about}"


def _uncounted(policy: SitePolicy | None, about: SiteSection | None) -> list[Problem]:
    """Return a problem if the policy limits something by count, and there is no audit log to count in."""
    if policy is None or about is None or about.audit:
        return []
    counted = {"max_rounds", "max_rounds_per_day", "max_settings_per_day"} & policy.model_fields_set
    if not any(getattr(policy, name) for name in counted):
        return []
    return [Problem("site.audit", "''", f"a file if policy.{' or '.join(sorted(counted))} is set", "name one")]


def site_of_node(context: Context) -> Site:
    """Return the site behind a deployed node, whose node config names its `site.toml` as `site`, and perhaps its `key`.

    Raises:
        ConfigError: the node config names no file, or the file has problems.
    """
    path = context.node_config.get("site")
    if not isinstance(path, str):
        problem = Problem(
            "site", "missing", "the path of site.toml", "start the node with --node-config 'site=\"...\"'"
        )
        raise ConfigError("node config", [problem])
    site = read_site(Path(path))
    # The resident node passes the key that it connects with; empty: it connects without. Other nodes pass none.
    key = context.node_config.get("key")
    if not isinstance(key, str):
        return site
    return replace(site, server=site.server.model_copy(update={"key": key}))
