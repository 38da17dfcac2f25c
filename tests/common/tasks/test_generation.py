"""Continuations: greedy ones against a loop written out, drawn ones, and where a prompt leaves no room."""

import pytest
import torch

from common.tasks.causal_lm import load_decoder
from common.tasks.generation import Generation, generate
from tests.support.tiny import MAX_TOKENS, tiny_llama

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
