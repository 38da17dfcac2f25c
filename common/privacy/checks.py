"""What is wrong with a run's privacy settings, before any site is contacted: every problem at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsugiki.common.errors import Problem
from tsugiki.common.privacy.secagg.messages import MOST_CLIENTS

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig

_LINEAR_STRATEGIES = ("fedadam", "fedavg", "fedavgm", "fedprox", "ffa")
"""What works on the mean of the updates: anything after it is post-processing and costs nothing."""


def privacy_problems(config: RunConfig) -> list[Problem]:
    """Return the problems between `[privacy]` and the other sections."""
    privacy, found = config.privacy, _example_problems(config)
    if privacy.mode == "none":
        return found + _idle_settings(config)
    noisy = privacy.noise_multiplier > 0 or privacy.target_epsilon > 0
    if not noisy and not privacy.secure_aggregation:
        wanted = "above 0, or privacy.noise_multiplier above 0"
        found.append(Problem("privacy.target_epsilon", "0.0", wanted, "`tsugiki budget FILE` shows what each costs"))
    if config.strategy.name not in _LINEAR_STRATEGIES:
        expected = f"one of {', '.join(_LINEAR_STRATEGIES)}, which need the sum of the updates only"
        found.append(Problem("strategy.name", repr(config.strategy.name), expected, 'use "fedavg"'))
    if config.evaluation.at_sites:
        found.append(
            Problem("evaluation.at_sites", "true", "false: metrics of private rows are a release", "remove it")
        )
    found += _mode_problems(config) + _count_problems(config)
    return found


def _idle_settings(config: RunConfig) -> list[Problem]:
    """Return settings that promise something which the mode "none" does not do."""
    privacy = config.privacy
    idle = {
        "target_epsilon": privacy.target_epsilon > 0,
        "noise_multiplier": privacy.noise_multiplier > 0,
        "secure_aggregation": privacy.secure_aggregation,
        "honest_fraction": privacy.honest_fraction < 1,
        "sampling": privacy.sampling != "fixed",
        "min_sites": privacy.min_sites > 2,
        "max_clients_per_site": privacy.max_clients_per_site > 0,
    }
    do = 'set privacy.mode = "central", "local" or "distributed", or remove it'
    return [
        Problem(f"privacy.{name}", str(getattr(privacy, name)), "a mode other than none", do)
        for name, given in idle.items()
        if given
    ]


def _mode_problems(config: RunConfig) -> list[Problem]:
    privacy, found = config.privacy, []
    if privacy.secure_aggregation and privacy.mode != "distributed":
        do = 'set privacy.mode = "distributed"; without a budget it adds no noise'
        found.append(Problem("privacy.secure_aggregation", "true", 'false unless mode is "distributed"', do))
    if privacy.honest_fraction < 1 and privacy.mode != "distributed":
        found.append(
            Problem("privacy.honest_fraction", str(privacy.honest_fraction), '1 unless mode is "distributed"', "remove")
        )
    if privacy.sampling == "poisson" and privacy.mode != "central":
        why = 'fixed unless mode is "central": elsewhere the server knows who is asked, and so amplifies nothing'
        found.append(Problem("privacy.sampling", "'poisson'", why, "remove it"))
    return found


def _count_problems(config: RunConfig) -> list[Problem]:
    from tsugiki.common.privacy.plan import enrolled

    privacy, clients, found = config.privacy, enrolled(config), []
    if privacy.delta * clients >= 1:
        expected = f"below 1 / {clients}, the enrolled clients: else one of them may be given away"
        found.append(Problem("privacy.delta", f"{privacy.delta:g}", expected, f"use {0.1 / clients:.0e}"))
    if privacy.secure_aggregation and config.strategy.min_clients < 2:
        found.append(
            Problem("strategy.min_clients", "1", "at least 2 with secure aggregation", "a sum of one hides nothing")
        )
    if privacy.honest_fraction * config.strategy.min_clients < 1:
        expected = f"at least 1 / min_clients, which is {1 / config.strategy.min_clients:.3g}"
        found.append(Problem("privacy.honest_fraction", str(privacy.honest_fraction), expected, "raise either"))
    sites = -(-config.simulation.clients // config.simulation.clients_per_site)
    if privacy.secure_aggregation and config.simulation.data and sites > MOST_CLIENTS:
        expected = f"at most {MOST_CLIENTS} sites in a sum, not {sites}"
        found.append(Problem("privacy.secure_aggregation", "true", expected, "raise simulation.clients_per_site"))
    if privacy.secure_aggregation and config.simulation.data and sites < privacy.min_sites:
        expected = f"at most the number of sites, {sites}"
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), expected, "lower clients_per_site"))
    if privacy.min_sites > 2 and not privacy.secure_aggregation:
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), "2 without secure aggregation", "remove it"))
    elif privacy.min_sites > max(2, clients):
        expected = f"at most privacy.enrolled_clients = {clients}"
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), expected, "lower it"))
    each, most = config.simulation.clients_per_site, privacy.max_clients_per_site
    if config.simulation.data and 0 < most < each:
        expected = f"at least simulation.clients_per_site = {each}"
        found.append(Problem("privacy.max_clients_per_site", str(most), expected, "raise it, or remove it"))
    by_column = config.simulation.data and config.simulation.partition == "by-column"
    if by_column and not privacy.enrolled_clients:
        expected = "the number of clients, which a split by column does not tell beforehand"
        found.append(Problem("privacy.enrolled_clients", "0", expected, "count the column's values"))
    if config.strategy.min_clients > clients:
        expected = f"at most privacy.enrolled_clients = {clients}"
        found.append(Problem("strategy.min_clients", str(config.strategy.min_clients), expected, "lower it"))
    return found


def _example_problems(config: RunConfig) -> list[Problem]:
    examples, found = config.privacy.examples, []
    if examples.enabled and config.evaluation.at_sites:
        found.append(Problem("evaluation.at_sites", "true", "false with DP-SGD: no noise is on metrics", "remove it"))
    if examples.enabled and config.train.gradient_accumulation_steps > 1:
        found.append(
            Problem(
                "train.gradient_accumulation_steps",
                str(config.train.gradient_accumulation_steps),
                "1 with DP-SGD",
                "remove it",
            )
        )
    if examples.enabled and config.strategy.name in {"rolora", "flora", "svd"}:
        why = "one that trains the same numbers in every round, with DP-SGD"
        found.append(Problem("strategy.name", repr(config.strategy.name), why, 'use "ffa"'))
    if examples.enabled and config.train.bf16:
        found.append(Problem("train.bf16", "true", "false with DP-SGD", "remove it"))
    return found
