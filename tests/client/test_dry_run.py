"""What `tsugiki client --dry-run` shows is what a real client sends."""

import copy

import pytest

from tests.support.federation import CANARIES, app_of_sites, site_folder, tiny_config
from tsugiki.client.dry_run import replies
from tsugiki.client.site.site import read_site
from tsugiki.common.errors import UsageError
from tsugiki.server.run.simulate import simulate


def test_it_shows_what_is_sent(tmp_path):
    """Catches: a dry run that is another program; one that writes the site's log; rows among what is shown."""
    config = tiny_config(tmp_path, strategy={"min_clients": 1})
    file = site_folder(tmp_path / "acme", "acme")
    sent = {}

    def keep(node, reply):
        sent[len(sent)] = copy.deepcopy(reply.content)  # the server drops what it has read
        return [reply]

    simulate(config, app_of_sites([file]), fault=keep)
    log = (tmp_path / "acme" / "audit.jsonl").read_bytes()
    shown = dict(replies(read_site(file), config))
    assert list(shown) == ["hello", "round 1"]
    assert dict(shown["hello"]["reply"]) == dict(sent[0]["reply"])
    for key in set(shown["round 1"]["reply"]) - {"nonce", "seconds"}:
        assert shown["round 1"]["reply"][key] == sent[1]["reply"][key]
    ours, theirs = (content.array_records["arrays"] for content in (shown["round 1"], sent[1]))
    assert [(name, array.data) for name, array in ours.items()] == [
        (name, array.data) for name, array in theirs.items()
    ]
    assert (tmp_path / "acme" / "audit.jsonl").read_bytes() == log
    assert not [canary for canary in CANARIES if canary in str(shown)]


def test_of_a_run_of_no_rounds_no_update_is_shown(tmp_path):
    """Catches: a division by no rounds, and an update shown that such a run never asks for."""
    config = tiny_config(tmp_path, run={"rounds": 0})
    site = read_site(site_folder(tmp_path / "acme", "acme"))
    assert [title for title, _ in replies(site, config)] == ["hello"]


def test_masks_over_more_sites_are_left_out_whole(tmp_path):
    """Catches: a run refused here, because a setting of its masks is left without them."""
    sites = {"simulation": {"clients": 3}, "strategy": {"min_clients": 3}}
    privacy = {"mode": "distributed", "target_epsilon": 50.0, "delta": 1e-3, "secure_aggregation": True, "min_sites": 3}
    config = tiny_config(tmp_path, privacy=privacy, **sites)
    site = read_site(site_folder(tmp_path / "acme", "acme"))
    assert [title for title, _ in replies(site, config)] == ["hello", "round 1, before it is masked"]


def test_a_refusal_is_told_with_its_code(tmp_path):
    """Catches: a dry run that passes where the real one is refused."""
    config = tiny_config(tmp_path)
    file = site_folder(tmp_path / "acme", "acme")
    file.write_text('[policy]\ntasks = ["sentence-embedding"]\n' + file.read_text())
    with pytest.raises(UsageError) as caught:
        list(replies(read_site(file), config))
    assert caught.value.code == "policy-task"


@pytest.mark.parametrize(("secure", "title"), [(False, "round 1"), (True, "round 1, before it is masked")])
def test_a_private_run_shows_what_is_left_of_an_update(tmp_path, secure, title):
    """Catches: noise left out of what is shown; the site's own account charged for looking; steps asked for in vain."""
    privacy = {"mode": "distributed", "target_epsilon": 50.0, "delta": 1e-3, "secure_aggregation": secure}
    config = tiny_config(tmp_path, privacy=privacy)
    site = read_site(site_folder(tmp_path / "acme", "acme"))
    first, second = (dict(replies(site, config)) for _ in range(2))
    assert list(first) == ["hello", title]
    assert first["hello"].config_records["reply"]["rows"] == 0
    assert set(first[title].config_records["reply"]) == {"site", "round", "nonce"}
    uploads = [shown[title].array_records["arrays"]["adapter"].data for shown in (first, second)]
    assert uploads[0] != uploads[1]
    assert not (tmp_path / "acme" / "privacy-ledger.jsonl").exists()


@pytest.mark.parametrize("allowed", [True, False])
def test_sums_for_a_head_are_shown_where_they_would_leave(tmp_path, allowed):
    """Catches: sums that leave without having been shown; a dry run that stops where the real one goes on."""
    config = tiny_config(tmp_path, task={"warm_head": "auto"})
    file = site_folder(tmp_path / "acme", "acme")
    if not allowed:
        file.write_text("[policy]\nhead_sums = false\n" + file.read_text())
    shown = dict(replies(read_site(file), config))
    title = "sums for a head before round 1"
    assert list(shown) == ["hello", *([title] if allowed else []), "round 1"]
    assert not allowed or shown[title]["reply"]["rows"] == 8
    assert not [canary for canary in CANARIES if canary in str(shown)]
