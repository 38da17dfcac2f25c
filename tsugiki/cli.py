"""The command line of Tsugiki. Imports nothing heavy: `tsugiki --help` answers at once.

Commands live in `server/commands/runs.py` and `client/commands.py`; here they are declared, and server and client
composed: the engines get the simulated sites' ClientApp as an argument, because the server does not know the client.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(
    name="tsugiki",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Federated fine-tuning of a frozen base model with small adapters. Data stays where it is; only adapter "
    "updates travel.\n\nStart with [bold]tsugiki demo[/bold], then [bold]tsugiki config init[/bold].",
)
config_app = typer.Typer(no_args_is_help=True, help="Write, show and describe run files.")
site_app = typer.Typer(no_args_is_help=True, help="Write and check a site's own file; split a simulation into sites.")
keys_app = typer.Typer(no_args_is_help=True, help="Make, register, list and revoke the keys of nodes.")
app.add_typer(config_app, name="config")
app.add_typer(keys_app, name="keys")
app.add_typer(site_app, name="site")

Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting: --set train.local_steps=10")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RunFile = Annotated[Path, typer.Argument(metavar="FILE", help="The run's TOML file.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The run's folder, such as runs/demo.")]
Keys = Annotated[Path, typer.Option("--keys", metavar="DIR", help="The registered nodes' public keys.")]


def _show_version(wanted: bool) -> None:
    if wanted:
        from tsugiki.common import __version__

        print(__version__)
        raise typer.Exit


Version = Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")]


@app.callback()
def _options(version: Version = False) -> None:
    pass


@app.command(epilog="Example: tsugiki demo --seed 1 --output-dir /tmp/runs")
def demo(
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 42,
    output_dir: Annotated[Path, typer.Option(help="Where the run's folder is made.")] = Path("runs"),
    baselines: Annotated[bool, typer.Option(help="Also train each company alone, to compare.")] = True,
    data_only: Annotated[bool, typer.Option("--data-only", help="Write the data and run file; run nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Run the whole thing on generated contract clauses: four companies, one search for similar clauses."""
    from tsugiki.server.commands import runs as commands

    if data_only:
        if as_json or not baselines:
            raise typer.BadParameter("--data-only goes with --seed and --output-dir only")
        commands.demo_data(seed, output_dir)
        return
    from tsugiki.client.app import simulated_app

    commands.demo(seed, output_dir, baselines, as_json, simulated_app)


@app.command(epilog="Examples: tsugiki simulate examples/sst2.toml; tsugiki simulate --resume runs/sst2")
def simulate(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The run's TOML file.")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on from a run's last checkpoint.")] = None,
    previous: Annotated[bool, typer.Option(help="With --resume: from the checkpoint before the last.")] = False,
    engine: Annotated[Literal["in-process", "ray"] | None, typer.Option(help="Instead of simulation.engine.")] = None,
    export: Annotated[bool, typer.Option(help="Export the best adapter when the run has ended.")] = True,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run a whole federation on this machine."""
    from tsugiki.client.app import simulated_app
    from tsugiki.server.commands import runs as commands

    commands.simulate(file, resume, previous, engine, overrides or [], export, as_json, simulated_app)


@app.command(epilog="Examples: tsugiki serve run.toml --listen 0.0.0.0:9092; tsugiki serve --resume runs/a")
def serve(
    file: Annotated[Path | None, typer.Argument(metavar="[FILE]", help="The run's TOML file.")] = None,
    listen: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where sites connect.")] = "127.0.0.1:9092",
    tls: Annotated[Path, typer.Option("--tls", metavar="DIR", help="From `tsugiki certs`.")] = Path("tls"),
    keys: Keys = Path("keys"),
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys; on loopback only.")] = False,
    wait: Annotated[float, typer.Option(metavar="SECONDS", help="For sites; 0: strategy.connect_timeout_s.")] = 0,
    superlink: Annotated[str, typer.Option(metavar="HOST:PORT", help="Use a SuperLink that runs already.")] = "",
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="Go on from a run's last checkpoint.")] = None,
    previous: Annotated[bool, typer.Option(help="With --resume: from the checkpoint before the last.")] = False,
    export: Annotated[bool, typer.Option(help="Export the best adapter when the run has ended.")] = True,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Run a federation over a network: a SuperLink, and the run on it, until the run is over."""
    from tsugiki.server.commands import deployment as commands

    commands.serve(
        file, resume, previous, listen, tls, keys, insecure, superlink, wait, overrides or [], export, as_json
    )


@app.command(
    epilog="Examples: tsugiki client --server fed.example.org:9092 --ca ca.crt --key acme; "
    "tsugiki client --dry-run federation.toml"
)
def client(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server; default: site.toml's.")] = "",
    site: Annotated[Path, typer.Option(help="The site's file.")] = Path("site.toml"),
    ca: Annotated[Path | None, typer.Option("--ca", help="The federation's CA certificate.")] = None,
    key: Annotated[Path | None, typer.Option("--key", help="This node's private key.")] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key; on loopback only.")] = False,
    retry: Annotated[float, typer.Option(metavar="SECONDS", help="Keep trying to connect for so long.")] = 600,
    dry_run: Annotated[Path | None, typer.Option(metavar="FILE", help="Show what would be sent; send nothing.")] = None,
    overrides: Set = None,
) -> None:
    """Take part with this site's data: connect to a server and answer it until stopped."""
    from tsugiki.client import commands

    if dry_run is not None:
        commands.dry_run(site, dry_run, overrides or [])
    elif overrides:
        raise typer.BadParameter("--set goes with --dry-run: the server says how a run is")
    else:
        commands.client(server, site, ca, key, insecure, retry)


@app.command(epilog="Example: tsugiki certs --host fed.example.org --host 203.0.113.7")
def certs(
    host: Annotated[list[str] | None, typer.Option("--host", help="A name or address of the server; repeat.")] = None,
    tls: Annotated[Path, typer.Option("--tls", metavar="DIR", help="Where the files go.")] = Path("tls"),
    days: Annotated[int, typer.Option(min=1, max=3650, help="How long the certificate is good for.")] = 397,
) -> None:
    """Make the server's certificate, and the CA that signs it if there is none yet."""
    from tsugiki.server.commands import deployment as commands

    commands.certs(tls, host or [], days)


@keys_app.command("new", epilog="Example: tsugiki keys new acme")
def keys_new(path: Annotated[Path, typer.Argument(help="The private key; PATH.pub is the public one.")]) -> None:
    """Make a node's key pair, at the site."""
    from tsugiki.server.commands import deployment as commands

    commands.keys_new(path)


@keys_app.command("register", epilog="Example: tsugiki keys register acme.pub")
def keys_register(
    public: Annotated[Path, typer.Argument(help="The site's public key.")],
    name: Annotated[str, typer.Option(help="The site's name; default: that of the file.")] = "",
    keys: Keys = Path("keys"),
) -> None:
    """Let a node take part."""
    from tsugiki.server.commands import deployment as commands

    commands.keys_register(public, name, keys)


@keys_app.command("list", epilog="Example: tsugiki keys list")
def keys_list(keys: Keys = Path("keys")) -> None:
    """List the registered nodes and their keys' fingerprints."""
    from tsugiki.server.commands import deployment as commands

    commands.keys_list(keys)


@keys_app.command("revoke", epilog="Example: tsugiki keys revoke acme")
def keys_revoke(name: Annotated[str, typer.Argument(help="The node's name.")], keys: Keys = Path("keys")) -> None:
    """Shut a node out."""
    from tsugiki.server.commands import deployment as commands

    commands.keys_revoke(name, keys)


@app.command(epilog="Example: tsugiki compare examples/sst2.toml --set run.rounds=3")
def compare(file: RunFile, overrides: Set = None, as_json: Json = False) -> None:
    """Compare federated training with centralised, local-only and no training, on the same data and steps."""
    from tsugiki.client.app import simulated_app
    from tsugiki.server.commands import runs as commands

    commands.compare(file, overrides or [], as_json, simulated_app)


@app.command(epilog="Example: tsugiki budget federation.toml --set privacy.mode=distributed --plot budget.svg")
def budget(
    file: RunFile,
    dimension: Annotated[int, typer.Option(metavar="D", min=0, help="Parameters of an update; 0: the model says.")] = 0,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a .svg or .png to write.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Plan privacy, and train nothing: the noise for a budget, what each adversary sees, what is left to learn."""
    from tsugiki.server.commands.plans import budget as plan

    plan(file, overrides or [], dimension, plot, as_json)


@app.command(epilog="Example: tsugiki lr-find examples/sst2.toml --plot rates.svg")
def lr_find(
    file: RunFile,
    lowest: Annotated[float, typer.Option(help="The rate to begin with.")] = 1e-6,
    highest: Annotated[float, typer.Option(help="The rate to end with.")] = 1.0,
    steps: Annotated[int, typer.Option(min=20, max=10_000, help="How many rates to try.")] = 100,
    central: Annotated[
        bool, typer.Option("--central", help="On all rows of the simulation's file, not on its first site's alone.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Also draw it: a .svg or .png to write.")] = None,
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Suggest a learning rate: train a little while the rate grows, and see where the loss falls fastest."""
    from tsugiki.client import commands

    commands.lr_find(file, overrides or [], lowest, highest, steps, central, plot, as_json)


@app.command(
    epilog="Examples: tsugiki methods; tsugiki methods --model HuggingFaceTB/SmolLM2-135M; tsugiki methods run.toml"
)
def methods(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="A run's TOML file; its settings count.")
    ] = None,
    model: Annotated[str, typer.Option(help="The base; by default the run's, or all-MiniLM.")] = "",
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """List which adapter methods go with which tasks on a base, with sizes, and why the others do not."""
    from tsugiki.server.methods import methods as list_methods

    list_methods(file, model, overrides or [], as_json)


@app.command(epilog="Example: tsugiki export runs/sst2 --merged")
def export(
    run: RunFolder,
    target: Annotated[Path | None, typer.Option(help="Where to; by default a folder inside the run's.")] = None,
    which: Annotated[Literal["best", "last"], typer.Option(help="Which round's adapter.")] = "best",
    merged: Annotated[bool, typer.Option(help="Write a whole model with the adapter in its weights.")] = False,
) -> None:
    """Write a run's adapter in a form that others load, and prove in a fresh process that it works."""
    from tsugiki.server.commands import runs as commands

    commands.export(run, target, which, merged)


@app.command(
    epilog='Examples: tsugiki predict runs/sst2 "A fine film."; tsugiki predict runs/reviews --file new.csv --json; '
    'tsugiki predict runs/nextword "How do I" --without-adapter; '
    'tsugiki predict --adapter runs/tone/adapter --adapter runs/topic/adapter "A fine film."'
)
def predict(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN] [TEXT]...", help="The run's folder; rows of one text each, or pictures' files."),
    ] = None,
    adapters: Annotated[
        list[Path] | None, typer.Option("--adapter", metavar="DIR", help="An export, instead of RUN; repeat.")
    ] = None,
    model: Annotated[str, typer.Option(help="With --adapter: the base, if not under its public name.")] = "",
    file: Annotated[Path | None, typer.Option(help="A file of rows instead, in the run's own data format.")] = None,
    columns: Annotated[
        str, typer.Option(help='With --adapter: how the columns of --file are called, as "text=sentence".')
    ] = "",
    which: Annotated[Literal["best", "last"], typer.Option(help="Which round's adapter.")] = "best",
    without_adapter: Annotated[bool, typer.Option("--without-adapter", help="Ask the bare base, to compare.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, max=8192, help="Of a continuation or an answer.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=10.0, help="0: the likeliest token at each step; else tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Ask a run's model, or exported adapters on one base: for labels, scores, cosines, or how a text goes on."""
    from tsugiki.common.tasks.base import Generation
    from tsugiki.server.predict import ask, show

    how, on = Generation(max_new_tokens, temperature, seed), not without_adapter
    found = ask(words or [], adapters or [], model, file, how, which=which, adapter=on, columns=columns)
    typer.echo(show(found, as_json), nl=False)


@app.command(epilog="Example: tsugiki report runs/sst2")
def report(run: RunFolder) -> None:
    """Write report.html: curves, bytes, seconds, and who was rejected why. It needs no network to read."""
    from tsugiki.server.commands import runs as commands

    commands.report(run)


@config_app.command("init", epilog="Example: tsugiki config init clauses.toml --task sentence-embedding")
def config_init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("federation.toml"),
    task: Annotated[str, typer.Option(help="The task.")] = "sequence-classification",
    method: Annotated[str, typer.Option(help="The adapter method.")] = "lora",
    strategy: Annotated[str, typer.Option(help="The strategy.")] = "fedavg",
) -> None:
    """Write a run file with every setting, its default and its meaning."""
    from tsugiki.server.commands import runs as commands

    commands.config_init(file, task, method, strategy)


@config_app.command("show", epilog="Example: tsugiki config show examples/sst2.toml --set train.learning_rate=1e-4")
def config_show(file: RunFile, overrides: Set = None, as_json: Json = False) -> None:
    """Show what a run file resolves to, and which settings differ from their defaults."""
    from tsugiki.server.commands import runs as commands

    commands.config_show(file, overrides or [], as_json)


@config_app.command("schema", epilog="Example: tsugiki config schema > schema.json")
def config_schema() -> None:
    """Print the JSON schema of all settings, of every task, method and strategy."""
    from tsugiki.server.commands import runs as commands

    commands.config_schema()


@site_app.command("init", epilog="Example: tsugiki site init --name acme --train data/contracts.csv")
def site_init(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("site.toml"),
    name: Annotated[str, typer.Option(help="This site's name in the federation.")] = "my-site",
    train: Annotated[str, typer.Option(help="The file with the private rows.")] = "train.csv",
) -> None:
    """Write a commented site.toml."""
    from tsugiki.client import commands

    commands.site_init(file, name, train)


@site_app.command("check", epilog="Example: tsugiki site check site.toml --run federation.toml")
def site_check(
    file: Annotated[Path, typer.Argument(help="The site's file.")] = Path("site.toml"),
    run: Annotated[Path | None, typer.Option(metavar="FILE", help="Also try the site against this run.")] = None,
    overrides: Set = None,
) -> None:
    """Try a site.toml: is the file right, can the data be read, does the model load?"""
    from tsugiki.client import commands

    commands.site_check(file, run, overrides or [])


@site_app.command("split", epilog="Example: tsugiki site split examples/sst2.toml sites")
def site_split(
    file: RunFile,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where a folder for each site is made.")],
    overrides: Set = None,
) -> None:
    """Write a simulation's sites as folders with rows and a site.toml: to try a deployment out."""
    from tsugiki.client import commands

    commands.site_split(file, folder, overrides or [])


@app.command(epilog="Example: tsugiki doctor --json")
def doctor(as_json: Json = False) -> None:
    """Look at this machine: versions, devices, what is missing, and what to do about it."""
    from tsugiki.server.commands import runs as commands

    commands.doctor(as_json)


def main() -> None:
    """Run the command line. Errors become one message and an exit status."""
    from tsugiki.common.errors import TsugikiError

    try:
        app()
    except TsugikiError as error:
        print(f"tsugiki: {error.code}: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
