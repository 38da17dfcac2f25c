"""The proof of an export, without the fresh process: what it compares, and what it makes of a process that fails."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from tsugiki.common.errors import ExportError
from tsugiki.server.export import check as export_check
from tsugiki.server.export.card import Export
from tsugiki.server.export.check import TOLERANCE, Expected, prove, seed_hub_cache

BASE = np.linspace(-1, 1, 8, dtype=np.float32)


def graft():
    """Return what a proof asks of a graft."""
    task = SimpleNamespace(settings=SimpleNamespace(max_length=16))
    transformer = SimpleNamespace(config=SimpleNamespace(model_type="bert"))
    tokenizer = SimpleNamespace(model_max_length=64)
    return SimpleNamespace(task=task, base=SimpleNamespace(tokenizer=tokenizer, transformer=transformer, pixels=None))


def prove_with(monkeypatch, folder, found, expected):
    """Prove an export whose fresh process finds the given outputs."""

    def run_probe(job_file, folder, environment):
        np.save(json.loads(job_file.read_text())["outputs"], found)

    monkeypatch.setattr(export_check, "run_probe", run_probe)
    prove(folder, Export("merged", "", "", folder, 1, (), True), graft(), expected)


@pytest.mark.parametrize("effect", [1.0, 1e-4, 2e-5, 1e-6, 0.0])
def test_equal_outputs_are_a_proof(monkeypatch, tmp_path, effect):
    """Catches: an adapter refused because it does little."""
    prove_with(monkeypatch, tmp_path, BASE + np.float32(effect), Expected(BASE + np.float32(effect), BASE))


@pytest.mark.parametrize("effect", [1.0, 1e-4, 1e-5, 1e-6])
def test_the_base_alone_is_no_proof(monkeypatch, tmp_path, effect):
    """Catches: a tolerance within which a weak adapter may be missing."""
    with pytest.raises(ExportError) as caught:
        prove_with(monkeypatch, tmp_path, BASE, Expected(BASE + np.float32(effect), BASE))
    assert caught.value.code == "proof-failed"


@pytest.mark.parametrize(
    "found",
    [BASE[:1] + 1, np.full(8, np.nan, np.float32), BASE + 1 + np.float32(3 * TOLERANCE), BASE + np.float32(0.9)],
    ids=["shape", "nan", "near", "less"],
)
def test_other_outputs_are_no_proof(monkeypatch, tmp_path, found):
    """Catches: comparisons that a NaN, a shape that NumPy would stretch, or a negative difference gets through."""
    with pytest.raises(ExportError) as caught:
        prove_with(monkeypatch, tmp_path, found, Expected(BASE + 1, BASE))
    assert caught.value.code == "proof-failed"


@pytest.mark.parametrize(("off", "same"), [(4e-4, True), (6e-4, False)])
def test_rounding_grows_with_the_outputs(monkeypatch, tmp_path, off, same):
    """Catches: a whole language model that is never proved, because its logits are large; a share of nothing."""
    logits = 50 * BASE.astype(np.float32)
    expected, found = Expected(logits, logits[::-1].copy()), logits + np.float32(off)
    if same:
        prove_with(monkeypatch, tmp_path, found, expected)
        return
    with pytest.raises(ExportError) as caught:
        prove_with(monkeypatch, tmp_path, found, expected)
    assert caught.value.code == "proof-failed"


def failing(monkeypatch, run):
    """Return the error of a proof whose process runs like this."""
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ExportError) as caught:
        export_check.run_probe(Path("job.json"), Path(), {})
    return caught.value


def test_a_process_that_hangs_is_an_error(monkeypatch):
    """Catches: an export that waits for ever, or that takes silence for a proof."""

    def hang(command, timeout, **_):
        raise subprocess.TimeoutExpired(command, timeout)

    assert failing(monkeypatch, hang).code == "proof-timeout"


@pytest.mark.parametrize(("stderr", "said"), [("Traceback\n  ...\nOSError: no such model\n\n", "no such"), ("", "137")])
def test_a_process_that_fails_is_an_error_with_its_last_line(monkeypatch, stderr, said):
    """Catches: a crash without a reason, or one in the reading of an empty reason."""

    def crash(command, **_):
        return subprocess.CompletedProcess(command, 137, "", stderr)

    error = failing(monkeypatch, crash)
    assert error.code == "proof-crashed"
    assert said in str(error)


@pytest.mark.parametrize("kind", ["peft", "merged"])
def test_the_process_is_offline_and_sees_no_other_base(monkeypatch, tmp_path, kind):
    """Catches: an export that works with this machine's cache or token only; a merged one that wants its base."""
    seen = {}

    def run_probe(job_file, folder, environment):
        job = json.loads(job_file.read_text())
        seen.update(environment, alone=job["alone"], hub=Path(environment["HF_HUB_CACHE"]).exists())
        np.save(job["outputs"], BASE + 1)

    monkeypatch.setattr(export_check, "run_probe", run_probe)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    (tmp_path / "config.json").write_text("{}")
    prove(tmp_path, Export(kind, "", "org/model", tmp_path, 1, (), True), graft(), Expected(BASE + 1, BASE))
    assert "HF_TOKEN" not in seen
    assert seen["HF_HUB_OFFLINE"] == "1"
    assert seen["alone"]
    assert seen["hub"] is (kind == "peft")


def test_the_process_finds_this_program_where_it_is_needed(monkeypatch, tmp_path):
    """Catches: a proof that works only where the program is installed; one that needs it where others have to do."""
    paths = {}
    for kind in ("tsugiki", "merged"):

        def run_probe(job_file, folder, environment, kind=kind):
            paths[kind] = environment.get("PYTHONPATH", "").split(os.pathsep)
            np.save(json.loads(job_file.read_text())["outputs"], BASE + 1)

        monkeypatch.setattr(export_check, "run_probe", run_probe)
        prove(tmp_path, Export(kind, "", "org/model", tmp_path, 1, (), True), graft(), Expected(BASE + 1, BASE))
    assert (Path(paths["tsugiki"][0]) / "tsugiki" / "__init__.py").is_file()
    assert paths["tsugiki"][0] not in paths["merged"]


def test_a_seeded_cache_answers_for_a_hub_id(tmp_path):
    """Catches: a layout that the hub's client does not read, nested files left out, pickles let in."""
    from huggingface_hub import snapshot_download

    base = tmp_path / "base"
    (base / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json", "pytorch_model.bin"):
        (base / name).write_text(name)
    seed_hub_cache(tmp_path / "hub", "org/model", base)
    found = Path(snapshot_download("org/model", cache_dir=tmp_path / "hub", local_files_only=True))
    names = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert names == {"config.json", "model.safetensors", "vocab.txt", "1_Pooling/config.json"}
    assert (found / "1_Pooling" / "config.json").read_text() == "1_Pooling/config.json"
