"""Fault 18: the disk is full, read-only, or the run's folder has vanished: at the start, and in the middle of a run."""

import errno
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.support.toy import SPEC, federate, toy_app, toy_config
from tsugiki.common import files
from tsugiki.common.audit import verify
from tsugiki.common.errors import StorageError
from tsugiki.common.files import read_lines
from tsugiki.server.run import checkpoint, storage


def update(site, round_, received):
    """The update of a site, different in every round."""
    return np.full(SPEC.size, 0.25 * round_, np.float32)


def run(monkeypatch, config, **options):
    """Run, or resume, the toy federation with a strategy that has moments."""
    return federate(monkeypatch, toy_app(["a", "b"], update), 2, config, **options)


def adaptive(folder):
    """Return a run of two rounds whose checkpoint has more than one part."""
    return toy_config(folder, run={"rounds": 2}, strategy={"name": "fedadam", "server_learning_rate": 0.1})


@pytest.mark.parametrize("folder", ["/proc/tsugiki-test", "/dev/null/runs"])
def test_a_folder_that_cannot_be_made_is_refused_at_the_start(monkeypatch, folder):
    """Catches: an OSError's traceback, and a message without the path."""
    config = adaptive(folder)
    with pytest.raises(StorageError, match=folder) as caught:
        run(monkeypatch, config)
    assert (caught.value.code, caught.value.exit_status) == ("not-writable", 5)


def test_a_full_disk_is_refused_at_the_start_with_what_is_free(tmp_path, monkeypatch):
    """Catches: hours of training that cannot be saved."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: usage._replace(free=3 * 2**20))
    with pytest.raises(StorageError, match=r"3 MiB free\. Expected at least 64 MiB") as caught:
        run(monkeypatch, adaptive(tmp_path))
    assert (caught.value.code, caught.value.exit_status) == ("disk-full", 5)
    assert str(tmp_path / "toy") in str(caught.value)


def fail_at(monkeypatch, number):
    """Let the `number`-th flush to the disk fail; return a list that counts them."""
    count = []

    def fsync(descriptor):
        count.append(descriptor)
        if len(count) == number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    return count


def test_whenever_the_disk_is_full_the_run_stops_and_goes_on_with_the_same_bytes(tmp_path, monkeypatch):
    """Catches: any write, of some twenty, whose failure leaves a damaged checkpoint, or a run that cannot go on."""
    flushes = fail_at(monkeypatch, 0)
    whole = run(monkeypatch, adaptive(tmp_path / "whole"))
    first = next(n for n in range(1, 100) if has_checkpoint(tmp_path / f"probe-{n}", monkeypatch, n))
    assert len(flushes) >= first + 20
    for number in range(first, len(flushes) + 1):
        folder = tmp_path / str(number)
        config = adaptive(folder)
        fail_at(monkeypatch, number)
        with pytest.raises(StorageError) as caught:
            run(monkeypatch, config)
        assert (caught.value.code, caught.value.exit_status) == ("disk-full", 5)
        fail_at(monkeypatch, 0)
        current = folder / "toy" / "checkpoint"
        if checkpoint.exists(current):  # else nothing was trained yet, and the run begins anew
            checkpoint.load(current, config.fixed, SPEC.sha256)
        resumed = run(monkeypatch, config, resume=True)
        assert resumed.summary["adapter_sha256"] == whole.summary["adapter_sha256"], number
        assert [line["round"] for line in read_lines(resumed.folder / "metrics.jsonl")] == [0, 1, 2]
        assert verify(resumed.folder / "audit.jsonl")
        assert not list(resumed.folder.rglob("*.tmp"))
    assert whole.state.round == 2


def has_checkpoint(folder, monkeypatch, number):
    """Whether a run whose `number`-th flush fails has got as far as to be resumable."""
    fail_at(monkeypatch, number)
    with pytest.raises(StorageError):
        run(monkeypatch, adaptive(folder))
    return (folder / "toy" / "config.toml").is_file()


def test_a_limit_on_file_sizes_stops_the_run_with_its_checkpoint(tmp_path, monkeypatch):
    """Catches: a process killed by SIGXFSZ, and half a line taken for the last one."""
    config = toy_config(tmp_path, run={"rounds": 50})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        with pytest.raises(StorageError) as caught:
            run(monkeypatch, config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.code, caught.value.exit_status) == ("disk-full", 5)
    assert 1 < checkpoint.load(tmp_path / "toy" / "checkpoint", config.fixed, SPEC.sha256).round < 50
    ended = run(monkeypatch, config, resume=True)
    assert [line["round"] for line in read_lines(ended.folder / "metrics.jsonl")] == list(range(51))
    assert verify(ended.folder / "audit.jsonl")


def test_a_folder_that_vanishes_stops_the_run(tmp_path, monkeypatch):
    """Catches: a FileNotFoundError's traceback, and a run that goes on without being saved."""

    def vanish(site, round_, received):
        if (round_, site) == (2, "b"):
            shutil.rmtree(tmp_path / "toy")
        return np.full(SPEC.size, 0.25, np.float32)

    with pytest.raises(StorageError) as caught:
        federate(monkeypatch, toy_app(["a", "b"], vanish), 2, toy_config(tmp_path))
    assert (caught.value.code, caught.value.exit_status) == ("not-writable", 5)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_becomes_read_only_stops_the_run(tmp_path, monkeypatch):
    """Catches: a PermissionError's traceback."""

    def protect(site, round_, received):
        if (round_, site) == (2, "b"):
            (tmp_path / "toy" / "checkpoint").chmod(0o500)
        return np.full(SPEC.size, 0.25, np.float32)

    config = toy_config(tmp_path)
    try:
        with pytest.raises(StorageError) as caught:
            federate(monkeypatch, toy_app(["a", "b"], protect), 2, config)
    finally:
        (tmp_path / "toy" / "checkpoint").chmod(0o700)
    assert (caught.value.code, caught.value.exit_status) == ("not-writable", 5)
    assert run(monkeypatch, config, resume=True).summary["rounds"] == 3


def test_a_read_only_disk_stops_the_run(tmp_path, monkeypatch):
    """Catches: as above, also for root: every opening for writing fails as on a read-only disk."""
    opened = os.open

    def refuse(path, flags, *rest, **options):
        if flags & os.O_WRONLY and "round-000002" in Path(path).name:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opened(path, flags, *rest, **options)

    config = adaptive(tmp_path)
    monkeypatch.setattr(files.os, "open", refuse)
    with pytest.raises(StorageError) as caught:
        run(monkeypatch, config)
    monkeypatch.setattr(files.os, "open", opened)
    assert (caught.value.code, caught.value.exit_status) == ("not-writable", 5)
    assert run(monkeypatch, config, resume=True).summary["rounds"] == 2
