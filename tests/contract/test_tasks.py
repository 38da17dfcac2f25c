"""What every task promises."""

from functools import cache

import numpy as np
import pytest
import torch

from tests.support.exports import settings_of
from tests.support.tiny import tiny_base, write_case
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.registry import Registry
from tsugiki.common.settings import DataFormat, HeadedSettings
from tsugiki.common.tasks import TASKS, Task, text

CASES = {
    f"{name} {form}".strip(): (name, case)
    for name in TASKS.names()
    for form, case in {"": TASKS.get(name).test_case(), **TASKS.get(name).extra_cases()}.items()
}
each_task = pytest.mark.parametrize("name", CASES)


def names_to_test(registry):
    """Return all names; a loop over none would pass."""
    assert registry.names(), f"no {registry.kind} is registered"
    return registry.names()


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by the kind of model, each written once."""
    return cache(lambda model_type: tiny_base(tmp_path_factory.mktemp("base"), model_type))


@pytest.fixture
def folder(bases, name):
    """A base that the task can load. Read only."""
    return bases(CASES[name][1].model_type)


def same(first, second):
    """Return whether columns, or encoded rows, are equal: lists, or arrays, which have no truth of their own."""
    pairs = [(first[key], second[key]) for key in first] if first.keys() == second.keys() else [(0, 1)]
    return all(np.array_equal(*pair) if isinstance(pair[0], np.ndarray) else pair[0] == pair[1] for pair in pairs)


def inputs(encoded):
    """Return all that a model reads of encoded rows, column by column."""
    texts = {name: rows.lists() for name, rows in encoded.texts.items()}
    return {**texts, **({} if encoded.images is None else {"image": encoded.images})}


def tiny(name, folder=None):
    """Return the task of its tiny case, and the rows; with the folder of a base, the case's exports are there."""
    kind, case = TASKS.get(CASES[name][0]), CASES[name][1]
    return kind(kind.Settings(**(settings_of(case, folder) if folder else case.settings))), Shard(case.rows)


def readers():
    """Return the cases that read text."""
    return [name for name in CASES if "text" in {column.kind for column in tiny(name)[0].columns}]


def loaded(name, folder):
    """Return the task, its base in eval mode, and the encoded rows."""
    task, shard = tiny(name, folder)
    torch.manual_seed(1)
    base = task.load(folder, torch.float32)
    base.network.eval()
    return task, base, task.encode(shard, base)


def test_there_are_tasks_and_a_registry_without_any_fails():
    """Catches: tests below that pass because they loop over nothing."""
    assert names_to_test(TASKS)
    with pytest.raises(AssertionError, match="no task is registered"):
        names_to_test(Registry("task"))


@pytest.mark.parametrize("name", TASKS.names())
def test_the_class_is_whole(name):
    """Catches: a name that differs from the registered one; a setting without a default or a description."""
    kind = TASKS.get(name)
    assert issubclass(kind, Task)
    assert kind.name == name == kind.Settings().name
    assert all(field.description for field in kind.Settings.model_fields.values())
    assert kind(kind.Settings()).monitor


@each_task
def test_the_tiny_case_fits_the_columns(name, tmp_path):
    """Catches: a task whose columns cannot be read from a file; a tiny case of other columns."""
    task, shard = tiny(name)
    names = {column.name for column in task.columns}
    assert {column.name for column in task.columns if column.required} <= set(shard.columns) <= names
    assert len({len(values) for values in shard.columns.values()}) == 1
    assert len(shard) >= 16
    file = write_case(tmp_path, shard.columns)
    assert same(read(file, task.columns, DataFormat(), labels=task.labels).columns, shard.columns)
    assert task.evaluation_columns[0] == task.columns
    assert all(form for form in task.evaluation_columns)


@each_task
def test_labels_are_named_where_there_are_classes(name):
    """Catches: a label column that no class belongs to."""
    task, shard = tiny(name)
    kinds = {column.name: column.kind for column in task.columns}
    assert bool(task.labels) == ("label" in kinds.values())
    for column in (name for name, kind in kinds.items() if kind == "label"):
        assert set(shard.columns[column]) <= set(range(len(task.labels)))


@each_task
def test_the_base_is_whole(name, folder):
    """Catches: a transformer that `network` does not use; a head that is not there."""
    _, base, _ = loaded(name, folder)
    inside = {id(parameter) for parameter in base.network.parameters()}
    assert {id(parameter) for parameter in base.transformer.parameters()} <= inside
    assert all(base.transformer.get_submodule(head) is not None for head in base.heads)
    assert {parameter.dtype for parameter in base.network.parameters()} == {torch.float32}


@each_task
def test_encoding_is_repeatable_and_whole(name, folder):
    """Catches: rows lost or shuffled while tokenising; targets of another length."""
    task, shard = tiny(name)
    _, base, encoded = loaded(name, folder)
    again = task.encode(shard, base)
    assert len(encoded) == len(shard)
    assert same(inputs(again), inputs(encoded))
    assert all(len(tokens) <= task.settings.max_length for rows in encoded.texts.values() for tokens in rows)
    if encoded.targets is not None:
        assert encoded.targets.shape == (len(shard),)
    part = task.encode(shard.take([3, 1]), base)
    assert same(inputs(part), inputs(encoded.take([3, 1])))
    few = encoded.first(3)
    assert same(inputs(few), {column: rows[:3] for column, rows in inputs(encoded).items()})
    assert len(few) == 3


@each_task
def test_slices_give_the_same_rows(name, folder, monkeypatch):
    """Catches: rows lost or doubled between two slices; notes of the last slice alone; columns of different slices."""
    task, base, whole = loaded(name, folder)
    monkeypatch.setattr(text, "SLICE_ROWS", 5)
    sliced = task.encode(tiny(name)[1], base)
    assert same(inputs(sliced), inputs(whole))
    assert sliced.notes == whole.notes
    shorter = tiny(name)[0]
    shorter.settings = shorter.settings.model_copy(update={"max_length": 8})
    notes = shorter.encode(tiny(name)[1], base).notes
    monkeypatch.undo()
    assert notes == shorter.encode(tiny(name)[1], base).notes


@pytest.mark.parametrize("name", readers())
def test_lengths_are_what_a_batch_of_one_row_takes(name, folder):
    """Catches: a text that is not counted, so that batches by its length pad as before; segments counted as tokens."""
    task, base, encoded = loaded(name, folder)
    assert task.pads_rows
    lengths = task.lengths(encoded)
    assert lengths.shape == (len(encoded),)
    if name == "rlhf":
        assert lengths.tolist() == [len(prompt) for prompt in encoded.texts["prompt"]]  # answers are yet to be drawn
        return
    for row in range(4):
        masks = [value for key, value in task.batch(encoded, [row], base).items() if key.endswith("attention_mask")]
        sides = 2 if name.startswith("preference") else 1  # padded to the longer one
        assert sum(mask.numel() for mask in masks) == sides * lengths[row]


@each_task
def test_rows_spread_among_empty_ones_are_the_same(name, folder):
    """Catches: rows at others' places; a target of a row that was never read, which could be trained on."""
    encoded = loaded(name, folder)[2]
    places = np.array([1, 4, 9])
    spread = encoded.take(places).spread(places, 12)
    assert len(spread) == 12
    assert same(inputs(spread.take(places)), inputs(encoded.take(places)))
    for values in (spread.targets, spread.reference):
        if values is not None:
            assert not (np.delete(values, places, axis=0) >= 0).any()
    for rows in spread.texts.values():
        assert np.flatnonzero(rows.lengths()).tolist() == places.tolist()


@each_task
def test_batches_hold_the_rows_asked_for(name, folder):
    """Catches: a tensor of another number of rows; a view that later batches overwrite."""
    task, base, encoded = loaded(name, folder)
    batch = task.batch(encoded, [2, 0, 5], base)
    kept = {key: tensor.clone() for key, tensor in batch.items()}
    assert all(isinstance(tensor, torch.Tensor) and tensor.shape[0] == 3 for tensor in batch.values())
    task.batch(encoded, [1, 4, 3], base)
    assert all(torch.equal(batch[key], kept[key]) for key in batch)


@each_task
def test_loss_is_a_finite_scalar_with_a_gradient(name, folder):
    """Catches: a loss for each row, a loss cut off from the model, a loss that changes its batch."""
    task, base, encoded = loaded(name, folder)
    batch = task.batch(encoded, range(8), base)
    kept = {key: tensor.clone() for key, tensor in batch.items()}
    loss = task.loss(base.network, batch)
    assert loss.shape == ()
    assert torch.isfinite(loss)
    loss.backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in base.transformer.parameters())
    assert all(torch.equal(batch[key], kept[key]) for key in kept)
    assert batch.keys() == kept.keys()


def with_heads():
    """Return the cases whose result includes a head with classes."""
    found = [name for name in CASES if isinstance(tiny(name)[0].settings, HeadedSettings)]
    assert found
    return found


@pytest.mark.parametrize("name", with_heads())
def test_logits_are_what_the_loss_compares_with_the_classes(name, folder):
    """Catches: logits of another layer, on which a head before round 1 would be solved; labels as an input."""
    task, base, encoded = loaded(name, folder)
    batch = task.batch(encoded, range(8), base)
    inputs = {key: values for key, values in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = task.logits(base.network, inputs)
        assert logits.shape == (8, len(task.labels))
        assert logits.dtype == torch.float32
        assert torch.equal(task.logits(base.network, batch), logits)
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"])
        assert task.loss(base.network, batch).item() == pytest.approx(loss.item(), abs=1e-6)


@each_task
def test_a_task_without_such_a_head_says_so(name, folder):
    """Catches: logits that a task does not have, taken for those of its classes."""
    task, base, _ = loaded(name, folder)
    if isinstance(task.settings, HeadedSettings):
        assert task.settings.warm_head == "auto"
        return
    with pytest.raises(NotImplementedError, match="no head with classes"):
        task.logits(base.network, {})


@pytest.mark.parametrize("name", readers())
def test_padding_changes_nothing(name, folder):
    """Catches: padding that is attended to, or pooled: a row's loss would depend on its neighbours' lengths."""
    task, base, encoded = loaded(name, folder)
    batch = task.batch(encoded, range(4), base)
    pad_id = base.tokenizer.pad_token_id
    fill = {"input_ids": pad_id, "attention_mask": 0, "token_type_ids": 0, "labels": -100}
    wider = {
        key: torch.nn.functional.pad(tensor, (0, 5), value=fill[key.rpartition(".")[2]])
        if key.rpartition(".")[2] in fill and tensor.ndim == 2
        else tensor
        for key, tensor in batch.items()
    }
    assert any(tensor.shape != batch[key].shape for key, tensor in wider.items())
    with torch.no_grad():
        losses = [task.loss(base.network, inputs).item() for inputs in (batch, wider)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@each_task
def test_metrics(name, folder):
    """Catches: a monitor that is not measured; metrics that no JSON file holds; the file's order mattering."""
    task, base, encoded = loaded(name, folder)
    with torch.no_grad():
        metrics = task.evaluate(base, encoded, 7)
        backwards = task.evaluate(base, task.encode(tiny(name)[1].take(range(len(encoded))[::-1]), base), 7)
    assert task.monitor in metrics
    assert all(type(value) is float and np.isfinite(value) for value in metrics.values())
    assert metrics == pytest.approx(backwards, abs=1e-5, rel=1e-6)
