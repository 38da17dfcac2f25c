"""Continuations: greedy ones against a loop written out, drawn ones, and where a prompt leaves no room."""

import pytest
import torch

from tests.support.architectures import stir
from tests.support.tiny import MAX_TOKENS, tiny_llama
from tsugiki.common.config.parse import parse
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.base import Generation
from tsugiki.common.tasks.causal_lm import load_decoder
from tsugiki.common.tasks.decoding.generate import draw, generate
from tsugiki.common.tasks.preference import answer_logps, sequences

BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A tiny decoder in eval mode. Read only."""
    base = load_decoder(tiny_llama(tmp_path_factory.mktemp("llama")), torch.float32)
    base.network.eval()
    return base


def greedy(base, tokens, steps):
    """Return the likeliest continuation, token by token."""
    tokens = list(tokens)
    for _ in range(steps):
        with torch.no_grad():
            following = base.network(torch.tensor([tokens])).logits[0, -1].argmax().item()
        if following == EOS:
            break
        tokens.append(following)
    return tokens


def test_the_likeliest_continuation_is_found(base):
    """Catches: the prompt repeated in the answer, one token too few, a checkpoint's own drawing left on."""
    prompts = [[BOS, 5, 6], [BOS, 9, 10, 11, 12], [BOS]]
    wanted = [base.tokenizer.decode(greedy(base, one, 5)[len(one) :], skip_special_tokens=True) for one in prompts]
    assert generate(base, prompts, Generation(max_new_tokens=5)) == [text.strip() for text in wanted]
    assert any(wanted)


def test_draws_follow_the_seed_and_the_temperature(base):
    """Catches: a temperature that changes nothing; draws that cannot be repeated; draws cut to the likeliest 50."""
    prompts = [[BOS, 5, 6]] * 4
    first, again, other = (generate(base, prompts, Generation(12, temperature=5.0, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(set(first)) > 1
    cold = generate(base, prompts[:1], Generation(12, temperature=1e-4, seed=3))
    assert cold == generate(base, prompts[:1], Generation(12))


@pytest.mark.parametrize("wanted", [8, MAX_TOKENS, 10 * MAX_TOKENS])
def test_a_long_prompt_is_shortened_and_a_short_one_is_not(base, wanted):
    """Catches: an IndexError in the embedding of positions; a question that goes to make room for its answer."""
    long = [BOS, *[5, 6, 7] * MAX_TOKENS]
    room = max(MAX_TOKENS // 2, MAX_TOKENS - wanted)
    for prompt, kept in ((long, [BOS, *long[-(room - 1) :]]), (long[:20], long[:20])):
        (text,) = generate(base, [prompt], Generation(max_new_tokens=wanted), head=1)
        tokens = greedy(base, kept, min(wanted, MAX_TOKENS - len(kept)))
        assert text == base.tokenizer.decode(tokens[len(kept) :], skip_special_tokens=True).strip()


# Many at once


@pytest.fixture(scope="module", params=["lora", "prompt", "prefix", "houlsby"])
def moved(request, tmp_path_factory):
    """A tiny decoder with an adapter that says something of its own. Read only."""
    folder = tiny_llama(tmp_path_factory.mktemp("llama"))
    adapter = {"method": request.param, **({"rank": 2} if request.param == "lora" else {})}
    adapter |= {"num_virtual_tokens": 3} if request.param in ("prompt", "prefix") else {}
    config = {"task": {"name": "causal-lm"}, "adapter": adapter, "train": {"device": "cpu"}}
    graft = load_graft(parse(config), str(folder), 1)
    stir(graft.base.transformer)
    return graft.base


PROMPTS = [[BOS, 5, 6], [BOS, 9, 10, 11, 12, 13, 14], [BOS], [BOS, 20, 21, 22]]


def numbers(rows=4, steps=9, seed=1):
    """Return the numbers from which answers follow."""
    return torch.rand(rows, steps, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(base, prompt, draws, temperature):
    """Return an answer drawn token by token from whole sequences, its log-probability and its entropies' sum."""
    tokens, logp, entropy = [], 0.0, 0.0
    for number in draws.tolist():
        with torch.no_grad():
            logits = base.network(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double()
        chances = (logits / temperature).softmax(dim=0)
        token = int((chances.cumsum(dim=0) <= number).sum())
        logp, entropy = logp + float(chances[token].log()), entropy - float((chances * chances.log()).sum())
        tokens.append(token)
        if token == EOS:
            break
    return tokens, logp, entropy


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_padding_and_cache_change_no_draw(moved, temperature):
    """Catches: places counted from the padding, padding that is attended to, a cache that forgets virtual tokens."""
    draws = numbers()
    drawn = draw(moved, PROMPTS, draws, temperature)
    for row, prompt in enumerate(PROMPTS):
        answer, logp, entropy = written_out(moved, prompt, draws[row], temperature)
        assert drawn.answers[row] == answer
        assert float(drawn.logps[row]) == pytest.approx(logp, abs=1e-4)
        assert float(drawn.entropies[row]) == pytest.approx(entropy, rel=1e-4)


def test_logps_are_those_of_the_whole_answers(moved):
    """Catches: log-probabilities under generation that are not those which are trained, padded on the right."""
    drawn = draw(moved, PROMPTS, numbers(seed=2), 0.7)
    with torch.no_grad():
        again = answer_logps(moved.network, sequences(PROMPTS, drawn.answers, 0), 0.7)
    torch.testing.assert_close(drawn.logps, again, rtol=1e-5, atol=1e-4)


def test_answers_stop_at_their_end(base):
    """Catches: tokens after the end, an end that is left out, a count that goes on for rows that have ended."""
    with torch.no_grad():
        logits = base.network(torch.tensor([PROMPTS[0]])).logits[0, -1].double().softmax(dim=0)
    at_end = float(logits[:EOS].sum() + logits[EOS] / 2)  # in the middle of the end's share
    draws = torch.tensor([[at_end, 0.99, 0.99], [0.99, 0.99, 0.99]], dtype=torch.float64)
    drawn = draw(base, [PROMPTS[0], PROMPTS[0]], draws)
    assert drawn.answers[0] == [EOS]
    assert len(drawn.answers[1]) == 3
    assert float(drawn.logps[0]) == pytest.approx(float(logits[EOS].log()), abs=1e-5)


def test_draws_have_the_models_own_frequencies(base):
    """Catches: a distribution function that is one token off, or is not divided by the temperature."""
    many = 4000
    drawn = draw(base, [PROMPTS[0]] * many, numbers(many, 1, seed=3), 0.5)
    with torch.no_grad():
        chances = (base.network(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5).softmax(dim=0)
    found = torch.bincount(torch.tensor([answer[0] for answer in drawn.answers]), minlength=len(chances)) / many
    assert float((found - chances).abs().max()) < 4 * float((chances.max() / many) ** 0.5)
    assert float(torch.dot(found, chances)) > 1.5 / len(chances)  # else equal chances would pass
