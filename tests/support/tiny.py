"""Tiny base models with random weights, as folders: for tests that need a real checkpoint and no knowledge in it.

Import as `from tests.support.tiny import tiny_bert`. Building one takes about a tenth of a second once transformers is
imported, and the same arguments give the same bytes.
"""

from pathlib import Path
from typing import Any

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


def tiny_sentence_transformer(folder: Path, *, normalize: bool = True, max_tokens: int = 48, seed: int = 7) -> Path:
    """Write a `SentenceTransformer` of `tiny_bert`, mean pooling and (if asked) normalisation; return the folder.

    Args:
        folder: made if it is not there.
        normalize: whether the vectors have length 1.
        max_tokens: longer texts are cut; at most `MAX_TOKENS`.
        seed: for the weights.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Normalize, Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling

    tiny_bert(folder, seed=seed)
    transformer = Transformer(str(folder), max_seq_length=max_tokens)
    modules = [transformer, Pooling(transformer.get_embedding_dimension()), *([Normalize()] if normalize else [])]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder), create_model_card=False)
    return folder
