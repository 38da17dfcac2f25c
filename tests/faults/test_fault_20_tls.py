"""Fault 20: TLS that does not fit, and key files that cannot be used: one line that says which; others go on."""

import shutil
import subprocess
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.processes import end_group
from tests.support.serving import Process
from tsugiki.common.keys import new_key_pair
from tsugiki.server.deploy.certs import make_certificates
from tsugiki.server.deploy.control import Control
from tsugiki.server.deploy.keyring import register
from tsugiki.server.deploy.superlink_process import free_port, superlink

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A site's folder, with a registered key and a key that nobody knows."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "train.csv").write_text("text,label\na,0\nb,1\n")
    (folder / "site.toml").write_text('[site]\nname = "acme"\n[data]\ntrain = "train.csv"\n')
    register(folder / "keys", new_key_pair(folder / "acme"))
    new_key_pair(folder / "stranger")
    return folder


@pytest.fixture(scope="module")
def serving(place, tmp_path_factory):
    """Start SuperLinks with the keyring; gives a function from certificates and host to an address."""
    with ExitStack() as stack:

        def start(files, host="127.0.0.1", with_keys=True):
            address = f"{host}:{free_port()}"
            child = stack.enter_context(superlink(address, files, tmp_path_factory.mktemp("superlink")))
            if with_keys:
                control = Control(child.endpoint)
                control.synchronise(place / "keys")
                control.close()
            return address

        yield start


@pytest.fixture(scope="module")
def server(serving, tmp_path_factory):
    """A server as it should be; gives (address, certificates)."""
    files = make_certificates(tmp_path_factory.mktemp("tls"), [])
    return serving(files), files


def ends_with(place, code, *arguments):
    """Start a client that cannot connect; check that it ends in time, with one line that names the cause."""
    client = Process(place, f"client-{code}", "client", "--site", place / "site.toml", *arguments)
    try:
        status = client.wait(30)
    finally:
        end_group(client.process)
    lines = [line for line in client.text().splitlines() if line.startswith("tsugiki:")]
    assert status == 11, client.text()
    assert [line.split(": ")[1] for line in lines] == [code]
    assert "Traceback" not in client.text()


def test_a_plain_client(place, server):
    """Catches: gRPC's own words, repeated for ten minutes."""
    ends_with(place, "tls-required", "--server", server[0], "--insecure")


def test_another_ca(place, server, tmp_path):
    """Catches: a client that connects to whoever answers."""
    other = make_certificates(tmp_path, [])
    ends_with(place, "tls-wrong-ca", "--server", server[0], "--ca", other.ca, "--key", place / "acme")


def test_an_expired_certificate(place, serving, tmp_path):
    """Catches: an expired certificate that looks like a wrong CA."""
    old = make_certificates(tmp_path, [], 30, datetime.now(UTC) - timedelta(days=60))
    address = serving(old, with_keys=False)  # our own control does not connect to such a server either
    ends_with(place, "tls-expired", "--server", address, "--ca", old.ca, "--key", place / "acme")


def test_a_certificate_without_the_name(place, serving, tmp_path):
    """Catches: a wrong name that looks like a wrong CA."""
    files = make_certificates(tmp_path, [])
    address = serving(files, "127.0.0.2")
    ends_with(place, "tls-wrong-name", "--server", address, "--ca", files.ca, "--key", place / "acme")


def test_a_plain_server(place, serving, server):
    """Catches: an operator who forgot the certificates, and clients that say nothing of it."""
    address = serving(None, with_keys=False)
    ends_with(place, "tls-missing", "--server", address, "--ca", server[1].ca, "--key", place / "acme")


def test_no_key_and_a_strangers_key(place, server):
    """Catches: a server that takes everybody; a client that tries again and again."""
    address, files = server
    ends_with(place, "key-required", "--server", address, "--ca", files.ca)
    ends_with(place, "key-refused", "--server", address, "--ca", files.ca, "--key", place / "stranger")


def test_key_files_that_cannot_be_used(place, server):
    """Catches: a key that everybody on the machine can read; a password asked of a service."""
    address, files = server
    shutil.copy(place / "acme", place / "open")
    (place / "open").chmod(0o644)
    ends_with(place, "key-permissions", "--server", address, "--ca", files.ca, "--key", place / "open")
    if shutil.which("ssh-keygen") is None:
        pytest.skip("ssh-keygen is not installed: no encrypted key to try")
    command = ["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "secret", "-f", place / "locked"]
    subprocess.run(command, check=True)
    ends_with(place, "key-invalid", "--server", address, "--ca", files.ca, "--key", place / "locked")


def test_the_server_goes_on_for_the_others(place, server):
    """Catches: a server that a bad client takes down. Runs last: all the above have knocked."""
    address, files = server
    arguments = [
        "client",
        "--site",
        place / "site.toml",
        "--server",
        address,
        "--ca",
        files.ca,
        "--key",
        place / "acme",
    ]
    client = Process(place, "good", *arguments)
    try:
        client.wait_for(f"connected to {address} as acme", 30)
    finally:
        end_group(client.process)
