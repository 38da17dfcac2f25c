"""Losses of predicted tokens, with logits computed for these tokens only, in chunks.

Over a large vocabulary, logits are by far the largest tensor: 64 rows of 256 tokens and 49,152 words take 3 GiB. So the
model's body runs once, the hidden states of the predicted tokens are selected, and their logits are computed in chunks
that are freed at once.

Between hidden states and logits, some architectures do more than one linear layer: they scale (Granite, Cohere), bound
(Gemma 2) or project. So logits always come from the model's own `forward`, in which the body is replaced by a function
that returns a chunk's hidden states. `_body` checks that this gives the model's logits before it is relied on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from tsugiki.common.tasks.base import Batch, at_rest

if TYPE_CHECKING:
    import torch

log = logging.getLogger("tsugiki.client")

NOTHING = -100
"""The label of a position that has no prediction: PyTorch's cross-entropy skips it."""

CHUNK_BYTES = 36 * 2**20
"""Most bytes of a chunk's logits in float32. Cross-entropy needs as much again, and its gradient twice as much.

Blocks of 32 MiB and less would be cut out of glibc's heap, which may grow with every chunk because small tensors that
are still needed divide it. Larger blocks are returned to the system at once.
"""


@dataclass(frozen=True)
class _Predicted:
    """The predicted tokens of a batch.

    Args:
        states: their hidden states, shape (tokens, width), with gradient.
        labels: their ids, shape (tokens,).
        logits: maps hidden states to logits, shape (tokens, vocabulary).
        chunk: most tokens whose logits are computed at once.
        output_trained: returns whether `logits` has trained parameters of its own.
    """

    states: torch.Tensor
    labels: torch.Tensor
    logits: Callable[[torch.Tensor], torch.Tensor]
    chunk: int
    output_trained: Callable[[], bool] = lambda: False

    def chunks(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield states and labels in chunks; one empty chunk if no token is predicted."""
        import torch

        return zip(torch.split(self.states, self.chunk), torch.split(self.labels, self.chunk), strict=True)


Losses = Callable[["torch.Tensor", "torch.Tensor"], "torch.Tensor"]
"""Maps hidden states, shape (tokens, width), and labels to losses, shape (tokens,)."""


def token_losses(network: Any, batch: Batch, temperature: float = 1.0) -> torch.Tensor:
    """Return the cross-entropy of each predicted token, shape (predicted tokens,), float32, row after row.

    Args:
        network: a causal model.
        batch: `input_ids`, `attention_mask` and `labels` (the next token, or `NOTHING`), all (rows, tokens).
        temperature: divides the logits.
    """
    import torch

    predicted = _predicted(network, batch)

    def plain(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return _cross_entropy(predicted.logits(states), labels, temperature)

    losses: Losses = plain
    if torch.is_grad_enabled() and len(predicted.labels) > predicted.chunk:
        # Otherwise autograd would keep the logits of all chunks.
        losses = _recomputed(plain) if predicted.output_trained() else _differentiated(plain)
    return torch.cat([losses(states, labels) for states, labels in predicted.chunks()])


def token_hits(network: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each predicted token its cross-entropy, and whether it was the likeliest token; without gradients.

    Args:
        network: a causal model.
        batch: as in `token_losses`.
    """
    import torch

    with torch.no_grad():
        predicted = _predicted(network, batch)
        # Allocated before the chunks, so that nothing small divides the memory that the chunks use in turn.
        losses = torch.empty(len(predicted.labels), device=predicted.labels.device)
        hits = torch.empty_like(losses, dtype=torch.bool)
        start = 0
        for states, labels in predicted.chunks():
            logits = predicted.logits(states)
            place = slice(start, start + len(labels))
            losses[place] = _cross_entropy(logits, labels)
            hits[place] = logits.argmax(dim=1) == labels
            start = place.stop
    return losses, hits


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    from torch.nn.functional import cross_entropy

    logits = logits.float()
    if temperature != 1.0:
        logits = logits / temperature
    return cross_entropy(logits, labels, reduction="none")


def _recomputed(losses: Losses) -> Losses:
    """Return the same function; its logits are not kept but computed again for the gradient."""
    from torch.utils.checkpoint import checkpoint

    def again(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = checkpoint(losses, states, labels, use_reentrant=False)
        return found

    return again


def _differentiated(losses: Losses) -> Losses:
    """Return the same function; the gradient with respect to the states is computed at once, so no logits are kept.

    Each loss depends on its own token's states only. So the gradient of any weighted sum of the losses is the gradient
    of their plain sum, each token's part times its weight. Source: Hsu et al. 2024, "Liger Kernel", arXiv:2410.10989,
    section 3.2, which does the same for a mean.
    """
    import torch

    def at_once(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        leaf = states.detach().requires_grad_()
        values = losses(leaf, labels)
        (gradient,) = torch.autograd.grad(values.sum(), leaf)
        # The difference is 0. It only carries the gradient back to the states.
        return values.detach() + ((states - states.detach()) * gradient).sum(dim=1)

    return at_once


def _predicted(network: Any, batch: Batch) -> _Predicted:
    """Run a model without its output layer, and return what its logits for the predicted tokens are computed from."""
    chosen = batch["labels"] != NOTHING
    labels = batch["labels"][chosen]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    body = _body(network)
    if body is None:
        logits = network(**inputs, use_cache=False).logits[chosen]
        return _Predicted(logits, labels, lambda kept: kept, max(1, len(labels)))
    returned, words = _run_body(network, body, inputs)
    states = returned.last_hidden_state[chosen]
    # Only the small rest is kept: a mixture of experts looks for its router's outputs.
    rest = replace(returned, last_hidden_state=None)
    return _Predicted(
        states,
        labels,
        lambda some: _output(network, body, rest, some),
        max(1, CHUNK_BYTES // (4 * words)),
        lambda: _output_trained(network, body),
    )


def _run_body(network: Any, body: Any, inputs: Batch) -> tuple[Any, int]:
    """Run a model without its output layer; return its body's output, and the size of the vocabulary."""
    forward = body.forward
    returned = []

    def without_states(*args: Any, **kwargs: Any) -> Any:
        returned.append(forward(*args, **kwargs))
        return replace(returned[0], last_hidden_state=returned[0].last_hidden_state[:, :0])

    # The output layer runs on no token, which costs nothing, and shows the size of the vocabulary.
    with _replaced(body, without_states):
        logits = network(**inputs, use_cache=False).logits
    return returned[0], logits.shape[-1]


def _output(network: Any, body: Any, rest: Any, states: torch.Tensor) -> torch.Tensor:
    """Return a model's logits for hidden states of shape (tokens, width)."""
    import torch

    returned = replace(rest, last_hidden_state=states[None])
    unread = torch.zeros(1, len(states), dtype=torch.int64, device=states.device)
    with _replaced(body, lambda *args, **kwargs: returned):
        logits: torch.Tensor = network(input_ids=unread, use_cache=False).logits[0]
    return logits


def _output_trained(network: Any, body: Any) -> bool:
    """Return whether a module outside the body has trained parameters, also if it shares them with the body."""
    inside = set(body.modules())
    outside = [module for module in network.modules() if module not in inside]
    return any(value.requires_grad for module in outside for value in module.parameters(recurse=False))


@contextmanager
def _replaced(body: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace a module's `forward` inside a `with` block."""
    own = vars(body).get("forward")  # some adapter methods have replaced it already
    body.forward = forward
    try:
        yield
    finally:
        if own is None:
            del body.forward
        else:
            body.forward = own


_body_names: dict[type, str | None] = {}
"""By class of causal models: the name of the body; None if it cannot be separated from the output layer."""


def _body(network: Any) -> Any:
    """Return the part of a causal model that computes hidden states, or None if it cannot be separated."""
    plain = network.get_base_model() if hasattr(network, "get_base_model") else network
    kind = type(plain)
    if kind not in _body_names:
        _body_names[kind] = next((name for name in _candidates(plain) if _separable(network, plain, name)), None)
        if _body_names[kind] is None:
            log.info("%s computes logits for all tokens: its output layer cannot be run alone", kind.__name__)
    name = _body_names[kind]
    return None if name is None else plain.get_submodule(name)


def _candidates(plain: Any) -> list[str]:
    """Return the names of the modules that may be a model's body: `base_model`, and what some architectures have."""
    prefix = getattr(plain, "base_model_prefix", "")
    names = (prefix, f"{prefix}.decoder", "model")
    known = dict(plain.named_modules())
    return [name for name in names if name and name in known]


def _separable(network: Any, plain: Any, name: str) -> bool:
    """Return whether the output layer, run alone on some tokens, gives the logits of the whole model."""
    import torch

    body = plain.get_submodule(name)
    device = next(plain.parameters()).device
    ids = torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]], device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad(), at_rest(network):
        whole = network(**inputs, use_cache=False).logits
        try:
            returned, _ = _run_body(network, body, inputs)
            rest = replace(returned, last_hidden_state=None)
            alone = _output(network, body, rest, returned.last_hidden_state[:, 1:3].flatten(0, 1))
        except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
            # The architecture does more with its body's output than this module knows.
            log.debug("%s without its output layer: %s", type(plain).__name__, error)
            return False
    same = whole[:, 1:3].flatten(0, 1)
    rounding = 4 * torch.finfo(whole.dtype).eps * float(whole.abs().max())
    return alone.shape == same.shape and torch.allclose(alone, same, rtol=0.0, atol=rounding)
