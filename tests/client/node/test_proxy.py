"""The proxy that the environment names: where it is looked for, for whom it is, and what it answers."""

import os

import pytest

from tests.support.connect_proxy import connect_proxy
from tsugiki.client.node.proxy import ConnectRefused, grpc_options, proxy_for
from tsugiki.common.errors import LinkError

HOST = "fed.example.org"
URL = "http://user:se%3Acret@proxy.corp:3128"


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    """Without the proxies of this machine."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", ["grpc_proxy", "https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY", "GRPC_PROXY"])
def test_each_variable_is_read(monkeypatch, name):
    """Catches: a company whose machines set capital letters, as curl and Python read them, and gRPC does not."""
    assert proxy_for(HOST) is None
    monkeypatch.setenv(name, URL)
    proxy = proxy_for(HOST)
    assert (proxy.variable, proxy.host, proxy.port) == (name, "proxy.corp", 3128)
    assert grpc_options(proxy) == (("grpc.http_proxy", URL),)


def test_the_order_is_that_of_grpc(monkeypatch):
    """Catches: a proxy for the web, taken in place of the one for gRPC."""
    for name in ("http_proxy", "HTTPS_PROXY", "https_proxy", "grpc_proxy"):
        monkeypatch.setenv(name, f"http://{name.swapcase().replace('_', '-')}:1")
        assert proxy_for(HOST).variable == name
    monkeypatch.setenv("grpc_proxy", "")
    assert proxy_for(HOST).variable == "https_proxy"


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_loopback_is_never_reached_through_a_proxy(monkeypatch, host):
    """Catches: a run on this machine, sent to the company's proxy in the clear."""
    monkeypatch.setenv("http_proxy", URL)
    assert grpc_options(proxy_for(host)) == (("grpc.enable_http_proxy", 0),)


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY", "no_grpc_proxy"])
@pytest.mark.parametrize(
    ("host", "entry", "direct"),
    [
        (HOST, HOST, True),
        (HOST, "localhost, .example.org", True),
        (HOST, "EXAMPLE.org", True),
        (HOST, "*.example.org", True),
        (HOST, "*", True),
        (HOST, "ample.org", False),
        (HOST, "example.com,fed.example", False),
        ("10.1.2.3", "10.0.0.0/8", True),
        ("10.1.2.3", "10.1.2.3", True),
        ("11.1.2.3", "10.0.0.0/8, fed/8", False),
        (HOST, "10.0.0.0/8", False),
    ],
)
def test_hosts_that_are_left_out(monkeypatch, name, host, entry, direct):
    """Catches: a server inside the company, asked of a proxy that leads outside; a suffix taken for a domain."""
    monkeypatch.setenv("https_proxy", URL)
    monkeypatch.setenv(name, entry)
    assert (proxy_for(host) is None) == direct


def test_a_proxy_without_scheme_or_port(monkeypatch):
    """Catches: a value that curl takes and gRPC passes over, so that the site tries without a proxy for ever."""
    monkeypatch.setenv("https_proxy", "proxy.corp:3128")
    assert grpc_options(proxy_for(HOST)) == (("grpc.http_proxy", "http://proxy.corp:3128"),)
    monkeypatch.setenv("https_proxy", "http://proxy.corp")
    assert proxy_for(HOST).port == 443


@pytest.mark.parametrize(
    "value", ["https://u:secret@proxy.corp:3128", "socks5://secret:1080", "http://", "http://secret:x"]
)
def test_what_is_no_http_proxy_is_an_error_of_ours(monkeypatch, value):
    """Catches: gRPC, which passes over such a proxy in silence; a password in the message."""
    monkeypatch.setenv("HTTPS_PROXY", value)
    with pytest.raises(LinkError) as caught:
        proxy_for(HOST)
    assert caught.value.code == "proxy-invalid"
    assert "HTTPS_PROXY" in caught.value.problem
    assert "no_proxy=fed.example.org" in caught.value.hint
    assert "secret" not in str(caught.value)


def test_the_password_is_sent_and_never_shown(monkeypatch):
    """Catches: a password in a log; user and password as they stand in the URL, with their escapes."""
    with connect_proxy(status=407) as asked:
        monkeypatch.setenv("https_proxy", f"http://us%40er:se%3Acret@127.0.0.1:{asked.port}")
        proxy = proxy_for(HOST)
        with pytest.raises(ConnectRefused, match="407 Proxy Authentication Required"):
            proxy.connect(HOST, 9092, 5.0)
    assert asked.targets == [f"{HOST}:9092"]
    assert asked.logins == ["us@er:se:cret"]
    assert str(proxy) == f"the proxy 127.0.0.1:{asked.port} (variable https_proxy)"
    assert "cret" not in repr(proxy)
