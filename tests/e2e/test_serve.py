"""`tsugiki serve` and `tsugiki client` as real processes on loopback."""

import shutil
import signal

import pytest

from tests.support.exports import settings_of, to_fuse
from tests.support.serving import CANARY, make_identity, serve_and_join, started, summary, tiny_run
from tests.support.tiny import tiny_bert, tiny_llama, write_case
from tsugiki.client.app import simulated_app
from tsugiki.client.site.split import split
from tsugiki.common.audit import verify
from tsugiki.common.tasks import TASKS
from tsugiki.server.run.simulate import simulate

pytestmark = pytest.mark.e2e


def test_with_tls_and_keys_the_adapter_is_that_of_the_in_process_engine(tmp_path, model):
    """Catches: state that only one engine has; an order that follows arrival; private text or a secret in a log."""
    here = simulate(tiny_run(tmp_path, model, "here", 3), simulated_app)
    config = tiny_run(tmp_path, model, "there", 3)
    with started() as start:
        tls, keys = make_identity(start, tmp_path, ["site-0", "site-1", "site-2"])
        identity = tmp_path / "identity"
        server, clients = serve_and_join(
            start,
            tmp_path,
            config,
            ["--tls", tls, "--keys", keys, "--json"],
            ["--ca", str(tls / "ca.crt"), "--key", str(identity / "{name}.key")],
        )
        assert server.wait(150) == 0, server.text()[-3000:]
        for client in clients:
            client.process.send_signal(signal.SIGTERM)
            assert client.wait(20) == 0, client.text()[-2000:]
            assert "round 2: training: done" in client.text()
    there = summary(config)
    assert there["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there["after"] == here.summary["after"]
    events = verify(tmp_path / "runs" / "there" / "audit.jsonl")
    assert sorted(event["site"] for event in events if event["event"] == "hello") == ["site-0", "site-1", "site-2"]
    assert (tmp_path / "runs" / "there" / "adapter" / "adapter_model.safetensors").is_file()

    secrets = [CANARY.encode(), CANARY.lower().encode(), b"PRIVATE KEY"]
    written = [
        path
        for path in tmp_path.rglob("*")
        if path.suffix in (".log", ".jsonl", ".json", ".html") and path.name != "train.jsonl"
    ]
    assert len(written) > 8
    for path in written:
        assert not [secret for secret in secrets if secret in path.read_bytes()], path


def rlhf(folder):
    """Return the base of a run that is judged by an exported reward, and the sections of it."""
    case, base = TASKS.get("rlhf").test_case(), tiny_llama(folder / "base")
    prompts = {"data": str(write_case(folder, case.rows))}
    task = {"name": "rlhf", **settings_of(case, base)}
    return str(base), {"task": task, "simulation": prompts, "evaluation": prompts}


def fusion(folder):
    """Return the base of a run that fuses exported adapters, and the sections of it."""
    base = tiny_bert(folder / "base")
    return str(base), {"adapter": {"method": "fusion", "adapters": to_fuse(folder / "made", base)}}


@pytest.mark.parametrize("made", [rlhf, fusion])
def test_a_run_on_earlier_exports_is_that_of_the_in_process_engine(tmp_path, made):
    """Catches: exports that [models] of a site has elsewhere, not found; answers that are drawn by another seed."""
    base, sections = made(tmp_path)
    here = simulate(tiny_run(tmp_path, base, "here", **sections), simulated_app)
    config = tiny_run(tmp_path, base, "there", **sections)
    sites = split(config, tmp_path / "sites")
    for name in (*config.task.models, *config.adapter.models):
        shutil.copytree(name, f"{name}-elsewhere")
        for site in sites:
            site.write_text(site.read_text().replace(f'= "{name}"', f'= "{name}-elsewhere"'))
    assert "-elsewhere" in sites[0].read_text()
    with started() as start:
        server, _ = serve_and_join(start, tmp_path, config, ["--insecure"], ["--insecure"], sites)
        assert server.wait(150) == 0, server.text()[-3000:]
    there = summary(config)
    assert there["adapter_sha256"] == here.summary["adapter_sha256"]
    assert there["after"] == here.summary["after"]
