"""Pairs of answers: the two objectives against their formulas, the bare base as reference, and what is not counted."""

import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.support.federation import run_tiny
from tests.support.tiny import tiny_bert, tiny_llama
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import DataError, ModelError
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks.preference import Preference, PreferenceSettings, answer_logps

EOS = 2
PAIRS = Shard(
    {
        "prompt": ["name the party", "say good clause of a party", "on"],
        "input": ["alpha", "", " "],
        "chosen": ["good party alpha", "good", "on"],
        "rejected": ["bad", "bad bad bad clause", "on"],
    }
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose padding is the token for the end. Read only."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))


def make(**settings):
    """Return the task."""
    return Preference(PreferenceSettings(**{"template": "plain", **settings}))


def loaded(folder, objective, **settings):
    """Return the task, a base with weights that follow a seed, and the encoded pairs."""
    task = make(objective=objective, **settings)
    torch.manual_seed(3)
    base = task.load(folder, torch.float32)
    base.network.eval()
    return task, base, task.encode(PAIRS, base)


def config(tmp_path, folder, objective, **train):
    """Return a run of two sites on pairs whose good answer is preferred."""
    words = [("party", "clause"), ("clause", "party"), ("alpha", "beta"), ("number", "shall")] * 6
    file = tmp_path / "pairs.jsonl"
    file.write_text(
        "".join(f'{{"prompt": "{a} {b}", "chosen": "good {a}", "rejected": "bad {b}"}}\n' for a, b in words)
    )
    return parse(
        {
            "run": {"rounds": 2, "output_dir": str(tmp_path / "runs")},
            "model": {"name": str(folder)},
            "task": {"name": "preference", "objective": objective, "max_length": 32, "template": "plain"},
            "train": {"learning_rate": 2e-2, "local_steps": 8, "threads": 1, **train},
            "strategy": {"min_clients": 2},
            "evaluation": {"data": str(file)},
            "simulation": {"clients": 2, "data": str(file)},
        }
    )


# What is read


def test_a_reward_is_read_where_transformers_reads_it(folder):
    """Catches: a score at the padding, at the end that is also the padding, or of the other answer."""
    task, base, encoded = loaded(folder, "reward")
    batch = task.batch(encoded, range(3), base)
    with torch.no_grad():
        margins = task.margins(base.network, batch)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.score.load_state_dict(base.network.score.state_dict())
    for row in range(3):
        scores = []
        for side in ("chosen", "rejected"):
            tokens = [*encoded.texts["prompt"][row], *encoded.texts[side][row]]
            assert EOS not in tokens
            hidden = model.model(torch.tensor([tokens])).last_hidden_state[0, -1]
            scores.append(model.score(hidden).item())
        assert float(margins[row]) == pytest.approx(scores[0] - scores[1], abs=1e-5)


def test_the_answers_alone_are_weighed_by_dpo(folder):
    """Catches: a prompt's log-probability in the sum, an end that is not weighed, a mean over tokens."""
    task, base, encoded = loaded(folder, "dpo")
    batch = task.batch(encoded, range(3), base)
    model = AutoModelForCausalLM.from_pretrained(folder)
    for row in range(3):
        for column, side in enumerate(("chosen", "rejected")):
            prompt, answer = encoded.texts["prompt"][row], encoded.texts[side][row]
            assert answer[-1] == EOS
            with torch.no_grad():
                chances = model(torch.tensor([[*prompt, *answer]])).logits[0].double().log_softmax(dim=1)
            wanted = sum(float(chances[len(prompt) - 1 + at, token]) for at, token in enumerate(answer))
            assert float(batch["reference"][row, column]) == pytest.approx(wanted, rel=1e-4)


def test_the_loss_is_the_logistic_one(folder):
    """Catches: the sign, the sum in place of the mean, beta forgotten, the reference added."""
    task, base, encoded = loaded(folder, "dpo", beta=0.5)
    batch = task.batch(encoded, range(3), base)
    batch["reference"] = torch.tensor([[-1.0, -2.0], [-30.0, -3.0], [-4.0, -4.0]])
    with torch.no_grad():
        loss = float(task.loss(base.network, batch))
    halves = [
        {key: batch[f"{side}.{key}"] for key in ("input_ids", "attention_mask", "labels")}
        for side in ("chosen", "rejected")
    ]
    with torch.no_grad():
        chosen, rejected = (answer_logps(base.network, half).double() for half in halves)
    margins = 0.5 * ((chosen - batch["reference"][:, 0]) - (rejected - batch["reference"][:, 1]))
    assert loss == pytest.approx(float(torch.log1p(torch.exp(-margins)).mean()), rel=1e-4)


def test_an_adapter_that_has_learned_nothing_has_no_margin(folder, tmp_path):
    """Catches: a reference with the adapter on, or a base that the adapter has changed."""
    graft = load_graft(config(tmp_path, folder, "dpo"), str(folder), 1)
    graft.write(graft.initial)
    encoded = graft.task.encode(PAIRS, graft.base)
    with torch.no_grad():
        assert (
            graft.task.margins(graft.base.network, graft.task.batch(encoded, range(3), graft.base)).abs().max() < 1e-5
        )
        graft.write(graft.initial + np.float32(0.3))
        moved = graft.task.margins(graft.base.network, graft.task.batch(encoded, range(3), graft.base))
        assert moved.abs().max() > 1e-2
        kept = graft.task.batch(encoded, range(3), graft.base)["reference"]
        fresh = graft.task.encode(PAIRS, graft.base)
        assert torch.allclose(graft.task.batch(fresh, range(3), graft.base)["reference"], kept, atol=1e-5)
    graft.write(graft.initial)


def test_the_bare_base_is_asked_once_for_each_pair(folder, monkeypatch):
    """Catches: a second pass through the base in every epoch; a model left in another mode than it was in."""
    task, base, encoded = loaded(folder, "dpo")
    base.network.train()
    calls = []
    ask = "tsugiki.common.tasks.preference._without_adapter"
    from tsugiki.common.tasks import preference

    whole = preference._without_adapter
    monkeypatch.setattr(ask, lambda base, both: calls.append(1) or whole(base, both))
    for rows in ([0, 1], [1, 0], [2, 1], [2]):
        task.batch(encoded, rows, base)
    assert len(calls) == 2
    assert base.network.training


# What is unusual


def test_equal_answers_are_counted_and_left_out_of_metrics(folder):
    """Catches: a pair that nobody can get right in the accuracy; a file of such pairs that fails."""
    task, base, encoded = loaded(folder, "reward")
    assert encoded.notes == ("shard-pairs-equal:1",)
    with torch.no_grad():
        both = task.evaluate(base, encoded, 2)
        assert both == task.evaluate(base, encoded.take([0, 1]), 1) | {
            name: pytest.approx(value, rel=1e-4) for name, value in both.items()
        }
        assert task.evaluate(base, encoded.take([2]), 2) == {"accuracy": 0.0, "margin": 0.0, "loss": math.log(2)}


def test_a_pair_is_cut_where_its_longer_answer_does_not_fit(folder):
    """Catches: a pair that just fits counted as cut; a rejected answer that is the longer one and cut unseen."""
    _, base, whole = loaded(folder, "dpo", max_length=128)
    prompt, chosen, rejected = (whole.texts[name][1] for name in ("prompt", "chosen", "rejected"))
    exact = len(prompt) + len(rejected)
    assert len(chosen) < len(rejected)
    for limit, cut in ((exact, []), (exact - 1, ["shard-texts-cut:1"])):
        notes = make(objective="dpo", max_length=limit).encode(PAIRS.take([1]), base).notes
        assert list(notes) == cut


def test_both_answers_see_the_same_part_of_a_long_prompt(folder):
    """Catches: a long answer that has lost more of its prompt than its rival; a pair that is too long, unseen."""
    rows = {"prompt": ["clause " * 30], "chosen": ["good " * 20], "rejected": ["bad"]}
    for objective in ("reward", "dpo"):
        task = make(objective=objective, max_length=16)
        base = task.load(folder, torch.float32)
        encoded = task.encode(Shard(rows), base)
        assert encoded.notes == ("shard-texts-cut:1",)
        prompt, chosen = encoded.texts["prompt"][0], encoded.texts["chosen"][0]
        assert (len(prompt), len(chosen)) == (8, 8)
        assert len(encoded.texts["rejected"][0]) == (1 if objective == "reward" else 2)


@pytest.mark.parametrize("row", ['"chosen": "a", "rejected": " "', '"chosen": "", "rejected": "b"', '"chosen": "a"'])
def test_a_pair_with_one_answer_is_refused(tmp_path, row):
    """Catches: a comparison with nothing."""
    file = tmp_path / "pairs.jsonl"
    file.write_text(f'{{"prompt": "p", "chosen": "a", "rejected": "b"}}\n{{"prompt": "p", {row}}}\n')
    with pytest.raises(DataError):
        read(file, make().columns, DataFormat())


@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_an_encoder_is_refused(tmp_path, objective):
    """Catches: a score of a token that has not read the answer."""
    with pytest.raises(ModelError) as caught:
        make(objective=objective).load(tiny_bert(tmp_path / "bert"), torch.float32)
    assert caught.value.code == "model-not-causal"


# It learns


@pytest.mark.parametrize("objective", ["reward", "dpo"])
def test_preferences_are_learned_in_a_federation(tmp_path, folder, objective):
    """Catches: an objective that the loop, the wire or the evaluation cannot carry."""
    lines = read_lines(run_tiny(config(tmp_path, folder, objective)).folder / "metrics.jsonl")
    evaluated = [line["eval"] for line in lines if "eval" in line]
    assert evaluated[-1]["accuracy"] == 1.0
    assert evaluated[-1]["margin"] > 0
    assert evaluated[-1]["loss"] < 0.8 * evaluated[0]["loss"]
