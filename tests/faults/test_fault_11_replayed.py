"""Fault 11: replies of another round, with another nonce, or twice."""

import numpy as np
import pytest
from flwr.app import Message

from tests.support.toy import (
    ASKED,
    SPEC,
    check_only_rejected,
    forging,
    is_train,
    mostly_two,
    rewritten,
    run_toy,
    run_with_bad_site,
    toy_app,
    toy_config,
    train_reply,
)
from tsugiki.server.run.guard import check


@pytest.mark.parametrize("fields", [{"round": 2}, {"round": 4}, {"nonce": "0" * 16}, {"nonce": ""}])
def test_a_reply_to_another_request_is_stale(fields):
    """Catches: a replayed reply averaged again."""
    assert check(train_reply(**fields), ASKED, SPEC, 100.0).reason == "stale"


def test_a_replayed_reply_is_rejected(tmp_path):
    """Catches: the content of an old reply under a new message's name."""
    first = {}

    def forge(reply):
        kept = first.setdefault("reply", reply)
        return Message(kept.content, metadata=reply.metadata) if kept is not reply else reply

    config = toy_config(tmp_path, strategy={"max_update_norm": 1000.0, "norm_tolerance": 0.0})
    ran = run_toy(tmp_path, toy_app(["a", "b", "c"], mostly_two), 3, config, fault=forging(2, forge))
    assert [line["rejected"] for line in ran.rounds] == [
        {},
        *[{"b": {"reason": "stale", "detail": line["rejected"]["b"]["detail"]}} for line in ran.rounds[1:]],
    ]
    assert np.allclose(ran.state.vector, 18.0 + 2.0 + 2.0)


def test_another_rounds_nonce_is_rejected(tmp_path):
    """Catches: a nonce that is sent and not compared."""
    ran = run_with_bad_site(tmp_path, lambda reply: rewritten(reply, nonce="f" * 16))
    check_only_rejected(ran, "stale")


def test_the_first_valid_of_two_replies_counts(tmp_path):
    """Catches: a site that weighs twice, or whose second thoughts count."""

    def twice(node, reply):
        return [reply, reply] if is_train(reply) and node == 2 else [reply]

    ran = run_toy(tmp_path, toy_app(["a", "b", "c"]), 3, toy_config(tmp_path, run={"rounds": 1}), fault=twice)
    assert np.array_equal(ran.state.vector, np.full(SPEC.size, 0.25, np.float32))
    assert list(ran.rounds[0]["accepted"]) == ["a", "b", "c"]
    assert ran.rounds[0]["rejected"] == {"b": {"reason": "duplicate", "detail": ""}}


def test_a_bad_reply_does_not_keep_a_good_one_out(tmp_path):
    """Catches: someone who gets a site rejected by sending rubbish before it answers."""

    def both(node, reply):
        return [rewritten(reply, nonce="f" * 16), reply] if is_train(reply) and node == 2 else [reply]

    ran = run_toy(tmp_path, toy_app(["a", "b", "c"]), 3, toy_config(tmp_path, run={"rounds": 1}), fault=both)
    assert list(ran.rounds[0]["accepted"]) == ["a", "b", "c"]
    assert ran.rounds[0]["rejected"] == {}


def test_one_site_cannot_answer_for_another(tmp_path):
    """Catches: a name in a reply that is believed: b would be averaged in the place of c."""
    ran = run_with_bad_site(tmp_path, lambda reply: rewritten(reply, site="c"))
    check_only_rejected(ran, "site")
