"""Learning from a reward: the estimator against its formula, the bound on the drift, and that rewards rise."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.support.architectures import stir
from tests.support.exports import export_of, settings_of
from tests.support.federation import run_tiny
from tests.support.tiny import tiny_llama
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ConfigError, ModelError
from tsugiki.common.files import read_lines
from tsugiki.common.model.exported import open_exported, write_exported
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Generation
from tsugiki.common.tasks.decoding.rollout import judge
from tsugiki.common.tasks.preference import answer_logps
from tsugiki.common.tasks.rlhf import Rlhf, RlhfSettings, advantages, interval

ROWS = Shard({"prompt": ["name the party", "on", "say good"], "input": ["alpha", "", " "]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama. Read only."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "base")


def settings(folder, **changes):
    """Return settings with a reward that is there."""
    return settings_of(Rlhf.test_case(), folder) | {"name": "rlhf", **changes}


def opened(folder, train=None, **changes):
    """Return a graft whose policy has moved."""
    config = {"task": settings(folder, **changes), "adapter": {"method": "lora", "rank": 2}}
    graft = load_graft(parse({**config, "train": {"device": "cpu", **(train or {})}}), str(folder), 1)
    graft.write(graft.initial)
    stir(graft.base.transformer)
    return graft


def drawn(graft, rows=(0, 1, 2), seed=3):
    """Return a batch of the rows."""
    torch.manual_seed(seed)
    return graft.task.batch(graft.task.encode(ROWS, graft.base), rows, graft.base)


# The estimator


def test_the_baseline_leaves_out_the_answer_itself():
    """Catches: the mean of all answers, which shrinks the gradient; a mean over prompts."""
    returns = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]])
    assert advantages(returns).tolist() == [[-3.0, -1.5, 4.5], [-1.5, -1.5, 3.0]]


def test_the_loss_is_minus_the_mean_return_and_its_gradient_the_estimators(folder):
    """Catches: a wrong sign, gradients through the returns, a mean over tokens, answers mixed up with their returns."""
    graft = opened(folder, samples_per_prompt=3, temperature=0.7)
    batch, network = drawn(graft), graft.base.network
    loss = graft.task.loss(network, batch)
    assert float(loss.detach()) == pytest.approx(-float(batch["returns"].mean()), abs=1e-6)
    loss.backward()
    found = [value.grad.clone() for value in graft.parameters]
    network.zero_grad()
    wanted = torch.zeros(())
    for row in range(3):
        for index in range(3):
            names = ("input_ids", "attention_mask", "labels")
            one = {name: batch[f"{index}.{name}"][row : row + 1] for name in names}
            others = [float(batch["returns"][row, other]) for other in range(3) if other != index]
            weight = float(batch["returns"][row, index]) - sum(others) / 2
            wanted = wanted - weight * answer_logps(network, one, 0.7)[0] / 9
    wanted.backward()
    for value, gradient in zip(graft.parameters, found, strict=True):
        torch.testing.assert_close(gradient, value.grad, rtol=1e-3, atol=1e-5)
    network.zero_grad()
    assert any(gradient.abs().max() > 1e-4 for gradient in found)


def test_the_gradient_is_of_the_policy_that_drew(folder):
    """Catches: dropout in the gradient of answers that were drawn without it; a network left in eval mode."""
    graft = opened(folder)
    network, batch = graft.base.network, drawn(graft)
    for module in network.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Dropout(0.5)
    found = []
    for training in (True, True, False):
        network.train(training)
        graft.task.loss(network, batch).backward()
        assert network.training is training
        found.append(torch.cat([value.grad.flatten() for value in graft.parameters]))
        network.zero_grad()
    network.eval()
    for module in network.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = torch.nn.Identity()
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_estimator_agrees_with_the_exact_gradient(folder):
    """Catches: whatever else biases it: for answers of one token the expected return can be summed over all tokens."""
    graft = opened(folder, samples_per_prompt=64, max_new_tokens=1, temperature=0.5, beta=0.3)
    task, base = graft.task, graft.base
    prompt = task.encode(ROWS, base).texts["prompt"][0].tolist()
    vocabulary = base.network.config.vocab_size
    logps = (base.network(torch.tensor([prompt])).logits[0, -1] / 0.5).log_softmax(dim=0)
    with torch.no_grad():
        middles = logps.detach().double().exp().cumsum(dim=0) - logps.detach().double().exp() / 2
        every = judge(base, [prompt] * vocabulary, middles[:, None], 0.5)
        assert [answer[0] for answer in every.answers] == list(range(vocabulary))
        returns = task.returns(every)
    (-(logps.exp() * returns).sum()).backward()
    exact = torch.cat([value.grad.flatten() for value in graft.parameters])
    base.network.zero_grad()
    encoded = task.encode(ROWS, base)
    torch.manual_seed(1)
    for _ in range(60):
        (task.loss(base.network, task.batch(encoded, [0], base)) / 60).backward()
    estimate = torch.cat([value.grad.flatten() for value in graft.parameters])
    base.network.zero_grad()
    cosine = float(torch.dot(estimate, exact) / (estimate.norm() * exact.norm()))
    assert cosine > 0.95
    assert 0.85 < float(torch.dot(estimate, exact) / exact.norm() ** 2) < 1.15


def test_what_an_answer_is_worth(folder):
    """Catches: a penalty for those that end, a drift that is paid for, a beta or a penalty that is ignored."""
    task = Rlhf(RlhfSettings(beta=0.5, missing_end_penalty=2.0, max_kl=3.0))
    one = torch.ones(2)
    graft = opened(folder)
    judged = judge(graft.base, [[1, 5], [1, 6]], torch.rand(2, 2, dtype=torch.float64), 1.0)
    judged = replace(judged, rewards=4 * one, drifts=torch.tensor([1.0, 3.0]), ended=torch.tensor([1.0, 0.0]))
    assert task.returns(judged).tolist() == [3.5, 0.5]
    above = replace(judged, drifts=torch.tensor([1.0, 5.1]))  # 3.05 on average
    assert task.returns(above).tolist() == [-0.5, pytest.approx(-2.55)]


def test_padding_changes_no_gradient(folder):
    """Catches: an answer that is trained differently beside a longer one."""
    graft = opened(folder)
    batch = drawn(graft)
    fill = {"input_ids": 2, "attention_mask": 0, "labels": -100}
    wider = {
        name: torch.nn.functional.pad(value, (0, 4), value=fill[name.partition(".")[2]]) if "." in name else value
        for name, value in batch.items()
    }
    gradients = []
    for one in (batch, wider):
        graft.task.loss(graft.base.network, one).backward()
        gradients.append(torch.cat([value.grad.flatten() for value in graft.parameters]))
        graft.base.network.zero_grad()
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-6)


def test_draws_follow_the_global_generator(folder):
    """Catches: the same answers in every batch; answers that a seed does not give again."""
    graft = opened(folder, samples_per_prompt=8, max_new_tokens=6, temperature=1.0)
    first, again, other = (drawn(graft, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["returns"], other["returns"])
    assert len({tuple(row) for index in range(8) for row in first[f"{index}.labels"].tolist()}) > 12


# What is read, and reported


def test_a_long_prompt_leaves_room_for_an_answer(folder):
    """Catches: a prompt cut unseen, or so that no answer fits; a prompt cut that need not be."""
    graft = opened(folder, max_length=16, max_new_tokens=6)
    encoded = graft.task.encode(Shard({"prompt": ["clause " * 40, "clause " * 9, "clause"]}), graft.base)
    assert [len(prompt) for prompt in encoded.texts["prompt"]] == [10, 10, 2]
    assert encoded.notes == ("shard-texts-cut:1",)
    assert encoded.texts["prompt"][0][0] == graft.base.tokenizer.bos_token_id
    batch = graft.task.batch(encoded, [0, 1, 2], graft.base)
    assert batch["0.input_ids"].shape[1] <= 16


def test_metrics(folder):
    """Catches: metrics of the batch, not of the prompts; draws that leave the caller's generator elsewhere."""
    graft = opened(folder, missing_end_penalty=1.0, max_kl=0.01)
    encoded = graft.task.encode(ROWS, graft.base)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    found, again = (graft.task.evaluate(graft.base, encoded, size) for size in (1, 64))
    assert torch.equal(torch.get_rng_state(), before)
    assert found == pytest.approx(again, abs=1e-4)
    assert found["reward_low"] < found["reward"] < found["reward_high"]
    assert 0 <= found["ended"] <= 1 <= found["length_tokens"] <= 2
    assert 0 < found["entropy"] < math.log(graft.base.network.config.vocab_size)
    worth = found["reward"] - (1 - found["ended"]) - 0.02 * found["kl"]
    assert found["loss"] == pytest.approx(-worth, abs=1e-5)
    assert found["kl_above"] > 0
    with graft.adapter_disabled():
        bare = graft.task.evaluate(graft.base, encoded, 64)
    assert bare["kl"] == pytest.approx(0, abs=1e-5)
    assert bare["kl_above"] == 0


def test_an_interval_of_a_mean():
    """Catches: the normal quantile for few prompts, the variance with n, no root."""
    low, high = interval([1.0, 2.0, 3.0])
    assert (low, high) == (pytest.approx(2 - 4.30265 / math.sqrt(3), abs=1e-4), pytest.approx(4.48414, abs=1e-4))
    assert interval([5.0]) == (5.0, 5.0)


def test_a_run_without_a_reward_is_refused(folder):
    """Catches: a run that finds out at its sites."""
    with pytest.raises(ModelError) as caught:
        load_graft(parse({"task": {"name": "rlhf"}, "train": {"device": "cpu"}}), str(folder), 1)
    assert caught.value.code == "adapter-missing"


def test_a_loss_below_zero_is_no_divergence(folder):
    """Catches: a factor on a loss that may be negative, which would stop a run that learns."""
    with pytest.raises(ConfigError, match="may be below 0"):
        parse({"task": {"name": "rlhf"}, "train": {"divergence_factor": 2.0}})
    assert parse({"train": {"divergence_factor": 2.0}}).train.divergence_factor == 2.0


def test_the_reward_is_a_part_of_the_spec(folder, tmp_path):
    """Catches: sites that learn from different rewards."""
    graft = opened(folder)
    task = {"name": "preference", "max_length": 32, "template": "plain"}
    other = opened(folder, reward_adapter=str(export_of(folder, tmp_path / "other", task, step=0.2)))
    assert graft.spec.tensors == other.spec.tensors
    assert graft.spec.sha256 != other.spec.sha256
    assert graft.base.constants["reward_sha256"] in graft.spec.settings


def test_an_exported_policy_answers_without_its_reward(folder, tmp_path):
    """Catches: an export that names a folder of this machine; a policy that cannot be asked elsewhere."""
    graft = opened(folder)
    graft.method.save(graft.base.transformer, tmp_path, "tiny/base")
    write_exported(tmp_path, graft, "float32", "tiny/base")
    assert str(folder.parent) not in (tmp_path / "tsugiki.json").read_text()
    how = Generation(max_new_tokens=4)
    said = graft.task.predict(graft.base, ROWS, how)
    again = open_exported(tmp_path, str(folder))
    assert again.base.reward_model is None
    assert again.task.predict(again.base, ROWS, how) == said
    assert [set(one) for one in said] == [{"completion"}] * 3


# It learns


def test_rewards_rise_in_a_federation(tmp_path, folder):
    """Catches: a gradient uphill, a loop or a wire that cannot carry it; a drift that is not measured; other bytes."""
    file = tmp_path / "prompts.jsonl"
    words = ("party", "clause", "alpha", "beta") * 4
    file.write_text("".join(f'{{"prompt": "name the {word}"}}\n' for word in words))
    task = settings(folder, missing_end_penalty=0.0)
    vectors = []
    for name in ("first", "again"):
        config = parse(
            {
                "run": {"name": name, "rounds": 3, "output_dir": str(tmp_path / "runs")},
                "model": {"name": str(folder)},
                "task": task,
                "adapter": {"method": "lora", "rank": 2},
                "train": {"learning_rate": 2e-2, "local_steps": 10, "threads": 1, "device": "cpu"},
                "evaluation": {"data": str(file)},
                "simulation": {"clients": 2, "data": str(file)},
            }
        )
        ran = run_tiny(config)
        evaluated = [line["eval"] for line in read_lines(ran.folder / "metrics.jsonl") if "eval" in line]
        vectors.append(ran.summary["adapter_sha256"])
    assert evaluated[-1]["reward_low"] > evaluated[0]["reward_high"]
    assert evaluated[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert 0 < evaluated[-1]["kl"] < 20
    assert evaluated[-1]["loss"] < evaluated[0]["loss"]
    assert vectors[0] == vectors[1]


def test_the_bound_brings_a_drift_back(folder):
    """Catches: a bound that stops learning altogether, or pushes further away."""
    graft = opened(folder, max_kl=0.01, beta=1.0)
    encoded = graft.task.encode(ROWS, graft.base)
    before = graft.task.evaluate(graft.base, encoded, 64)["kl"]
    optimizer = torch.optim.Adam(graft.parameters, lr=0.01)
    torch.manual_seed(2)
    for _ in range(40):
        optimizer.zero_grad()
        graft.task.loss(graft.base.network, graft.task.batch(encoded, [0, 1, 2], graft.base)).backward()
        optimizer.step()
    assert before > 0.1
    assert graft.task.evaluate(graft.base, encoded, 64)["kl"] < 0.5 * before
    assert np.isfinite(graft.read()).all()
