"""The bodies of the operator's commands."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import parse
from tsugiki.common.config.run import RunConfig
from tsugiki.common.errors import ExportError, UsageError
from tsugiki.common.files import unwritable
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run.privacy_words import headline
from tsugiki.server.run.simulate import SimulatedApp


def simulate(
    file: Path | None,
    resume: Path | None,
    previous: bool,
    engine: str | None,
    overrides: Sequence[str],
    with_export: bool,
    as_json: bool,
    client: SimulatedApp,
) -> None:
    """Run a federation on this machine, or go on with one; then export and report."""
    from tsugiki.server.run import progress
    from tsugiki.server.run.simulate import simulate as run

    if (file is None) == (resume is None):
        raise UsageError("the command takes either FILE or --resume RUN", do="`tsugiki simulate --help`")
    if previous and resume is None:
        raise UsageError("--previous goes with --resume RUN")
    engines = [f"simulation.engine={engine}"] if engine else []
    config = config_file.read(file or Path(str(resume)) / "config.toml", [*overrides, *engines])
    if resume is not None:
        config = at_folder(config, resume)
    with stop_on_signals() as stop:
        outcome = run(
            config, client, resume=resume is not None, previous=previous, progress=progress.choose(), stop=stop
        )
    finish(outcome.folder, outcome.summary, with_export, as_json)


def at_folder(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration of a run whose folder may have been moved, but not renamed."""
    if folder.resolve().name != config.run.name:
        raise UsageError(
            f"the folder {folder} holds the run {config.run.name!r}",
            "a folder with the run's name",
            f"rename it to {config.run.name}",
        )
    raw = config.model_dump(mode="json")
    raw["run"]["output_dir"] = str(folder.resolve().parent)
    return parse(raw)


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM end the run at the next chance, the second at once."""
    stop = Stop()

    def handle(number: int, frame: Any) -> None:
        if stop.requested:
            sys.exit(130)
        stop.request()
        sys.stderr.write("\nstopping; again to stop at once\n")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def finish(folder: Path, summary: dict[str, Any], with_export: bool, as_json: bool) -> None:
    """Write the report, export the adapter, and show what came out."""
    from tsugiki.server.export.export import export as write_export
    from tsugiki.server.report.page import write_report

    summary = {**summary, "report": str(write_report(folder)), "folder": str(folder)}
    if with_export:
        adapter = folder / "adapter"
        try:
            # A resumed run that had ended before has been exported; it ends with the same adapter.
            summary["adapter"] = str(adapter if adapter.exists() else write_export(folder))
        except ExportError as error:
            if error.code not in ("no-public-name", "export-unsupported"):
                raise
            sys.stderr.write(f"not exported: {error}\n")
    if as_json:
        print_json(summary)
    else:
        show_summary(summary)


def show_summary(summary: dict[str, Any]) -> None:
    """Print a run's result as a table, and where its files are."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{summary['name']}: {summary['rounds']} rounds, {summary['strategy']}, {summary['method']}")
    for column in ("metric", "before", f"best (round {summary['best_round']})"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    for name, value in (summary["after"] or {}).items():
        table.add_row(name, f"{summary['before'][name]:.4f}", f"{value:.4f}")
    table.add_row("adapter + head parameters", "", f"{summary['adapter_parameters']} + {summary['head_parameters']}")
    table.add_row("bytes up, all rounds", "", f"{summary['bytes_up']:,}")
    (console := Console()).print(table)
    if line := headline(summary.get("privacy", {})):
        console.print(line, highlight=False, markup=False)
    for name in ("adapter", "report"):
        if name in summary:
            console.print(f"{name}: {summary[name]}", highlight=False, soft_wrap=True)


def compare(file: Path, overrides: Sequence[str], as_json: bool, client: SimulatedApp) -> None:
    """Run the federation and all baselines; one table, one report."""
    from tsugiki.server.baselines import run_baselines
    from tsugiki.server.report.page import write_report
    from tsugiki.server.run import progress
    from tsugiki.server.run.simulate import simulate as run

    config = config_file.read(file, overrides)
    if not config.evaluation.data:
        raise UsageError("the run has nothing to compare by", "evaluation.data in the run file", "name a held-out file")
    show = progress.Lines()
    with stop_on_signals() as stop:
        outcome = run(config, client, progress=progress.choose(), stop=stop)
        sites = site_names(outcome.folder)
        kinds = ["untouched", "local", "centralised"]
        results = run_baselines(config, outcome.folder, client, sites, kinds, show, stop)
    federated = last_evaluation(outcome.folder)
    write_report(outcome.folder)
    if as_json:
        print_json({"federated": federated, **results})
    else:
        show_comparison(config.monitor, federated, results)


def site_names(folder: Path) -> list[str]:
    """Return the sites that passed the hello, from the audit log."""
    from tsugiki.common.audit import verify

    return sorted({event["site"] for event in verify(folder / "audit.jsonl") if event["event"] == "hello"})


def last_evaluation(folder: Path) -> dict[str, float]:
    """Return the metrics of the last evaluated round."""
    from tsugiki.common.files import read_lines

    found: dict[str, float] = [line["eval"] for line in read_lines(folder / "metrics.jsonl") if "eval" in line][-1]
    return found


def show_comparison(monitor: str, federated: dict[str, float], results: dict[str, Any]) -> None:
    """Print the federated result beside the baselines."""
    from rich.console import Console
    from rich.table import Table

    from tsugiki.server.baselines import average

    table = Table(title="the same rows, the same steps")
    table.add_column("training")
    for name in federated:
        table.add_column(name + (" *" if name == monitor else ""), justify="right")
    rows: list[tuple[str, dict[str, float]]] = []
    if "untouched" in results:
        rows.append(("none (base model)", results["untouched"]))
    if "local" in results:
        mean = {name: average(results["local"], name) for name in federated}
        rows += [(f"{site} alone", metrics) for site, metrics in results["local"].items()]
        rows.append(("average site alone", mean))
    rows.append(("federated", federated))
    if "centralised" in results:
        rows.append(("all data in one place", results["centralised"]))
    for title, metrics in rows:
        table.add_row(title, *(f"{metrics[name]:.4f}" for name in federated))
    Console().print(table)


def demo(seed: int, output_dir: Path, baselines: bool, as_json: bool, client: SimulatedApp) -> None:
    """Make the data, run the federation, compare, export, report."""
    from rich.console import Console

    from tsugiki.server.baselines import run_baselines
    from tsugiki.server.demo import run as parts
    from tsugiki.server.export.export import export as write_export
    from tsugiki.server.report.page import write_report
    from tsugiki.server.run import progress
    from tsugiki.server.run.simulate import simulate as run

    started = time.perf_counter()
    output_dir = output_dir.absolute()
    name = parts.free_name(output_dir)
    files = parts.make_data(output_dir / f"{name}-data", seed)
    config = parts.demo_config(seed, output_dir, name, files)
    with stop_on_signals() as stop:
        outcome = run(config, client, progress=progress.choose(), stop=stop)
        kinds = ["untouched", "local"] if baselines else ["untouched"]
        sites, lines = site_names(outcome.folder), progress.Lines()
        results = run_baselines(config, outcome.folder, client, sites, kinds, lines, stop)
    federated = last_evaluation(outcome.folder)
    pearson = parts.scored(config, files, outcome.state.vector)
    adapter, report_file = write_export(outcome.folder), write_report(outcome.folder)
    seconds = time.perf_counter() - started
    summary = {**outcome.summary, "federated": federated, **results, "pearson": pearson, "seconds": seconds}
    if as_json:
        print_json({**summary, "adapter": str(adapter), "report": str(report_file)})
        return
    show_comparison(config.monitor, federated, results)
    console = Console()
    console.print(f"pearson on scored pairs: {pearson['before']:.4f} before, {pearson['after']:.4f} after")
    for title, path in (("adapter", adapter), ("report", report_file)):
        console.print(f"{title}: {path}", highlight=False, soft_wrap=True)
    console.print(f"{seconds:.0f} s")


def demo_data(seed: int, output_dir: Path) -> None:
    """Write the demo's data and run file."""
    from tsugiki.server.demo.run import write_files

    file, files = write_files(output_dir, seed)
    for path in (file, files.train, files.test_retrieval, files.test_scored):
        sys.stdout.write(f"{path}\n")


def export(run: Path, target: Path | None, which: Literal["best", "last"], merged: bool) -> None:
    """Export a run's adapter."""
    from tsugiki.server.export.export import export as write_export

    sys.stdout.write(f"{write_export(run, target, which=which, merged=merged)}\n")


def report(run: Path) -> None:
    """Write a run's report."""
    from tsugiki.server.report.page import write_report

    sys.stdout.write(f"{write_report(run)}\n")


def config_init(file: Path, task: str, method: str, strategy: str) -> None:
    """Write a commented run file."""
    text = config_file.commented(task, method, strategy)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"the file {file} is there already", "a new file", "choose another name, or delete it"
        ) from None
    except OSError as error:
        raise unwritable(file, error) from error
    sys.stdout.write(f"{file}\n")


def config_show(file: Path, overrides: Sequence[str], as_json: bool) -> None:
    """Print the resolved configuration; settings that differ from their default are marked."""
    config = config_file.read(file, overrides)
    if as_json:
        print_json(config.model_dump(mode="json"))
        return
    changed = {key for key, _, _ in config_file.changes(config)}
    given = {assignment.split("=", 1)[0] for assignment in overrides}
    section = ""
    for line in config_file.to_toml(config).splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        key = f"{section}.{line.split(' = ')[0]}"
        setting = ".".join(key.split(".")[:2])  # a table's own keys come from where the table comes from
        source = "--set" if setting in given else str(file) if setting in changed else "default"
        sys.stdout.write(f"{line:<72}  # {source}\n" if " = " in line else f"{line}\n")


def config_schema() -> None:
    """Print a JSON schema; task, adapter and strategy each allow what is registered."""
    from tsugiki.common.config.parse import families, section_classes
    from tsugiki.common.errors import Problem

    properties: dict[str, Any] = {}
    for name, section in section_classes({}).items():
        if name in (known := families()):
            properties[name] = {"anyOf": [member.model_json_schema() for member in known[name]]}
        elif not isinstance(section, Problem):
            properties[name] = section.model_json_schema()
    print_json({"title": "Tsugiki run", "type": "object", "properties": properties, "additionalProperties": False})


def doctor(as_json: bool) -> None:
    """Print what this machine has, and what to do about what it lacks. Exit status 1 if something needed is missing."""
    from tsugiki.server.doctor import examine

    findings = examine()
    if as_json:
        print_json([finding.__dict__ for finding in findings])
    else:
        for finding in findings:
            mark = "ok  " if finding.fine else ("FAIL" if finding.needed else "-   ")
            advice = f"  -> {finding.do}" if finding.do and not finding.fine else ""
            sys.stdout.write(f"{mark} {finding.name}: {finding.found}{advice}\n")
    if any(finding.needed and not finding.fine for finding in findings):
        sys.exit(1)


def print_json(value: Any) -> None:
    """Print JSON, and nothing else, to standard output."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")
