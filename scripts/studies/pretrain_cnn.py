"""Train the small convolutional network on 900 pictures of clothes: the base of examples/mnist.toml.

    TSUGIKI_DATA=... python scripts/studies/pretrain_cnn.py OUT [--seed 42] [--epochs 30] [--threads 1]

The pictures are a sprite of Fashion-MNIST, 90 of each of 10 classes, 28 x 28, grey. They share no class with digits, so
that what the convolutions learn here is of use there, and what the last layer learns is not. OUT becomes a folder that
`model.name` can point to. The same seed and threads give the same weights.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import tsugiki  # noqa: F401  (first: it switches off what would phone home)

SIDE, CLASSES, EACH, ACROSS = 28, 10, 90, 30


def read_tiles(file: Path) -> tuple[Any, Any]:
    """Return the sprite's pictures, uint8 of shape (900, 28, 28), and their classes, int64 of shape (900,)."""
    import numpy as np
    from PIL import Image

    sprite = np.asarray(Image.open(file))[..., 0]  # grey: all channels are equal
    tiles = sprite.reshape(ACROSS, SIDE, ACROSS, SIDE).swapaxes(1, 2).reshape(-1, SIDE, SIDE)
    return tiles, np.repeat(np.arange(CLASSES), EACH)


def pretrain(tiles: Any, labels: Any, seed: int, epochs: int) -> tuple[Any, float]:
    """Return the trained network, and its accuracy on a tenth of the pictures, which were kept out.

    Args:
        tiles: uint8, shape (rows, 28, 28).
        labels: int64, shape (rows,).
        seed: of weights, batches, and of which rows are kept out.
        epochs: passes over the rest.
    """
    import torch
    from torch.nn.functional import cross_entropy

    from tsugiki.common.tasks.image_classification import small_cnn

    configuration, network_class = small_cnn()
    torch.manual_seed(seed)
    network = network_class(configuration(channels=1, image_size=SIDE, num_labels=CLASSES))
    pixels = (torch.from_numpy(tiles).float()[:, None] / 255 - 0.5) / 0.5  # as the task does
    classes, order = torch.from_numpy(labels), torch.randperm(len(labels))
    kept, rows = order[: len(order) // 10], order[len(order) // 10 :]
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-2)
    for _ in range(epochs):
        for batch in rows[torch.randperm(len(rows))].split(32):
            loss = cross_entropy(network(pixels[batch]).logits, classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    network.eval()
    with torch.no_grad():
        right = network(pixels[kept]).logits.argmax(dim=1) == classes[kept]
    return network, float(right.float().mean())


def main() -> None:
    """Train, save, and say how well it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the model")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    data = os.environ.get("TSUGIKI_DATA")
    if not data:
        parser.error("TSUGIKI_DATA is not set: a folder with fashion_mnist_900/fashion-mnist-sprite.png")
    import torch

    torch.set_num_threads(options.threads)
    started = time.perf_counter()
    tiles, labels = read_tiles(Path(data) / "fashion_mnist_900" / "fashion-mnist-sprite.png")
    network, accuracy = pretrain(tiles, labels, options.seed, options.epochs)
    network.save_pretrained(options.out)
    seconds = time.perf_counter() - started
    print(f"{options.out}: {accuracy:.3f} accuracy on the {len(labels) // 10} pictures kept out, {seconds:.0f} s")


if __name__ == "__main__":
    main()
