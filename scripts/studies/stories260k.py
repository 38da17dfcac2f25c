"""The language model of the examples: stories260K of karpathy/tinyllamas, as a folder that `transformers` loads.

    python scripts/studies/stories260k.py stories260K.bin tok512.bin FOLDER

The two files are published as https://huggingface.co/karpathy/tinyllamas, folder stories260K, under the MIT licence: a
Llama of 260,032 parameters that has read children's stories, and its 512 tokens. Their form is that of
karpathy/llama2.c, `legacy_export` in export.py and `export` in tokenizer.py.
"""

from __future__ import annotations

import argparse
import os
import struct
from itertools import pairwise
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np

SPACE = "\u2581"
"""What stands for a space in SentencePiece's tokens."""
FIRST_PIECE = 259
"""Before it come <unk>, <s>, </s> and the 256 bytes."""


def read_model(file: Path) -> Any:
    """Return the `LlamaForCausalLM` of a checkpoint."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    content = file.read_bytes()
    width, inner, layers, heads, kv_heads, tokens, positions = struct.unpack_from("<7i", content)
    if tokens < 0:
        raise SystemExit(f"{file}: the output layer has a matrix of its own, which is not read here")
    config = LlamaConfig(
        vocab_size=tokens,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    head = width // heads
    shapes = {  # in the order of the file; each for all layers
        "input_layernorm": (width,),
        "self_attn.q_proj": (heads * head, width),
        "self_attn.k_proj": (kv_heads * head, width),
        "self_attn.v_proj": (kv_heads * head, width),
        "self_attn.o_proj": (width, heads * head),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "mlp.up_proj": (inner, width),
    }
    sizes = [tokens * width, *(layers * int(np.prod(shape)) for shape in shapes.values()), width]
    ends = np.cumsum([struct.calcsize("<7i") // 4, *sizes])
    numbers = np.frombuffer(content, "<f4")
    if len(numbers) != ends[-1] + positions * head:  # after them, the angles of the rotations
        raise SystemExit(f"{file}: {len(numbers)} numbers, where its header makes {ends[-1] + positions * head}")
    first, *parts, last = (torch.from_numpy(numbers[start:stop].copy()) for start, stop in pairwise(ends))
    tensors = {"model.embed_tokens.weight": first.view(tokens, width), "model.norm.weight": last}
    for (name, shape), part in zip(shapes.items(), parts, strict=True):
        for layer, values in enumerate(part.view(layers, *shape)):
            if name.endswith(("q_proj", "k_proj")):
                values = _halves(values, head)
            tensors[f"model.layers.{layer}.{name}.weight"] = values
    model = LlamaForCausalLM(config)
    found = model.load_state_dict(tensors, strict=False)
    if found.unexpected_keys or found.missing_keys != ["lm_head.weight"]:  # which is the embeddings' matrix
        raise SystemExit(f"{file}: {found}")
    return model


def _halves(values: Any, head: int) -> Any:
    """Return rows as transformers rotates them, the halves of each head, from pairs of neighbours."""
    rows, width = values.shape
    return values.view(rows // head, head // 2, 2, width).transpose(1, 2).reshape(rows, width)


def read_tokenizer(file: Path, positions: int) -> Any:
    """Return the tokenizer: byte pairs, merged in the order of their scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    content, at, pieces, scores = file.read_bytes(), 4, [], []
    while at < len(content):
        score, size = struct.unpack_from("<fi", content, at)
        at += 8 + size
        pieces.append(content[at - size : at].decode("utf-8", "replace").replace(" ", SPACE))
        scores.append(score)
    pieces[:FIRST_PIECE] = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    number = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for index in sorted(range(FIRST_PIECE, len(pieces)), key=lambda index: -scores[index]):
        halves = [(pieces[index][:cut], pieces[index][cut:]) for cut in range(1, len(pieces[index]))]
        known = [(left, right) for left, right in halves if left in number and right in number]
        merges += sorted(known, key=lambda pair: (number[pair[0]], number[pair[1]]))
    inner = Tokenizer(models.BPE(number, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))  # noqa: S106
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    strip = decoders.Strip(" ", 1, 0)
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), strip],
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=positions, **special)


def main() -> None:
    """Convert, and tell how many parameters there are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="stories260K.bin")
    parser.add_argument("tokenizer", type=Path, help="tok512.bin")
    parser.add_argument("folder", type=Path, help="to write to, such as runs/stories260k")
    options = parser.parse_args()
    model = read_model(options.model)
    model.save_pretrained(options.folder)
    read_tokenizer(options.tokenizer, model.config.max_position_embeddings).save_pretrained(options.folder)
    print(f"{options.folder}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
