"""Fault 15: whatever is raised at a site, the server learns a class name and no more."""

import logging

import pytest

from tests.support.federation import CANARY, leaks, run_tiny, server_log, tiny_config
from tsugiki.client import app
from tsugiki.client.prepare import SiteRun
from tsugiki.client.training import cohort
from tsugiki.common.audit import verify
from tsugiki.common.files import read_lines

RAISED = {
    "client-error:ValueError": ValueError(CANARY),
    "client-error:PrivateError": type("PrivateError", (Exception,), {})(CANARY),
    "client-error": type(f"Error of {CANARY}", (Exception,), {})(CANARY),
    "out-of-memory": MemoryError(CANARY),
    "client-error:KeyboardInterrupt": KeyboardInterrupt(CANARY),
    "client-error:SystemExit": SystemExit(CANARY),
    "client-error:GeneratorExit": GeneratorExit(CANARY),
    "client-error:UnicodeDecodeError": UnicodeDecodeError("utf-8", CANARY.encode(), 0, 1, CANARY),
}


@pytest.mark.parametrize("reason", RAISED)
def test_a_code_and_nothing_else_reaches_the_server(tmp_path, monkeypatch, caplog, capfd, reason):
    """Catches: an exception's text in any file, log or line of the server, and a run that ends with the site."""
    train = cohort.train

    def fail_at_one(graft, rows, settings, local_round, *watching):
        if local_round.site == "site-1":
            raise RAISED[reason]
        return train(graft, rows, settings, local_round, *watching)

    monkeypatch.setattr(cohort, "train", fail_at_one)
    from tsugiki.server.run.progress import Lines

    with caplog.at_level(logging.DEBUG):
        done = run_tiny(tiny_config(tmp_path, strategy={"min_clients": 1}), progress=Lines())
    lines = [line for line in read_lines(done.folder / "metrics.jsonl") if line["round"]]
    assert [list(line["accepted"]) for line in lines] == [["site-0"], ["site-0"]]
    assert [line["rejected"]["site-1"] for line in lines] == [{"reason": reason, "detail": ""}] * 2
    rounds = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "round"]
    assert [event["rejected"] for event in rounds] == [{"site-1": reason}] * 2
    captured = capfd.readouterr()
    assert f"without site-1 ({reason})" in captured.err
    assert leaks(done.folder, captured.out, captured.err, server_log(caplog)) == []
    assert CANARY in caplog.text  # the site's own log tells what happened


def test_a_failure_at_the_hello_is_a_code_too(tmp_path, monkeypatch, capfd):
    """Catches: a boundary around training only."""
    tokenise = SiteRun.rows

    def fail_at_one(self, part):
        if self.site.name == "site-1":
            raise ValueError(CANARY)
        return tokenise(self, part)

    monkeypatch.setattr(SiteRun, "rows", fail_at_one)
    done = run_tiny(tiny_config(tmp_path, run={"rounds": 1}, strategy={"min_clients": 1}))
    refused = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "refused"]
    assert [event["code"] for event in refused] == ["client-error:ValueError"]
    assert leaks(done.folder, *capfd.readouterr()) == []


def test_a_failure_at_the_evaluation_is_a_code_too(tmp_path, monkeypatch, capfd):
    """Catches: a metric of a site that failed, and a run that ends with it."""
    config = tiny_config(
        tmp_path, run={"rounds": 1}, evaluation={"at_sites": True}, simulation={"evaluation_fraction": 0.25}
    )
    evaluate = app._evaluate

    def fail_at_one(site, content):
        if site.name == "site-1":
            raise ValueError(CANARY)
        return evaluate(site, content)

    monkeypatch.setattr(app, "_evaluate", fail_at_one)
    done = run_tiny(config)
    assert [list(line["sites_eval"]) for line in read_lines(done.folder / "metrics.jsonl")] == [["site-0"]] * 2
    events = [event for event in verify(done.folder / "audit.jsonl") if event["event"] == "evaluation-rejected"]
    assert [(event["site"], event["code"]) for event in events] == [("site-1", "client-error:ValueError")] * 2
    assert leaks(done.folder, *capfd.readouterr()) == []
