"""What the clients of secure aggregation keep and send, and the only code that looks at what they received.

A message is a set of flat values, so that it fits Flower's ConfigRecord. Everything in it has one exact size, and names
are checked before they are used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg.primitives import SECRET_BYTES
from tsugiki.common.settings import NAME_PATTERN

SESSION_BYTES = 16
MOST_CLIENTS = 255
KEYS_BYTES = 2 * SECRET_BYTES
"""A client's public keys: that for masks, that for sealing shares."""
HELD_BYTES = 2 * SECRET_BYTES
"""What one client holds of another: a share of the seed, a share of the mask key."""
SEALED_BYTES = HELD_BYTES + masks.SEALED_EXTRA_BYTES

Fields = dict[str, Any]
"""Flat values as Flower's ConfigRecord takes them: str, int, bytes, and lists of one of these."""

_SECRETS: dict[str, tuple[str, ...]] = {  # what a client still needs after each step
    "keys": ("mask_private", "share_private"),
    "shares": ("mask_private", "share_private", "seed"),
    "received": ("mask_private", "seed"),
    "masked": (),
    "answered": (),
}


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between the messages of one session.

    Args:
        session: 16 random bytes that the server chose.
        name: the client's own.
        step: what was done last: keys, shares, received, masked or answered.
        mask_private: the private key of the pair masks, 32 bytes while it is needed.
        share_private: the private key for sealing shares, likewise.
        seed: of its own mask, likewise.
        threshold: how many shares give a secret back.
        keys: everyone's public keys by name, 64 bytes each.
        held: by name, this client's shares of the others' secrets and of its own, 64 bytes each.
    """

    session: bytes
    name: str
    step: str
    mask_private: bytes = field(default=b"", repr=False)
    share_private: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    threshold: int = 0
    keys: Mapping[str, bytes] = field(default_factory=dict)
    held: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def public_keys(self) -> bytes:
        """The client's public keys, 64 bytes; only before it made shares."""
        return masks.public_key(self.mask_private) + masks.public_key(self.share_private)

    def to_dict(self) -> Fields:
        """Return the state as flat values. They hold secrets, and stay at the client."""
        secrets = {name: getattr(self, name) for name in _SECRETS[self.step]}
        plain = {"session": self.session, "name": self.name, "step": self.step, "threshold": self.threshold}
        return {**plain, **secrets, **to_fields("keys", self.keys), **to_fields("held", self.held)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClientState:
        """Return the state that `to_dict` was called on.

        Raises:
            SecureAggregationError: `secagg-message`, if a value is missing or has another type or size.
        """
        step = fields.get("step")
        threshold = fields.get("threshold")
        if not isinstance(step, str) or step not in _SECRETS or type(threshold) is not int:
            raise malformed("a stored state lacks its step or its threshold", "what to_dict returned")
        secrets = {name: exactly(fields.get(name), SECRET_BYTES) for name in _SECRETS[step]}
        (name,) = check_names([fields.get("name")])
        keys = from_fields("keys", fields, KEYS_BYTES)
        held = from_fields("held", fields, HELD_BYTES)
        if (name in held) != (step in ("shares", "received", "masked")):
            raise malformed("a stored state has other shares than its step", "what to_dict returned")
        session = exactly(fields.get("session"), SESSION_BYTES)
        return cls(session, name, step, threshold=threshold, keys=keys, held=held, **secrets)


@dataclass(frozen=True)
class Answer:
    """What a client gives the server to open the sum.

    Args:
        seeds: for each survivor, a share of the seed of its own mask; 32 bytes each.
        mask_keys: for each dropped client, a share of the private key of its pair masks; 32 bytes each.
    """

    seeds: Mapping[str, bytes] = field(repr=False)
    mask_keys: Mapping[str, bytes] = field(repr=False)

    def to_dict(self) -> Fields:
        """Return the answer as flat values."""
        return {**to_fields("seeds", self.seeds), **to_fields("mask_keys", self.mask_keys)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any], survivors: Collection[str], dropped: Collection[str]) -> Answer:
        """Return a received answer to a request with these lists.

        Raises:
            SecureAggregationError: `secagg-message`, if it is about other clients, or a share has another size.
        """
        answer = cls(*(from_fields(name, fields, SECRET_BYTES) for name in ("seeds", "mask_keys")))
        if set(answer.seeds) != set(survivors) or set(answer.mask_keys) != set(dropped):
            raise malformed("the shares are of other clients than were asked for", "one for each name in the lists")
        return answer


def to_fields(prefix: str, values: Mapping[str, bytes]) -> Fields:
    """Return public keys, sealed shares or shares by client name as two flat lists, in the order of names.

    None if there are no values: Flower's `ConfigRecord.count_bytes` stumbles over an empty list.
    """
    if not values:
        return {}
    return {f"{prefix}_names": sorted(values), f"{prefix}_values": [values[name] for name in sorted(values)]}


def from_fields(prefix: str, fields: Mapping[str, Any], size: int) -> dict[str, bytes]:
    """Return what `to_fields` was given, each value of exactly `size` bytes.

    Raises:
        SecureAggregationError: `secagg-message`, for anything else: other sizes or types, more than 255 clients, one
            of them twice, a name that is none.
    """
    names = check_names(fields.get(f"{prefix}_names", []))
    values = fields.get(f"{prefix}_values", [])
    if not isinstance(values, list) or len(values) != len(names):
        raise malformed(f"{len(names)} names came with another number of {prefix}", "one for each name")
    return {name: exactly(value, size) for name, value in zip(names, values, strict=True)}


def check_names(names: Any) -> list[str]:
    """Return received names if all of them are names, none stands there twice, and they are not too many."""
    if not isinstance(names, list) or len(names) > MOST_CLIENTS:
        raise malformed("the names are no list, or too many", f"a list of at most {MOST_CLIENTS}")
    if not all(isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) for name in names):
        raise malformed("a client's name is not valid", f"a name that matches {NAME_PATTERN}")
    if len(set(names)) != len(names):
        raise malformed("a client's name is in the list twice", "each name once")
    return names


def exactly(value: Any, size: int) -> bytes:
    """Return a received value if it is bytes of this size."""
    if not isinstance(value, bytes) or len(value) != size:
        raise malformed("a key, share or id has another size", f"{size} bytes")
    return value


def refused(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for what the protocol does not allow."""
    return SecureAggregationError(problem, expected)


def malformed(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for a message that holds what it cannot hold."""
    return SecureAggregationError(problem, expected, code="secagg-message")


def too_few(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for fewer clients, or shares, than it takes."""
    return SecureAggregationError(problem, expected, code="secagg-too-few")
