import json

import pytest
from torch import nn

from tests.support.federation import run_tiny, tiny_config
from tsugiki.client.app import simulated_app
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.errors import Interrupted
from tsugiki.common.files import read_lines
from tsugiki.common.model.load import load_graft
from tsugiki.server import baselines
from tsugiki.server.baselines import _Bench, average, centralised, local_only, run_baselines, site_names
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run.evaluate import evaluate_base
from tsugiki.server.run.progress import Progress

SITES = ["site-0", "site-1"]


@pytest.fixture(scope="module")
def federated(tmp_path_factory):
    """A finished federated run, with its configuration."""
    config = tiny_config(
        tmp_path_factory.mktemp("run"),
        strategy={"name": "fedadam"},
        evaluation={"at_sites": True},
        simulation={"evaluation_fraction": 0.3},
    )
    return config, run_tiny(config)


@pytest.mark.parametrize(
    ("train", "steps", "epochs"),
    [({"local_steps": 2}, (2, 4), (0, 0)), ({"local_epochs": 3}, None, (3, 3))],
)
def test_baselines_train_on_as_many_rows(tmp_path, train, steps, epochs):
    """Catches: a comparison in which one side trains longer. Passes over all the data need no factor: it is larger."""
    config = tiny_config(tmp_path, train=train)
    alone, central = local_only(config), centralised(config, 2)
    assert (alone.run.rounds, central.run.rounds) == (2, 2)
    assert (alone.train.local_epochs, central.train.local_epochs) == epochs
    assert steps is None or (alone.train.local_steps, central.train.local_steps) == steps


@pytest.mark.parametrize(
    ("train", "steps", "epochs"), [({"local_steps": 2}, (2, 4), 0), ({"local_epochs": 3}, None, 3)]
)
def test_sites_that_are_asked_in_some_rounds_only_make_a_shorter_baseline(tmp_path, train, steps, epochs):
    """Catches: a central run of ten times the samples, where a tenth of the sites is asked in each round."""
    half = tiny_config(tmp_path, run={"rounds": 4}, train=train, strategy={"fraction_train": 0.5, "min_clients": 1})
    alone, central = local_only(half), centralised(half, 2)
    assert (alone.run.rounds, central.run.rounds) == (2, 2)
    assert central.train.local_epochs == epochs
    assert steps is None or (alone.train.local_steps, central.train.local_steps) == steps


def test_the_central_run_is_not_ended_by_a_sites_patience(tmp_path):
    """Catches: two bad looks that end a part of the whole training."""
    config = tiny_config(tmp_path, train={"validate_every_steps": 1, "local_patience": 1})
    assert (local_only(config).train.local_patience, centralised(config, 2).train.local_patience) == (1, 0)


def test_baselines_keep_what_is_compared_and_drop_what_is_federated(tmp_path):
    """Catches: another split for the site alone, a quorum that one site cannot meet, a server optimiser on top."""
    config = tiny_config(tmp_path, strategy={"name": "fedprox", "proximal_mu": 1.0, "min_clients": 2})
    alone, central = local_only(config), centralised(config, 2)
    assert alone.simulation == config.simulation
    assert (central.simulation.clients, central.simulation.partition) == (1, "iid")
    for baseline in (alone, central):
        assert (baseline.strategy.name, baseline.strategy.min_clients) == ("fedavg", 1)
        assert baseline.strategy.proximal_mu == 0
        assert (baseline.task, baseline.adapter, baseline.run.seed) == (config.task, config.adapter, config.run.seed)
        assert baseline.train.learning_rate == config.train.learning_rate


def test_the_untouched_base_is_measured_once(federated, monkeypatch):
    """Catches: a second pass over the evaluation rows for metrics that are there; other metrics than the base's."""
    config, outcome = federated
    expected = evaluate_base(load_graft(config, config.model.name, config.run.seed), config)
    monkeypatch.setattr(baselines, "evaluate_base", None)
    results = run_baselines(config, outcome.folder, simulated_app, SITES, ["untouched"], Progress())
    assert results["untouched"] == expected


@pytest.mark.parametrize(
    ("section", "settings"),
    [("adapter", {"method": "prompt", "num_virtual_tokens": 2}), ("task", {"warm_head": "auto"})],
)
def test_a_run_that_does_not_begin_at_the_base_measures_the_base_itself(tmp_path, section, settings):
    """Catches: random virtual tokens, or a head that was computed before round 1, in what is called untouched."""
    raw = tiny_config(tmp_path).model_dump(mode="json")
    kept = {"name": raw["task"]["name"], "max_length": 16} if section == "task" else {}
    config = parse({**raw, section: {**kept, **settings}})
    outcome = run_tiny(config)
    results = run_baselines(config, outcome.folder, simulated_app, SITES, ["untouched"], Progress())
    assert results["untouched"] != outcome.summary["before"]


def test_a_by_column_split_can_be_centralised(tmp_path):
    """Catches: a column that an even split does not take."""
    config = tiny_config(tmp_path, simulation={"partition": "by-column", "column": "company"})
    assert centralised(config, 4).simulation.column == ""


def test_all_baselines_are_measured_and_written(federated):
    """Catches: a baseline that is left out, or starts where the federated run ended."""
    config, outcome = federated
    kinds = ["untouched", "local", "centralised"]
    results = run_baselines(config, outcome.folder, simulated_app, SITES, kinds, Progress())
    assert results == json.loads((outcome.folder / "baselines.json").read_text())
    assert list(results) == [
        "untouched",
        "local",
        "own_rows",
        "linear_probe",
        "centralised",
        "curves",
        "learning_rates",
    ]
    assert sorted(results["local"]) == SITES
    assert results["untouched"].items() < outcome.summary["before"].items()  # the sites' figures are beside it
    assert results["centralised"] != results["untouched"]


def test_sites_alone_are_measured_on_their_own_rows_too(federated):
    """Catches: a site that looks hopeless alone, because only the operator's rows count."""
    _, outcome = federated
    results = json.loads((outcome.folder / "baselines.json").read_text())
    lines = read_lines(outcome.folder / "metrics.jsonl")
    assert results["own_rows"]["federated"] == lines[-1]["sites_eval"]
    assert sorted(results["own_rows"]["local"]) == SITES
    for site in SITES:
        assert results["own_rows"]["local"][site]["rows"] == lines[-1]["sites_eval"][site]["rows"]
        assert results["own_rows"]["local"][site] != results["own_rows"]["federated"][site]


@pytest.mark.parametrize("changes", [{"simulation": {"engine": "ray"}}, {"strategy": {"name": "flora"}}])
def test_every_run_has_baselines(tmp_path, changes):
    """Catches: a setting of the federation that a federation of one is refused for, after everything has run."""
    config = tiny_config(tmp_path, **changes)
    for alone in (local_only(config), centralised(config, 2)):
        assert alone.simulation.engine == "in-process"
        assert getattr(alone.adapter, "merged_rank", 0) == 0


def test_a_search_in_which_everything_diverges_changes_nothing(tmp_path, monkeypatch):
    """Catches: the highest rate of all taken where none trains."""
    config = centralised(tiny_config(tmp_path), 2)
    bench = _Bench(tmp_path, simulated_app, Progress())
    monkeypatch.setattr(_Bench, "_short_loss", lambda *arguments: float("inf"))
    assert bench.with_own_rate(config, "centralised").train.learning_rate == config.train.learning_rate


def test_a_linear_probe_is_compared_with(federated):
    """Catches: a head that was trained by steps, or none, in the place of the closed form on the frozen base."""
    _, outcome = federated
    results = json.loads((outcome.folder / "baselines.json").read_text())
    start = read_lines(outcome.folder / "baselines" / "linear-probe" / "metrics.jsonl")[0]
    assert start["warm_head"]["rows"] == 17  # of 24, those that are not kept for evaluation
    assert results["linear_probe"] == start["eval"]
    assert results["linear_probe"]["accuracy"] > results["untouched"]["accuracy"]


def test_the_central_run_has_a_curve(federated):
    """Catches: an end point without the way; a curve that does not end at the result, or begins after training."""
    _, outcome = federated
    results = json.loads((outcome.folder / "baselines.json").read_text())
    curve = results["curves"]["centralised"]
    assert [point["round"] for point in curve] == [0.0, 1.0, 2.0]
    assert {**results["untouched"], "round": 0.0} == curve[0]
    assert {**results["centralised"], "round": 2.0} == curve[-1]


def test_the_central_run_is_one_training(tmp_path, monkeypatch):
    """Catches: an optimiser, a schedule or an order of rows that begins anew where the run is cut for its curve."""
    config = tiny_config(tmp_path, run={"rounds": 4}, train={"local_steps": 2})
    for module in load_graft(config, config.model.name, config.run.seed).base.network.modules():
        if isinstance(module, nn.Dropout):
            monkeypatch.setattr(module, "p", 0.0)  # each round draws its own dropout
    bench = _Bench(tmp_path, simulated_app, Progress())
    cut = centralised(config, 2)
    whole = changed(cut, {"run.rounds": 1, "train.local_steps": 16})
    ends = [bench.train(run, name)[1][-1]["eval"]["loss"] for run, name in ((cut, "cut"), (whole, "whole"))]
    assert ends[0] == pytest.approx(ends[1], abs=1e-5)


def test_each_baseline_finds_a_rate_of_its_own(tmp_path):
    """Catches: all data in one place that trains at a rate at which nothing is learnt, and loses to the federation."""
    config = tiny_config(tmp_path, run={"rounds": 4}, train={"learning_rate": 1e-6, "local_steps": 4})
    bench = _Bench(tmp_path, simulated_app, Progress())
    found = bench.with_own_rate(centralised(config, 2), "centralised")
    assert found.train.learning_rate == bench.rates["centralised"]
    assert found.train.learning_rate > 1e-5


def test_a_rate_that_diverges_is_not_chosen(tmp_path):
    """Catches: a search that ends with the error of one of its trials."""
    config = tiny_config(tmp_path, train={"learning_rate": 10.0, "optimizer": "sgd", "max_grad_norm": 0.0})
    bench = _Bench(tmp_path, simulated_app, Progress())
    assert bench.with_own_rate(centralised(config, 2), "centralised").train.learning_rate <= 10.0


def test_baselines_do_not_depend_on_what_ran_before(federated, tmp_path):
    """Catches: sites alone that start from the weights of the federated run or of the site before them."""
    config, _ = federated

    def alone(folder, sites):
        folder.mkdir()
        return run_baselines(config, folder, simulated_app, sites, ["local"], Progress(), search_rates=False)["local"]

    first = alone(tmp_path / "a", ["site-1"])
    assert alone(tmp_path / "b", SITES)["site-1"] == first["site-1"]


def test_without_evaluation_data_there_is_nothing_to_measure(tmp_path):
    """Catches: an error after the federated run, in a command that goes on to write its report."""
    config = tiny_config(tmp_path, evaluation={"data": ""})
    assert run_baselines(config, tmp_path, simulated_app, SITES, ["local"], Progress()) == {}


def test_a_request_to_stop_ends_the_baselines(federated, tmp_path):
    """Catches: a Ctrl-C that is taken note of and ignored until all baselines are done."""
    config, _ = federated
    stop = Stop()
    stop.request()
    with pytest.raises(Interrupted):
        run_baselines(config, tmp_path, simulated_app, SITES, ["local"], Progress(), stop)
    assert not (tmp_path / "baselines.json").exists()


def test_the_average_is_over_sites():
    """Catches: a sum in the mean's place."""
    assert average({"a": {"accuracy": 0.5}, "b": {"accuracy": 1.0}}, "accuracy") == 0.75


def test_site_names_come_from_the_audit_log(tmp_path):
    """Catches: sites missing from a comparison, or listed twice after a resume."""
    done = run_tiny(tiny_config(tmp_path, run={"rounds": 1}))
    run_tiny(tiny_config(tmp_path, run={"rounds": 1}), resume=True)
    assert site_names(done.folder) == ["site-0", "site-1"]
