"""A site's commands: its file, what `site check` and a dry run print, and wrong calls of `client`."""

import re
import tomllib
from pathlib import Path

import pytest

from tests.support.command_line import printed
from tests.support.federation import leaks, model_folder, site_folder, tiny_config, write_rows
from tests.support.tiny import tiny_llama
from tsugiki.client.site.policy import SitePolicy
from tsugiki.client.site.site import SECTIONS, read_site
from tsugiki.common.config.files import to_toml
from tsugiki.common.errors import ConfigError, DataError, ModelError, UsageError


def test_init_writes_a_file_that_is_right(tmp_path):
    """Catches: a template that the program itself refuses, and options that are not filled in."""
    file = tmp_path / "site.toml"
    assert printed("site", "init", file, "--name", "acme", "--train", "data/contracts.csv") == f"{file}\n"
    site = read_site(file)
    assert (site.name, site.data.train, site.data.evaluation) == ("acme", "data/contracts.csv", "")
    assert "sentence-transformers/all-MiniLM-L6-v2" in site.models


def test_the_file_has_every_setting_of_a_site(tmp_path):
    """Catches: a setting left out, as policy.delta once was; one without a sentence, or with another default."""
    file = tmp_path / "site.toml"
    printed("site", "init", file)
    lines = file.read_text().splitlines()
    assert max(map(len, lines)) <= 100
    file.write_text("\n".join(line.removeprefix("#") if re.match("#[a-z]", line) else line for line in lines))
    written = tomllib.loads(file.read_text())
    assert [*SECTIONS, "models"] == list(written)
    for name, section in SECTIONS.items():
        assert set(written[name]) == set(section.model_fields)
        texts = [field.description for field in section.model_fields.values()]
        assert [text for text in texts if text[0].islower() or not text.endswith(".")] == []
    assert "delta" in written["policy"]
    site = read_site(file)
    assert (site.data.min_rows, site.data.header, site.data.quoting) == (2, True, "standard")
    assert (site.data.evaluation, site.data.columns) == ("held-out.csv", {"text": "sentence"})
    assert (site.server.ca, site.server.key) == ("ca.crt", "my-site.key")
    assert site.server.address.endswith(":9092")
    assert (site.policy, site.site.audit) == (SitePolicy(), "audit.jsonl")


def test_init_does_not_write_over_a_file(tmp_path):
    """Catches: an edited site.toml lost."""
    file = tmp_path / "site.toml"
    file.write_text("mine")
    with pytest.raises(UsageError):
        printed("site", "init", file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    "options",
    [("--name", "Acme Corp"), ("--name", "../x"), ("--name", "a\nb"), ("--train", 'a"b'), ("--train", "a\nb")],
)
def test_init_refuses_what_the_file_could_not_hold(tmp_path, options):
    """Catches: a file that is no TOML, or holds more than was meant."""
    with pytest.raises(UsageError):
        printed("site", "init", tmp_path / "site.toml", *options)
    assert list(tmp_path.iterdir()) == []


def test_init_in_a_folder_that_is_not_there_is_an_error_of_ours(tmp_path):
    """Catches: a traceback."""
    with pytest.raises(UsageError, match="Cannot write"):
        printed("site", "init", tmp_path / "missing" / "site.toml")


def test_check_without_a_run_looks_at_the_file_alone(tmp_path):
    """Catches: a model loaded or a shard needed where only the file is to be checked."""
    file = site_folder(tmp_path / "acme", "acme")
    assert printed("site", "check", file).splitlines() == [
        f"{file}: site acme, 1 models",
        "train.csv: there; --run FILE tries it against a run",
    ]
    (tmp_path / "acme" / "train.csv").unlink()
    assert "train.csv: MISSING" in printed("site", "check", file)


def test_check_against_a_run_says_what_would_leave_the_site(tmp_path):
    """Catches: a check that stops before the model, prints rows, or counts other bytes than are sent."""
    file = site_folder(tmp_path / "acme", "acme")
    write_rows(tmp_path / "acme" / "held.csv", 6)
    file.write_text(file.read_text().replace("[models]", 'evaluation = "held.csv"\n[models]'))
    run = tmp_path / "run.toml"
    run.write_text(to_toml(tiny_config(tmp_path)))
    shown = printed("site", "check", file, "--run", run, "--set", "adapter.wire_dtype=float16")
    lines = shown.splitlines()
    assert lines[1:3] == ["train.csv: 8 rows for sequence-classification", "held.csv: 6 rows"]
    assert f"{model_folder()}: {model_folder()}, fingerprint" in lines[3]
    assert "hello: its name, its number of rows" in lines[4]
    sent = next(line for line in lines[5:] if " bytes, and" in line)
    sizes = [int(word.replace(",", "")) for word in sent.split() if word.replace(",", "").isdigit()]
    adapter, head, size_bytes = sizes
    assert size_bytes == 2 * (adapter + head)
    assert "metrics on the evaluation rows" in lines[lines.index(sent) + 1]
    assert leaks(tmp_path / "nowhere", shown) == []


def test_check_counts_what_is_sent_and_tells_of_a_smaller_rank(tmp_path):
    """Catches: a pair that only comes down counted as going up; a rank that a run would be refused for, passed."""
    file, run = site_folder(tmp_path / "acme", "acme"), tmp_path / "run.toml"
    run.write_text(to_toml(tiny_config(tmp_path)))
    bytes_ = []
    for name in ("fedavg", "flora", "rolora"):
        shown = printed("site", "check", file, "--run", run, "--set", f"strategy.name={name}")
        bytes_.append(int(shown.partition(" bytes, and")[0].rpartition(" ")[2].replace(",", "")))
    assert bytes_[0] == bytes_[1] > bytes_[2]
    file.write_text(file.read_text().replace("[data]", "max_rank = 1\n[data]"))
    assert "trains 1 of the 2 components" in printed("site", "check", file, "--run", run, "--set", "strategy.name=svd")


def test_check_says_what_the_hello_notes(tmp_path, monkeypatch):
    """Catches: a count that leaves the site although the check does not tell."""
    base = tiny_llama(tmp_path / "base")
    (tmp_path / "titles.txt").write_text("good clause\nthe bad clause number nine of a party\n")
    file, run = tmp_path / "site.toml", tmp_path / "run.toml"
    file.write_text(f'[site]\nname = "acme"\n[data]\ntrain = "titles.txt"\n[models]\nbase = "{base}"\n')
    run.write_text(to_toml(tiny_config(tmp_path, model={"name": "base"}, task={"name": "causal-lm", "max_length": 8})))
    shown = printed("site", "check", file, "--run", run)
    assert "its number of rows, fingerprints" in shown
    assert "would not leave it: the notes on its rows (shard-texts-cut:1)\n" in shown
    file.write_text(file.read_text() + '[policy]\ntell = ["rows", "notes"]\n')
    shown = printed("site", "check", file, "--run", run)
    assert "titles.txt: 2 rows for causal-lm\n" in shown
    assert "its number of rows (shard-texts-cut:1), " in shown
    monkeypatch.setattr("tsugiki.common.model.device.has_bf16", lambda device: False)
    shown = printed("site", "check", file, "--run", run, "--set", "train.precision=bf16")
    assert "rows (no-bf16, shard-texts-cut:1), " in shown
    assert "the precision float32\n" in shown


def test_a_folder_in_the_run_is_asked_for_as_a_server_here_asks(tmp_path, monkeypatch):
    """Catches: a check, or a dry run, that refuses a site of `site split`, and tells it to allow what nobody asks."""
    monkeypatch.chdir(tmp_path)
    tiny_llama(tmp_path / "base")
    write_rows(tmp_path / "rows.csv", 12)
    settings = {
        "model": {"name": "base"},
        "train": {"local_steps": 1},
        "simulation": {"data": "rows.csv", "clients": 2},
    }
    (tmp_path / "run.toml").write_text(to_toml(tiny_config(tmp_path, **settings)))
    printed("site", "split", "run.toml", "sites")
    file = tmp_path / "sites" / "site-0" / "site.toml"
    assert f"{tmp_path / 'base'}, fingerprint" in printed("site", "check", file, "--run", "run.toml")
    assert "reply.steps = 1" in printed("client", "--site", file, "--dry-run", "run.toml")
    file.write_text(file.read_text().replace(f'"{tmp_path / "base"}" =', "base ="))  # a hub id may be a folder here
    assert "base: " in printed("site", "check", file, "--run", "run.toml")


def test_check_fails_with_the_step_that_fails(tmp_path):
    """Catches: a check that ends well although training would not."""
    run = tmp_path / "run.toml"
    run.write_text(to_toml(tiny_config(tmp_path)))
    with pytest.raises(ConfigError):
        printed("site", "check", tmp_path / "missing.toml")
    file = site_folder(tmp_path / "acme", "acme")
    text = file.read_text()
    (tmp_path / "acme" / "train.csv").write_text("text,label\n")
    with pytest.raises(DataError) as caught:
        printed("site", "check", file, "--run", run)
    assert caught.value.code == "shard-empty"
    write_rows(tmp_path / "acme" / "train.csv", 8)
    file.write_text(text.replace(f'"{model_folder()}" =', '"another" ='))
    with pytest.raises(ModelError) as caught:
        printed("site", "check", file, "--run", run)
    assert caught.value.code == "model-unknown"


def test_a_dry_run_prints_names_and_values_and_no_rows(tmp_path):
    """Catches: an array printed in full; a field that is left out."""
    from tests.support.federation import CANARIES, site_folder, tiny_config
    from tsugiki.common.config.files import to_toml

    config = tiny_config(tmp_path)
    (tmp_path / "run.toml").write_text(to_toml(config))
    site = site_folder(tmp_path / "acme", "acme")
    shown = printed("client", "--site", site, "--dry-run", tmp_path / "run.toml", "--set", "train.local_steps=1")
    for line in ("reply.site = 'acme'", "reply.rows = 8", "reply.steps = 1", "arrays.adapter = float32"):
        assert line in shown
    assert len(shown.splitlines()) < 30
    assert not [canary for canary in CANARIES if canary in shown]


def test_a_client_without_a_server_or_a_ca_is_told(tmp_path):
    """Catches: a client that connects in the clear because nothing was said; to another machine even when it was."""
    site = tmp_path / "site.toml"
    printed("site", "init", site, "--name", "acme")
    (tmp_path / "train.csv").write_text("text,label\na,0\nb,1\n")
    for options, words in (
        ((), "--server"),
        (("--server", "127.0.0.1:1"), "CA certificate"),
        (("--server", "192.0.2.1:1", "--insecure"), "loopback"),
        (("--server", "127.0.0.1:1", "--ca", tmp_path / "missing"), "Cannot read"),
        (("--server", "http://127.0.0.1:1"), "https://127.0.0.1:1"),
        (("--server", "https://127.0.0.1:1", "--insecure"), "--insecure is given"),
    ):
        with pytest.raises(UsageError, match=words):
            printed("client", "--site", site, *options)
    assert Path(site).is_file()
