"""The state and the messages of secure aggregation's clients, and the only code that reads received values.

A message is a set of flat values, so that it fits Flower's ConfigRecord. Every key, share and id has one exact size,
and names are checked before they are used.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from tsugiki.common.errors import SecureAggregationError
from tsugiki.common.keys import POINT_BYTES, SIGNATURE_BYTES
from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg.binding import HASH_BYTES
from tsugiki.common.privacy.secagg.primitives import SECRET_BYTES
from tsugiki.common.settings import NAME_PATTERN

SESSION_BYTES = 16
MOST_CLIENTS = 255
KEYS_BYTES = 2 * SECRET_BYTES
"""A client's two public keys: first the one for masks, then the one for sealing shares."""
SIGNED_BYTES = POINT_BYTES + SIGNATURE_BYTES
"""The public key of a site's node, and its signature of the site's two public keys."""
HELD_BYTES = 2 * SECRET_BYTES
"""The shares that one client holds of another: first one of its seed, then one of its mask key."""
SEALED_BYTES = HELD_BYTES + masks.SEALED_EXTRA_BYTES

Fields = dict[str, Any]
"""Flat values as Flower's ConfigRecord takes them: str, int, bytes, and lists of one of these."""

_SECRETS: dict[str, tuple[str, ...]] = {  # the secrets that a client still needs after each step
    "keys": ("mask_private", "share_private"),
    "shares": ("mask_private", "share_private", "seed"),
    "received": ("mask_private", "seed"),
    "masked": (),
    "answered": (),
}


@dataclass(frozen=True)
class ClientState:
    """The state of a client between the messages of one session.

    Args:
        session: 16 random bytes that the server chose.
        name: the client's own name.
        step: the last step that was done: keys, shares, received, masked or answered.
        mask_private: the private key of the pair masks, 32 bytes while it is needed, else empty.
        share_private: the private key for sealing shares, likewise.
        seed: the seed of the client's own mask, likewise.
        context: the hash of the session and of all that the client was sent for it, 32 bytes; empty in step keys.
        threshold: the number of shares that recover a secret.
        keys: everyone's public keys by name, 64 bytes each.
        held: by name, this client's shares of the others' secrets and of its own, 64 bytes each.
    """

    session: bytes
    name: str
    step: str
    mask_private: bytes = field(default=b"", repr=False)
    share_private: bytes = field(default=b"", repr=False)
    seed: bytes = field(default=b"", repr=False)
    context: bytes = b""
    threshold: int = 0
    keys: Mapping[str, bytes] = field(default_factory=dict)
    held: Mapping[str, bytes] = field(default_factory=dict, repr=False)

    @property
    def public_keys(self) -> bytes:
        """The client's public keys, 64 bytes. Read them only before the client makes shares."""
        return masks.public_key(self.mask_private) + masks.public_key(self.share_private)

    def to_dict(self) -> Fields:
        """Return the state as flat values. They contain secrets, and must stay at the client."""
        secrets = {name: getattr(self, name) for name in _SECRETS[self.step]}
        plain = {"session": self.session, "name": self.name, "step": self.step, "threshold": self.threshold}
        if self.context:
            plain["context"] = self.context
        return {**plain, **secrets, **to_fields("keys", self.keys), **to_fields("held", self.held)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ClientState:
        """Return the state that `to_dict` turned into these values.

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
        # A client holds its own shares from the step in which it makes them until it has answered.
        if (name in held) != (step in ("shares", "received", "masked")):
            raise malformed("a stored state has other shares than its step", "what to_dict returned")
        session = exactly(fields.get("session"), SESSION_BYTES)
        context = b""
        if step != "keys":
            context = exactly(fields.get("context"), HASH_BYTES)
        return cls(session, name, step, context=context, threshold=threshold, keys=keys, held=held, **secrets)


@dataclass(frozen=True)
class Answer:
    """The shares that a client sends to the server to open the sum.

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
        """Return a received answer, after checking it against the lists in the request.

        Raises:
            SecureAggregationError: `secagg-message`, if the answer is about other clients, or a share has another size.
        """
        answer = cls(*(from_fields(name, fields, SECRET_BYTES) for name in ("seeds", "mask_keys")))
        if set(answer.seeds) != set(survivors) or set(answer.mask_keys) != set(dropped):
            raise malformed("the shares are of other clients than were asked for", "one for each name in the lists")
        return answer


def to_fields(prefix: str, values: Mapping[str, bytes]) -> Fields:
    """Return public keys, sealed shares or shares by client name as two flat lists, in the order of names.

    Without values, both lists are left out: Flower's `ConfigRecord.count_bytes` fails on an empty list.
    """
    if not values:
        return {}
    return {f"{prefix}_names": sorted(values), f"{prefix}_values": [values[name] for name in sorted(values)]}


def from_fields(prefix: str, fields: Mapping[str, Any], size: int) -> dict[str, bytes]:
    """Return the values by client name from the two lists of `to_fields`, each of exactly `size` bytes.

    Raises:
        SecureAggregationError: `secagg-message`, for other sizes or types, more than 255 clients, a client that occurs
            twice, or a name that is not valid.
    """
    names = check_names(fields.get(f"{prefix}_names", []))
    values = fields.get(f"{prefix}_values", [])
    if not isinstance(values, list) or len(values) != len(names):
        raise malformed(f"{len(names)} names came with another number of {prefix}", "one for each name")
    return {name: exactly(value, size) for name, value in zip(names, values, strict=True)}


def check_names(names: Any) -> list[str]:
    """Return received names, after checking that they are valid and distinct, and at most 255."""
    if not isinstance(names, list) or len(names) > MOST_CLIENTS:
        raise malformed("the names are no list, or too many", f"a list of at most {MOST_CLIENTS}")
    if not all(isinstance(name, str) and re.fullmatch(NAME_PATTERN, name) for name in names):
        raise malformed("a client's name is not valid", f"a name that matches {NAME_PATTERN}")
    if len(set(names)) != len(names):
        raise malformed("a client's name is in the list twice", "each name once")
    return names


def exactly(value: Any, size: int) -> bytes:
    """Return a received value, after checking that it is bytes of this size."""
    if not isinstance(value, bytes) or len(value) != size:
        raise malformed("a key, share or id has another size", f"{size} bytes")
    return value


def refused(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for a step that the protocol does not allow."""
    return SecureAggregationError(problem, expected)


def malformed(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for a message with a value that is not valid."""
    return SecureAggregationError(problem, expected, code="secagg-message")


def too_few(problem: str, expected: str) -> SecureAggregationError:
    """Return the error for too few clients or shares."""
    return SecureAggregationError(problem, expected, code="secagg-too-few")
