"""A site on Windows: without what only Unix has, simulated in a process that hides it."""

import subprocess
import sys

import pytest

from tests.support.federation import site_folder, tiny_config
from tests.support.processes import ROOT, quiet_environment
from tsugiki.common.config.files import to_toml

HIDE = """
import builtins, os, signal
MODULES = ("fcntl", "grp", "pwd", "resource", "termios", "tty")
import_any = builtins.__import__
def import_as_there(name, globals=None, *others, **named):
    # libraries look at the platform, which is Linux here, and then need these modules
    if name in MODULES and str((globals or {}).get("__name__")).startswith("tsugiki"):
        raise ImportError(name)
    return import_any(name, globals, *others, **named)
builtins.__import__ = import_as_there
OF_SIGNAL = ("SIGALRM", "SIGHUP", "SIGCHLD", "setitimer", "ITIMER_REAL", "alarm", "pthread_kill")
OF_OS = ("fork", "forkpty", "killpg", "getpgid", "setsid", "getuid", "geteuid", "getgid", "fchmod", "chown",
         "O_NOFOLLOW", "O_DIRECTORY")
for module, names in ((signal, OF_SIGNAL), (os, OF_OS)):
    for name in names:
        delattr(module, name)
open_file = os.open
def open_no_folder(path, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "as Windows answers")
    return open_file(path, *args, **options)
os.open = open_no_folder
"""
"""What Windows' Python lacks, and a folder that cannot be opened. It is hidden before anything of ours is imported."""


def without_unix(folder, code):
    """Run code in a process without Unix; return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", HIDE + code],
        cwd=ROOT,
        env=quiet_environment(folder / "flwr-home"),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def site(tmp_path):
    """The path of a site.toml; run.toml is beside its folder."""
    (tmp_path / "run.toml").write_text(to_toml(tiny_config(tmp_path, strategy={"min_clients": 1})))
    return site_folder(tmp_path / "acme", "acme")


def test_what_is_hidden_is_hidden(tmp_path):
    """Catches: a simulation of Windows that proves nothing."""
    code = """
for name in ("fcntl", "resource"):
    try:
        exec(f"import {name}", {"__name__": "tsugiki.client.x"})
    except ImportError:
        print(name)
print(hasattr(signal, "SIGALRM"), hasattr(os, "killpg"), hasattr(os, "fork"))
"""
    assert without_unix(tmp_path, code).split() == ["fcntl", "resource", "False", "False", "False"]


def test_all_modules_of_a_site_can_be_imported(tmp_path):
    """Catches: a module for Unix imported at the top of a file that a site needs."""
    code = """
from importlib import import_module
from pathlib import Path
names = [".".join(("tsugiki", *path.with_suffix("").parts)) for side in ("client", "common")
         for path in sorted(Path(side).rglob("*.py"))]
for name in names:
    import_module(name.removesuffix(".__init__"))
print(len(names))
"""
    assert int(without_unix(tmp_path, code)) > 80


def test_a_site_s_commands_work(site):
    """Catches: a key that nobody can use, because Windows has no mode 0600; a file that cannot be written."""
    folder = site.parent.parent
    code = f"""
from tests.support.command_line import printed
print("--retry" in printed("client", "--help"))
print(printed("keys", "new", r"{folder / "acme.key"}").count("SHA256:"))
os.chmod(r"{folder / "acme.key"}", 0o666)  # as Windows shows every file
print(printed("keys", "fingerprint", r"{folder / "acme.key"}").startswith("acme SHA256:"))
print(printed("site", "init", r"{folder / "new.toml"}", "--name", "bolt").strip().endswith("new.toml"))
print("would leave" in printed("site", "check", r"{site}", "--run", r"{folder / "run.toml"}"))
print("reply.steps = 2" in printed("client", "--site", r"{site}", "--dry-run", r"{folder / "run.toml"}"))
"""
    assert without_unix(folder, code).split() == ["True", "1", "True", "True", "True", "True"]


def test_a_site_trains_and_keeps_its_records(site):
    """Catches: an audit log or a lock that needs Unix; training that does."""
    code = f"""
from pathlib import Path
from tests.support.federation import app_of_sites
from tsugiki.common.config.files import read
from tsugiki.server.run.simulate import simulate
outcome = simulate(read(Path(r"{site.parent.parent / "run.toml"}"), []), app_of_sites([Path(r"{site}")]))
print(outcome.summary["rounds"])
"""
    assert without_unix(site.parent.parent, code).split()[-1] == "2"
    lines = (site.parent / "audit.jsonl").read_text().splitlines()
    assert sum('"event": "train' in line for line in lines) >= 2, lines


def test_a_node_is_stopped(tmp_path):
    """Catches: a grace period that needs SIGALRM."""
    code = """
import time
from tsugiki.client.node import node
from tsugiki.common.errors import Interrupted
node.GRACE_S = 0.1
ending = node.Ending()
with ending.handling_signals(), ending.interruptible():
    signal.raise_signal(signal.SIGTERM)
    try:
        while True:
            time.sleep(0.001)
    except Interrupted as error:
        print(error.code)
"""
    assert without_unix(tmp_path, code).split() == ["site-stopping"]
