"""The Python surface: its names, what importing it costs, and what each function returns."""

import inspect
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig

import tsugiki
from tests.support.exports import export_tiny
from tests.support.federation import tiny_config
from tests.support.tiny import tiny_bert, tiny_sentence_transformer
from tsugiki.common.config import files as config_file
from tsugiki.common.errors import ModelError, StorageError, UsageError

ROOT = Path(__file__).resolve().parents[1]

SURFACE = {
    "Comparison": "(run, untouched, linear_probe, local, federated, centralised, own_rows, learning_rates)",
    "ConfigError": "(source, problems)",
    "Run": "(folder, config, summary, metrics)",
    "Table": "",
    "TsugikiError": "(problem, expected='', hint='', *, code=None)",
    "__version__": "",
    "compare": "(config, *, progress=True)",
    "load_adapter": "(folder, base=None)",
    "open_run": "(folder)",
    "read_config": "(file, **sections)",
    "simulate": "(config, *, resume=False, progress=True)",
}
"""What people's scripts rely on: a change here is a change for all of them, and belongs into the changelog."""

METHODS = {
    "Run": {"export": "(self, folder=None, *, which='best', merged=False)", "report": "(self)"},
    "Comparison": {"to_pandas": "(self)", "table": ""},
    "Table": {"to_pandas": "(self)"},
}


def shape(thing):
    """Return the parameters of a function or class, without their types; empty for what is not called."""
    if not callable(thing) or thing is tsugiki.Table:
        return ""
    bare = [one.replace(annotation=inspect.Parameter.empty) for one in inspect.signature(thing).parameters.values()]
    return str(inspect.Signature(bare))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of two sites and two rounds."""
    return tsugiki.simulate(tiny_config(tmp_path_factory.mktemp("run")), progress=False)


def test_the_public_names_are_these():
    """Catches: a name or parameter that scripts rely on and that is gone, or one that slips in."""
    modules = {name for name, value in vars(tsugiki).items() if isinstance(value, types.ModuleType)}
    visible = {name for name in vars(tsugiki) if not name.startswith("_")} - modules
    assert visible | {"__version__"} == set(tsugiki.__all__) == set(SURFACE)
    assert {name: shape(getattr(tsugiki, name)) for name in SURFACE} == SURFACE
    for kind, methods in METHODS.items():
        own = {name: value for name, value in vars(getattr(tsugiki, kind)).items() if not name.startswith("_")}
        assert {name: shape(value) for name, value in own.items()} == methods


def test_every_public_name_is_described():
    """Catches: a function that help() is silent about, or whose types a checker cannot see."""
    for name in set(SURFACE) - {"__version__"}:
        assert inspect.getdoc(getattr(tsugiki, name))
    for function in (tsugiki.compare, tsugiki.load_adapter, tsugiki.open_run, tsugiki.read_config, tsugiki.simulate):
        described = inspect.signature(function)
        assert described.return_annotation is not inspect.Signature.empty
        assert all(one.annotation is not inspect.Parameter.empty for one in described.parameters.values())
    assert (Path(tsugiki.__file__).parent / "py.typed").is_file()


def test_importing_it_loads_nothing_heavy():
    """Catches: a notebook's first cell that waits for torch."""
    heavy = {"torch", "flwr", "transformers", "peft", "sentence_transformers", "numpy", "pydantic", "typer", "pandas"}
    code = f"import sys, tsugiki; print(*sorted(set(sys.modules) & {heavy!r}))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_settings_are_read_from_a_file_or_a_mapping(tmp_path, monkeypatch):
    """Catches: a keyword that replaces a whole section; a path object refused; variables in paths left as they are."""
    monkeypatch.setenv("HELD_OUT", "/data/held-out")
    file = tmp_path / "run.toml"
    file.write_text(
        '[run]\nrounds = 3\nseed = 7\n[evaluation]\ndata = "${HELD_OUT}/rows.csv"\n[privacy.examples]\ndelta = 1e-6\n'
    )
    config = tsugiki.read_config(
        file, run={"rounds": 5}, simulation={"data": tmp_path / "train.csv"}, privacy={"examples.noise_multiplier": 2.0}
    )
    assert (config.run.rounds, config.run.seed) == (5, 7)
    assert config.evaluation.data == "/data/held-out/rows.csv"
    assert config.simulation.data == str(tmp_path / "train.csv")
    assert (config.privacy.examples.delta, config.privacy.examples.noise_multiplier) == (1e-6, 2.0)
    tables = {"run": {"rounds": 3}, "task": {"name": "sequence-classification", "labels": ("a", "b")}}
    assert tsugiki.read_config(tables, run={"seed": 7}).run.rounds == 3
    assert tsugiki.read_config(tables).task.labels == ("a", "b")
    assert tsugiki.read_config(str(file)) == config_file.read(file)


def test_wrong_settings_are_all_named():
    """Catches: a misspelt keyword that changes nothing; a type error in the place of the reason."""
    with pytest.raises(tsugiki.ConfigError) as caught:
        tsugiki.read_config({"run": {"rounds": -1}}, trian={"local_steps": 2}, train={"epochs": 3}, model=3)
    assert {problem.key for problem in caught.value.problems} == {"run.rounds", "trian", "train.epochs", "model"}
    assert isinstance(caught.value, tsugiki.TsugikiError)


def test_a_run_tells_what_came_out(run):
    """Catches: metrics of the wrong round, or of sites that did not take part; a run that shows nothing of itself."""
    assert [row["round"] for row in run.metrics] == [0, 1, 2]
    assert [row["sites"] for row in run.metrics] == [0, 2, 2]
    lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["eval_accuracy"] for row in run.metrics] == [line["eval"]["accuracy"] for line in lines]
    assert [row["train_loss"] for row in run.metrics] == [None, lines[1]["train_loss"], lines[2]["train_loss"]]
    assert run.metrics[1]["bytes_up"] == lines[1]["bytes_up"] > 0
    assert "epsilon" not in run.metrics[1]
    before, after = (f"{run.summary[when][run.config.monitor]:.4f}" for when in ("before", "after"))
    assert f"{before} before, {after} best" in repr(run)
    page = run._repr_html_()
    assert f"<td>accuracy</td><td>{run.summary['before']['accuracy']:.4f}</td>" in page
    assert run.metrics._repr_html_().count("<tr>") == 4


def test_a_run_is_opened_again(run, tmp_path):
    """Catches: a folder that only the process that made it can read; a run without an end that passes for one."""
    again = tsugiki.open_run(str(run.folder))
    assert (again.config, again.summary, again.metrics) == (run.config, run.summary, run.metrics)
    with pytest.raises(StorageError) as caught:
        tsugiki.open_run(tmp_path)
    assert caught.value.code == "run-missing"


def test_what_is_shown_is_escaped(run, tmp_path):
    """Catches: a name from a file that runs as a script in the reader's notebook."""
    table = tsugiki.Table([{"<b>": "<script>", "site": "a"}, {"site": None}])
    assert "<script>" not in table._repr_html_()
    assert "<b>" not in table._repr_html_()
    assert "&lt;script&gt;" in table._repr_html_()
    shown = tsugiki.Run(tmp_path / "<i>", run.config, {**run.summary, "method": "<i>"}, run.metrics)
    assert "<i>" not in shown._repr_html_()


def test_a_run_without_evaluation_is_shown_too(tmp_path):
    """Catches: a crash where there is no metric to show; progress that was switched off."""
    run = tsugiki.simulate(tiny_config(tmp_path, run={"rounds": 1}, evaluation={"data": ""}), progress=False)
    assert repr(run) == f"<Run {str(run.folder)!r}: 1 rounds>"
    assert "<table>" in run._repr_html_()
    assert set(run.metrics[-1]) == {"round", "train_loss", "sites", "seconds", "bytes_up", "bytes_down"}


def test_a_private_run_tells_its_epsilon(tmp_path):
    """Catches: an account that a notebook does not see."""
    privacy = {"mode": "central", "target_epsilon": 50.0, "delta": 1e-3}
    run = tsugiki.simulate(tiny_config(tmp_path, privacy=privacy), progress=False)
    spent = [row["epsilon"] for row in run.metrics[1:]]
    assert 0 < spent[0] < spent[1] <= 50


def test_progress_is_lines_without_a_terminal(tmp_path, capsys):
    """Catches: control characters in a notebook; a switch that switches nothing."""
    config = tiny_config(tmp_path, run={"rounds": 1})
    tsugiki.simulate(config)
    shown = capsys.readouterr()
    assert "round 1" in shown.err
    assert "\x1b" not in shown.err + shown.out
    assert tsugiki.simulate(config, resume=True, progress=False).metrics[-1]["round"] == 1
    assert capsys.readouterr() == ("", "")


def test_tables_become_data_frames_where_pandas_is(monkeypatch):
    """Catches: a table that pandas cannot read; an import error in the place of what to do."""
    rows = [{"round": 0}, {"round": 1}]
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(DataFrame=lambda data: ("frame", data)))
    assert tsugiki.Table(rows).to_pandas() == ("frame", rows)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UsageError, match="pip install pandas"):
        tsugiki.Table(rows).to_pandas()


def test_a_run_is_exported_and_reported(run, tmp_path, monkeypatch):
    """Catches: options that do not arrive; an export that is somewhere else than it says."""
    monkeypatch.setattr("tsugiki.server.export.export.prove", lambda *_: None)  # tests/server/export have the proof
    folder = run.export(str(tmp_path / "adapter"), which="last")
    assert folder == tmp_path / "adapter"
    assert "after round 2" in (folder / "README.md").read_text()
    assert run.export(merged=True) == run.folder / "merged"
    assert "<html" in run.report().read_text()


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A base, an exported adapter of sentence embeddings, and the graft that it was exported from."""
    folder = tmp_path_factory.mktemp("embedder")
    base = tiny_sentence_transformer(folder / "base")
    graft = export_tiny(
        folder / "adapter", base, {"name": "sentence-embedding"}, {"method": "houlsby", "bottleneck": 3}
    )
    return base, folder / "adapter", graft.base.network.encode(TEXTS)


TEXTS = ["the good clause", "a bad one"]


def test_an_embedder_is_a_sentence_transformer(embedder):
    """Catches: the bare transformer, which pools nothing; an adapter at chance, or dropout that is on."""
    base, folder, wanted = embedder
    model = tsugiki.load_adapter(folder, base)
    assert isinstance(model, SentenceTransformer)
    assert not model.training
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=1e-6)


def test_a_loaded_base_stays_as_it_is_and_lends_its_tensors(embedder):
    """Catches: a second base in memory; the caller's own model changed by the adapter."""
    base, folder, wanted = embedder
    own = SentenceTransformer(str(base), device="cpu").requires_grad_(False)
    bare = own.encode(TEXTS)
    model = tsugiki.load_adapter(folder, own)
    np.testing.assert_allclose(model.encode(TEXTS), wanted, atol=1e-6)
    np.testing.assert_array_equal(own.encode(TEXTS), bare)
    assert not np.allclose(bare, wanted, atol=1e-3)
    lent = {value.data_ptr() for value in own.parameters()}
    assert lent <= {value.data_ptr() for value in model.parameters()}


def test_a_loaded_base_has_to_say_where_it_came_from(embedder, tmp_path):
    """Catches: a base that cannot be compared with the adapter's own; an embedder whose pooling is guessed."""
    _, folder, _ = embedder
    nameless = AutoModel.from_config(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    bare = tiny_bert(tmp_path / "bare")
    for model in (nameless, SentenceTransformer(str(bare), device="cpu")):
        with pytest.raises(ModelError) as caught:
            tsugiki.load_adapter(folder, model)
        assert caught.value.code == "model-not-found"


@pytest.mark.parametrize("method", [{"method": "lora", "rank": 2}, {"method": "bitfit"}])
def test_other_tasks_are_models_of_transformers(tmp_path, method):
    """Catches: a head at chance; another base taken for the adapter's own; a loaded one that is believed."""
    base = tiny_bert(tmp_path / "base")
    graft = export_tiny(tmp_path / "adapter", base, {"name": "sequence-classification"}, method)
    ids = torch.tensor([[2, 9, 15, 3]])
    with torch.no_grad():
        wanted = graft.base.network(input_ids=ids).logits
        model = tsugiki.load_adapter(str(tmp_path / "adapter"), str(base))
        torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=0, atol=1e-6)
    assert not model.training
    other = tiny_bert(tmp_path / "other", seed=8)
    for wrong in (other, AutoModelForSequenceClassification.from_pretrained(other)):
        with pytest.raises(ModelError) as caught:
            tsugiki.load_adapter(tmp_path / "adapter", wrong)
        assert caught.value.code == "adapter-other-base"


def test_a_comparison_has_all_four(tmp_path):
    """Catches: baselines of another run; numbers under the wrong name; nothing to compare by found out too late."""
    config = tiny_config(tmp_path, run={"rounds": 1})
    found = tsugiki.compare(config, progress=False)
    written = json.loads((found.run.folder / "baselines.json").read_text())
    assert {name: value for name, value in written.items() if name != "curves"} == {
        "untouched": found.untouched,
        "linear_probe": found.linear_probe,
        "local": found.local,
        "centralised": found.centralised,
        "learning_rates": found.learning_rates,
    }
    assert found.learning_rates.keys() == {"local", "federated", "centralised"}
    assert found.own_rows == {}  # these sites keep none
    assert found.federated["loss"] == found.run.metrics[-1]["eval_loss"]
    rows = [(row["training"], row["site"]) for row in found.table]
    assert rows == [
        ("untouched", ""),
        ("linear_probe", ""),
        ("local", "site-0"),
        ("local", "site-1"),
        ("federated", ""),
        ("centralised", ""),
    ]
    assert all(set(row) == {"training", "site", *found.federated} for row in found.table)
    assert found._repr_html_().count("<tr>") == 7
    with pytest.raises(UsageError):
        tsugiki.compare(tiny_config(tmp_path, run={"name": "other"}, evaluation={"data": ""}))
    assert not (tmp_path / "runs" / "other").exists()


def test_the_page_about_it_is_true(tmp_path, monkeypatch):
    """Catches: an example that does not run as it is printed; a function that nobody can read about."""
    page = (ROOT / "docs" / "python.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) > 3
    assert [name for name in SURFACE if name not in page] == []
    config = tiny_config(tmp_path, run={"rounds": 1, "name": "run", "output_dir": "runs"})
    (tmp_path / "federation.toml").write_text(config_file.to_toml(config))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tsugiki.server.export.export.prove", lambda *_: None)
    monkeypatch.setattr("tsugiki.common.model.exported.find_in_hub", lambda name: Path(config.model.name))
    frames = {name: type(name, (list,), {}) for name in ("DataFrame", "Series")}
    monkeypatch.setitem(sys.modules, "pandas", types.SimpleNamespace(**frames))
    said = {}
    for block in blocks:
        code = compile(block, "docs/python.md", "exec")
        types.FunctionType(code, said)()
    assert said["run"].metrics
