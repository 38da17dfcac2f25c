"""Commands that run a whole federation: on this machine, over a network, with its baselines, or as the demo."""

from __future__ import annotations

import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from tsugiki.common.errors import (
    DeployError,
    ExportError,
    Interrupted,
    NotEnoughSites,
    QuorumNotMet,
    SecureAggregationError,
    TrainingError,
    TsugikiError,
    UsageError,
)
from tsugiki.common.files import to_json
from tsugiki.common.keys import read_private
from tsugiki.common.options import Json, RunFile, Set, Verbose
from tsugiki.server.commands.keys import KeysFolder

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig
    from tsugiki.server.deploy.serve import Deployment
    from tsugiki.server.engines.grid import Stop
    from tsugiki.server.run.progress import Progress
    from tsugiki.server.run.simulate import SimulatedApp

app = typer.Typer()

OptionalRunFile = Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The run's TOML file.")]
Resume = Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on from a run's last checkpoint.")]
Previous = Annotated[
    bool, typer.Option("--previous/--no-previous", help="With --resume: from the checkpoint before the last.")
]
Export = Annotated[bool, typer.Option("--export/--no-export", help="Export the best adapter when the run has ended.")]

Yes = Annotated[bool, typer.Option("--yes", help="Start also if nothing can be learned under the privacy plan.")]


@app.command(epilog="Example: tsugiki demo --seed 1 --output-dir /tmp/runs")
def demo(
    ctx: typer.Context,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 42,
    output_dir: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    baselines: Annotated[bool, typer.Option(help="Also train each company alone, to compare.")] = True,
    data_only: Annotated[bool, typer.Option("--data-only", help="Write the data and run file; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole thing on generated contract clauses: four companies, one search for similar clauses."""
    if data_only and (as_json or not baselines):
        raise typer.BadParameter("--data-only goes with --seed and --output-dir only")
    if data_only:
        _write_demo_data(seed, output_dir)
        return
    summary = _run_demo(seed, output_dir.absolute(), baselines, ctx.obj)
    if as_json:
        typer.echo(to_json(summary, indent=1))
    else:
        _show_demo(summary)


def _write_demo_data(seed: int, output_dir: Path) -> None:
    from tsugiki.server.demo.demo import write_files

    run_file, data_files = write_files(output_dir, seed)
    for path in (run_file, data_files.train, data_files.test_retrieval, data_files.test_scored):
        typer.echo(path)


def _run_demo(seed: int, output_dir: Path, baselines: bool, client: SimulatedApp) -> dict[str, Any]:
    """Make the data, run the federation and the baselines, export and report; return a summary."""
    from tsugiki.server.baselines import compare
    from tsugiki.server.demo import demo as parts
    from tsugiki.server.export.export import export
    from tsugiki.server.report.page import write_report
    from tsugiki.server.run.progress import Lines, choose

    started = time.perf_counter()
    name = parts.free_name(output_dir)
    files = parts.make_data(output_dir / f"{name}-data", seed)
    config = parts.demo_config(seed, output_dir, name, files)
    kinds = ["untouched", "local"] if baselines else ["untouched"]
    with stop_on_signals() as stop:
        # The demo is short, and its rate suits a company alone too: no search.
        outcome, results = compare(
            config, client, kinds, progress=choose(), notes=Lines(), stop=stop, search_rates=False
        )
    # The baselines are measured by retrieval; the scored pairs are a second measure of the same adapter.
    pearson = parts.scored(config, files, outcome.state.vector)
    adapter = export(outcome.folder)
    report = write_report(outcome.folder)
    return {
        **outcome.summary,
        **results,
        "pearson": pearson,
        "seconds": time.perf_counter() - started,
        "adapter": str(adapter),
        "report": str(report),
    }


def _show_demo(summary: dict[str, Any]) -> None:
    from rich.console import Console

    from tsugiki.server.run.progress import shown

    _show_comparison(summary["monitor"], summary)
    console = Console()
    pearson = summary["pearson"]
    before = shown(pearson["before"])
    console.print(f"pearson on scored pairs: {before} before, {shown(pearson['after'])} after")
    for name in ("adapter", "report"):
        console.print(f"{name}: {summary[name]}", highlight=False, soft_wrap=True)
    console.print(f"{summary['seconds']:.0f} s")


@app.command(epilog="Examples: tsugiki simulate examples/sst2.toml; tsugiki simulate --resume runs/sst2")
def simulate(
    ctx: typer.Context,
    file: OptionalRunFile = None,
    resume: Resume = None,
    previous: Previous = False,
    engine: Annotated[Literal["in-process", "ray"] | None, typer.Option(help="Instead of simulation.engine.")] = None,
    export: Export = True,
    yes: Yes = False,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine."""
    from tsugiki.server.run.progress import choose
    from tsugiki.server.run.simulate import simulate as run

    assignments = list(overrides or [])
    if engine:
        assignments.append(f"simulation.engine={engine}")
    config = _read_run("simulate", file, resume, previous, assignments)
    client: SimulatedApp = ctx.obj
    with stop_on_signals() as stop, _saying_how_to_go_on(ctx, config):
        outcome = run(
            config,
            client,
            resume=resume is not None,
            previous=previous,
            progress=choose(),
            stop=stop,
            accept_hopeless=yes,
        )
    _finish(outcome.folder, outcome.summary, with_export=export, as_json=as_json)


@app.command(
    epilog="Examples: tsugiki serve run.toml --listen 0.0.0.0:9092; tsugiki serve --resume runs/a; "
    "tsugiki serve june.toml july.toml; tsugiki serve --queue waiting"
)
def serve(
    ctx: typer.Context,
    files: Annotated[
        list[Path] | None, typer.Argument(metavar="[FILE]...", help="The run's TOML file; several run in turn.")
    ] = None,
    queue: Annotated[
        Path | None, typer.Option("--queue", metavar="DIR", help="Run the files of a folder, by name; wait for more.")
    ] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where sites connect.")] = "127.0.0.1:9092",
    tls: Annotated[Path, typer.Option("--tls", metavar="DIR", help="From `tsugiki certs`.")] = Path("tls"),
    passphrase: Annotated[
        Path | None, typer.Option("--tls-passphrase", metavar="FILE", help="That of the server's key; default: ask.")
    ] = None,
    keys: KeysFolder = Path("keys"),
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys; on loopback only.")] = False,
    wait_s: Annotated[
        float, typer.Option("--wait", metavar="SECONDS", help="For sites; 0: strategy.connect_timeout_s.")
    ] = 0,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Use a SuperLink that runs already.")] = "",
    resume: Resume = None,
    previous: Previous = False,
    export: Export = True,
    yes: Yes = False,
    overrides: Set = None,
    as_json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Run a federation over a network: a SuperLink, and the run on it, or one after the other, until all are over."""
    from tsugiki.server.deploy.certs import CertificateFiles
    from tsugiki.server.deploy.serve import Deployment
    from tsugiki.server.deploy.serve import serve as run
    from tsugiki.server.run.progress import choose

    assignments = list(overrides or [])
    if wait_s:
        assignments.append(f"strategy.connect_timeout_s={wait_s}")
    progress = choose()
    certificates = None if insecure else CertificateFiles(tls)
    asked = partial(_tls_passphrase, passphrase)
    deployment = Deployment(listen, certificates, keys, superlink, progress.note, asked)
    files = files or []
    if queue is not None or len(files) > 1:
        if resume is not None or previous or (queue is not None and files):
            raise UsageError(
                "several runs are given together with --resume, or with --queue",
                "files, or --queue DIR, or --resume RUN",
                "`tsugiki serve --help`",
            )
        _serve_each(ctx, files, queue, deployment, progress, assignments)
        return
    config = _read_run("serve", files[0] if files else None, resume, previous, assignments)
    with stop_on_signals() as stop, _saying_how_to_go_on(ctx, config):
        outcome = run(
            config,
            deployment,
            resume=resume is not None,
            previous=previous,
            progress=progress,
            stop=stop,
            accept_hopeless=yes,
        )
    _finish(outcome.folder, outcome.summary, with_export=export, as_json=as_json)


def _serve_each(
    ctx: typer.Context,
    files: Sequence[Path],
    queue: Path | None,
    deployment: Deployment,
    progress: Progress,
    overrides: list[str],
) -> None:
    """Run the files, or those of the folder `queue`, on one SuperLink.

    A list ends with the exit status of its first run that failed; a folder's queue ends when the user stops it.

    Raises:
        TsugikiError: of the run in which the user stopped the queue, or the SuperLink ended.
    """
    from tsugiki.common.config.files import read, with_absolute_paths
    from tsugiki.server.deploy.queue import check_files, files_in, run_each
    from tsugiki.server.deploy.serve import serving

    if queue is None:
        check_files(files, overrides)
        folder = Path(read(files[0], overrides).run.output_dir) / ".superlink" / "queue"
    else:
        folder = queue / ".superlink"
    with stop_on_signals() as stop, serving(deployment, folder.absolute(), stop) as service:

        def run(path: Path) -> None:
            config = with_absolute_paths(read(path, overrides))
            with _saying_how_to_go_on(ctx, config):
                outcome = service.run(
                    config,
                    resume=False,
                    previous=False,
                    progress=progress,
                    stop=stop,
                    accept_hopeless=ctx.params["yes"],
                )
            _finish(outcome.folder, outcome.summary, with_export=ctx.params["export"], as_json=ctx.params["as_json"])

        source = files if queue is None else files_in(queue, stop, progress.note)
        errors = run_each(source, run, stop, progress.note)
        if service.failure:  # it ended between two runs
            raise service.failure[0]
    if errors and queue is None:
        raise typer.Exit(errors[0].exit_status)


def _tls_passphrase(file: Path | None, key: Path) -> bytes:
    """Return the passphrase of the server's key, from a file or else from a terminal.

    Raises:
        LinkError: `key-missing` or `key-permissions`, the file cannot be used.
        UsageError: `tls-key`, there is no file, and nobody to ask.
    """
    if file is not None:
        return read_private(file).rstrip(b"\r\n")
    if not sys.stdin.isatty():
        raise UsageError(
            f"the key {key} has a passphrase",
            "--tls-passphrase FILE with it, or a terminal on which it can be asked for",
            "write it to a file with mode 0600; or make a key without: openssl pkey -in KEY -out NEW",
            code="tls-key",
        )
    return str(typer.prompt(f"passphrase of {key}", hide_input=True, err=True)).encode()


@app.command(epilog="Example: tsugiki compare examples/sst2.toml --set run.rounds=3")
def compare(
    ctx: typer.Context,
    file: RunFile,
    overrides: Set = None,
    search: Annotated[
        bool, typer.Option(help="Search a learning rate for each baseline: short trainings, about as long as itself.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Compare federated training with centralised, local-only and no training, on the same data and steps."""
    from tsugiki.common.config.files import read
    from tsugiki.server import baselines
    from tsugiki.server.report.page import write_report
    from tsugiki.server.run.progress import Lines, choose

    config = read(file, overrides or [])
    with stop_on_signals() as stop:
        outcome, results = baselines.compare(
            config, ctx.obj, progress=choose(), notes=Lines(), stop=stop, search_rates=search
        )
    write_report(outcome.folder)
    if as_json:
        typer.echo(to_json(results, indent=1))
    else:
        _show_comparison(config.metric, results)


def _read_run(
    command: str, file: Path | None, resume: Path | None, previous: bool, overrides: Sequence[str]
) -> RunConfig:
    """Return the configuration of a run to start, or of a run to resume.

    Raises:
        UsageError: `file`, `resume` and `previous` contradict each other.
        ConfigError: the run file has mistakes.
    """
    from tsugiki.common.config.files import read

    if file is None and resume is not None:
        return _at_folder(read(resume / "config.toml", overrides), resume)
    if file is None or resume is not None:
        raise UsageError("the command takes either FILE or --resume RUN", hint=f"`tsugiki {command} --help`")
    if previous:
        raise UsageError("--previous goes with --resume RUN")
    return read(file, overrides)


def _at_folder(config: RunConfig, folder: Path) -> RunConfig:
    """Return the configuration of a run whose folder may have been moved, but not renamed."""
    from tsugiki.common.config.parse import changed

    if folder.resolve().name != config.run.name:
        raise UsageError(
            f"the folder {folder} holds the run {config.run.name!r}",
            "a folder with the run's name",
            f"rename it to {config.run.name}",
        )
    return changed(config, {"run.output_dir": str(folder.resolve().parent)})


_GOES_ON = (Interrupted, QuorumNotMet, NotEnoughSites, DeployError, TrainingError, SecureAggregationError)
"""The errors of runs that can go on as they are, once their cause is gone."""
_GOES_ON_CODES = ("run-exists", "disk-full", "not-writable")
_NOT_REPEATED = ("file", "files", "queue", "resume", "previous")
"""The parameters that say which run; the line that goes on has --resume in their place."""


@contextmanager
def _saying_how_to_go_on(ctx: typer.Context, config: RunConfig) -> Iterator[None]:
    """Add the line that goes on to an error after which a run with rounds can go on."""
    from tsugiki.server.run.storage import is_begun

    folder = Path(config.run.output_dir) / config.run.name
    try:
        yield
    except TsugikiError as error:
        can_go_on = isinstance(error, _GOES_ON) or error.code in _GOES_ON_CODES
        if can_go_on and (folder / "config.toml").is_file() and is_begun(folder):
            error.add_note(f"This goes on with the run:\n  {_resuming(ctx, folder)}")
        raise


def _resuming(ctx: typer.Context, folder: Path) -> str:
    """Return the command that goes on with a run, with the options that were given, for a shell."""
    words = ["tsugiki", str(ctx.info_name), "--resume", str(folder)]
    for parameter in ctx.command.params:
        name = str(parameter.name)
        source = ctx.get_parameter_source(name)
        if source is None or source.name != "COMMANDLINE" or name in _NOT_REPEATED:
            continue
        value = ctx.params[name]
        if name == "overrides":
            value = [one for one in value if _may_change(folder, one)]
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool):
                words.append((parameter.opts if one else parameter.secondary_opts)[0])
            else:
                words += [parameter.opts[0], str(one)]
    return shlex.join(words)


def _may_change(folder: Path, override: str) -> bool:
    """Return whether a run can go on with an override that it was started with, or that was given for it."""
    from tsugiki.common.config.files import read

    if override.startswith(("run.name=", "run.output_dir=", "privacy.")):  # the folder has them
        return False
    return read(folder / "config.toml", [override]).fixed == read(folder / "config.toml").fixed


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Let the first Ctrl-C or SIGTERM end the run at the next chance, the second at once."""
    from tsugiki.server.engines.grid import Stop

    stop = Stop()

    def handle(signal_number: int, frame: Any) -> None:
        if stop.requested:  # the second signal
            sys.exit(130)
        stop.request()
        sys.stderr.write("\nstopping; again to stop at once\n")

    signals = (signal.SIGINT, signal.SIGTERM)
    before = {signal_number: signal.signal(signal_number, handle) for signal_number in signals}
    try:
        yield stop
    finally:
        for signal_number, handler in before.items():
            signal.signal(signal_number, handler)


def _finish(folder: Path, summary: dict[str, Any], *, with_export: bool, as_json: bool) -> None:
    """Write the report, export the adapter, and print the summary."""
    from tsugiki.server.export.export import export
    from tsugiki.server.report.page import write_report

    summary = {**summary, "report": str(write_report(folder)), "folder": str(folder)}
    if with_export and summary["rounds"]:  # an adapter that was only evaluated is where it was before
        adapter = folder / "adapter"
        try:
            # A resumed run that had ended before was exported then, with the same adapter.
            if not adapter.exists():
                adapter = export(folder)
            summary["adapter"] = str(adapter)
        except ExportError as error:
            # Some runs cannot be exported at all; that must not make a good run fail.
            if error.code not in ("no-public-name", "export-unsupported"):
                raise
            typer.echo(f"not exported: {error}", err=True)
    if as_json:
        typer.echo(to_json(summary, indent=1))
    else:
        _show_summary(summary)


def _show_summary(summary: dict[str, Any]) -> None:
    """Print a run's result as a table, and the paths of its files."""
    from rich.console import Console
    from rich.table import Table

    from tsugiki.server.run.privacy_words import headline
    from tsugiki.server.run.progress import describe_sites, shown

    table = Table(title=f"{summary['name']}: {summary['rounds']} rounds, {summary['strategy']}, {summary['method']}")
    start = f"round {summary['before_round']}" if summary["before_round"] else "before"
    for column in ("metric", start, f"best (round {summary['best_round']})"):
        table.add_column(column, justify="left" if column == "metric" else "right")
    before = summary["before"] or {}
    for name, value in (summary["after"] or {}).items():
        table.add_row(name, shown(before.get(name)), shown(value))
    table.add_row("adapter + head parameters", "", f"{summary['adapter_parameters']} + {summary['head_parameters']}")
    table.add_row("bytes up, all rounds", "", f"{summary['bytes_up']:,}")
    console = Console()
    console.print(table)
    if line := describe_sites(summary.get("at_sites")):
        console.print(line, highlight=False, markup=False)
    if line := headline(summary.get("privacy", {})):
        console.print(line, highlight=False, markup=False)
    for name in ("adapter", "report"):
        if name in summary:
            console.print(f"{name}: {summary[name]}", highlight=False, soft_wrap=True)


def _show_comparison(monitor: str, results: dict[str, Any]) -> None:
    """Print the federated result beside the baselines."""
    from rich.console import Console
    from rich.table import Table

    from tsugiki.server.baselines import average
    from tsugiki.server.run.progress import shown

    federated: dict[str, float | None] = results["federated"]
    table = Table(title="the same rows, the same steps")
    table.add_column("training")
    for name in federated:
        mark = " *" if name == monitor else ""  # the metric by which the best round is chosen
        table.add_column(f"{name}{mark}", justify="right")
    rows: list[tuple[str, dict[str, float | None]]] = []
    if "untouched" in results:
        rows.append(("none (base model)", results["untouched"]))
    if "linear_probe" in results:
        rows.append(("linear probe, all data", results["linear_probe"]))
    if "local" in results:
        mean = {name: average(results["local"], name) for name in federated}
        rows += [(f"{site} alone", metrics) for site, metrics in results["local"].items()]
        rows.append(("average site alone", mean))
    rows.append(("federated", federated))
    if "centralised" in results:
        rows.append(("all data in one place", results["centralised"]))
    for title, metrics in rows:
        table.add_row(title, *(shown(metrics[name]) for name in federated))
    Console().print(table)
    if "own_rows" in results:
        _show_own_rows(monitor, results["own_rows"])


def _show_own_rows(monitor: str, own: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print each site's metric on its own evaluation rows: of its own adapter, and of the federated one."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"each site's own rows, {monitor}")
    for column in ("site", "alone", "federated"):
        table.add_column(column, justify="left" if column == "site" else "right")
    for site, alone in own["local"].items():
        federated = own["federated"].get(site, {})
        values = (metrics.get(monitor) for metrics in (alone, federated))
        table.add_row(site, *("" if value is None else f"{value:.4f}" for value in values))
    Console().print(table)
