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
├── SecureAggregationError 14  a step of secure aggregation was refused, or a site spoils its sums
├── BudgetError            15  a privacy budget does not allow one more round
└── Interrupted           130  stopped by the user; the checkpoint is kept

Each carries a `code` (kebab-case; this, and only this, crosses the network) and three parts: what was wrong, what was
expected, what to do. None ever carries a site's data. `docs/operations.md` explains every code to its reader.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, NewType, TypeAlias

KnownCode = Literal[
    # commands and run files
    "failed",  # an error that has no better code
    "usage",  # a command was called in a way that cannot work
    "config-invalid",  # a run file or site file is wrong
    "unknown-name",  # a name that is not registered, or is registered twice
    "name-taken",  # two classes have the same name
    "entry-invalid",  # a class for a task, an adapter method or a strategy is not whole
    "interrupted",  # stopped by the user; what was finished is kept
    # connecting
    "server-unreachable",  # nobody answers at this address
    "server-unknown",  # no machine has this name
    "server-refused",  # the server refuses the node for another reason
    "proxy-invalid",  # the environment names a proxy that is no HTTP proxy
    "proxy-refused",  # the proxy does not connect to the server
    "tls-required",  # the server speaks TLS, the client does not
    "tls-missing",  # the client speaks TLS, the server does not
    "tls-wrong-ca",  # the certificate was signed by another CA
    "tls-ca-invalid",  # the file given as the CA's holds no certificate
    "tls-expired",  # the certificate has expired, or is not valid yet
    "tls-key",  # the server's key has another passphrase, or belongs to another certificate
    "tls-chain",  # the server lacks the certificate of an intermediate CA
    "tls-wrong-name",  # the certificate is for another name or address
    "key-required",  # the server takes registered keys only
    "key-refused",  # the key is not registered, revoked, or in use
    "key-missing",  # there is no key file
    "key-invalid",  # the key file is encrypted, or holds another kind of key
    "key-revoked",  # the key was revoked, and nobody has restored it
    "key-permissions",  # others on the machine can read the key
    "clock-skew",  # the clocks of site and server differ too much
    # the hello, and a site's own refusals
    "version-mismatch",  # another minor version of Tsugiki, or another Flower
    "base-mismatch",  # the site's base model has other weights
    "spec-mismatch",  # two sides disagree about the adapter
    "site-name",  # a site's name that is not valid
    "site",  # a reply under another site's name
    "site-name-taken",  # a site of this name is connected
    "site-name-key",  # the key is registered under another name
    "class-shares",  # a request whose shares of the classes do not fit the task
    "clients",  # a site that represents no clients, too many, or others than requested
    "too-many-clients",  # more clients than `privacy.enrolled_clients`
    "policy-refused",  # the site's policy forbids the run
    "policy-task",  # it forbids the task
    "policy-adapter",  # it forbids the adapter method
    "policy-base",  # it forbids the base model
    "policy-rounds",  # it forbids one more round, or a run of this number of rounds
    "policy-steps",  # it forbids this number of batches in a round
    "policy-rows",  # it forbids this number of rows in a round
    "policy-settings",  # the site has answered too many different settings in a day
    "policy-rank",  # it forbids this rank
    "policy-privacy-mode",  # it forbids the privacy mode
    "policy-secure-aggregation",  # it demands secure aggregation
    "policy-sites",  # it demands sums of more sites
    "policy-noise",  # it demands more noise
    "policy-epsilon",  # the clients' budget of the site is spent
    "policy-row-epsilon",  # the rows' budget of the site is spent
    "policy-ask",  # nobody at the site has said yes to the run
    "policy-evaluation",  # a private run asks for metrics of the site's rows
    "policy-head-sums",  # it forbids the sums for a head before round 1
    "policy-seeded-noise",  # the run draws its noise from a known seed
    "policy-honest-fraction",  # it believes in a smaller share of honest clients
    "policy-clients",  # a sum has too few clients that the site counts on
    "policy-members",  # a sum has a member that the site has not pinned
    # models and adapters
    "model-unknown",  # the site's `[models]` does not have the run's model
    "model-not-found",  # the model is not where its name says
    "model-format",  # the model has no safetensors
    "model-load",  # the model cannot be loaded
    "model-invalid",  # the model cannot be used
    "model-classes",  # the model's last layer has another number of classes
    "model-not-causal",  # the model cannot predict next tokens
    "model-template",  # the tokenizer has no chat template that can be used
    "head-missing",  # the model has no module for a head
    "adapter-targets",  # the model has no such target modules
    "adapter-rank",  # the rank is larger than the layers
    "adapter-attached",  # the model has an adapter already
    "adapter-unsupported",  # the adapter method does not fit the model
    "adapter-invalid",  # an exported adapter cannot be read, or differs from the one that its run made
    "adapter-fusion",  # the exported adapters cannot be fused
    "adapter-positions",  # too few positions are left for a text
    "adapter-missing",  # the run needs an exported adapter that is not there
    "adapter-other-base",  # the adapter was trained on another base
    "adapter-differs",  # the exported adapter to start from does not fit the run's settings
    "reward-adapter",  # the exported adapter is no reward for this run
    "gradient-checkpointing",  # the model's blocks cannot be computed twice
    "quantization",  # 4 bits need CUDA and bitsandbytes
    "device",  # the device is not there
    "examples-unsupported",  # single rows cannot be protected here
    # a site's data
    "shard-invalid",  # the data cannot be used
    "shard-unusable",  # the data cannot be used in a private run; only the site's own log says why
    "shard-missing",  # there is no such file
    "shard-outside",  # a path leads out of the site's folder
    "shard-format",  # the file is not of the format that its name promises
    "shard-columns",  # a column is missing, or there twice
    "shard-encoding",  # text that is not UTF-8
    "shard-line-too-long",  # a line or a text is too long
    "shard-empty-text",  # a row has no text
    "shard-score",  # a score is no finite number
    "shard-label-range",  # a label outside the task's classes
    "shard-partition",  # the file cannot be split as asked
    "shard-empty",  # no rows
    "shard-too-small",  # too few rows
    "shard-no-evaluation",  # the site keeps no rows for evaluation
    "shard-too-large",  # an image has too many pixels, or all have too many bytes
    "shard-image-broken",  # an image cannot be decoded
    "shard-image-mode",  # an image has another number of bits
    "validation-metric",  # the validation rows do not give the metric
    # notes of a site that is accepted
    "no-bf16",  # bfloat16 was asked for, and the device has none
    "shard-one-class",  # all rows have one label
    "shard-texts-cut",  # texts are longer than `task.max_length`
    "shard-pairs-equal",  # pairs have two equal answers
    "shard-images-mixed",  # images differ in size or channels
    # replies
    "gone",  # no reply in time: not connected
    "slow",  # no reply in time: connected, and trained before
    "silent",  # no reply in time: connected, and never trained
    "deadline",  # the site gave up, too late to be of use
    "diverged",  # the loss is not finite, or has risen too far
    "training-failed",  # training cannot go on
    "out-of-memory",  # the site ran out of memory
    "site-stopping",  # the site is being stopped
    "client-error",  # an exception that nobody expected
    "non-finite",  # a value is NaN or infinite
    "norm",  # the update is too long
    "size",  # another number of bytes
    "dtype",  # another type of number
    "shape",  # another shape
    "decode",  # bytes that are not an array
    "keys",  # other records, keys or number of arrays
    "type",  # a value of another type
    "metrics",  # metrics out of range
    "head-sums",  # numbers that cannot be sums over the site's rows
    "weight",  # a number of rows out of range
    "stale",  # a reply to another round
    "duplicate",  # a second reply
    "unexpected-reply",  # a reply that nobody asked for
    "secagg-refused",  # a step out of turn, or lists that an honest server would not send
    "secagg-message",  # a name, key or share that is not valid
    "secagg-too-few",  # fewer clients or shares than a sum needs
    "secagg-mismatch",  # the sites of a sum were sent different things
    "secagg-signature",  # a site's keys are not signed by its node key for this session
    "secagg-norm",  # a sum is longer than honest sites can make it
    "secagg-search-too-few",  # a site spoils sums, and too few sites are there to find it
    "secagg-search-failed",  # a site spoils sums, and other groups of sites did not show which
    # runs
    "quorum-not-met",  # too few accepted replies, twice
    "not-enough-sites",  # too few sites in time
    "superlink",  # the SuperLink does not start, or does not do what it should
    "superlink-gone",  # the SuperLink has ended
    "run-taken",  # the SuperLink executes the run itself
    "storage",  # a run's folder cannot be used
    "disk-full",  # there is no free space
    "not-writable",  # a folder cannot be written
    "run-exists",  # the run's folder is there already
    "run-missing",  # there is no such run
    "locked",  # another process uses the run's folder
    "linked",  # a file or folder to write is a link to another place
    "run-corrupt",  # a run's file is damaged
    "run-unfinished",  # the run has no adapter yet
    "audit-broken",  # an audit log was changed
    "audit-behind",  # an audit log has lost lines, or is gone
    "metrics-behind",  # a run's metrics.jsonl has lost lines, or was changed
    "checkpoint-corrupt",  # the checkpoint is damaged
    "checkpoint-missing",  # there is no checkpoint
    "checkpoint-foreign",  # the checkpoint is of other settings or another base
    "checkpoint-newer",  # a newer version wrote the checkpoint
    "checkpoint-older",  # an older version wrote the checkpoint
    "budget-exhausted",  # one more round would exceed the clients' budget
    "rows-exhausted",  # one more round would exceed the rows' budget
    "ledger-older",  # an older version charged the ledger too little
    "ledger-behind",  # the ledger has lost lines, or has fewer rounds than the run has released
    "claim-broken",  # an audit by attack found a larger epsilon than a ledger claims
    "plan-hopeless",  # nothing can be learned under the privacy plan
    "plan-changed",  # the privacy plan is not the one that the run was started with
    # exports
    "export-failed",  # an export does not reproduce the run, or cannot be written
    "export-unsupported",  # the run's adapter does not fit into such an export
    "export-exists",  # the export's folder is there already
    "no-public-name",  # the base has no name that others could load
    "merge-unsupported",  # the method cannot be merged into the weights
    "proof-failed",  # the export gives other outputs than the run
    "proof-crashed",  # the export cannot be loaded in a fresh process
    "proof-timeout",  # the export was not loaded in time
]
"""Every code of an error, a rejection or a note of ours, and what it means: the only list in the program."""

WireCode = NewType("WireCode", str)
"""A code as it is sent: a known one, `client-error:NAME`, `policy-members:SITE`, or `flower-error-N` for Flower's."""

Code: TypeAlias = KnownCode | WireCode

_PLAIN_WORD = re.compile(r"^[a-z]+(?=[,;:]? |'|$)(?! = )")
"""A word that gets a capital at the start of a sentence; paths, quoted values, settings and kebab-case names do not."""


def _sentences(*parts: str) -> str:
    """Return the parts that are not empty, each as a sentence."""
    stripped = [part.rstrip(".") for part in parts if part]
    return " ".join(_PLAIN_WORD.sub(lambda word: word[0].capitalize(), part) + "." for part in stripped)


class TsugikiError(Exception):
    """The base class of all errors that Tsugiki raises on purpose.

    Args:
        problem: what was wrong with which value.
        expected: what would have been right.
        hint: what to do now.
        code: a more precise code than that of the class.
    """

    code: Code = "failed"
    exit_status = 1

    def __init__(self, problem: str, expected: str = "", hint: str = "", *, code: Code | None = None) -> None:
        self.problem = problem
        self.expected = expected
        self.hint = hint
        self.code = code or type(self).code
        super().__init__(problem, expected, hint)

    def __str__(self) -> str:
        """Return the three parts as sentences: `No server. Expected --server HOST:PORT. Try: ...`."""
        return _sentences(
            self.problem, self.expected and f"Expected {self.expected}", self.hint and f"Try: {self.hint}"
        )


class UsageError(TsugikiError):
    """A command was called in a way that cannot work."""

    code: Code = "usage"
    exit_status = 2


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a file: which key, its value, what it must be, what to do."""

    key: str
    value: str
    expected: str
    hint: str = ""

    def __str__(self) -> str:
        """Return one line: `train.rank = 0: must be ... Try: ...`."""
        return _sentences(f"{self.key} = {self.value}: must be {self.expected}", self.hint and f"Try: {self.hint}")


class ConfigError(TsugikiError):
    """A run file or site file is wrong. All problems are reported at once, in `problems`."""

    code: Code = "config-invalid"
    exit_status = 2

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{source}: {count}", "", "")

    def __str__(self) -> str:
        """Return the headline and a line for each problem."""
        return "\n".join([f"{self.problem}", *(f"  {problem}" for problem in self.problems)])


class RegistryError(TsugikiError):
    """An unknown or doubly registered name."""

    code: Code = "unknown-name"
    exit_status = 2


class QuorumNotMet(TsugikiError):
    """Too few accepted replies in a round, and in its one retry."""

    code: Code = "quorum-not-met"
    exit_status = 3


class NotEnoughSites(TsugikiError):
    """Too few sites connected in time, or passed the hello."""

    code: Code = "not-enough-sites"
    exit_status = 4


class StorageError(TsugikiError):
    """A run directory cannot be used: it exists, is locked, is full, or holds a corrupt checkpoint."""

    code: Code = "storage"
    exit_status = 5


class DataError(TsugikiError):
    """A data file cannot be used. Codes start with `shard-`; messages hold counts and line numbers, never text."""

    code: Code = "shard-invalid"
    exit_status = 6


class ModelError(TsugikiError):
    """A base model cannot be found, loaded or trusted."""

    code: Code = "model-invalid"
    exit_status = 7


class SpecError(TsugikiError):
    """Two sides disagree about what is exchanged."""

    code: Code = "spec-mismatch"
    exit_status = 8


class WireError(SpecError):
    """Received bytes are not the array that was agreed. `code` is size, dtype, shape, decode, keys or non-finite."""

    code: Code = "decode"
    exit_status = 8


class ExportError(TsugikiError):
    """An export does not reproduce the run's outputs, or cannot be written."""

    code: Code = "export-failed"
    exit_status = 9


class TrainingError(TsugikiError):
    """Local training cannot go on."""

    code: Code = "training-failed"
    exit_status = 10


class LinkError(TsugikiError):
    """A client and its server cannot connect, or cannot any more."""

    code: Code = "server-unreachable"
    exit_status = 11


class PolicyError(TsugikiError):
    """A site's own policy forbids what a run asks for. Codes start with `policy-`."""

    code: Code = "policy-refused"
    exit_status = 12


class DeployError(TsugikiError):
    """The SuperLink does not start, has ended, or does not do what it should."""

    code: Code = "superlink"
    exit_status = 13


class SecureAggregationError(TsugikiError):
    """A step of secure aggregation was refused, or a site spoils its sums. Codes start with `secagg-`."""

    code: Code = "secagg-refused"
    exit_status = 14


class BudgetError(TsugikiError):
    """A privacy budget does not allow one more round. Nothing was asked of the clients for it."""

    code: Code = "budget-exhausted"
    exit_status = 15


class Interrupted(TsugikiError):
    """Stopped by the user. What was finished is kept."""

    code: Code = "interrupted"
    exit_status = 130
