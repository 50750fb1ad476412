"""Where judged images come from: a model that draws each of them once, or a folder that holds them.

A drawn image is kept in a cache, under a name that says what determines it: the model with its weights and settings,
the prompt and the noise. So a run that was stopped draws only what is missing, another run with the same teacher draws
none of its images again, and an image that is read back is verified.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import median
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from rdm_rl.families.loading import FAMILIES
from rdm_rl.files import cache_key, config_facts, read_json, tensors_checksum, written_whole
from rdm_rl.pixels import read_image
from rdm_rl.randomness import seeded_generator
from rdm_rl.rewards.teacher_images import TeacherCache
from rdm_rl.student import SavedStudent

KINDS_OF_FILES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
Request = tuple[str, int]  # A prompt, and the seed of the noise that its image starts from.


@dataclass(frozen=True, kw_only=True)
class Model:
    """Something that draws images for prompts.

    Args:
        name: What it is called in tables.
        load: Loads it, on the CPU; called when its turn comes, so that one model is in memory at a time.
        trained_on: Names of the rewards that it was trained on, as far as its record says.
    """

    name: str
    load: Callable[[], SavedStudent]
    trained_on: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class ImageFolder:
    """Images in a folder: if there are as many as are asked for, in the order of their names, they are taken for those.

    Args:
        name: What it is called in tables.
        folder: Where they are.
    """

    name: str
    folder: Path


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images that can be read one by one.

    Args:
        name: What they are called in tables.
        read: Gives an image by its number, shape (3, H, W), float32 in [0, 1].
        count: How many there are.
        answers: Whether they are the answers to the prompts that were asked, in order.
        trained_on: Names of the rewards that their model was trained on.
        num_inference_steps: Steps for each image, or None.
        network_evaluations: Samples that went through the denoising network for each image: guidance takes two in a
            step; NaN if unknown.
        seconds_per_image: Wall-clock time for each image, the median over the batches; NaN if unknown.
    """

    name: str
    read: Callable[[int], Tensor]
    count: int
    answers: bool = True
    trained_on: Sequence[str] = ()
    num_inference_steps: int | None = None
    network_evaluations: float = nan
    seconds_per_image: float = nan


class ImageCache(TeacherCache):
    """Images of any model in a folder: one file for each model, prompt and noise."""

    what: ClassVar[str] = "drawn image"
    setting: ClassVar[str] = "cache_dir"


def requests(prompts: Sequence[str], seeds: Sequence[int], stream: str = "images") -> list[Request]:
    """What is asked for: an image of each prompt from each seed, prompt by prompt.

    The noise follows from the seed and the prompt, wherever it stands, so that evaluations with other prompts beside it
    share the image. A prompt that comes again gets other noises, and every model is asked for the same.

    Args:
        prompts: P prompts.
        seeds: S seeds, one for each image of a prompt.
        stream: Another one is another draw.

    Returns:
        P x S prompts with the seeds of their noises.

    Example:
        >>> asked = requests(["a", "a"], [0, 1])
        >>> len(asked), len(set(asked)), asked == requests(["a", "a"], [0, 1])
        (4, 4, True)
    """
    return [
        (prompt, seeded_generator(seed, f"evaluation/{stream}/{prompt}", repetition).initial_seed())
        for prompt, repetition in occurrences(prompts)
        for seed in seeds
    ]


def occurrences(prompts: Sequence[str]) -> list[tuple[str, int]]:
    """Each prompt, and how often it came before.

    Example:
        >>> occurrences(["a", "b", "a"])
        [('a', 0), ('b', 0), ('a', 1)]
    """
    before: Counter[str] = Counter()
    numbered = []
    for prompt in prompts:
        numbered.append((prompt, before[prompt]))
        before[prompt] += 1
    return numbered


def open_folder(source: ImageFolder, asked: int) -> ImageSet:
    """The images of a folder, as they are.

    Args:
        source: The folder.
        asked: How many images were asked for.

    Raises:
        FileNotFoundError: If it holds none.
    """
    files = sorted(file for file in source.folder.rglob("*") if file.suffix.lower() in KINDS_OF_FILES)
    if not files:
        raise FileNotFoundError(
            f"{str(source.folder)!r} holds no images ({', '.join(KINDS_OF_FILES)}), and no student either. Give a "
            "folder that save_model wrote, or one of image files."
        )
    return ImageSet(
        name=source.name,
        read=lambda number: read_image(files[number]),
        count=len(files),
        answers=len(files) == asked,
    )


def draw(
    model: Model,
    asked: Sequence[Request],
    cache_dir: Path,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 8,
    show_progress: bool = True,
) -> ImageSet:
    """A model's images, of which those that the cache lacks are drawn. The model is let go afterwards.

    Each sample has a generator of its own, so that its noise depends on nothing but its seed. (A batch of another size
    may still round otherwise.)

    Args:
        model: The model.
        asked: What to draw.
        cache_dir: Folder of the cache.
        device: Where the model runs.
        batch_size: Most images at a time.
        show_progress: Whether a bar shows.

    Raises:
        OSError: If images cannot be kept.
    """
    student = model.load()
    key = _key(student)
    cache = ImageCache(cache_dir, key)
    missing = [request for request in asked if cache.get(*request) is None]
    cost_file = cache_dir / f"cost-{key}.json"
    if missing:
        student.pipeline.to(device)
        # A stock scheduler of flow models draws the noise of its steps from the global generator.
        size = 1 if student.pipeline.scheduler.config.get("stochastic_sampling") else batch_size
        with tqdm(total=len(missing), desc=f"images of {model.name}", disable=not show_progress) as bar:
            seconds, evaluations = [], 0
            for first in range(0, len(missing), size):
                batch = missing[first : first + size]
                start = time.perf_counter()
                with _counted(student.pipeline) as passed:
                    pictures = _draw_batch(student, batch)
                seconds.append((time.perf_counter() - start) / len(batch))
                evaluations += sum(passed)
                for request, picture in zip(batch, pictures, strict=True):
                    cache.put(*request, torch.from_numpy(np.array(picture.convert("RGB"))))
                bar.update(len(batch))
                cost = {"seconds_per_image": median(seconds), "network_evaluations": evaluations / (first + len(batch))}
                with written_whole(cost_file) as file:
                    file.write_text(json.dumps({**cost, "device": str(device), "batch_size": size}), encoding="utf-8")
    cost = read_json(cost_file) if cost_file.is_file() else {}

    def read(number: int) -> Tensor:
        pixels = cache.get(*asked[number])
        if pixels is None:
            raise OSError(f"An image of {model.name!r} was not kept in {str(cache_dir)!r}: is the disk full?")
        return pixels.movedim(-1, 0).div(255)

    return ImageSet(
        name=model.name,
        read=read,
        count=len(asked),
        trained_on=model.trained_on,
        num_inference_steps=student.num_inference_steps,
        network_evaluations=cost.get("network_evaluations", nan),
        seconds_per_image=cost.get("seconds_per_image", nan),
    )


def _draw_batch(student: SavedStudent, batch: Sequence[Request]) -> list[Any]:
    """Pictures of some requests. The global random state is left as it was."""
    devices = [student.pipeline.device] if student.pipeline.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(batch[0][1])
        return student.draw(
            [prompt for prompt, _ in batch],
            generator=[torch.Generator().manual_seed(noise_seed) for _, noise_seed in batch],
        )


@contextmanager
def _counted(pipeline: Any) -> Iterator[list[int]]:
    """A list that gets the number of samples of every pass through the denoising network."""
    passed: list[int] = []
    network: nn.Module = getattr(pipeline, FAMILIES[type(pipeline).__name__].network_name)

    def count(module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        samples = args[0] if args else options.get("hidden_states", options.get("sample"))
        passed.append(len(samples))

    hook = network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield passed
    finally:
        hook.remove()


def _key(student: SavedStudent) -> str:
    """The name of all that an image depends on besides its prompt and its noise."""
    pipeline: Any = student.pipeline
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    # The key of the parts leaves out adapters that are not the teacher's.
    adapters = {
        f"{name}.{weight}": value.cpu()
        for name, part in parts.items()
        for weight, value in part.state_dict().items()
        if "lora_" in weight
    }
    configs = {
        f"{name}.{adapter}": config_facts(config)
        for name, part in parts.items()
        for adapter, config in getattr(part, "peft_config", {}).items()
    }
    return cache_key(
        parts,
        pipeline=type(pipeline).__name__,
        scheduler=[type(pipeline.scheduler).__name__, config_facts(pipeline.scheduler.config)],
        call=student.call,
        adapters=[tensors_checksum(adapters), configs],
    )
