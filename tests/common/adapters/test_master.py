"""Trained tensors in float32, in modules that compute in 16 bits."""

import copy

import pytest
import torch
from torch import nn

from tsugiki.common.adapters.master import has_masters, keep_masters

TYPES = [torch.bfloat16, torch.float16]


def mixed(dtype):
    """Return a small network of this type: a frozen layer, one whose bias alone is trained, and a trained norm."""
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)).to(dtype)
    network.requires_grad_(False)
    network[1].bias.requires_grad_(True)
    network[2].requires_grad_(True)
    return network


@pytest.mark.parametrize("dtype", TYPES)
def test_the_function_stays_and_the_trained_are_float32(dtype):
    """Catches: outputs of another type or value, which an export would not have; a frozen tensor that is widened."""
    network = mixed(dtype)
    inputs = torch.randn(3, 4).to(dtype)
    before = network(inputs)
    keep_masters(network)
    assert torch.equal(network(inputs), before)
    assert network(inputs).dtype == dtype
    assert torch.equal(network[1](inputs.float()), network[1](inputs))  # the layer before may compute in float32
    types = {name: value.dtype for name, value in network.named_parameters()}
    trained = {name for name, kind in types.items() if kind == torch.float32}
    assert trained == {"1.bias", "2.weight", "2.bias"}
    assert has_masters(network)


@pytest.mark.parametrize("dtype", TYPES)
def test_a_step_of_less_than_their_rounding_is_kept(dtype):
    """Catches: a gradient that does not reach the float32 tensor; an optimiser that works on the copy."""
    network = mixed(dtype)
    keep_masters(network)
    weight = network[2].weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-5, weight_decay=0.0)
    network(torch.randn(3, 4).to(dtype)).float().square().sum().backward()
    assert weight.grad.dtype == torch.float32
    optimizer.step()
    change = (weight - before).abs()
    assert ((change > 5e-6) & (change < 2e-5)).all()  # 1.0 of bfloat16 has no neighbour nearer than 0.004


def test_a_copy_has_its_own_parameters():
    """Catches: a deep copy, as exports make, that computes with the tensors of the original."""
    network = mixed(torch.bfloat16)
    keep_masters(network)
    inputs = torch.randn(3, 4).bfloat16()
    before = network(inputs)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin[2].bias.add_(1.0)
    assert torch.equal(network(inputs), before)
    assert not torch.equal(twin(inputs), before)


def test_float32_is_left_alone():
    """Catches: a forward of ours, with its cost and its refusal of DP-SGD, where nothing has to be cast."""
    network = mixed(torch.float32)
    keep_masters(network)
    assert not has_masters(network)
    assert "forward" not in network[2].__dict__


def test_an_error_inside_leaves_no_copy_behind():
    """Catches: a copy that hides the trained tensor after a failed batch."""
    network = mixed(torch.bfloat16)
    keep_masters(network)
    with pytest.raises(RuntimeError):
        network(torch.randn(3, 5).bfloat16())
    assert network[1].bias is network[1]._parameters["bias"]
