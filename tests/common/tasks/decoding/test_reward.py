"""The reward model beside a policy: one base in memory, what is read, and what is no reward."""

import json
import shutil

import pytest
import torch

from tests.support.architectures import stir
from tests.support.exports import export_of
from tests.support.tiny import tiny_llama
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.exported import EXPORTED_FILE, open_exported
from tsugiki.common.model.load import load_graft
from tsugiki.common.tasks.causal_lm import load_decoder
from tsugiki.common.tasks.decoding.reward import add_reward_model, classifier, scores

REWARD = {"name": "preference", "max_length": 32, "template": "plain"}
ANSWERS = [[1, 5, 6, 7], [1, 9, 10], [1, 20, 21, 22], [1, 30]]
METHODS = {
    "lora": {},
    "houlsby": {"method": "houlsby", "bottleneck": 3, "train_layer_norm": True},
    "layernorm": {"method": "layernorm"},
    "prompt": {"method": "prompt", "num_virtual_tokens": 3},
}


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    """A tiny Llama. Read only."""
    return tiny_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(scope="module")
def reward(base_folder):
    """An exported reward. Read only."""
    return export_of(base_folder, base_folder.parent / "reward", REWARD)


def judged(base_folder, folder, template="plain"):
    """Return a decoder with a reward beside it."""
    base = load_decoder(base_folder, torch.float32)
    add_reward_model(base, base_folder, str(folder), template)
    return base


def refused(base_folder, folder, template="plain"):
    """Return the code with which a folder is refused."""
    with pytest.raises(ModelError) as caught:
        judged(base_folder, folder, template)
    return caught.value


@pytest.mark.parametrize("method", METHODS)
def test_a_reward_is_what_was_exported(base_folder, tmp_path, method):
    """Catches: a head left at chance, an adapter that is off, the reward of another place than the last token."""
    folder = export_of(base_folder, tmp_path / method, REWARD, **METHODS[method])
    base, alone = judged(base_folder, folder), open_exported(folder, str(base_folder))
    with torch.no_grad():
        wanted = [alone.base.network(torch.tensor([answer])).logits[0, 0] for answer in ANSWERS]
    torch.testing.assert_close(scores(base.reward_model, ANSWERS), torch.stack(wanted), rtol=0, atol=1e-5)
    assert len({round(float(value), 4) for value in wanted}) == len(ANSWERS)


def test_padding_is_no_end_of_what_is_judged(base_folder, reward):
    """Catches: an answer whose last token is the one for padding, judged by the token before."""
    base = judged(base_folder, reward)
    pad = base.tokenizer.pad_token_id
    with_pad, without = scores(base.reward_model, [[1, 5, pad], [1, 5]])
    assert float(with_pad) != pytest.approx(float(without), abs=1e-4)


def test_one_base_is_in_memory(base_folder, reward):
    """Catches: a second base, which would double the memory; a base that the reward has frozen, or changed."""
    base, bare = judged(base_folder, reward), load_decoder(base_folder, torch.float32)
    own = {value.data_ptr(): value for value in base.network.parameters() if value.ndim > 1}
    shared = [value for value in base.reward_model.parameters() if value.data_ptr() in own]
    assert len(shared) == len(own)
    beside = sum(value.numel() for value in base.reward_model.parameters() if value.data_ptr() not in own)
    assert beside < 0.2 * sum(value.numel() for value in own.values())
    assert all(value.requires_grad for value in base.network.parameters())
    both = zip(base.network.parameters(), bare.network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in both)
    assert {value.device.type for value in (*base.reward_model.parameters(), *base.reward_model.buffers())} == {"cpu"}


@pytest.mark.parametrize("method", ["houlsby", "layernorm", "lora", "prompt"])
def test_two_adapters_do_not_touch_each_other(base_folder, tmp_path, method):
    """Catches: norms trained in place under the reward; a reward's own norms in the policy or in its reference."""
    folder = export_of(base_folder, tmp_path / "reward", REWARD, **METHODS["houlsby"])
    config = {"task": {"name": "rlhf", "reward_adapter": str(folder), "template": "plain"}, "train": {"device": "cpu"}}
    graft = load_graft(parse({**config, "adapter": {"method": "lora", **METHODS[method]}}), str(base_folder), 1)
    ids, before = torch.tensor(ANSWERS[:1]), scores(graft.base.reward_model, ANSWERS)
    plain = load_decoder(base_folder, torch.float32).network(ids).logits
    stir(graft.base.transformer)
    torch.testing.assert_close(scores(graft.base.reward_model, ANSWERS), before, rtol=0, atol=0)
    with torch.no_grad():
        assert not torch.allclose(graft.base.network(ids).logits, plain, atol=1e-3)
        with graft.adapter_disabled():
            torch.testing.assert_close(graft.base.network(ids).logits, plain, rtol=0, atol=1e-5)
    trained = {id(value) for value in graft.parameters}
    assert not trained & {id(value) for value in graft.base.reward_model.parameters()}


def test_what_is_no_reward_is_refused(base_folder, tmp_path):
    """Catches: a policy's logits, or a head that nobody trained, taken for a reward."""
    policy = export_of(base_folder, tmp_path / "policy", {"name": "causal-lm", "max_length": 32})
    error = refused(base_folder, policy)
    assert error.code == "reward-adapter"
    assert "A causal-lm adapter cannot be a reward" in str(error)
    dpo = export_of(base_folder, tmp_path / "dpo", {**REWARD, "objective": "dpo"})
    assert refused(base_folder, dpo).code == "reward-adapter"
    (policy / EXPORTED_FILE).unlink()
    assert refused(base_folder, policy).code == "adapter-invalid"


def test_a_reward_without_its_head_is_refused(base_folder, tmp_path):
    """Catches: a score by a head left at chance, which peft says nothing of."""
    from safetensors.torch import load_file, save_file

    folder = export_of(base_folder, tmp_path / "reward", REWARD)
    tensors = load_file(folder / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "score" not in name}
    assert len(kept) == len(tensors) - 1
    save_file(kept, folder / "adapter_model.safetensors")
    assert refused(base_folder, folder).code == "adapter-invalid"
    said = json.loads((folder / EXPORTED_FILE).read_text())
    (folder / EXPORTED_FILE).write_text(json.dumps(said | {"heads": []}))
    assert refused(base_folder, folder).code == "reward-adapter"


def test_a_reward_of_another_base_is_refused(base_folder, reward, tmp_path):
    """Catches: numbers trained for other weights."""
    assert refused(tiny_llama(tmp_path / "base", seed=8), reward).code == "adapter-other-base"


def test_a_reward_of_other_prompts_is_refused(base_folder, reward):
    """Catches: prompts in a form that the reward has never seen."""
    assert refused(base_folder, reward, "alpaca").code == "reward-adapter"


def test_the_hash_is_that_of_the_numbers_and_settings(base_folder, reward, tmp_path):
    """Catches: sites with different rewards in one run; a hash that changes with each export of the same."""
    again = export_of(base_folder, tmp_path / "again", REWARD)
    other = export_of(base_folder, tmp_path / "other", REWARD, step=0.11)
    scaled = export_of(base_folder, tmp_path / "scaled", REWARD, method="lora", rank=2, alpha=8.0)
    hashes = [judged(base_folder, one).constants["reward_sha256"] for one in (reward, again, other, scaled)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_virtual_tokens_of_the_reward_take_up_positions(base_folder, tmp_path):
    """Catches: an answer that fits the policy and runs past the reward's last position."""
    folder = export_of(base_folder, tmp_path / "reward", REWARD, method="prompt", num_virtual_tokens=5)
    base = judged(base_folder, folder)
    assert base.tokenizer.model_max_length == base.network.config.max_position_embeddings - 5


def test_an_encoder_has_no_such_head(tmp_path):
    """Catches: a classifier's own head taken for a score."""
    from transformers import AutoModelForMaskedLM, BertConfig

    network = AutoModelForMaskedLM.from_config(BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2))
    with pytest.raises(ModelError) as caught:
        classifier(network)
    assert caught.value.code == "model-not-causal"


def test_settings_that_an_export_leaves_out_are_the_defaults(base_folder, tmp_path):
    """Catches: a traceback, or an advice to fetch the base again, where a file of an export has fewer settings."""
    folder = export_of(base_folder, tmp_path / "reward", {"name": "preference"})
    said = json.loads((folder / EXPORTED_FILE).read_text())
    (folder / EXPORTED_FILE).write_text(json.dumps(said | {"task": {"name": "preference"}}))
    assert judged(base_folder, folder, "auto").reward_model is not None
    assert refused(base_folder, folder, "plain").code == "reward-adapter"


def test_a_reward_is_compared_with_its_own_spec(base_folder, reward, tmp_path):
    """Catches: a scale other than the one that a reward was trained with, which no shape shows."""
    folder = shutil.copytree(reward, tmp_path / "reward")
    said = json.loads((folder / EXPORTED_FILE).read_text())
    said["adapter"]["alpha"] = 2 * said["adapter"]["alpha"]
    (folder / EXPORTED_FILE).write_text(json.dumps(said))
    assert refused(base_folder, folder).code == "adapter-invalid"


def test_a_run_is_no_export(base_folder, tmp_path):
    """Catches: an advice to convert a model; the hub asked for a folder that is not here."""
    assert refused(base_folder, tmp_path).code == "adapter-invalid"
    error = refused(base_folder, "runs/reward")
    assert error.code == "adapter-missing"
    assert "task.reward_adapter" in str(error)
