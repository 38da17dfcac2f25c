"""Contract clauses from templates: the notation, and how a meaning becomes a sentence.

A template names slots in two ways. `{days}` stands for a value, an amount or a place, or for one of the names
`{provider}`, `{recipient}` and `{agreement}`. `[pay: must be paid | is waived]` stands for a choice, in this
template's own words; all templates of a kind list the options of a choice in the same order. What a clause means is
the kind and the value of every slot but the three names, which differ from contract to contract.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

NAMES = ("provider", "recipient", "agreement")
Meaning = dict[str, int]
"""For each slot of a kind, which of its values: a position in the part's list, or in the choice's options."""

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
        texts: for each kind, its templates as paragraphs.
        values: for each value slot, its values.
        roles: pairs of names, of who provides and of who receives.
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
    """What stays the same within one contract: the names of its parties and of itself, and how it writes numbers."""

    names: Mapping[str, str]
    style: int


def draw_contract(part: Part, rng: np.random.Generator) -> Contract:
    """Return a contract of one part of the data."""
    provider, recipient = part.roles[rng.integers(len(part.roles))]
    names = {"provider": provider, "recipient": recipient, "agreement": str(rng.choice(part.agreements))}
    return Contract(names, int(rng.integers(6)))


def render(part: Part, template: str, meaning: Meaning, contract: Contract) -> str:
    """Return a sentence with this meaning."""
    words = dict(contract.names)
    for slot, values in part.values.items():
        if slot in meaning:
            written = surfaces(slot, values[meaning[slot]])
            words[slot] = written[contract.style % len(written)]
    chosen = _CHOICE.sub(lambda found: found[2].split("|")[meaning[found[1]]].strip(), template)
    sentence = _VALUE.sub(lambda found: words[found[1]], chosen)
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
    if number >= 100:
        return "one hundred" + (f" and {spell(number - 100)}" if number > 100 else "")
    if number < 20:
        return _ONES[number]
    return _TENS[number // 10] + (f"-{_ONES[number % 10]}" if number % 10 else "")
