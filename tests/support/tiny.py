"""Tiny base models with random weights, as folders: for tests that need a real checkpoint and no knowledge in it.

Import as `from tests.support.tiny import tiny_bert`. Building one takes about a tenth of a second once transformers is
imported, and the same arguments give the same bytes.
"""

import json
from pathlib import Path
from typing import Any

from tsugiki.common.data.images import write_idx
from tsugiki.common.tasks.image_classification import MODEL_TYPE

PUBLIC_NAME = "tsugiki-tests/tiny-bert"
"""A hub id that no hub has: what the runs of tests set as `model.public_name`."""

MAX_TOKENS = 64

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = "the a an of no not and on clause number party shall good bad alpha beta gamma delta omega sigma kappa theta"
_CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def tiny_bert(folder: Path, *, hidden: int = 32, layers: int = 2, seed: int = 7) -> Path:
    """Write a BERT without a head (`BertModel`), and its tokenizer; return the folder.

    Every ASCII word has tokens: some whole words, the rest letter by letter.

    Args:
        folder: made if it is not there.
        hidden: width; a multiple of 2, the number of heads.
        layers: number of blocks.
        seed: for the weights, drawn with a standard deviation of 0.1 so that inputs are told apart.
    """
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=2 * hidden,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _tokenizer() -> Any:
    """Return a lower-casing WordPiece tokenizer over a few words and all ASCII letters and digits."""
    from transformers import BertTokenizerFast

    pieces = [*_SPECIAL, *_WORDS.split(), *_CHARACTERS[1:], *(f"##{character}" for character in _CHARACTERS), ".", ","]
    return BertTokenizerFast(vocab={piece: index for index, piece in enumerate(pieces)}, model_max_length=MAX_TOKENS)


def tiny_sentence_transformer(
    folder: Path, *, normalize: bool = True, max_tokens: int = 48, hidden: int = 32, seed: int = 7
) -> Path:
    """Write a `SentenceTransformer` of `tiny_bert`, mean pooling and (if asked) normalisation; return the folder.

    Args:
        folder: made if it is not there.
        normalize: whether the vectors have length 1.
        max_tokens: longer texts are cut; at most `MAX_TOKENS`.
        hidden: width; a multiple of 2, the number of heads.
        seed: for the weights.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    tiny_bert(folder, hidden=hidden, seed=seed)
    transformer = Transformer(str(folder), max_seq_length=max_tokens)
    modules = [transformer, Pooling(transformer.get_embedding_dimension()), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder


def tiny_cnn(folder: Path, *, channels: int = 1, size: int = 12, classes: int = 2, seed: int = 7) -> Path:
    """Write a `SmallCnn`; return the folder.

    Args:
        folder: made if it is not there.
        channels: of the images.
        size: side of the images.
        classes: outputs.
        seed: for the weights.
    """
    import torch

    from tsugiki.common.tasks.image_classification import small_cnn

    configuration, network = small_cnn()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network(configuration(channels=channels, image_size=size, num_labels=classes))
    model.save_pretrained(folder)
    return folder


def tiny_vit(folder: Path, *, size: int = 16, seed: int = 7) -> Path:
    """Write a ViT without a head and its preprocessing, for coloured images; return the folder.

    Args:
        folder: made if it is not there.
        size: side of the images.
        seed: for the weights.
    """
    import torch
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ViTModel(config, add_pooling_layer=False)
    model.save_pretrained(folder)
    said = {"size": {"height": size, "width": size}, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.3]}
    (folder / "preprocessor_config.json").write_text(json.dumps({**said, "resample": 3}), "utf-8")
    return folder


def tiny_llama(folder: Path, *, bos: bool = True, tied: bool = True, hidden: int = 32, seed: int = 7) -> Path:
    """Write a `LlamaForCausalLM` and its tokenizer, which pads with the token for the end; return the folder.

    Args:
        folder: made if it is not there.
        bos: whether the tokenizer has a token for the beginning.
        tied: whether the output layer is the embedding.
        hidden: width; a multiple of 2, the number of heads.
        seed: for the weights.
    """
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ("<unk>", "<s>", "</s>")
    pieces = [*special, *_WORDS.split(), *_CHARACTERS[1:], *(f"##{character}" for character in _CHARACTERS), ".", ","]
    inner = Tokenizer(models.WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token=special[0]))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>", **({"bos_token": "<s>"} if bos else {})}
    PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * hidden,
        max_position_embeddings=MAX_TOKENS,
        initializer_range=0.1,
        tie_word_embeddings=tied,
        bos_token_id=1 if bos else None,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def tiny_base(folder: Path, model_type: str) -> Path:
    """Write a base that every task whose tiny case has this `model_type` can load; return the folder."""
    return {"bert": tiny_sentence_transformer, MODEL_TYPE: tiny_cnn, "llama": tiny_llama}[model_type](folder)


def write_case(folder: Path, rows: dict[str, Any]) -> Path:
    """Write the rows of a tiny case as a file that `tsugiki.common.data.shard.read` reads; return its path."""
    if "image" in rows:
        return folder / write_idx(folder, "train", rows["image"], rows["label"])
    lines = [tuple(rows), *zip(*(map(str, values) for values in rows.values()), strict=True)]
    (folder / "train.tsv").write_text("\n".join("\t".join(line) for line in lines), "utf-8")
    return folder / "train.tsv"
