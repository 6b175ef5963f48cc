"""The rows of the comparison with their sides, sizes and aims."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

REFERENCE, FLOAT32, BFLOAT16 = "reference", "float32", "bfloat16"
GRAPH = "bfloat16, CUDA graph"
REFERENCE_KEPT = "reference, freed memory kept"  # shows how much of a gain on a CPU is due to kept memory


@dataclass(frozen=True)
class Job:
    """The set-up of a worker process, in plain values that can be sent as JSON.

    Args:
        kind: generator, encoder, image (source to image), train (one optimizer step), or a kind without a reference.
        size: height and width of the generator's images.
        batch: images per run.
        side: `REFERENCE`, or the precision of this library.
        device: cpu or cuda.
        files: weights by name, and `clone` for the reference.
        overrides: further settings of psp-train for `train`.
    """

    kind: str
    size: int
    batch: int
    side: str
    device: str
    files: dict[str, str]
    overrides: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Aim:
    """The aims for one side of a row, as ratios within one run.

    Args:
        faster: smallest ratio to the reference's speed.
        memory: largest share of the reference's peak memory.
        seconds: longest time.
        floor: largest ratio to the measured floor.
    """

    faster: float | None = None
    memory: float | None = None
    seconds: float | None = None
    floor: float | None = None


@dataclass(frozen=True)
class Row:
    """One line of the comparison.

    Args:
        name: name of the row for `--only`.
        title: title in the table.
        kind, size, batch: see `Job`.
        sides: sides of this library; the reference is added if there is a clone.
        aims: aims by side.
        rounds: fewest and most rounds after the warm-up.
        seconds: time after which no further round starts.
        files: number of images to predict.
        warmup: runs of each side before its first round; they do not count.
        before: runs in each round before the one that counts, because training steps follow each other.
        apart: measure the sides of this library one after the other, each with the reference, to save memory.
    """

    name: str
    title: str
    kind: str
    size: int = 0
    batch: int = 1
    sides: tuple[str, ...] = (FLOAT32, BFLOAT16)
    aims: dict[str, Aim] = field(default_factory=dict)
    rounds: tuple[int, int] = (3, 15)
    seconds: float = 30.0
    files: int = 0
    warmup: int = 1
    before: int = 0
    apart: bool = False


@dataclass(frozen=True)
class Scale:
    """Sizes of a run.

    Args:
        small, large: sizes of the generators' images.
        many: images of the batched image-to-image row.
        train_batch: images per training step.
        files: images of the prediction row.
        full: whether these are the sizes that the aims apply to.
    """

    small: int = 256
    large: int = 1024
    many: int = 8
    train_batch: int = 2
    files: int = 16
    full: bool = True


QUICK = Scale(small=32, large=64, many=2, train_batch=2, files=6, full=False)


def scale_for(device: str, quick: bool, files: int | None) -> Scale:
    """Return the sizes for a device; `files` overrides the number of predicted files."""
    chosen = QUICK if quick else Scale() if device == "cpu" else Scale(train_batch=8, files=200)
    return chosen if files is None else Scale(**{**asdict(chosen), "files": files})


def _aims(scale: Scale, device: str, cpu: dict[str, Aim] | None, cuda: dict[str, Aim] | None) -> dict[str, Aim]:
    return ((cpu if device == "cpu" else cuda) or {}) if scale.full else {}


def rows(scale: Scale, device: str) -> list[Row]:
    """Return all rows for a device, cheap ones first."""
    small, large, batch, many = scale.small, scale.large, scale.train_batch, scale.many
    kept = (REFERENCE_KEPT,) if device == "cpu" else ()
    training: dict[str, Any] = {"warmup": 7, "before": 1, "apart": True}  # RAdam's first five steps are different

    def aims(cpu: dict[str, Aim] | None = None, cuda: dict[str, Aim] | None = None) -> dict[str, Aim]:
        return _aims(scale, device, cpu, cuda)

    found = [
        Row("import", "time to import", "import", sides=(), rounds=(3, 3)),
        Row(f"generator-{small}", f"generator {small} px, batch 1", "generator", small, seconds=15),
        Row(f"generator-{large}", f"generator {large} px, batch 1", "generator", large,
            sides=(FLOAT32, BFLOAT16, *kept), aims=aims({FLOAT32: Aim(faster=5), BFLOAT16: Aim(faster=9)})),
        Row("encoder", f"encoder, batch 1, {2 * large.bit_length() - 4} styles", "encoder", large, seconds=15),
        Row(f"image-{large}-b1", f"image to image {large} px, batch 1", "image", large,
            sides=(FLOAT32, BFLOAT16, *(kept or [GRAPH])),
            aims=aims({FLOAT32: Aim(faster=3.5), BFLOAT16: Aim(faster=6)}, {GRAPH: Aim(seconds=3e-3)})),
        Row(f"image-{large}-b{many}", f"image to image {large} px, batch {many}", "image", large, many,
            aims=aims(None, {BFLOAT16: Aim(faster=8, floor=2)}), rounds=(2, 15), apart=True),
        Row(f"train-{small}", f"training step {small} px, batch {batch}", "train", small, batch,
            aims=aims({FLOAT32: Aim(faster=3), BFLOAT16: Aim(faster=5)}), **training),
        Row(f"train-{large}", f"training step {large} px, batch {batch}", "train", large, batch,
            aims=aims({FLOAT32: Aim(faster=5, memory=0.6), BFLOAT16: Aim(faster=8, memory=0.6)},
                      {BFLOAT16: Aim(faster=4, memory=0.5)}), rounds=(3, 15), **training),
        Row("predict", f"psp-predict, {scale.files} files, {large} px", "predict", large, files=scale.files),
    ]  # fmt: skip
    if device == "cuda":
        found.append(Row("kernels", "each kernel against copying and plain PyTorch", "kernels", large, 8))
    return found
