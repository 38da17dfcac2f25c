"""Runs that wait for a yes at the site: `[policy] ask` and `tsugiki site approve`."""

import pytest

from tests.support.command_line import invoke
from tests.support.federation import app_of_sites, run_tiny, site_folder, tiny_config
from tests.support.private import plan_of
from tsugiki.client.site.approvals import check_approved, read_asked
from tsugiki.common.config.parse import changed, parse
from tsugiki.common.errors import NotEnoughSites, PolicyError, UsageError

RUN = parse({"run": {"name": "june"}})


def refused(folder, config, plan=None):
    """Return whether a run is refused for want of a yes."""
    try:
        check_approved(folder, config, plan)
    except PolicyError:
        return True
    return False


def test_the_refusal_says_what_to_do(tmp_path):
    """Catches: a site whose people do not learn that they are asked."""
    with pytest.raises(PolicyError, match="`tsugiki site approve june`") as caught:
        check_approved(tmp_path, RUN, None)
    assert caught.value.code == "policy-ask"


def test_a_run_needs_a_yes_of_its_own(tmp_path):
    """Catches: one yes for all runs, or one that is forgotten; a quorum that needs another yes."""
    assert refused(tmp_path, RUN)
    assert refused(tmp_path, RUN)
    read_asked(tmp_path, "june").approve()
    assert not refused(tmp_path, RUN)
    assert not refused(tmp_path, changed(RUN, {"strategy.min_clients": 3, "train.threads": 1}))
    assert refused(tmp_path, changed(RUN, {"run.name": "july"}))


@pytest.mark.parametrize("key", ["run.rounds", "train.local_steps", "adapter.rank"])
def test_a_run_that_changes_needs_another_yes(tmp_path, key):
    """Catches: a short run that is approved, and goes on for ever, or trains something else."""
    assert refused(tmp_path, RUN)
    read_asked(tmp_path, "june").approve()
    other = changed(RUN, {key: 64})
    assert refused(tmp_path, other)
    assert not refused(tmp_path, RUN)  # a server that tries something else takes no yes back
    assert refused(tmp_path, other)
    read_asked(tmp_path, "june").approve()
    assert not refused(tmp_path, other)


def test_another_privacy_plan_needs_another_yes(tmp_path):
    """Catches: a yes to much noise that is taken for one to little."""
    plans = [plan_of("local", noise_multiplier=noise) for noise in (4.0, 0.1)]
    assert refused(tmp_path, RUN, plans[0])
    read_asked(tmp_path, "june").approve()
    assert not refused(tmp_path, RUN, plans[0])
    assert refused(tmp_path, RUN, plans[1])
    assert refused(tmp_path, RUN)


def test_a_yes_is_to_what_was_shown(tmp_path):
    """Catches: other settings that arrive between the question and the answer, and are approved unseen."""
    assert refused(tmp_path, RUN)
    shown = read_asked(tmp_path, "june")
    other = changed(RUN, {"run.rounds": 99})
    assert refused(tmp_path, other)
    shown.approve()
    assert not refused(tmp_path, RUN)
    assert refused(tmp_path, other)


@pytest.mark.parametrize("name", ["july", "../june", ""])
def test_only_a_run_that_was_asked_for_is_approved(tmp_path, name):
    """Catches: a name that leads to another file, and an empty answer for a mistyped one."""
    assert refused(tmp_path, RUN)
    with pytest.raises(UsageError, match="june"):
        read_asked(tmp_path, name)


def test_a_site_joins_after_its_yes(tmp_path):
    """Catches: a policy that nobody asks; an approval that shows something else than what leaves."""
    files = [site_folder(tmp_path / name, name) for name in ("alpha", "beta")]
    files[1].write_text(files[1].read_text() + "[policy]\nask = true\n")
    config = tiny_config(tmp_path, strategy={"connect_timeout_s": 0.5})
    with pytest.raises(NotEnoughSites):
        run_tiny(config, app_of_sites(files))
    shown = invoke("site", "approve", "tiny", "--site", files[1])
    assert shown.exit_code == 1  # nobody has said yes
    with pytest.raises(NotEnoughSites):
        run_tiny(config, app_of_sites(files))
    shown = invoke("site", "approve", "tiny", "--site", files[1], "--yes").stdout
    for words in ('name = "tiny"', "local_steps = 2", "hello:", "reply.site = 'beta'", "round 1:"):
        assert words in shown
    assert run_tiny(config, app_of_sites(files)).summary["rounds"] == 2
    assert not (tmp_path / "alpha" / "asked").exists()
