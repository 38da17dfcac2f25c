"""LoRA: low-rank matrices beside frozen linear layers, and its variants."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tsugiki.common.adapters.base import ADAPTERS, MERGED, REFUSED, TRAINED
from tsugiki.common.adapters.peft_base import PeftMethod, TargetedSettings, check_targets, linear_layers, narrower_side
from tsugiki.common.errors import ExportError, ModelError

ATTENTION_TARGETS = {
    "bert": ("query", "value"),
    "roberta": ("query", "value"),
    "xlm-roberta": ("query", "value"),
    "electra": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("q", "v"),
    "llama": ("q_proj", "v_proj"),
    "mistral": ("q_proj", "v_proj"),
    "qwen2": ("q_proj", "v_proj"),
    "gpt2": ("c_attn",),
    "vit": ("q_proj", "v_proj"),
    "tsugiki-cnn": ("fc",),
}
"""Query and value projections, as in Hu et al. 2021, section 4.2, by the names in each architecture.

For a network without attention it is the last layer.
"""


class LoraSettings(TargetedSettings):
    """LoRA: W + (alpha / rank) * B A, with B at zero in the beginning."""

    method: Literal["lora"] = Field(default="lora", description="The adapter method.")
    rank: int = Field(
        default=8,
        ge=1,
        le=4096,
        description="Rank of the update B A: rows of A, columns of B. Raise it if the adapter learns too little; the "
        "bytes of a round grow with it.",
    )
    alpha: float = Field(
        default=16.0,
        gt=0,
        description="The update is scaled by alpha / rank. Twice the rank is common; raise it for larger steps.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Dropout on the input of A. Raise it, for example to 0.1, if sites overfit.",
    )
    freeze_a: Literal["auto", "yes", "no"] = Field(
        default="auto",
        description='Freeze A and train only B (FFA-LoRA). "auto": yes in private runs, where noise on both factors '
        'would multiply, and under strategy "ffa"; no otherwise.',
    )
    use_rslora: bool = Field(
        default=False,
        description="Scale by alpha / sqrt(rank) instead. Set it for large ranks, which then learn as fast as small "
        "ones.",
    )
    use_dora: bool = Field(
        default=False,
        description="Also train the length of each row of the weights (DoRA). Set it if LoRA learns less than full "
        "fine-tuning; it takes more time.",
    )
    init: Literal["default", "orthogonal"] = Field(
        default="default",
        description='"default": A is random, B is zero; "orthogonal": both are random, with orthogonal inner '
        'factors, so that B A is zero too, and the rank must be even. Try "orthogonal" if training '
        "starts slowly.",
    )
    merged_rank: int = Field(
        default=0,
        ge=0,
        le=65_536,
        description='Rank of a second pair that sites do not train. Leave it at 0: strategy "flora" sets it, to at '
        "most the rank of each layer.",
    )

    @field_validator("init", mode="before")
    @classmethod
    def _no_pissa(cls, value: Any) -> Any:
        if isinstance(value, str) and value.startswith("pissa"):  # peft's setting for it
            raise ValueError(f'"default" or "orthogonal", or {REFUSED["pissa"][0]}')
        return value

    @model_validator(mode="after")
    def _orthogonal_pairs(self) -> LoraSettings:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError('given an even rank if init is "orthogonal"')
        return self


@ADAPTERS.register("lora")
class Lora(PeftMethod):
    """Low-rank adaptation. Source: Hu et al. 2021, arXiv:2106.09685, section 4.1.

    rsLoRA: Kalajdzievski 2023, arXiv:2312.03732, theorem 3.2. DoRA also trains the row norms m of
    W' = m (W + B A) / |W + B A|: Liu et al. 2024, arXiv:2402.09353, equation 5.
    """

    name = "lora"
    Settings = LoraSettings

    @property
    def loads_anywhere(self) -> bool:
        """Return False for DoRA: transformers reports its lengths as missing and continues; `PeftModel` loads them."""
        return not self.settings.use_dora

    @property
    def row_gradients(self) -> bool:
        """Return False for DoRA: its layer applies A and B to a unit matrix, and its lengths to no rows."""
        return not self.settings.use_dora

    def config(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Return peft's configuration."""
        from peft import LoraConfig

        return LoraConfig(
            r=self.settings.rank,
            lora_alpha=self.settings.alpha,
            lora_dropout=self.settings.dropout,
            target_modules=list(self._targets(transformer, heads)),
            fan_in_fan_out=transformer.config.model_type == "gpt2",
            use_rslora=self.settings.use_rslora,
            use_dora=self.settings.use_dora,
            init_lora_weights="orthogonal" if self.settings.init == "orthogonal" else True,
        )

    def attach(self, transformer: Any, heads: tuple[str, ...]) -> Any:
        """Wrap the transformer; with `merged_rank`, every adapted layer gets a second pair at zero."""
        model = super().attach(transformer, heads)
        if self.settings.merged_rank:
            _add_merged_pair(model, self.settings.merged_rank)
        return model

    def save(self, transformer: Any, folder: Path, base_name: str) -> None:
        """Write a directory that `PeftModel.from_pretrained` loads.

        Raises:
            ExportError: `export-unsupported`, `merged_rank` is set: a PEFT directory has room for one pair only.
        """
        if self.settings.merged_rank:
            raise ExportError(
                "this adapter is two pairs of factors, of which one holds what the rounds have learned",
                "an export that has room for both",
                "export with --merged",
                code="export-unsupported",
            )
        super().save(transformer, folder, base_name)

    def constants(self, transformer: Any) -> dict[str, Any]:
        """Return A of every layer if it is frozen: B A is then linear in B, which is trained, noised and averaged.

        Source: Sun et al. 2024, "Improving LoRA in Privacy-preserving Federated Learning" (ICLR), section 4.
        """
        if self.settings.freeze_a != "yes":
            return {}
        return {name: value for name, value in transformer.named_parameters() if ".lora_A." in name}

    def _targets(self, transformer: Any, heads: tuple[str, ...]) -> tuple[str, ...]:
        """Return the modules to adapt, after checking that they exist and are not narrower than the rank."""
        targets = attention_targets(self.settings, transformer, heads)
        layers = linear_layers(transformer, heads).items()
        narrowest = min(narrower_side(layer) for name, layer in layers if name.rsplit(".", 1)[-1] in targets)
        if self.settings.rank > narrowest:
            raise ModelError(
                f"adapter.rank = {self.settings.rank} is too large",
                f"at most {narrowest}, the width of the layers",
                code="adapter-rank",
            )
        return targets


def _add_merged_pair(model: Any, rank: int) -> None:
    """Add a pair `MERGED` to each adapted layer, at zero and scaled alike; the layer's width limits its rank."""
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer
    from torch import nn

    for layer in [module for module in model.modules() if isinstance(module, LoraLayer)]:
        own = min(rank, layer.in_features, layer.out_features)
        scaling = layer.scaling[TRAINED]
        layer.update_layer(MERGED, own, lora_alpha=scaling * own, config=LoraConfig(r=own))
        for factor in (layer.lora_A[MERGED], layer.lora_B[MERGED]):
            nn.init.zeros_(factor.float().weight)  # as peft holds the other pair, also on a base of 16 bits
        layer.set_adapter([TRAINED, MERGED])


def attention_targets(settings: TargetedSettings, transformer: Any, heads: tuple[str, ...]) -> tuple[str, ...]:
    """Return the last parts of the names of the layers to adapt: as set, or query and value projections.

    Raises:
        ModelError: `adapter-targets`, a layer is not there, or the architecture has no default.
    """
    model_type = transformer.config.model_type
    targets = settings.target_modules or ATTENTION_TARGETS.get(model_type, ())
    known = {name.rsplit(".", 1)[-1] for name in linear_layers(transformer, heads)}
    check_targets(targets, known, model_type, "adapter.target_modules")
    return tuple(targets)
