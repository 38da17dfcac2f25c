"""A run without rows of the operator's: what the sites measure decides, as far as it can be compared."""

import math

import pytest

from tests.support.federation import hurry, tiny_config
from tests.support.toy import federate, run_toy, toy_app, toy_config
from tsugiki.client.app import simulated_app
from tsugiki.common.errors import ConfigError, Interrupted
from tsugiki.common.files import read_lines
from tsugiki.server.engines.grid import Stop
from tsugiki.server.report.listing import look_at
from tsugiki.server.report.run_files import read_run
from tsugiki.server.report.tables import story
from tsugiki.server.run.at_sites import in_common, results
from tsugiki.server.run.progress import Progress, describe, describe_sites
from tsugiki.server.run.simulate import simulate

ABSENT = math.nan
"""The accuracy of a site whose evaluation is rejected: as if it were away."""


@pytest.fixture(autouse=True)
def _hurried(monkeypatch):
    hurry(monkeypatch)


def scoring(name="accuracy", rows=10, **values):
    """Return a toy app whose sites measure the listed values, the first before training."""
    return toy_app(sorted(values), rows=rows, metrics=lambda site, round_: {name: values[site][round_]})


def judged(folder, app, sites, rounds=3, evaluation=None, **options):
    """Run a toy federation in which sites evaluate and the operator does not."""
    config = toy_config(folder, run={"rounds": rounds}, evaluation=evaluation or {})
    return run_toy(folder, app, sites, config, **options)


def test_the_mean_over_sites_decides_which_round_is_best(tmp_path):
    """Catches: the last adapter kept as the best whatever the sites measure; the best of one site instead of all."""
    ran = judged(tmp_path, scoring(a=[0.1, 0.9, 0.6, 0.2], b=[0.1, 0.2, 0.7, 0.6]), 2)
    assert (ran.state.best_round, ran.state.best_metric) == (2, pytest.approx(0.65))
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [line["best"] for line in lines] == [True, True, True, False]
    assert lines[3]["sites_mean"] == {"accuracy": pytest.approx(0.4)}
    assert lines[3]["sites_worst"] == {"site": "a", "metric": "accuracy", "value": 0.2}


def test_a_round_is_not_best_because_a_bad_site_was_absent(tmp_path):
    """Catches: means over other sites compared as they are: without b the mean of round 2 is 0.8, the highest."""
    ran = judged(tmp_path, scoring(a=[0.1, 0.9, 0.8, 0.8], b=[0.1, 0.3, ABSENT, 0.3]), 2)
    assert ran.state.best_round == 1
    assert ran.state.evaluations_since_best == 2
    line = ran.rounds[1]
    assert line["sites_mean"] == {"accuracy": 0.8}
    assert line["sites_compared"] == {"round": 1, "sites": ["a"], "of": 2}
    assert "sites_compared" not in ran.rounds[0]


def test_too_few_sites_in_common_say_nothing(tmp_path):
    """Catches: one site of three that decides for all, and a round counted towards early stopping unjudged."""
    away = [0.5, 0.6, ABSENT, ABSENT]
    ran = judged(tmp_path, scoring(a=[0.5, 0.6, 0.9, 0.1], b=away, c=away), 3)
    assert (ran.state.best_round, ran.state.evaluations_since_best) == (1, 0)
    assert [line["best"] for line in ran.rounds] == [True, False, False]
    assert ran.rounds[2]["sites_compared"] == {"round": 1, "sites": [], "of": 3}


@pytest.mark.parametrize(
    ("now", "best", "common"),
    [("ab", "ab", "ab"), ("abc", "ab", "ab"), ("a", "ab", "a"), ("a", "abc", ""), ("c", "ab", ""), ("", "a", "")],
)
def test_half_of_the_best_round_s_sites_are_needed(now, best, common):
    """Catches: sites that came later in the comparison, and a limit by the sites of the newer round."""
    assert in_common(now, best) == list(common)


def test_the_untrained_adapter_gives_way_where_nobody_can_compare(tmp_path):
    """Catches: the untrained adapter as the result, because its only judge left after round 0."""
    ran = judged(tmp_path, scoring(a=[0.5, ABSENT, ABSENT, ABSENT], b=[ABSENT, ABSENT, 0.2, 0.1]), 2)
    assert ran.state.best_round == 2
    assert [line.get("best") for line in ran.rounds] == [None, True, False]


def test_early_stopping_counts_evaluations_by_sites(tmp_path):
    """Catches: patience that only the operator's rows can end."""
    app = scoring(a=[0.1, 0.5, 0.5, 0.4, 0.9], b=[0.1, 0.5, 0.5, 0.4, 0.9])
    ran = judged(tmp_path, app, 2, rounds=4, evaluation={"early_stopping_patience": 2})
    assert (ran.state.round, ran.state.best_round) == (3, 1)


def test_of_a_loss_the_lowest_mean_is_best_and_the_highest_site_worst(tmp_path):
    """Catches: the worst round of a loss kept as the best."""
    app = scoring("loss", a=[0.9, 0.2, 0.5, 0.6], b=[0.9, 0.3, 0.5, 0.6])
    ran = judged(tmp_path, app, 2, evaluation={"monitor": "sites_loss"}, lower_is_better=True)
    assert ran.state.best_round == 1
    assert ran.rounds[0]["sites_worst"] == {"site": "b", "metric": "loss", "value": 0.3}


@pytest.mark.parametrize(("monitor", "best"), [("", 3), ("eval_accuracy", 3), ("accuracy", 3), ("sites_accuracy", 1)])
def test_with_rows_of_the_operator_sites_decide_only_if_they_are_named(tmp_path, monitor, best):
    """Catches: the sites' mean in the place of the operator's rows, and `sites_accuracy` looked for among these."""
    central = iter([0.1, 0.2, 0.3, 0.4])
    app = scoring(a=[0.1, 0.9, 0.2, 0.2], b=[0.1, 0.9, 0.2, 0.2])
    options = {"evaluate": lambda vector: {"accuracy": next(central)}}
    assert judged(tmp_path, app, 2, evaluation={"monitor": monitor}, **options).state.best_round == best


def test_a_resumed_run_knows_its_best_round_and_its_patience(tmp_path, monkeypatch):
    """Catches: the sites' values of the best round forgotten, so that any round is best after a resumption."""
    app = scoring(a=[0.1, 0.9, 0.5, 0.6, 0.5], b=[0.1, 0.3, 0.3, ABSENT, 0.3])

    def config(folder):
        return toy_config(folder, run={"rounds": 4}, evaluation={"early_stopping_patience": 3})

    whole = federate(monkeypatch, app, 2, config(tmp_path / "whole"))
    stop = Stop()

    class Stopping(Progress):
        def round_ends(self, record):
            if record["round"] == 2:
                stop.request()

    with pytest.raises(Interrupted):
        federate(monkeypatch, app, 2, config(tmp_path / "cut"), progress=Stopping(), stop=stop)
    resumed = federate(monkeypatch, app, 2, config(tmp_path / "cut"), resume=True)
    for state in (whole.state, resumed.state):
        assert (state.best_round, state.evaluations_since_best) == (1, 3)
        assert state.best_at_sites == {"a": 0.9, "b": 0.3}
    assert resumed.summary["after"] == whole.summary["after"] == {"sites_accuracy": 0.6}


def test_the_summary_has_what_sites_measured_before_and_after(tmp_path, monkeypatch):
    """Catches: no before and after without rows of the operator's; a before over other sites than the after."""
    app = scoring(a=[0.1, 0.9, 0.2, 0.2], b=[0.5, 0.7, 0.2, 0.2], c=[ABSENT, 0.8, 0.2, 0.2])
    summary = federate(monkeypatch, app, 3, toy_config(tmp_path)).summary
    assert (summary["monitor"], summary["best_round"], summary["before_round"]) == ("sites_accuracy", 1, 0)
    assert summary["before"] == {"sites_accuracy": pytest.approx(0.3)}
    assert summary["after"] == {"sites_accuracy": pytest.approx(0.8)}
    assert summary["at_sites"] == {
        "compared": ["a", "b"],
        "evaluated": ["a", "b", "c"],
        "worst": {"site": "b", "metric": "accuracy", "value": 0.7},
    }
    told = describe_sites(summary["at_sites"])
    assert told == "sites_*: means over 2 sites that evaluated both rounds; worst site b, accuracy 0.7000"


def test_means_of_both_rounds_have_the_same_weights():
    """Catches: a site that has more rows in the later round, whose weight makes a change that no site measured."""
    lines = [
        {"round": number, "sites_eval": {"a": {"accuracy": 1.0, "rows": 1}, "b": {"accuracy": 0.0, "rows": 1}}}
        | {"sites_eval_weights": weights}
        for number, weights in ((0, {"a": 1, "b": 1}), (1, {"a": 3, "b": 1}))
    ]
    found = results(lines, 1, "accuracy", lower_is_better=False)
    assert found["before"] == found["after"] == {"sites_accuracy": 0.75}


def test_a_round_s_line_has_the_mean_the_worst_site_and_what_was_compared(tmp_path):
    """Catches: a console that says nothing of what sites measured, or hides that a site was absent."""
    ran = judged(tmp_path, scoring(a=[0.1, 0.9, 0.8, 0.8], b=[0.1, 0.3, ABSENT, 0.3]), 2)
    first, second, _ = (describe(line) for line in ran.rounds)
    assert "sites_accuracy 0.6000 (mean of 2 sites, worst b 0.3000)" in first
    assert first.endswith("(best)")
    assert "sites_accuracy 0.8000 (mean of 1 sites, worst a 0.8000)" in second
    assert "compared with round 1 at 1 of its 2 sites" in second


def test_a_metric_that_no_site_sends_is_said_before_training(tmp_path):
    """Catches: a best round that is silently the last, because policies withhold the metric or it is misspelt."""
    notes = []
    progress = Progress()
    progress.note = notes.append
    options = {"evaluation": {"monitor": "sites_acuracy"}, "progress": progress}
    ran = judged(tmp_path, toy_app(["a", "b"]), 2, **options)
    assert ran.state.best_round == 3
    assert [note for note in notes if "no site sends acuracy" in note and "accuracy)" in note]


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"evaluation": {"early_stopping_patience": 1, "at_sites": False}}, "evaluation.data"),
        ({"evaluation": {"monitor": "sites_accuracy", "at_sites": False, "data": "x.csv"}}, "evaluation.monitor"),
        (
            {
                "evaluation": {"monitor": "sites_accuracy", "data": "x.csv"},
                "privacy": {"mode": "central", "noise_multiplier": 1.0, "clip_norm": 1.0},
            },
            "evaluation.monitor",
        ),
    ],
)
def test_what_depends_on_an_evaluation_that_there_is_not_is_refused(tmp_path, sections, key):
    """Catches: a run that waits for ever for an improvement, or chooses by metrics that private sites never send."""
    with pytest.raises(ConfigError, match=key.replace(".", r"\.")):
        toy_config(tmp_path, **sections)


def test_a_run_of_no_rounds_evaluates_and_ends(tmp_path):
    """Catches: sums or updates asked for where nobody trains; a summary and report that are never written."""
    sections = {"task": {"warm_head": "auto"}, "simulation": {"evaluation_fraction": 0.25}}
    config = tiny_config(tmp_path, run={"rounds": 0}, **sections)
    asked = []

    def seen(sender, reply):
        asked.append(reply.metadata.message_type)
        return [reply]

    outcome = simulate(config, simulated_app, fault=seen)
    assert set(asked) == {"query", "evaluate"}
    lines = read_lines(outcome.folder / "metrics.jsonl")
    assert [line["round"] for line in lines] == [0]
    assert sorted(lines[0]["sites_eval"]) == ["site-0", "site-1"]
    summary = outcome.summary
    assert (summary["rounds"], summary["stopped"]) == (0, "finished")
    assert summary["before"] == summary["after"]
    assert {"accuracy", "sites_accuracy"} <= summary["after"].keys()
    told = " ".join(story(read_run(outcome.folder)))
    assert "Nothing was trained: the run evaluated the lora adapter" in told
    assert look_at(outcome.folder).state == "finished"


@pytest.mark.parametrize(
    "sections",
    [
        {"evaluation": {"at_sites": False}},
        {"evaluation": {"data": "x.csv"}, "privacy": {"mode": "central", "noise_multiplier": 1.0, "clip_norm": 1.0}},
    ],
    ids=["nothing to evaluate", "private"],
)
def test_a_run_of_no_rounds_needs_something_to_evaluate(tmp_path, sections):
    """Catches: a run that waits for sites and does nothing; a plan of privacy for no round, whose noise has no size."""
    with pytest.raises(ConfigError, match=r"run\.rounds = 0"):
        toy_config(tmp_path, run={"rounds": 0}, **sections)
