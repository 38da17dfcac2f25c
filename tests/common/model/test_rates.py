import json
from pathlib import Path

import pytest

from tests.support.federation import model_folder
from tsugiki.common.adapters import ADAPTERS
from tsugiki.common.adapters.base import HEAD_RATES, scaled_rate
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import ModelError
from tsugiki.common.model.rates import BaseShape, describe_rates, shape_of, with_known_rates, with_rates
from tsugiki.common.tasks import TASKS


def run(**sections):
    """Return a run with the tiny base."""
    return parse({"model": {"name": model_folder()}, **sections})


def base(folder, **about):
    """Write a base's config.json, and return its folder."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "any", **about}))
    return folder


def test_auto_becomes_the_methods_rate_and_the_heads():
    """Catches: a number that ignores the method or the optimizer; a head at the rate of a method with few numbers."""
    for method in ("lora", "ia3"):
        for optimizer in ("adamw", "sgd"):
            config = run(adapter={"method": method}, train={"optimizer": optimizer})
            found = with_rates(config, config.model.name).train
            shape = shape_of(config, with_path(config))
            assert shape.kind == "encoder"
            assert shape.width > 0
            assert found.learning_rate == ADAPTERS.get(method).default_rate(optimizer, "encoder", shape.width)
            assert found.head_learning_rate == scaled_rate(HEAD_RATES, optimizer, "encoder", shape.width)


def with_path(config):
    """Return the folder of a run's base."""
    from tsugiki.common.model.find import find

    return find(config.model.name)


def test_numbers_stay_and_the_head_follows_a_number():
    """Catches: a number of the operator's that is replaced; a head at another rate than it was tried with."""
    chosen = run(train={"learning_rate": 0.03})
    found = with_rates(chosen, chosen.model.name)
    assert (found.train.learning_rate, found.train.head_learning_rate) == (0.03, 0.03)
    assert with_rates(found, found.model.name) is found
    assert describe_rates(found, chosen) == ""
    both = run(train={"learning_rate": 0.03, "head_learning_rate": 0.5})
    assert with_rates(both, both.model.name) is both
    head = run(train={"head_learning_rate": 0.5})
    assert with_rates(head, head.model.name).train.head_learning_rate == 0.5


def test_the_same_settings_give_the_same_numbers_and_hash():
    """Catches: a resumed run that finds another hash than the one in its checkpoint."""
    config = run()
    first = with_rates(config, config.model.name)
    assert first.sha256 == with_rates(config, config.model.name).sha256 != config.sha256


def test_the_line_names_both_numbers():
    """Catches: a log that does not tell what was taken."""
    config = run(train={"head_learning_rate": 0.25})
    found = with_rates(config, config.model.name)
    line = describe_rates(found, config)
    assert f"train.learning_rate = {found.train.rate:g}, for the head 0.25" in line
    assert "lora, adamw, sequence-classification" in line


@pytest.mark.parametrize(
    ("task", "about", "shape"),
    [
        ("sequence-classification", {"architectures": ["BertModel"], "hidden_size": 384}, BaseShape("encoder", 384)),
        (
            "sequence-classification",
            {"architectures": ["LlamaForCausalLM"], "hidden_size": 64},
            BaseShape("decoder", 64),
        ),
        ("sequence-classification", {"architectures": ["GPT2LMHeadModel"], "n_embd": 768}, BaseShape("decoder", 768)),
        ("sentence-embedding", {"architectures": None, "dim": 768}, BaseShape("encoder", 768)),
        ("causal-lm", {"hidden_size": 576}, BaseShape("decoder", 576)),
        ("image-classification", {"architectures": ["ViTModel"], "hidden_size": 192}, BaseShape("vision", 192)),
        ("sequence-classification", {}, BaseShape("encoder", 0)),
    ],
)
def test_the_shape_of_a_base_is_in_its_config(tmp_path, task, about, shape):
    """Catches: a decoder taken for an encoder; a width under another architecture's key overlooked."""
    config = run(task={"name": task})
    assert shape_of(config, base(tmp_path / "base", **about)) == shape
    # sentence-transformers may keep the transformer in a folder of its own
    base(tmp_path / "whole" / "0_Transformer", **about)
    assert shape_of(config, tmp_path / "whole") == shape


@pytest.mark.parametrize("content", [b"{", b'{"model_type": "\xff"}', b"[" * 100_000])
def test_a_damaged_config_is_an_error_with_a_code(tmp_path, content):
    """Catches: a decoder's traceback at the start of a run whose base is damaged."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError) as caught:
        shape_of(run(), tmp_path)
    assert caught.value.code == "model-load"


def test_a_wide_base_takes_a_smaller_rate_of_adamw_only():
    """Catches: a small model's rate for a large one, which diverges; a scaled rate where nothing was tried."""
    method = ADAPTERS.get("lora")
    assert method.default_rate("adamw", "encoder", 384) == method.default_rate("adamw", "encoder")
    assert method.default_rate("adamw", "encoder", 1024) < method.default_rate("adamw", "encoder", 384)
    assert method.default_rate("adamw", "decoder", 4096) < method.default_rate("adamw", "decoder", 64) / 10
    assert method.default_rate("sgd", "encoder", 1024) == method.default_rate("sgd", "encoder", 384)
    assert method.default_rate("adamw", "vision", 1024) == method.default_rate("adamw", "vision", 64)


def test_a_task_may_ask_for_a_smaller_rate():
    """Catches: a task's factor that does not arrive; a factor of 0 or below."""
    names = TASKS.names()
    assert names
    assert all(0 < TASKS.get(name).rate_factor <= 1 for name in names)
    plain, scaled = (
        with_rates(config, config.model.name).train.rate
        for config in (run(task={"name": "causal-lm"}), run(task={"name": "preference"}))
    )
    assert scaled == pytest.approx(plain * TASKS.get("preference").rate_factor, rel=0.02)


def test_a_base_that_is_not_here_leaves_auto():
    """Catches: `config show` that fetches a model, or fails without it."""
    config = parse({"model": {"name": "nobody/has-this"}})
    assert with_known_rates(config) is config
    missing = parse({"model": {"name": "package:no_such_package_here/model"}})
    assert with_known_rates(missing) is missing
    assert with_known_rates(run()).train.rate > 0
    with pytest.raises(ModelError):
        with_rates(missing, missing.model.name)


def test_the_page_has_the_rates_of_the_code():
    """Catches: a table in the documents that tells other numbers than runs take."""
    page = Path(__file__).resolve().parents[3] / "docs" / "adapters.md"
    lines = [line.split("|")[1:-1] for line in page.read_text("utf-8").splitlines() if line.startswith("|")]
    tables = {f"`{name}`": ADAPTERS.get(name).rates for name in ADAPTERS.names()}
    tables["the head"] = HEAD_RATES
    shown = {
        cells[0].strip(): [float(cell) for cell in cells[1:7]]
        for cells in lines
        if len(cells) == 8 and "e-" in cells[1]
    }
    assert shown == {name: [*table.adamw, *table.sgd] for name, table in tables.items()}
