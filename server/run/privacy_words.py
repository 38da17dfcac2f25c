"""A run's privacy figures in words: what they cover, against whom, under which assumptions, and what they do not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tsugiki.common.privacy.mechanisms import ADVERSARIES, MECHANISMS, Adversary

NOT_PRIVATE = "NOT PRIVATE"
"""Part of every output of a run whose noise hides nothing."""

OPEN = (
    "Mode none: updates were averaged as they are; nothing in this report limits what an update reveals. Whoever "
    "receives a site's update can learn something about the rows that it was trained on."
)
UNIT = (
    "The unit is one client with all its rows over all runs on this ledger: the figures bound how much better anybody "
    "can tell whether a client took part with its data or with none (zero-out adjacency). They hold for the clients "
    "that ran this program unchanged. A person who is behind several clients is protected less, and rows that several "
    "clients share are not hidden."
)
_ASSUMES = {
    "central": "The server is trusted: it sees every clipped update as it is, adds the noise, and forgets.",
    "local": "Nobody is trusted. Between any two updates that a client might send (in place of one against none) the "
    "noise counts half.",
    "distributed": "Of the clients in a sum, at least the planned honest share add their noise and keep it to "
    "themselves.",
}
_SITES = (
    "Another site knows the noise of its own clients. The figure for the models holds against the site with the most "
    "clients that the plan allows; outsiders learn less."
)
_SAMPLED = (
    "Clients were sampled by secret coins (poisson), and the figures count on it: they hold only against whoever does "
    "not know who was asked in which round."
)


def format_epsilon(epsilon: float | None) -> str:
    """Return an epsilon as text. None means that nothing is protected."""
    return "none at all" if epsilon is None else f"epsilon {epsilon:.3g}"


def headline(privacy: Mapping[str, Any]) -> str:
    """Return one line for a terminal or a log; empty for a run without privacy.

    Args:
        privacy: `summary.json`'s entry.
    """
    if privacy.get("mode", "none") == "none":
        return ""
    if not privacy["private"]:
        return f"{NOT_PRIVATE}: {_why_not(privacy)}"
    spent = _epsilons(privacy)
    parts = [f"{format_epsilon(value)} against {ADVERSARIES[adversary]}" for adversary, value in spent.items()]
    return f"{privacy['mode']} privacy, delta {privacy['delta']:g}: " + "; ".join(parts)


def statement(privacy: Mapping[str, Any]) -> list[str]:
    """Return paragraphs: the figures, and everything that has to be known to read them.

    Args:
        privacy: `summary.json`'s entry.
    """
    mode = privacy.get("mode", "none")
    if mode == "none":
        return [OPEN]
    # a plugin's mode may be missing where the report is written
    title = "unknown here"
    if mode in MECHANISMS.names():
        title = MECHANISMS.get(mode).title
    first = f"Mode {mode}: {title}. Updates were clipped to an L2 norm of {privacy['clip_norm']:g}."
    if not privacy["private"]:
        return [first, f"{NOT_PRIVATE}: {_why_not(privacy)}", *_server_view(privacy)]
    delta = f"delta {privacy['delta']:g}"
    figures = [
        f"Against {ADVERSARIES[adversary]}: {format_epsilon(value)} at {delta}, by the ledger so far."
        for adversary, value in _epsilons(privacy).items()
    ]
    paragraphs = [first, " ".join(figures), UNIT, _ASSUMES.get(mode, "")]
    # Without their own figure, the run's account is older, or outsiders see what sites see.
    if "outsiders" in privacy["epsilon"]:
        paragraphs.append(_SITES)
    if privacy.get("sampling_probability", 1.0) < 1:
        paragraphs.append(_SAMPLED)
    return [*paragraphs, *_server_view(privacy), _caveat()]


def audit_statement(audit: Mapping[str, Any]) -> list[str]:
    """Return paragraphs: what an attacker found about each ledger, with what has to be known to read it.

    Args:
        audit: `privacy_audit.json`; empty: there was none.
    """
    if not audit:
        return []
    lines = [
        f"Against {ADVERSARIES[ledger['adversary']]}: claimed {_claim(ledger['claimed'])}; an attacker found at least "
        f"{_at_least(ledger['found']['largest'])}{'' if ledger['holds'] else ', WHICH BREAKS THE CLAIM'} "
        f"(without noise, as a control: {_at_least(ledger['control']['largest'])})."
        for ledger in audit["ledgers"]
    ]
    weakest = min(ledger["control"]["largest"] for ledger in audit["ledgers"])
    words = (
        f"Audit by attack: {audit['trials']:,} clients planted in {audit['runs']} simulated runs, "
        f"{audit['confidence']:.0%} confidence, delta {audit['delta']:g}. The figures are lower bounds: they can "
        "refute a claim, and never prove one. The control's is about the most that so many can show."
    )
    if weakest < STRONG:
        words += f" Here that is only {_at_least(weakest)}: more trials would find more."
    return [*lines, words]


STRONG = 5.0
"""An attack that finds less than this without noise is weak."""


def _at_least(epsilon: float) -> str:
    """Return a lower bound with one decimal place, rounded down: rounded up, it would say too much."""
    return f"{math.floor(epsilon * 10) / 10:.1f}"


def _claim(epsilon: float | None) -> str:
    return "nothing" if epsilon is None else f"{epsilon:.1f}"


def rows_statement(rows: Mapping[str, Any]) -> list[str]:
    """Return a paragraph about DP-SGD at the sites, which protects rows, not clients. Empty without DP-SGD.

    Args:
        rows: `summary.json`'s entry `rows_privacy`.
    """
    if not rows:
        return []
    largest = _bound(rows["largest"])
    median = _bound(rows["median"])
    return [
        f"Another promise, apart from the figures above: by DP-SGD, one row of a site is protected from whoever sees "
        f"the site's uploads: epsilon {largest} at the site with the most, {median} at the "
        f"median of {rows['sites']}, delta {rows['delta']:g}. It does not cover a client, whose rows are many, and "
        "takes the number of a site's rows as known."
    ]


def _bound(epsilon: float | None) -> str:
    if epsilon is None:
        return "no bound"
    return f"{epsilon:.3g}"


def _epsilons(privacy: Mapping[str, Any]) -> dict[Adversary, float | None]:
    """Return the epsilons by adversary, in the order of `ADVERSARIES`."""
    spent = privacy["epsilon"]
    found: dict[Adversary, float | None] = {
        adversary: spent[adversary] for adversary in ADVERSARIES if adversary in spent
    }
    return found


def _why_not(privacy: Mapping[str, Any]) -> str:
    if privacy["noise_multiplier"] > 0:
        return "the noise came from a known seed, so anybody can draw it again; this is for tests only."
    return "no noise was added, so the models limit nothing of what they reveal."


def _server_view(privacy: Mapping[str, Any]) -> list[str]:
    """Return a paragraph about what the server could see, if there is something to say."""
    if privacy["secure_aggregation"]:
        return [
            "By secure aggregation the server saw sums of at least the planned number of clients, and no single "
            "update. At sites that pin their members that holds against a server that lies, unless too many members "
            "help it; at other sites it does not hold against a server that invents sites."
        ]
    if privacy["mode"] == "distributed":
        return [
            "Without secure aggregation a share of the noise protects little from the server itself, which sees each "
            "upload: read its own figure, not that of the models."
        ]
    return []


def _caveat() -> str:
    return (
        "No amplification by sampling is claimed unless the plan says poisson. Rounds are synchronous; what sites "
        "reveal by being there, dropping out, taking long, or by settings that were chosen on the same data is not "
        "counted. The implementation is tested, not audited."
    )
