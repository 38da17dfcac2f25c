"""Real sites with files of their own, and a server that lies to them: what they refuse, and what it costs them."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from tests.support.federation import app_of_sites, run_tiny, site_folder, tiny_config, write_rows
from tests.support.lying import POLICY, invent_counts, lying, told_to_others
from tsugiki.client.site.records import BEGUN
from tsugiki.common.config.parse import changed as changed_config
from tsugiki.common.errors import QuorumNotMet
from tsugiki.common.files import read_lines
from tsugiki.common.keys import fingerprint, new_key_pair, read_public_key
from tsugiki.common.privacy.secagg.protocol import start
from tsugiki.server.run import secagg as aggregation

NAMES = ("acme", "bolt", "crow")


def three_sites(folder, demanding=NAMES):
    """Write three real sites, some with a demanding policy; return their site.toml files."""
    files = [site_folder(folder / name, name) for name in NAMES]
    for name, file in zip(NAMES, files, strict=True):
        if name in demanding:
            file.write_text(file.read_text() + POLICY)
    return files


def with_keys(files, pinned=True):
    """Give each site a node key, and let it pin the two others; return the files."""
    pins = []
    for name, file in zip(NAMES, files, strict=True):
        public = new_key_pair(file.parent / "node.key")
        pins.append(f"{name} {fingerprint(read_public_key(public))}")
    for file in files:
        members = f"members = {json.dumps(pins)}\n" if pinned else ""
        file.write_text(f'{file.read_text()}{members}[server]\nkey = "node.key"\n')
    return files


def masked_run(folder, **privacy):
    """Return one round of three sites under secure aggregation."""
    settings = {"mode": "distributed", "secure_aggregation": True, "noise_multiplier": 3.0, "delta": 1e-5}
    return tiny_config(
        folder,
        run={"rounds": 1},
        privacy={**settings, "min_sites": 3, **privacy},
        strategy={"min_clients": 3},
        simulation={"clients": 3},
    )


def lie(monkeypatch, change):
    """Let the server change each message before it leaves."""
    monkeypatch.setattr(aggregation, "address", lying(change))


def codes(folder, kind):
    """Return the codes with which the sites refused a kind of message, by site name, each once."""
    found = {}
    for name in NAMES:
        lines = read_lines(folder / name / "audit.jsonl")
        found[name] = {line["code"] for line in lines if line["event"] == "refused" and line["kind"] == kind}
    return found


def charged(folder):
    """Return the sites whose ledgers have a charge."""
    return [name for name in NAMES if (folder / name / "privacy-ledger.jsonl").exists()]


def begun(folder):
    """Return the sites whose audit logs count a round."""
    return [name for name in NAMES if any(one["event"] == BEGUN for one in read_lines(folder / name / "audit.jsonl"))]


def test_shares_that_do_not_open_cost_no_round(tmp_path, monkeypatch):
    """Catches: a member that seals garbage, and so uses up another site's `max_rounds` without any training."""

    def spoil(kind, site, content):
        if kind == "train.masked":
            values = content.config_records["secagg"]["sealed_values"]
            content.config_records["secagg"]["sealed_values"] = [bytes(len(value)) for value in values]

    lie(monkeypatch, spoil)
    with pytest.raises(QuorumNotMet):
        run_tiny(masked_run(tmp_path), app_of_sites(three_sites(tmp_path)))
    assert codes(tmp_path, "train.masked") == {name: {"secagg-mismatch"} for name in NAMES}
    assert charged(tmp_path) == []
    assert begun(tmp_path) == []


def test_an_honest_server_gets_its_sum_and_each_site_is_charged(tmp_path):
    """Catches: tests below that pass because these sites refuse everything."""
    run_tiny(masked_run(tmp_path), app_of_sites(three_sites(tmp_path)))
    assert charged(tmp_path) == list(NAMES)
    assert begun(tmp_path) == list(NAMES)


def test_counts_that_the_server_invents_are_not_believed(tmp_path, monkeypatch):
    """Catches: two "gateways of 30,000" that nobody checks, with which three sites add a 20,000th of the noise."""
    config = masked_run(tmp_path, enrolled_clients=60_003)
    lie(monkeypatch, invent_counts)
    with pytest.raises(QuorumNotMet):
        run_tiny(config, app_of_sites(three_sites(tmp_path)))
    assert codes(tmp_path, "query.shares") == {name: {"policy-clients"} for name in NAMES}
    assert charged(tmp_path) == []


@pytest.mark.parametrize(
    ("section", "name", "value"), [("train", "learning_rate", 1e-30), ("privacy", "noise_multiplier", 1e-6)]
)
def test_sites_that_were_sent_other_settings_open_no_sum(tmp_path, monkeypatch, section, name, value):
    """Catches: others that send zeros or no noise, so that the opened "sum of three" is one site's update."""
    lie(monkeypatch, told_to_others("acme", section, name, value))
    with pytest.raises(QuorumNotMet):
        run_tiny(masked_run(tmp_path), app_of_sites(three_sites(tmp_path, demanding=("acme",))))
    assert codes(tmp_path, "train.masked") == {name: {"secagg-mismatch"} for name in NAMES}
    assert charged(tmp_path) == []
    assert begun(tmp_path) == []


@pytest.mark.parametrize("promised", [True, False])
def test_sites_that_were_sent_another_adapter_open_no_sum(tmp_path, monkeypatch, promised):
    """Catches: an adapter at which the others' updates vanish: announced to them, or exchanged after the shares."""
    orders = []
    honest = aggregation.hash_order

    def recording(request, adapter):
        other = ArrayRecord({name: Array(np.ones_like(array.numpy())) for name, array in adapter.items()})
        orders.append((request, other))
        return honest(request, adapter)

    def tell_others(kind, site, content):
        if site != "acme" and kind == "query.keys" and promised:
            content.config_records["secagg"]["order"] = honest(*orders[-1])
        if site != "acme" and kind == "train.masked":
            content["arrays"] = orders[-1][1]

    monkeypatch.setattr(aggregation, "hash_order", recording)
    lie(monkeypatch, tell_others)
    config = masked_run(tmp_path)
    with pytest.raises(QuorumNotMet):
        run_tiny(config, app_of_sites(three_sites(tmp_path)))
    refused = codes(tmp_path, "train.masked")
    assert refused["bolt"] == refused["crow"] == {"secagg-mismatch"}
    if promised:  # else the first site cannot know it, and has charged an upload that nobody can open alone
        assert refused["acme"] == {"secagg-mismatch"}
        assert charged(tmp_path) == []
    assert set(charged(tmp_path)) <= {"acme"}


def test_keys_that_the_server_exchanges_are_refused(tmp_path, monkeypatch):
    """Catches: a server that puts itself in the place of two sites, and opens what the third one sends."""

    def invent(kind, site, content):
        if site == "acme" and kind == "query.shares":
            fields = content.config_records["secagg"]
            own = fields["keys_names"].index("acme")
            fields["keys_values"] = [
                keys if place == own else start(bytes(16), "x").public_keys
                for place, keys in enumerate(fields["keys_values"])
            ]

    lie(monkeypatch, invent)
    with pytest.raises(QuorumNotMet):
        run_tiny(masked_run(tmp_path), app_of_sites(with_keys(three_sites(tmp_path))))
    assert codes(tmp_path, "query.shares") == {"acme": {"secagg-signature"}, "bolt": set(), "crow": set()}
    assert charged(tmp_path) == []


def test_a_site_that_the_server_invents_is_refused_by_those_who_know_each_other(tmp_path, monkeypatch):
    """Catches: pins that are compared with nothing; a name without a key beside it."""
    files = with_keys(three_sites(tmp_path))
    (tmp_path / "crow" / "node.key").unlink()
    (tmp_path / "crow" / "node.key.pub").unlink()
    new_key_pair(tmp_path / "crow" / "node.key")  # under the same name, the key of another
    with pytest.raises(QuorumNotMet):
        run_tiny(masked_run(tmp_path), app_of_sites(files))
    lines = read_lines(tmp_path / "runs" / "tiny" / "metrics.jsonl")
    seen = {line["rejected"]["acme"]["reason"] for line in lines if line.get("voided")}
    assert seen == {"policy-members:crow"}  # the operator sees whom
    assert codes(tmp_path, "query.shares") == {
        "acme": {"policy-members:crow"},
        "bolt": {"policy-members:crow"},
        "crow": set(),
    }
    assert charged(tmp_path) == []


@pytest.mark.parametrize("pinned", [True, False])
def test_sites_with_keys_get_the_sum_of_sites_without(tmp_path, pinned):
    """Catches: signatures that honest sites refuse, or that a server without pins stumbles over."""
    files = with_keys(three_sites(tmp_path), pinned=pinned)
    run_tiny(masked_run(tmp_path), app_of_sites(files))
    assert charged(tmp_path) == list(NAMES)


@pytest.mark.parametrize(("most", "expected"), [(1, []), (3, list(NAMES))])
def test_gateways_take_part_where_sites_agree_to_count_their_clients(tmp_path, most, expected):
    """Catches: gateways that can never form a sum; gateways that are believed although no site said so."""
    files = three_sites(tmp_path, demanding=())
    for file in files:
        write_rows(file.parent / "train.csv", 12, owner=lambda row: f"client-{row // 4}")
        changed = file.read_text().replace("[models]", 'client_column = "owner"\n[models]')
        file.write_text(f"{changed}\n[policy]\nclients_counted_per_site = {most}\n")
    gateways = {"simulation.clients": 9, "strategy.min_clients": 7, "privacy.enrolled_clients": 9}
    config = changed_config(masked_run(tmp_path), {**gateways, "privacy.max_clients_per_site": 3})
    if expected:
        run_tiny(config, app_of_sites(files))
    else:
        with pytest.raises(QuorumNotMet):
            run_tiny(config, app_of_sites(files))
        assert codes(tmp_path, "query.shares") == {name: {"policy-clients"} for name in NAMES}
    assert charged(tmp_path) == expected
