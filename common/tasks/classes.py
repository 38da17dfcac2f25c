"""Classes by name, and the metrics of a classification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

if TYPE_CHECKING:
    import torch


def named_classes(logits: torch.Tensor, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Return the likeliest class of each row, with its probability; logits have the shape (rows, classes)."""
    chances, numbers = logits.float().softmax(dim=1).max(dim=1)
    return [
        {"label": labels[number], "probability": chance}
        for number, chance in zip(numbers.tolist(), chances.tolist(), strict=True)
    ]


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
