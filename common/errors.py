"""Every error that Tsugiki raises on purpose.

TsugikiError
├── UsageError              2  a command was called in a way that cannot work
├── ConfigError             2  a run file or site file is wrong; carries every problem at once
├── RegistryError           2  an unknown or doubly registered name
├── QuorumNotMet            3  too few accepted replies in a round, twice
├── NotEnoughSites          4  too few sites connected in time, or passed the hello
├── StorageError            5  a run directory cannot be used: exists, locked, full, corrupt
├── DataError               6  a data file cannot be used; becomes a coded reply at a site
├── ModelError              7  a base model cannot be found, loaded or trusted
├── SpecError               8  two sides disagree about the adapter
│   └── WireError           8  received bytes are not the array that was agreed
├── ExportError             9  an export does not reproduce the run's outputs
├── TrainingError          10  local training cannot go on: deadline, divergence
├── LinkError              11  a client and its server cannot connect: network, TLS, key, clock
├── PolicyError            12  a site's own policy forbids what a run asks for
├── DeployError            13  the SuperLink does not start, ended, or does not do what it should
├── SecureAggregationError 14  a step of secure aggregation was refused, and nothing was opened
├── BudgetError            15  a privacy budget does not allow one more round
└── Interrupted           130  stopped by the user; the checkpoint is kept

Each carries a `code` (kebab-case; this, and only this, crosses the network) and three parts: what was wrong, what was
expected, what to do. None ever carries a site's data.
"""

from __future__ import annotations

from dataclasses import dataclass


class TsugikiError(Exception):
    """The root of the tree.

    Args:
        what: what was wrong with which value.
        expected: what would have been right.
        do: what to do now.
        code: a more precise code than the class's own.
    """

    code = "failed"
    exit_status = 1

    def __init__(self, what: str, expected: str = "", do: str = "", *, code: str = "") -> None:
        self.what, self.expected, self.do = what, expected, do
        self.code = code or type(self).code
        super().__init__(what, expected, do)

    def __str__(self) -> str:
        """Return the three parts as one line."""
        parts = [self.what, self.expected and f"expected {self.expected}", self.do and f"Do: {self.do}"]
        return ". ".join(part.rstrip(".") for part in parts if part) + "."


class UsageError(TsugikiError):
    """A command was called in a way that cannot work."""

    code, exit_status = "usage", 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file: which key, its value, what was expected, what to do."""

    key: str
    value: str
    expected: str
    do: str = ""

    def __str__(self) -> str:
        """Return one line: `train.rank = 0: expected ... Do: ...`."""
        return f"{self.key} = {self.value}: expected {self.expected}." + (f" Do: {self.do}." if self.do else "")


class ConfigError(TsugikiError):
    """A run file or site file is wrong. All problems are reported at once, in `problems`."""

    code, exit_status = "config-invalid", 2

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source, self.problems = source, tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}", "", "")

    def __str__(self) -> str:
        """Return the headline and a line for each problem."""
        return "\n".join([f"{self.what}", *(f"  {problem}" for problem in self.problems)])


class RegistryError(TsugikiError):
    """An unknown or doubly registered name."""

    code, exit_status = "unknown-name", 2


class QuorumNotMet(TsugikiError):
    """Too few accepted replies in a round, and in its one retry."""

    code, exit_status = "quorum-not-met", 3


class NotEnoughSites(TsugikiError):
    """Too few sites connected in time, or passed the hello."""

    code, exit_status = "not-enough-sites", 4


class StorageError(TsugikiError):
    """A run directory cannot be used: it exists, is locked, is full, or holds a corrupt checkpoint."""

    code, exit_status = "storage", 5


class DataError(TsugikiError):
    """A data file cannot be used. Codes start with `shard-`; messages hold counts and line numbers, never text."""

    code, exit_status = "shard-invalid", 6


class ModelError(TsugikiError):
    """A base model cannot be found, loaded or trusted."""

    code, exit_status = "model-invalid", 7


class SpecError(TsugikiError):
    """Two sides disagree about what is exchanged."""

    code, exit_status = "spec-mismatch", 8


class WireError(SpecError):
    """Received bytes are not the array that was agreed. `code` is size, dtype, shape, decode, keys or non-finite."""

    code, exit_status = "decode", 8


class ExportError(TsugikiError):
    """An export does not reproduce the run's outputs, or cannot be written."""

    code, exit_status = "export-failed", 9


class TrainingError(TsugikiError):
    """Local training cannot go on."""

    code, exit_status = "training-failed", 10


class LinkError(TsugikiError):
    """A client and its server cannot connect, or cannot any more."""

    code, exit_status = "server-unreachable", 11


class PolicyError(TsugikiError):
    """A site's own policy forbids what a run asks for. Codes start with `policy-`."""

    code, exit_status = "policy-refused", 12


class DeployError(TsugikiError):
    """The SuperLink does not start, has ended, or does not do what it should."""

    code, exit_status = "superlink", 13


class SecureAggregationError(TsugikiError):
    """A step of secure aggregation was refused, and nothing was opened. Codes start with `secagg-`."""

    code, exit_status = "secagg-refused", 14


class BudgetError(TsugikiError):
    """A privacy budget does not allow one more round. Nothing was asked of the clients for it."""

    code, exit_status = "budget-exhausted", 15


class Interrupted(TsugikiError):
    """Stopped by the user. What was finished is kept."""

    code, exit_status = "interrupted", 130
