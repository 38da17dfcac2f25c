"""Bad input, for every task that reads text: texts without end, half characters, emoji, models without padding.

What is wrong with files in general is in `test_fault_24_data_shard.py`; images are in `tests/common/data/`.
"""

import json
from functools import cache

import pytest
import torch
from typer.testing import CliRunner

from tests.common.tasks.test_sequence_classification import tiny_decoder
from tests.support.exports import export_of, settings_of
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_base, tiny_bert, tiny_llama
from tsugiki import cli
from tsugiki.common.config import files as config_file
from tsugiki.common.config.parse import parse
from tsugiki.common.data.shard import read
from tsugiki.common.errors import DataError, ModelError, UsageError
from tsugiki.common.model.exported import EXPORTED_FILE
from tsugiki.common.model.load import load_graft
from tsugiki.common.settings import DataFormat
from tsugiki.common.tasks import TASKS
from tsugiki.common.tasks.text import padding_id
from tsugiki.server.predict import predict

CASES = {
    f"{name} {form}".strip(): (name, case)
    for name in TASKS.names()
    for form, case in {"": TASKS.get(name).test_case(), **TASKS.get(name).extra_cases()}.items()
    if "image" not in case.rows
}
each_task = pytest.mark.parametrize("name", CASES)
LONG = ("good clause " * 9000)[:100_000]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases by the kind of model, each written once."""
    return cache(lambda model_type: tiny_base(tmp_path_factory.mktemp("base"), model_type))


def task_of(name, folder=None):
    """Return the task of a case, its text columns, and eight of its rows; with a base, the case's exports are there."""
    kind, case = TASKS.get(CASES[name][0]), CASES[name][1]
    plain = {"template": "plain"} if "template" in kind.Settings.model_fields else {}  # a template's words would be cut
    task = kind(kind.Settings(**{**(settings_of(case, folder) if folder else case.settings), **plain}))
    texts = [column.name for column in task.columns if column.kind == "text" and column.name in case.rows]
    return task, texts, {column: list(values[:8]) for column, values in case.rows.items()}


def write(path, rows):
    """Write rows as JSONL, in which every character can be spelled."""
    lines = [dict(zip(rows, cells, strict=True)) for cells in zip(*rows.values(), strict=True)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def read_as_site(task, path):
    """Return the shard in a file."""
    return read(path, task.columns, DataFormat(), labels=task.labels)


def trained_on(task, base, shard):
    """Return the encoded rows, after a loss and a gradient of all of them."""
    encoded = task.encode(shard, base)
    loss = task.loss(base.network, task.batch(encoded, range(len(encoded)), base))
    loss.backward()
    assert torch.isfinite(loss)
    with torch.no_grad():
        assert task.monitor in task.evaluate(base, encoded, 4)
    return encoded


def test_there_are_tasks():
    """Catches: tests below that pass because they loop over nothing."""
    assert len(CASES) >= 8


@each_task
def test_a_text_of_100_000_characters_is_cut_and_counted(name, tmp_path, bases, caplog):
    """Catches: more tokens than the model has positions; a cut that nobody is told of; a short text counted too."""
    folder = bases(CASES[name][1].model_type)
    task, texts, rows = task_of(name, folder)
    base = task.load(folder, torch.float32)
    for column in texts:
        long = {**rows, column: [*rows[column][:3], LONG, *rows[column][4:]]}
        encoded = trained_on(task, base, read_as_site(task, write(tmp_path / "rows.jsonl", long)))
        assert encoded.notes == ("shard-texts-cut:1",), column
        assert all(len(tokens) <= task.settings.max_length for found in encoded.texts.values() for tokens in found)
    assert task.encode(read_as_site(task, write(tmp_path / "rows.jsonl", rows)), base).notes == ()
    assert "indexing errors" not in caplog.text  # which is what transformers says of texts that are cut later


@each_task
@pytest.mark.parametrize("text", ["\U0001f600", "\U0001f469\u200d\U0001f467 e\u0301", "\u200b", "\x00", "\u202eabc"])
def test_emoji_and_invisible_characters_are_text(name, text, tmp_path, bases):
    """Catches: a text that becomes no token at all, and a mean over none; a pair of surrogates taken for two halves."""
    folder = bases(CASES[name][1].model_type)
    task, texts, rows = task_of(name, folder)
    base = task.load(folder, torch.float32)
    odd = {**rows, **{column: [*rows[column][:3], text, *rows[column][4:]] for column in texts}}
    shard = read_as_site(task, write(tmp_path / "rows.jsonl", odd))
    assert all(shard.columns[column][3] == text for column in texts)
    assert len(trained_on(task, base, shard)) == 8


@each_task
def test_half_a_character_is_refused_by_its_line(name, tmp_path):
    """Catches: a TypeError of the tokenizer in the middle of a run; a text of the site in the message."""
    task, texts, rows = task_of(name)
    for column in texts:
        broken = {**rows, column: [*rows[column][:3], "patient Jane \ud800", *rows[column][4:]]}
        with pytest.raises(DataError, match="line 4") as caught:
            read_as_site(task, write(tmp_path / "rows.jsonl", broken))
        assert caught.value.code == "shard-encoding"
        assert "Jane" not in str(caught.value)


@pytest.mark.parametrize("half", [b"\xed\xa0\x80", b"\xed\xb0\x80", b"\xf0\x9f\x98"])
def test_half_a_character_in_bytes_is_refused(half, tmp_path):
    """Catches: surrogates that were written as bytes, which some decoders let pass; an emoji cut in its middle."""
    file = tmp_path / "rows.csv"
    file.write_bytes(b"text,label\nfine \xf0\x9f\x98\x80,0\npatient Jane " + half + b",1\n")
    task = TASKS.get("sequence-classification")(TASKS.get("sequence-classification").Settings())
    with pytest.raises(DataError, match="line 3 is not UTF-8") as caught:
        read_as_site(task, file)
    assert caught.value.code == "shard-encoding"
    file.write_bytes(b"text,label\nfine \xf0\x9f\x98\x80,0\n")
    assert read_as_site(task, file).columns["text"] == ["fine \U0001f600"]


def test_half_a_character_on_the_command_line_is_refused(tmp_path):
    """Catches: bytes of a terminal that are no UTF-8, which Python hands on as surrogates, in a tokenizer."""
    run = run_tiny(tiny_config(tmp_path, run={"rounds": 1})).folder
    with pytest.raises(UsageError, match="Text 2 has bytes that are not UTF-8"):
        predict(run, ["fine", "caf\udce9"], None, None)
    assert len(predict(run, ["fine", "\U0001f600"], None, None)) == 2


@pytest.mark.parametrize(
    ("row", "code"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": " "}, "shard-empty-text"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "shard-empty-text"),
        ({"prompt": "p", "chosen": "a"}, "shard-empty-text"),
        ({"prompt": "p", "chosen": None, "rejected": None}, "shard-empty-text"),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "shard-empty-text"),
        ({"prompt": "p", "chosen": ["a"], "rejected": "b"}, "shard-format"),
    ],
)
def test_empty_and_one_sided_pairs_are_refused(row, code, tmp_path):
    """Catches: a comparison with nothing; an answer to nothing."""
    task, file = task_of("preference")[0], tmp_path / "pairs.jsonl"
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    file.write_text(f"{json.dumps(good)}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match="1 of 2 rows") as caught:
        read_as_site(task, file)
    assert caught.value.code == code


def test_a_file_of_one_side_is_refused(tmp_path):
    """Catches: a column that is not there, taken for empty answers."""
    task, file = task_of("preference")[0], tmp_path / "pairs.jsonl"
    file.write_text('{"prompt": "p", "chosen": "a"}\n' * 2)
    with pytest.raises(DataError, match="no column 'rejected'") as caught:
        read_as_site(task, file)
    assert caught.value.code == "shard-columns"


@pytest.mark.parametrize(("pad", "end", "chosen"), [(0, 2, 0), (3, 2, 3), (None, 2, 2), (None, 0, 0), (None, None, 0)])
def test_the_padding_of_a_model_that_names_none(pad, end, chosen):
    """Catches: padding number 0 taken for none, so that a text is judged by another token than its last."""

    class Tokenizer:
        pad_token_id, eos_token_id = pad, end

    assert padding_id(Tokenizer) == chosen


@pytest.mark.parametrize("name", ["sequence-classification", "preference"])
def test_a_decoder_without_padding_judges_each_text_by_itself(name, tmp_path):
    """Catches: a model without a padding token, of which transformers takes one row at a time only."""
    task, _, rows = task_of(name)
    base = task.load(tiny_decoder(tmp_path), torch.float32)
    assert base.tokenizer.pad_token_id is None
    encoded = trained_on(task, base, read_as_site(task, write(tmp_path / "rows.jsonl", rows)))
    base.network.eval()
    with torch.no_grad():
        together = task.loss(base.network, task.batch(encoded, range(8), base)).item()
        alone = [task.loss(base.network, task.batch(encoded, [row], base)).item() for row in range(8)]
    assert sum(alone) / 8 == pytest.approx(together, abs=1e-5)


@pytest.mark.parametrize(
    ("adapter", "key"),
    [
        ({"method": "lora", "target_modules": ["nope"]}, "adapter.target_modules"),
        ({"method": "vera", "target_modules": ["nope"]}, "adapter.target_modules"),
        ({"method": "ia3", "feedforward_modules": ["nope"]}, "adapter.target_modules and adapter.feedforward_modules"),
    ],
)
def test_targets_that_match_nothing_list_what_there_is(adapter, key, tmp_path):
    """Catches: an adapter with no layer, which trains nothing and says nothing."""
    folder = tiny_bert(tmp_path)
    with pytest.raises(ModelError) as caught:
        load_graft(parse({"model": {"name": str(folder)}, "adapter": adapter}), str(folder), 1)
    assert caught.value.code == "adapter-targets"
    assert str(caught.value).startswith(f"{key} names nope for the architecture 'bert'. Expected some of ")
    assert "dense, key, query, value" in str(caught.value)


def test_a_rank_beyond_the_layer_is_refused_where_it_would_be_no_low_rank(tmp_path):
    """Catches: more numbers than the layer has. VeRA's rank may be larger: what it trains are two vectors."""
    folder = tiny_bert(tmp_path)
    adapter = {"method": "lora", "rank": 33}
    with pytest.raises(ModelError, match="at most 32") as caught:
        load_graft(parse({"model": {"name": str(folder)}, "adapter": adapter}), str(folder), 1)
    assert caught.value.code == "adapter-rank"
    vera = parse({"model": {"name": str(folder)}, "adapter": {"method": "vera", "rank": 64}})
    assert load_graft(vera, str(folder), 1).spec.parameters("adapter") == 2 * 2 * (64 + 32)


REWARD = TASKS.get("rlhf").test_case().exports["reward_adapter"]


def error_of(*words):
    """Return what a command ends with."""
    error = CliRunner().invoke(cli.app, list(map(str, words))).exception
    assert error is not None
    return error


def test_an_adapter_of_another_base_is_refused_by_the_command(tmp_path, bases):
    """Catches: answers of an adapter on weights that it was not trained on, whose shapes are the same."""
    adapter = export_of(bases("llama"), tmp_path / "adapter", {"name": "causal-lm", "max_length": 32})
    words = ("predict", "--adapter", adapter, "the good clause", "--max-new-tokens", 1, "--model")
    assert CliRunner().invoke(cli.app, [str(word) for word in (*words, bases("llama"))]).exit_code == 0
    assert error_of(*words, tiny_llama(tmp_path / "other", seed=8)).code == "adapter-other-base"


@pytest.mark.parametrize(
    ("reward", "code"), [("other", "adapter-other-base"), ("policy", "reward-adapter"), ("gone", "adapter-missing")]
)
def test_what_cannot_judge_a_run_stops_it(reward, code, tmp_path, bases):
    """Catches: a run that learns from numbers that mean nothing: of another base, or of no reward."""
    tiny = TASKS.get("rlhf").test_case()
    export_of(tiny_llama(tmp_path / "base", seed=8), tmp_path / "other", REWARD)
    export_of(bases("llama"), tmp_path / "policy", {"name": "causal-lm", "max_length": 32})
    config = tiny_config(
        tmp_path,
        model={"name": str(bases("llama"))},
        task={"name": "rlhf", **tiny.settings, "reward_adapter": str(tmp_path / reward)},
        simulation={"data": str(write(tmp_path / "prompts.jsonl", tiny.rows))},
        evaluation={"data": ""},
    )
    (tmp_path / "run.toml").write_text(config_file.to_toml(config))
    assert error_of("simulate", tmp_path / "run.toml").code == code


def test_a_reward_is_no_policy(tmp_path, bases):
    """Catches: a head that is dropped without a word, and texts that go on as if a reward had learned to write."""
    folder = export_of(bases("llama"), tmp_path / "reward", REWARD)
    words = ("predict", "--adapter", folder, "--model", bases("llama"), "the good clause")
    error = error_of(*words)
    assert error.code == "usage"
    assert "preference reads prompt" in str(error)  # and scores an answer to it
    said = json.loads((folder / EXPORTED_FILE).read_text())
    said["task"] = {"name": "causal-lm"}
    (folder / EXPORTED_FILE).write_text(json.dumps(said))
    error = error_of(*words)
    assert error.code == "adapter-invalid"
    assert "score" in str(error)
