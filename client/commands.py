"""A site's commands: take part in runs, try what that means, and write and check its file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tsugiki.common.address import LOOPBACK, server_address, split_address
from tsugiki.common.errors import UsageError
from tsugiki.common.files import to_json
from tsugiki.common.options import Json, Plot, RunFile, Set, Verbose

if TYPE_CHECKING:
    from tsugiki.client.node.link import Link
    from tsugiki.client.site.site import FileSite
    from tsugiki.client.training.lr_find import Sweep, Trial
    from tsugiki.common.config.run import RunConfig

TRAINING_LOSSES = "tsugiki.training-losses"
"""Key of the context's `meta`: a function that runs a simulated federation. The client does not know the server."""

app = typer.Typer()
site_app = typer.Typer(no_args_is_help=True, help="Write and check a site's own file; split a simulation into sites.")
app.add_typer(site_app, name="site")


@app.command(
    epilog="Examples: tsugiki client --server fed.example.org:9092 --ca ca.crt --key acme; "
    "tsugiki client --dry-run federation.toml"
)
def client(
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="The server, or https://HOST:PORT; default: site.toml's.")
    ] = "",
    site_file: Annotated[Path, typer.Option("--site", help="The site's file.")] = Path("site.toml"),
    ca: Annotated[
        str, typer.Option(metavar="FILE", help="The federation's CA certificate; system: the CAs of this machine.")
    ] = "",
    key: Annotated[Path | None, typer.Option("--key", help="This node's private key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key; on loopback only.")] = False,
    retry_s: Annotated[
        float,
        typer.Option(
            "--retry",
            metavar="SECONDS",
            help="How long the first connection is tried. Once connected, the client waits until it is stopped.",
        ),
    ] = 600,
    dry_run: Annotated[Path | None, typer.Option(metavar="FILE", help="Show what would be sent; send nothing.")] = None,
    overrides: Set = None,
    verbose: Verbose = False,
) -> None:
    """Take part with this site's data: connect to a server and answer it until stopped."""
    if dry_run is not None:
        _print_dry_run(site_file, dry_run, overrides or [])
        return
    if overrides:
        raise typer.BadParameter("--set goes with --dry-run: the server says how a run is")

    from tsugiki.client.app import app as client_app
    from tsugiki.client.cache import adapter_bytes, watch_training
    from tsugiki.client.node import status
    from tsugiki.client.node.channel import Stopping
    from tsugiki.client.node.connection import Connection
    from tsugiki.client.node.kept_answer import KeptAnswer
    from tsugiki.client.node.node import Ending, Node
    from tsugiki.client.site.site import read_site, stamp

    site = read_site(site_file)
    private: Path | None = None
    if not insecure:
        private = key or site.server.key_path(site.folder)
    link = _link(site, server, ca, private, insecure=insecure, retry_s=retry_s)
    site.check_records()  # before the server is asked for anything: every answer would be refused
    # The app signs keys of secure aggregation with the key of this connection.
    node_config = {"site": str(site_file.resolve()), "key": "" if private is None else str(private.resolve())}
    ending = Ending()
    with status.choose() as shown, ending.handling_signals():
        watch_training(shown.step)
        connection = Connection(link, ending, shown.note, adapter_bytes)
        try:
            connection.connect()
            shown.note(f"connected to {link.address} as {site.name}, node {connection.node_id}")
            for trusted in site.policy.taken_on_trust():
                shown.note(trusted)
            kept = KeptAnswer(site.folder / f".{site.name}.undelivered")
            Node(client_app, connection, node_config, shown, ending, kept, lambda: stamp(site_file)).run()
        except Stopping:
            pass  # there is nobody to say goodbye to
        finally:
            connection.close()
        shown.note("disconnected")


def _link(site: FileSite, server: str, ca: str, private: Path | None, *, insecure: bool, retry_s: float) -> Link:
    """Return the server's address and this site's credentials, from the command line or else from site.toml.

    Args:
        site: this site.
        server: its address; empty: site.toml's.
        ca: the file with the CA's certificate, or "system"; empty: site.toml's.
        private: the private key of this node; None: it has none.
        insecure: whether the connection has no TLS.
        retry_s: for how long the first connection is tried.

    Raises:
        UsageError: no server is named, the connection would not be encrypted, or a file cannot be read.
    """
    from tsugiki.client.node.link import Link, trusted_cas
    from tsugiki.common.keys import read_private_key

    address = server or site.server.address
    if not address:
        raise UsageError(
            "no server",
            "--server HOST:PORT, or [server] address in site.toml",
            "ask the operator of the federation for it",
        )
    address = server_address(address, tls=not insecure)
    authority = ""
    if not insecure:
        authority = ca or site.server.authority(site.folder)
    _check_security(address, insecure, authority)
    return Link(
        address,
        trusted_cas(authority) if authority else None,
        None if private is None else read_private_key(private),
        retry_s,
    )


def _check_security(address: str, insecure: bool, authority: str) -> None:
    """Check that the connection will be encrypted, or stays on loopback.

    Raises:
        UsageError: it would do neither.
    """
    if insecure and split_address(address)[0] not in LOOPBACK:
        raise UsageError(
            f"--insecure is given, and {address} is another machine",
            "an address on loopback",
            "give --ca and --key, and leave --insecure out",
        )
    if not insecure and not authority:
        raise UsageError(
            "no CA certificate",
            "--ca FILE, or [server] ca in site.toml",
            "ask the operator of the federation for it; or --ca system, if a public or company CA has signed the "
            "server's certificate",
        )


def _print_dry_run(site_file: Path, run: Path, overrides: Sequence[str]) -> None:
    """Print exactly what this site would send in a run's hello and first round. Nothing is sent, or logged."""
    from tsugiki.client.site.site import read_site

    site = read_site(site_file)
    _print_replies(site, _as_sent(site, run, overrides))


def _print_replies(site: FileSite, config: RunConfig) -> None:
    """Print exactly what a site would send in a run's hello and first round."""
    from flwr.app import Array

    from tsugiki.client.dry_run import replies

    for title, content in replies(site, config):
        typer.echo(f"{title}:")
        for name, record in content.items():
            for key, value in record.items():
                shown = repr(value)
                if isinstance(value, Array):
                    shown = f"{value.dtype} {value.shape}, {len(value.data):,} bytes"
                typer.echo(f"  {name}.{key} = {shown}")


def _as_sent(site: FileSite, run: Path, overrides: Sequence[str]) -> RunConfig:
    """Return a run as the site would receive it: with absolute paths, unless [models] has the names of the file."""
    from tsugiki.common.config import files as config_file

    config = config_file.read(run, overrides)
    known = {config.model.name, *config.task.models, *config.adapter.models} <= set(site.models)
    if known:
        return config
    return config_file.with_absolute_paths(config)


@app.command(
    epilog="Example: tsugiki lr-find examples/sst2.toml --plot rates.svg",
    help="Suggest a learning rate: a range test at one site, then a short run of the federation.\n\n"
    "The range test trains for --steps batches while the rate grows. The suggestion is then tried in the simulated "
    "federation itself: 3 rounds of at most 20 local steps at every site. If the loss does not fall there, a third of "
    "the rate is tried, up to four rates in all. So it takes as long as 100 steps of training, and for each rate 60 "
    "steps at each site: a minute or two for a small model and a few sites. --no-verify leaves the second part out.",
)
def lr_find(
    ctx: typer.Context,
    file: RunFile,
    lowest: Annotated[float, typer.Option(help="The rate to begin with.")] = 1e-5,
    highest: Annotated[float, typer.Option(help="The rate to end with; 0: 1 for adamw, 10 for sgd.")] = 0.0,
    steps: Annotated[int, typer.Option(min=20, max=10_000, help="How many rates to try.")] = 100,
    central: Annotated[
        bool, typer.Option("--central", help="On all rows of the simulation's file, as in one place.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Try the suggestion in a short run of the federation.")
    ] = True,
    plot: Plot = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Suggest a learning rate: a range test at one site, then a short run of the federation."""
    from rich.console import Console
    from rich.progress import Progress

    from tsugiki.client.training.lr_find import HIGHEST, TRIALS, draw, find_rate, in_one_place, try_rates
    from tsugiki.common.config.files import read
    from tsugiki.common.plots import plot_format

    if plot is not None:
        plot_format(plot)  # a wrong name is refused before minutes of training
    config = read(file, overrides or [])
    last = highest or HIGHEST[config.train.optimizer]
    console = Console(stderr=True)
    trials: list[Trial] = []
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("range test", total=steps)
        sweep = find_rate(config, lowest, last, steps, central, lambda done: progress.update(bar, completed=done))
        if verify and math.isfinite(sweep.suggestion):
            bar = progress.add_task("short runs of the federation", total=1 + TRIALS)
            tried = in_one_place(config) if central else config
            losses = ctx.meta[TRAINING_LOSSES]
            trials = try_rates(tried, sweep.suggestion, losses, lambda done: progress.update(bar, completed=done))
    taken = _confirmed(sweep, trials)
    if as_json:
        typer.echo(to_json(_sweep_as_json(sweep, trials, taken)))
    else:
        _print_sweep(sweep, trials, taken)
    if plot is not None:  # last: the result is printed even if the plot cannot be written
        draw(sweep, plot, taken)
        if not as_json:
            typer.echo(plot)


def _confirmed(sweep: Sweep, trials: Sequence[Trial]) -> float:
    """Return the suggestion after the trials; without any, the range test's. NaN: there is none."""
    if not trials:
        return sweep.suggestion
    return trials[-1].rate if trials[-1].fell else math.nan


def _sweep_as_json(sweep: Sweep, trials: Sequence[Trial], taken: float) -> dict[str, Any]:
    """Return all that was found, with null for a missing suggestion, because JSON has no NaN."""
    tried = [{**vars(trial), "fell": trial.fell} for trial in trials]
    finite = taken if math.isfinite(taken) else None
    return {**vars(sweep), "suggestion": finite, "flat": not math.isfinite(sweep.suggestion), "trials": tried}


def _print_sweep(sweep: Sweep, trials: Sequence[Trial], taken: float) -> None:
    typer.echo(
        f"{len(sweep.rates)} steps in {sweep.seconds:.1f} s, rates from {sweep.rates[0]:.1g} to {sweep.rates[-1]:.1g}"
    )
    typer.echo(f"least smoothed loss {min(sweep.smoothed):.4g}, at {sweep.least:.2g}")
    for trial in trials:
        typer.echo(_trial_line(trial))
    if not math.isfinite(sweep.suggestion):
        typer.echo(
            "no suggestion: the curve is flat, the loss falls at no rate. Try a higher --highest, more --steps or "
            "larger batches, and check that the labels belong to the texts"
        )
    elif not math.isfinite(taken):
        typer.echo(
            "no suggestion: the loss falls in one place, but at none of these rates in the federation. Try more local "
            'steps, strategy.name = "fedavg", or --lowest and --highest around a rate that you know'
        )
    else:
        source = "the loss fell in the federation" if trials else "not tried in the federation"
        typer.echo(f"suggestion: train.learning_rate = {taken:.2g}, {source}")


def _trial_line(trial: Trial) -> str:
    """Return what a trial has shown, in a sentence."""
    start = f"the federation at {trial.rate:.2g}:"
    if not math.isfinite(trial.fall):
        return f"{start} training diverged"
    change = f"{trial.before:.4g} to {trial.losses[-1]:.4g}, in {len(trial.losses)} rounds"
    if trial.fell:
        return f"{start} the loss fell by {trial.fall:.0%}, from {change}"
    return f"{start} the loss did not fall: from {change}"


@site_app.command(epilog="Example: tsugiki site init --name acme --train data/contracts.csv")
def init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("site.toml"),
    name: Annotated[str, typer.Option(help="This site's name in the federation.")] = "my-site",
    train: Annotated[str, typer.Option(help="The file with the private rows.")] = "train.csv",
) -> None:
    """Write a commented site.toml."""
    from tsugiki.client.site.template import site_file

    text = site_file(name, train)
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(
            f"the file {file} is there already", "a new file", "choose another name, or delete it"
        ) from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot write {file}: {why}", "a file in a writable folder", "check the folder") from error
    typer.echo(file)


@site_app.command(epilog="Example: tsugiki site check site.toml --run federation.toml")
def check(
    file: Annotated[Path, typer.Argument(help="The site's file.")] = Path("site.toml"),
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Also try the site against this run.")] = None,
    overrides: Set = None,
) -> None:
    """Try a site.toml: is the file right, can the data be read, does the model load?"""
    from tsugiki.client.site.site import read_site

    site = read_site(file)
    typer.echo(f"{file}: site {site.name}, {len(site.models)} models")
    for trusted in site.policy.taken_on_trust():
        typer.echo(trusted)
    site.check_records()
    if run is not None:
        _try_run(site, _as_sent(site, run, overrides or []))
        return
    there = "there" if (site.folder / site.data.train).exists() else "MISSING"
    typer.echo(f"{site.data.train}: {there}; --run FILE tries it against a run")


def _try_run(site: FileSite, config: RunConfig) -> None:
    """Do what the client will do in this run, as far as the hello, and print each step.

    Raises:
        TsugikiError: of the step that fails.
    """
    from tsugiki.client.prepare import load_at, own_rank
    from tsugiki.common.model.device import actual_precision, device_notes, precision_advice
    from tsugiki.common.strategies import strategy_of
    from tsugiki.common.tasks import TASKS

    task = TASKS.get(config.task.name)(config.task)
    shard = site.train_shard(task)
    typer.echo(f"{site.data.train}: {len(shard)} rows for {config.task.name}{_noted(shard.notes)}")
    kept = site.evaluation_shard(task)
    if kept:
        typer.echo(f"{site.data.evaluation}: {len(kept)} rows")
    else:
        typer.echo("no evaluation rows")

    graft = load_at(site, config)
    source = site.model_source(config.model.name)
    fingerprint = graft.spec.base_fingerprint[:12]
    typer.echo(f"{config.model.name}: {source}, fingerprint {fingerprint}, on {graft.device}")
    if rank := own_rank(site, config):
        run_rank = graft.method.settings.rank
        typer.echo(f"trains {rank} of the {run_rank} components of each LoRA pair (site.max_rank)")

    told = _told_kinds(site, config)
    device = device_notes(config, graft.device.type)
    rows = shard.notes + graft.task.encode(shard, graft.base).notes
    stays: tuple[str, ...] = ()
    if "notes" not in told:
        stays = rows
        rows = ()
    number = "its number of clients"
    if "rows" in told:
        number = "its number of rows"
    typer.echo(
        f"would leave this site in the hello: its name, {number}{_noted(device + rows)}, fingerprints, "
        f"versions of libraries, the precision {actual_precision(config.train, graft.device.type)}"
    )
    if stays:
        typer.echo(f"would not leave it: the notes on its rows{_noted(stays)}")
    if advice := precision_advice(config, graft.device.type):
        typer.echo(advice)
    # Some strategies send another part in every second round; the larger one counts.
    strategy = strategy_of(config.strategy)
    most = max(strategy.trained_part(graft.spec, round_number).size_bytes for round_number in (1, 2))
    sizes = f"{graft.spec.parameters('adapter')} adapter and {graft.spec.parameters('head')} head parameters"
    typer.echo(f"would leave it in each round: {sizes}, {most:,} bytes{_beside_the_update(site, config, told)}")
    if kept and "metrics" in told:
        typer.echo("would leave it where the run evaluates at sites: metrics on the evaluation rows, and their number")


@site_app.command(epilog="Example: tsugiki site approve june --site site.toml")
def approve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="The name of a run that the server has asked for.")],
    site_file: Annotated[Path, typer.Option("--site", help="The site's file.")] = Path("site.toml"),
    yes: Annotated[bool, typer.Option("--yes", help="Show it, and do not ask.")] = False,
) -> None:
    """Say yes to a run, if [policy] ask is set: show its settings and what would leave this site, then ask."""
    from tsugiki.client.site.approvals import read_asked
    from tsugiki.client.site.site import read_site
    from tsugiki.common.config.files import to_toml

    site = read_site(site_file)
    asked = read_asked(site.folder, run)
    typer.echo(to_toml(asked.config))
    _print_replies(site, asked.config)
    if not yes:
        typer.confirm(f"take part in the run {run!r}?", abort=True)
    asked.approve()
    typer.echo("approved; the server asks again within minutes, and at once if the client is started again")


@site_app.command(epilog="Example: tsugiki site split examples/sst2.toml sites")
def split(
    file: RunFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a folder for each site is made.")],
    overrides: Set = None,
) -> None:
    """Write a simulation's sites as folders with rows and a site.toml: to try a deployment out."""
    from tsugiki.client.site import split as splitting
    from tsugiki.common.config.files import read

    for path in splitting.split(read(file, overrides or []), folder):
        typer.echo(path)


def _told_kinds(site: FileSite, config: RunConfig) -> list[str]:
    """Return the kinds of facts about its rows that a site tells in a run."""
    if config.privacy.mode != "none":
        return []
    # DP-SGD takes the number of rows as known, and protects all else.
    return [kind for kind in site.policy.tell if kind == "rows" or not config.privacy.examples.enabled]


def _beside_the_update(site: FileSite, config: RunConfig, told: Sequence[str]) -> str:
    """Return what leaves a site with each update, as the end of a sentence."""
    if config.privacy.mode != "none":
        return ""
    beside = ["steps", "seconds"]
    if "rows" in told:
        beside.insert(0, "rows")
    if "metrics" in told and site.policy.may_leave({"loss": 0.0}):
        beside.insert(0, "loss")
    return f", and {', '.join(beside)}"


def _noted(notes: Sequence[str]) -> str:
    return f" ({', '.join(notes)})" if notes else ""
