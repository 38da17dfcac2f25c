"""The proof of an export: a fresh process loads it as its card says, and finds the outputs of the run's own model.

The base is looked for under its public name, in a hub cache made for the occasion, so that the name in the export is
tried as well. Nothing is fetched.
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
"""The largest difference between two outputs that count as equal, as a share of the largest output if that exceeds 1.

Rounding grows with what is rounded: the logits of a language model go beyond 10, where a vector of length 1 does not.
"""

TIMEOUT_S = 600

_REVISION = "0" * 40
_LOADED = {".json", ".safetensors", ".txt", ".model"}


@dataclass(frozen=True)
class Expected:
    """The probe's outputs in the exporting process, each flat.

    Args:
        outputs: of the base with the adapter.
        base_outputs: with the adapter off.
    """

    outputs: npt.NDArray[np.float32]
    base_outputs: npt.NDArray[np.float32]

    @property
    def effect(self) -> float:
        """The largest change that the adapter makes; exactly 0 if it does nothing."""
        return float(np.abs(self.outputs - self.base_outputs).max())

    @property
    def tolerance(self) -> float:
        """By `TOLERANCE`, or a tenth of a smaller effect: the base without the adapter must not pass for an export."""
        rounding = TOLERANCE * max(1.0, float(np.abs(self.outputs).max()))
        return min(rounding, self.effect / 10) if self.effect else rounding


def expect(graft: Graft) -> Expected:
    """Return the outputs that an export of the graft has to reproduce."""
    settings = _probe_settings(graft)
    tokenizer = None if is_sentence_transformer(graft) else graft.base.tokenizer
    found = export_probe.outputs(graft.base.network, tokenizer, **settings)
    with graft.adapter_disabled():
        return Expected(found, export_probe.outputs(graft.base.network, tokenizer, **settings))


def _probe_settings(graft: Graft) -> dict[str, Any]:
    if (want := graft.base.pixels) is not None:
        return {"pixels": (want.channels, *want.size)}
    return {"pair": reads_pairs(graft), "max_length": token_limit(graft)}


def prove(folder: Path, export: Export, graft: Graft, expected: Expected) -> None:
    """Load an export in a fresh process and compare its outputs with those expected.

    Args:
        folder: what was written.
        export: how to load it.
        graft: says what the probe looks like.
        expected: from `expect`.

    Raises:
        ExportError: `proof-failed`, the outputs differ; `proof-timeout`; `proof-crashed`, what was written cannot be
            loaded.
    """
    import torch

    if not expected.effect:
        log.warning("the adapter changes nothing: the outputs are exactly those of the base")
    ours = needs_tsugiki(graft, export.kind)
    with TemporaryDirectory(prefix="tsugiki-export-") as name:
        workshop = Path(name)
        if export.kind != "merged":  # a whole model has to do without its base
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
    """Refuse outputs that are not those expected."""
    same_shape = found.shape == expected.outputs.shape
    difference = float(np.abs(found - expected.outputs).max()) if same_shape else float("inf")
    if not difference <= expected.tolerance:  # a NaN is no proof
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
        workshop: holds the cache.
        ours: this program has to be found as well.
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
    """Return the folder in which `import tsugiki` finds this program, which need not be installed."""
    found = importlib.util.find_spec("tsugiki")
    if found is None or found.origin is None:
        raise ExportError("tsugiki cannot be found by its import name", "an installed tsugiki", "install it")
    return str(Path(found.origin).resolve().parents[1])


def seed_hub_cache(cache: Path, name: str, folder: Path) -> None:
    """Make a hub cache in which `name` is the model in `folder`, by links; `HF_HUB_CACHE` may point to it.

    Args:
        cache: made if it is not there.
        name: a hub id, as "org/model".
        folder: its JSON, text and safetensors files are linked, at any depth.
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
