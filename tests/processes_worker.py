"""What several processes do in the tests: ``torchrun processes_worker.py all|hang BASE OTHER FOLDER``.

Each process leaves what it has in ``FOLDER/<rank>.pt``. The tests import this file, too, and make the same runs in one
process, or compare.
"""

import logging
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import TrainerCallback

from rdm_rl import RDMTrainer
from rdm_rl.networks.sharding import gather, holds_shards, local
from rdm_rl.records import Experience, LossOutput, Rollout
from rdm_rl.rewards.images import ImageDecoder
from rdm_rl.rewards.teacher_images import TeacherCache, TeacherImages
from rdm_rl.trainers.signals import TrainingStopped
from tests.helpers import (
    CHECKPOINTING,
    PROMPTS,
    brightness,
    log_numbers,
    made_once,
    one_rollout,
    tiny_trainer,
    trained_weights,
)

ROOT = Path(__file__).resolve().parents[1]

# Both kinds of rewards act on both steps; the policy has an average. A larger epsilon keeps Adam from making a whole
# step of the rounding error of a gradient that is almost 0.
GNDMR: dict[str, Any] = {
    "warm_start": "none",
    "num_inference_steps": 2,
    "num_replayed_steps": 2,
    "pathwise_steps": "any",
    "ema_decay": 0.9,
    "adam_epsilon": 1e-5,
    "save_strategy": "steps",
    "save_steps": 1,
    "per_device_eval_batch_size": 2,
    "teacher_num_inference_steps": 2,
}
# What runs sharded: one base, a separate teacher with the fake score on it, and three networks.
QUICK = {
    "fake_score_updates_per_policy_update": 1,
    "fake_score_warmup_steps": 0,
    "logging_steps": 2,
    "save_strategy": "no",
}
SHARDED: dict[str, dict[str, Any]] = {
    "shared": {"noise_pool": 4},
    "separate": {"beta": 0.1, CHECKPOINTING: True, "num_iterations": 2, "max_steps": 1, "logging_steps": 1},
    "full": {"lora": False, "max_grad_norm": 0.01, "num_replayed_steps": 1, "save_strategy": "steps"},
}


def left_right(images: Any, prompts: list[str]) -> list[float]:
    """A black box: how much brighter the upper half is."""
    middle = images.shape[2] // 2
    return (images[:, :, :middle] - images[:, :, middle:]).mean((1, 2, 3)).tolist()


def gndmr(base: str, folder: Path, *, given: dict[str, Any] | None = None, **settings: Any) -> RDMTrainer:
    rewards = ["rdm", brightness(), left_right]
    # Of two processes, the second has prompts for one of two batches alone.
    own = {"reward_funcs": rewards, "eval_dataset": PROMPTS[:5], **(given or {})}
    return tiny_trainer(base, folder, given=own, **{**GNDMR, **settings})


def state_of(trainer: RDMTrainer) -> dict[str, Any]:
    """What a run ends with, whole."""
    return {
        "weights": gather(trained_weights(trainer)),
        "average": gather(trainer.average.tensors()),
        "optimizers": gather({role: one.state_dict() for role, one in trainer.optimizers.items()}),
        "log": log_numbers(trainer),
    }


def sharded_case(name: str, base: str, other: str, folder: Path, **settings: Any) -> RDMTrainer:
    given = {"teacher": other} if name == "separate" else {}
    return gndmr(base, folder, given=given, **{**QUICK, **SHARDED[name], **settings})


def ids_of(trainer: RDMTrainer) -> dict[str, Any]:
    """Which samples and groups a process has in the first update."""
    batches = list(trainer.prompt_batches(0))
    return {
        "sample_ids": [id for batch in batches for id in batch.sample_ids],
        "group_ids": [id for batch in batches for id in batch.group_ids.tolist()],
    }


def alone(base: Path, folder: Path) -> dict[str, Any]:
    """What one process ends with that accumulates the gradients of two batches."""
    trainer = gndmr(str(base), folder / "run", gradient_accumulation_steps=2)
    ids = ids_of(trainer)
    trainer.train()
    return {**state_of(trainer), **ids, "evaluation": trainer.evaluate()}


def processes(base: str, other: str, folder: Path) -> dict[str, Any]:
    rank = int(os.environ["RANK"])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer = gndmr(base, folder / "run", ddp_timeout=150)
    parameters = trainer.networks.parameters("policy")
    first = parameters[0].detach().clone()
    parameters[0].data.add_(rank)  # As if the processes had drawn other weights.
    trainer.share_parameters(parameters)
    assert torch.equal(parameters[0], first)
    ids = ids_of(trainer)
    trainer.train()
    trainer.save_model()
    resumed = gndmr(base, folder / "resumed", save_strategy="no")
    resumed.train(folder.parent / "alone" / "run" / "checkpoint-1")
    return {
        **state_of(trainer),
        **ids,
        "resumed": state_of(resumed),
        "evaluation": trainer.evaluate(),
        "world": trainer.accelerator.num_processes,
        "timeout": torch.distributed.group.WORLD._get_backend(torch.device("cpu")).options._timeout.total_seconds(),
        "warnings": [str(one.message) for one in seen],
        "main": trainer.accelerator.is_main_process,
    }


def fail(base: str, folder: Path) -> None:
    """A run whose reward fails on one process, in the second update."""
    calls = []

    def fragile(images: Any, prompts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            raise RuntimeError("the reward's server is gone")
        return [0.5 + 0.1 * index for index in range(len(prompts))]

    gndmr(base, folder / "failed", given={"reward_funcs": ["rdm", fragile]}, save_strategy="no").train()


def hang(base: str, folder: Path) -> None:
    """A run of which one process does not come back from its second reward."""
    calls = []

    def slow(images: Any, prompts: list[str]) -> list[float]:
        calls.append(1)
        if len(calls) == 2 and os.environ["RANK"] == "1":
            (folder / "hanging").touch()
            time.sleep(600)
        return [0.5 + 0.1 * index for index in range(len(prompts))]

    gndmr(base, folder / "run", given={"reward_funcs": ["rdm", slow]}, save_strategy="no", ddp_timeout=10).train()


def sharding(base: str, other: str, folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name in SHARDED:
        trainer = sharded_case(name, base, other, folder / name, shard=True)
        networks = trainer.networks
        assert all(holds_shards(networks.module(role)) for role in ("policy", "teacher", "fake_score"))
        kept = sum(local(one).numel() for one in networks.module("teacher").parameters())
        rollout = one_rollout(trainer)
        trainer.train()
        trainer.save_model()
        result[name] = {
            **state_of(trainer),
            "rollout": rollout.x_0,
            "share": kept / sum(one.numel() for one in networks.module("teacher").parameters()),
            "pictures": trainer.generate(["a", "b"], generator=torch.Generator().manual_seed(1)),
        }
        whole = networks.whole_policy()
        result[name]["whole_policy"] = whole.state_dict()
        result[name]["kind"] = type(whole).__name__
        if name == "shared":
            result["evaluation"] = trainer.evaluate()
            result["teacher_images"] = with_cache_on_one_process(trainer, rollout, folder)
    resumed = sharded_case("full", base, other, folder / "resumed", shard=True)
    resumed.train(folder / "full" / "checkpoint-1")
    result["resumed"] = state_of(resumed)
    return result


def with_cache_on_one_process(trainer: RDMTrainer, rollout: Rollout, folder: Path) -> list[torch.Tensor]:
    """The teacher's images twice, the second time from a cache that only the first process has filled."""
    rank, images = os.environ["RANK"], []
    for attempt in ("first", "second"):
        cache = TeacherCache(folder / ("cache" if rank == "0" else f"{attempt}-cache"), "key", None)
        decoder = ImageDecoder(trainer.family.decode, 4)
        teacher = trainer.networks.predictor("teacher")
        images.append(
            TeacherImages(teacher, trainer.family.schedule, decoder, 2, cache, trainer.on_any_process)(rollout)
        )
    return images


class FaultyOnOne(RDMTrainer):
    """The second process has a direction, and after it a loss, that is not finite."""

    def compute_directions(self, *seen: Any) -> dict[str, Any]:
        directions = super().compute_directions(*seen)
        if os.environ["RANK"] == "1" and self.state.global_step == 0:
            directions["left_right"] = replace(directions["left_right"], values=directions["left_right"].values / 0)
        return directions

    def compute_policy_loss(self, experience: Experience) -> LossOutput:
        output = super().compute_policy_loss(experience)
        wrong = os.environ["RANK"] == "1" and self.state.global_step == 1
        return replace(output, loss=output.loss * math.nan) if wrong else output


def faults(base: str, other: str, folder: Path) -> dict[str, Any]:
    """Updates that one process alone cannot make; each keeps what it says."""
    said: list[str] = []
    logging.getLogger("rdm_rl.trainers.student_run").addFilter(lambda record: said.append(record.getMessage()) or True)
    trainer = gndmr(base, folder / "run", kind=FaultyOnOne, max_steps=3, save_strategy="no")
    skipped, before = [], trained_weights(trainer)

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            after = trained_weights(trainer)
            skipped.append(all(torch.equal(after[name], before[name]) for name in before if name.startswith("policy")))

    trainer.add_callback(Watch())
    trainer.train()
    return {**state_of(trainer), "skipped": skipped, "said": said}


def signalled(base: str, other: str, folder: Path) -> dict[str, Any]:
    """A run of which one process alone gets a signal."""

    class Sender(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 1 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGTERM)

    trainer = gndmr(base, folder / "run", given={"callbacks": [Sender()]}, max_steps=4, save_strategy="no")
    try:
        trainer.train()
    except TrainingStopped as stopped:
        return {"status": stopped.code, "steps": trainer.state.global_step, "message": str(stopped)}
    raise RuntimeError("it was not stopped")


JOBS = {"processes": processes, "faults": faults, "signalled": signalled, "sharding": sharding}


def launch(*words: str) -> tuple[int, str]:
    """Run this file's main program in two processes with gloo; their status, and what they said of errors."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", __file__, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    return done.returncode, done.stderr


def two_processes(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The folder that one process, and then all jobs in two with gloo, fill; the two then fail.

    Most of a launch is its start.
    """

    def fill(folder: Path) -> None:
        pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in pipeline.unet.parameters():
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
        pipeline.save_pretrained(folder / "other")
        torch.save(alone(base, folder / "alone"), folder / "alone" / "0.pt")
        status, errors = launch("all", str(base), str(folder / "other"), str(folder))
        assert status != 0
        (folder / "ended").touch()
        (folder / "errors.txt").write_text(errors, encoding="utf-8")

    return made_once(tmp_path_factory, "two_processes", fill)


def results(folder: Path, job: str) -> list[dict[str, Any]]:
    """What the processes of a job end with."""
    assert (folder / job / "1.pt").is_file(), (folder / "errors.txt").read_text(encoding="utf-8")[-3000:]
    return [torch.load(folder / job / f"{rank}.pt", weights_only=False) for rank in range(2)]


if __name__ == "__main__":
    what, base, other, folder = sys.argv[1:]
    torch.backends.mkldnn.enabled = False  # As in the tests.
    if what == "hang":
        sys.exit(hang(base, Path(folder)))
    for name, job in JOBS.items():
        (Path(folder) / name).mkdir(exist_ok=True)
        torch.save(job(base, other, Path(folder) / name), Path(folder) / name / f"{os.environ['RANK']}.pt")
    (Path(folder) / "failing").touch()
    fail(base, Path(folder))
