import tomllib
from pathlib import Path

from tests.support.tiny import tiny_sentence_transformer
from tsugiki.common.config.files import read
from tsugiki.common.config.parse import parse
from tsugiki.common.model.load import load_graft
from tsugiki.server.demo.data import COMPANIES
from tsugiki.server.demo.demo import DEMO_TOML, demo_config, free_name, make_data, scored, write_files

EXAMPLE = Path(__file__).parents[3] / "examples" / "demo.toml"


def test_the_example_is_the_demos_own_file():
    """Catches: an example that has drifted from what the demo runs."""
    assert EXAMPLE.read_text() == DEMO_TOML
    assert read(EXAMPLE) == parse(tomllib.loads(DEMO_TOML))


def test_a_free_name_is_found(tmp_path):
    """Catches: a second demo refused, or written over the first."""
    assert free_name(tmp_path) == "demo"
    for taken, next_ in (("demo", "demo-2"), ("demo-2", "demo-3")):
        (tmp_path / taken).mkdir()
        assert free_name(tmp_path) == next_


def test_the_demos_run_is_on_its_own_files(tmp_path):
    """Catches: the paths of the example file, which are not there yet, and a seed that is not passed on."""
    files = make_data(tmp_path / "data", 7)
    config = demo_config(7, tmp_path, "demo-2", files)
    assert (config.run.seed, config.run.name, config.run.output_dir) == (7, "demo-2", str(tmp_path))
    assert Path(config.simulation.data) == files.train
    assert Path(config.evaluation.data) == files.test_retrieval
    assert config.strategy.min_clients == len(COMPANIES)


def test_the_files_alone_can_be_moved(tmp_path, monkeypatch):
    """Catches: absolute paths in a run file that is to be used elsewhere; another run than the demo's."""
    monkeypatch.chdir(tmp_path)
    file, files = write_files(Path("runs"), 7)
    assert read(file) == demo_config(7, Path("runs"), "demo", files)
    assert str(tmp_path) not in file.read_text()
    assert files.train.is_file()


def test_scores_before_and_after_are_of_the_given_adapter(tmp_path):
    """Catches: one score given twice, and the untouched base measured with the adapter on it."""
    files = make_data(tmp_path / "data", 7)
    files.test_scored.write_text("".join(files.test_scored.read_text().splitlines(keepends=True)[:13]))
    raw = demo_config(7, tmp_path, "demo", files).model_dump(mode="json")
    raw["model"]["name"] = str(tiny_sentence_transformer(tmp_path / "model"))
    raw["task"]["max_length"] = 24
    config = parse(raw)
    initial = load_graft(config, config.model.name, config.run.seed).initial
    same = scored(config, files, initial)
    assert same["before"] == same["after"]
    moved = scored(config, files, initial + 0.2)
    assert moved["before"] == same["before"]
    assert moved["after"] != moved["before"]
