"""Generated contract clauses for the demo: four companies, and a search for clauses that mean the same.

The meaning of a clause is its kind and a value for each of its slots: the notice is 30 days, it is the customer's
right, nothing is refunded. A positive pair has one meaning in two wordings. A near miss is worded like the positive and
differs in exactly one slot: 90 days, or the supplier's right. Embedding models look at wording first, so an untouched
one often takes the near miss, or another clause in familiar words, for the match. Training can teach it which words
decide.

Most of a company's contracts are of four kinds, and it never sees six kinds, so the companies together know more than
any of them alone. The test data has its own wordings, numbers, places and party names.
"""

from __future__ import annotations

import csv
import io
import itertools
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tsugiki.common.errors import StorageError, UsageError
from tsugiki.common.files import write_atomically
from tsugiki.common.rng import generator
from tsugiki.server.demo.clauses import Meaning, Part, draw_contract, render
from tsugiki.server.demo.held_out_clauses import TEST
from tsugiki.server.demo.training_clauses import TRAINING

COMPANIES = ("logistics", "software", "clinic", "retail")
KINDS = tuple(TRAINING.texts)

_COMMON_KINDS = {
    "logistics": ("limitation-of-liability", "force-majeure", "payment-terms", "warranty"),
    "software": ("intellectual-property", "termination-for-convenience", "renewal", "late-payment-interest"),
    "clinic": ("data-protection", "confidentiality", "audit-rights", "termination-for-breach"),
    "retail": ("governing-law", "assignment", "non-compete", "indemnification"),
}
_RARE_KINDS = {
    "logistics": ("indemnification", "termination-for-breach", "late-payment-interest"),
    "software": ("confidentiality", "limitation-of-liability", "data-protection"),
    "clinic": ("payment-terms", "assignment", "termination-for-convenience"),
    "retail": ("warranty", "renewal", "force-majeure"),
}
_COMMON_SHARE = 0.85
_MEANINGS_PER_KIND = 12

SAME = 1.0
NEAR_MISS = 0.4
DIFFERENT = 0.0
"""Scores of pairs. A near miss is more alike than clauses on different matters, but it scores below the middle because
a search that offers it as a match is wrong."""


@dataclass(frozen=True)
class Triplet:
    """A clause, one of the same meaning in other words, and a near miss."""

    anchor: str
    positive: str
    negative: str
    kind: str


@dataclass(frozen=True)
class ScoredPair:
    """Two clauses and how alike they are, from 0 to 1."""

    sentence1: str
    sentence2: str
    score: float


@dataclass(frozen=True)
class DemoData:
    """Training triplets for each company; test triplets, and the same clauses as scored pairs."""

    train: dict[str, list[Triplet]]
    test_triplets: list[Triplet]
    test_pairs: list[ScoredPair]


@dataclass(frozen=True)
class DemoFiles:
    """Paths of the data: all training rows, the rows of each company, and the two test files."""

    train: Path
    sites: dict[str, Path]
    test_retrieval: Path
    test_scored: Path


def generate(seed: int, rows_per_company: int = 360) -> DemoData:
    """Return the demo's data. Equal arguments give equal data; the test part depends on the seed only.

    Raises:
        UsageError: `rows_per_company` is below 1.
    """
    if rows_per_company < 1:
        raise UsageError(f"{rows_per_company} rows for each company are too few", "1 or more")
    train = {company: _company_rows(company, rows_per_company, seed) for company in COMPANIES}
    rng = generator(seed, "demo", "test")
    triplets = [_triplet(TEST, kind, meaning, rng) for kind in KINDS for meaning in _test_meanings(kind, rng)]
    return DemoData(train, triplets, _scored(triplets, rng))


def _company_rows(company: str, rows: int, seed: int) -> list[Triplet]:
    """Return one company's triplets, drawn from its own mix of kinds."""
    rng = generator(seed, "demo", company)
    common = _COMMON_KINDS[company]
    rare = _RARE_KINDS[company]
    shares = [_COMMON_SHARE / len(common)] * len(common) + [(1 - _COMMON_SHARE) / len(rare)] * len(rare)
    triplets = []
    for kind in rng.choice(common + rare, rows, p=shares):
        slots = TRAINING.slots(TRAINING.templates(kind)[0])  # all templates of a kind have the same slots
        meaning = {slot: int(rng.integers(count)) for slot, count in slots.items()}
        triplets.append(_triplet(TRAINING, kind, meaning, rng))
    return triplets


def _test_meanings(kind: str, rng: np.random.Generator) -> list[Meaning]:
    """Return meanings of which any two differ in at least two slots.

    A near miss differs from its anchor in one slot, by an odd step, and all meanings here have an even sum of
    positions. Each anchor therefore has exactly one right answer among all positives and negatives.
    """
    slots = TEST.slots(TEST.templates(kind)[0])
    positions = itertools.product(*map(range, slots.values()))
    even = [position for position in positions if sum(position) % 2 == 0]
    chosen: list[tuple[int, ...]] = []
    # Take meanings in random order, and keep each one that differs enough from all kept before.
    for index in rng.permutation(len(even)):
        if all(sum(map(operator.ne, even[index], other)) > 1 for other in chosen):
            chosen.append(even[index])
    return [dict(zip(slots, position, strict=True)) for position in chosen[:_MEANINGS_PER_KIND]]


def _triplet(part: Part, kind: str, meaning: Meaning, rng: np.random.Generator) -> Triplet:
    """Return a meaning in two wordings, and a near miss worded like the positive, all from one contract."""
    templates = part.templates(kind)
    contract = draw_contract(part, rng)
    first, second = rng.permutation(len(templates))[:2]
    return Triplet(
        render(part, templates[first], meaning, contract),
        render(part, templates[second], meaning, contract),
        render(part, templates[second], _near_miss(meaning, part.slots(templates[0]), rng), contract),
        kind,
    )


def _near_miss(meaning: Meaning, slots: dict[str, int], rng: np.random.Generator) -> Meaning:
    """Return the meaning with one slot changed, by an odd step."""
    slot = str(rng.choice(list(slots)))
    others = [value for value in range(slots[slot]) if (value - meaning[slot]) % 2]
    return meaning | {slot: int(rng.choice(others))}


def _scored(triplets: Sequence[Triplet], rng: np.random.Generator) -> list[ScoredPair]:
    """Return each anchor with its positive, with its near miss, and with a clause of another kind."""
    pairs = []
    for triplet in triplets:
        others = [other.positive for other in triplets if other.kind != triplet.kind]
        pairs += [
            ScoredPair(triplet.anchor, triplet.positive, SAME),
            ScoredPair(triplet.anchor, triplet.negative, NEAR_MISS),
            ScoredPair(triplet.anchor, others[rng.integers(len(others))], DIFFERENT),
        ]
    return pairs


def write(folder: Path, data: DemoData) -> DemoFiles:
    """Write the data as CSV files into `folder`, which is created if needed. Existing files are replaced.

    Raises:
        StorageError: a file cannot be written.
    """
    files = DemoFiles(
        folder / "train.csv",
        {company: folder / "sites" / f"{company}.csv" for company in data.train},
        folder / "test_retrieval.csv",
        folder / "test_scored.csv",
    )
    columns = ("anchor", "positive", "negative")
    rows = {company: [_texts(triplet) for triplet in train] for company, train in data.train.items()}
    try:
        (folder / "sites").mkdir(parents=True, exist_ok=True)
        _write(files.train, (*columns, "company"), [(*row, company) for company in rows for row in rows[company]])
        for company, path in files.sites.items():
            _write(path, columns, rows[company])
        _write(files.test_retrieval, columns, [_texts(triplet) for triplet in data.test_triplets])
        scored = [(pair.sentence1, pair.sentence2, pair.score) for pair in data.test_pairs]
        _write(files.test_scored, ("sentence1", "sentence2", "score"), scored)
    except OSError as error:
        raise StorageError(f"the demo's data cannot be written ({error.strerror})", "a writable folder") from error
    return files


def _texts(triplet: Triplet) -> tuple[str, str, str]:
    return triplet.anchor, triplet.positive, triplet.negative


def _write(path: Path, columns: Sequence[str], rows: Iterable[Sequence[str | float]]) -> None:
    """Write one CSV file."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    write_atomically(path, text.getvalue().encode())
