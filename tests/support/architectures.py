"""Tiny models with random weights of every architecture that an adapter method knows, and inputs for them."""

import copy

import torch
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    MPNetConfig,
    Qwen2Config,
    RobertaConfig,
    ViTConfig,
    XLMRobertaConfig,
)

from tsugiki.common.tasks.image_classification import MODEL_TYPE, small_cnn

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
CONFIGS = {
    "bert": BertConfig(vocab_size=99, **SIZES),
    "roberta": RobertaConfig(vocab_size=99, **SIZES),
    "xlm-roberta": XLMRobertaConfig(vocab_size=99, **SIZES),
    "electra": ElectraConfig(vocab_size=99, embedding_size=8, **SIZES),
    "distilbert": DistilBertConfig(vocab_size=99, dim=16, n_layers=2, n_heads=2, hidden_dim=24),
    "mpnet": MPNetConfig(vocab_size=99, **SIZES),
    "llama": LlamaConfig(vocab_size=99, pad_token_id=0, **SIZES),
    "mistral": MistralConfig(vocab_size=99, pad_token_id=0, num_key_value_heads=1, **SIZES),
    "qwen2": Qwen2Config(vocab_size=99, pad_token_id=0, num_key_value_heads=1, **SIZES),
    "gpt2": GPT2Config(vocab_size=99, pad_token_id=0, n_embd=16, n_layer=2, n_head=2),
    "vit": ViTConfig(image_size=16, patch_size=8, initializer_range=0.2, **SIZES),
    MODEL_TYPE: small_cnn()[0](channels=3, image_size=16),
}
HEADS = {
    "distilbert": ("pre_classifier", "classifier"),
    **dict.fromkeys(("llama", "mistral", "qwen2", "gpt2"), ("score",)),
    MODEL_TYPE: (),
}
INPUTS = {"input_ids": torch.tensor([[5, 8, 13, 21], [34, 55, 89, 2]]), "attention_mask": torch.ones(2, 4).long()}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))


def heads_of(model_type):
    """Return the heads of a classifier."""
    return HEADS.get(model_type, ("classifier",))


def make(model_type="bert", auto=AutoModelForSequenceClassification, **changes):
    """Return a tiny model with random weights, always the same, in eval mode."""
    config = copy.deepcopy(CONFIGS[model_type])
    config.update(changes)
    torch.manual_seed(7)
    if model_type in ("vit", MODEL_TYPE):
        auto = AutoModelForImageClassification
    return auto.from_config(config, dtype=torch.float32).eval()


def trained(model):
    """Return the trainable parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stir(model, only=""):
    """Move trained parameters, as training would; B leaves zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in trained(model).items():
            if only in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def outputs(model):
    """Return logits or hidden states."""
    inputs = {"pixel_values": IMAGES.to(model.dtype)} if model.config.model_type in ("vit", MODEL_TYPE) else INPUTS
    with torch.no_grad():
        return model(**inputs)[0]
