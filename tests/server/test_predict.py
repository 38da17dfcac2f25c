"""Predictions: that it is the run's own adapter that answers, for every task, and what is refused."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file
from typer.testing import CliRunner

import tsugiki
from common.errors import DataError, StorageError, UsageError
from common.files import read_lines
from common.tasks import TASKS, Task
from common.tasks.generation import Generation
from common.wire import sha256, unpack
from server.finished import choose, open_graft, read_config
from server.predict import predict, show
from tests.support.exports import settings_of
from tests.support.federation import run_tiny, tiny_config
from tests.support.tiny import tiny_base, write_case

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
            case = TASKS.get(name).tiny()
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
        done = CliRunner().invoke(tsugiki.app, ["predict", str(folder), *texts, "--json", *words])
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
    """Catches: a picture that needs a class before it can get one; a missing picture that is a traceback."""
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
    with pytest.raises(DataError):
        predict(folder, [str(tmp_path / "gone.png")], None, HOW)


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
    assert caught.value.what


def test_a_task_that_predicts_nothing_says_so(runs, monkeypatch):
    """Catches: a traceback for a task of one's own that has no `predict`."""
    folder, _ = runs("sequence-classification")
    kind = TASKS.get("sequence-classification")
    monkeypatch.setattr(kind, "asked", Task.asked)
    monkeypatch.setattr(kind, "predict", Task.predict)
    with pytest.raises(UsageError, match="predicts nothing"):
        predict(folder, ["good"], None, HOW)


def test_a_missing_run_or_file_is_an_error_with_a_code(runs, tmp_path):
    """Catches: a traceback."""
    with pytest.raises(StorageError) as caught:
        predict(tmp_path, ["a"], None, HOW)
    assert caught.value.code == "run-missing"
    with pytest.raises(DataError) as caught:
        predict(runs("sequence-classification")[0], [], tmp_path / "gone.csv", HOW)
    assert caught.value.code == "shard-missing"
