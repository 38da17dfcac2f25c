"""Tokenise prompts and answers: put the template around a prompt, and cut what is too long."""

from __future__ import annotations

import json
import secrets
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from tsugiki.common.errors import ModelError
from tsugiki.common.tasks.decoding.rendering import TemplateFailed, render
from tsugiki.common.tasks.rows import Tokens

if TYPE_CHECKING:
    from tsugiki.common.data.shard import Shard

Template = Literal["auto", "chat", "alpaca", "plain"]
TEMPLATE_HELP = (
    'Text around a prompt. "chat": the tokenizer\'s own chat template; "alpaca": headings for instruction, input and '
    'response; "plain": nothing; "auto": "chat" if the tokenizer has a template, else "alpaca". Name the one that the '
    "base was trained with, if it was trained to answer."
)


def encode_prompts(shard: Shard, tokenizer: Any, template: Template) -> list[Tokens]:
    """Return each row's prompt, with its input if it has one, in the template.

    Text in a row that looks like a special token is ordinary text: only the template has special tokens.

    Args:
        shard: has the column `prompt`, and may have `input`.
        tokenizer: of the base.
        template: see `TEMPLATE_HELP`.

    Raises:
        ModelError: `model-template`, the tokenizer has no chat template, or one that changes the message.
    """
    inputs = shard.columns.get("input", [""] * len(shard))
    head, middle, tail = _around(tokenizer, template)
    bodies = []
    for prompt, extra in zip(shard.columns["prompt"], inputs, strict=True):
        body = prompt.strip()
        if extra.strip():
            body += middle + extra.strip()
        bodies.append(body)
    if isinstance(tail, str):  # a template of plain text is tokenised together with its content
        return encode_texts([f"{head}{body}{tail}" for body in bodies], tokenizer)
    return [[*head, *tokens, *tail] for tokens in _plain(tokenizer, bodies)]


def encode_texts(texts: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Return the tokens of each text, after the tokenizer's first token if it has one."""
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    return [[*first, *tokens] for tokens in _plain(tokenizer, texts)]


def encode_answers(answers: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Return the tokens of each answer, with the end token."""
    return [[*tokens, tokenizer.eos_token_id] for tokens in _plain(tokenizer, [answer.strip() for answer in answers])]


def prefix_length(tokenizer: Any, template: Template) -> int:
    """Return the number of tokens before a row's own text: the first token, or the opening of a chat."""
    head = _around(tokenizer, template)[0]
    if isinstance(head, str):
        return int(tokenizer.bos_token_id is not None)
    return len(head)


def prompt_text(prompt: str, tokenizer: Any, template: Template) -> str:
    """Return a prompt in its template as text; the special tokens of a chat are spelt out."""
    head, _, tail = _around(tokenizer, template)
    before, after = (head, tail) if isinstance(head, str) else _chat(tokenizer)
    return f"{before}{prompt}{after}"


def same_template(tokenizer: Any, one: Template, other: Template) -> bool:
    """Return whether two templates put the same around a prompt."""
    return _around(tokenizer, one) == _around(tokenizer, other)


def shorten(prompt: Tokens, room: int, head: int) -> Tokens:
    """Cut a prompt to at most `room` tokens; its head and its end stay."""
    head = min(head, room // 2)
    excess = max(0, len(prompt) - room)
    return prompt[:head] + prompt[head + excess :] if excess else prompt


def fit(prompt: Tokens, answer: Tokens, limit: int, head: int = 0) -> tuple[Tokens, Tokens]:
    """Cut a prompt and its answer to at most `limit` tokens together.

    The prompt keeps its head and its end, and at least half of the room if it needs it; the answer keeps its beginning.
    """
    kept = shorten(prompt, max(limit - len(answer), limit // 2), head)
    return kept, answer[: limit - len(kept)]


def fit_all(
    prompts: Sequence[Tokens], answers: Sequence[Tokens], limit: int, head: int = 0
) -> tuple[list[Tokens], list[Tokens], int]:
    """Cut each prompt and answer as `fit` does; also return how many were cut."""
    pairs = list(zip(prompts, answers, strict=True))
    fitted = [fit(prompt, answer, limit, head) for prompt, answer in pairs]
    cut = sum(len(prompt) + len(answer) > limit for prompt, answer in pairs)
    return [prompt for prompt, _ in fitted], [answer for _, answer in fitted], cut


def _around(tokenizer: Any, template: Template) -> tuple[str, str, str] | tuple[Tokens, str, Tokens]:
    """Return the template before a prompt, before its input and after both; as text, or for a chat partly as tokens."""
    if template == "plain":
        return "", "\n", "\n"
    if template == "alpaca" or (template == "auto" and not tokenizer.chat_template):
        return "### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n"
    head, tail = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in _chat(tokenizer))
    return head, "\n\n", tail


def _chat(tokenizer: Any) -> tuple[str, str]:
    """Return the text that a chat template puts before and after a user's message, special tokens included."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise _no_template("it has none") from error
    return _around_a_message(template, json.dumps(tokenizer.special_tokens_map))


@lru_cache(maxsize=8)
def _around_a_message(template: str, special_tokens: str) -> tuple[str, str]:
    """Return the text before and after a user's message; rendered once per process.

    Args:
        template: of a tokenizer.
        special_tokens: its special tokens by name, in JSON.
    """
    mark = secrets.token_hex(8)  # a text that no template changes or contains
    message = {"role": "user", "content": mark}
    values = {**json.loads(special_tokens), "add_generation_prompt": True}
    try:
        parts = render(template, [message], values).split(mark)
    except TemplateFailed as error:
        raise _no_template(str(error)) from error
    if len(parts) != 2:
        raise _no_template("it says a message more than once, or not at all")
    return parts[0], parts[1]


def _no_template(why: str) -> ModelError:
    return ModelError(
        f"the tokenizer's chat template cannot be used: {why}",
        "a template with the user's message in it once",
        'set task.template = "alpaca" or "plain"',
        code="model-template",
    )


def _plain(tokenizer: Any, texts: Sequence[str]) -> list[Tokens]:
    """Return the tokens of texts; nothing in a text becomes a special token."""
    # Not verbose: its warnings of long texts are not needed, because texts are cut, and counted, later.
    how = {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
    found: list[Tokens] = tokenizer(list(texts), **how)["input_ids"]
    return found
