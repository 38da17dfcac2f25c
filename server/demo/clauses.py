"""Contract clauses from templates: the notation, and the step from a meaning to a sentence.

A template names slots in two ways. `{days}` is a slot for a value, an amount or a place, or for one of the names
`{provider}`, `{recipient}` and `{agreement}`. `[pay: must be paid | is waived]` is a choice, in this template's own
words; all templates of a kind list the options of a choice in the same order. The meaning of a clause is its kind and
the value of every slot except the three names, which differ between contracts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NAMES = ("provider", "recipient", "agreement")
Meaning = dict[str, int]
"""The value of each slot of a kind, as a position in the part's list of values or in the options of the choice."""

_CHOICE = re.compile(r"\[(\w+): ([^]]+)\]")
_VALUE = re.compile(r"\{(\w+)\}")
_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["-", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]


@dataclass(frozen=True)
class Part:
    """The wordings of one part of the data, training or test.

    Args:
        texts: templates of each kind, as paragraphs.
        values: values of each slot that is not a choice.
        roles: pairs of names: the provider and the recipient.
        agreements: names for the contract.
    """

    texts: Mapping[str, str]
    values: Mapping[str, tuple[int | str, ...]]
    roles: tuple[tuple[str, str], ...]
    agreements: tuple[str, ...]

    def templates(self, kind: str) -> list[str]:
        """Return the kind's templates, each on one line."""
        return [" ".join(paragraph.split()) for paragraph in self.texts[kind].split("\n\n")]

    def slots(self, template: str) -> dict[str, int]:
        """Return the template's slots and how many values each has."""
        choices = {slot: options.count("|") + 1 for slot, options in _CHOICE.findall(template)}
        named = {slot for slot in _VALUE.findall(template) if slot not in NAMES}
        return choices | {slot: len(self.values[slot]) for slot in sorted(named)}


@dataclass(frozen=True)
class Contract:
    """The constants of one contract: the names of its parties and of itself, and its way of writing numbers."""

    names: Mapping[str, str]
    style: int


def draw_contract(part: Part, rng: np.random.Generator) -> Contract:
    """Draw a contract with names from one part of the data."""
    provider, recipient = part.roles[rng.integers(len(part.roles))]
    names = {"provider": provider, "recipient": recipient, "agreement": str(rng.choice(part.agreements))}
    return Contract(names, int(rng.integers(6)))


def render(part: Part, template: str, meaning: Meaning, contract: Contract) -> str:
    """Return a sentence with this meaning, in the wording of a template."""
    words = dict(contract.names)
    for slot, values in part.values.items():
        if slot in meaning:
            written = surfaces(slot, values[meaning[slot]])
            words[slot] = written[contract.style % len(written)]
    chosen = _CHOICE.sub(lambda found: found[2].split("|")[meaning[found[1]]].strip(), template)
    sentence = _VALUE.sub(lambda found: words[found[1]], chosen)
    # A slot may begin a sentence: its first letter becomes a capital.
    return re.sub(r"(^|\. )[a-z]", lambda found: found[0].upper(), sentence)


def surfaces(slot: str, value: int | str) -> tuple[str, ...]:
    """Return all ways to write a value: 30 days are "30 days" and "thirty (30) days"."""
    if isinstance(value, str):
        return tuple(value.split(" | "))
    if slot == "amount":
        return f"USD {value:,}", f"US${value:,}", f"{value:,} US dollars"
    if slot == "percent":
        return f"{value}%", f"{spell(value)} percent ({value}%)"
    return f"{value} {slot}", f"{spell(value)} ({value}) {slot}"


def spell(number: int) -> str:
    """Return a number from 1 to 199 in words."""
    if number == 100:
        return "one hundred"
    if number > 100:
        return f"one hundred and {spell(number - 100)}"
    if number < 20:
        return _ONES[number]
    tens = _TENS[number // 10]
    return f"{tens}-{_ONES[number % 10]}" if number % 10 else tens
