"""Compare the epsilon that is printed for a site of the sums with computations that share no code with the program.

    python scripts/studies/member_epsilon.py [--epsilon 8] [--delta 1e-5] [--rounds 1 20] [--dimension 75000]

In mode `distributed` each client adds a share of the noise, of standard deviation z / sqrt(h n_min) clip norms. A site
knows its own share, so n_min - 1 shares hide the others from it (h = 1, one client a site). For 2 to 100 sites, the
program calibrates z for a budget and prints the epsilon of another site (`release`) and of outsiders. Here the same
epsilons come from that standard deviation alone:

- exact: the analytic Gaussian mechanism, solved by bisection (Balle and Wang 2018, arXiv:1805.06530, theorem 8);
- PLD: privacy loss distributions, composed round by round (dp-accounting);
- PRV: privacy random variables (Gopi et al. 2021, arXiv:2106.02848; opacus, extra `privacy`), whose own error is at
  most 0.01 of the value.

The program's noise is Skellam noise, which costs a little more than Gaussian noise. The last column is the exact
epsilon of another site under the account of earlier versions: z was calibrated by Renyi divergence, and for outsiders
alone.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from figures import Figure, show

import tsugiki  # noqa: F401  (first: it switches off what would phone home)
from tsugiki.common.config.parse import parse
from tsugiki.common.privacy.mechanisms import epsilon_after
from tsugiki.common.privacy.planning import make_plan

SITES = (2, 3, 5, 10, 100)


@dataclass(frozen=True)
class Row:
    """The figures of one number of sites.

    Args:
        sites: number of sites in each sum.
        rounds: of the run.
        noise_multiplier: that the program found.
        printed: epsilon of another site, by the program.
        exact: the same, by the analytic Gaussian mechanism.
        by_pld: the same, by privacy loss distributions.
        by_prv: the same, by privacy random variables.
        outsiders: epsilon of outsiders, by the program.
        outsiders_exact: the same, by the analytic Gaussian mechanism.
        before: exact epsilon of another site under the account of earlier versions.
    """

    sites: int
    rounds: int
    noise_multiplier: float
    printed: float
    exact: float
    by_pld: float
    by_prv: float
    outsiders: float
    outsiders_exact: float
    before: float


def analytic_gaussian(noise: float, rounds: int, delta: float) -> float:
    """Return the exact epsilon of Gaussian releases.

    Args:
        noise: standard deviation over the sensitivity, of each release.
        rounds: number of releases.
        delta: in (0, 1).
    """
    from scipy.stats import norm

    shift = math.sqrt(rounds) / noise

    def spent(epsilon: float) -> float:
        lost = norm.cdf(shift / 2 - epsilon / shift)
        return float(lost - math.exp(epsilon + norm.logcdf(-shift / 2 - epsilon / shift)))

    low, high = 0.0, 1.0
    while spent(high) > delta:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if spent(middle) > delta else (low, middle)
    return high


def by_pld(noise: float, rounds: int, delta: float) -> float:
    """Return the epsilon of Gaussian releases by privacy loss distributions; the arguments are as above."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.REPLACE_SPECIAL, 1e-4)
    return float(accountant.compose(GaussianDpEvent(noise), rounds).get_epsilon(delta))


def by_prv(noise: float, rounds: int, delta: float) -> float:
    """Return the epsilon of Gaussian releases by privacy random variables; the arguments are as above."""
    import numpy as np
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(noise, 1.0, rounds)]
    with np.errstate(divide="ignore"):  # it takes the logarithm of 1 - 1.0 where every client is in every round
        return float(accountant.get_epsilon(delta, eps_error=0.01))


def noise_before(epsilon: float, rounds: int, delta: float) -> float:
    """Return the least noise, over the sensitivity, with which the releases keep an epsilon by Renyi divergence."""
    from dp_accounting import GaussianDpEvent, NeighboringRelation
    from dp_accounting.rdp import RdpAccountant

    low, high = 1e-2, 1e3
    for _ in range(50):
        middle = math.sqrt(low * high)
        accountant = RdpAccountant(list(range(2, 512)), NeighboringRelation.REPLACE_SPECIAL)
        spent = accountant.compose(GaussianDpEvent(middle), rounds).get_epsilon(delta)
        low, high = (middle, high) if spent > epsilon else (low, middle)
    return high


def measure(sites: int, rounds: int, options: argparse.Namespace) -> Row:
    """Return the figures of a run with so many sites, all of which take part in each round."""
    privacy = {"mode": "distributed", "target_epsilon": options.epsilon, "delta": options.delta}
    config = parse({"run": {"rounds": rounds}, "strategy": {"min_clients": sites}, "privacy": privacy})
    plan = make_plan(config, options.dimension)
    if plan is None:
        raise ValueError("a private run")
    printed = epsilon_after(plan, rounds)
    # From here on, the plan's noise multiplier is the only number of the program.
    share = plan.noise_multiplier / math.sqrt(sites)
    to_a_site = share * math.sqrt(sites - 1)
    old = noise_before(options.epsilon, rounds, options.delta) / math.sqrt(sites) * math.sqrt(sites - 1)
    return Row(
        sites=sites,
        rounds=rounds,
        noise_multiplier=plan.noise_multiplier,
        printed=printed["release"],
        exact=analytic_gaussian(to_a_site, rounds, options.delta),
        by_pld=by_pld(to_a_site, rounds, options.delta),
        by_prv=by_prv(to_a_site, rounds, options.delta),
        outsiders=printed["outsiders"],
        outsiders_exact=analytic_gaussian(share * math.sqrt(sites), rounds, options.delta),
        before=analytic_gaussian(old, rounds, options.delta),
    )


def table(rows: list[Row]) -> str:
    """Return the rows as a table in Markdown."""
    lines = [
        "| rounds | sites | z | printed | exact | PLD | PRV | outsiders, printed | exact | a site, before |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        site = f"{row.printed:.4f} | {row.exact:.4f} | {row.by_pld:.4f} | {row.by_prv:.4f}"
        others = f"{row.outsiders:.4f} | {row.outsiders_exact:.4f} | {row.before:.2f}"
        lines.append(f"| {row.rounds} | {row.sites} | {row.noise_multiplier:.4g} | {site} | {others} |")
    return "\n".join(lines)


def main() -> None:
    """Compute, and print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epsilon", type=float, default=8.0)
    parser.add_argument("--delta", type=float, default=1e-5)
    parser.add_argument("--rounds", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--dimension", type=int, default=75_000)
    options = parser.parse_args()
    rows = [measure(sites, rounds, options) for rounds in options.rounds for sites in SITES]
    print(table(rows))
    names = f"2 to 100 sites, {len(rows)} plans"
    figures = [
        Figure("printed / exact, least", min(row.printed / row.exact for row in rows), "ratio", ">= 1", names),
        Figure("printed / exact, most", max(row.printed / row.exact for row in rows), "ratio", "<= 1.01"),
        Figure("|printed / PLD - 1|, most", max(abs(row.printed / row.by_pld - 1) for row in rows), "", "<= 0.01"),
        Figure("|printed / PRV - 1|, most", max(abs(row.printed / row.by_prv - 1) for row in rows), "", "<= 0.01"),
        Figure(
            "outsiders: printed / exact, least", min(row.outsiders / row.outsiders_exact for row in rows), "", ">= 1"
        ),
        Figure("printed, most", max(row.printed for row in rows), "epsilon", f"<= {options.epsilon:g}"),
    ]
    show("The epsilon of another site in mode distributed", figures)


if __name__ == "__main__":
    main()
