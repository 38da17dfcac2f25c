"""The fresh process that tests an export, and the outputs that both processes compute.

`server/export/check.py` runs this file as a script in the exported folder. The script runs the code of the model card
and feeds a few sentences, or images of noise, to the loaded model. This file imports nothing of this project, to show
that an export works without it.
"""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

TEXTS = (
    "The supplier delivers the goods within thirty days.",
    "either PARTY may not end this agreement",
    "Zürich, 12 March: 1,000 units at 3.50 each; naïve façade",
    "good " * 600,  # longer than what models read: the export decides where it is cut
)

_PROJECT = "tsugiki"


def outputs(
    model: Any, tokenizer: Any, *, pair: bool = False, max_length: int = 0, pixels: Sequence[int] = ()
) -> npt.NDArray[np.float32]:
    """Return a model's outputs for `TEXTS`, or for images of noise, as one flat array.

    Args:
        model: a `SentenceTransformer`, or a transformers model with logits.
        tokenizer: the model's tokenizer; None for a `SentenceTransformer`, which has its own, and for models of images.
        pair: whether each text is read together with the one before it, as its second part.
        max_length: number of tokens at which texts are cut, for a model with logits.
        pixels: channels, height and width of the images that the model reads; empty for models of texts.
    """
    import torch

    if pixels:
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((4, *pixels), np.float32))
        with torch.no_grad():
            logits = model(pixel_values=noise.to(model.device, model.dtype)).logits
        return np.asarray(logits.float().cpu().numpy()).ravel()
    if tokenizer is None:
        inputs: list[Any] = list(TEXTS)
        if pair:
            inputs = [(text, TEXTS[index - 1]) for index, text in enumerate(TEXTS)]
        vectors = model.encode(inputs, convert_to_tensor=True, show_progress_bar=False)
        return np.asarray(vectors.float().cpu().numpy()).ravel()
    parts = []
    with torch.no_grad():
        for index, text in enumerate(TEXTS):  # one by one: not every model can pad
            texts = (text, TEXTS[index - 1]) if pair else (text,)
            tokens = tokenizer(*texts, truncation=True, max_length=max_length, return_tensors="pt").to(model.device)
            parts.append(model(**tokens).logits.float().cpu().numpy().ravel())
    return np.concatenate(parts)


def main(job_file: str) -> None:
    """Run a job: load a model, compute its outputs and save them.

    Args:
        job_file: JSON file with `code` (path of the loading code), `outputs` (path to save to), `probe` (arguments of
            `outputs`), `threads`, and `alone` (whether to forbid imports of this project).
    """
    import torch

    job = json.loads(Path(job_file).read_text("utf-8"))
    torch.set_num_threads(job["threads"])
    if job["alone"]:
        sys.modules[_PROJECT] = None  # type: ignore[assignment]  # None makes an import fail
    loaded = runpy.run_path(job["code"])
    model = loaded["model"].to("cpu")
    found = outputs(model, loaded.get("tokenizer"), **job["probe"])
    np.save(job["outputs"], found, allow_pickle=False)


if __name__ == "__main__":
    main(sys.argv[1])
