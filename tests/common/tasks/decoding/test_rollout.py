"""Answers and what is thought of them, against whole sequences; numbers that follow from a prompt."""

import pytest
import torch

from tests.support.architectures import stir
from tests.support.exports import export_of
from tests.support.tiny import tiny_llama
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.causal_lm import load_decoder
from tsugiki.common.tasks.decoding.reward import scores
from tsugiki.common.tasks.decoding.rollout import fixed_numbers, judge

EOS = 2
PROMPTS = [[1, 5, 6], [1, 9, 10, 11, 12], [1, 20], [1, 5, 6]]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny decoder with a policy that has moved, and a reward beside it. Read only."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama") / "base")
    reward = export_of(folder, folder.parent / "reward", {"name": "preference", "max_length": 32, "template": "plain"})
    task = {"name": "rlhf", "reward_adapter": str(reward), "template": "plain"}
    adapter = {"method": "lora", "rank": 2, "dropout": 0.5}
    graft = load_graft(parse({"task": task, "adapter": adapter, "train": {"device": "cpu"}}), str(folder), 1)
    stir(graft.base.transformer)
    return graft.base


def numbers(seed=1, steps=6):
    """Return the numbers from which answers follow."""
    return torch.rand(len(PROMPTS), steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_what_is_thought_of_answers(base):
    """Catches: prompts in the drift, the reference with the adapter on, the end among what is judged, a wrong sign."""
    judged = judge(base, PROMPTS, numbers(), 0.7)
    for row, prompt in enumerate(PROMPTS):
        answer, total = judged.answers[row], 0.0
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            policy = (base.network(ids).logits[0].double() / 0.7).log_softmax(dim=1)
            with base.adapter_disabled():
                bare = (base.network(ids).logits[0].double() / 0.7).log_softmax(dim=1)
        for at, token in enumerate(answer):
            place = len(prompt) - 1 + at
            total += float(policy[place, token] - bare[place, token])
        assert float(judged.drifts[row]) == pytest.approx(total, abs=1e-4)
        read = prompt + [token for token in answer if token != EOS]
        assert float(judged.rewards[row]) == pytest.approx(float(scores(base.reward_model, [read])[0]), abs=1e-5)
        assert bool(judged.ended[row]) == (answer[-1] == EOS)
        assert float(judged.lengths[row]) == len(answer)
    assert float(judged.drifts.abs().max()) > 0.1


def test_an_end_is_not_judged(base):
    """Catches: an answer judged at its end, where no reward was trained; an answer of nothing that fails."""
    with torch.no_grad():
        chances = base.network(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(dim=0)
    at_end = float(chances[:EOS].sum() + chances[EOS] / 2)
    draws = torch.full((1, 3), at_end, dtype=torch.float64)
    judged = judge(base, PROMPTS[:1], draws, 1.0)
    assert judged.answers == [[EOS]]
    assert float(judged.ended) == 1.0
    assert float(judged.rewards) == pytest.approx(float(scores(base.reward_model, PROMPTS[:1])), abs=1e-6)


def test_nothing_is_dropped_and_the_mode_stays(base):
    """Catches: dropout while answers are drawn and judged; a network that is left in eval mode; gradients."""
    at_rest = judge(base, PROMPTS, numbers(), 1.0)
    base.network.train()
    try:
        torch.manual_seed(5)
        before = torch.get_rng_state()
        training = judge(base, PROMPTS, numbers(), 1.0)
        assert torch.equal(torch.get_rng_state(), before)
        assert base.network.training
    finally:
        base.network.eval()
    assert training.answers == at_rest.answers
    assert torch.equal(training.drifts, at_rest.drifts)
    assert not any(tensor.requires_grad for tensor in (training.drifts, training.rewards, training.entropies))


def test_numbers_follow_from_the_prompt():
    """Catches: draws by place in the file; one answer for all draws of a prompt, or for a prompt that comes twice."""
    found = fixed_numbers(PROMPTS, 3, 5)
    assert found.shape == (4, 3, 5)
    assert torch.equal(fixed_numbers(PROMPTS[1:3], 3, 5), found[1:3])
    assert len({tuple(one.tolist()) for one in found.flatten(0, 1)}) == 12
    assert 0.3 < float(fixed_numbers([[number] for number in range(50)], 4, 8).mean()) < 0.7
    assert found.dtype == torch.float64


def test_without_a_reward_nothing_is_judged(tmp_path):
    """Catches: a reward of zero for everybody."""
    with pytest.raises(ModelError) as caught:
        judge(load_decoder(tiny_llama(tmp_path), torch.float32), PROMPTS, numbers(), 1.0)
    assert caught.value.code == "adapter-missing"
