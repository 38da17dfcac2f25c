"""Reading a run's folder, and what is summed over it."""

import pytest

from tests.support.runs import BASELINES, line, run_folder, usual
from tsugiki.common.errors import StorageError
from tsugiki.server.report.run_files import baseline_metrics, read_run, replies_by_site, sum_sites


@pytest.mark.parametrize("content", ["{", "[]", "\udcff"])
def test_a_corrupt_summary_is_an_error_with_a_code(tmp_path, content):
    """Catches: a decoder's own exception instead of ours."""
    folder = usual(tmp_path / "run")
    (folder / "summary.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(StorageError) as caught:
        read_run(folder)
    assert caught.value.code == "run-corrupt"


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl", "spec.json", "config.toml", "baselines.json"])
def test_a_byte_that_is_no_text_is_an_error_with_a_code_in_every_file(tmp_path, name):
    """Catches: one of the files of a run read without a word for bytes that are no UTF-8."""
    folder = usual(tmp_path / "run")
    (folder / name).write_bytes(b'{"a": "\x80"}\n')
    with pytest.raises(StorageError) as caught:
        read_run(folder)
    assert caught.value.code == "run-corrupt"


@pytest.mark.parametrize("kind", ["untouched", "local", "centralised"])
def test_any_baseline_may_be_missing(tmp_path, kind):
    """Catches: a report that needs all three baselines; the best or the last site shown for all of them."""
    left = {name: value for name, value in BASELINES.items() if name != kind}
    expected = {
        "untouched": ("untouched base", 0.5),
        "local": ("local-only, mean", 0.7),
        "centralised": ("centralised", 0.95),
    }
    del expected[kind]
    found = baseline_metrics(read_run(usual(tmp_path / "run", left)))
    assert found == {label: {"accuracy": pytest.approx(value)} for label, value in expected.values()}


def test_sites_are_summed_over_voided_attempts_too(tmp_path):
    """Catches: rejections of a voided attempt lost, bytes counted once, means over rounds without an accepted reply."""
    a, b, c = sum_sites(read_run(usual(tmp_path / "run")))
    assert (a.name, a.asked, a.accepted, a.rejected, a.bytes_up) == ("a", 3, 3, {}, 3000)
    assert (b.name, b.asked, b.accepted, b.rejected, b.mean_seconds) == ("b", 3, 2, {"norm": 1}, 1.0)
    assert (c.name, c.accepted, c.rejected, c.mean_seconds, c.last_loss) == ("c", 0, {"gone": 1}, None, None)


def test_of_a_round_that_was_tried_again_the_last_attempt_is_shown(tmp_path):
    """Catches: a voided attempt's rejection drawn over the accepted reply that followed; dropouts as rejected."""
    replies = replies_by_site(read_run(usual(tmp_path / "run")))
    assert replies == {"a": {1: "accepted", 2: "accepted"}, "b": {1: "accepted", 2: "accepted"}, "c": {2: "no reply"}}


def test_an_audit_is_read_if_it_is_of_the_runs_plan(tmp_path):
    """Catches: an audit of other settings, perhaps with more noise, beside the figures of this run."""
    private = {"privacy": {"mode": "central", "plan_sha256": "ab"}}
    folder = run_folder(tmp_path / "run", [line(1)], **private)
    assert read_run(folder).audit == {}
    for plan, found in (("cd", {}), ("ab", {"plan_sha256": "ab"})):
        (folder / "privacy_audit.json").write_text(f'{{"plan_sha256": "{plan}"}}')
        assert read_run(folder).audit == found
