import pytest

from tsugiki.common.address import split_address
from tsugiki.common.errors import UsageError


@pytest.mark.parametrize(
    ("text", "parts"), [("0.0.0.0:9092", ("0.0.0.0", 9092)), ("[::1]:1", ("::1", 1)), ("a.b:65535", ("a.b", 65535))]
)
def test_addresses(text, parts):
    """Catches: an IPv6 address cut at the wrong colon."""
    assert split_address(text) == parts


@pytest.mark.parametrize("text", ["", "9092", "host", "host:", "host:0", "host:65536", "host:x", ":1"])
def test_what_is_no_address(text):
    """Catches: a traceback, or a server on a port that nobody chose."""
    with pytest.raises(UsageError, match="HOST:PORT"):
        split_address(text)
