"""A reward model on the same base tensors as the policy: another adapter, with a head."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tsugiki.common.adapters.tensors import tensors_sha256
from tsugiki.common.errors import ModelError
from tsugiki.common.model.fingerprint import fingerprint
from tsugiki.common.tasks.base import Base
from tsugiki.common.tasks.decoding.templates import Template, same_template
from tsugiki.common.tasks.rows import Tokens

if TYPE_CHECKING:
    import torch

    from tsugiki.common.model.exported import Exported

HEAD = "score"
"""The name of the head in a decoder's `AutoModelForSequenceClassification`."""

_NOT_PADDING = -1
"""An id that no token has. Scored sequences are never padded, so their last token is the one that is read."""


def add_reward_model(base: Base, folder: Path, reward_adapter: str, template: Template) -> None:
    """Load an exported reward beside a bare decoder, as `base.reward_model`, with its hash in `base.constants`.

    Args:
        base: a decoder with its output layer and without an adapter. Its tokenizer is limited to the positions that
            the reward's method leaves free.
        folder: of the base.
        reward_adapter: the export of a run of the task `preference` with the objective "reward".
        template: of the prompts; the reward must have been trained with it.

    Raises:
        ModelError: `reward-adapter`, the adapter is no reward, or was trained with another template;
            `adapter-missing`, there is no such folder; `adapter-other-base`, `adapter-invalid` and `head-missing`, as
            in `tsugiki.common.model.exported.load_exported`.
    """
    # Imported here, because that module imports all tasks.
    from tsugiki.common.model.exported import find_export, load_exported, read_exported
    from tsugiki.common.model.spec import describe

    place = find_export(reward_adapter, "task.reward_adapter")
    exported = read_exported(place)
    _check(exported, base, template)
    wanted_gradients = [value for value in base.network.parameters() if value.requires_grad]
    method = exported.make_method(place)
    judge = classifier(base.network)
    identity = fingerprint(folder, base)
    judge = load_exported(place, judge, exported, fingerprint=identity)
    loaded = Base(judge, judge, None, exported.heads, constants=exported.constants)
    exported.check_spec(describe(exported.make_task(), method, loaded, identity), place)
    settings = json.dumps(exported.adapter, sort_keys=True).encode()
    # Both sides must train against the same reward, so its hash goes into the spec.
    base.constants = {"reward_sha256": tensors_sha256(method.saved(judge), start=settings)}
    judge.requires_grad_(False)
    for value in wanted_gradients:  # both share these tensors
        value.requires_grad_(True)
    positions = getattr(base.network.config, "max_position_embeddings", None)
    if positions:
        base.tokenizer.model_max_length = min(base.tokenizer.model_max_length, positions - method.positions)
    base.reward_model = judge


def _check(exported: Exported, base: Base, template: Template) -> None:
    settings = exported.make_task().settings
    name = settings.name
    objective = getattr(settings, "objective", "")
    if name != "preference" or objective != "reward" or exported.heads != (HEAD,):
        described = f" of the objective {objective}" if objective else ""
        problem = f"a {name} adapter{described} cannot be a reward"
        expected = 'an export of a run with task.name = "preference" and objective = "reward", with its head'
    elif not same_template(base.tokenizer, template, settings.template):
        problem = (
            f"the reward has seen prompts in the template {settings.template!r}, and task.template is {template!r}"
        )
        expected = "the template that the reward has seen"
    else:
        return
    raise ModelError(problem, expected, "set task.reward_adapter and task.template to match", code="reward-adapter")


def classifier(network: Any) -> Any:
    """Return a model that scores a sequence, around the backbone of a bare causal model.

    Both models share their matrices. Vectors (norms and biases) and buffers are copies: some methods train those of the
    base in place, and what one network learns must not change the other.

    Raises:
        ModelError: `model-not-causal`, the architecture has no such model with a head `score`.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForSequenceClassification

    config = copy.deepcopy(network.config)
    config.num_labels = 1
    try:
        with torch.device("meta"):  # no memory: every tensor that is kept comes from the network
            shell = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
        head = getattr(shell, HEAD)
    except (ValueError, AttributeError) as error:
        raise ModelError(
            f"the architecture {config.model_type!r} has no reward model",
            "a decoder such as Llama, whose last token has read the whole answer",
            "choose another base",
            code="model-not-causal",
        ) from error
    # deepcopy takes this as its memo: it keeps these tensors instead of copying them.
    matrices = {id(value): value for value in network.base_model.parameters() if value.ndim > 1}
    setattr(shell, shell.base_model_prefix, copy.deepcopy(network.base_model, matrices))
    setattr(shell, HEAD, nn.Linear(head.in_features, 1, bias=head.bias is not None, dtype=network.dtype))
    shell.config.pad_token_id = _NOT_PADDING
    return shell.eval()


def scores(judge: Any, sequences: Sequence[Tokens]) -> torch.Tensor:
    """Return the reward of each sequence, shape (rows,), float32: the score of its last token.

    Sequences of equal length form a batch without padding, so that the last token is read with every method.

    Args:
        judge: from `add_reward_model`.
        sequences: prompts with their answers, without the end token, as in the reward's training.
    """
    import torch

    device = next(judge.parameters()).device
    lengths = [len(sequence) for sequence in sequences]
    found = torch.zeros(len(sequences), device=device)
    with torch.no_grad():
        for length in sorted(set(lengths)):
            rows = [row for row, one in enumerate(lengths) if one == length]
            ids = torch.tensor([sequences[row] for row in rows], device=device)
            logits = judge(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            found[rows] = logits[:, 0].float()
    return found
