"""The features that a model's head reads, and their sums over a site's rows, for a head in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tsugiki.common.errors import ModelError
from tsugiki.common.head_sums import MOST_ROWS, HeadSums, zero_sums
from tsugiki.common.model.graft import Graft
from tsugiki.common.model.linear_head import LinearHead
from tsugiki.common.rng import generator
from tsugiki.common.tasks.base import Encoded, at_rest
from tsugiki.common.tasks.text import by_length


def rows_for_sums(rows: int, run_seed: int, site: str) -> list[int]:
    """Return the numbers of the rows in a site's sums, sorted: all of them, or `MOST_ROWS` drawn by the run's seed."""
    if rows <= MOST_ROWS:
        return list(range(rows))
    drawn = generator(run_seed, "head-rows", site).choice(rows, MOST_ROWS, replace=False)
    return sorted(drawn.tolist())


def sum_features(
    graft: Graft, head: LinearHead, encoded: Encoded, rows: Sequence[int], batch_size: int, threads: int
) -> HeadSums:
    """Return the sums over some rows, of their features and classes.

    Args:
        graft: with the adapter on which the head is to be put.
        head: of the graft.
        encoded: the site's rows, with their classes.
        rows: which of them.
        batch_size: rows in one pass.
        threads: as in training, because their number changes the last digits.

    Raises:
        ModelError: `head-missing`, the head does not read one vector of features a row.
    """
    import torch

    torch.set_num_threads(threads)
    sums = zero_sums(head.width, head.classes)
    lengths = [sum(len(texts[row]) for texts in encoded.texts.values()) for row in rows]
    with torch.no_grad(), at_rest(graft.base.network):
        for batch in by_length(lengths, batch_size):
            chosen = [rows[index] for index in batch]
            features, targets = _features(graft, head, encoded, chosen)
            classes = torch.nn.functional.one_hot(targets, head.classes).double()
            with_ones = torch.nn.functional.pad(features, (0, 1), value=1.0)
            sums.gram[:] += (with_ones.T @ with_ones).numpy()
            sums.moments[:] += (with_ones.T @ classes).numpy()
    # a matrix product may round the two halves of a symmetric matrix differently
    symmetric = (sums.gram + sums.gram.T) / 2
    return HeadSums(symmetric, sums.moments)


def _features(graft: Graft, head: LinearHead, encoded: Encoded, rows: Sequence[int]) -> tuple[Any, Any]:
    """Return the features of a batch, shape (rows, width), float64, and its classes, shape (rows,), on the CPU."""
    batch = graft.task.batch(encoded, rows, graft.base)
    targets = batch["labels"]
    inputs = {name: values.to(graft.device) for name, values in batch.items()}
    # the layer hands on what it reads, so that the model picks a row's position in the text as it does for logits
    hook = head.layer.register_forward_hook(lambda layer, read, written: read[0])
    try:
        features = graft.task.logits(graft.base.network, inputs).cpu().double()
    finally:
        hook.remove()
    if features.shape != (len(rows), head.width):
        raise ModelError(
            f"the head reads features of the shape {tuple(features.shape)}",
            f"({len(rows)}, {head.width})",
            'set task.warm_head = "off"',
            code="head-missing",
        )
    return features, targets
