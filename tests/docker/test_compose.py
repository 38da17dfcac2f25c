"""The compose file and its scripts, as far as they can be looked at without an engine."""

import importlib.util
import re
import socket
from pathlib import Path

import pytest
import yaml

from tsugiki.server.demo.data import COMPANIES

FOLDER = Path(__file__).resolve().parents[2] / "docker"


@pytest.fixture(scope="module")
def services():
    """The services of compose.yaml."""
    found = yaml.safe_load((FOLDER / "compose.yaml").read_text("utf-8"))["services"]
    assert len(found) == 5
    return found


@pytest.fixture(scope="module")
def healthy():
    """docker/healthy.py, as a module."""
    spec = importlib.util.spec_from_file_location("healthy", FOLDER / "healthy.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.healthy


def test_every_container_is_shut_in(services):
    """Catches: a service that may write to its image, become more than it is, or take all memory."""
    for name, service in services.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["cpus"], name
        assert not {"environment", "env_file", "privileged", "ports"} & service.keys(), name


def test_no_site_sees_the_volume_of_another_nor_the_server_theirs(services):
    """Catches: a shared volume, through which a site's key or rows could be read."""
    seen = {name: [mount.split(":")[0] for mount in one["volumes"]] for name, one in services.items() if name != "init"}
    assert seen == {name: [name] for name in seen}
    assert set(seen) == {"server", *(name for name in COMPANIES if name != "retail")}


def test_the_gpu_overlay_names_the_sites(services):
    """Catches: an overlay for services that are not there."""
    overlay = yaml.safe_load((FOLDER / "compose.gpu.yaml").read_text("utf-8"))["services"]
    assert set(overlay) == set(services) - {"init", "server"}


def test_the_folders_of_volumes_belong_to_the_user_of_the_image(services):
    """Catches: a volume that init or a site cannot write, because its folder in the image is root's."""
    made = re.search(r"install -d .* -m 700 (.*)", (FOLDER / "Dockerfile").read_text("utf-8"))[1].split()
    mounted = {mount.split(":")[1] for service in services.values() for mount in service["volumes"]}
    assert mounted <= set(made)


def test_a_server_is_healthy_while_it_listens_and_a_client_while_it_is_connected(healthy):
    """Catches: a check that is always content, or that takes a port of the other side for its own."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert not healthy("server", port)
        server.listen()
        assert healthy("server", port)
        assert not healthy("client", port)
        with socket.create_connection(("127.0.0.1", port)):
            assert healthy("client", port)
    assert not healthy("server", port)
