"""The loss of a classification, and its adjustment to a site's own shares of the classes."""

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tsugiki.common.tasks.classes import ADJUSTMENT, LABELS, class_loss, logit_adjustment, network_inputs

TEXTS_OF_CLASS = np.array([[0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
"""How often each of three texts occurs in each of two classes, the same at all sites."""
FEDERATION = (0.7, 0.3)


def logits_of_the_federation():
    """Return the logits of the best network for all rows together, shape (texts, classes)."""
    joint = TEXTS_OF_CLASS.T * FEDERATION
    return torch.from_numpy(np.log(joint / joint.sum(axis=1, keepdims=True))).float().requires_grad_()


def rows_of_site(share, rows=200_000):
    """Return the text and the class of each row of a site with this share of class 0."""
    counts = np.rint(rows * TEXTS_OF_CLASS * [[share], [1 - share]]).astype(int)
    pairs = [(text, label) for label in range(2) for text in range(3) for _ in range(counts[label, text])]
    texts, labels = np.array(pairs).T
    return texts, labels


@pytest.mark.parametrize("share", [0.02, 0.3, 0.95])
def test_what_is_best_for_all_is_best_for_each_site(share):
    """Catches: a prior of the wrong sign, of the site alone, or of counts; no adjustment at all."""
    logits = logits_of_the_federation()
    texts, labels = rows_of_site(share)
    batch = {LABELS: torch.from_numpy(labels), ADJUSTMENT: torch.from_numpy(logit_adjustment(labels, FEDERATION))}
    class_loss(logits[texts], batch).backward()
    assert logits.grad.abs().max() < 1e-4


def test_without_a_prior_each_site_pulls_its_own_way():
    """Catches: a test of the adjustment that also passes without it."""
    logits = logits_of_the_federation()
    texts, labels = rows_of_site(0.95)
    class_loss(logits[texts], {LABELS: torch.from_numpy(labels)}).backward()
    assert logits.grad.abs().max() > 0.02


def test_a_site_with_the_federations_shares_adjusts_nothing():
    """Catches: a loss that changes where all sites are alike."""
    labels = np.array([0] * 7 + [1] * 3)
    assert np.allclose(logit_adjustment(labels, FEDERATION), 0, atol=1e-6)


def test_a_class_that_a_site_lacks_has_a_finite_prior():
    """Catches: minus infinity, and with it a loss that is not a number; a few rows that count as much as many."""
    few = logit_adjustment(np.array([0, 0]), (0.5, 0.5))
    many = logit_adjustment(np.zeros(1000, np.int64), (0.5, 0.5))
    # of C = 2 added rows, one is of each class: (0 + 1) / (2 + 2) against 0.5
    assert few == pytest.approx(np.log([1.5, 0.5]), abs=1e-6)
    assert many[1] < few[1]
    assert np.isfinite(many).all()
    assert many.dtype == np.float32


def test_the_plain_loss_is_the_mean_cross_entropy():
    """Catches: a sum over the rows."""
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    labels = torch.tensor([0, 0])
    assert class_loss(logits, {LABELS: labels}) == cross_entropy(logits, labels)


def test_the_network_reads_inputs_alone():
    """Catches: a prior that is handed to the network, which knows no such input."""
    batch = {"input_ids": torch.zeros(1), LABELS: torch.zeros(1), ADJUSTMENT: torch.zeros(2)}
    assert list(network_inputs(batch)) == ["input_ids"]
