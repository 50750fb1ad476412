"""What a run survives: kills at random moments, resumes of every kind, and two thousand updates.

    python -m benchmarks.reliability                  # all three parts
    python -m benchmarks.reliability kills --count 40 40 20
    python -m benchmarks.reliability resumes          # 2n = n + resume + n, bit for bit
    python -m benchmarks.reliability soak             # memory, files and log over 2,000 updates

So many runs are killed uniformly in time, while they write a checkpoint, and uniformly in time with two processes, one
of which is killed and the other must end itself. Kills are SIGKILLs; a killed run is started again with
``resume_from_checkpoint=True`` (afresh, if it is told that there is no checkpoint yet) and must end with the student,
the checkpoint and the log of a run that was left alone. Each run trains a tiny pipeline of the tests on one thread,
in a process forked from one that has everything imported.
"""

import argparse
import itertools
import os
import secrets
import shutil
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import TrainerCallback

from rdm_rl import ReDiFTrainer
from rdm_rl.trainers.checkpointing import checkpoints, read_checkpoint
from rdm_rl.trainers.methods import METHODS, method_settings
from rdm_rl.trainers.rdm_trainer import RDMTrainer
from tests.helpers import QUICK, TIMINGS, brightness, quick_trainer, same, tiny_sd, tiny_trainer
from tests.tiny_pipelines import tiny_dit

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
LIMIT = 240  # Seconds that no run here takes, and that no process may wait for another one.


def height(images: Any, prompts: list[str]) -> list[float]:
    """A black box: how bright the upper half is."""
    return images[:, :, :8].mean((1, 2, 3)).tolist()


def ends(folder: Path, processes: int = 1) -> list[Any]:
    """What a run has left: the student, and the last checkpoint with weights, states and log."""
    tensors, state, progress = read_checkpoint(checkpoints(folder)[-1])
    # Several processes leave the first lag after a resume out of the log.
    left_out = TIMINGS if processes == 1 else {*TIMINGS, "fake_score/lag"}
    log = [{name: value for name, value in row.items() if name not in left_out} for row in progress.log_history]
    return [{file.name: load_file(file) for file in folder.glob("*.safetensors")}, tensors, state, log]


# ----- kills -----


@dataclass
class Process:
    """A forked process, and the end of a pipe in which it says when a save begins and ends."""

    pid: int
    pipe: int

    def saves(self) -> bytes:
        """What it says next."""
        return os.read(self.pipe, 1)

    def ended(self, seconds: float) -> int | None:
        """Its status, minus the signal's number if one ended it; None if it is still there after so many seconds."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None


def fork(work: Callable[[int], None], count: int, log: Path) -> list[Process]:
    """So many processes that join each other and do the work; what they print is in a file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    for rank in range(count):
        reading, writing = os.pipe()
        if pid := os.fork():
            os.close(writing)
            processes.append(Process(pid, reading))
            continue
        status = 1
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1), os.dup2(output, 2)
            if count > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
                os.environ.update({name: str(value) for name, value in names.items()})
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            work(writing)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return processes


def training(base: Any, folder: Path, *, resume: bool) -> Callable[[int], None]:
    """A run of four updates, which says on a pipe when it saves."""

    def train(pipe: int) -> None:
        class Reporting(RDMTrainer):
            def save_checkpoint(self) -> Path:
                os.write(pipe, b"<")
                path = super().save_checkpoint()
                os.write(pipe, b">")
                return path

        settings = {**QUICK, **SAVING, "max_steps": 4, "per_device_train_batch_size": 2, "ema_decay": 0.9}
        trainer = quick_trainer(base, folder, ["rdm"], kind=Reporting, **settings, ddp_timeout=LIMIT // 4)
        try:
            trainer.train(resume_from_checkpoint=resume)
        except FileNotFoundError as error:
            print(error)
            trainer.train()
        trainer.save_model()

    return train


def wait(processes: list[Process]) -> list[int | None]:
    """The statuses of processes; those that do not end are killed."""
    statuses = [process.ended(LIMIT) for process in processes]
    for process, status in zip(processes, statuses, strict=True):
        if status is None:
            os.kill(process.pid, signal.SIGKILL)
            process.ended(LIMIT)
        os.close(process.pipe)
    return statuses


def kill_one(run: list[Process], victim: Process, saves: int, seconds: float) -> tuple[bool, bool, float]:
    """Kill a process so many seconds after its nth save has begun; with 0 saves, after its start.

    Returns:
        Whether it had not ended before, whether it was writing a checkpoint, and the seconds until all had ended.
    """
    said = b""
    while said.count(b"<") < saves and (more := victim.saves()):
        said += more
    time.sleep(seconds)
    os.kill(victim.pid, signal.SIGKILL)
    began = time.monotonic()
    while more := victim.saves():
        said += more
    statuses = wait(run)
    return -signal.SIGKILL in statuses, said.endswith(b"<"), time.monotonic() - began


def kills(base: Any, folder: Path, seed: int, count: int, processes: int, inside_saves: bool) -> None:
    """Kill so many runs, go on with each, and compare."""
    folder.mkdir()
    began, whole = time.monotonic(), folder / "whole"
    run = fork(training(base, whole, resume=False), processes, folder / "whole.log")
    begun, saves = 0.0, []
    while said := run[0].saves():
        saves += [time.monotonic() - begun] if said == b">" else []
        begun = time.monotonic()
    if any(wait(run)):
        sys.exit((folder / "whole.log").read_text())
    length, save, expected = time.monotonic() - began, max(saves), ends(whole, processes)
    print(
        f"{processes} process(es), seed {seed}; a run takes {length:.1f} s, each save at most {save:.3f} s", flush=True
    )
    results, longest = Counter[str](), 0.0
    for trial in itertools.count():
        if results["killed"] == count:
            return
        draw = np.random.default_rng((seed, processes, inside_saves, trial))
        place, log = folder / str(trial), folder / f"{trial}.log"
        run = fork(training(base, place, resume=False), processes, log)
        number = int(draw.integers(len(saves))) + 1 if inside_saves else 0
        seconds = draw.uniform(0, save if inside_saves else length)
        hit, in_a_save, waited = kill_one(run, run[draw.integers(processes)], number, seconds)
        if not hit:  # It had ended.
            continue
        again = wait(fork(training(base, place, resume=True), processes, log))
        outcome = "hung" if waited > LIMIT or None in again else "refused" if any(again) else "wrong"
        if not any(again) and same(ends(place, processes), expected):
            outcome = "survived"
        afresh = "holds no complete checkpoint" in log.read_text()
        results.update({"killed": 1, "in a save": in_a_save, outcome: 1, "begun afresh": afresh})
        longest = max(longest, waited)
        print(f"{dict(results)}; all had ended after {longest:.1f} s at most", flush=True)
        if outcome != "survived":
            print(log.read_text()[-3000:], flush=True)
        shutil.rmtree(place)


# ----- resumes -----

CLASSES = [{"prompt": str(number)} for number in range(8)]
ADAPTER = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"])
REWARDS = {"refl": [brightness()], "ddpo": [height], "redif": ["teacher_mse"], "hybrid": ["rdm", height, brightness()]}
REWARDS |= {name: ["rdm"] for name in ("dmd", "gndm")} | {name: ["rdm", brightness()] for name in ("dmdr", "gndmr")}
REUSE = {"num_iterations": 2, "gradient_accumulation_steps": 2}
VARIANTS: list[tuple[str, bool, dict[str, Any]]] = [
    *((method, lora, {}) for method in METHODS for lora in (True, False)),
    ("hybrid", True, {"num_iterations": 2}),
    ("ddpo", True, {"num_iterations": 2}),
    ("gndmr", False, REUSE),
    ("gndm", True, {"gradient_accumulation_steps": 3, "ema_decay": 0.9}),
    ("hybrid", True, {"reward_weighting": "budget", "reward_start_step": 1, "reward_ramp_steps": 3}),
    ("hybrid", True, {"reward_weighting": "budget", "reward_start_step": 1, **REUSE}),
    ("hybrid", True, {"adaptive_reference": "online"}),
    ("hybrid", True, {"beta": 0.1, "scale_rewards": "batch", "noise_pool": 4}),
    ("redif", True, {"teacher_cache_dir": "teacher-images"}),
    ("gndm", True, {"renoise_distribution": "annealed_beta", "renoise_anneal_steps": 4, "num_replayed_steps": 2}),
    ("gndm", True, {"bf16": True}),
    ("gndm", True, {"lr_scheduler_type": "cosine", "warmup_steps": 2}),
    ("gndmr", True, {"reward_conflict": "project", "optim": "sgd"}),
    ("gndm", True, {"max_steps": -1, "num_train_epochs": 1.2}),
    ("gndm", False, {"ema_decay": 0.0}),
    ("gndm", True, {"eval_strategy": "steps", "eval_steps": 1, "data_seed": 3}),
    ("gndm", True, {"max_grad_norm": 0.0, "group_noise": "shared"}),
]


def resumes(folder: Path) -> None:
    """Make each run of a tiny DiT whole, then again from its first checkpoint, and compare."""
    differ = []
    tiny_dit().save_pretrained(folder / "base")
    for number, (method, lora, settings) in enumerate(VARIANTS):
        basis = {**QUICK, **SAVING, **method_settings(method), "warm_start": "none", "guidance_scale": 1.0}
        basis |= {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "num_inference_steps": 2}
        basis |= {"num_replayed_steps": min(2, basis.get("num_replayed_steps", 1)), "ema_decay": 0.9, **settings}
        if "teacher_cache_dir" in basis:
            basis["teacher_cache_dir"] = str(folder / basis["teacher_cache_dir"])
        whole, parts = folder / f"{number}-whole", folder / f"{number}-parts"
        for place in (whole, parts):
            trainer = tiny_trainer(
                folder / "base",
                place,
                kind=ReDiFTrainer if method == "redif" else RDMTrainer,
                given={"reward_funcs": REWARDS[method], "peft_config": ADAPTER if lora else None},
                train_dataset=CLASSES,
                **basis,
            )
            trainer.train(checkpoints(whole)[0] if place == parts else None)
            trainer.save_model()
        equal = same(ends(whole), ends(parts))
        differ += [] if equal else [number]
        print(f"{method:7}{'LoRA' if lora else 'full'}  {'same' if equal else 'DIFFERS'}  {settings or ''}", flush=True)
    print(f"{len(VARIANTS) - len(differ)} of {len(VARIANTS)} are the same, bit for bit")


# ----- a long run -----


def soak(folder: Path, updates: int) -> None:
    """Make many updates of a tiny DiT, whose updates are quick, and see what grows."""

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % (updates // 10) == 0:
                files = [file for file in folder.rglob("*") if file.is_file()]
                size, log = sum(file.stat().st_size for file in files), len(state.log_history)
                memory = psutil.Process().memory_info().rss / 2**20
                print(f"{state.global_step:6} {memory:9.1f} {len(files):6} {size / 2**10:9.0f} {log:6}", flush=True)

    settings = {**QUICK, **SAVING, "num_inference_steps": 2, "per_device_train_batch_size": 2, "ema_decay": 0.9}
    settings |= {"max_steps": updates, "save_steps": updates // 20, "logging_steps": 10}
    print("update   RSS MiB  files       KiB    log")
    given = {"callbacks": [Watch()]}
    quick_trainer(tiny_dit(), folder, ["rdm", height], given=given, train_dataset=CLASSES, **settings).train()
    last = checkpoints(folder)[-1]
    print({file.name: f"{file.stat().st_size / 2**10:.0f} KiB" for file in sorted(last.iterdir())})


def main() -> None:
    """The parts that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=["all", "kills", "resumes", "soak"], default="all")
    parser.add_argument("--count", type=int, nargs=3, default=[40, 40, 20], help="kills of each kind")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(2**32))
    parser.add_argument("--updates", type=int, default=2000, help="of the soak")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.update(TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
    with TemporaryDirectory() as name:
        folder, began = Path(name), time.monotonic()
        if args.part in ("all", "kills"):
            base = tiny_sd(folder / "sources")  # Before anything joins processes: these are forked.
            for kind, (processes, inside_saves) in enumerate([(1, False), (1, True), (2, False)]):
                if args.count[kind]:
                    kills(base, folder / str(kind), args.seed, args.count[kind], processes, inside_saves)
        if args.part in ("all", "resumes"):
            resumes(folder)
        if args.part in ("all", "soak"):
            soak(folder / "run", args.updates)
        print(f"{(time.monotonic() - began) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
