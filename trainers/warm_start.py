r"""The warm start: regression of the student on the teacher's own ODE solutions.

A few-step student that starts from the teacher's weights is far from any sensible sampler, and distribution matching
alone improves it slowly and unevenly. So it is first shown, for states :math:`x_k` of each of its K steps, where to go:
from the pure noise of the first step to where the teacher's deterministic sampler ends, and from where the student's
sampler would lead if it predicted these samples (their re-noising to :math:`t_k`, by default), to

===========  ====================================================================================================
``ode``      where the sampler ends from there; with guidance it is guided anew, and a chain of such steps leaves the
             teacher's samples, the farther the more there are
``denoise``  the samples themselves: no pass of the teacher, but from much noise a blur is the best guess
===========  ====================================================================================================

The loss is L1 on x_0. Solutions are kept on disk in one file for each student time and chunk, so an interrupted
collection continues where it stopped, and students with other steps and samplers share what they have in common.

References:
    | Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al., 2024) initialises its one-step
    | SDXL student by regression on 10,000 teacher pairs (appendix); states at lower noise are our addition.
    | https://arxiv.org/abs/2405.14867
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal
from zlib import crc32

import torch
from torch import Tensor
from tqdm import tqdm, trange

from rdm_rl.files import load_tensors, save_tensors
from rdm_rl.noise_schedule import NoiseSchedule
from rdm_rl.policy import Sampler, X0Predictor, ode_solution
from rdm_rl.randomness import drawn_index, normal, seeded_generator
from rdm_rl.records import Conditioning, Transition
from rdm_rl.settings import Count, Folder, Positive, Size, setting
from rdm_rl.trainers.optimization import RoleOptimizer


@dataclass(frozen=True, kw_only=True)
class OdePairs:
    """States of the student's steps and where it is to go from them.

    Args:
        states: The states, shape (M, C, H, W).
        solutions: Where to go, the same shape.
        times: Time of each state, shape (M,).
        prompts: Prompt of each state, length M.

    Raises:
        ValueError: If the lengths differ.
    """

    states: Tensor
    solutions: Tensor
    times: Tensor
    prompts: Sequence[str]

    def __post_init__(self) -> None:
        """Check the lengths."""
        if self.states.shape != self.solutions.shape or not len(self.states) == len(self.times) == len(self.prompts):
            raise ValueError("states, solutions, times and prompts must have one entry for each pair.")


def solutions_folder(settings: "WarmStartSettings", output_dir: str) -> Path:
    """Where a run keeps the teacher's solutions: ``warm_start_cache_dir``, or a folder in ``output_dir``."""
    return Path(settings.warm_start_cache_dir or Path(output_dir) / "warm_start")


def collect_pairs(
    teacher: X0Predictor,
    encode: Callable[[Sequence[str]], Conditioning],
    schedule: NoiseSchedule,
    *,
    prompts: Sequence[str],
    times: Sequence[float],
    sampler: Sampler,
    solve_later: bool,
    shape: Sequence[int],
    ode_steps: int,
    batch_size: int,
    seed: int,
    folder: Path,
    first: int = 0,
    device: torch.device,
    show_progress: bool = True,
    anywhere: Callable[[bool], bool] = bool,
) -> OdePairs:
    """States and targets for every prompt at every student time; solutions are read from disk where they exist.

    Args:
        teacher: The teacher, guidance included.
        encode: Encodes prompts.
        schedule: The noise schedule.
        prompts: One prompt for each state.
        times: The student's times, the first being the one it starts from.
        sampler: How the student goes from one to the next.
        solve_later: Solve from the states of the others, too, instead of going back to what they were made from.
        shape: The latent shape (C, H, W).
        ode_steps: Teacher steps of a solution from noise.
        batch_size: States solved together.
        seed: Seed of the noise.
        folder: Where the files are; it must be a folder of its own for each teacher and setting.
        first: Number of the first prompt over all processes, so that each draws noise of its own.
        device: Where the networks are.
        show_progress: Show a progress bar.
        anywhere: Whether a condition holds on any process: a sharded teacher runs on all of them or on none.

    Returns:
        The pairs of all times, on the CPU: len(prompts) * len(times) of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    starts, solved = range(0, len(prompts), batch_size), len(times) if solve_later else 1
    ways = [sampler(schedule, *step) for step in pairwise(torch.tensor(times, device=device))]
    pieces = []
    bar = tqdm(total=len(starts) * solved, desc="warm start: teacher solutions", disable=not show_progress)
    for start in starts:
        chunk = list(prompts[start : start + batch_size])
        states = samples = torch.empty(0)
        for t, way, path in zip(times, [None, *ways], _paths(ways), strict=True):
            generator = seeded_generator(seed, "warm_start", first + start, round(t * 10000))
            draw = partial(_states, way, states, samples, (len(chunk), *shape), generator, device)
            if way is None or solve_later:
                name = crc32("\n".join([*chunk, path]).encode())  # Other prompts, or other states, make other files.
                file = folder / f"t{t:.4f}-{start:06d}-{len(chunk)}-{name:08x}.safetensors"
                if anywhere(not file.exists()):
                    states = draw()
                    solutions = ode_solution(teacher, states, t, encode(chunk), schedule, ode_steps)
                    save_tensors(file, {"states": states, "solutions": solutions}, prompts=json.dumps(chunk))
                states, targets = (tensor.to(device) for tensor in _read(file, chunk))
                bar.update()
            else:
                states, targets = draw(), samples
            samples = targets if way is None else samples
            pieces.append((states.cpu(), targets.cpu(), torch.full((len(chunk),), t), chunk))
    bar.close()
    return OdePairs(
        states=torch.cat([piece[0] for piece in pieces]),
        solutions=torch.cat([piece[1] for piece in pieces]),
        times=torch.cat([piece[2] for piece in pieces]),
        prompts=[prompt for piece in pieces for prompt in piece[3]],
    )


def _paths(ways: Sequence[Transition]) -> list[str]:
    """What the states of each time depend on beside samples and new noise: the steps since the noise was last new."""
    path: list[list[float]] = []
    paths = [""]
    for way in ways:
        path = [*(path if way.state_scale else []), [way.x_0_scale.item(), way.state_scale.item(), way.std.item()]]
        paths.append(repr(path))
    return paths


def _states(
    way: Transition | None,
    states: Tensor,
    samples: Tensor,
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
) -> Tensor:
    """Noise for the first time; for the others where the way leads from the states before, predicting the samples."""
    noise = normal(shape, generator, device)
    return noise if way is None else way.next_state(samples, states, noise)


def regress(
    policy: X0Predictor,
    pairs_by_size: Sequence[OdePairs],
    optimizer: RoleOptimizer,
    *,
    step: Callable[[float, Sequence[str]], object],
    encode: Callable[[Sequence[str]], Conditioning],
    steps: int,
    batch_size: int,
    seed: tuple[int, int],
    device: torch.device,
    show_progress: bool = True,
) -> list[float]:
    """Train the policy to jump from each state to the teacher's solution, with an L1 loss on x_0.

    Args:
        policy: The student.
        pairs_by_size: What to learn, for each resolution; one is drawn for each update.
        optimizer: Has the student's gradients.
        step: Updates the student with them, given the loss and the prompts.
        encode: Encodes prompts.
        steps: Updates.
        batch_size: Pairs in an update, drawn with replacement.
        seed: Seed of the draws, and the process's number.
        device: Where the networks are.
        show_progress: Show a progress bar.

    Returns:
        The loss of each update.
    """
    losses = []
    bar = trange(steps, desc="warm start: regression", disable=not show_progress)
    for update in bar:
        pairs = pairs_by_size[drawn_index(len(pairs_by_size), seed[0], "warm_start/resolution", update)]
        generator = seeded_generator(seed[0], "warm_start/batch", update, seed[1])
        rows = torch.randint(len(pairs.states), (batch_size,), generator=generator)
        prompts = [pairs.prompts[row] for row in rows.tolist()]
        conditioning = encode(prompts)
        x_0 = policy(pairs.states[rows].to(device), pairs.times[rows].to(device), conditioning)
        loss = (x_0 - pairs.solutions[rows].to(device)).abs().mean()
        optimizer.backward(loss, 1.0)
        losses.append(loss.item())
        step(losses[-1], prompts)
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return losses


def _read(file: Path, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """States and solutions of a file, after checking that they are what was written, for these prompts."""
    tensors, facts = load_tensors(file)
    if json.loads(facts["prompts"]) != list(prompts):
        raise ValueError(
            f"{file} holds solutions of other prompts. Delete the folder, or set another warm_start_cache_dir."
        )
    return tensors["states"], tensors["solutions"]


@dataclass
class WarmStartSettings:
    """Warm start."""

    warm_start: Literal["ode", "denoise", "none"] = setting(
        "ode",
        "First the policy is regressed on the teacher's ODE solutions. From the states of later steps, to which the "
        "student's sampler leads from these solutions, `ode` solves anew, while `denoise` goes back to them: cheaper, "
        "and as good for a guided teacher, four steps and a long warm start. `none` does without (a student that is "
        "already distilled).",
    )
    warm_start_steps: Count = setting(300, "Updates of that regression.")
    warm_start_learning_rate: Size = setting(1e-4, "Its highest learning rate.")
    warm_start_num_states: Count = setting(1000, "Teacher solutions; with `ode` for each student step.")
    warm_start_ode_steps: Count = setting(
        20, "Teacher steps of a solution from pure noise; proportionally fewer from lower noise."
    )
    warm_start_cache_dir: Folder | None = setting(None, "Where solutions are kept. Default: `output_dir/warm_start`.")
    policy_init_scale: Positive = setting(
        1.0, "What a LoRA in `policy_init` is multiplied by: below 1 the policy begins nearer to the base."
    )
