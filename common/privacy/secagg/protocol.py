"""The protocol of secure aggregation: a server learns the sum of its clients' vectors, and nothing else about them.

    client                                  server                              client's step
    start             -> public keys     -> collects, sends the list to all     keys
    make_shares       -> sealed shares   -> hands each to its receiver          shares
    receive_shares                                                              received
    mask_vector       -> masked vector   -> adds up; who is missing dropped     masked
    answer_unmask     -> shares          -> unmask                              answered

Each client adds a mask that it shares with each other client, of opposite sign at the two, and one of its own. The
secrets behind the masks are split among all, so that a threshold of clients can open the sum after some dropped out:
for a survivor they reveal the seed of its own mask, for a dropped client the key of its pair masks, never both.

Source: Bonawitz et al. 2017, "Practical Secure Aggregation for Privacy-Preserving Machine Learning" (CCS 2017, figure
4; eprint 2017/281), with the complete graph. The server may keep and combine all it sees. A client refuses every
request that an honest server would not make, and everything that follows from keys is bound to a context, the hash of
all that the client was sent (`binding.py`). Public keys are signed and checked by the caller; without that, the server
is trusted to relay them unchanged. If `c` clients hand all their secrets to the server, a threshold above (n + c) / 2
keeps it from getting both secrets of another client by sending different lists to different clients.

Every function that a client calls takes its state and returns the next one, to be stored before the answer is sent. A
step is done once: a vector masked twice with the same masks would reveal the difference. A driver that has to answer
again sends the stored answer again. Secrets are dropped as soon as they are used (Python cannot overwrite them).
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from tsugiki.common.privacy.secagg import primitives as masks
from tsugiki.common.privacy.secagg.binding import HASH_BYTES
from tsugiki.common.privacy.secagg.messages import (
    KEYS_BYTES,
    MOST_CLIENTS,
    SEALED_BYTES,
    SESSION_BYTES,
    Answer,
    ClientState,
    check_names,
    exactly,
    malformed,
    refused,
    too_few,
)
from tsugiki.common.privacy.secagg.primitives import SECRET_BYTES
from tsugiki.common.wire import ring
from tsugiki.common.wire.ring import Ring


def new_session() -> bytes:
    """Return a random session id, 16 bytes."""
    return os.urandom(SESSION_BYTES)


def threshold(clients: int, n_min: int) -> int:
    """Return the number of shares that recover a secret: at least `n_min`, and more than half of the clients.

    More than half, because a server that sends different lists to the clients would need this many answers of each
    kind for one client, and each client answers once.

    Args:
        clients: number of clients that announced keys, 2 to 255.
        n_min: the fewest clients whose sum may be opened.

    Raises:
        SecureAggregationError: `secagg-too-few`, or `secagg-message` for more than 255.
    """
    if clients > MOST_CLIENTS:
        raise malformed(f"{clients} clients are too many", f"at most {MOST_CLIENTS}")
    if clients < 2 or not 1 <= n_min <= clients:
        raise too_few(f"{clients} clients are too few for a sum of {n_min}", "at least 2, and as many as a sum takes")
    return max(n_min, clients // 2 + 1)


def start(session: bytes, name: str) -> ClientState:
    """Return a client's state for a new session, with fresh keys. Its `public_keys` go to the server.

    Raises:
        SecureAggregationError: `secagg-message`, if the session id has another length or the name is not valid.
    """
    (name,) = check_names([name])
    exactly(session, SESSION_BYTES)
    return ClientState(session, name, "keys", masks.new_private_key(), masks.new_private_key())


def make_shares(
    state: ClientState, keys: Mapping[str, bytes], n_min: int, context: bytes
) -> tuple[ClientState, dict[str, bytes]]:
    """Draw the seed of the client's own mask, and split it and the mask key among all clients.

    Args:
        state: after `start`.
        keys: the public keys of all clients, its own included, 64 bytes each.
        n_min: the fewest clients whose sum may be opened, as this client sees it.
        context: the hash of all that this client was sent, 32 bytes. Only clients with the same one can go on together.

    Returns:
        The next state, and for each other client the sealed shares that only it can read, 92 bytes each.

    Raises:
        SecureAggregationError: `secagg-refused` out of turn, or if its own keys are not in the list as it sent them;
            `secagg-too-few`; `secagg-message` for hostile names or sizes, or a key that is in the list twice.
    """
    _expect(state, "keys")
    state = replace(state, context=exactly(context, HASH_BYTES))
    names = sorted(check_names(list(keys)))
    halves = [half for name in names for half in _halves(exactly(keys[name], KEYS_BYTES))]
    if len(set(halves)) != len(halves):
        raise malformed("a public key is in the list twice", "keys made for this session")
    if keys.get(state.name) != state.public_keys:
        raise refused("this client's own keys are not in the list", "the keys that it sent")
    needed = threshold(len(names), n_min)
    seed = os.urandom(SECRET_BYTES)
    # Shares are numbered by the sorted names. The client keeps its own share of each secret.
    parts = [masks.split(secret, needed, len(names)) for secret in (seed, state.mask_private)]
    held = {name: one + other for name, one, other in zip(names, *parts, strict=True)}
    sealed = {
        name: masks.seal(_sealing_key(state, keys, name), held[name], state.context, state.name, name)
        for name in names
        if name != state.name
    }
    own = {state.name: held[state.name]}
    return replace(state, step="shares", seed=seed, threshold=needed, keys=dict(keys), held=own), sealed


def receive_shares(state: ClientState, sealed: Mapping[str, bytes]) -> ClientState:
    """Open the shares that others sealed for this client. From now on, its session consists of them and itself.

    Args:
        state: after `make_shares`.
        sealed: by sender, 92 bytes each; clients that dropped out before this are not in it.

    Raises:
        SecureAggregationError: `secagg-refused` out of turn; `secagg-too-few` for fewer clients than the threshold;
            `secagg-message` if a sender is not in the list of keys; `secagg-mismatch` if its shares do not open.
    """
    _expect(state, "shares")
    if set(check_names(list(sealed))) - set(state.keys):
        raise malformed("sealed shares are of a client that announced no keys", "shares of clients in the list")
    if len(sealed) + 1 < state.threshold:
        raise too_few(f"only {len(sealed) + 1} clients have made shares", f"at least {state.threshold}")
    held = dict(state.held)
    for sender, value in sealed.items():
        key = _sealing_key(state, state.keys, sender)
        held[sender] = masks.unseal(key, exactly(value, SEALED_BYTES), state.context, sender, state.name)
    return replace(state, step="received", share_private=b"", held=held)


def mask_vector(state: ClientState, vector: npt.NDArray[np.int64] | Ring, bits: int) -> tuple[ClientState, Ring]:
    """Return the next state and the vector under all its masks, uniform in [0, 2^bits), shape (size,).

    Args:
        state: after `receive_shares`.
        vector: integers, shape (size,), int64 or uint64; taken modulo 2^bits, so that -1 is 2^bits - 1.
        bits: 8, 16, ... or 64, the same at all clients; the sum has to fit.

    Raises:
        SecureAggregationError: `secagg-refused` out of turn, so also for a second vector.
        ValueError: another type, shape or modulus.
    """
    _expect(state, "received")
    # The two clients of a pair add the same mask with opposite signs, so that it cancels in the sum.
    total = ring.reduce(vector, bits)
    total += masks.stream(masks.derive(state.seed, state.context, "self-mask", state.name), total.size, bits)
    for other in sorted(state.held.keys() - {state.name}):
        key = _pair_key(state.mask_private, state.keys[other], state.context, state.name, other)
        _add(total, masks.stream(key, total.size, bits), positive=state.name < other)
    return replace(state, step="masked", mask_private=b"", seed=b""), ring.reduce(total, bits)


def answer_unmask(
    state: ClientState, survivors: list[str], dropped: list[str], n_min: int
) -> tuple[ClientState, Answer]:
    """Return the next state, without any secret, and the shares that open the sum of the survivors.

    Args:
        state: after `mask_vector`.
        survivors: the clients whose masked vectors are in the sum.
        dropped: the clients that exchanged shares and sent no masked vector.
        n_min: the fewest clients whose sum may be opened, as this client sees it.

    Raises:
        SecureAggregationError: `secagg-refused` if it answered before, if a name is in both lists, if the lists
            together are not the clients it exchanged shares with, or if it is not a survivor itself;
            `secagg-too-few` for fewer survivors than `n_min` or the threshold; `secagg-message` for hostile lists.
    """
    _expect(state, "masked")
    alive = set(check_names(survivors))
    gone = set(check_names(dropped))
    if alive & gone:
        raise refused("a client is said to have survived and to have dropped", "one of the two")
    if alive | gone != state.held.keys():
        raise refused("the lists are not the clients of this session", "all that exchanged shares, and no other")
    if state.name not in alive:
        raise refused("this client is not among the survivors", "a sum with its own vector in it")
    if len(alive) < max(n_min, state.threshold):
        raise too_few(f"a sum of {len(alive)} clients is too small", f"at least {max(n_min, state.threshold)}")
    # Of each client one secret is opened, never both: together they would reveal its vector.
    answer = Answer(
        {name: _halves(state.held[name])[0] for name in sorted(alive)},
        {name: _halves(state.held[name])[1] for name in sorted(gone)},
    )
    return replace(state, step="answered", held={}), answer


def unmask(
    total: Ring,
    survivors: Collection[str],
    dropped: Collection[str],
    keys: Mapping[str, bytes],
    answers: Mapping[str, Answer],
    needed: int,
    context: bytes,
    bits: int,
) -> Ring:
    """Return the sum of the survivors' vectors modulo 2^bits, exactly; shape (size,).

    A wrong share of a seed cannot be detected, and makes the sum random, as a client's random vector would.

    Args:
        total: the sum of the survivors' masked vectors, shape (size,); it may be taken modulo 2^64.
        survivors: the clients whose masked vectors are in it.
        dropped: the clients that exchanged shares and sent no masked vector.
        keys: the public keys of all clients, the same list as the clients received: it numbers the shares.
        answers: by client.
        needed: the number of shares that recover a secret: `threshold(len(keys), n_min)`.
        context: the hash that the clients passed to `make_shares`.
        bits: the same as at the clients.

    Raises:
        SecureAggregationError: `secagg-too-few` for fewer shares of a secret than `needed`; `secagg-message` if a
            recovered mask key is not the announced one; `secagg-refused` for lists that overlap or name clients
            without keys, or for too low a `needed`.
    """
    alive = set(survivors)
    gone = set(dropped)
    if alive & gone or not alive | gone <= keys.keys() or not answers.keys() <= alive:
        raise refused("the lists overlap, or name clients without keys", "survivors, who answer, and dropped clients")
    if needed < threshold(len(keys), 1):  # too few shares would give wrong secrets, unnoticed
        raise refused(f"{needed} shares are another number than a secret takes", "what threshold() returned")
    numbered = {number: answers[name] for number, name in enumerate(sorted(keys), 1) if name in answers}
    # Take away each survivor's own mask, then the pair masks that survivors share with dropped clients.
    opened = ring.reduce(total, bits)
    for name in sorted(alive):
        seed = _recover(name, {number: answer.seeds for number, answer in numbered.items()}, needed)
        _add(opened, masks.stream(masks.derive(seed, context, "self-mask", name), total.size, bits), positive=False)
    for name in sorted(gone):
        private = _recover(name, {number: answer.mask_keys for number, answer in numbered.items()}, needed)
        # Unlike a seed, a recovered key can be checked, as its public key is known.
        if masks.public_key(private) != _halves(keys[name])[0]:
            raise malformed(f"the mask key put together for {name!r} is not the announced one", "shares that fit")
        for other in sorted(alive):
            pair = masks.stream(_pair_key(private, keys[other], context, name, other), total.size, bits)
            _add(opened, pair, positive=name < other)  # the survivor added the opposite
    return ring.reduce(opened, bits)


def _recover(name: str, shares: Mapping[int, Mapping[str, bytes]], needed: int) -> bytes:
    """Return a client's secret from its first `needed` shares; `shares` contains the answers by the shares' index."""
    found = [(index, shares[index][name]) for index in sorted(shares) if name in shares[index]]
    if len(found) < needed:
        raise too_few(f"only {len(found)} shares of the secret of {name!r} came", f"at least {needed}")
    return masks.combine(dict(found[:needed]))


def _sealing_key(state: ClientState, keys: Mapping[str, bytes], other: str) -> bytes:
    """Return the key under which two clients seal shares for each other."""
    return masks.agree(state.share_private, _halves(keys[other])[1], state.context, "shares", (state.name, other))


def _pair_key(private: bytes, keys: bytes, context: bytes, one: str, other: str) -> bytes:
    """Return the key of two clients' mask, from the private mask key of one and the public keys of the other."""
    return masks.agree(private, _halves(keys)[0], context, "pair-mask", (one, other))


def _add(total: Ring, mask: Ring, *, positive: bool) -> None:
    """Add a mask or take it away, in place; modulo 2^64, which a modulus of 2^bits divides."""
    (np.add if positive else np.subtract)(total, mask, out=total)


def _halves(value: bytes) -> tuple[bytes, bytes]:
    """Return the two parts of public keys, or of held shares."""
    return value[:SECRET_BYTES], value[SECRET_BYTES:]


def _expect(state: ClientState, step: str) -> None:
    """Check that the client's last step was this one; a step out of turn, or a second time, is refused."""
    if state.step != step:
        raise refused(f"this step is out of turn: the client's last one was {state.step!r}", f"{step!r}")
