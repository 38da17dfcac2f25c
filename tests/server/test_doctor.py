from importlib.metadata import PackageNotFoundError

import pytest

from tsugiki.common.registry import Plugin
from tsugiki.common.strategies import STRATEGIES
from tsugiki.server import doctor
from tsugiki.server.doctor import examine


def found(name):
    """Return the finding of that name."""
    return next(finding for finding in examine() if finding.name == name)


def test_everything_needed_is_fine_here_and_comes_first():
    """Catches: a check that this very environment, in which all tests run, fails."""
    findings = examine()
    needed = [finding.needed for finding in findings]
    assert needed == sorted(needed, reverse=True)
    assert len([finding for finding in findings if finding.needed]) >= 8
    assert [finding for finding in findings if finding.needed and not finding.fine] == []


@pytest.mark.parametrize("name", ["flwr", "ray"])
def test_a_missing_library_is_found_out_with_what_to_do(monkeypatch, name):
    """Catches: a PackageNotFoundError from the very command that is to explain it."""
    version = doctor.version

    def missing(asked):
        if asked == name:
            raise PackageNotFoundError(asked)
        return version(asked)

    monkeypatch.setattr(doctor, "version", missing)
    finding = found(name)
    assert (finding.fine, finding.found, finding.needed) == (False, "not installed", name == "flwr")
    assert "pip install" in finding.do


def test_a_library_of_another_line_is_found_out(monkeypatch):
    """Catches: any version taken as fine: from 1.40 Flower's link is no gRPC."""
    monkeypatch.setattr(doctor, "version", lambda name: "1.40.0")
    assert not found("flwr").fine


def test_telemetry_is_found_out(monkeypatch):
    """Catches: a switch that is not looked at."""
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    assert found("telemetry").found == "on: FLWR_TELEMETRY_ENABLED"
    assert not found("telemetry").fine


def test_the_hub_is_named_offline_only_where_it_is(monkeypatch):
    """Catches: HF_HUB_OFFLINE=0 taken for offline."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert "used for models" in found("model hub").found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline" in found("model hub").found


def test_packages_that_add_something_are_listed_and_broken_ones_with_their_problem(monkeypatch):
    """Catches: a package that is left out, and nobody hears of it; one that makes the whole installation unfit."""
    plugins = (Plugin("acme 1.0", "capped = acme"), Plugin("broken 2.0", "other = broken", "ImportError: no"))
    monkeypatch.setattr(STRATEGIES, "_plugins", plugins)
    assert found("acme 1.0").fine
    broken = found("broken 2.0")
    assert (broken.fine, broken.needed, broken.found) == (False, False, "strategy other = broken: ImportError: no")
    assert "uninstall" in broken.do


@pytest.mark.parametrize(("there", "said"), [(True, "trains about"), (False, "computes in float32")])
def test_bfloat16_is_named_with_its_worth(monkeypatch, there, said):
    """Catches: a machine that has it and is not told; one that lacks it and is called unfit."""
    monkeypatch.setattr(doctor, "choose_device", lambda wanted: "cpu")
    monkeypatch.setattr(doctor, "has_bf16", lambda device: there)
    assert said in found("bfloat16").found
    assert found("bfloat16").fine
