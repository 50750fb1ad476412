"""The judge of digits: what the recognisers say of one sampler's images."""

from math import nan
from typing import Literal

from torch import Tensor
from torch.nn.functional import one_hot

from rdm_rl.digits.recognisers import digit_features, recognised_digits
from rdm_rl.evaluation.distances import frechet_distance, manifold_metrics
from rdm_rl.evaluation.sampler_metrics import Kind, SamplerMetrics


def check_images(name: str, images: Tensor) -> None:
    """Refuse what the recognisers cannot judge: images that are not of shape (N, 3, 32, 32), finite and in [0, 1].

    Raises:
        ValueError: If they are not; ``name`` is what the message calls them.
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

    Images are clamped to [0, 1] first. The teacher's must be drawn with seeds of their own, which no judged sampler
    uses, and serve for every row: otherwise the teacher's own row would be at distance 0, and its true value, the
    distance between two of its draws, is the floor for the students.

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

    Raises:
        ValueError: If shapes or the range of values do not fit.

    Example:
        >>> from rdm_rl.digits.data import load_digits
        >>> train, held_out = load_digits("train"), load_digits("held_out")
        >>> row = judge(train.images, train.labels, name="real", kind="data", data_images=held_out.images)
        >>> row.distance_to_data < 10, row.accuracy
        (True, 1.0)
    """
    check_images("images", images)
    check_images("data_images", data_images)
    if teacher_images is not None:
        check_images("teacher_images", teacher_images)
    if labels.shape not in (images.shape[:1], (len(images), 10)):
        count = len(images)
        raise ValueError(f"{count} images need labels of shape ({count},) or ({count}, 10); got {tuple(labels.shape)}.")
    wanted = labels.cpu() if labels.ndim == 2 else one_hot(labels.cpu(), 10).bool()
    asked = ~wanted.all(1)
    images = images.float().cpu().clamp(0, 1)
    features, real_features = (digit_features(network, pictures) for pictures in (images, data_images))
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
        **vars(overlap),
        accuracy=float(wanted[asked, seen[asked]].double().mean()),
    )
