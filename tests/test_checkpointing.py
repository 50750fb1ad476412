"""A resumed run is the uninterrupted run, bit for bit, and checkpoints are complete or absent."""

import logging
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, TrainerState

from rdm_rl import RDMConfig, RDMTrainer
from rdm_rl.cli.main import main
from rdm_rl.manifest import MANIFEST, damage, read_manifest, write_manifest
from rdm_rl.records import Direction
from rdm_rl.settings import groups
from rdm_rl.trainers.checkpointing import (
    checkpoint_damage,
    checkpoints,
    find_checkpoint,
    read_checkpoint,
    rotate_checkpoints,
    set_aside,
    write_checkpoint,
)
from rdm_rl.trainers.inherited import HONOURED
from rdm_rl.trainers.resuming import KINDS, RULES, check_settings, kind_of
from rdm_rl.weighting import Weighting
from tests.helpers import (
    CHECKPOINTING,
    PROMPTS,
    QUICK,
    StopAfter,
    changed,
    log_numbers,
    quick_trainer,
    same,
    tiny_trainer,
    trained_weights,
)

RUN = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 1,
    "fake_score_updates_per_policy_update": 1,
}


class CountingWeighting(Weighting):
    """A weighting with a running statistic that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def combine(self, directions: dict) -> Direction:
        self.calls += 1
        return Direction(values=self.calls * directions["rdm"].values, applicable=directions["rdm"].applicable)

    def state_dict(self) -> dict:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict) -> None:
        self.calls = state["calls"]


def run(base: Path, folder: Path, *, lora: bool = True, resume=None, stop: int | None = None, **settings) -> RDMTrainer:
    given = {"weighting": CountingWeighting(), "callbacks": [] if stop is None else [StopAfter(stop)]}
    trainer = tiny_trainer(base, folder, lora=lora, given=given, **{**RUN, **settings})
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def everything(trainer: RDMTrainer, folder: Path) -> tuple:
    """All that a run ends with."""
    tensors, state, _ = read_checkpoint(checkpoints(folder)[-1])
    return tensors, state, log_numbers(trainer), trainer.state.global_step, trainer.state.epoch


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RDMTrainer, Path]:
    """An uninterrupted run with adapters, which saves after each update and keeps three checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    return run(base, folder, save_steps=1, save_total_limit=3), folder


def test_interrupted_and_resumed_equals_uninterrupted(
    whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path
) -> None:
    stopped = run(base, tmp_path, stop=2)
    assert stopped.state.global_step == 2
    resumed = run(base, tmp_path, resume=True)
    trainer, folder = whole
    expected, got = everything(trainer, folder), everything(resumed, tmp_path)
    assert expected[0].keys() == {"policy", "fake_score", "ema", "last_samples"}
    for one, two in zip(expected, got, strict=True):
        assert same(one, two)
    at_two = read_checkpoint(folder / "checkpoint-2")[0]
    for name in ("policy", "fake_score", "ema"):
        assert changed(at_two[name], expected[0][name]), "the second half must have done something"
    images = [one.generate(["a", "b"], generator=torch.Generator().manual_seed(1)) for one in (trainer, resumed)]
    assert torch.equal(*images)


def test_full_fine_tuning_resumes_too(base: Path, tmp_path: Path) -> None:
    """By the setting, and without a second warm start."""
    whole = run(base, tmp_path / "whole", lora=False)
    setting = str(tmp_path / "whole" / "checkpoint-2")
    resumed = run(base, tmp_path / "parts", lora=False, resume_from_checkpoint=setting)
    assert same(everything(whole, tmp_path / "whole"), everything(resumed, tmp_path / "parts"))
    assert (tmp_path / "whole" / "warm_start").exists()
    assert not (tmp_path / "parts" / "warm_start").exists(), "a resumed run does not start again"


def test_resuming_with_everything_switched_on(base: Path, tmp_path: Path) -> None:
    settings = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        CHECKPOINTING: True,
        "renoise_distribution": "annealed_beta",
        "renoise_anneal_steps": 2,
        "max_steps": 2,
        "save_steps": 1,
        "warm_start": "none",
        "fake_score_warmup_steps": 0,
        "fake_score_updates_per_policy_update": 2,
        "sampler": "ddim",
        "eta": 0.0,
        "random_times": 5,
    }
    whole = run(base, tmp_path / "whole", **settings)
    resumed = run(base, tmp_path / "parts", resume=tmp_path / "whole" / "checkpoint-1", **settings)
    assert same(everything(whole, tmp_path / "whole"), everything(resumed, tmp_path / "parts"))


def test_resuming_at_the_end_does_nothing(whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path) -> None:
    trainer, folder = whole
    again = run(base, tmp_path, resume=folder / "checkpoint-4")
    assert again.state.global_step == 4
    assert log_numbers(again) == log_numbers(trainer)
    assert same(again.networks.state_dict("policy"), trainer.networks.state_dict("policy"))


def test_files_of_a_checkpoint(whole: tuple[RDMTrainer, Path]) -> None:
    trainer, folder = whole
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    assert {path.name for path in (folder / "checkpoint-4").iterdir()} == {
        "policy.safetensors",
        "fake_score.safetensors",
        "ema.safetensors",
        "last_samples.safetensors",
        "optimizers.pt",
        "rdm_config.json",
        "trainer_state.json",
        "manifest.json",
    }
    assert TrainerState.load_from_json(str(folder / "checkpoint-4" / "trainer_state.json")).global_step == 4
    tensors = read_checkpoint(folder / "checkpoint-4")[0]
    assert same(tensors["policy"], trainer.networks.state_dict("policy"))
    assert len(tensors["policy"]) == len(trainer.networks.parameters("policy"))


# ----- folders -----


def write(folder: Path, step: int = 2, run: str = "run") -> Path:
    """A small checkpoint; what it holds depends on the step."""
    weights = torch.full((64,), float(step))
    tensors = {"policy": {"a": weights}, "fake_score": {"a": weights}, "last_samples": {"x_0": weights / 0}}
    state, made_with = TrainerState(global_step=step), {"num_replayed_steps": step, "rewards": ["a"]}
    write_checkpoint(folder, tensors, {"x": [1, weights]}, made_with, state, run)
    return folder


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def put_nan(file: Path) -> None:
    tensors = load_file(file)
    tensors["a"][3] = float("nan")
    save_file(tensors, file)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip_a_bit, "changed since it was written|no manifest"),
    "cut off": (lambda file: file.write_bytes(file.read_bytes()[:-5]), "cut off"),
    "empty": (lambda file: file.write_bytes(b""), "is empty"),
    "missing": (Path.unlink, "is missing"),
    "of another step": (
        lambda file: shutil.copy(file.parent.parent / "checkpoint-1" / file.name, file),
        "changed since it was written|is of step 1|bytes instead",
    ),
    "NaN": (put_nan, "changed since it was written"),
}
FILES = ("policy.safetensors", "optimizers.pt", "rdm_config.json", "trainer_state.json", MANIFEST)


def test_write_and_read_agree(tmp_path: Path) -> None:
    tensors, state, trainer_state = read_checkpoint(write(tmp_path / "checkpoint-2"))
    assert tensors.keys() == {"policy", "fake_score", "last_samples"}
    assert same(tensors["policy"], {"a": torch.full((64,), 2.0)})
    assert same(state, {"x": [1, torch.full((64,), 2.0)]})
    assert trainer_state.global_step == 2
    assert len({file.stat().st_mode for file in (tmp_path / "checkpoint-2").iterdir()}) == 1, "all can read all"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"], "nothing else is left"


@pytest.mark.parametrize(
    "kind, name", [(kind, name) for kind in DAMAGE for name in (FILES[:1] if kind == "NaN" else FILES)]
)
def test_damage_is_named_and_the_one_before_is_taken(
    kind: str, name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (write(tmp_path / f"checkpoint-{step}", step) for step in (1, 2))
    assert find_checkpoint(tmp_path, True) == second
    hurt, message = DAMAGE[kind]
    hurt(second / name)
    with caplog.at_level(logging.WARNING, "rdm_rl.trainers.checkpointing"):
        assert find_checkpoint(tmp_path, True) == first
    (warning,) = caplog.messages
    with pytest.raises(ValueError, match=message) as refused:
        find_checkpoint(tmp_path, "checkpoint-2")
    for text in (warning, str(refused.value)):
        assert str(second) in text
        assert name in text
        assert "\n" not in text
    assert "checkpoint-1" in str(refused.value)


def test_all_files_of_another_step_are_noticed(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path / "checkpoint-1", 1), tmp_path / "checkpoint-2")
    assert checkpoint_damage(tmp_path / "checkpoint-2") == ["manifest.json is of step 1"]
    assert checkpoint_damage(shutil.copytree(tmp_path / "checkpoint-1", tmp_path / "mine")) == []


def test_what_is_found(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nowhere") == []
    for step in (10, 9, 100):
        write(tmp_path / f"checkpoint-{step}", step)
    write(tmp_path / "checkpoint-best")
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-100"
    assert find_checkpoint(tmp_path / "nowhere", tmp_path / "checkpoint-9") == tmp_path / "checkpoint-9"
    assert find_checkpoint(tmp_path, "checkpoint-9") == tmp_path / "checkpoint-9"


def test_what_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "earlier-1").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no complete checkpoint.*earlier-1"):
        find_checkpoint(tmp_path, True)
    write(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match=r"does not exist. Checkpoints in .*: checkpoint-2\."):
        find_checkpoint(tmp_path, "checkpoint-1")
    student = tmp_path / "student"
    student.mkdir()
    write_manifest(student, [], step=2)
    with pytest.raises(ValueError, match="of no checkpoint"):
        find_checkpoint(tmp_path, student)


def test_the_last_good_one_is_never_deleted(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        write(tmp_path / f"checkpoint-{step}", step)
    newest = tmp_path / "checkpoint-4"
    for limit in (None, 0):
        rotate_checkpoints(newest, limit)
        assert len(checkpoints(tmp_path)) == 4
    (tmp_path / "checkpoint-3" / "policy.safetensors").write_bytes(b"")  # It counts as none of the two.
    rotate_checkpoints(newest, 2)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    rotate_checkpoints(newest, 1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    assert find_checkpoint(tmp_path, True) == newest
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("write_manifest", OSError(28, "No space left on device")),
        ("save_file", SafetensorError("I/O error: No space left on device (os error 28)")),
        ("torch.save", RuntimeError("No space left on device: unexpected pos 802944 vs 802832")),
    ],
    ids=["manifest", "weights", "optimizers"],
)
@pytest.mark.parametrize("step", [2, 3], ids=["of the same step", "of the next"])
def test_what_cannot_be_finished_leaves_what_was_there(
    step: int, place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "checkpoint-2")
    before = read_manifest(tmp_path / "checkpoint-2")
    # A process that was killed; what it left is gone after the next checkpoint.
    (tmp_path / ".checkpoint-7.partial").mkdir()

    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(f"rdm_rl.trainers.checkpointing.{place}", fail)
    whole = "checkpoint-2' is whole: resume from it"
    with pytest.raises(OSError, match=rf"checkpoint-{step}' cannot be written: .*No space.* GiB are free.*{whole}"):
        write(tmp_path / f"checkpoint-{step}", step, run="another")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert read_manifest(tmp_path / "checkpoint-2") == before
    assert checkpoint_damage(tmp_path / "checkpoint-2") == []


def test_a_checkpoint_of_the_same_step_is_replaced_whole(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-2", run="one")
    (tmp_path / "checkpoint-2" / "reference.safetensors").write_bytes(b"of the first run alone")
    write(tmp_path / "checkpoint-2", run="another")
    assert read_manifest(tmp_path / "checkpoint-2")["run"] == "another"
    assert not (tmp_path / "checkpoint-2" / "reference.safetensors").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("role", ["policy", "fake_score", "ema", "reference"])
def test_weights_that_are_not_finite_are_not_saved(role: str, value: float, tmp_path: Path) -> None:
    write(tmp_path / "checkpoint-1", 1)
    tensors = {role: {"a": torch.ones(2), "b": torch.tensor([1.0, value])}}
    with pytest.raises(ValueError, match=rf"After 2 updates the weights of {role} .*'b'.*checkpoint-1'"):
        write_checkpoint(tmp_path / "checkpoint-2", tensors, {}, {}, TrainerState(global_step=2))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize(
    "run, step, stay",
    [("a", 2, {1, 2}), ("a", 9, {1, 2, 3}), ("b", 9, set())],
    ids=["from an earlier one", "from the newest", "another run"],
)
def test_checkpoints_that_are_not_continued_are_set_aside(run: str, step: int, stay: set[int], tmp_path: Path) -> None:
    for number in (1, 2, 3):
        write(tmp_path / f"checkpoint-{number}", number, run="a")
    (tmp_path / "earlier-1").mkdir()
    place = set_aside(tmp_path, run, step)
    assert {path.name for path in checkpoints(tmp_path)} == {f"checkpoint-{number}" for number in stay}
    moved = {1, 2, 3} - stay
    assert place == (tmp_path / "earlier-2" if moved else None)
    assert not moved or {path.name for path in checkpoints(place)} == {f"checkpoint-{number}" for number in moved}
    assert all(not checkpoint_damage(path) for path in tmp_path.rglob("checkpoint-*"))


# ----- runs -----

QUICK_SAVING = {**QUICK, "max_steps": 2, "save_strategy": "steps", "save_steps": 1}


def test_a_run_whose_weights_are_not_finite_keeps_its_good_checkpoint(base: Path, tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                trainer.networks.parameters("policy")[0].data[0] = float("nan")

    settings = {**QUICK_SAVING, "save_total_limit": 1}
    trainer = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": [Poison()]}, **settings)
    with pytest.raises(ValueError, match=r"After 2 updates the weights of policy .*checkpoint-1'"):
        trainer.train()
    assert find_checkpoint(tmp_path, True) == tmp_path / "checkpoint-1"


def test_a_fresh_run_keeps_apart_from_an_earlier_one(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    earlier = quick_trainer(base, tmp_path, ["rdm"], **QUICK_SAVING)
    earlier.train()
    earlier.save_model()
    settings = {**QUICK_SAVING, "seed": 8}
    stopped = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": [StopAfter(1)]}, **settings)
    stopped.train()
    assert str(tmp_path / "earlier-1") in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-1", "earlier-1"}
    assert damage(tmp_path / "earlier-1") == []
    stopped.save_model()
    resumed = quick_trainer(base, tmp_path, ["rdm"], **settings)
    resumed.train(resume_from_checkpoint=True)
    assert "checkpoint-1 after 1 updates" in capsys.readouterr().out
    assert {read_manifest(path)["run"] for path in checkpoints(tmp_path)} == {
        read_manifest(tmp_path / "checkpoint-1")["run"]
    }
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    kept = read_checkpoint(tmp_path / "earlier-1" / "checkpoint-2")[0]
    assert same(kept["policy"], earlier.networks.state_dict("policy"))
    assert damage(tmp_path) == []
    assert not (tmp_path / "earlier-2").exists()


def test_a_student_without_checkpoints_is_set_aside(base: Path, tmp_path: Path) -> None:
    quick_trainer(base, tmp_path, ["rdm"], **QUICK).save_model()
    place = set_aside(tmp_path, "a", 0)
    assert place == tmp_path / "earlier-1" and damage(place) == []
    assert [*tmp_path.iterdir()] == [place]


class Counting(TrainerCallback, ExportableState):
    """Counts updates."""

    def __init__(self, unit: int) -> None:
        self.unit, self.count = unit, 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.count += self.unit

    def state(self) -> dict[str, Any]:
        return {"args": {"unit": self.unit}, "attributes": {"count": self.count}}


def test_callbacks_have_their_state_back(base: Path, tmp_path: Path) -> None:
    for resume in (None, tmp_path / "checkpoint-1"):
        counting = [Counting(1), Counting(10)]
        trainer = quick_trainer(base, tmp_path, ["rdm"], given={"callbacks": counting[:1]}, **QUICK_SAVING)
        trainer.add_callback(counting[1])
        trainer.train(resume)
        assert [each.count for each in counting] == [2, 20]


def test_a_damaged_checkpoint_costs_its_updates_alone(
    whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole[1], tmp_path, dirs_exist_ok=True)
    flip_a_bit(tmp_path / "checkpoint-4" / "ema.safetensors")
    (tmp_path / "checkpoint-3" / "policy.safetensors").write_bytes(b"")
    resumed = run(base, tmp_path, resume=True, save_steps=1)
    assert same(everything(*whole), everything(resumed, tmp_path))
    assert [path.name for path in checkpoints(tmp_path / "earlier-1")] == ["checkpoint-3", "checkpoint-4"]


# ----- settings -----


def test_every_setting_is_of_one_kind() -> None:
    listed = [name for names in KINDS.values() for name in names]
    declared = {name for members in groups(RDMConfig).values() for name in members}
    assert sorted(listed) == sorted({*declared, *HONOURED, "num_processes"})
    assert KINDS.keys() == RULES.keys()
    assert {kind_of(name) for name in ("hooks_of_a_subclass", "rewards", "prompts")} == {"method"}
    assert {kind_of(each.name) for each in fields(RDMConfig) if each.name not in listed} == {"free"}


SETTINGS = {
    **{"num_processes": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_generations": 2},
    **{"dm_normalization": "group", "reward_weights": [1.0, 0.5], "beta": 0.0, "ema_decay": 0.999, "optim": "sgd"},
    **{
        "allow_config_change": False,
        "teacher_cache_dir": "a",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "save_steps": 2,
        "rewards": ["rdm", "a"],
    },
}


@pytest.mark.parametrize(
    "changes, refused, reported",
    [
        ({"num_generations": 4}, "num_generations=2 .now 4.", None),
        ({"optim": "adamw_torch", "allow_config_change": True}, "optim='sgd'", None),
        ({"ema_decay": 0.0, "allow_config_change": True}, r"ema_decay=0\.999 .now 0\.0.", None),
        ({"beta": 0.1, "allow_config_change": True}, "beta", None),
        ({"gradient_accumulation_steps": 1}, r"an update=8 .now 4., gradient_accumulation_steps=2 .now 1.", None),
        ({"num_processes": 2}, r"num_processes=1 .now 2.*set gradient_accumulation_steps=1\.", None),
        (
            {"per_device_train_batch_size": 16, "allow_config_change": True},
            r"an update=8 .now 32.*value\. Resume",
            None,
        ),
        (
            {"num_processes": 2, "gradient_accumulation_steps": 1},
            None,
            ["gradient_accumulation_steps", "num_processes"],
        ),
        (
            {"num_processes": 4, "per_device_train_batch_size": 1},
            None,
            ["num_processes", "per_device_train_batch_size"],
        ),
        ({"dm_normalization": "sample", "learning_rate": 1e-4}, "dm_normalization='group' .now 'sample'", None),
        ({"reward_weights": [1.0, 0.1]}, r"reward_weights=\[1\.0, 0\.5\] .now \[1\.0, 0\.1\]", None),
        ({"rewards": ["rdm"]}, r"rewards=\['rdm', 'a'\] .now \['rdm'\]", None),
        ({"ema_decay": 0.9}, "ema_decay.*allow_config_change=True", None),
        ({"rewards": ["rdm"], "ema_decay": 0.9, "allow_config_change": True}, None, ["ema_decay", "rewards"]),
        ({"teacher_cache_dir": "b"}, None, []),
        ({"teacher_cache_dir": None}, "teacher_cache_dir", None),
        ({"learning_rate": 1e-4, "max_steps": 8, "save_steps": 1}, None, ["learning_rate", "max_steps"]),
        ({"a_setting_of_later": 1}, None, []),
    ],
)
def test_what_may_change_when_a_run_is_resumed(changes: dict, refused: str | None, reported: list | None) -> None:
    now = {**SETTINGS, **changes}
    if refused is None:
        assert [change.name for change in check_settings("checkpoint-2", SETTINGS, now)] == reported
    else:
        with pytest.raises(ValueError, match=f"'checkpoint-2' was made with .*{refused}"):
            check_settings("checkpoint-2", SETTINGS, now)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lora": False}, "adapters=True .now False."),
        ({"num_inference_steps": 3}, "num_inference_steps=2 .now 3."),
        ({"teacher_guidance_scale": 2.0}, r"teacher_guidance_scale=1\.0 .now 2\.0."),
        ({"train_dataset": PROMPTS[:5]}, "prompts='10, .*now '5, "),
    ],
)
def test_a_run_that_would_be_another_one_is_refused(
    change: dict, message: str, whole: tuple[RDMTrainer, Path], base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(base, tmp_path, resume=whole[1] / "checkpoint-2", **change)


def test_changed_rates_count_and_a_changed_method_can_be_meant(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**QUICK_SAVING, "max_steps": 1}
    quick_trainer(base, tmp_path, ["rdm"], **settings).train()
    new = {"max_steps": 2, "learning_rate": 0.0, "weight_decay": 0.5}
    with pytest.raises(ValueError, match=r"weight_decay=0\.0 .now 0\.5"):
        quick_trainer(base, tmp_path, ["rdm"], **{**settings, **new}).train(True)
    trainer = quick_trainer(base, tmp_path, ["rdm"], **{**settings, **new}, allow_config_change=True)
    before = read_checkpoint(tmp_path / "checkpoint-1")[0]["policy"]
    trainer.train(True)
    assert not changed(before, trainer.networks.state_dict("policy")), "the new rate is 0"
    assert trained_weights(trainer)
    assert trainer.optimizers["policy"].optimizer.param_groups[0]["weight_decay"] == 0.5
    text = capsys.readouterr().out
    assert "learning_rate=0.0 (it had 0.001)" in text
    assert "weight_decay=0.5 (it had 0.0)" in text


# ----- the command -----


def test_the_command_lists_and_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in (1, 2):
        write(tmp_path / f"checkpoint-{step}", step)
    assert main(["checkpoint", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[-2:]] == ["checkpoint-1", "checkpoint-2"]
    assert all("complete" in line for line in lines[-2:])
    flip_a_bit(tmp_path / "checkpoint-2" / "policy.safetensors")
    for folder, status in ((tmp_path, 1), (tmp_path / "checkpoint-2", 1), (tmp_path / "checkpoint-1", 0)):
        assert main(["checkpoint", str(folder)]) == status
        assert ("policy.safetensors has changed" in capsys.readouterr().out) == bool(status)
    assert main(["checkpoint", str(tmp_path / "nowhere")]) == 2
    assert "no checkpoint" in capsys.readouterr().err
