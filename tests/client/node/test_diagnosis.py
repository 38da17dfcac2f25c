"""One line that names the cause, for each way in which a connection fails (fault 20)."""

import json
import os
import socket
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from tests.support.connect_proxy import connect_proxy
from tests.support.fleet import Fleet, listening
from tsugiki.client.node.diagnosis import PROBE_TIMEOUT_S, refused, why_not
from tsugiki.client.node.link import Link
from tsugiki.server.deploy.certs import make_certificates


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without the proxies of this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def link(port, authority=None, host="127.0.0.1"):
    """Return a link with or without TLS."""
    return Link(f"{host}:{port}", authority.ca.read_bytes() if authority else None, None, 0.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Certificates of a federation."""
    return make_certificates(tmp_path_factory.mktemp("tls"), [])


def test_a_plain_client_at_a_tls_server(files):
    """Catches: gRPC's "failed to connect to all addresses"."""
    with listening(Fleet(), files) as port:
        assert why_not(link(port)).code == "tls-required"


def test_a_tls_client_at_a_plain_server(files):
    """Catches: "wrong version number"."""
    with listening(Fleet()) as port:
        assert why_not(link(port, files)).code == "tls-missing"


def test_another_federations_ca(files, tmp_path):
    """Catches: "certificate verify failed"."""
    with listening(Fleet(), files) as port:
        assert why_not(link(port, make_certificates(tmp_path, []))).code == "tls-wrong-ca"


@pytest.mark.parametrize("days", [-400, 400])
def test_a_certificate_out_of_its_time(tmp_path, days):
    """Catches: an expired certificate reported as a wrong CA."""
    old = make_certificates(tmp_path, [], 90, datetime.now(UTC) + timedelta(days=days))
    with listening(Fleet(), old) as port:
        cause = why_not(link(port, old))
    assert cause.code == "tls-expired"
    assert ("has expired" if days < 0 else "not valid yet") in cause.problem


def test_a_name_that_is_not_in_the_certificate(files):
    """Catches: a wrong name reported as a wrong CA. 127.0.0.2 is loopback too, and in no certificate of ours."""
    with listening(Fleet(), files) as port:
        try:
            forward = socket.create_server(("127.0.0.2", 0))
        except OSError:
            pytest.skip("127.0.0.2 is no address of this machine")
        with forward:

            def pump():
                one, _ = forward.accept()
                with one, socket.create_connection(("127.0.0.1", port)) as other:
                    for source, target in ((one, other), (other, one)):
                        threading.Thread(target=copy, args=(source, target), daemon=True).start()
                    time.sleep(2)

            def copy(source, target):
                try:
                    while data := source.recv(65536):
                        target.sendall(data)
                except OSError:
                    return

            threading.Thread(target=pump, daemon=True).start()
            cause = why_not(link(forward.getsockname()[1], files, "127.0.0.2"))
    assert cause.code == "tls-wrong-name"
    assert "127.0.0.2" in cause.problem


def test_nobody_listens():
    """Catches: a cause that is not the real one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert why_not(link(port)).code == "server-unreachable"
    assert "refused" in why_not(link(port)).problem


def test_a_host_that_does_not_exist():
    """Catches: a typing error reported as a firewall's."""
    assert why_not(link(9092, host="no-such-host.invalid")).code == "server-unknown"


@pytest.fixture
def resolver(monkeypatch):
    """Sets what DNS answers."""

    def answers(errno):
        def getaddrinfo(*_args, **_options):
            raise socket.gaierror(errno, "of DNS")

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return answers


@pytest.mark.parametrize("errno", [socket.EAI_AGAIN, socket.EAI_FAIL])
def test_dns_that_is_away_is_a_failure_of_the_network(resolver, errno):
    """Catches: a client that ends for good because it started a moment before the machine's network."""
    resolver(errno)
    cause = why_not(link(9092, host="fed.example.org"))
    assert cause.code == "server-unreachable"
    assert "DNS does not answer for 'fed.example.org'" in cause.problem


def test_a_name_that_only_the_proxy_knows(resolver, monkeypatch):
    """Catches: a typing error reported in a company whose machines know no names outside, though its proxy does."""
    resolver(socket.EAI_NONAME)
    monkeypatch.setenv("https_proxy", "http://user:secret@proxy.corp:3128")
    cause = why_not(link(9092, host="fed.example.org"))
    assert cause.code == "server-unreachable"
    assert "the proxy proxy.corp:3128 (variable https_proxy) does not answer: DNS does not know its" in cause.problem
    assert "secret" not in str(cause)
    monkeypatch.setenv("no_proxy", "localhost, example.org")
    assert why_not(link(9092, host="fed.example.org")).code == "server-unknown"


@pytest.mark.parametrize(
    ("status", "code", "answer", "hint"),
    [
        (403, "proxy-refused", "403 Forbidden", "no_proxy"),
        (405, "proxy-refused", "405 Method Not Allowed", "no_proxy"),
        (407, "proxy-refused", "407 Proxy Authentication Required", "USER:PASSWORD@"),
        (503, "server-unreachable", "503 Service Unavailable", "firewall"),
    ],
)
def test_a_proxy_that_refuses_is_named(monkeypatch, status, code, answer, hint):
    """Catches: "timed out" for a proxy that has said why; its password in a log; a server that is away, given up."""
    with connect_proxy(status) as proxy:
        monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{proxy.port}")
        cause = why_not(link(9092, host="fed.example.org"))
    assert cause.code == code
    assert f"proxy 127.0.0.1:{proxy.port} (variable https_proxy) answers {answer}" in cause.problem
    assert hint in cause.hint
    assert "fed.example.org:9092" in cause.problem
    assert "secret" not in str(cause)
    assert proxy.targets == ["fed.example.org:9092"]


def test_something_else_in_the_place_of_the_proxy(monkeypatch):
    """Catches: a traceback of the HTTP library."""
    with socket.create_server(("127.0.0.1", 0)) as other:

        def answer():
            one, _ = other.accept()
            with one:
                one.recv(4096)
                one.sendall(b"SSH-2.0-OpenSSH\r\n")

        threading.Thread(target=answer, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{other.getsockname()[1]}")
        cause = why_not(link(9092, host="fed.example.org"))
    assert cause.code == "proxy-refused"
    assert "answers no HTTP" in cause.problem


def test_tls_inspection_is_suspected_behind_a_proxy_only(tmp_path, monkeypatch):
    """Catches: a company's own CA in the middle, reported as a mistake of the federation's operator."""
    shown = make_certificates(tmp_path / "shown", ["fed.example.org"])
    other = make_certificates(tmp_path / "other", ["fed.example.org"])
    with listening(Fleet(), shown) as port, connect_proxy(target=port) as proxy:
        assert "TLS inspection" not in why_not(link(port, other)).hint
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.port}")
        cause = why_not(link(9092, other, "fed.example.org"))
    assert cause.code == "tls-wrong-ca"
    assert f"127.0.0.1:{proxy.port}" in cause.hint
    assert "TLS inspection" in cause.hint


def test_a_name_that_dns_does_not_allow():
    """Catches: a traceback."""
    assert why_not(link(9092, host="a" * 70 + ".example.org")).code == "server-unknown"


def test_something_else_listens(files):
    """Catches: a probe that hangs on a server that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        started = time.monotonic()
        assert {why_not(link(port)).code, why_not(link(port, files)).code} == {"server-unreachable"}
        assert time.monotonic() - started < 2 * PROBE_TIMEOUT_S + 2


def test_a_ca_file_that_is_none(files, tmp_path):
    """Catches: the server's key or a text given as --ca, reported as a wrong CA."""
    with listening(Fleet(), files) as port:
        wrong = Link(f"127.0.0.1:{port}", b"hello", None, 0.0)
        assert why_not(wrong).code == "tls-ca-invalid"


@pytest.mark.parametrize(
    ("details", "code"),
    [
        (json.dumps({"code": 2001, "public_message": "x"}), "key-required"),
        (json.dumps({"code": 2004, "public_message": "x"}), "key-refused"),
        (json.dumps({"code": 1001, "public_message": "x"}), "version-mismatch"),
        ("Invalid timestamp", "clock-skew"),
        ("something else", "server-refused"),
        ("", "server-refused"),
    ],
)
def test_what_a_server_says(details, code):
    """Catches: Flower's numbers shown to people."""
    error = refused(link(1), details)
    assert error.code == code
    assert error.expected
