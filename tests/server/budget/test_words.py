"""The words and tables."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from tests.support.budget import private_config
from tsugiki.server.budget.budget import Size, make_budget
from tsugiki.server.budget.words import show

FILE = Path("my runs/run.toml")


def shown(mode, *arguments, size=None, file_mode="", assumed=False, width=80, **settings):
    """Return what is printed about a run, and its numbers."""
    config = private_config(mode, *arguments, **settings)
    budget = make_budget(config, size or Size(12_880), file_mode or mode, assumed)
    stream = io.StringIO()
    show(budget, FILE, Path("out.svg"), Console(file=stream, width=width, highlight=False))
    return stream.getvalue(), budget


def flat(text):
    """Return a text without its line breaks."""
    return " ".join(text.split())


SAMPLED = {"sampling": "poisson", "strategy": {"fraction_train": 0.1}, "noise_multiplier": 2.0}
SETTINGS = [
    {"mode": "central"},
    {"mode": "local"},
    {
        "mode": "distributed",
        "enrolled": 120,
        "honest_fraction": 0.9,
        "size": Size(13_000, 12_000, 1_000, "yes", 25_000),
    },
    {"mode": "central", "enrolled": 1_000, "rounds": 5, **SAMPLED},
    {"mode": "distributed", "secure_aggregation": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=["central", "local", "slack", "sampled", "sums"])
def test_it_fits_into_eighty_columns(settings):
    """Catches: rows that wrap in a log, and values that are cut off."""
    settings = dict(settings)
    text, budget = shown(settings.pop("mode"), **settings)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for row in budget.table:
        line = next(line for line in text.splitlines() if line.split()[:2] == [f"{row.clients:,}", row.mode])
        assert len(line.split()) == (3 if row.noise is None else 8)


def test_the_plan_and_each_adversary_are_told():
    """Catches: a number of the plan that is computed and not shown."""
    text, _ = shown("distributed", enrolled=120, honest_fraction=0.9, size=Size(13_000, 12_000, 1_000, "yes", 25_000))
    for words in (
        "(N) 120", "(n) 120", "(n_min) 100, 0.9 of them honest", "(T) 100", "(C) 1",
        "(z) 6.037, calibrated for epsilon 8",
        "delta 1e-05", "13,000: 12,000 of the adapter, 1,000 of the head", '25,000 with adapter.freeze_a = "no"',
        "modulo 2^32", "(k) 1, whose noise it knows", "secure aggregation no", "other sites included 8.00, budget 8",
        "outsiders, who see the models only 7.94", "no amplification by sampling",
        "90 of 100 clients epsilon of the models 8.5", "refuses to open", "1.15 times the noise it needs",
        "grow in proportion", "plot: out.svg",
    ):  # fmt: skip
        assert words in flat(text), words


def test_who_is_not_protected_from_whom_is_said_in_words():
    """Catches: `inf` left to the reader's interpretation."""
    text, _ = shown("central")
    assert "none: it sees the updates as they are" in flat(text)
    assert "inf" not in text.replace("information", "")
    text, _ = shown("distributed", secure_aggregation=True)
    assert "none: it sees the sums as they are" in flat(text)
    assert "0: no noise" in flat(text)
    assert "No noise" in text


def test_strict_local_privacy_has_its_own_line():
    """Catches: the epsilon against a null update taken for that between any two."""
    text, budget = shown("local")
    assert f"between any two updates, where z counts half {budget.assessment.strict_epsilon:.2f}" in flat(text)


def test_a_plan_that_cannot_learn_is_told_so_with_numbers():
    """Catches: a warning without a way out."""
    text, budget = shown("central", 4)
    levers = {lever.name: lever for lever in budget.assessment.levers}
    assert "Nothing can be learned like this." in flat(text)
    assert f"(n) {levers['clients'].needed:,} instead of 4" in flat(text)
    assert "(T) no number is enough, now 100" in flat(text)
    assert "which promises nothing" in flat(text)
    assert "instead of" not in shown("central", 1_000)[0]
    assert "Hard: little can be learned like this." in shown("central", 300)[0]
    assert "Something can be learned like this." in shown("central", 1_000)[0]


def test_a_smaller_delta_is_told_where_it_is_needed():
    """Catches: so many clients recommended that the file would be refused."""
    text, budget = shown("local", 4, size=Size(100_000))
    assert f"and delta {budget.assessment.levers[0].delta:g}" in flat(text)


def test_what_makes_a_plan_void_is_told():
    """Catches: seeded noise shown as if it protected, a run that ends early, sampling without its condition."""
    assert "NOT PRIVATE" in shown("central", insecure_noise_seed=1)[0]
    early, _ = shown("local", noise_multiplier=6.0, target_epsilon=3.0, rounds=25)
    assert "The budget of 3 ends the run after 18 of its rounds." in flat(early)
    assert "6, as given" in early
    sampled, _ = shown("central", enrolled=1_000, rounds=5, **SAMPLED)
    assert "secret coins" in sampled
    assert "100, on average: each with q = 0.1" in flat(sampled)


def test_without_a_mode_the_others_are_offered():
    """Catches: nothing to read for whoever has not decided yet, and a command that cannot be copied."""
    text, _ = shown("central", 4, file_mode="none", assumed=True)
    command = "tsugiki budget 'my runs/run.toml' --set privacy.mode=distributed --set privacy.target_epsilon=8"
    assert command in text
    assert "At epsilon 8 (assumed)" in flat(text)
    assert "mode none, nothing bounds what an update gives away" in text
    assert "calibrated" not in text


def test_a_refused_row_says_why():
    """Catches: an empty cell."""
    text, _ = shown("central", delta=1e-3)
    assert "refused: delta is not below 1 / N" in flat(text)
    assert "refused" not in shown("central")[0]
