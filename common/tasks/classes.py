"""Classes by name, the loss of a classification, and its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch

    from tsugiki.common.tasks.base import Batch

LABELS = "labels"
ADJUSTMENT = "adjustment"
"""What a batch may hold beside the inputs of the network: the rows' classes, and what `logit_adjustment` returns."""


def named_classes(logits: torch.Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the likeliest class of each row, with its probability; logits have the shape (rows, classes)."""
    chances, numbers = logits.float().softmax(dim=1).max(dim=1)
    return [
        {"label": labels[number], "probability": chance}
        for number, chance in zip(numbers.tolist(), chances.tolist(), strict=True)
    ]


def network_inputs(batch: Batch) -> Batch:
    """Return the part of a batch that the network reads."""
    return {name: tensor for name, tensor in batch.items() if name not in (LABELS, ADJUSTMENT)}


def class_loss(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Return the mean cross-entropy of a batch.

    With an `adjustment` in the batch, the loss is logit-adjusted: the adjustment is added to each row's logits, so that
    the network itself has to explain only what does not follow from the site's shares of the classes. Menon et al.
    2021, arXiv:2007.07314, adjust so for rare classes; Zhang et al. 2022, arXiv:2209.00189, adjust the sites of a
    federation whose classes differ.

    Args:
        logits: of shape (rows, classes), float32.
        batch: with `labels` of shape (rows,), and perhaps `adjustment` of shape (classes,).
    """
    from torch.nn.functional import cross_entropy

    if ADJUSTMENT in batch:
        logits = logits + batch[ADJUSTMENT]
    return cross_entropy(logits, batch[LABELS])


def logit_adjustment(targets: npt.NDArray[Any], shares: Sequence[float]) -> npt.NDArray[np.float32]:
    """Return by how much each class is likelier at a site than in the federation, as logarithms, shape (classes,).

    If the sites' texts of one class are alike, each site's loss with this adjustment has the same minimum: the network
    that knows the federation's shares. Without it, each site's loss has a minimum of its own.

    For n rows, n_c of them of class c, and the federation's share q_c, it is log((n_c + q_c C) / ((n + C) q_c)). The C
    rows that are added, one for each class on average, keep it finite: few rows say little about a site's shares.

    Args:
        targets: the class of each row, shape (rows,).
        shares: of the classes in the federation, shape (classes,), all above 0; they sum to 1.
    """
    federation = np.asarray(shares, np.float64)
    classes = len(federation)
    counts = np.bincount(targets, minlength=classes)
    here = (counts + classes * federation) / (len(targets) + classes)
    return np.log(here / federation).astype(np.float32)


def class_metrics(logits: torch.Tensor, targets: npt.NDArray[Any] | None) -> dict[str, float]:
    """Return accuracy, macro_f1 (over the classes that occur or are predicted) and loss (cross-entropy).

    Args:
        logits: of shape (rows, classes).
        targets: of shape (rows,).
    """
    import torch
    from sklearn.metrics import f1_score
    from torch.nn.functional import cross_entropy

    classes = torch.from_numpy(targets)
    predicted = logits.argmax(dim=1)
    return {
        "accuracy": float((predicted == classes).float().mean()),
        "macro_f1": float(f1_score(classes.numpy(), predicted.numpy(), average="macro")),
        "loss": float(cross_entropy(logits, classes)),
    }
