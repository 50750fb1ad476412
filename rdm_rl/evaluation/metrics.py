"""What the judged images of one sampler are worth, and the judge."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from math import isfinite, nan
from statistics import fmean, stdev
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from rdm_rl.evaluation.distances import frechet_distance, manifold_metrics
from rdm_rl.evaluation.features import digit_features, recognised_digits

Kind = Literal["data", "teacher", "baseline", "student"]


@dataclass(frozen=True, kw_only=True)
class SamplerMetrics:
    """The measurements of one set of images that one sampler drew. NaN stands for "not measured".

    Args:
        name: What the sampler is called in tables, such as "student, 4 steps". Rows of the same name are repetitions
            with other seeds; tables show their mean and spread.
        kind: Who drew the images. ``data`` marks real images, the floor that no sampler is expected to beat;
            ``baseline`` a few-step sampler to compare with, which gets a row but no headline in the report.
        num_images: How many images were judged. Distances are only comparable between equal numbers.
        num_inference_steps: Steps for each image, or None for real images.
        network_evaluations: Forward passes of the denoiser for each image; guidance takes two in a step.
        seconds_per_image: Wall-clock time for each image.
        distance_to_data: Fréchet distance to held-out real images.
        distance_to_teacher: Fréchet distance to the teacher's images.
        precision: Share of images that look like real ones.
        recall: Share of real images that the sampler covers.
        density: How deep in the real images' neighbourhoods the samples lie; 1 for equal distributions.
        coverage: Share of real images with a sample nearby.
        accuracy: Share of images that show the digit asked for.
        digit_counts: How many images a recogniser reads as each digit, 0 to 9; empty if not measured.
    """

    name: str
    kind: Kind = "student"
    num_images: int
    num_inference_steps: int | None = None
    network_evaluations: int | None = None
    seconds_per_image: float = nan
    distance_to_data: float = nan
    distance_to_teacher: float = nan
    precision: float = nan
    recall: float = nan
    density: float = nan
    coverage: float = nan
    accuracy: float = nan
    digit_counts: tuple[int, ...] = ()


def check_images(name: str, images: Tensor) -> None:
    """Refuse what the recognisers cannot judge.

    Args:
        name: What the images are called in the message.
        images: Images that should be of shape (N, 3, 32, 32), finite and in [0, 1].

    Raises:
        ValueError: If they are not.
    """
    if images.ndim != 4 or images.shape[1:] != (3, 32, 32):
        raise ValueError(f"{name} must have shape (N, 3, 32, 32); got {tuple(images.shape)}.")
    if not bool(images.isfinite().all()):
        raise ValueError(f"{name} hold values that are not finite: look for an overflow in the sampler or the decoder.")
    low, high = images.min().item(), images.max().item()
    # Bicubic enlargement and decoders in half precision overshoot a little; images in [-1, 1] go far beyond this.
    if low < -0.05 or high > 1.05:
        raise ValueError(f"{name} must be in [0, 1]; got [{low:.3g}, {high:.3g}]. Map [-1, 1] by `images / 2 + 0.5`.")


def judge(
    images: Tensor,
    labels: Tensor,
    *,
    name: str,
    data_images: Tensor,
    teacher_images: Tensor | None = None,
    kind: Kind = "student",
    num_inference_steps: int | None = None,
    network_evaluations: int | None = None,
    seconds_per_image: float = nan,
    network: Literal["A", "B"] = "B",
) -> SamplerMetrics:
    """The measurements of one sampler's images of digits.

    Precision, recall, density and coverage are measured against the real images. Choose settings with network A and
    report network B, which was trained independently: a student that only pleases the network it was tuned on is
    found out.

    The teacher's images must be drawn with seeds of their own, which no judged sampler uses, and serve for every row:
    otherwise the teacher's own row would be at distance 0, and its true value, the distance between two of its draws,
    is the floor for the students.

    Args:
        images: The sampler's images, shape (N, 3, 32, 32), in [0, 1].
        labels: The digit that each prompt asked for, shape (N,), int64, or which digits answer it, shape (N, 10),
            bool; prompts that every digit answers do not count for the accuracy.
        name: What the sampler is called in tables.
        data_images: Held-out real images, shape (M, 3, 32, 32), in [0, 1].
        teacher_images: The teacher's images of the same kind of prompts from separate seeds, shape (L, 3, 32, 32), in
            [0, 1], or None to leave that distance out.
        kind: Who drew the images.
        num_inference_steps: Steps for each image.
        network_evaluations: Forward passes of the denoiser for each image.
        seconds_per_image: Wall-clock time for each image.
        network: Which shipped recogniser's features the distances are measured in.

    Returns:
        The measurements. The images are clamped to [0, 1] first.

    Raises:
        ValueError: If shapes or the range of values do not fit.

    Example:
        >>> from rdm_rl.demo.digits import load_digits
        >>> train, held_out = load_digits("train"), load_digits("held_out")
        >>> row = judge(train.images, train.labels, name="real", kind="data", data_images=held_out.images)
        >>> row.distance_to_data < 10, row.accuracy
        (True, 1.0)
    """
    sets = {"images": images, "data_images": data_images}
    for set_name, one in (
        sets.items() if teacher_images is None else (sets | {"teacher_images": teacher_images}).items()
    ):
        check_images(set_name, one)
    if labels.shape not in (images.shape[:1], (len(images), 10)):
        count = len(images)
        raise ValueError(f"{count} images need labels of shape ({count},) or ({count}, 10); got {tuple(labels.shape)}.")
    wanted = labels.cpu() if labels.ndim == 2 else one_hot(labels.cpu(), 10).bool()
    asked = ~wanted.all(1)
    images = images.float().cpu().clamp(0, 1)
    features, real_features = (digit_features(network, one) for one in (images, data_images))
    overlap = manifold_metrics(features, real_features)
    seen = recognised_digits(images)
    return SamplerMetrics(
        name=name,
        kind=kind,
        num_images=len(images),
        num_inference_steps=num_inference_steps,
        network_evaluations=network_evaluations,
        seconds_per_image=seconds_per_image,
        distance_to_data=frechet_distance(features, real_features),
        distance_to_teacher=(
            nan if teacher_images is None else frechet_distance(features, digit_features(network, teacher_images))
        ),
        precision=overlap.precision,
        recall=overlap.recall,
        density=overlap.density,
        coverage=overlap.coverage,
        accuracy=float(wanted[asked, seen[asked]].double().mean()),
        digit_counts=tuple(torch.bincount(seen, minlength=10).tolist()),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A sampler's mean over its repetitions.

    Args:
        mean: The mean of every field. Numbers that no repetition measured are NaN, counts of steps stay None.
        spread: The sample standard deviation of each measured field by name; empty for a single repetition.
        repetitions: How many rows were averaged.
    """

    mean: SamplerMetrics
    spread: dict[str, float]
    repetitions: int


FLOAT_FIELDS = tuple(field.name for field in fields(SamplerMetrics) if field.type is float)


def summarize(rows: Iterable[SamplerMetrics]) -> list[Summary]:
    """The rows of each name averaged, in the order in which the names first appear.

    Args:
        rows: Measurements; rows of the same name are repetitions with other seeds.

    Returns:
        One summary for each name.

    Raises:
        ValueError: If two rows share a name but not the sampler's settings or the number of images.

    Example:
        >>> rows = [SamplerMetrics(name="a", num_images=9, recall=value) for value in (0.2, 0.4)]
        >>> [(one.mean.recall, one.repetitions) for one in summarize(rows)]
        [(0.30000000000000004, 2)]
    """
    groups: dict[str, list[SamplerMetrics]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return [_summary(group) for group in groups.values()]


def _summary(rows: Sequence[SamplerMetrics]) -> Summary:
    """The mean and spread of repetitions."""
    settings = {(row.kind, row.num_images, row.num_inference_steps, row.network_evaluations) for row in rows}
    if len(settings) > 1:
        raise ValueError(
            f"Rows named {rows[0].name!r} differ in kind, number of images, steps or network evaluations: "
            f"{sorted(map(str, settings))}. Give different samplers different names."
        )
    measured = {
        name: [value for value in (getattr(row, name) for row in rows) if isfinite(value)] for name in FLOAT_FIELDS
    }
    first = rows[0]
    return Summary(
        mean=SamplerMetrics(
            name=first.name,
            kind=first.kind,
            num_images=first.num_images,
            num_inference_steps=first.num_inference_steps,
            network_evaluations=first.network_evaluations,
            digit_counts=tuple(sum(counts) for counts in zip(*(row.digit_counts for row in rows), strict=True)),
            **{name: fmean(values) if values else nan for name, values in measured.items()},
        ),
        spread={name: stdev(values) for name, values in measured.items() if len(values) > 1},
        repetitions=len(rows),
    )
