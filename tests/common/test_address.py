import pytest

from tsugiki.common.address import server_address, split_address
from tsugiki.common.errors import UsageError


@pytest.mark.parametrize(
    ("text", "parts"), [("0.0.0.0:9092", ("0.0.0.0", 9092)), ("[::1]:1", ("::1", 1)), ("a.b:65535", ("a.b", 65535))]
)
def test_addresses(text, parts):
    """Catches: an IPv6 address cut at the wrong colon."""
    assert split_address(text) == parts


@pytest.mark.parametrize(
    "text",
    ["", "9092", "host", "host:", "host:0", "host:65536", "host:x", "host:²", ":1", "https://host:1", "a b:1", "u@a:1"],
)
def test_what_is_no_address(text):
    """Catches: a traceback, a server on a port that nobody chose, or a scheme looked for in DNS."""
    with pytest.raises(UsageError, match="HOST:PORT"):
        split_address(text)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("fed.corp:9092", "fed.corp:9092"),
        ("https://fed.corp:9092", "fed.corp:9092"),
        ("HTTPS://fed.corp:9092/", "fed.corp:9092"),
        ("grpcs://[::1]:9092", "[::1]:9092"),
        ("https://fed.corp", "fed.corp:443"),
        ("https://[::1]", "[::1]:443"),
    ],
)
def test_a_url_is_an_address_too(text, address):
    """Catches: the link that an operator sent by mail, looked for in DNS as it stands."""
    assert server_address(text, tls=True) == address


@pytest.mark.parametrize(
    ("text", "tls", "why"),
    [
        ("http://fed.corp:9092", True, "http:// is a connection without encryption"),
        ("grpc://fed.corp:9092", True, "grpc:// is a connection without encryption"),
        ("https://127.0.0.1:9092", False, "--insecure is given, and https:// is a connection with TLS"),
        ("ftp://fed.corp:9092", True, "no address of a server"),
        ("https://fed.corp:9092/runs", True, "no address"),
        ("grpcs://fed.corp", True, "no address"),
    ],
)
def test_a_url_that_cannot_be(text, tls, why):
    """Catches: a scheme that is left out in silence, and with it what the user believes of the connection."""
    with pytest.raises(UsageError) as caught:
        server_address(text, tls=tls)
    assert why in str(caught.value)
    assert caught.value.expected


def test_a_plain_url_goes_with_a_plain_connection():
    """Catches: a trial on loopback refused for its scheme."""
    assert server_address("http://127.0.0.1:9092", tls=False) == "127.0.0.1:9092"
