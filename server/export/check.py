"""The proof of an export: a fresh process loads it with the card's code and compares its outputs with the run's model.

The process looks for the base under its public name, in a temporary hub cache, so that the name in the export is tested
too. Nothing is downloaded.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from tsugiki.common.errors import ExportError
from tsugiki.common.model.graft import Graft
from tsugiki.server.export import probe as export_probe
from tsugiki.server.export.card import Export, is_sentence_transformer, needs_tsugiki, reads_pairs, token_limit

log = logging.getLogger("tsugiki.server")

TOLERANCE = 1e-5
"""Largest difference between outputs that count as equal, times the largest output if that exceeds 1.

Rounding errors grow with the outputs: logits of a language model exceed 10, coordinates of a unit vector stay below 1.
"""

TIMEOUT_S = 600

_REVISION = "0" * 40
_LOADED = {".json", ".safetensors", ".txt", ".model"}


@dataclass(frozen=True)
class Expected:
    """The probe's outputs in the exporting process, as flat arrays of the same length.

    Args:
        outputs: outputs of the base with the adapter.
        base_outputs: outputs with the adapter switched off.
    """

    outputs: npt.NDArray[np.float32]
    base_outputs: npt.NDArray[np.float32]

    @property
    def effect(self) -> float:
        """The largest change that the adapter makes to an output; exactly 0 if it does nothing."""
        return float(np.abs(self.outputs - self.base_outputs).max())

    @property
    def tolerance(self) -> float:
        """The largest difference that is accepted, at most a tenth of the adapter's effect unless that is 0."""
        rounding = TOLERANCE * max(1.0, float(np.abs(self.outputs).max()))
        if not self.effect:
            return rounding
        # The base without the adapter must not pass as the export, even if the adapter changes little.
        return min(rounding, self.effect / 10)


def expect(graft: Graft) -> Expected:
    """Return the outputs that an export of the graft has to reproduce."""
    settings = _probe_settings(graft)
    tokenizer = None if is_sentence_transformer(graft) else graft.base.tokenizer
    found = export_probe.outputs(graft.base.network, tokenizer, **settings)
    with graft.adapter_disabled():
        return Expected(found, export_probe.outputs(graft.base.network, tokenizer, **settings))


def _probe_settings(graft: Graft) -> dict[str, Any]:
    pixels = graft.base.pixels
    if pixels is not None:
        return {"pixels": (pixels.channels, *pixels.size)}
    return {"pair": reads_pairs(graft), "max_length": token_limit(graft)}


def prove(folder: Path, export: Export, graft: Graft, expected: Expected) -> None:
    """Load an export in a fresh process and compare its outputs with those expected.

    Args:
        folder: folder of the export.
        export: its form, its base and the code that loads it.
        graft: the model that is exported, from which the probe is made.
        expected: the outputs to find, from `expect`.

    Raises:
        ExportError: `proof-failed`, the outputs differ; `proof-timeout`; `proof-crashed`, the export cannot be loaded.
    """
    import torch

    if not expected.effect:
        log.warning("the adapter changes nothing: the outputs are exactly those of the base")
    ours = needs_tsugiki(graft, export.kind)
    with TemporaryDirectory(prefix="tsugiki-export-") as name:
        workshop = Path(name)
        if export.kind != "merged":  # a whole model must load without its base
            seed_hub_cache(workshop / "hub", export.base_name, export.base_folder)
        (workshop / "load.py").write_text(export.code, "utf-8")
        job = {
            "code": str(workshop / "load.py"),
            "outputs": str(workshop / "outputs.npy"),
            "threads": torch.get_num_threads(),
            "alone": not ours,
            "probe": _probe_settings(graft),
        }
        (workshop / "job.json").write_text(json.dumps(job), "utf-8")
        run_probe(workshop / "job.json", folder, _environment(workshop, ours))
        _compare(np.load(workshop / "outputs.npy", allow_pickle=False), expected)


def _compare(found: npt.NDArray[np.float32], expected: Expected) -> None:
    """Check that the outputs are the expected ones.

    Raises:
        ExportError: `proof-failed`, they differ.
    """
    same_shape = found.shape == expected.outputs.shape
    difference = float(np.abs(found - expected.outputs).max()) if same_shape else float("inf")
    if not difference <= expected.tolerance:  # written this way round so that a NaN fails
        raise ExportError(
            f"loaded in a fresh process, the export's outputs differ from the run's by up to {difference:.1e}",
            f"at most {expected.tolerance:.1e}",
            'set model.dtype = "float32" in the run\'s config.toml: smaller types are rounded once more on the way. '
            "If it is float32 already, this is a defect",
            code="proof-failed",
        )


def run_probe(job_file: Path, folder: Path, environment: dict[str, str]) -> None:
    """Run `server/export/probe.py` in a fresh process whose working folder is the export.

    Raises:
        ExportError: `proof-timeout` or `proof-crashed`.
    """
    # -P keeps the script's own folder from the import path: the export must load without our files.
    command = [sys.executable, "-P", str(Path(export_probe.__file__)), str(job_file)]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ExportError(
            f"the export was not loaded within {TIMEOUT_S} s", "a loaded model", "export again", code="proof-timeout"
        ) from None
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:] or [f"exit status {done.returncode}"]
        raise ExportError(
            f"the export cannot be loaded in a fresh process: {last[0].strip()[:300]}",
            "a model that loads",
            "compare the installed versions with those that Tsugiki asks for: `tsugiki doctor`",
            code="proof-crashed",
        )


def _environment(workshop: Path, ours: bool) -> dict[str, str]:
    """Return the fresh process's environment: offline, on the CPU, with the workshop's hub cache and no other.

    Args:
        workshop: folder that contains the hub cache.
        ours: whether the export needs this program, so that the process must find it.
    """
    private = ("HF_", "HUGGINGFACE_", "TRANSFORMERS_", "SENTENCE_TRANSFORMERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(private)}
    environment |= {
        "HF_HOME": str(workshop),
        "HF_HUB_CACHE": str(workshop / "hub"),
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    if ours:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [_home(), environment.get("PYTHONPATH")]))
    return environment


def _home() -> str:
    """Return the folder from which `import tsugiki` loads this program, installed or not."""
    found = importlib.util.find_spec("tsugiki")
    if found is None or found.origin is None:
        raise ExportError("tsugiki cannot be found by its import name", "an installed tsugiki", "install it")
    return str(Path(found.origin).resolve().parents[1])


def seed_hub_cache(cache: Path, name: str, folder: Path) -> None:
    """Make a hub cache, for `HF_HUB_CACHE`, that contains the model in `folder` under `name`, as links.

    Args:
        cache: folder of the cache; created if it does not exist.
        name: hub id, as "org/model".
        folder: folder of the model; JSON, text and safetensors files at any depth are linked.
    """
    model = cache / f"models--{name.replace('/', '--')}"
    snapshot = model / "snapshots" / _REVISION
    for file in sorted(folder.rglob("*")):
        if file.is_file() and file.suffix in _LOADED:
            link = snapshot / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(_REVISION, "utf-8")
