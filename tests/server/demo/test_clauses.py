"""The notation of the demo's clauses."""

import numpy as np
import pytest

from tsugiki.server.demo.clauses import Contract, Part, draw_contract, render, spell, surfaces

PART = Part(
    texts={"notice": "{provider} gives\n    notice of {days}.\n\n[who: nobody | {recipient}] pays {loss}. on time"},
    values={"days": (30, 90), "loss": ("costs | expenses", "profit | gain"), "years": (1,)},
    roles=(("the Supplier", "the Buyer"),),
    agreements=("this Agreement", "the Contract"),
)
NAMES = {"provider": "the Supplier", "recipient": "the Buyer", "agreement": "this Agreement"}


def sentences(template, **meaning):
    """Return every way in which contracts word a meaning."""
    return {render(PART, PART.templates("notice")[template], meaning, Contract(NAMES, style)) for style in range(6)}


def test_templates_and_slots():
    """Catches: line breaks in a clause; the names, which mean nothing, counted as slots."""
    first, second = PART.templates("notice")
    assert first == "{provider} gives notice of {days}."
    assert PART.slots(first) == {"days": 2}
    assert PART.slots(second) == {"who": 2, "loss": 2}


def test_a_meaning_has_several_wordings_and_no_other_meaning():
    """Catches: a number always written one way; another value's words; small letters at the start of a sentence."""
    ways = {"30 days", "thirty (30) days"}
    assert sentences(0, days=0) == {f"The Supplier gives notice of {way}." for way in ways}
    assert sentences(1, who=0, loss=1) == {f"Nobody pays {way}. On time" for way in ("profit", "gain")}
    assert sentences(1, who=1, loss=0) == {f"The Buyer pays {way}. On time" for way in ("costs", "expenses")}


def test_names_are_drawn_together():
    """Catches: the provider of one pair with the recipient of another."""
    drawn = [draw_contract(PART, np.random.default_rng(seed)) for seed in range(40)]
    assert {(contract.names["provider"], contract.names["recipient"]) for contract in drawn} == set(PART.roles)
    assert {contract.names["agreement"] for contract in drawn} == set(PART.agreements)
    assert len({contract.style for contract in drawn}) == 6


@pytest.mark.parametrize(
    ("slot", "value", "ways"),
    [
        ("days", 30, ("30 days", "thirty (30) days")),
        ("amount", 1_500_000, ("USD 1,500,000", "US$1,500,000", "1,500,000 US dollars")),
        ("percent", 12, ("12%", "twelve percent (12%)")),
        ("place", "Texas", ("Texas",)),
        ("loss", "costs | expenses", ("costs", "expenses")),
    ],
)
def test_ways_to_write_a_value(slot, value, ways):
    """Catches: a value without its unit."""
    assert surfaces(slot, value) == ways


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (1, "one"),
        (13, "thirteen"),
        (20, "twenty"),
        (42, "forty-two"),
        (100, "one hundred"),
        (180, "one hundred and eighty"),
    ],
)
def test_spell(number, words):
    """Catches: a list of words that is off by one."""
    assert spell(number) == words
