"""The GPU check in its tiny form, on a CPU."""

import json
import sys

import pytest
import torch

from scripts import gpu_check


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here: run scripts/gpu_check.py itself")
def test_it_runs_to_its_end_and_skips_by_name(monkeypatch, capsys):
    """Catches: a mode that fails, a skipped part without its name, a record that is no JSON."""
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--without", "federation"])
    assert gpu_check.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    skipped = {line["name"]: line["skipped"] for line in lines if "skipped" in line}
    assert skipped["CUDA tests"] == "no CUDA here"
    assert "cuda" in skipped["tiny, nf4"]
    figures = {line["name"]: line["value"] for line in lines if "value" in line}
    for mode in ("float32", "bfloat16 base", "gradient checkpointing"):
        assert figures[f"tiny, {mode}: speed"] > 0
    assert figures["tiny, float32: the same run twice"] == 0
    assert not [name for name in figures if name.endswith("failed")]


def test_a_part_that_fails_does_not_end_the_check(capsys):
    """Catches: a GPU without memory for one mode, which costs the figures of all others."""
    record = gpu_check.Record(ends=0.0)
    with record.part("nf4"):
        raise RuntimeError("out of memory")
    assert [(figure.name, figure.holds) for figure in record.figures] == [("nf4: failed", False)]
    assert "out of memory" in capsys.readouterr().out
    assert record.over
