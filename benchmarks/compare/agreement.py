"""Check that all sides of a row compute the same values."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from benchmarks.compare.rows import FLOAT32, REFERENCE, REFERENCE_KEPT, Row
from benchmarks.compare.worker import WorkerError

# Allowed differences of values and of gradients; in gradients, the rounding in all layers of a random network adds up.
# The largest difference in units of the largest absolute value, in float32 and with TensorFloat-32, which convolutions
# on a GPU use by default:
LARGEST, LARGEST_TF32 = (1e-4, 1e-2), (2e-2, 2e-1)
# In half precision the largest difference grows with the number of pixels, so this is the mean difference in units of
# the standard deviation.
MEAN = (0.1, 0.5)


def compare(outputs: Mapping[str, Path], row: Row, device: str) -> dict[str, dict[str, float]]:
    """Return the relative differences of each side's tensors from the reference, or from float32 without a reference.

    Raises:
        WorkerError: a difference is too large for the same computation.
    """
    import torch

    base = REFERENCE if REFERENCE in outputs else FLOAT32
    expected = torch.load(outputs[base])
    found: dict[str, dict[str, float]] = {}
    for name, path in outputs.items():
        if name == base:
            continue
        given, found[name] = torch.load(path), {}
        exact = name in (FLOAT32, REFERENCE_KEPT)
        for key, right in expected.items():
            difference = (given[key].double() - right.double()).abs()
            scale = right.double().abs().max() if exact or right.numel() == 1 else right.double().std()
            value = difference.max() if exact else difference.mean()
            found[name][key] = float(value / scale.clamp_min(1e-30))
            bounds = MEAN if not exact else LARGEST if device == "cpu" else LARGEST_TF32
            bound = bounds[key == "gradient"]
            if not found[name][key] <= bound:
                raise WorkerError(
                    f"{row.name}: {name} differs from {base} in {key} by {found[name][key]:.1e} (allowed: {bound:g}). "
                    "The row was not timed."
                )
    return found
