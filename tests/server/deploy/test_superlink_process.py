"""The SuperLink as our child."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.processes import ROOT, group_alive
from tsugiki.common.errors import DeployError, StorageError, UsageError
from tsugiki.server.deploy.superlink_process import free_port, superlink

START = """
import sys, time
from pathlib import Path
from tsugiki.server.deploy.superlink_process import superlink
with superlink(sys.argv[1], None, Path(sys.argv[2])) as child:
    print(child.process.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "fed.example.org"])
def test_without_tls_it_listens_on_loopback_only(tmp_path, host):
    """Catches: updates that cross a network in the clear because of one option."""
    with pytest.raises(UsageError, match="certs"), superlink(f"{host}:9092", None, tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_port_in_use_is_named(tmp_path):
    """Catches: Flower's own message, in a log that nobody sees."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(UsageError, match=address), superlink(address, None, tmp_path):
            pass


def test_it_listens_and_leaves_nothing_behind(tmp_path):
    """Catches: a child that outlives the block, a port that stays taken, a secret that stays on the disk."""
    port = free_port()
    with superlink(f"127.0.0.1:{port}", None, tmp_path) as child:
        socket.create_connection(("127.0.0.1", port), 2).close()
        assert (tmp_path / "secret").stat().st_mode & 0o777 == 0o600
        child.check()
        arguments = Path(f"/proc/{child.process.pid}/cmdline").read_bytes()
        assert child.endpoint.secret not in arguments
    assert not group_alive(child.process.pid)
    assert not (tmp_path / "secret").exists()
    with pytest.raises(DeployError) as caught:
        child.check()
    assert caught.value.code == "superlink-gone"


@pytest.mark.parametrize("name", ["superlink.log", "state.db"])
def test_its_folder_has_no_links(tmp_path, name):
    """Catches: the SuperLink's log, or a file that Flower keeps there, written through a link that somebody planted."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    folder = tmp_path / "state"
    folder.mkdir()
    (folder / name).symlink_to(victim)
    with pytest.raises(StorageError) as caught, superlink(f"127.0.0.1:{free_port()}", None, folder):
        pass
    assert caught.value.code == "linked"
    assert victim.read_text() == "precious"


def test_it_ends_with_its_parent_whatever_ends_that(tmp_path):
    """Catches: a SuperLink that runs on, and keeps the port, after its server was killed."""
    command = [sys.executable, "-c", START, f"127.0.0.1:{free_port()}", tmp_path]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True)
    child = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait(10)
    parent.stdout.close()
    ends = time.monotonic() + 15
    while group_alive(child) and time.monotonic() < ends:
        time.sleep(0.1)
    assert not group_alive(child)
