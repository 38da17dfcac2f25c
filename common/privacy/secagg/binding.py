"""What a site was sent for an attempt at a sum, as hashes that its keys, masks and shares depend on.

A server that sends two sites different things (settings, adapter, plan, members) could make the "sum" one site's
update: the others would send zeros, or add no noise. So everything that a site was sent goes into the derivation of its
pair masks and into the authenticated data of its sealed shares. Sites that were sent different things cannot open each
other's shares, and stop before they train; if they went on, their masks would not cancel. Source: Pasquini, Francati
and Ateniese 2022, "Eluding Secure Aggregation in Federated Learning via Model Inconsistency", arXiv:2111.07380.

    hash      made of                                               known from
    order     the request to train, with the adapter                the step `keys`: the server commits to it
    terms     session, round, settings, plan, order                 the step `keys`; node keys sign it
    context   terms, all members with keys, counts and signatures   the step `shares`
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from tsugiki.common.privacy.plan import Plan
from tsugiki.common.wire.messages import TrainRequest

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

HASH_BYTES = 32
"""Length of each of these hashes: SHA-256."""


def hash_order(request: TrainRequest, adapter: ArrayRecord | None) -> bytes:
    """Return the hash of a request to train, 32 bytes.

    Args:
        request: to train. Its nonce is left out, because each site has another; so are the settings, which are in the
            hash of the terms.
        adapter: that travels beside the request, as it travels; None: the message has none.
    """
    body = json.dumps(asdict(replace(request, nonce="", config="")), sort_keys=True)
    arrays = {} if adapter is None else {name: array.data for name, array in adapter.items()}
    parts = [part for name in sorted(arrays) for part in (name.encode(), arrays[name])]
    return _hash("order", body.encode(), *parts)


def hash_terms(session: bytes, round_number: int, settings: str, plan: Plan, order: bytes) -> bytes:
    """Return the hash of everything that a site is asked to do in an attempt, 32 bytes.

    Args:
        session: names the attempt, 16 bytes.
        round_number: counted from 1.
        settings: of the run, exactly as they were sent: equal texts have equal meanings.
        plan: that the site makes from the settings. The versions in it are left out: sites may have other packages.
        order: of `hash_order`.
    """
    bare = replace(plan, versions="")
    return _hash("terms", session, round_number.to_bytes(8, "big"), settings.encode(), bare.sha256.encode(), order)


def hash_context(
    terms: bytes, keys: Mapping[str, bytes], counts: Mapping[str, int], signed: Mapping[str, bytes], needed: int
) -> bytes:
    """Return the hash of the terms and of the list of members, 32 bytes.

    Args:
        terms: of `hash_terms`.
        keys: public keys by site name.
        counts: by site name, how many clients the server says that it has.
        signed: node keys and signatures by site name, of the sites that have them.
        needed: the number of shares that recover a secret.
    """
    members = []
    for name in sorted(keys):
        members += [name.encode(), keys[name], counts[name].to_bytes(8, "big"), signed.get(name, b"")]
    return _hash("members", terms, needed.to_bytes(8, "big"), *members)


def signed_text(terms: bytes, site: str, public_keys: bytes) -> bytes:
    """Return the text that a site's node key signs: that these keys are the site's, under these terms."""
    return b"tsugiki-secagg-keys\0" + _hash("keys", terms, site.encode(), public_keys)


def _hash(purpose: str, *parts: bytes) -> bytes:
    """Return the SHA-256 of the parts, each after its length: other parts can never give the same bytes."""
    digest = hashlib.sha256()
    for part in (b"tsugiki-secagg", purpose.encode(), *parts):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
