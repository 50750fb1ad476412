"""A signal ends a run with its update finished and a checkpoint written, from which the run goes on exactly."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from rdm_rl.cli.main import main
from rdm_rl.trainers.checkpointing import checkpoint_damage, checkpoints, read_checkpoint
from rdm_rl.trainers.resuming import say_how_to_go_on
from rdm_rl.trainers.signals import StopSignals, TrainingStopped
from tests.helpers import QUICK, ROOT, quick_trainer, same

# ----- taking signals -----


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture
def usual() -> Iterator[list[int]]:
    """The signals that had their usual effect, which is to be in this list."""
    seen: list[int] = []
    before = {
        each: signal.signal(each, lambda number, _: seen.append(number)) for each in (signal.SIGTERM, signal.SIGUSR1)
    }
    yield seen
    for each, handler in before.items():
        signal.signal(each, handler)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_is_noted_and_the_second_has_its_usual_effect(
    second: int, usual: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with StopSignals(["SIGTERM", "SIGUSR1"]) as signals:
        signals.begin_updates()
        send(signal.SIGTERM)
        assert (signals.number, usual) == (signal.SIGTERM, [])
        signals.heed()
        send(second)
        assert usual == [second]


def test_a_launcher_that_is_ended_too_sends_a_second_one_that_is_none(
    usual: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with StopSignals(["SIGTERM"]) as signals:
        signals.begin_updates()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        signals.heed()
    assert usual == []


def test_before_the_first_update_there_is_nothing_to_finish(usual: list[int]) -> None:
    with pytest.raises(TrainingStopped) as stopped, StopSignals(["SIGTERM"]):
        send(signal.SIGTERM)
    assert stopped.value.code == 143
    send(signal.SIGTERM)
    assert usual == [signal.SIGTERM], "it has its usual effect again"


def test_one_that_comes_too_late_is_not_lost(usual: list[int]) -> None:
    with StopSignals(["SIGTERM"]) as signals:
        signals.begin_updates()
        send(signal.SIGTERM)
    assert usual == [signal.SIGTERM]


def test_what_is_ignored_or_of_another_thread_is_left_alone(usual: list[int]) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signals = StopSignals(["SIGTERM", "SIGUSR1"])
    thread = threading.Thread(target=signals.__enter__)
    thread.start()
    thread.join()
    send(signal.SIGUSR1)
    with signals:
        send(signal.SIGTERM)
    assert (signals.number, usual) == (0, [signal.SIGUSR1])


# ----- runs -----


class Sender(TrainerCallback):
    def __init__(self, step: int, number: int) -> None:
        self.step, self.number = step, number

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            send(self.number)


@pytest.mark.parametrize(
    ("name", "status", "num_iterations"), [("SIGINT", 130, 1), ("SIGUSR1", 138, 2)], ids=["update", "rollout"]
)
def test_a_run_is_saved_when_its_rollout_is_used_up(
    name: str, status: int, num_iterations: int, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)  # A test process may have been started to ignore it.
    try:
        settings = {**QUICK, "max_steps": 9, "num_iterations": num_iterations, "stop_signals": [name]}
        trainer = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": [Sender(2, number)]}, **settings)
        with pytest.raises(TrainingStopped, match=f"Ended by {name}") as stopped:
            trainer.train()
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    steps = 2 + num_iterations
    assert (stopped.value.code, trainer.state.global_step) == (status, steps)
    assert [path.name for path in checkpoints(tmp_path)] == [f"checkpoint-{steps}"]
    assert f"checkpoint-{steps} with --resume_from_checkpoint true" in capsys.readouterr().err


@pytest.mark.parametrize("warm_start", ["ode", "denoise"])
def test_a_warm_start_that_is_ended_says_what_is_kept(warm_start: str, base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, ["rdm"], **{**QUICK, "warm_start": warm_start})
    assert say_how_to_go_on(trainer, signal.SIGINT).endswith("no checkpoint was written: start again")
    (tmp_path / "warm_start").mkdir()
    assert say_how_to_go_on(trainer, signal.SIGINT).endswith(f"kept in {tmp_path / 'warm_start'}")


REWARD = """
import os, signal
calls = []

def height(images, prompts):
    calls.append(1)
    if len(calls) == 2 and "END_IT" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
    return images[:, :, :8].mean((1, 2, 3)).tolist()
"""


@pytest.mark.usefixtures("onednn")
def test_the_command_ends_with_its_status_and_goes_on_exactly(base: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(REWARD, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan owl\n", encoding="utf-8")
    settings = {**QUICK, "num_inference_steps": 2, "num_replayed_steps": 2, "max_steps": 3}
    settings |= {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "lora_r": 2,
        "use_cpu": True,
        "teacher_guidance_scale": 1,
        "ema_decay": 0.9,
    }
    settings |= {"model_name_or_path": base, "dataset": tmp_path / "prompts.txt", "sanity_check": False}
    words = ["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
    words += ["--reward_funcs", "rdm", f"{tmp_path / 'reward.py'}:height", "--disable_tqdm", "true"]
    saves = ["--save_strategy", "steps", "--save_steps", "3"]

    assert main([*words, *saves, "--output_dir", str(tmp_path / "whole")]) == 0
    parts = [*words, "--output_dir", str(tmp_path / "parts")]
    done = subprocess.run(
        [sys.executable, "-m", "rdm_rl.cli.main", *parts, "--save_strategy", "no"],
        env={**os.environ, "PYTHONPATH": str(ROOT), "END_IT": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 143, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Ended by SIGTERM after 2 updates; go on from ")
    (saved,) = checkpoints(tmp_path / "parts")
    assert saved.name == "checkpoint-2"
    assert not checkpoint_damage(saved)
    assert main([*parts, *saves, "--resume_from_checkpoint", "true"]) == 0
    whole, resumed = (read_checkpoint(tmp_path / name / "checkpoint-3")[:2] for name in ("whole", "parts"))
    assert same(whole, resumed)
