"""What is printed of the adapter methods on a base, and of this machine."""

import json

import pytest
from rich import filesize

from tests.support.command_line import invoke, printed
from tests.support.tiny import tiny_bert
from tsugiki.common.config.parse import parse
from tsugiki.common.errors import UsageError
from tsugiki.server import doctor
from tsugiki.server.methods import compatibility


@pytest.fixture
def bert(tmp_path):
    """The folder of a tiny BERT. Read only."""
    return tiny_bert(tmp_path / "bert")


def test_methods_prints_a_table_or_json(bert, tmp_path):
    """Catches: a cell without its bytes; JSON that no script can read; settings that nothing takes."""
    text = printed("methods", "--model", bert)
    assert "houlsby" in text
    assert "(1)" in text
    found = compatibility(parse({"model": {"name": str(bert)}}))
    frozen = filesize.decimal(found.base_bytes)
    trained = filesize.decimal(found.trained_bytes)
    assert f"Memory at a site: {frozen} of frozen weights, at most {trained} for what is trained" in text
    body = json.loads(printed("methods", "--model", bert, "--json"))
    assert body["pairs"]["sequence-classification"]["lora"]["adapter"] > 0
    with pytest.raises(UsageError):
        invoke("methods", "--model", bert, "--set", "adapter.rank=2")
    file = tmp_path / "run.toml"
    file.write_text(f'[model]\nname = "{bert}"\n[adapter]\nmethod = "lora"\nrank = 1\n')
    words = ["methods", file, "--json", "--set"]
    small, large = (json.loads(printed(*words, f"adapter.rank={rank}")) for rank in (1, 4))
    pair = [menu_["pairs"]["sequence-classification"]["lora"]["adapter"] for menu_ in (small, large)]
    assert pair[1] == 4 * pair[0]


def test_doctor_tells_and_fails_where_something_is_missing(monkeypatch):
    """Catches: exit status 0 of a machine that cannot run anything, and advice that is not shown."""
    assert invoke("doctor").exit_code == 0
    bad = doctor.Finding("flwr", "not installed", False, True, "pip install flwr")
    monkeypatch.setattr(doctor, "examine", lambda: [bad])
    result = invoke("doctor")
    assert (result.exit_code, result.stdout) == (1, "FAIL flwr: not installed  -> pip install flwr\n")
    assert json.loads(invoke("doctor", "--json").stdout)[0]["do"] == "pip install flwr"
