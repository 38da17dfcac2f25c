"""The figure: the table's numbers, drawn."""

import pytest

from tests.support.budget import assert_accounted, private_config, private_plan
from tsugiki.common.privacy.mechanisms import releases_of
from tsugiki.server.budget.budget import Size, make_budget
from tsugiki.server.budget.figure import bounds, draw, epsilons


def budget_of(mode, *arguments, shown="", **settings):
    """Return the numbers of a run; `shown` is the run file's mode."""
    return make_budget(private_config(mode, *arguments, **settings), Size(12_880), shown or mode, False)


def test_the_curves_go_through_the_table():
    """Catches: a curve of another epsilon, another mode or another number of rounds."""
    budget = budget_of("distributed")
    curves = bounds(budget)
    assert set(curves) == {"central", "distributed", "local"}
    drawn = [row for row in budget.table if row.clients in (10_000,)]
    assert len(drawn) == 3
    for row in drawn:
        assert curves[row.mode][row.clients] == pytest.approx(row.noise.bound, rel=2e-3)
    assert all(list(curve.values()) == sorted(curve.values()) for curve in curves.values())


def test_epsilon_over_rounds_is_another_accountants():
    """Catches: a curve that is not the plan's at its own number of rounds."""
    plan = private_plan("distributed")
    curves = epsilons(plan)
    assert set(curves) == {"release", "outsiders", "sums", "uploads"}
    assert curves["release"][100] == pytest.approx(8.0, rel=2e-3)
    for rounds in (1, 100, 200):
        release = releases_of(plan)["uploads"]
        assert_accounted(curves["uploads"][rounds], release, rounds, 1e-5)
    assert set(epsilons(private_plan("central"))) == {"release"}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "distributed", "enrolled": 120}, ["this plan: n = 120", "server, secure aggregation", "T = 100"]),
        ({"mode": "central"}, ["this plan: n = 100", "server, each upload: no limit", "epsilon 8"]),
        ({"mode": "local", "rounds": 1}, ["this plan: n = 100", "models", "T = 1"]),
        ({"mode": "central", "shown": "none"}, ["this run: n = 100", "mode distributed"]),
        ({"mode": "distributed", "secure_aggregation": True}, ["mode distributed, z = 6.033"]),
        (
            {
                "mode": "central",
                "enrolled": 1_000,
                "rounds": 10,
                "noise_multiplier": 2.0,
                "sampling": "poisson",
                "strategy": {"fraction_train": 0.1},
            },
            ["this plan: n = 100", "z = 2"],
        ),
    ],
    ids=["distributed", "central", "one round", "none", "no noise", "sampled"],
)
def test_the_plan_is_marked_and_whoever_cannot_be_drawn_is_named(settings, words):
    """Catches: a figure that fails on a mode, leaves the unprotected out, or writes raw mathematics."""
    settings = dict(settings)
    svg = draw(budget_of(settings.pop("mode"), **settings), "svg").decode()
    assert [text for text in words if text not in svg] == []
    assert "noise as long as the longest mean" in svg
    assert "mathdefault" not in svg
    assert "10,000" in svg


def test_equal_numbers_give_equal_bytes():
    """Catches: a date in a file that is kept under version control."""
    budget = budget_of("central")
    for format_, start in (("svg", b"<?xml"), ("png", b"\x89PNG")):
        drawn = draw(budget, format_)
        assert drawn == draw(budget, format_)
        assert drawn.startswith(start)
