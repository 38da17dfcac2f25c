"""Find conflicts between settings that are each valid by themselves."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tsugiki.common.adapters.lora import LoraSettings
from tsugiki.common.errors import Problem
from tsugiki.common.privacy.secagg.messages import MOST_CLIENTS
from tsugiki.common.strategies import names_with, strategy_of
from tsugiki.common.tasks import TASKS

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig


def cross_checks(config: RunConfig) -> list[Problem]:
    """Return conflicts between the sections of a run, except those of `[strategy]` and `[privacy]`."""
    return (
        _federation_problems(config) + _model_problems(config) + _train_problems(config) + _validation_problems(config)
    )


def _federation_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts in the simulation, the evaluation, or LoRA's second pair."""
    problems = []
    sites = config.simulation.clients
    wanted = config.strategy.min_clients
    # A split by column finds its number of clients only when the data are read.
    if config.simulation.data and config.simulation.partition != "by-column" and wanted > sites:
        problems.append(
            Problem(
                "strategy.min_clients", str(wanted), f"at most simulation.clients = {sites}", "lower it, or add clients"
            )
        )
    if config.simulation.partition == "by-column" and not config.simulation.column:
        problems.append(
            Problem("simulation.column", "''", "the column to split by", "name a column of simulation.data")
        )
    problems += _evaluation_problems(config)
    adapter = config.adapter
    if isinstance(adapter, LoraSettings) and adapter.merged_rank and not strategy_of(config.strategy).fills_merged_pair:
        fitting = " or ".join(f'"{name}"' for name in names_with(lambda strategy: strategy.fills_merged_pair))
        expected = f"0 unless strategy.name is {fitting}: nothing else fills the second pair"
        hint = f"remove it, or use {fitting}"
        problems.append(Problem("adapter.merged_rank", str(adapter.merged_rank), expected, hint))
    return problems


def _evaluation_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of what is evaluated with what depends on it."""
    evaluation = config.evaluation
    problems = []
    if not config.run.rounds and (config.privacy.mode != "none" or config.privacy.examples.enabled):
        expected = "at least 1 in a private run, whose sites do not evaluate"
        problems.append(Problem("run.rounds", "0", expected, "remove [privacy]: nobody trains"))
    elif not config.run.rounds and not (evaluation.data or config.evaluates_at_sites):
        problems.append(Problem("run.rounds", "0", "at least 1: nothing is evaluated either", "name evaluation.data"))
    if evaluation.early_stopping_patience and not (evaluation.data or config.evaluates_at_sites):
        expected = "a file: early stopping needs held-out rows, and this run does not evaluate at sites"
        problems.append(Problem("evaluation.data", "''", expected, "name the held-out file"))
    if config.monitors_sites and not config.evaluates_at_sites:
        expected = "a metric of evaluation.data: this run does not evaluate at sites"
        problems.append(Problem("evaluation.monitor", repr(evaluation.monitor), expected, repr(config.metric)))
    return problems


def _model_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of 4-bit loading or gradient checkpointing with other settings."""
    model = config.model
    problems = []
    task = TASKS.get(config.task.name)
    private = config.privacy.examples.enabled
    if model.quantization != "none":
        value = repr(model.quantization)
        if config.adapter.method != "lora":
            problems.append(Problem("model.quantization", value, '"none" unless adapter.method is "lora"', "remove it"))
        if config.train.device in ("cpu", "mps"):
            problems.append(
                Problem("model.quantization", value, f'"none" on {config.train.device}', 'set train.device = "cuda"')
            )
        if private:
            problems.append(Problem("model.quantization", value, '"none" with DP-SGD', "remove it"))
        if task.shares_base:
            expected = f'"none" with {task.name}: two models share the base'
            problems.append(Problem("model.quantization", value, expected, "remove it"))
    if model.gradient_checkpointing and private:
        why = "false with DP-SGD, which would see each activation twice"
        problems.append(Problem("model.gradient_checkpointing", "true", why, "remove it"))
    if model.gradient_checkpointing and task.gradient_in_eval_mode:
        why = f"false with {task.name}, whose gradient is taken in eval mode"
        problems.append(Problem("model.gradient_checkpointing", "true", why, "remove it"))
    if model.gradient_checkpointing and config.adapter.method == "prefix":
        why = "false with prefix tuning: computed twice, a block gets no keys and values from outside"
        problems.append(
            Problem("model.gradient_checkpointing", "true", why, 'use "prompt" or "p-tuning", or remove it')
        )
    return problems


def _train_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of the optimizer and the local loop with other settings."""
    problems = []
    if config.train.precision == "bf16" and config.model.dtype == "float16":
        expected = '"auto" or "float32" with model.dtype = "float16": the two types do not mix'
        problems.append(Problem("train.precision", "'bf16'", expected, 'set model.dtype = "bfloat16" or "float32"'))
    if config.train.momentum and config.train.optimizer != "sgd":
        problems.append(Problem("train.momentum", str(config.train.momentum), "0 unless optimizer is sgd", "remove it"))
    if not config.train.bias_correction and config.train.optimizer != "adamw":
        problems.append(Problem("train.bias_correction", "false", "true unless optimizer is adamw", "remove it"))
    if config.train.group_by_length is True:
        problems += _grouping_problems(config)
    if config.train.persist_optimizer and config.privacy.examples.enabled:
        problems.append(Problem("train.persist_optimizer", "true", "false with DP-SGD", "remove it"))
    if config.train.persist_optimizer and config.simulation.data and config.simulation.engine == "ray":
        expected = "false on Ray, whose workers share sites"
        problems.append(Problem("train.persist_optimizer", "true", expected, 'use engine = "in-process"'))
    if config.train.divergence_factor and config.privacy.examples.enabled:
        problems.append(
            Problem("train.divergence_factor", str(config.train.divergence_factor), "0 with DP-SGD", "remove it")
        )
    elif config.train.divergence_factor and TASKS.get(config.task.name).signed_loss:
        expected = f"0 with {config.task.name}, whose loss may be below 0"
        problems.append(Problem("train.divergence_factor", str(config.train.divergence_factor), expected, "remove it"))
    return problems


def _grouping_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of batches by length with other settings."""
    if config.privacy.examples.enabled:
        why = '"auto" or false with DP-SGD, which draws each row by itself'
    elif not TASKS.get(config.task.name)(config.task).pads_rows:
        why = f'"auto" or false with {config.task.name}, where no row is padded'
    else:
        return []
    return [Problem("train.group_by_length", "true", why, "remove it")]


def _validation_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of validation inside a round with other settings."""
    train = config.train
    found = []
    steps = config.train.validate_every_steps
    if train.local_patience and not steps:
        expected = "0 without train.validate_every_steps"
        hint = "set both, or remove it"
        return [Problem("train.local_patience", str(train.local_patience), expected, hint)]
    if steps and (config.privacy.mode != "none" or config.privacy.examples.enabled):
        why = "0 in a private run: which adapter is sent follows from rows that no account covers"
        found.append(Problem("train.validate_every_steps", str(steps), why, "remove it"))
    if steps and config.simulation.data and config.simulation.clients_per_site > 1:
        why = "0 with simulation.clients_per_site above 1, whose clients have no rows to spare"
        found.append(Problem("train.validate_every_steps", str(steps), why, "remove either of them"))
    return found


def strategy_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts between `[strategy]` and the other sections."""
    strategy = strategy_of(config.strategy)
    name = strategy.name
    adapter = config.adapter
    found = []
    if strategy.needs_lora and isinstance(adapter, LoraSettings):
        found += _factor_problems(config, adapter)
    # A strategy that needs LoRA may read LoRA's settings in its own check, so the check is skipped without LoRA.
    if isinstance(adapter, LoraSettings) or not strategy.needs_lora:
        found += strategy.problems(config)
    else:
        found.append(Problem("adapter.method", repr(adapter.method), f'"lora" with strategy {name}', 'use "fedavg"'))
    found += _rank_problems(config)
    found += _lateness_problems(config)
    gateways = config.simulation.data and config.simulation.clients_per_site > 1
    if strategy.sees_factors and gateways:
        why = f"1 with strategy {name}: a gateway would send the mean of its clients' factors"
        found.append(Problem("simulation.clients_per_site", str(config.simulation.clients_per_site), why, "remove it"))
    return found


def _lateness_problems(config: RunConfig) -> list[Problem]:
    """Return what does not go with updates that count in a later round."""
    if config.strategy.late_updates == "discard":
        return []
    strategy = strategy_of(config.strategy)
    found = []

    def problem(why: str) -> None:
        found.append(Problem("strategy.late_updates", '"next-round"', f'"discard" {why}', "remove it"))

    if config.privacy.mode != "none" or config.privacy.examples.enabled:
        problem("in a private run: the account of a round is made for those who are in it")
    if strategy.needs_each_update or not strategy.same_part:
        fitting = ", ".join(names_with(lambda other: not other.needs_each_update and other.same_part))
        problem(f"unless strategy.name is {fitting}: others cannot add what was trained from an earlier adapter")
    if config.strategy.weighting == "equal":
        problem('with strategy.weighting = "equal": an update that is late has to weigh less')
    return found


def _rank_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of the simulated sites' ranks with the strategy or the adapter."""
    ranks = config.simulation.ranks
    if not ranks:
        return []
    if not strategy_of(config.strategy).mixed_ranks:
        fitting = ", ".join(names_with(lambda strategy: strategy.mixed_ranks))
        given = ", ".join(map(str, ranks))
        return [Problem("simulation.ranks", given, f"empty unless strategy.name is {fitting}", "remove it")]
    adapter = config.adapter
    if isinstance(adapter, LoraSettings) and max(ranks) > adapter.rank:
        expected = f"at most adapter.rank = {adapter.rank}"
        return [Problem("simulation.ranks", str(max(ranks)), expected, "raise the rank")]
    return []


def _factor_problems(config: RunConfig, adapter: LoraSettings) -> list[Problem]:
    """Return the settings of a LoRA run that a strategy on LoRA's factors cannot work with."""
    strategy = strategy_of(config.strategy)
    name = strategy.name
    found = []
    wanted = "yes" if strategy.freezes_a else "no"
    # Privacy freezes A whatever the strategy wants, and has rules of its own for the strategy.
    private = config.privacy.mode != "none" or config.privacy.examples.enabled
    if not private and adapter.freeze_a not in {wanted, "auto"}:
        expected = f'"{wanted}" or "auto" with strategy {name}'
        found.append(Problem("adapter.freeze_a", repr(adapter.freeze_a), expected, "remove it"))
    if not strategy.sees_factors:
        return found
    if adapter.use_dora:
        expected = f"false with strategy {name}, for which a layer's change has to be B A"
        found.append(Problem("adapter.use_dora", "true", expected, "remove it"))
    if adapter.init != "default":
        expected = f'"default" with strategy {name}: of an orthogonal start, a part is not zero'
        found.append(Problem("adapter.init", repr(adapter.init), expected, "remove it"))
    if config.train.persist_optimizer:
        expected = f"false with strategy {name}, whose factors are others in each round"
        found.append(Problem("train.persist_optimizer", "true", expected, "remove it"))
    return found


def privacy_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts between `[privacy]` and the other sections."""
    privacy = config.privacy
    found = _example_problems(config)
    if privacy.mode == "none":
        return found + _idle_settings(config)
    noisy = privacy.noise_multiplier > 0 or privacy.target_epsilon > 0
    if not noisy and not privacy.secure_aggregation:  # secure aggregation protects updates without noise, too
        wanted = "above 0, or privacy.noise_multiplier above 0"
        found.append(
            Problem("privacy.target_epsilon", "0.0", wanted, "`tsugiki budget FILE`, which shows what each costs")
        )
    if not strategy_of(config.strategy).linear:
        # Anything after the mean is post-processing, which costs no budget.
        linear = ", ".join(names_with(lambda strategy: strategy.linear))
        expected = f"one of {linear}, which need the sum of the updates only"
        found.append(Problem("strategy.name", repr(config.strategy.name), expected, 'use "fedavg"'))
    if config.evaluation.at_sites is True:
        found.append(
            Problem("evaluation.at_sites", "true", "false: metrics of private rows are a release", "remove it")
        )
    found += _mode_problems(config) + _count_problems(config)
    return found


def _idle_settings(config: RunConfig) -> list[Problem]:
    """Return the privacy settings that have no effect because the mode is "none"."""
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
    hint = 'set privacy.mode = "central", "local" or "distributed", or remove it'
    return [
        Problem(f"privacy.{name}", str(getattr(privacy, name)), 'left out while privacy.mode is "none"', hint)
        for name, given in idle.items()
        if given
    ]


def _mode_problems(config: RunConfig) -> list[Problem]:
    """Return the privacy settings that need another mode."""
    privacy = config.privacy
    found = []
    if privacy.secure_aggregation and privacy.mode != "distributed":
        hint = 'set privacy.mode = "distributed"; without a budget it adds no noise'
        found.append(Problem("privacy.secure_aggregation", "true", 'false unless mode is "distributed"', hint))
    if privacy.honest_fraction < 1 and privacy.mode != "distributed":
        found.append(
            Problem(
                "privacy.honest_fraction", str(privacy.honest_fraction), '1 unless mode is "distributed"', "remove it"
            )
        )
    if privacy.sampling == "poisson" and privacy.mode != "central":
        why = '"fixed" unless mode is "central": elsewhere the server knows who is asked, which amplifies nothing'
        found.append(Problem("privacy.sampling", "'poisson'", why, "remove it"))
    return found


def _count_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts between the numbers of clients, of sites, and of those that a sum needs."""
    privacy = config.privacy
    clients = config.enrolled_clients
    found = []
    if privacy.delta * clients >= 1:
        expected = f"below 1 / {clients}, the enrolled clients: otherwise one of them may be given away"
        found.append(Problem("privacy.delta", f"{privacy.delta:g}", expected, f"use {0.1 / clients:.0e}"))
    if privacy.secure_aggregation and config.strategy.min_clients < 2:
        found.append(
            Problem(
                "strategy.min_clients",
                "1",
                "at least 2 with secure aggregation: a sum of one hides nothing",
                "raise it",
            )
        )
    found += _share_problems(config)
    sites = -(-config.simulation.clients // config.simulation.clients_per_site)  # rounded up: the last may be smaller
    if privacy.secure_aggregation and config.simulation.data and sites > MOST_CLIENTS:
        expected = f"false with {sites} sites: a sum has at most {MOST_CLIENTS}"
        found.append(Problem("privacy.secure_aggregation", "true", expected, "raise simulation.clients_per_site"))
    if privacy.secure_aggregation and config.simulation.data and sites < privacy.min_sites:
        expected = f"at most the number of sites, {sites}"
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), expected, "lower clients_per_site"))
    if privacy.min_sites > 2 and not privacy.secure_aggregation:
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), "2 without secure aggregation", "remove it"))
    elif privacy.min_sites > max(2, clients):
        expected = f"at most privacy.enrolled_clients = {clients}"
        found.append(Problem("privacy.min_sites", str(privacy.min_sites), expected, "lower it"))
    each = config.simulation.clients_per_site
    most = privacy.max_clients_per_site
    if config.simulation.data and 0 < most < each:
        expected = f"at least simulation.clients_per_site = {each}"
        found.append(Problem("privacy.max_clients_per_site", str(most), expected, "raise it, or remove it"))
    by_column = config.simulation.data and config.simulation.partition == "by-column"
    if by_column and not privacy.enrolled_clients:
        expected = "the number of clients, which is not known before a split by column"
        found.append(Problem("privacy.enrolled_clients", "0", expected, "count the column's values"))
    if config.strategy.min_clients > clients:
        expected = f"at most privacy.enrolled_clients = {clients}"
        found.append(Problem("strategy.min_clients", str(config.strategy.min_clients), expected, "lower it"))
    return found


def _share_problems(config: RunConfig) -> list[Problem]:
    """Return the problem of a sum in which a site may know so much of the noise that less than one share is left."""
    privacy = config.privacy
    noisy = privacy.noise_multiplier > 0 or privacy.target_epsilon > 0
    if privacy.mode != "distributed" or not noisy:
        return []
    known = config.most_clients_of_a_site
    # The small addend makes up for rounding: 0.2 * 10 clients may be a little below 2.
    if privacy.honest_fraction * config.strategy.min_clients - known + 1e-9 >= 1:
        return []
    least = math.ceil((known + 1) / privacy.honest_fraction - 1e-9)
    what = "client" if known == 1 else f"{known:,} clients"
    expected = (
        f"at least {least:,}, which is ({known} + 1) / privacy.honest_fraction: a site knows the noise of its own "
        f"{what}, and one more share has to hide the others"
    )
    hint = 'raise it, or use privacy.mode = "local"'
    if config.simulation.data and config.simulation.clients_per_site > 1:
        hint = "raise it, or lower simulation.clients_per_site"
    return [Problem("strategy.min_clients", str(config.strategy.min_clients), expected, hint)]


def _example_problems(config: RunConfig) -> list[Problem]:
    """Return conflicts of DP-SGD at the sites with other settings."""
    examples = config.privacy.examples
    found = []
    if examples.enabled and config.evaluation.at_sites is True:
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
    if examples.enabled and not strategy_of(config.strategy).same_part:
        why = "one that trains the same numbers in every round, with DP-SGD"
        found.append(Problem("strategy.name", repr(config.strategy.name), why, 'use "ffa"'))
    if examples.enabled and config.train.precision == "bf16":
        why = '"auto" or "float32" with DP-SGD: a row\'s gradient is clipped in float32'
        found.append(Problem("train.precision", "'bf16'", why, "remove it"))
    return found
