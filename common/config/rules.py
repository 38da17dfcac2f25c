"""What is wrong between settings that are right by themselves; of `[privacy]`: `common/privacy/checks.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tsugiki.common.errors import Problem
from tsugiki.common.tasks import TASKS

if TYPE_CHECKING:
    from tsugiki.common.config.run import RunConfig


def cross_checks(config: RunConfig) -> list[Problem]:
    """Return the problems between sections, or inside one."""
    return (
        _federation_problems(config) + _model_problems(config) + _train_problems(config) + _validation_problems(config)
    )


def _federation_problems(config: RunConfig) -> list[Problem]:
    problems = []
    sites, wanted = config.simulation.clients, config.strategy.min_clients
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
    if config.evaluation.early_stopping_patience and not config.evaluation.data:
        problems.append(Problem("evaluation.data", "''", "a file, for early stopping", "name the held-out file"))
    if (rank := getattr(config.adapter, "merged_rank", 0)) and config.strategy.name != "flora":
        expected = '0 unless strategy.name is "flora": nothing else fills the second pair'
        problems.append(Problem("adapter.merged_rank", str(rank), expected, 'remove it, or use "flora"'))
    return problems


def _model_problems(config: RunConfig) -> list[Problem]:
    """Return with what a base in 4 bits, or one whose activations are computed twice, does not go together."""
    model, problems = config.model, []
    private = config.privacy.examples.enabled
    if model.quantization != "none":
        value = repr(model.quantization)
        if config.adapter.method != "lora":
            problems.append(Problem("model.quantization", value, 'none, unless adapter.method is "lora"', "use lora"))
        if config.train.device in ("cpu", "mps"):
            problems.append(Problem("model.quantization", value, f"none on {config.train.device}", 'use "cuda"'))
        if private:
            problems.append(Problem("model.quantization", value, "none with DP-SGD", "remove it"))
        if config.task.name == "rlhf":
            problems.append(Problem("model.quantization", value, "none with rlhf: two models share the base", "remove"))
    if model.gradient_checkpointing and private:
        why = "false with DP-SGD, which would see each activation twice"
        problems.append(Problem("model.gradient_checkpointing", "true", why, "remove it"))
    if model.gradient_checkpointing and config.task.name == "rlhf":
        why = "false with rlhf, whose gradient is taken in eval mode, as its answers are drawn"
        problems.append(Problem("model.gradient_checkpointing", "true", why, "remove it"))
    if model.gradient_checkpointing and config.adapter.method == "prefix":
        why = "false with prefix tuning: computed twice, a block gets no keys and values from outside"
        problems.append(
            Problem("model.gradient_checkpointing", "true", why, 'use "prompt" or "p-tuning", or remove it')
        )
    return problems


def _train_problems(config: RunConfig) -> list[Problem]:
    problems = []
    if config.train.bf16 and config.train.device == "cpu":
        problems.append(Problem("train.bf16", "true", "false on a CPU", 'set train.device = "cuda", or drop bf16'))
    if config.train.momentum and config.train.optimizer != "sgd":
        problems.append(Problem("train.momentum", str(config.train.momentum), "0 unless optimizer is sgd", "remove it"))
    if not config.train.bias_correction and config.train.optimizer != "adamw":
        problems.append(Problem("train.bias_correction", "false", "true unless optimizer is adamw", "remove it"))
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


def _validation_problems(config: RunConfig) -> list[Problem]:
    """Return what is wrong with validation inside a round, beside the rest of the run."""
    train, found, steps = config.train, [], config.train.validate_every_steps
    if train.local_patience and not steps:
        expected, do = "0 without train.validate_every_steps", "set both, or remove it"
        return [Problem("train.local_patience", str(train.local_patience), expected, do)]
    if steps and (config.privacy.mode != "none" or config.privacy.examples.enabled):
        why = "0 in a private run: which adapter is sent follows from rows that no account covers"
        found.append(Problem("train.validate_every_steps", str(steps), why, "remove it"))
    if steps and config.simulation.data and config.simulation.clients_per_site > 1:
        why = "0 with simulation.clients_per_site above 1, whose clients have no rows to spare"
        found.append(Problem("train.validate_every_steps", str(steps), why, "remove either"))
    return found
