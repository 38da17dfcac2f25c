"""A federation in companies: their proxies in the environment, and certificates of their own CA."""

import pytest

from tests.support.connect_proxy import connect_proxy
from tests.support.pki import company
from tests.support.processes import BIN
from tests.support.serving import Place, make_identity, serve_and_join, started, summary, tiny_run
from tsugiki.client.site.split import split
from tsugiki.server.deploy.superlink_process import free_port

pytestmark = pytest.mark.e2e

VARIABLES = ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


def with_environment(**variables):
    """Return how to start our program with these variables, without others about proxies or gRPC's log."""
    others = ("no_proxy", "NO_PROXY", "no_grpc_proxy", "GRPC_VERBOSITY")  # libraries of the tests set the last one
    unset = [part for name in others for part in ("-u", name)]
    return ("env", *unset, *(f"{name}={value}" for name, value in variables.items()), BIN / "tsugiki")


def raw_lines(log):
    """Return the lines of gRPC's C++ core in a log."""
    return [line for line in log.splitlines() if ".cc:" in line or "absl::" in line]


def test_a_run_on_this_machine_goes_to_no_proxy(tmp_path, model):
    """Catches: `serve` that ends in a traceback because of https_proxy, or posts the run to a proxy in the clear."""
    config = tiny_run(tmp_path, model, strategy={"connect_timeout_s": 300.0})
    with connect_proxy(403) as proxy, started() as start:
        url = f"http://user:secret@127.0.0.1:{proxy.port}"
        place = Place(with_environment(**dict.fromkeys(VARIABLES, url)))
        places = dict.fromkeys(["server", "site-0", "site-1"], place)
        insecure = ["--insecure", "--no-export"]
        server, _ = serve_and_join(start, tmp_path, config, insecure, insecure[:1], places=places)
        assert server.wait(150) == 0, server.text()
    assert summary(config)["rounds"] == 2
    assert proxy.targets == []
    assert proxy.others == []


def test_a_company_s_certificate_and_its_proxy(tmp_path, model):
    """Catches: a traceback for a certificate without 127.0.0.1, with an intermediate CA or a passphrase; raw lines."""
    config = tiny_run(tmp_path, model, sites=3, strategy={"connect_timeout_s": 300.0})
    sites = split(config, tmp_path / "sites")
    files = company("fed.corp").install(tmp_path / "tls", passphrase=b"secret")
    secret = tmp_path / "passphrase"
    secret.write_text("secret\n")
    secret.chmod(0o600)
    port = free_port()
    with connect_proxy(target=port) as proxy, started() as start:
        wrong, keys = make_identity(start, tmp_path, ["site-0", "site-1", "site-2"])
        through = with_environment(HTTPS_PROXY=f"http://127.0.0.1:{proxy.port}", SSL_CERT_FILE=files.ca)
        places = dict.fromkeys(["site-0", "site-1"], Place(through, "https://fed.corp"))
        extra = ["--tls", files.folder, "--keys", keys, "--tls-passphrase", secret, "--no-export"]
        of_site = ["--ca", "system", "--key", str(keys.parent / "{name}.key")]
        server, clients = serve_and_join(
            start, tmp_path, config, extra, of_site, sites[:2], f"127.0.0.1:{port}", places
        )
        clients[0].wait_for("connected to fed.corp:443 as site-0", 90)
        # the third site, first with another CA and then with the company's
        of_third = ["client", "--server", "https://fed.corp", "--site", sites[2], "--key", keys.parent / "site-2.key"]
        refused = start(tmp_path / "clients", "refused", *of_third, "--ca", wrong / "ca.crt", program=through)
        assert refused.wait(60) == 11
        clients.append(start(tmp_path / "clients", "third", *of_third, "--ca", files.ca, program=through))
        assert server.wait(150) == 0, server.text() + clients[0].text()
    assert "tls-wrong-ca" in refused.text()
    assert summary(config)["rounds"] == 2
    assert set(proxy.targets) == {"fed.corp:443"}
    assert [line for one in (server, refused, *clients) for line in raw_lines(one.text())] == []
