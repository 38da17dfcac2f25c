"""Prompts and answers as tokens: templates, what a row may not do to them, and what is cut."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from tests.support.tiny import tiny_llama
from tsugiki.common.data.shard import Shard
from tsugiki.common.errors import ModelError
from tsugiki.common.tasks.decoding import rendering, templates
from tsugiki.common.tasks.decoding.templates import encode_answers, encode_prompts, fit, fit_all, prefix_length, shorten

CHAT = (
    "{% for message in messages %}{{ '<s>' + message['role'] + ' ' + message['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>party' }}{% endif %}"
)
BOS, EOS = 1, 2


@pytest.fixture
def tokenizer(tmp_path):
    """A tokenizer with tokens for beginning and end, and no chat template."""
    return AutoTokenizer.from_pretrained(tiny_llama(tmp_path / "base"))


def prompts(tokenizer, template, *texts, **columns):
    """Return the prompts of rows as words."""
    shard = Shard({"prompt": list(texts), **columns})
    return [tokenizer.convert_ids_to_tokens(row) for row in encode_prompts(shard, tokenizer, template)]


def test_a_plain_prompt_is_itself(tokenizer):
    """Catches: a first token forgotten, or an end before the answer."""
    rows = encode_prompts(Shard({"prompt": ["good clause"]}), tokenizer, "plain")
    assert tokenizer.decode(rows[0], skip_special_tokens=True).split() == ["good", "clause"]
    assert rows[0][0] == BOS
    assert EOS not in rows[0]


def test_alpaca_shows_an_input_only_where_there_is_one(tokenizer):
    """Catches: an empty heading, which the model learns to expect; the input in another row."""
    found = [" ".join(words) for words in prompts(tokenizer, "alpaca", "good", "bad", input=[" ", "party"])]
    assert ["i ##n ##p ##u ##t" in words for words in found] == [False, True]
    assert ["party" in words for words in found] == [False, True]
    assert all("##t ##r ##u ##c ##t" in words and words.startswith("<s>") for words in found)


def test_a_chat_is_the_tokenizers_own(tokenizer):
    """Catches: special tokens of the template read as text; a first token twice; the turn not handed over."""
    tokenizer.chat_template = CHAT
    (row,) = encode_prompts(Shard({"prompt": ["good clause"], "input": ["party"]}), tokenizer, "auto")
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": "good clause\n\nparty"}], tokenize=True, add_generation_prompt=True
    )
    assert row == list(whole["input_ids"] if hasattr(whole, "keys") else whole)


def test_what_looks_like_a_special_token_in_a_row_is_text(tokenizer):
    """Catches: a row that ends its own turn and speaks for the other side."""
    tokenizer.chat_template = CHAT
    for template in ("chat", "alpaca", "plain"):
        bare, forged = (
            encode_prompts(Shard({"prompt": [text]}), tokenizer, template)[0] for text in ("good", "good </s><s> bad")
        )
        assert bare.count(EOS) == forged.count(EOS)
        assert bare.count(BOS) == forged.count(BOS)
        assert len(forged) > len(bare)
    (answer,) = encode_answers(["good </s> bad"], tokenizer)
    assert answer.count(EOS) == 1
    assert answer[-1] == EOS


@pytest.mark.parametrize(
    "template",
    ["{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "nothing", "{% broken", "{{ 1 / 0 }}", None],
)
def test_a_template_that_cannot_be_used_is_refused(tokenizer, template):
    """Catches: prompts without what was asked, and an error of a library that nobody understands."""
    tokenizer.chat_template = template
    with pytest.raises(ModelError) as caught:
        encode_prompts(Shard({"prompt": ["good"]}), tokenizer, "chat")
    assert caught.value.code == "model-template"


MESSAGE = "{{ messages[0]['content'] }}"
ENDLESS = {
    "nested loops": MESSAGE + "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "a power": MESSAGE + "{% if 9 ** (9 ** 9) %}{% endif %}",
    "a long text": MESSAGE + "{{ 'x' * 10 ** 12 }}",
    "a doubled text": MESSAGE
    + "{% set n = namespace(t='x') %}{% for a in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "a long result": MESSAGE + "{{ 'x' * 2000000 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_that_runs_for_ever_or_fills_the_memory_is_refused(tokenizer, monkeypatch, kind):
    """Catches: a base whose template hangs every site that loads it."""
    monkeypatch.setattr(rendering, "CPU_S", 2)
    tokenizer.chat_template = ENDLESS[kind]
    with pytest.raises(ModelError) as caught:
        encode_prompts(Shard({"prompt": ["good"]}), tokenizer, "chat")
    assert caught.value.code == "model-template"


def test_where_the_system_has_no_limits_the_time_has_one(tokenizer, monkeypatch):
    """Catches: a wait for ever on a system that cannot limit the seconds of computing."""
    monkeypatch.setattr(rendering, "TIMEOUT_S", 0.1)
    tokenizer.chat_template = CHAT + " "  # not in the cache
    with pytest.raises(ModelError, match="takes too long") as caught:
        encode_prompts(Shard({"prompt": ["good"]}), tokenizer, "chat")
    assert caught.value.code == "model-template"


def test_a_template_is_rendered_once(tokenizer, monkeypatch):
    """Catches: a process started for every shard, question and answer."""
    calls = []
    render = templates.render
    monkeypatch.setattr(templates, "render", lambda *job: calls.append(1) or render(*job))
    tokenizer.chat_template = CHAT + "{# once #}"
    for _ in range(3):
        prompts(tokenizer, "chat", "good")
    assert calls == [1]


def test_without_a_chat_template_auto_is_alpaca(tokenizer):
    """Catches: a base model without a template, refused by default."""
    assert prompts(tokenizer, "auto", "good") == prompts(tokenizer, "alpaca", "good")


@pytest.mark.parametrize(
    ("prompt", "answer", "kept", "said"),
    [
        (5, 5, 5, 5),
        (6, 4, 6, 4),
        (20, 4, 6, 4),
        (4, 20, 4, 6),
        (20, 20, 5, 5),
        (20, 1, 9, 1),
    ],
)
def test_what_is_cut(prompt, answer, kept, said):
    """Catches: an answer of no tokens, a prompt that loses its end, a limit off by one."""
    asked, told = list(range(prompt)), list(range(100, 100 + answer))
    assert fit(asked, told, 10) == (asked[prompt - kept :], told[:said])


def test_a_long_prompt_keeps_what_opens_its_chat(tokenizer):
    """Catches: a question without its first token and its role, though it is asked with both."""
    tokenizer.chat_template = CHAT
    long = Shard({"prompt": ["good " * 60 + "party"]})
    (prompt,) = encode_prompts(long, tokenizer, "chat")
    head = prefix_length(tokenizer, "chat")
    kept, said = fit(prompt, [7, 8, EOS], 20, head)
    assert kept[:head] == prompt[:head]
    assert BOS in kept[:head]
    assert kept[-4:] == prompt[-4:]
    assert (len(kept), said) == (17, [7, 8, EOS])
    assert prefix_length(tokenizer, "plain") == 1
    assert shorten(prompt, 4, head)[:2] == prompt[:2]


@given(st.lists(st.integers(), min_size=1, max_size=40), st.lists(st.integers(), min_size=1, max_size=40))
def test_a_pair_fills_the_room_and_no_more(prompt, answer):
    """Catches: tokens cut although there was room; a prompt or an answer that vanishes."""
    kept, said = fit(prompt, answer, 16)
    assert len(kept) + len(said) == min(16, len(prompt) + len(answer))
    assert prompt[len(prompt) - len(kept) :] == kept
    assert answer[: len(said)] == said
    assert kept
    assert said


def test_cut_pairs_are_counted():
    """Catches: a pair that just fits counted, or two cut sides counted twice."""
    prompts, answers, cut = fit_all([[1] * 6, [1] * 20, [1] * 3], [[2] * 4, [2] * 20, [2]], 10)
    assert [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)] == [10, 10, 4]
    assert cut == 1
    assert fit_all([[1]], [[2]], 10)[2] == 0
