"""VeRA on tiny models."""

import torch

from tests.support.architectures import make, stir, trained
from tsugiki.common.adapters.vera import Vera, VeraSettings


def attach(seed, **settings):
    """Return the method and a BERT with its adapter."""
    model = make()
    torch.manual_seed(seed)
    method = Vera(VeraSettings(**{"rank": 3, **settings}))
    return method, method.attach(model, ("classifier",)).eval()


def test_constants_are_the_projections_and_follow_from_the_seed():
    """Catches: projections that both sides draw apart, unnoticed; a fixed key, for which all runs share one draw."""
    (method, first), (_, again), (_, other) = attach(1), attach(1), attach(2)
    constants = [method.constants(model) for model in (first, again, other)]
    assert [tuple(value.shape) for value in constants[0].values()] == [(3, 16), (16, 3)]
    same = [[torch.equal(a, b) for a, b in zip(constants[0].values(), c.values(), strict=True)] for c in constants[1:]]
    assert same == [[True, True], [False, False]]
    assert not set(constants[0]) & set(trained(first))


def test_the_layer_computes_the_formula():
    """Catches: b and d exchanged; an A that is cut at the wrong side; d_initial ignored."""
    _, model = attach(1, d_initial=0.5)
    layer = model.base_model.model.bert.encoder.layer[0].attention.self.query
    a, b = layer.vera_A["default"], layer.vera_B["default"]
    assert torch.equal(layer.vera_lambda_d["default"].detach(), torch.full((3,), 0.5))
    stir(model)
    d, scale = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    weight = layer.base_layer.weight + scale[:, None] * b @ (d[:, None] * a)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(layer(hidden), hidden @ weight.T + layer.base_layer.bias)
    assert (d.numel(), scale.numel()) == (3, 16)


def test_a_rank_above_the_width_is_fine():
    """Catches: LoRA's bound on the rank, where the projections are shared and cost nothing."""
    _, model = attach(1, rank=64)
    assert sum(value.numel() for name, value in trained(model).items() if "vera" in name) == 2 * 2 * (64 + 16)
