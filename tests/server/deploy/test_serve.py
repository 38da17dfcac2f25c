"""What `serve` refuses before anything starts; tests/e2e/test_serve.py runs it."""

import pytest

from tests.support.federation import tiny_config
from tsugiki.common.errors import UsageError
from tsugiki.server.deploy.certs import CertificateFiles, make_certificates
from tsugiki.server.deploy.serve import Deployment, serve, shown_to_nodes
from tsugiki.server.engines.grid import Stop
from tsugiki.server.run.progress import Progress


def refused(tmp_path, files):
    """Return the message with which a deployment is refused."""
    deployment = Deployment("127.0.0.1:9", files, tmp_path / "keys", "", lambda text: None, lambda key: b"")
    with pytest.raises(UsageError) as caught:
        serve(tiny_config(tmp_path), deployment, resume=False, previous=False, progress=Progress(), stop=Stop())
    assert not (tmp_path / "runs").exists()
    return str(caught.value)


@pytest.mark.parametrize("name", ["server.crt", "server.key"])
def test_no_certificate_no_server(tmp_path, name):
    """Catches: a server that falls back to plain text; Flower's own exit in a log."""
    files = make_certificates(tmp_path / "tls", [])
    (tmp_path / "tls" / name).unlink()
    message = refused(tmp_path, files)
    assert name in message
    assert "tsugiki certs" in message


def test_a_new_operator_is_told_what_to_do(tmp_path):
    """Catches: an error that leaves out --insecure, with which things can be tried."""
    assert "--insecure" in refused(tmp_path, CertificateFiles(tmp_path / "tls"))


def test_the_superlink_is_given_no_path(tmp_path):
    """Catches: the operator's evaluation data and output folder, which the SuperLink shows to every site that asks."""
    config = tiny_config(tmp_path)
    assert config.evaluation.data.startswith(str(tmp_path))
    assert shown_to_nodes(config) == {"run.name": config.run.name}
