"""The Python API of `import tsugiki`, for notebooks and scripts.

Importing this module loads nothing heavy. Each function imports what it needs when it is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas
    from sentence_transformers import SentenceTransformer
    from transformers import PreTrainedModel

    from tsugiki.common.config.run import RunConfig
    from tsugiki.server.run.progress import Progress

StrPath = str | os.PathLike[str]


class Table(list[dict[str, Any]]):
    """Rows by column name. A notebook shows them as a table."""

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows as a DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            from tsugiki.common.errors import UsageError

            raise UsageError(
                "pandas is not installed", "the package pandas, for to_pandas()", "pip install pandas"
            ) from error
        return pandas.DataFrame(list(self))

    def _repr_html_(self) -> str:
        columns = list(dict.fromkeys(name for row in self for name in row))
        return _html(columns, [[row.get(name) for name in columns] for row in self])


@dataclass(frozen=True, repr=False)
class Run:
    """A run that has ended.

    Args:
        folder: holds the run's files.
        config: its settings.
        summary: the run in one look, as in summary.json; `before` and `after` are the metrics before training and of
            the best adapter.
        metrics: one row for each round that reached its quorum, and one before training. `round`, `train_loss`, `sites`
            (accepted replies), `seconds`, `bytes_up`, `bytes_down`, and `eval_NAME` for each metric where the round was
            evaluated. A private run also has `epsilon`: so far, against the strongest that sees the models. The file
            metrics.jsonl in the folder has all details, site by site.
    """

    folder: Path
    config: RunConfig
    summary: dict[str, Any]
    metrics: Table

    def export(
        self, folder: StrPath | None = None, *, which: Literal["best", "last"] = "best", merged: bool = False
    ) -> Path:
        """Write the adapter so that other programs can load it, and return its folder.

        A fresh process loads what was written and compares its outputs with the run's before the export is in place.

        Args:
            folder: a new or empty folder; by default `adapter/`, or `merged/`, in the run's folder.
            which: the best adapter, or the one in the last checkpoint.
            merged: write a whole model, with the adapter added to the base's weights.

        Raises:
            ExportError: the base has no public name (set `model.public_name`), the method cannot be merged, or the
                outputs differ.
            StorageError: there is something in the folder already, or the run's files cannot be used.
            ModelError: the base cannot be loaded.
        """
        from tsugiki.server.export.export import export

        return export(self.folder, None if folder is None else Path(folder), which=which, merged=merged)

    def report(self) -> Path:
        """Write the report, one self-contained page, and return its file.

        Raises:
            StorageError: the run's files cannot be used.
        """
        from tsugiki.server.report.page import write_report

        return write_report(self.folder)

    def __repr__(self) -> str:
        from tsugiki.server.run.progress import shown

        before = self.summary["before"] or {}
        after = self.summary["after"] or {}
        monitor = self.config.monitor
        gain = ""
        if monitor in after:
            gain = f", {monitor} {shown(before[monitor])} before, {shown(after[monitor])} best"
        return f"<Run {str(self.folder)!r}: {self.summary['rounds']} rounds{gain}>"

    def _repr_html_(self) -> str:
        from tsugiki.server.run.privacy_words import headline

        before = self.summary["before"] or {}
        after = self.summary["after"] or {}
        best = f"best (round {self.summary['best_round']})"
        start = f"round {self.summary['before_round']}" if self.summary["before_round"] else "before"
        table = _html(["metric", start, best], [[name, before.get(name), after[name]] for name in after])
        title = f"{self.summary['name']}: {self.summary['rounds']} rounds, {self.summary['strategy']}"
        # The first line is bold; a run without privacy has no headline.
        words = (f"{title}, {self.summary['method']}", headline(self.summary.get("privacy", {})), str(self.folder))
        first, *rest = [escape(line) for line in words if line]
        return f"<p><b>{first}</b></p>{table}<p>{'<br>'.join(rest)}</p>"


@dataclass(frozen=True)
class Comparison:
    """A federated run beside what it is compared with; all metrics are of the operator's held-out data, by name.

    Args:
        run: the federated run.
        untouched: of the base model without training.
        linear_probe: of a head in closed form on the frozen base's features of all rows; empty if the task has none.
        local: of each site's own adapter, trained on its rows alone, by site.
        federated: of the run's last evaluated round.
        centralised: of an adapter that was trained on all rows in one place, in as many steps.
        own_rows: on the sites' own evaluation rows, by "local" or "federated" and site; empty if they keep none.
        learning_rates: of each training. The baselines have rates of their own, which a short search found.
    """

    run: Run
    untouched: dict[str, float]
    linear_probe: dict[str, float]
    local: dict[str, dict[str, float]]
    federated: dict[str, float]
    centralised: dict[str, float]
    own_rows: dict[str, dict[str, dict[str, float]]]
    learning_rates: dict[str, float]

    @property
    def table(self) -> Table:
        """One row for each training: its name as `training` ("untouched", "local", ...), `site`, and the metrics."""
        rows = [{"training": "untouched", "site": "", **self.untouched}]
        if self.linear_probe:
            rows.append({"training": "linear_probe", "site": "", **self.linear_probe})
        rows += [{"training": "local", "site": site, **metrics} for site, metrics in self.local.items()]
        rows.append({"training": "federated", "site": "", **self.federated})
        rows.append({"training": "centralised", "site": "", **self.centralised})
        return Table(rows)

    def to_pandas(self) -> pandas.DataFrame:
        """Return the table as a DataFrame.

        Raises:
            UsageError: pandas is not installed.
        """
        return self.table.to_pandas()

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def read_config(file: StrPath | Mapping[str, Mapping[str, Any]], **sections: Mapping[str, Any]) -> RunConfig:
    """Return the settings of a run.

    Args:
        file: the run's TOML file, or the same tables as a mapping.
        sections: settings that differ, one keyword for each section: `train={"learning_rate": 1e-3}`. A setting
            inside a table has a dotted key: `privacy={"examples.delta": 1e-6}`.

    Raises:
        ConfigError: with every problem at once.
    """
    from tsugiki.common.config.files import expand, read_toml
    from tsugiki.common.config.parse import parse, with_changes

    if isinstance(file, Mapping):
        raw = _plain(file)
        source = "the given settings"
    else:
        raw = read_toml(Path(file))
        source = str(file)
    changes: dict[str, Any] = {}
    for section, settings in sections.items():
        changes |= _dotted(section, settings)
    raw, problems = expand(with_changes(raw, changes))
    return parse(raw, source, problems)


def simulate(config: RunConfig, *, resume: bool = False, progress: bool = True) -> Run:
    """Run a whole federation on this machine.

    Args:
        config: from `read_config`. The run's folder, `run.output_dir` / `run.name`, must be new.
        resume: go on from the last checkpoint in that folder instead, after a crash or an interrupt.
        progress: show a line for each round; bars on a terminal.

    Raises:
        TsugikiError: the run cannot start or go on. Its class and `code` say why; the last checkpoint is kept.
    """
    from tsugiki.client.app import simulated_app
    from tsugiki.server.run.simulate import simulate as run

    outcome = run(config, simulated_app, resume=resume, progress=_progress(progress))
    return open_run(outcome.folder)


def open_run(folder: StrPath) -> Run:
    """Open the folder of a run that has ended, however it was started.

    Raises:
        StorageError: there is no such run, or its files are damaged.
    """
    from tsugiki.server.export.finished import read_config as settings_of
    from tsugiki.server.report.run_files import read_run

    place = Path(folder)
    config = settings_of(place)
    files = read_run(place)
    return Run(place, config, files.summary, Table(_row(line) for line in files.completed))


def load_adapter(folder: StrPath, base: StrPath | PreTrainedModel | SentenceTransformer | None = None) -> Any:
    """Load an exported adapter on its base, and compare everything on the way.

    Another base than the adapter's own, a tensor too few or too many, or one of another shape is an error.

    Args:
        folder: of the export.
        base: hub id, folder or `package:module/path` of the base. By default the hub id in the export, looked for in
            the hub and its cache. Or a model that was loaded from such a place: it stays as it is, and those of its
            tensors that are frozen (`model.requires_grad_(False)`) are used, so that memory holds them once.

    Returns:
        In eval mode, on the CPU: a `SentenceTransformer` where the task is sentence embedding, or classification with
        a pooling of its own (then `encode` gives the logits); else the transformers model (of a PEFT method, the
        `PeftModel` around it).

    Raises:
        ModelError: the export or the base cannot be loaded, or they do not belong together; `code` says which.
    """
    from tsugiki.common.model.exported import open_exported
    from tsugiki.common.model.find import source_of, transformer_of

    if base is None:
        return open_exported(Path(folder), "").base.network
    if isinstance(base, str | os.PathLike):
        return open_exported(Path(folder), os.fspath(base)).base.network
    # A model in memory: its frozen tensors are shared.
    return open_exported(Path(folder), source_of(base), beside=transformer_of(base)).base.network


def compare(config: RunConfig, *, progress: bool = True) -> Comparison:
    """Run a federation, and train the same on each site alone and on all rows in one place.

    Args:
        config: from `read_config`, with held-out rows in `evaluation.data`.
        progress: show a line for each round and each training.

    Raises:
        UsageError: there are no held-out rows to compare by.
        TsugikiError: a run cannot start or go on.
    """
    from tsugiki.client.app import simulated_app
    from tsugiki.server import baselines

    shown = _progress(progress)
    outcome, found = baselines.compare(config, simulated_app, progress=shown, notes=shown)
    run = open_run(outcome.folder)
    return Comparison(
        run=run,
        untouched=found["untouched"],
        linear_probe=found.get("linear_probe", {}),
        local=found["local"],
        federated=found["federated"],
        centralised=found["centralised"],
        own_rows=found.get("own_rows", {}),
        learning_rates=found["learning_rates"],
    )


def _progress(wanted: bool) -> Progress:
    """Return a run's progress display: bars on a terminal, lines elsewhere, such as in a notebook."""
    from tsugiki.server.run import progress

    if wanted:
        return progress.choose()
    return progress.Progress()


def _row(line: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of `Run.metrics` for one line of metrics.jsonl."""
    row = {
        "round": line["round"],
        "train_loss": line.get("train_loss"),
        "sites": len(line.get("accepted", {})),
        "seconds": sum(line["seconds"].values()),
        "bytes_up": line.get("bytes_up", 0),
        "bytes_down": line.get("bytes_down", 0),
    }
    # Rounds that were not evaluated lack these columns.
    row |= {f"eval_{name}": value for name, value in line.get("eval", {}).items()}
    if spent := line.get("privacy"):
        row["epsilon"] = spent["epsilon"].get("release")
    return row


def _dotted(section: str, settings: Any) -> dict[str, Any]:
    """Return new settings of a section by dotted key. What is no table stays whole: `parse` reports it."""
    if not isinstance(settings, Mapping):
        return {section: settings}
    return {f"{section}.{key}": _plain(value) for key, value in settings.items()}


def _plain(value: Any) -> Any:
    """Return a value as TOML would give it: paths as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value


def _html(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return an HTML table; everything in it is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row)}</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4f}" if isinstance(value, float) else str(value)
