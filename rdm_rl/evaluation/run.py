"""What models and folders of images are worth, side by side: the same prompts, the same noises, the same networks."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from rdm_rl.evaluation.distances import diversity, paired_distance, pixel_distance, set_distances
from rdm_rl.evaluation.features import Features
from rdm_rl.evaluation.images import ImageFolder, ImageSet, Model, Request, draw, open_folder, requests
from rdm_rl.evaluation.intervals import Estimate, by_halves, mean_by_prompt, paired_difference
from rdm_rl.evaluation.page import library_versions
from rdm_rl.evaluation.results import Result, Results
from rdm_rl.records import Conditioning, PromptBatch
from rdm_rl.rewards.calling import EXTRAS, PlainReward
from rdm_rl.rewards.protocol import DirectionReward

NEIGHBOURS = 3
PICTURES = 8


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How images are drawn and read.

    Args:
        cache_dir: Where drawn images are kept.
        device: Where models, rewards and features run.
        batch_size: Most images at a time.
        show_progress: Whether bars show.
    """

    cache_dir: Path
    device: str | torch.device = "cpu"
    batch_size: int = 8
    show_progress: bool = True


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """What was seen of one set of images: features by name, shape (N, F), and values of each image, shape (N,)."""

    images: ImageSet
    features: dict[str, Tensor]
    values: dict[str, Tensor]


def evaluate(
    models: Sequence[Model | ImageFolder],
    prompts: Sequence[str | Mapping[str, Any]],
    settings: Settings,
    *,
    reference: str | None = None,
    features: Sequence[Features] = (),
    rewards: Mapping[str, Callable[..., Any]] | None = None,
    real_images: Path | None = None,
    seeds: Sequence[int] = (0,),
    facts: Mapping[str, Any] | None = None,
) -> tuple[Results, dict[str, list[Tensor]]]:
    """What models and folders of images are worth for the same prompts and noises, side by side.

    If the reference is a model, the others are compared image by image with what it draws from the same noises, and as
    sets with what it draws from others: so its own row, a draw against another, is the floor that nobody is expected
    to beat.

    Args:
        models: What is compared, in the order of the tables; the teacher is one of them.
        prompts: The prompts, or rows with a ``prompt`` and the columns that rewards read.
        settings: How images are drawn and read.
        reference: Name of the model or folder that the others are compared with, such as the teacher; None for none.
        features: Networks that see the images.
        rewards: Rewards of images, by name.
        real_images: A folder of real images that all sets are compared with, too.
        seeds: A seed for each image of a prompt.
        facts: What the results say of how they were made.

    Returns:
        The results, and the first images of each model by its name, each of shape (3, H, W).

    Raises:
        ValueError: If names are not unique, or a reward cannot judge such images.
    """
    start = time.perf_counter()
    rows = [{"prompt": prompt} if isinstance(prompt, str) else dict(prompt) for prompt in prompts]
    judges = _check(models, rows, seeds, reference, rewards or {}, [network.name for network in features])
    texts = [row["prompt"] for row in rows]
    asked = requests(texts, seeds)
    columns = {name: [row[name] for row in rows for _ in seeds] for name in rows[0] if name != "prompt"}
    sets = {model.name: _open(model, asked, settings) for model in models}
    source = next((model for model in models if model.name == reference), None)
    again = _open(source, requests(texts, seeds, "reference"), settings) if isinstance(source, Model) else None
    look = partial(_look, asked=asked, columns=columns, features=features, settings=settings, per_prompt=len(seeds))
    seen = {
        name: look(images, partner=again if name == reference else sets.get(str(reference)), judges=judges)
        for name, images in sets.items()
    }
    base = seen.get(str(reference))
    against = {str(reference): base if again is None else look(again, partner=None, judges={})}
    if real_images is not None:
        real = open_folder(ImageFolder(name="real images", folder=real_images), len(asked))
        against[real.name] = look(real, partner=None, judges={})
    results = []
    for name, looked in seen.items():
        # A folder is at no distance from itself: only models can be asked again.
        others = {other: known for other, known in against.items() if known is not None and known is not looked}
        pair = others.get(name) if name == reference else base
        results.append(_result(looked, (len(rows), len(seeds)), pair, others, is_reference=name == reference))
    shown = {
        name: [images.read(number) for number in range(0, min(images.count, PICTURES * len(seeds)), len(seeds))]
        for name, images in sets.items()
    }
    found = Results(
        rows=results,
        prompts=texts,
        seeds=list(seeds),
        reference=reference,
        settings={"features": [network.name for network in features], "rewards": list(judges), **(facts or {})},
        versions=library_versions(),
        seconds=time.perf_counter() - start,
    )
    return found, shown


def _check(
    models: Sequence[Model | ImageFolder],
    rows: Sequence[Mapping[str, Any]],
    seeds: Sequence[int],
    reference: str | None,
    rewards: Mapping[str, Callable[..., Any]],
    networks: Sequence[str],
) -> dict[str, PlainReward]:
    """The rewards, ready to be called, if everything that was asked for can be measured."""
    names = [model.name for model in models]
    if not rows or not seeds or not names:
        raise ValueError("There is nothing to evaluate: give at least one model or folder, one prompt and one seed.")
    for what, values in (("models", names), ("seeds", list(seeds)), ("features", networks)):
        if len({*values}) < len(values):
            raise ValueError(f"Two {what} are equal: {', '.join(map(str, values))}. Name each once.")
    if reference is not None and reference not in names:
        raise ValueError(f"reference={reference!r} is none of {', '.join(names)}.")
    if any("/" in name for name in networks):
        raise ValueError(f"The names of features ({', '.join(networks)}) are parts of longer ones: without a slash.")
    judges = {}
    for name, reward in rewards.items():
        if isinstance(reward, DirectionReward) or getattr(reward, "inputs", "images") == "latents":
            raise ValueError(f"The reward {name!r} reads latents or networks of a run; it cannot judge an image.")
        judges[name] = PlainReward(name, reward)
        if judges[name].wants_teacher_images and reference is None:
            raise ValueError(f"The reward {name!r} compares with images of a teacher: set reference to its name.")
        missing = sorted(judges[name].needs.required - {*rows[0], *EXTRAS})
        if missing:
            raise ValueError(f"The reward {name!r} reads {', '.join(missing)}: give prompts with such columns.")
    return judges


def _open(model: Model | ImageFolder, asked: Sequence[Request], settings: Settings) -> ImageSet:
    if isinstance(model, ImageFolder):
        return open_folder(model, len(asked))
    return draw(
        model,
        asked,
        settings.cache_dir,
        device=settings.device,
        batch_size=settings.batch_size,
        show_progress=settings.show_progress,
    )


def _look(
    images: ImageSet,
    *,
    asked: Sequence[Request],
    columns: Mapping[str, Sequence[Any]],
    partner: ImageSet | None,
    features: Sequence[Features],
    judges: Mapping[str, PlainReward],
    settings: Settings,
    per_prompt: int,
) -> _Seen:
    """Show a set of images to all networks, once, a batch at a time. Images that answer no prompt get no reward."""
    partner = partner if images.answers and partner is not None and partner.answers else None
    seen: dict[str, list[Tensor]] = {network.name: [] for network in features}
    values: dict[str, list[Tensor]] = {}
    size = max(1, settings.batch_size // per_prompt) * per_prompt  # Whole prompts: some rewards compare their images.
    with tqdm(total=images.count, desc=f"looking at {images.name}", disable=not settings.show_progress) as bar:
        for numbers, batch in _batches(images, size):
            batch = batch.to(settings.device)
            for network in features:
                seen[network.name].append(network(batch))
            if images.answers:
                others = None if partner is None else _stacked([partner.read(number) for number in numbers])
                if others is not None and others.shape == batch.shape:
                    values.setdefault("pixels/paired", []).append(pixel_distance(batch, others.to(batch)).cpu())
                rows = _rows(asked, columns, numbers, per_prompt)
                for name, judge in judges.items():
                    if judge.wants_teacher_images and others is None:
                        continue
                    given = others.to(batch) if judge.wants_teacher_images and others is not None else None
                    output = judge.start(batch, rows, gradient=False, teacher_images=given)()
                    values.setdefault(f"reward/{name}", []).append(output.values.cpu())
            bar.update(len(batch))
    whole = {name: torch.cat(parts) for name, parts in values.items()}
    return _Seen(
        images=images,
        features={name: torch.cat(parts) for name, parts in seen.items()},
        values={name: value for name, value in whole.items() if len(value) == images.count},
    )


def _batches(images: ImageSet, size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Images with their numbers, as many at a time as are alike in size."""
    numbers: list[int] = []
    batch: list[Tensor] = []
    for number in range(images.count):
        image = images.read(number)
        if batch and (len(batch) == size or image.shape != batch[0].shape):
            yield numbers, torch.stack(batch)
            numbers, batch = [], []
        numbers.append(number)
        batch.append(image)
    yield numbers, torch.stack(batch)


def _stacked(images: Sequence[Tensor]) -> Tensor | None:
    """Images as one batch; None if their sizes differ."""
    return torch.stack(list(images)) if len({image.shape for image in images}) == 1 else None


def _rows(
    asked: Sequence[Request], columns: Mapping[str, Sequence[Any]], numbers: Sequence[int], per_prompt: int
) -> PromptBatch:
    """The prompts of some images, as rewards are given them."""
    return PromptBatch(
        prompts=[asked[number][0] for number in numbers],
        conditioning=Conditioning(),
        group_ids=torch.tensor([number // per_prompt for number in numbers]),
        sample_ids=list(numbers),
        columns={name: [values[number] for number in numbers] for name, values in columns.items()},
    )


def _result(
    looked: _Seen, shape: tuple[int, int], pair: _Seen | None, against: Mapping[str, _Seen], *, is_reference: bool
) -> Result:
    """The numbers of one set of images.

    Args:
        looked: What was seen of it.
        shape: How many prompts, and seeds of each, were asked.
        pair: What was seen of the images that its own are compared with one by one.
        against: What was seen of the sets that it is compared with as a whole, by name.
        is_reference: Whether the others are compared with it.
    """
    images = looked.images
    pair = pair if pair is not None and images.answers and pair.images.answers else None
    values = dict(looked.values)
    estimates: dict[str, Estimate] = {}
    for name, features in looked.features.items():
        if pair is not None:
            values[f"{name}/paired"] = paired_distance(features, pair.features[name])
        if images.answers and shape[1] > 1:
            estimates[f"{name}/diversity"] = mean_by_prompt(diversity(features.view(*shape, -1)))
        for other, known in against.items():
            if min(images.count, known.images.count) > NEIGHBOURS:
                measure = set_distances(features, known.features[name], k=NEIGHBOURS)
                measured = by_halves(measure, shape if images.answers else (images.count, 1))
                estimates |= {f"{name}/{metric}/{other}": estimate for metric, estimate in measured.items()}
    by_image = {name: value.view(shape) for name, value in values.items()}
    return Result(
        name=images.name,
        kind="reference" if is_reference else "student",
        num_images=images.count,
        num_inference_steps=images.num_inference_steps,
        network_evaluations=images.network_evaluations,
        seconds_per_image=images.seconds_per_image,
        trained_on=tuple(images.trained_on),
        values={**estimates, **{name: mean_by_prompt(table) for name, table in by_image.items()}},
        differences={
            name: paired_difference(table, pair.values[name].view(shape))
            for name, table in by_image.items()
            if pair is not None and not is_reference and name.startswith("reward/") and name in pair.values
        },
        by_image={name: table.tolist() for name, table in by_image.items()},
    )
