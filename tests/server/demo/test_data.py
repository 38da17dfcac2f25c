"""The demo's generated data: what makes the search hard, and fair."""

import csv
import itertools
import re
from collections import Counter

import pytest

from tsugiki.common.data.shard import read
from tsugiki.common.errors import StorageError, UsageError
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks import TASKS
from tsugiki.server.demo.clauses import NAMES, surfaces
from tsugiki.server.demo.data import (
    _COMMON_KINDS,
    _RARE_KINDS,
    COMPANIES,
    DIFFERENT,
    KINDS,
    NEAR_MISS,
    SAME,
    generate,
    write,
)
from tsugiki.server.demo.held_out_clauses import TEST
from tsugiki.server.demo.training_clauses import TRAINING


@pytest.fixture(scope="module")
def data():
    """The demo's data, fewer rows. Read only."""
    return generate(7, 60)


def test_the_same_seed_gives_the_same_data(data):
    """Catches: a global generator; test data that depend on how much training data there is."""
    assert generate(7, 60) == data
    assert generate(7, 3).test_triplets == data.test_triplets
    assert generate(7, 3).test_pairs == data.test_pairs
    assert generate(8, 60).train != data.train
    assert generate(8, 60).test_triplets != data.test_triplets


def test_no_rows_are_refused():
    """Catches: an empty company."""
    with pytest.raises(UsageError, match=r"0 rows for each company are too few\. Expected 1 or more"):
        generate(7, 0)


def test_each_company_has_kinds_of_its_own(data):
    """Catches: companies that all know everything, so that there is nothing to gain together."""
    assert tuple(data.train) == COMPANIES
    for company, rows in data.train.items():
        counts = Counter(row.kind for row in rows)
        assert len(rows) == 60
        assert set(counts) <= set(_COMMON_KINDS[company] + _RARE_KINDS[company])
        assert sum(counts[kind] for kind in _COMMON_KINDS[company]) > 40
        assert len(set(KINDS) - set(_COMMON_KINDS[company]) - set(_RARE_KINDS[company])) >= 6
    assert set(itertools.chain(*_COMMON_KINDS.values())) <= set(KINDS)


@pytest.mark.parametrize("part", [TRAINING, TEST], ids=["training", "test"])
@pytest.mark.parametrize("kind", KINDS)
def test_templates_of_a_kind_say_the_same(part, kind):
    """Catches: a template that lacks a slot, or has another number of options: its meaning would be another one."""
    templates = part.templates(kind)
    assert len(templates) >= 3
    assert len({tuple(sorted(part.slots(template).items())) for template in templates}) == 1
    assert all(count >= 2 for count in part.slots(templates[0]).values())
    for template in templates:
        assert not re.search(r"[\[\]{}|]", re.sub(r"\{\w+\}|\[\w+: [^]]+\]", "", template)), template


def test_both_parts_have_the_same_kinds_and_no_words_in_common():
    """Catches: test clauses that were seen in training, in wording, numbers or names."""
    assert set(TEST.texts) == set(TRAINING.texts)
    assert set(TEST.values) == set(TRAINING.values)
    for kind in KINDS:
        assert not set(TEST.templates(kind)) & set(TRAINING.templates(kind))
        assert TEST.slots(TEST.templates(kind)[0]).keys() == TRAINING.slots(TRAINING.templates(kind)[0]).keys()
    for slot in TEST.values:
        ways = [{way for value in part.values[slot] for way in surfaces(slot, value)} for part in (TEST, TRAINING)]
        assert not ways[0] & ways[1], slot
    assert not set(itertools.chain(*TEST.roles)) & set(itertools.chain(*TRAINING.roles))
    assert not set(TEST.agreements) & set(TRAINING.agreements)


def test_every_triplet_is_three_different_clauses(data):
    """Catches: a near miss that says the same as its anchor; a placeholder left in a clause."""
    rows = [*data.test_triplets, *itertools.chain(*data.train.values())]
    assert len(rows) > 300
    for row in rows:
        assert len({row.anchor, row.positive, row.negative}) == 3
        assert not re.search(r"[\[\]{}|]", row.anchor + row.positive + row.negative)
        assert all(f"{{{name}}}" not in row.anchor for name in NAMES)


def test_each_anchor_has_one_right_answer(data):
    """Catches: two positives that read the same, of which a search can find only one."""
    positives = [row.positive for row in data.test_triplets]
    negatives = {row.negative for row in data.test_triplets}
    assert len(set(positives)) == len(positives)
    assert not set(positives) & negatives
    assert set(Counter(row.kind for row in data.test_triplets)) == set(KINDS)


def test_scored_pairs_are_the_test_clauses(data):
    """Catches: scores that do not go with their pairs; a pair of different clauses of one kind."""
    assert Counter(pair.score for pair in data.test_pairs) == dict.fromkeys(
        (SAME, NEAR_MISS, DIFFERENT), len(data.test_triplets)
    )
    kinds = {row.positive: row.kind for row in data.test_triplets}
    triples = zip(*[iter(data.test_pairs)] * 3, strict=True)
    for row, (same, near, other) in zip(data.test_triplets, triples, strict=True):
        assert (same.sentence1, same.sentence2, same.score) == (row.anchor, row.positive, SAME)
        assert (near.sentence1, near.sentence2, near.score) == (row.anchor, row.negative, NEAR_MISS)
        assert kinds[other.sentence2] != row.kind


def test_the_files_are_what_the_tasks_read(data, tmp_path):
    """Catches: a column by another name; rows lost between companies; a comma or quotation mark that breaks a row."""
    files = write(tmp_path / "new" / "data", data)
    embedding = TASKS.get("sentence-embedding")
    task = embedding(embedding.Settings())
    shard = read(files.train, task.columns, DataFormat(), extra_columns=["company"])
    rows = list(itertools.chain(*data.train.values()))
    assert shard.columns["anchor"] == [row.anchor for row in rows]
    assert shard.columns["negative"] == [row.negative for row in rows]
    assert Counter(shard.extra["company"]) == dict.fromkeys(COMPANIES, 60)
    for company, path in files.sites.items():
        assert read(path, task.columns, DataFormat()).columns["positive"] == [
            row.positive for row in data.train[company]
        ]
    assert len(read(files.test_retrieval, task.columns, DataFormat())) == len(data.test_triplets)
    scored = read(files.test_scored, task.evaluation_columns[1], DataFormat())
    assert scored.columns["score"] == [pair.score for pair in data.test_pairs]
    with files.train.open(encoding="utf-8", newline="") as file:
        assert next(csv.reader(file)) == ["anchor", "positive", "negative", "company"]
    again = {path: path.read_bytes() for path in (files.train, files.test_scored)}
    write(tmp_path / "new" / "data", data)
    assert all(path.read_bytes() == content for path, content in again.items())


def test_a_folder_that_cannot_be_written(data, tmp_path):
    """Catches: a traceback."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="The demo's data cannot be written"):
        write(tmp_path / "file", data)
