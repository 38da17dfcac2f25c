"""What a run may say of its privacy."""

import pytest

from tsugiki.server.run.privacy_words import NOT_PRIVATE, OPEN, audit_statement, format_epsilon, headline, statement


def summary(mode="distributed", private=True, **changes):
    """Return summary.json's entry of a private run."""
    known = {
        "mode": mode,
        "private": private,
        "secure_aggregation": False,
        "delta": 1e-5,
        "noise_multiplier": 6.0,
        "clip_norm": 1.0,
        "target_epsilon": 8.0,
        "epsilon": {"release": 7.99, "uploads": 209.0},
    }
    return {**known, **changes}


def text(**changes):
    """Return the whole statement."""
    return " ".join(statement(summary(**changes)))


def test_a_run_without_privacy_claims_none():
    """Catches: silence, which reads as safety; a missing entry read as a private run."""
    assert statement({}) == statement({"mode": "none"}) == [OPEN]
    assert "nothing in this report limits what an update reveals" in OPEN
    assert headline({"mode": "none"}) == headline({}) == ""


@pytest.mark.parametrize("mode", ["central", "local", "distributed"])
def test_each_figure_names_its_adversary_and_delta(mode):
    """Catches: an epsilon without whom it is against, or without delta, unit and adjacency."""
    found = text(mode=mode)
    assert "epsilon 7.99 at delta 1e-05" in found
    assert "whoever sees the models" in found
    assert "epsilon 209 at delta 1e-05" in found
    for word in ("one client with all its rows", "zero-out", "not audited", "No amplification"):
        assert word in found, word
    assert "epsilon 7.99 against whoever sees the models" in headline(summary(mode=mode))


def test_seeded_or_missing_noise_is_marked():
    """Catches: a figure printed for noise that anybody can draw, or for none."""
    for changes, why in (({}, "known seed"), ({"noise_multiplier": 0.0}, "no noise")):
        assert f"{NOT_PRIVATE}: " in text(private=False, **changes)
        assert why in text(private=False, **changes)
        assert "7.99" not in text(private=False, **changes)
        assert headline(summary(private=False, **changes)).startswith(NOT_PRIVATE)


def test_what_the_server_sees_is_said():
    """Catches: distributed noise without secure aggregation sold as protection from the server."""
    assert "protects little from the server itself" in text()
    assert "no single update" in text(secure_aggregation=True)
    assert "invents sites" in text(secure_aggregation=True)
    assert "The server is trusted" in text(mode="central")


def test_another_site_and_outsiders_have_a_figure_each():
    """Catches: the smaller figure of outsiders printed alone, or an older run said to be accounted for sites."""
    found = text(epsilon={"release": 7.99, "outsiders": 7.12, "sums": 7.12})
    assert "other sites included: epsilon 7.99" in found
    assert "outsiders, who see the models only: epsilon 7.12" in found
    assert "the noise of its own clients" in found
    line = headline(summary(epsilon={"release": 7.99, "outsiders": 7.12}))
    assert line.index("7.99") < line.index("7.12")
    assert "the noise of its own clients" not in text()


def test_no_protection_is_not_a_number():
    """Catches: an infinite epsilon printed as 0, inf or None."""
    assert format_epsilon(None) == "none at all"
    assert "the server, which sees each upload: none at all" in text(epsilon={"release": 1.0, "uploads": None})


def audited(found=1.3, claimed=8.0, control=5.6):
    """Return privacy_audit.json with one ledger."""
    ledger = {
        "adversary": "release",
        "claimed": claimed,
        "found": {"largest": found},
        "control": {"largest": control},
        "holds": claimed is None or found <= claimed,
    }
    return {"trials": 4500, "runs": 5, "confidence": 0.99, "delta": 1e-5, "ledgers": [ledger]}


def test_an_audit_is_told_beside_the_claim():
    """Catches: a lower bound that reads as a proof; a broken claim in the tone of a good one; no claim as a number."""
    (first, last) = audit_statement(audited())
    assert first == (
        "Against whoever sees the models, other sites included: claimed 8.0; an attacker found at least 1.3 "
        "(without noise, as a control: 5.6)."
    )
    assert "4,500 clients planted in 5 simulated runs, 99% confidence, delta 1e-05" in last
    assert "never prove one" in last
    assert "more trials" not in last
    assert "at least 3.1 " in audit_statement(audited(found=3.18))[0]  # never rounded up
    assert "more trials" in audit_statement(audited(control=3.0))[-1]
    assert "BREAKS" not in first
    assert "at least 9.1, WHICH BREAKS THE CLAIM" in audit_statement(audited(found=9.1))[0]
    assert "claimed nothing; an attacker found at least 5.6" in audit_statement(audited(5.6, None))[0]
    assert audit_statement({}) == []
