"""The privacy budget in words and tables, for a terminal of 80 columns or a log."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tsugiki.common.privacy.mechanisms import MECHANISMS, Adversary
from tsugiki.server.budget.alternatives import Lever, Row

if TYPE_CHECKING:
    from rich.console import RenderableType

    from tsugiki.server.budget.assessment import Assessment, View
    from tsugiki.server.budget.budget import Budget, Size

_UNPROTECTED: dict[Adversary, str] = {
    "release": "none: they see the means as they are",
    "outsiders": "none: they see the means as they are",
    "sums": "none: it sees the sums as they are",
    "uploads": "none: it sees the updates as they are",
}
_COLUMNS: tuple[Adversary, ...] = ("release", "sums", "uploads")
"""The adversaries in the table of other modes. In mode distributed, outsiders learn as much as the server of sums."""
_VERDICTS = {
    "hopeless": ("red", "Nothing can be learned like this."),
    "hard": ("yellow", "Hard: little can be learned like this."),
    "possible": ("green", "Something can be learned like this."),
    "no-noise": ("yellow", "No noise: learning is not disturbed, and nothing bounds what the models give away."),
}
_LEVERS = {"clients": "clients in a round (n)", "parameters": "parameters (d)", "rounds": "rounds (T)"}

_EMPTY_PROMISE = 20.0
"""Above this epsilon, an event with a prior probability of 10^-8 may become likely."""


def show(budget: Budget, file: Path, plot: Path | None = None, console: Console | None = None) -> None:
    """Print the budget in words and tables.

    Args:
        budget: the numbers.
        file: the run file, for the command that is suggested.
        plot: path of a figure that was written, to be shown at the end.
        console: where to print; by default standard output.
    """
    console = console or Console(highlight=False)
    for part in _parts(budget, file):
        console.print(part, soft_wrap=isinstance(part, Text))
    if plot is not None:
        console.print(f"plot: {plot}", soft_wrap=True, markup=False)


def _parts(budget: Budget, file: Path) -> Iterator[RenderableType]:
    found = budget.assessment
    if found is None:
        yield from _unprotected(budget, file)
    else:
        yield _heading(f"{budget.run}: mode {budget.mode}, {MECHANISMS.get(budget.mode).title}")
        yield from _plan(budget, found)
        yield _heading("What each adversary may learn about a client in all rounds together (epsilon)")
        yield from _adversaries(found)
        yield _heading("What the noise leaves of a round's mean update")
        yield from _learning(found)
        if found.growth > 1 or found.dropouts:
            yield _heading("What it costs if clients drop out, and if none does")
            yield from _dropouts(found)
    yield _heading("Other modes, other numbers of clients")
    yield from _table(budget)


def _heading(text: str) -> Text:
    return Text(f"\n{text}", style="bold")


def _indented(content: RenderableType) -> Padding:
    return Padding(content, (0, 0, 0, 2), expand=False)


def _paragraph(*sentences: str, style: str = "") -> Padding:
    return _indented(Text(" ".join(sentence for sentence in sentences if sentence), style=style))


def _pairs(rows: list[tuple[str, str]]) -> Padding:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name), Text(value))
    return _indented(grid)


def _unprotected(budget: Budget, file: Path) -> Iterator[RenderableType]:
    yield _heading(f"{budget.run}: mode none, nothing bounds what an update gives away")
    yield _pairs([("rounds (T)", f"{budget.base.rounds:,}"), ("parameters (d)", _size(budget.size))])
    yield _paragraph(
        f"Below is what each mode would cost at epsilon {_short(budget.target_epsilon)}. More about one of them:"
    )
    settings = f"--set privacy.mode=distributed --set privacy.target_epsilon={_short(budget.target_epsilon)}"
    yield Text(f"  tsugiki budget {shlex.quote(str(file))} {settings}")


def _plan(budget: Budget, found: Assessment) -> Iterator[RenderableType]:
    plan = found.plan
    clients = f"{budget.clients:,}"
    if plan.denominator:
        clients += f", on average: each with q = {plan.sampling_probability:g}"
    least = f"{plan.min_clients:,}"
    if plan.honest_fraction < 1:
        least += f", {plan.honest_fraction:.4g} of them honest (h)"
    rows = [
        ("clients enrolled (N)", f"{plan.enrolled_clients:,}"),
        ("clients in a round (n)", clients),
        ("least clients in a sum (n_min)", least),
        ("rounds (T)", f"{plan.rounds:,}"),
        ("clip norm (C)", f"{plan.clip_norm:g}"),
        ("noise multiplier (z)", _noise_multiplier(budget, found)),
        ("delta", f"{plan.delta:g}"),
        ("parameters (d)", _size(budget.size)),
        ("integers", f"modulo 2^{plan.modulus_bits}, {plan.levels:,} to a clip norm"),
    ]
    if plan.mode == "distributed":
        rows.append(("most clients of a site (k)", f"{plan.max_clients_per_site:,}, whose noise it knows"))
        rows.append(("secure aggregation", "yes" if plan.secure_aggregation else "no"))
    yield _pairs(rows)
    if found.rounds_allowed < plan.rounds:
        ends = f"The budget of {_short(plan.target_epsilon)} ends the run after {found.rounds_allowed:,} of its rounds."
        yield _paragraph(ends, style="red")
    if not plan.private and plan.noise_multiplier:
        yield _paragraph("NOT PRIVATE: the noise follows from privacy.insecure_noise_seed.", style="red")


def _noise_multiplier(budget: Budget, found: Assessment) -> str:
    """Return the noise multiplier and where it comes from."""
    plan = found.plan
    if not plan.noise_multiplier:
        return "0: no noise"
    if not found.calibrated:
        return f"{plan.noise_multiplier:g}, as given"
    assumed = " (assumed: the run file has no budget)" if budget.assumed else ""
    return f"{plan.noise_multiplier:g}, calibrated for epsilon {_short(plan.target_epsilon)}{assumed}"


def _size(size: Size) -> str:
    text = f"{size.total:,}"
    if size.head:
        text += f": {size.adapter:,} of the adapter, {size.head:,} of the head"
    if size.otherwise is not None:
        other = "no" if size.freeze_a == "yes" else "yes"
        text += f'\n{size.otherwise:,} with adapter.freeze_a = "{other}"'
    return text


def _adversaries(found: Assessment) -> Iterator[RenderableType]:
    plan = found.plan
    rows = [(_adversary(view), _limit(view)) for view in found.views]
    if found.strict_epsilon is not None:
        rows.append(("the same between any two updates, where z counts half", _epsilon(found.strict_epsilon)))
    yield _pairs(rows)
    if plan.sampling_probability < 1:
        cohort = "Who is in a round is drawn by secret coins, and the epsilon of the models counts on that secret."
    else:
        cohort = "The cohort counts as fixed and known: no amplification by sampling, every client in every round."
    compared = f"Delta is {plan.delta:g}; a client that takes part is compared with one that takes part with nothing."
    yield _paragraph(cohort, compared, "Earlier runs on the same clients and repeated rounds come on top.")


def _adversary(view: View) -> str:
    """Return an adversary's description; if this plan shows it nothing, with the switch that would."""
    if view.here:
        return view.words
    switched = {"sums": "with", "uploads": "without"}.get(view.who, "")
    return f"{view.words} ({switched} secure aggregation)"


def _limit(view: View) -> str:
    """Return an adversary's epsilon and its budget, or that nothing limits it."""
    if math.isinf(view.epsilon):
        return _UNPROTECTED[view.who]
    if view.budget is None:
        return _epsilon(view.epsilon)
    return f"{_epsilon(view.epsilon)}, budget {_short(view.budget)}"


def _learning(found: Assessment) -> Iterator[RenderableType]:
    table = Table(box=SIMPLE, pad_edge=False)
    for name in ("clients", "noise on a coordinate", "norm of the noise", "signal / noise at most"):
        table.add_column(name, justify="right")
    for noise in found.noise:
        table.add_row(f"{noise.clients:,}", _short(noise.coordinate), _short(noise.norm), _ratio(noise.bound))
    yield _indented(table)
    colour, verdict = _VERDICTS[found.verdict]
    bound = found.noise[-1].bound
    rounds = found.plan.rounds
    why = ""
    if math.isfinite(bound):
        # Signal adds up over rounds, noise only by the square root of their number.
        total = _ratio(bound * math.sqrt(rounds))
        why = (
            f"In a round, signal / noise is at most {_ratio(bound)}, because no mean update is longer than the clip "
            f"norm; summed over {rounds:,} rounds that all pull the same way, at most {total}."
        )
    yield _paragraph(verdict, why, style=colour)
    if found.levers:
        yield _paragraph("Each of these alone, with the noise found anew, would make the bound of a round 1:")
        yield _pairs([(f"  {_LEVERS.get(lever.name, lever.name)}", _lever(lever)) for lever in found.levers])
        if found.plan.min_clients < found.noise[-1].clients:
            yield _paragraph("The least number of clients in a sum is to grow in proportion.")


def _lever(lever: Lever) -> str:
    if lever.needed is None:
        return f"no number is enough, now {_short(lever.now)}"
    text = f"{_short(lever.needed)} instead of {_short(lever.now)}"
    if lever.delta is not None:
        text += f", and delta {lever.delta:g}"
    if lever.name == "epsilon" and lever.needed > _EMPTY_PROMISE:
        text += ", which promises nothing"
    return text


def _dropouts(found: Assessment) -> Iterator[RenderableType]:
    least = found.plan.min_clients
    if found.dropouts:
        yield _paragraph(f"A sum over fewer than {least:,} clients lacks noise. Opened all the same in every round:")
        yield _pairs([(f"  {one.clients:,} of {least:,} clients", _models(one.epsilon)) for one in found.dropouts])
        yield _paragraph("The program refuses to open such a sum; the round is void.")
    if found.growth > 1:
        every = f"With all {found.noise[-1].clients:,} clients, a sum has {found.growth:.3g} times the noise it needs"
        yield _paragraph(f"{every}, sqrt(n / (h n_min)).")


def _models(epsilon: float) -> str:
    """Return the epsilon of the models in words."""
    if math.isinf(epsilon):
        return "no epsilon of the models: a site may know all noise"
    return f"epsilon of the models {_epsilon(epsilon)}"


def _table(budget: Budget) -> Iterator[RenderableType]:
    plan = budget.base
    modes = len(MECHANISMS.names())
    assumed = " (assumed)" if budget.assumed else ""
    yield _paragraph(
        f"At epsilon {_short(budget.target_epsilon)}{assumed}, delta {plan.delta:g}, {plan.rounds:,} rounds, clip norm "
        f"{plan.clip_norm:g}, {plan.dimension:,} parameters; with all n clients in every sum."
    )
    table = Table(box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("n", "mode", "z", "noise", "bound", *_COLUMNS):
        table.add_column(name, justify="left" if name == "mode" else "right")
    for position, row in enumerate(budget.table, 1):
        style = "bold" if row.clients == budget.clients else ""  # the run's own number of clients
        table.add_row(*_cells(row), end_section=position % modes == 0, style=style)
    yield _indented(table)
    refused = ""
    if any(row.noise is None for row in budget.table):
        refused = (
            "refused: delta is not below 1 / N, the noise is too much to be drawn, or a site may know nearly all of it."
        )
    yield _paragraph(
        "noise: standard deviation on a coordinate of the mean. bound: signal / noise at most, in a round. release, "
        "sums, uploads: epsilon of those who see the models, of the server with secure aggregation and without; "
        "none: it sees updates as they are. In mode distributed, sums holds for outsiders who see the models, too.",
        refused,
    )


def _cells(row: Row) -> list[str]:
    if row.noise is None or row.noise_multiplier is None:
        return [f"{row.clients:,}", row.mode, "refused"]
    numbers = [f"{row.noise_multiplier:g}", f"{row.noise.coordinate:.3g}", _ratio(row.noise.bound)]
    spent = [_epsilon(row.epsilon[adversary]) if adversary in row.epsilon else "-" for adversary in _COLUMNS]
    return [f"{row.clients:,}", row.mode, *numbers, *spent]


def _epsilon(value: float) -> str:
    if math.isinf(value):
        return "none"
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _ratio(value: float) -> str:
    if math.isinf(value):
        return "no limit"
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _short(value: float) -> str:
    whole = value == round(value) or value >= 10_000
    return f"{value:,.0f}" if whole else f"{value:.4g}"
