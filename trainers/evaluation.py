"""What the student is worth while it trains: its images beside the teacher's of the same prompts and noises.

The functions are those of :mod:`rdm_rl.evaluation`, which compares finished students in full.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm import tqdm

from rdm_rl.evaluation.distances import frechet_distance, paired_distance, pixel_distance
from rdm_rl.evaluation.features import Features, find_features
from rdm_rl.randomness import seeded_generators
from rdm_rl.records import PromptBatch, Rollout
from rdm_rl.rewards.kinds import AskedReward, TrainingReward
from rdm_rl.settings import setting

if TYPE_CHECKING:
    from rdm_rl.trainers.student_run import StudentRun

EVALUATION = "evaluation"
"""The stream of the evaluation's samples."""

EVALUATION_SEED = 12345


@dataclass
class EvaluationSettings:
    """Evaluation."""

    eval_features: list[str] | None = setting(
        None,
        "Networks in whose features an evaluation compares the student with the teacher, as `rdm-rl evaluate "
        "--features` takes them: folders or hub names of image models of transformers, or `module:attribute`. They "
        "stay on the device.",
    )


def load_eval_features(sources: Sequence[str] | None, device: torch.device) -> list[Features]:
    """The networks that ``eval_features`` names.

    Args:
        sources: The setting.
        device: Where they run.

    Raises:
        OSError: If one cannot be had.
        ValueError: If one reads no images, or two have one name in the log.
    """
    networks = [find_features(source, device) for source in sources or ()]
    names = [network.name for network in networks]
    if len({*names}) < len(names):
        raise ValueError(f"eval_features={sources} are called {', '.join(names)} in the log. Leave out one of a name.")
    return networks


def check_eval_columns(rewards: Mapping[str, TrainingReward], columns: Mapping[str, Sequence[Any]]) -> None:
    """Check that the evaluation prompts have what rewards read.

    Args:
        rewards: The rewards by name.
        columns: The columns of the evaluation prompts beside the prompt; None where a row has no value.

    Raises:
        ValueError: If a column that a reward needs is empty.
    """
    empty = {name for name, values in columns.items() if all(value is None for value in values)}
    for name, reward in rewards.items():
        missing = sorted(empty & reward.reward.needs.required) if isinstance(reward, AskedReward) else []
        if missing:
            raise ValueError(
                f"The reward {name!r} reads the column(s) {', '.join(missing)}, but eval_dataset has nothing there, "
                "and an evaluation asks every reward. Add the column."
            )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The student's images of some evaluation prompts beside the teacher's, as numbers on the CPU.

    Args:
        values: A value of each image by name, shape (N,); NaN where there is none.
        features: What a network makes of the student's images, and of the teacher's, by its name: shapes (N, F).
    """

    values: Mapping[str, Tensor]
    features: Mapping[str, tuple[Tensor, Tensor]]


def evaluate_student(trainer: "StudentRun", show: Callable[[Rollout], None]) -> dict[str, float]:
    """Draw the evaluation prompts from fixed noise, and measure the images. All processes must ask together.

    The processes share the prompts and make as many passes, so that sharded networks may be among them. Nothing here
    draws from what training draws from, nor, if a reward does, from torch's global generator.

    Args:
        trainer: The trainer.
        show: Called on the first process, with the chains of the first ``per_device_eval_batch_size`` prompts.

    Returns:
        The numbers of :func:`figures`, the same on every process.
    """
    parts: list[tuple[int, Comparison]] = []
    with torch.random.fork_rng([trainer.device] if trainer.device.type == "cuda" else []), torch.no_grad():
        for numbers in tqdm(_batches(trainer), desc="evaluation", leave=False, disable=trainer.hides_progress):
            # A process that has no prompt left draws one again: sharded networks need all processes.
            chains = _draw(trainer, numbers or range(1))
            comparison = _compare(trainer, chains)
            if numbers:
                parts.append((numbers.start, comparison))
            if 0 in numbers:
                show(chains)
    trainer.networks.release_teacher()
    everyone = gather_object(parts) if trainer.accelerator.num_processes > 1 else parts
    return figures([comparison for _, comparison in sorted(everyone, key=lambda part: part[0])])


def _batches(trainer: "StudentRun") -> list[range]:
    """The numbers of the evaluation prompts that this process draws: as many batches on every process."""
    size, process = trainer.args.per_device_eval_batch_size, trainer.accelerator
    count, rank = len(trainer.eval_prompts), process.process_index
    starts = range(rank * size, rank * size + count, size * process.num_processes)
    return [range(count)[start : start + size] for start in starts]


def _draw(trainer: "StudentRun", numbers: range) -> Rollout:
    """The student's chains for some evaluation prompts, a fixed noise each, whatever stands beside them."""
    prompts = trainer.eval_prompts[numbers.start : numbers.stop]
    batch = PromptBatch(
        prompts=prompts,
        conditioning=trainer.family.encode(prompts),
        group_ids=torch.tensor(numbers),
        sample_ids=numbers,
        columns={name: values[numbers.start : numbers.stop] for name, values in trainer.eval_columns.items()},
        noise_seeds=[EVALUATION_SEED + number for number in numbers],
        stream=EVALUATION,
    )
    return trainer.sample_student(batch, generator=seeded_generators(EVALUATION_SEED, EVALUATION, 0, numbers))


def _compare(trainer: "StudentRun", chains: Rollout) -> Comparison:
    """The student's finished images beside the teacher's of the same noises, as rewards are shown both."""
    images, teacher_images = trainer.context.decoder.images(chains), trainer.context.teacher_images(chains)
    values = {"pixels/paired": pixel_distance(images, teacher_images)}
    for name, reward in trainer.rewards.items():
        # One that compares the images of a prompt has none to compare here.
        if isinstance(reward, AskedReward) and not reward.reward.whole_groups:
            values[f"rewards/{name}/mean"] = reward.start(chains, -1, gradient=False)().values
    return Comparison(
        values={name: value.float().cpu() for name, value in values.items()},
        features={network.name: (network(images), network(teacher_images)) for network in trainer.eval_features},
    )


def figures(parts: Sequence[Comparison]) -> dict[str, float]:
    """The means over all images, and distances between the two sets.

    Args:
        parts: The comparisons of some prompts each, with the same names.

    Returns:
        Means by the names of values; for each network ``<network>/paired``, one minus the cosine between the features
        of both images of a prompt, and from two images on ``<network>/frechet``, the Fréchet distance between the sets.
        A name is absent where no image has a value.

    Example:
        >>> part = Comparison(values={"pixels/paired": torch.tensor([0.25, 0.5])}, features={})
        >>> figures([part])
        {'pixels/paired': 0.375}
    """
    values = {name: torch.cat([part.values[name] for part in parts]) for name in parts[0].values}
    numbers = {name: value.nanmean().item() for name, value in values.items() if not bool(value.isnan().all())}
    for name in parts[0].features:
        student, teacher = (torch.cat([part.features[name][which] for part in parts]) for which in (0, 1))
        numbers[f"{name}/paired"] = paired_distance(student, teacher).mean().item()
        if len(student) > 1:
            numbers[f"{name}/frechet"] = frechet_distance(student, teacher)
    return numbers
