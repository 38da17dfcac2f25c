"""What all tasks share."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.tiny import _tokenizer
from tsugiki.common import tasks
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.base import Encoded, Task, at_rest
from tsugiki.common.tasks.classes import class_metrics
from tsugiki.common.tasks.rows import TokenRows
from tsugiki.common.tasks.text import by_length, pad, tokenise

ROWS = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=6)


@given(ROWS, st.sampled_from([0, 1, 50256]))
def test_pad(rows, pad_id):
    """Catches: padding on the left, a mask of the wrong side, a token lost, another type than int64."""
    ids, mask = pad(rows, pad_id)
    assert ids.shape == mask.shape == (len(rows), max(map(len, rows)))
    assert ids.dtype == mask.dtype == torch.int64
    for row, tokens in enumerate(rows):
        rest = ids.shape[1] - len(tokens)
        assert ids[row].tolist() == tokens + [pad_id] * rest
        assert mask[row].tolist() == [1] * len(tokens) + [0] * rest


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(1, 7))
def test_by_length(lengths, batch_size):
    """Catches: a row lost or doubled, short rows first, batches too large, an order that differs between runs."""
    batches = by_length(lengths, batch_size)
    order = [row for batch in batches for row in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert all(batches)
    assert order == sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))


def test_by_length_pads_little():
    """Catches: batches of mixed lengths, which the longest row makes expensive."""
    assert by_length([1, 9, 2, 8], 2) == [[1, 3], [2, 0]]


@pytest.mark.parametrize("texts", [{"text": [[1], [2, 3]]}, {"anchor": [[1], [2]], "positive": [[3], [4]]}])
def test_length_of_encoded_rows(texts):
    """Catches: columns counted for rows."""
    rows = {name: TokenRows.of(values) for name, values in texts.items()}
    assert len(Encoded(rows)) == 2
    assert len(Encoded(rows, np.zeros(2))) == 2


def test_images_count_as_rows():
    """Catches: no rows where there is no text, and the first rows of a part only."""
    images, targets = np.arange(24, dtype=np.uint8).reshape(3, 2, 4, 1), np.arange(3)
    encoded = Encoded({}, targets, images)
    assert len(encoded) == 3
    first = encoded.first(2)
    assert (len(first), first.targets.tolist()) == (2, [0, 1])
    assert np.array_equal(first.images, images[:2])
    texts = Encoded({"text": TokenRows.of([[1], [2, 3], [4]])}).first(2)
    assert (texts.texts["text"].lists(), texts.targets, texts.images) == ([[1], [2, 3]], None, None)


def test_metrics_of_classes():
    """Catches: F1 weighted by class size, classes that neither occur nor are predicted, accuracy of the loss."""
    logits = torch.tensor([[4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [4.0, 0.0, 0.0], [0.0, 4.0, 0.0]])
    metrics = class_metrics(logits, np.array([0, 0, 1, 1]))
    assert metrics["accuracy"] == 0.75
    assert metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert metrics["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 1, 1])))
    )
    assert {type(value) for value in metrics.values()} == {float}


def test_importing_the_folder_registers_every_file():
    """Catches: a task that exists and cannot be chosen."""
    from pathlib import Path

    files = {path.stem for path in Path(tasks.__file__).parent.glob("*.py")}
    files -= {"__init__", "base", "classes", "pooling", "rows", "text"}  # what tasks share
    assert files
    assert {TASKS.get(name).__module__ for name in TASKS.names()} == {f"tsugiki.common.tasks.{file}" for file in files}
    assert all(issubclass(TASKS.get(name), Task) and TASKS.get(name).name == name for name in TASKS.names())


class SlowTokenizer:
    """A tokenizer in Python, which does not say what it has cut off: a token for each letter, between two others."""

    def __call__(self, *texts, truncation=False, max_length=0, return_attention_mask=True):
        """Return tokens of texts, or of pairs."""
        rows = [[1, *map(ord, "".join(row)), 2] for row in zip(*texts, strict=True)]
        found = {
            "input_ids": [[*row[: max_length - 1], 2] if truncation and len(row) > max_length else row for row in rows]
        }
        return type("Tokens", (dict,), {"is_fast": False})(found)


@pytest.mark.parametrize("fast", [True, False])
def test_texts_that_are_cut_are_counted(fast):
    """Catches: a text that just fits counted; a pair counted twice; a text of another that was cut."""
    tokenizer = _tokenizer() if fast else SlowTokenizer()
    texts = ["abcdef", "abcdefg", "", "abcdefgh"]  # six letters and two tokens around them are eight
    tokens, cut = tokenise(tokenizer, 8, texts)
    assert cut == 2
    assert [len(row) for row in tokens["input_ids"]] == [8, 8, 2, 8]
    around = 3 if fast else 2
    assert tokenise(tokenizer, 8, ["abcdefgh"], ["abcdefgh"])[1] == 1
    assert tokenise(tokenizer, 6 + around, ["abc"], ["abc"])[1] == 0
    assert tokenise(tokenizer, 5 + around, ["abc"], ["abc"])[1] == 1


@pytest.mark.parametrize("training", [True, False])
def test_a_network_at_rest_has_its_own_mode_again(training):
    """Catches: a network that trains on in eval mode, or one that begins to drop, also after an error."""
    network = torch.nn.Dropout(0.5).train(training)

    def fail():
        with at_rest(network):
            assert not network.training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert network.training is training
