"""Predictions: that it is the run's own adapter that answers, for every task, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

from tests.support.exports import BASE_NAME, export_tiny, settings_of
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_base, tiny_llama, write_case
from tsugiki import cli
from tsugiki.common.errors import DataError, ModelError, StorageError, UsageError
from tsugiki.common.files import read_lines
from tsugiki.common.tasks import TASKS, Task
from tsugiki.common.tasks.base import Generation
from tsugiki.common.wire.spec import sha256, unpack
from tsugiki.server.export.finished import choose, open_graft, read_config
from tsugiki.server.predict import ask, open_adapters, predict, predict_each, show

HOW = Generation(max_new_tokens=4)
INPUTS = {
    "causal-lm": {"text": ["the good clause", "a bad"]},
    "image-classification": {"image": None},
    "rlhf": {"prompt": ["name the party", "name the alpha"]},
    "preference": {"prompt": ["name the party"] * 2, "chosen": ["good", "bad"]},
    "sentence-embedding": {
        "sentence1": ["the alpha clause"] * 2,
        "sentence2": ["the alpha clause", "no clause on beta"],
    },
    "sequence-classification": {"text": ["the good clause number 3", "the bad clause number 3"]},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function from the name of a task to the folder of a finished run of it, run once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def run(name):
        if name not in done:
            case = TASKS.get(name).test_case()
            (folder / name).mkdir()
            file = write_case(folder / name, case.rows)
            base = tiny_base(folder / name / "base", case.model_type)
            config = tiny_config(
                folder / name,
                model={"name": str(base)},
                task={"name": name, **settings_of(case, base)},
                train={"local_steps": 12, "learning_rate": 2e-2},
                evaluation={"data": str(file)},
                simulation={"data": str(file)},
            )
            done[name] = (run_tiny(config).folder, file)
        return done[name]

    return run


def test_every_task_has_an_example():
    """Catches: a task that is not tried below."""
    assert sorted(INPUTS) == list(TASKS.names())


@pytest.mark.parametrize("name", INPUTS)
def test_a_run_answers_with_its_adapter(runs, tmp_path, name):
    """Catches: the initial adapter, or none, in the answers; rows lost; another order."""
    folder, file = runs(name)
    if name != "image-classification":
        file = tmp_path / "rows.jsonl"
        rows = [dict(zip(INPUTS[name], values, strict=True)) for values in zip(*INPUTS[name].values(), strict=True)]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = predict(folder, [], file, HOW, which="last")
    bare = predict(folder, [], file, HOW, which="last", adapter=False)
    assert len(found) == len(bare) >= 2
    assert all(one.keys() == found[0].keys() for one in found)
    assert found != bare
    assert predict(folder, [], file, HOW, which="last") == found  # and the adapter is on again


def test_what_is_learned_is_predicted(runs):
    """Catches: classes by another order; a probability that is a logit."""
    folder, _ = runs("sequence-classification")
    found = predict(folder, INPUTS["sequence-classification"]["text"], None, HOW)
    assert [one["label"] for one in found] == ["1", "0"]
    assert all(0.5 < one["probability"] <= 1 for one in found)
    assert show([{"completion": "a\nb\x1b[31m é"}], as_json=False) == "a\\nb\\x1b[31m é\n"
    assert show(found, as_json=False).splitlines()[0] == f"1\t{found[0]['probability']:.4f}"
    assert [json.loads(line) for line in show(found, as_json=True).splitlines()] == found


def test_the_command_prints_lines(runs):
    """Catches: options in another order than the function's; JSON that no script can read."""
    folder, _ = runs("sequence-classification")
    texts = INPUTS["sequence-classification"]["text"]
    for adapter, words in ((True, []), (False, ["--without-adapter"])):
        done = CliRunner().invoke(cli.app, ["predict", str(folder), *texts, "--json", *words])
        assert done.exit_code == 0
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert found == predict(folder, texts, None, HOW, adapter=adapter)


def test_a_better_answer_has_a_higher_reward(runs, tmp_path):
    """Catches: the reward of the rejected answer, which a file to predict has not; the sign."""
    folder, _ = runs("preference")
    file = tmp_path / "rows.jsonl"
    line = '{{"prompt": "name the party of a clause", "chosen": "{} clause party"}}\n'
    file.write_text("".join(map(line.format, ("good", "bad"))))
    good, bad = (one["reward"] for one in predict(folder, [], file, HOW))
    assert good > bad


def test_equal_sentences_have_cosine_1(runs, tmp_path):
    """Catches: a dot product of vectors of any length."""
    folder, _ = runs("sentence-embedding")
    file = tmp_path / "rows.csv"
    file.write_text("sentence1,sentence2\nthe alpha clause,the alpha clause\n")
    assert predict(folder, [], file, HOW)[0]["cosine"] == pytest.approx(1.0, abs=1e-5)


def test_pictures_are_named_by_their_files(runs, tmp_path):
    """Catches: a picture that needs a class before it can get one; a missing picture that is called a broken one."""
    from PIL import Image

    folder, _ = runs("image-classification")
    bright = np.full((12, 12), 40, np.uint8)
    names = []
    for side in (slice(0, 6), slice(6, 12)):
        picture = bright.copy()
        picture[:, side] = 220
        names.append(str(tmp_path / f"{side.start}.png"))
        Image.fromarray(picture).save(names[-1])
    found = predict(folder, names, None, HOW, which="last")
    assert [one["label"] for one in found] == ["1", "0"]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    for name, code in (("gone.png", "shard-missing"), ("broken.png", "shard-image-broken")):
        with pytest.raises(DataError, match=r"[Pp]icture 2") as caught:
            predict(folder, [names[0], str(tmp_path / name)], None, HOW)
        assert caught.value.code == code
        assert "sorted" not in str(caught.value)  # they come as they were named


def test_best_and_last_are_told_apart(runs, tmp_path):
    """Catches: one adapter whatever is asked for."""
    folder = shutil.copytree(runs("sequence-classification")[0], tmp_path / "run")
    config = read_config(folder)
    graft = open_graft(folder, config)
    best, last = (choose(folder, config, graft, which) for which in ("best", "last"))
    lines = {line["round"]: line for line in read_lines(folder / "metrics.jsonl") if "eval" in line}
    assert last.round == max(lines)
    assert 0 < best.round <= last.round
    for chosen in (best, last):
        assert sha256(chosen.vector) == lines[chosen.round]["adapter_sha256"]
    save_file(unpack(graft.initial, graft.spec), folder / "best" / "adapter.safetensors")
    summary = json.loads((folder / "summary.json").read_text()) | {"best_sha256": sha256(graft.initial)}
    (folder / "summary.json").write_text(json.dumps(summary))
    assert np.array_equal(choose(folder, config, graft, "best").vector, graft.initial)
    assert not np.array_equal(last.vector, graft.initial)
    first, after = (predict(folder, ["good"], None, HOW, which=which) for which in ("best", "last"))
    assert first != after


@pytest.mark.parametrize(
    ("name", "texts", "with_file"),
    [
        ("sequence-classification", [], False),
        ("sequence-classification", ["a"], True),
        ("sequence-classification", ["good", " "], False),
        ("sentence-embedding", ["a"], False),
        ("preference", ["a"], False),
    ],
)
def test_what_cannot_be_asked_is_refused(runs, name, texts, with_file):
    """Catches: a text taken for a pair; nothing at all answered with nothing."""
    folder, file = runs(name)
    with pytest.raises(UsageError) as caught:
        predict(folder, texts, file if with_file else None, HOW)
    assert caught.value.problem


def test_a_task_that_predicts_nothing_says_so(runs, monkeypatch):
    """Catches: a traceback for a task of one's own that has no `predict`."""
    folder, _ = runs("sequence-classification")
    kind = TASKS.get("sequence-classification")
    monkeypatch.setattr(kind, "prediction_columns", Task.prediction_columns)
    monkeypatch.setattr(kind, "predict", Task.predict)
    with pytest.raises(UsageError, match="predicts nothing"):
        predict(folder, ["good"], None, HOW)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Exports of several tasks and methods on one Llama, in its folder `base`, by name."""
    folder = tmp_path_factory.mktemp("adapters")
    base = tiny_llama(folder / "base")
    kinds = {
        "tone": ("sequence-classification", {"method": "lora", "rank": 2}),
        "topic": ("sequence-classification", {"method": "houlsby", "bottleneck": 3}),
        "reward": ("preference", {"method": "layernorm"}),
        "words": ("causal-lm", {"method": "prompt", "num_virtual_tokens": 3}),
    }
    for seed, (name, (task, adapter)) in enumerate(kinds.items()):
        export_tiny(folder / name, base, {"name": task, "max_length": 16}, adapter, seed)
    return folder


def test_several_adapters_answer_each_row_in_turn(adapters, tmp_path):
    """Catches: one adapter's numbers or head in another's answers; answers in the order of adapters, not of rows."""
    names = ["tone", "topic", "reward", "words"]
    folders = [adapters / name for name in names]
    base = str(adapters / "base")
    file = tmp_path / "rows.jsonl"
    row = {"text": "the good clause", "prompt": "name the party", "chosen": "alpha"}
    rows = [row, row | {"text": "no bad number", "chosen": "beta"}]
    file.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = predict_each(folders, base, [], file, HOW)
    assert [one["adapter"] for one in found] == [str(folder) for folder in folders] * 2
    assert [next(iter(one)) for one in found] == ["adapter"] * 8
    alone = {name: predict_each([adapters / name], base, [], file, HOW) for name in names}
    for index, one in enumerate(found):
        assert one == pytest.approx(alone[names[index % 4]][index // 4])
    assert alone["tone"][0]["probability"] != alone["topic"][0]["probability"]
    assert predict_each(folders[::-1], base, [], file, HOW)[3] == pytest.approx(found[0])


def test_the_files_columns_are_mapped(adapters, tmp_path):
    """Catches: an option that is not handed on; one that maps what nobody reads, which a typing error would do."""
    file = tmp_path / "rows.csv"
    file.write_text("sentence,name\nthe good clause,a\nno bad number,b\n")
    options = ["predict", "--adapter", str(adapters / "tone"), "--model", str(adapters / "base"), "--file", str(file)]
    done = CliRunner().invoke(cli.app, [*options, "--columns", "text=sentence", "--json"])
    expected = predict_each(
        [adapters / "tone"], str(adapters / "base"), ["the good clause", "no bad number"], None, HOW
    )
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
    with pytest.raises(DataError, match='--columns "text='):
        predict_each([adapters / "tone"], str(adapters / "base"), [], file, HOW)
    for wrong in ("texts=sentence", "label=sentence", "text", "{", "{1}", "[1]"):
        with pytest.raises(UsageError, match="--columns"):
            predict_each([adapters / "tone"], str(adapters / "base"), [], file, HOW, wrong)
    with pytest.raises(DataError, match='--columns "prompt='):
        predict_each([adapters / "reward"], str(adapters / "base"), [], file, HOW)
    with pytest.raises(UsageError, match="--columns is given without --file"):
        predict_each([adapters / "tone"], str(adapters / "base"), ["good"], None, HOW, "text=sentence")


def test_one_base_is_in_memory(adapters):
    """Catches: a base for each adapter."""
    names = ["tone", "topic", "reward", "words"]
    grafts = open_adapters([adapters / name for name in names], str(adapters / "base"))
    frozen = [
        {value.data_ptr(): value.numel() for value in graft.base.transformer.parameters() if not value.requires_grad}
        for graft in grafts
    ]
    whole = sum(frozen[0].values())
    assert whole > 20_000
    for other in frozen[1:]:
        alone = sum(size for place, size in other.items() if place not in frozen[0])
        assert alone < whole / 100  # the first values of a head that is trained in a copy


def test_adapters_are_asked_by_the_command(adapters, monkeypatch):
    """Catches: the first text taken for a run; a name column that is not the first; a base that --model cannot name."""
    options = ["predict", *(word for name in ("tone", "topic") for word in ("--adapter", str(adapters / name)))]
    given = [*options, "--model", str(adapters / "base"), "good", "bad"]
    expected = predict_each([adapters / "tone", adapters / "topic"], str(adapters / "base"), ["good", "bad"], None, HOW)
    done = CliRunner().invoke(cli.app, [*given, "--json"])
    assert [json.loads(line) for line in done.stdout.splitlines()] == expected
    lines = CliRunner().invoke(cli.app, given).stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [one["adapter"] for one in expected]
    asked = []
    monkeypatch.setattr("tsugiki.server.predict.find_in_hub", lambda source: asked.append(source) or adapters / "base")
    assert CliRunner().invoke(cli.app, [*options, "good"]).exit_code == 0
    assert asked == [BASE_NAME]


def test_adapters_of_another_base_are_refused(adapters, tmp_path):
    """Catches: an adapter on a base that it does not know, because the first one's was taken for all."""
    said = json.loads((adapters / "topic" / "tsugiki.json").read_text())
    other = shutil.copytree(adapters / "topic", tmp_path / "other")
    (other / "tsugiki.json").write_text(json.dumps(said | {"base_fingerprint": "0" * 64}))
    with pytest.raises(ModelError) as caught:
        open_adapters([adapters / "tone", other], str(adapters / "base"))
    assert caught.value.code == "adapter-other-base"


@pytest.mark.parametrize(
    ("words", "with_adapter", "options"),
    [
        ([], False, {}),
        (["RUN", "good"], True, {}),
        (["RUN", "good"], False, {"source": "base"}),
        (["RUN", "good"], False, {"columns": "text=sentence"}),
        (["good"], True, {"which": "last"}),
        (["good"], True, {"adapter": False}),
        ([], True, {}),
    ],
)
def test_words_that_do_not_go_together_are_refused(runs, adapters, words, with_adapter, options):
    """Catches: an option that is silently ignored; a run's folder classified as a text."""
    folder, _ = runs("sequence-classification")
    given = {"source": str(adapters / "base") if with_adapter else "", "which": "best", "adapter": True, **options}
    words = [str(folder) if word == "RUN" else word for word in words]
    chosen = [adapters / "tone"] if with_adapter else []
    with pytest.raises(UsageError):
        ask(words, chosen, given.pop("source"), None, HOW, **given)


def test_a_missing_run_or_file_is_an_error_with_a_code(runs, tmp_path):
    """Catches: a traceback."""
    with pytest.raises(StorageError) as caught:
        predict(tmp_path, ["a"], None, HOW)
    assert caught.value.code == "run-missing"
    with pytest.raises(DataError) as caught:
        predict(runs("sequence-classification")[0], [], tmp_path / "gone.csv", HOW)
    assert caught.value.code == "shard-missing"
