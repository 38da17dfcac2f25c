"""The ledger: written before anything leaves, added up over runs and processes, and never quietly wrong."""

import errno
import json
import math
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.support.private import unchanged
from tsugiki.common.audit import AuditLog, verify
from tsugiki.common.errors import BudgetError, StorageError
from tsugiki.common.privacy.accounting import ACCOUNT, Release, epsilon
from tsugiki.common.privacy.ledger import Ledger
from tsugiki.common.privacy.mechanisms import ADVERSARIES

NOISY = Release("gaussian", 4.0)
SHARE = Release("skellam", 0.5, dimension=40)
DELTA = 1e-5
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def path(tmp_path):
    """Where a ledger is, or will be."""
    return tmp_path / "privacy-ledger.jsonl"


def after(count, release=NOISY):
    """Return the epsilon of so many releases."""
    return epsilon({release: count}, DELTA)


def test_a_charge_is_a_line_with_all_that_is_needed_to_account_for_it(path):
    """Catches: an epsilon alone, which cannot be composed later; a charge without its round."""
    ledger = Ledger(path, DELTA, {})
    assert ledger.charge("uploads", SHARE, 3, run="one", round=2, attempt=1) == after(3, SHARE)
    (line,) = verify(path)
    assert (line["event"], line["adversary"], line["count"]) == ("charged", "uploads", 3)
    assert Release(**line["release"]) == SHARE
    assert (line["run"], line["round"], line["attempt"], line["delta"]) == ("one", 2, 1, DELTA)
    assert line["epsilon"] == after(3, SHARE)


def test_seeded_rounds_have_shown_everything(path):
    """Catches: noise that anybody can draw, counted as noise by the next run on the same clients, whatever its name."""
    seeded = Ledger(path, DELTA, {}, seeded=True)
    seeded.charge("uploads", NOISY, run="trial", round=1, private=False)
    assert seeded.epsilons() == {"uploads": after(1)}  # the run itself is marked as not private everywhere
    later = Ledger(path, DELTA, {"uploads": 1e4})
    assert later.epsilons() == {"uploads": math.inf}
    with pytest.raises(BudgetError):
        later.charge("uploads", NOISY, run="trial", round=1)


def test_an_empty_ledger_has_spent_nothing(path):
    """Catches: a first round that needs a file; a file made by looking."""
    ledger = Ledger(path, DELTA, {"release": 1.0})
    assert ledger.epsilons() == {}
    assert ledger.spent() == {who: Counter() for who in ADVERSARIES}
    assert not path.exists()


def test_a_later_run_goes_on_where_the_last_one_ended(path):
    """Catches: a ledger in memory, or one of each run: the budget would start at zero with every run."""
    first = [Ledger(path, DELTA, {}).charge("release", NOISY, run="one") for _ in range(3)]
    second = Ledger(path, DELTA, {})
    assert first == [after(1), after(2), after(3)]
    assert second.epsilons() == {"release": after(3)}
    assert second.charge("release", NOISY, run="two") == after(4)
    assert second.charge("release", Release("gaussian", 2.0), run="three") == epsilon(
        [NOISY] * 4 + [Release("gaussian", 2.0)], DELTA
    )


def test_each_adversary_has_an_account_of_its_own(path):
    """Catches: charges added up over adversaries, who each see all of the whole."""
    ledger = Ledger(path, DELTA, {})
    ledger.charge("release", NOISY)
    ledger.charge("uploads", SHARE)
    ledger.charge("release", NOISY)
    assert ledger.epsilons() == {"release": after(2), "uploads": after(1, SHARE)}


def test_outsiders_see_what_sites_see_except_in_shares_of_noise(path):
    """Catches: an outsider's epsilon that forgets the runs of other modes, or that is shown where it is the same."""
    ledger = Ledger(path, DELTA, {"release": 50.0})
    ledger.charge("release", NOISY, run="central", round=1)
    assert ledger.epsilons() == {"release": after(1)}
    known = Release("skellam", 3.0, dimension=40)
    whole = Release("skellam", 4.0, dimension=40)
    ledger.charge("release", known, run="distributed", round=1)
    assert ledger.charge("outsiders", whole, run="distributed", round=1) == epsilon([NOISY, whole], DELTA)
    assert ledger.epsilons() == {
        "release": epsilon([NOISY, known], DELTA),
        "outsiders": epsilon([NOISY, whole], DELTA),
    }


@pytest.mark.parametrize("account", [None, 1])
def test_a_ledger_that_took_a_sites_own_noise_for_noise_is_refused(path, account):
    """Catches: rounds of an older version that go on as charged: 8.00 where another site has learned 11.35."""
    line = {"adversary": "release", "release": asdict(SHARE), "count": 1, "delta": DELTA, "epsilon": 1.0}
    AuditLog(path).write("charged", **line, **({} if account is None else {"account": account}))
    with unchanged(path), pytest.raises(StorageError, match="keep the file elsewhere") as caught:
        Ledger(path, DELTA, {}).charge("release", SHARE, run="one", round=1)
    assert caught.value.code == "ledger-older"


def test_older_lines_that_were_charged_in_full_count_on(path):
    """Catches: an account that is thrown away although it was right: uploads, sums, and runs of other modes."""
    for adversary, release in (("release", NOISY), ("uploads", SHARE), ("sums", SHARE)):
        line = {"adversary": adversary, "release": asdict(release), "count": 2, "delta": DELTA, "epsilon": 1.0}
        AuditLog(path).write("charged", **line)
    assert Ledger(path, DELTA, {}).epsilons() == {
        "release": after(2),
        "uploads": after(2, SHARE),
        "sums": after(2, SHARE),
    }


def test_what_had_no_noise_is_infinite_and_still_json(path):
    """Catches: Infinity in a line, which is no JSON, or an upload without noise that costs nothing."""
    ledger = Ledger(path, DELTA, {})
    assert ledger.charge("uploads", Release("gaussian", 0.0)) == math.inf
    assert ledger.charge("uploads", NOISY) == math.inf
    assert ledger.epsilons() == {"uploads": math.inf}
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert [line["epsilon"] for line in lines] == [None, None]


def test_delta_is_the_readers(path):
    """Catches: an epsilon taken from a line that was written for another delta."""
    Ledger(path, 1e-3, {}).charge("release", NOISY)
    assert Ledger(path, 1e-7, {}).epsilons() == {"release": epsilon([NOISY], 1e-7)}


# The budget


def test_a_budget_is_spent_to_its_end_and_not_beyond(path):
    """Catches: a charge that is refused one round too early or too late, or written and refused."""
    ledger = Ledger(path, DELTA, {"release": after(3)})
    for _ in range(3):
        ledger.check({"release": (NOISY, 1)})
        ledger.charge("release", NOISY)
    with unchanged(path):
        with pytest.raises(BudgetError, match="epsilon would be"):
            ledger.check({"release": (NOISY, 1)})
        with pytest.raises(BudgetError) as caught:
            ledger.charge("release", NOISY)
    assert (caught.value.code, caught.value.exit_status) == ("budget-exhausted", 15)
    assert ledger.epsilons() == {"release": after(3)}


def test_several_at_once_are_within_the_budget_or_not(path):
    """Catches: a count of which only one is checked."""
    ledger = Ledger(path, DELTA, {"release": after(3)})
    with unchanged(path), pytest.raises(BudgetError):
        ledger.charge("release", NOISY, 4)
    assert ledger.charge("release", NOISY, 3) == after(3)


def test_only_what_is_budgeted_stops(path):
    """Catches: an adversary without a budget that stops the run, and one with a budget that is not looked at."""
    ledger = Ledger(path, DELTA, {"release": after(1)})
    ledger.charge("uploads", Release("gaussian", 0.0))
    ledger.check({"release": (NOISY, 1), "uploads": (Release("gaussian", 0.0), 1)})
    ledger.charge("release", NOISY)
    with pytest.raises(BudgetError):
        ledger.check({"uploads": (NOISY, 1), "release": (NOISY, 1)})
    ledger.check({"uploads": (NOISY, 1)})


def test_looking_at_the_budget_spends_nothing(path):
    """Catches: a check that charges, so that every round counts twice."""
    ledger = Ledger(path, DELTA, {"release": after(1)})
    with unchanged(path):
        for _ in range(3):
            ledger.check({"release": (NOISY, 1)})


# On disk


def test_a_charge_is_on_the_disk_when_it_returns(path, monkeypatch):
    """Catches: a line in a buffer, which a crash loses after the message has left."""
    order = []
    real = os.fsync

    def fsync(number):
        order.append(os.readlink(f"/proc/self/fd/{number}"))
        assert path.read_text().count("\n") == order.count(str(path))  # flushed before
        real(number)

    monkeypatch.setattr("tsugiki.common.files.os.fsync", fsync)
    for _ in range(2):
        Ledger(path, DELTA, {}).charge("release", NOISY)
    assert order == [str(path), str(path.parent), str(path)]  # the folder once, for the name of the new file


def test_without_the_disk_nothing_may_leave(path, monkeypatch):
    """Catches: a full disk that is only warned of."""

    def fsync(number):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("tsugiki.common.files.os.fsync", fsync)
    with pytest.raises(StorageError) as caught:
        Ledger(path, DELTA, {}).charge("release", NOISY)
    assert caught.value.code == "disk-full"


def test_a_ledger_that_cannot_be_written_is_an_error(tmp_path):
    """Catches: an OSError, which nobody expects, and a run that goes on without its ledger."""
    with pytest.raises(StorageError) as caught:
        Ledger(tmp_path / "gone" / "ledger.jsonl", DELTA, {}).charge("release", NOISY)
    assert caught.value.code == "not-writable"
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(StorageError):
        Ledger(tmp_path / "folder.jsonl", DELTA, {}).charge("release", NOISY)


WHOLE = {"adversary": "release", "release": asdict(NOISY), "count": 1, "account": ACCOUNT, "run": "one", "round": 1}


@pytest.mark.parametrize(
    "change",
    [
        {"release": None},
        {"release": {}},
        {"release": {**asdict(NOISY), "noise_multiplier": "4"}},
        {"release": {**asdict(NOISY), "noise_multiplier": 10**400}},
        {"release": {**asdict(NOISY), "noise": []}},
        {"release": {**asdict(NOISY), "dimension": 0}},
        {"release": {**asdict(NOISY), "sampling_probability": -1}},
        {"adversary": []},
        {"adversary": "nobody"},
        {"count": True},
        {"count": 0},
        {"count": 10**400},
    ],
)
def test_a_line_that_is_no_charge_is_damage(tmp_path, change):
    """Catches: a traceback for a ledger whose chain is whole, and which holds what no version has written."""
    path = tmp_path / "ledger.jsonl"
    AuditLog(path).write("charged", **WHOLE)
    assert Ledger(path, DELTA, {}).rounds("one") == 1
    assert Ledger(path, DELTA, {}).epsilons() == {"release": after(1)}
    AuditLog(path).write("charged", **{**WHOLE, **change})
    for read in (Ledger(path, DELTA, {}).epsilons, lambda: Ledger(path, DELTA, {}).rounds("one")):
        with pytest.raises(StorageError) as caught:
            read()
        assert caught.value.code == "run-corrupt"


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace('"noise_multiplier": 4.0', '"noise_multiplier": 40.0'), *lines[1:]],
        lambda lines: [lines[0].replace('"count": 1', '"count": 0'), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: [lines[0], lines[2]],
        lambda lines: [lines[0].replace('"release", "release"', '"uploads", "release"'), *lines[1:]],
        lambda lines: [lines[1], lines[0], lines[2]],
        lambda lines: ["{}", *lines[1:]],
    ],
)
def test_a_changed_ledger_is_refused(path, change):
    """Catches: a cheaper past: less noise, fewer rounds, or a round left out, believed."""
    ledger = Ledger(path, DELTA, {"release": 1e9})
    for _ in range(3):
        ledger.charge("release", NOISY)
    path.write_text("".join(f"{line}\n" for line in change(path.read_text().splitlines())))
    for use in (ledger.spent, ledger.epsilons, lambda: ledger.check({"release": (NOISY, 1)})):
        with pytest.raises(StorageError) as caught:
            use()
        assert caught.value.code in ("audit-broken", "run-corrupt")
    with unchanged(path), pytest.raises(StorageError):
        ledger.charge("release", NOISY)


def test_after_a_crash_in_the_middle_of_a_line_it_goes_on(path):
    """Catches: a ledger that no run can use any more after a crash: what was cut off had not left."""
    for _ in range(2):
        Ledger(path, DELTA, {}).charge("release", NOISY)
    path.write_text(path.read_text()[:-40])
    assert Ledger(path, DELTA, {}).charge("release", NOISY) == after(2)
    assert len(verify(path)) == 2


# Several processes

CHARGE = """
import sys
from pathlib import Path
from tsugiki.common.errors import BudgetError
from tsugiki.common.privacy.accounting import Release
from tsugiki.common.privacy.ledger import Ledger
ledger = Ledger(Path(sys.argv[1]), 1e-5, {"release": float(sys.argv[2])})
sys.stdin.readline()  # both begin together
try:
    for number in range(30):
        ledger.charge("release", Release("gaussian", 4.0), run=sys.argv[3], round=number)
except BudgetError:
    print("refused")
print(number)
"""


def charge_together(path, budget):
    """Let two processes charge 30 times each at once; return what they print."""
    command = [sys.executable, "-c", CHARGE, str(path), str(budget)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    running = [subprocess.Popen([*command, name], **pipes) for name in ("one", "two")]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    printed = [process.communicate(timeout=60)[0].split() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    return printed


def test_two_processes_share_a_ledger(path):
    """Catches: two that read the same total and write over each other, or lines that break the chain."""
    assert charge_together(path, 1e9) == [["29"], ["29"]]
    lines = verify(path)
    assert Counter(line["run"] for line in lines) == {"one": 30, "two": 30}
    assert [line["epsilon"] for line in lines] == [after(count) for count in range(1, 61)]


def test_two_processes_together_do_not_exceed_the_budget(path):
    """Catches: a check outside of the lock: both would see room for one more."""
    printed = charge_together(path, after(41))
    assert len(verify(path)) == 41
    assert ["refused" in words for words in printed].count(True) >= 1
    assert Ledger(path, DELTA, {}).epsilons() == {"release": after(41)}
