"""From trained parameters to what leaves the site: local minus received adapter."""

from __future__ import annotations

import numpy as np

from common.wire import Vector


def make_update(local: Vector, received: Vector) -> Vector:
    """Return `local - received`, both of shape (size,), subtracted in float64.

    A site that has not trained sends exact zeros. Clipping and noise, where a run asks for them, come after this step.
    """
    return (local.astype(np.float64) - received).astype(np.float32)
