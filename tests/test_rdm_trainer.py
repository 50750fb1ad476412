"""The trainer: what an update changes, what it must not, and that every setting and every hook acts."""

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from transformers import EarlyStoppingCallback, TrainerCallback

from rdm_rl import RDMTrainer
from rdm_rl.records import Direction, Experience, Judgement, LossOutput, Rollout
from rdm_rl.rewards import register_reward
from rdm_rl.rewards.registry import unregister_reward
from rdm_rl.trainers.arguments import FOREIGN_HOOKS
from rdm_rl.weighting import Weighting
from tests.helpers import (
    CHECKPOINTING,
    PROMPTS,
    QUICK,
    StepAway,
    StopAfter,
    changed,
    latents,
    log_numbers,
    quick_trainer,
    randomize,
    same,
    snapshot,
    tiny_config,
    tiny_sd,
    tiny_trainer,
    trained_weights,
)
from tests.tiny_pipelines import tiny_sd3

# No warm start and no warm-up: only what is under test moves the weights.
COLD = {"warm_start": "none", "fake_score_warmup_steps": 0}
EVALUATED = {"eval_strategy": "steps", "per_device_eval_batch_size": 2, "teacher_num_inference_steps": 2}


def weights(trainer: RDMTrainer) -> dict[str, dict[str, torch.Tensor]]:
    return {
        role: {name: value.clone() for name, value in trainer.networks.state_dict(role).items()}
        for role in ("policy", "fake_score")
    }


def images(trainer: RDMTrainer) -> torch.Tensor:
    return trainer.generate(["the digit 3", "the digit 4"], generator=torch.Generator().manual_seed(1))


# ----- what a step changes -----


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_run_changes_policy_and_fake_score_and_nothing_else(lora: bool, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, lora=lora, max_steps=2, lr_scheduler_type="constant")
    pipeline, networks = trainer.family.pipeline, trainer.networks
    parts = {"unet": networks.module("teacher"), "vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    before, trained = {name: snapshot(part) for name, part in parts.items()}, weights(trainer)
    requires_grad = [one.requires_grad for part in parts.values() for one in part.parameters()]
    trainer.train()
    for role in ("policy", "fake_score"):
        assert changed(trained[role], networks.state_dict(role)) == trained[role].keys()
    assert not changed(before["vae"], snapshot(pipeline.vae))
    assert not changed(before["text_encoder"], snapshot(pipeline.text_encoder))
    moved = changed(before["unet"], snapshot(networks.module("teacher")))
    assert moved == {name for name in before["unet"] if "lora_" in name}
    assert [one.requires_grad for part in parts.values() for one in part.parameters()] == requires_grad


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_each_loss_moves_its_own_role(lora: bool, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, lora=lora)
    randomize(trainer.networks)
    trainer.create_optimizers()
    rollout = trainer.generate_rollout(next(trainer.prompt_batches(0)))
    directions = {name: said.direction for name, said in trainer.compute_rewards(rollout, 1).items()}
    experience = Experience(rollout=rollout, step=1, directions=directions)
    times, noise = torch.full((4,), 0.5), latents(4, 4, 8, 8)
    losses = {
        "policy": lambda: trainer.compute_policy_loss(experience),
        "fake_score": lambda: trainer.compute_fake_score_loss(rollout.x_0[0], rollout.batch.conditioning, times, noise),
    }
    for role, other in (("policy", "fake_score"), ("fake_score", "policy")):
        losses[role]().loss.backward()
        assert all(one.grad is not None for one in trainer.networks.parameters(role))
        assert all(one.grad is None for one in trainer.networks.parameters(other))
        frozen = {id(one) for one in trainer.networks.parameters(role)}
        teacher = trainer.networks.module("teacher").parameters()
        assert all(one.grad is None for one in teacher if id(one) not in frozen)
        for one in trainer.networks.parameters(role):
            one.grad = None


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_two_runs_with_one_seed_are_identical(lora: bool, base: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    trainers = []
    for index, seed in enumerate((7, 7, 8)):
        trainer = tiny_trainer(base, tmp_path / str(index), lora=lora, seed=seed)
        trainer.train()
        trainers.append(trainer)
        torch.rand(index + 1)  # The global state of one run differs from that of the next ...
    first, second, other = trainers
    assert same(weights(first), weights(second))
    assert log_numbers(first) == log_numbers(second)
    assert torch.equal(images(first), images(second))
    assert changed(weights(first)["policy"], weights(other)["policy"])
    torch.manual_seed(1)  # ... and is itself left alone.
    tiny_trainer(base, tmp_path / "state", lora=lora).train()
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_a_loaded_pipeline_is_as_good_as_its_folder(base: Path, tmp_path: Path) -> None:
    from_folder = tiny_trainer(base, tmp_path / "a", **COLD)
    given = tiny_trainer(tiny_sd(tmp_path / "b"), tmp_path / "b", **COLD)
    from_folder.train()
    given.train()
    assert same(weights(from_folder), weights(given))


def test_the_replayed_step_is_the_recorded_one(base: Path, tmp_path: Path) -> None:
    """With an advantage of 0 the loss is 0 exactly only if the replay meets its own prediction."""
    trainer = tiny_trainer(base, tmp_path, num_inference_steps=3)
    randomize(trainer.networks)
    rollout = trainer.generate_rollout(next(trainer.prompt_batches(0)))
    assert rollout.states.shape == (3, 4, 4, 8, 8)
    for step in range(3):
        t = rollout.times[step].expand(4)
        replayed = trainer.networks.predict("policy", rollout.states[step], t, rollout.batch.conditioning)
        assert torch.equal(replayed, rollout.x_0[step])


def test_every_step_is_replayed_sometimes(base: Path, tmp_path: Path) -> None:
    steps = []

    class Recording(RDMTrainer):
        def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Direction]:
            steps.append(step)
            return super().compute_rewards(rollout, step)

    settings = {"per_device_train_batch_size": 1, "num_generations": 1, "fake_score_updates_per_policy_update": 1}
    tiny_trainer(
        base, tmp_path, kind=Recording, num_inference_steps=3, max_steps=8, logging_steps=100, **COLD, **settings
    ).train()
    assert {0, 1, 2} == set(steps)


# ----- prompts -----


def test_batches_are_groups_with_their_columns(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(
        base, tmp_path, per_device_train_batch_size=6, num_generations=3, gradient_accumulation_steps=2
    )
    batches = [batch for update in range(3) for batch in trainer.prompt_batches(update)]
    for batch in batches:
        assert len(batch.prompts) == 6
        for group in (slice(0, 3), slice(3, 6)):
            assert len(set(batch.prompts[group])) == 1
            assert len(set(batch.group_ids[group].tolist())) == 1
            assert {f"the digit {digit}" for digit in batch.columns["digit"][group]} == set(batch.prompts[group])
        expected = trainer.family.encode(batch.prompts).tensors["encoder_hidden_states"]
        torch.testing.assert_close(batch.conditioning.tensors["encoder_hidden_states"], expected)
    assert [sample for batch in batches for sample in batch.sample_ids] == list(range(36))
    first_epoch = [prompt for batch in batches[:5] for prompt in batch.prompts]
    assert sorted(first_epoch) == sorted(row["prompt"] for row in PROMPTS for _ in range(3))


def test_length_of_a_run(base: Path, tmp_path: Path) -> None:
    by_epochs = tiny_trainer(base, tmp_path, max_steps=-1, num_train_epochs=0.5, gradient_accumulation_steps=2, **COLD)
    by_epochs.train()  # 10 prompts, 4 an update.
    assert by_epochs.state.global_step == math.ceil(0.5 * 10 / 4)
    assert by_epochs.state.epoch == pytest.approx(0.8)
    nothing = tiny_trainer(base, tmp_path, max_steps=0, **COLD)
    before = weights(nothing)
    assert nothing.train() == {}
    assert same(before, weights(nothing))
    assert nothing.state.global_step == 0


def test_data_seed_reorders_the_prompts(base: Path, tmp_path: Path) -> None:
    orders = []
    for data_seed in (None, 7, 8):
        trainer = tiny_trainer(base, tmp_path, data_seed=data_seed)
        orders.append(
            [prompt for update in range(5) for batch in trainer.prompt_batches(update) for prompt in batch.prompts]
        )
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]


# ----- bad input, before anything is loaded -----


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"train_dataset": []}, ValueError, "train_dataset is empty"),
        ({"train_dataset": None}, ValueError, "train_dataset is missing"),
        ({"train_dataset": [{"text": "a"}]}, ValueError, r"no 'prompt' column; its rows hold \['text'\]"),
        ({"given": {"eval_dataset": []}}, ValueError, "eval_dataset is empty"),
        ({"given": {"peft_config": {"r": 4}}}, TypeError, "peft_config is a dict. Pass a peft.LoraConfig"),
        ({"given": {"callbacks": [EarlyStoppingCallback(1)]}}, ValueError, "should_training_stop = True"),
        (
            {"given": {"optimizers": (torch.optim.SGD([torch.zeros(1)]), None)}},
            TypeError,
            "Pass a function: lambda parameters",
        ),
        ({"given": {"reward_funcs": "rmd"}}, ValueError, "Did you mean 'rdm'"),
        ({"given": {"reward_funcs": []}}, ValueError, "reward_funcs is empty"),
        ({"reward_weights": [1.0, 2.0]}, ValueError, "2 entries for 1 rewards"),
        ({"base": "/no/such/folder"}, FileNotFoundError, "neither an existing folder nor a hub name"),
        ({"given": {"teacher": "/no/such/folder"}}, FileNotFoundError, "neither an existing folder nor a hub name"),
        ({"given": {"policy_init": "/no/such/folder"}, "warm_start": "none"}, FileNotFoundError, "policy_init"),
        ({"given": {"policy_init": "owner/name"}}, ValueError, "warm_start='none'"),
        ({"given": {"teacher_adapter": "/no/such/folder"}}, FileNotFoundError, "teacher_adapter"),
        ({"offload": ["teacher"]}, ValueError, "there is nothing to move"),
        (
            {"adapter_pass": "added", "bf16": True},
            ValueError,
            r"but bf16=True would round the adapters off\. Set 'beside'",
        ),
        ({"per_device_train_batch_size": 3}, ValueError, "not a multiple of num_generations"),
        ({"num_inference_steps": 0}, ValueError, "must be at least 1"),
    ],
)
def test_bad_input_is_said_before_loading(
    changes: dict, error: type[Exception], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        tiny_trainer(changes.pop("base", base), tmp_path, **changes)


@pytest.mark.parametrize("hook", FOREIGN_HOOKS)
def test_hooks_that_no_run_calls_are_refused(hook: str) -> None:
    trainer = type("Own", (RDMTrainer,), {hook: lambda self: None})
    with pytest.raises(TypeError, match=f"Own.{hook} is a hook of transformers' or TRL's trainers"):
        trainer("unused")


@pytest.mark.parametrize(
    ("hook", "method", "message"),
    [
        ("log", lambda self, logs, start_time: None, "takes (logs, start_time), but a run calls it with (logs): "),
        ("training_step", lambda self, model, inputs, num_items: {}, "a run calls it with (): missing a required"),
        ("compute_distribution_matching", lambda self, x_0, t: x_0, "with (x_0, teacher_x_0, fake_x_0, t, group_ids)"),
        ("generate", lambda self, prompts: None, "with (prompts, generator): "),
    ],
)
def test_hooks_that_a_run_could_not_call_are_refused(hook: str, method: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"Own.{hook} .*{re.escape(message)}"):
        type("Own", (RDMTrainer,), {hook: method})("unused")


def test_hooks_may_take_more_than_they_are_given() -> None:
    own = {"log": lambda self, logs, start_time=None: None, "compute_rewards": lambda self, *given, **named: {}}
    with pytest.raises(ValueError, match="train_dataset is missing"):
        type("Own", (RDMTrainer,), own)("unused")


@pytest.mark.usefixtures("no_loading")
def test_folders_that_hold_no_supported_pipeline(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"without model_index\.json"):
        tiny_trainer(tmp_path, tmp_path)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "KolorsPipeline"}))
    with pytest.raises(ValueError, match="KolorsPipeline, which no family supports"):
        tiny_trainer(tmp_path, tmp_path)


def test_a_teacher_with_other_latents_is_refused(base: Path, tmp_path: Path) -> None:
    other = tiny_sd(tmp_path, seed=1)
    other.unet.register_to_config(sample_size=16)
    with pytest.raises(ValueError, match="must share one latent space"):
        tiny_trainer(base, tmp_path, given={"teacher": other})


# ----- hooks -----


@pytest.mark.parametrize(
    ("hook", "value", "message"),
    [
        ("training_step", torch.zeros(1), "training_step returned a Tensor, but its caller needs a dict"),
        ("compute_policy_loss", None, "compute_policy_loss returned a NoneType, but its caller needs a LossOutput"),
        ("compute_rewards", {}, "judgements of no reward, but the rewards are rdm"),
        ("compute_rewards", {"rdm": torch.zeros(4)}, "for 'rdm', returned a Tensor, but its caller needs a Judgement"),
        ("compute_distribution_matching", torch.zeros(()), r"shape \(\), but it is the direction of predictions of"),
        ("compute_directions", None, "compute_directions returned a NoneType"),
        ("compute_fake_score_loss", torch.zeros(()), "compute_fake_score_loss returned a Tensor"),
        ("evaluate", None, "evaluate returned a NoneType"),
    ],
)
def test_what_a_hook_returns_is_checked(
    hook: str, value: Any, message: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = quick_trainer(base, tmp_path, "rdm", **QUICK, eval_on_start=hook == "evaluate")
    monkeypatch.setattr(trainer, hook, lambda *_: value)
    with pytest.raises((TypeError, ValueError), match=message):
        trainer.train()


def test_however_short_a_run_ends_with_numbers(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, "rdm", **QUICK, max_steps=3, logging_steps=10)
    assert "rewards/rdm/gap" in trainer.train()
    assert [row["step"] for row in trainer.state.log_history if "rewards/rdm/gap" in row] == [3]
    assert "fake_score/lag" in trainer.state.log_history[-1]


class Every(RDMTrainer):
    """Overrides each hook, so that each leaves its own trace."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        self.called: dict[str, int] = {}
        super().__init__(*arguments, **named)

    def _count(self, name: str) -> None:
        self.called[name] = self.called.get(name, 0) + 1

    def create_optimizers(self) -> None:
        self._count("create_optimizers")
        super().create_optimizers()
        self.optimizers["policy"].max_grad_norm = 1e-9

    def generate_rollout(self, batch: Any) -> Rollout:
        self._count("generate_rollout")
        made = super().generate_rollout(batch)
        return Rollout(batch=made.batch, times=made.times, states=made.states, x_0=made.x_0 + 0.5)

    def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Judgement]:
        self._count("compute_rewards")
        made = super().compute_rewards(rollout, step)
        return {**made, "rdm": replace(made["rdm"], metrics={**made["rdm"].metrics, "own": 16.0})}

    def compute_distribution_matching(
        self, x_0: Tensor, teacher_x_0: Tensor, fake_x_0: Tensor, t: Tensor, group_ids: Tensor
    ) -> Tensor:
        self._count("compute_distribution_matching")
        assert teacher_x_0.shape == fake_x_0.shape == x_0.shape
        assert t.shape == group_ids.shape == x_0.shape[:1]
        return 0 * super().compute_distribution_matching(x_0, teacher_x_0, fake_x_0, t, group_ids) + 5

    def compute_advantages(self, rollouts: Any, judgements: Any, statistics: Any) -> list[dict[str, Tensor]]:
        self._count("compute_advantages")
        return super().compute_advantages(rollouts, judgements, statistics)

    def compute_directions(self, rollout: Rollout, step: int, judgements: Any, advantages: Any) -> Any:
        self._count("compute_directions")
        made = super().compute_directions(rollout, step, judgements, advantages)
        return {"rdm": replace(made["rdm"], values=made["rdm"].values - 3)}

    def compute_policy_loss(self, experience: Experience) -> LossOutput:
        self._count("compute_policy_loss")
        made = super().compute_policy_loss(experience)
        return LossOutput(loss=made.loss, metrics={**made.metrics, "own": 11.0, "mine/own": 17.0})

    def compute_fake_score_loss(self, x_0: Tensor, conditioning: Any, t: Tensor, noise: Tensor) -> LossOutput:
        self._count("compute_fake_score_loss")
        made = super().compute_fake_score_loss(x_0, conditioning, t, noise)
        return LossOutput(loss=0.0 * made.loss, metrics={"own": 12.0})

    def state_dict(self) -> dict[str, Any]:
        self._count("state_dict")
        return {"called": dict(self.called)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.loaded = dict(state)

    def training_step(self) -> dict[str, float]:
        self._count("training_step")
        return {**super().training_step(), "own/number": 13.0}

    def evaluate(self) -> dict[str, float]:
        self._count("evaluate")
        return {**super().evaluate(), "own": 14.0}

    def log(self, logs: dict[str, float]) -> None:
        self._count("log")
        super().log({**logs, "own/logged": 15.0})

    def save_model(self, output_dir: str | Path | None = None) -> None:
        self._count("save_model")
        super().save_model(output_dir)
        (Path(output_dir or self.args.output_dir) / "own.txt").write_text("own")


def test_every_hook_is_called_and_acts(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, kind=Every, max_steps=2, eval_steps=1, **EVALUATED, **COLD)
    before = weights(trainer)
    assert {"policy/loss", "eval_own"} <= trainer.train().keys()
    trainer.save_model(tmp_path / "student")
    assert trainer.called == {
        "create_optimizers": 1,
        "generate_rollout": 2,
        "compute_rewards": 2,
        "compute_distribution_matching": 2,
        "compute_advantages": 2,
        "compute_directions": 2,
        "compute_policy_loss": 2,
        # Two updates of two each, and from step 2 on the lag: a step of the last rollout as it was and made again.
        "compute_fake_score_loss": 2 * 2 + 2,
        "training_step": 2,
        "evaluate": 2,
        "log": 4,
        "save_model": 1,
    }
    rows = [row for row in trainer.state.log_history if "policy/loss" in row]
    assert len(rows) == 2
    for row in rows:
        # The direction is 2 everywhere: not rdm's, and half its mean square is 2.
        assert row["policy/loss"] == pytest.approx(2.0, rel=1e-5)
        assert (row["policy/own"], row["fake_score/own"], row["own/number"], row["own/logged"]) == (11, 12, 13, 15)
        assert (row["rewards/rdm/own"], row["mine/own"], row["fake_score/loss"]) == (16, 17, 0)
    assert [row["eval_own"] for row in trainer.state.log_history if "eval_own" in row] == [14.0, 14.0]
    assert not changed(before["fake_score"], trainer.networks.state_dict("fake_score")), "its loss was zeroed"
    assert changed(before["policy"], trainer.networks.state_dict("policy"))
    assert (tmp_path / "student" / "own.txt").exists()


def test_a_subclass_has_state_in_checkpoints(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, kind=Every, max_steps=1, save_strategy="steps", save_steps=1, **COLD)
    trainer.train()
    resumed = tiny_trainer(base, tmp_path, kind=Every, max_steps=2, **COLD)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.loaded["called"]["compute_policy_loss"] == 1


# ----- what the user may bring -----


def test_own_reward_moves_the_policy_where_it_wants(base: Path, tmp_path: Path) -> None:
    reward = StepAway(3.0)
    trainer = tiny_trainer(
        base,
        tmp_path,
        given={"reward_funcs": reward},
        reward_weighting="fixed",
        max_steps=5,
        ema_decay=0,
        num_inference_steps=1,
        learning_rate=3e-3,
        **COLD,
    )
    start, t, prompts = latents(4, 4, 8, 8), torch.ones(4), trainer.family.encode(["a"]).repeat(4)
    before = trainer.networks.predict("policy", start, t, prompts).mean().item()
    trainer.train()
    assert trainer.networks.predict("policy", start, t, prompts).mean().item() > before + 0.1
    row = trainer.state.log_history[0]
    assert row["policy/loss"] == pytest.approx(0.5 * 3**2, rel=1e-5)
    assert {"rewards/away/mean", "rewards/away/std"} <= row.keys()
    assert "rewards/rdm/gap" not in row


def test_rewards_by_name_and_object_with_weights(base: Path, tmp_path: Path) -> None:
    register_reward("away")(StepAway)
    try:
        reward_funcs = ["away", StepAway(2.0, name="more")]
        trainer = tiny_trainer(
            base,
            tmp_path,
            given={"reward_funcs": reward_funcs},
            reward_weighting="fixed",
            reward_weights=[1.0, 0.5],
            max_steps=1,
            **COLD,
        )
    finally:
        unregister_reward("away")
    trainer.train()
    assert trainer.state.log_history[0]["policy/loss"] == pytest.approx(0.5 * (1 + 0.5 * 2) ** 2, rel=1e-5)


def test_own_weighting_decides(base: Path, tmp_path: Path) -> None:
    class Opposite(Weighting):
        def combine(self, directions: Mapping[str, Direction]) -> Direction:
            return Direction(values=-directions["away"].values, applicable=directions["away"].applicable)

    outcomes = []
    for given in ({}, {"weighting": Opposite()}):
        trainer = tiny_trainer(
            base, tmp_path, given={"reward_funcs": StepAway(), **given}, **COLD, num_inference_steps=1
        )
        start, prompts = latents(4, 4, 8, 8), trainer.family.encode(["a"]).repeat(4)
        before = trainer.networks.predict("policy", start, torch.ones(4), prompts).mean().item()
        trainer.train()
        outcomes.append(trainer.networks.predict("policy", start, torch.ones(4), prompts).mean().item() - before)
    assert outcomes[0] > 0 > outcomes[1]


def test_own_optimizers_are_used(base: Path, tmp_path: Path) -> None:
    still, fast = partial(torch.optim.SGD, lr=0.0), partial(torch.optim.SGD, lr=0.5)
    settings = {"lr_scheduler_type": "constant", "ema_decay": 0, "max_grad_norm": 0}
    trainer = tiny_trainer(base, tmp_path, max_steps=1, given={"optimizers": (still, fast)}, **settings, **COLD)
    before = weights(trainer)
    trainer.train()
    assert not changed(before["policy"], trainer.networks.state_dict("policy"))
    assert changed(before["fake_score"], trainer.networks.state_dict("fake_score"))
    assert trainer.state.log_history[0]["fake_score/learning_rate"] == 0.5


def test_callbacks_see_the_run(base: Path, tmp_path: Path) -> None:
    events = []

    class Recorder(TrainerCallback):
        def __getattribute__(self, name: str) -> Any:
            if name.startswith("on_"):
                return lambda args, state, control, **_: events.append((name, state.global_step))
            return super().__getattribute__(name)

    settings = {**EVALUATED, "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    tiny_trainer(base, tmp_path, given={"callbacks": [Recorder()]}, max_steps=2, **settings, **COLD).train()
    assert events[:2] == [("on_init_end", 0), ("on_train_begin", 0)]
    assert events[-1] == ("on_train_end", 2)
    middle = [name for name, _ in events[2:-1]]
    assert middle.count("on_step_begin") == middle.count("on_step_end") == 2
    assert middle.count("on_log") == 3  # Of two updates and an evaluation.
    assert [one for one in events if one[0] in ("on_evaluate", "on_save")] == [("on_evaluate", 2), ("on_save", 2)]


def test_a_callback_can_stop_the_run(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, given={"callbacks": [StopAfter(1)]}, max_steps=5, **COLD)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_callback_can_ask_for_everything(base: Path, tmp_path: Path) -> None:
    class Asks(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            control.should_log = control.should_save = control.should_evaluate = state.global_step == 1

    settings = {**EVALUATED, "max_steps": 2, "logging_strategy": "no", "save_strategy": "no", "eval_strategy": "no"}
    trainer = tiny_trainer(base, tmp_path, given={"callbacks": [Asks()]}, **settings, **COLD)
    trainer.train()
    assert [row["step"] for row in trainer.state.log_history] == [1, 1]  # The update's, and the evaluation's.
    assert (tmp_path / "checkpoint-1").is_dir()
    assert not (tmp_path / "checkpoint-2").exists()
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["step-000001.png"]


def test_a_teacher_with_another_text_encoder_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another noise schedule or text encoder"):
        tiny_trainer(base, tmp_path, given={"teacher": tiny_sd(tmp_path / "other", seed=1)}, **COLD)


def test_a_failed_start_can_be_repeated(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, max_steps=1, **COLD)
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_longer_run_resumes_with_its_own_rate(base: Path, tmp_path: Path) -> None:
    """A run that ended at rate 0 goes on, when it is made longer, at the rate that the longer run has there."""
    short = tiny_trainer(base, tmp_path / "short", max_steps=2, lr_scheduler_type="linear", **COLD)
    short.train()
    folder = short.save_checkpoint()
    longer = tiny_trainer(base, tmp_path / "longer", max_steps=4, lr_scheduler_type="linear", **COLD)
    longer.train(resume_from_checkpoint=folder)
    rates = [row["policy/learning_rate"] for row in longer.state.log_history if "policy/learning_rate" in row]
    assert rates[2:] == pytest.approx([longer.args.learning_rate * share for share in (0.5, 0.25)])


def test_another_teacher_changes_the_direction(base: Path, tmp_path: Path) -> None:
    other, third = tiny_sd(tmp_path / "other", seed=1), tiny_sd(tmp_path / "x", seed=1)
    for pipeline in (other, third):  # They share the student's text encoder; only the U-Net is another.
        pipeline.text_encoder = tiny_sd(tmp_path / "same").text_encoder
    trainers = [
        tiny_trainer(base, tmp_path / str(index), given={"teacher": teacher}, lora=lora, **COLD)
        for index, (teacher, lora) in enumerate([(None, True), (other, True), (third, False)])
    ]
    before = snapshot(other.unet)
    for trainer in trainers:
        trainer.train()
    # Its weights stay; the fake score is an adapter on it.
    assert all("fake_score" in name for name in changed(before, snapshot(other.unet)))
    assert not any(isinstance(one, BaseTunerLayer) and "policy" in one.lora_A for one in other.unet.modules())
    assert changed(weights(trainers[0])["policy"], weights(trainers[1])["policy"])
    # With the student's own base as the teacher little is to be learnt at first; with another there is more.
    gaps = [trainer.state.log_history[0]["rewards/rdm/gap"] for trainer in trainers]
    assert gaps[2] > 10 * gaps[0]


def test_guidance_reaches_the_warm_start_and_the_reward(base: Path, tmp_path: Path) -> None:
    plain, guided = (
        tiny_trainer(base, tmp_path / str(scale), teacher_guidance_scale=scale, max_steps=1) for scale in (1.0, 5.0)
    )
    plain.train()
    guided.train()
    losses = [one.state.log_history[0]["warm_start/loss"] for one in (plain, guided)]
    assert losses[0] != losses[1]
    assert weights(plain)["policy"].keys() == changed(weights(plain)["policy"], weights(guided)["policy"])


# ----- settings -----


def test_learning_rates_follow_their_schedules(base: Path, tmp_path: Path) -> None:
    used: dict[str, list[float]] = {"policy": [], "fake_score": []}

    class Watching(RDMTrainer):
        def create_optimizers(self) -> None:
            super().create_optimizers()
            for role, one in self.optimizers.items():
                one.optimizer.register_step_pre_hook(
                    lambda optimizer, *_, role=role: used[role].append(optimizer.param_groups[0]["lr"])
                )

    settings = {
        "learning_rate": 4e-4,
        "fake_score_learning_rate": 8e-4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }
    trainer = tiny_trainer(
        base, tmp_path, kind=Watching, max_steps=4, warm_start="none", fake_score_warmup_steps=2, **settings
    )
    trainer.train()
    assert used["policy"] == pytest.approx([0, 2e-4, 4e-4, 2e-4])
    # Its own count of updates, 2 of its warm-up and 4 times 2, none of them with a rate of 0.
    assert used["fake_score"] == pytest.approx([8e-4 * (10 - step) / 10 for step in range(10)])


@pytest.mark.parametrize("role", ["policy", "fake_score"])
def test_gradients_are_clipped_per_role(role: str, base: Path, tmp_path: Path) -> None:
    seen: dict[str, list[float]] = {"policy": [], "fake_score": []}

    class Watching(RDMTrainer):
        def create_optimizers(self) -> None:
            super().create_optimizers()
            for name, one in self.optimizers.items():

                def watch(*_: Any, name: str = name) -> None:
                    norms = [parameter.grad.norm() for parameter in self.networks.parameters(name)]
                    seen[name].append(torch.stack(norms).norm().item())

                one.optimizer.register_step_pre_hook(watch)

    limits = {"max_grad_norm": 0.0, "fake_score_max_grad_norm": 0.0}
    limits["max_grad_norm" if role == "policy" else "fake_score_max_grad_norm"] = 1e-3
    trainer = tiny_trainer(
        base,
        tmp_path,
        kind=Watching,
        max_steps=1,
        fake_score_updates_per_policy_update=1,
        given={"reward_funcs": StepAway()},
        **limits,
        **COLD,
    )
    trainer.train()
    other = "fake_score" if role == "policy" else "policy"
    assert seen[role] == pytest.approx([1e-3], rel=1e-3)
    assert seen[other][0] > 1e-2
    for name in (role, other):  # The log tells the norm before clipping.
        assert trainer.state.log_history[0][f"{name}/grad_norm"] > 1e-2


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_bf16_trains_in_float32_on_a_halved_base(lora: bool, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, lora=lora, bf16=True)
    before = weights(trainer)
    trainer.train()
    for role in ("policy", "fake_score"):
        state = trainer.networks.state_dict(role)
        assert all(value.dtype == torch.float32 and value.isfinite().all() for value in state.values())
        assert changed(before[role], state) == state.keys()
    frozen = {
        value.dtype for name, value in trainer.networks.module("teacher").named_parameters() if "lora_" not in name
    }
    assert frozen == {torch.bfloat16}
    assert all(math.isfinite(value) for row in trainer.state.log_history for value in row.values())
    exact = tiny_trainer(base, tmp_path / "exact", lora=lora)
    exact.train()
    torch.testing.assert_close(images(trainer), images(exact), rtol=0, atol=0.05)


def test_fp16_scales_its_losses(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, fp16=True, **COLD)
    before = weights(trainer)
    trainer.train()
    for role in ("policy", "fake_score"):
        assert trainer.optimizers[role].scaler.is_enabled()
        assert all(value.isfinite().all() for value in trainer.networks.state_dict(role).values())
    assert changed(before["fake_score"], trainer.networks.state_dict("fake_score"))


def test_activation_checkpointing_changes_nothing(base: Path, tmp_path: Path) -> None:
    plain = tiny_trainer(base, tmp_path / "plain", **COLD)
    # Older versions of transformers know the other name only.
    frugal = tiny_trainer(base, tmp_path / "frugal", **{CHECKPOINTING: True}, **COLD)
    assert any(getattr(one, "gradient_checkpointing", False) for one in frugal.networks.module("policy").modules())
    plain.train()
    frugal.train()
    assert same(weights(plain), weights(frugal))


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch", "adafactor"])
def test_the_optimizer_is_the_one_named(optim: str, base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, optim=optim, weight_decay=0.1, adam_beta1=0.5, max_steps=1, **COLD)
    before = weights(trainer)
    trainer.train()
    kinds = {type(one.optimizer).__name__.lower() for one in trainer.optimizers.values()}
    assert kinds == {optim.removesuffix("_torch")}
    for one in trainer.optimizers.values():
        assert one.optimizer.param_groups[0]["weight_decay"] == 0.1
        if optim == "adamw_torch":
            assert one.optimizer.param_groups[0]["betas"] == (0.5, 0.999)
    assert changed(before["fake_score"], trainer.networks.state_dict("fake_score"))


def test_warm_up_of_the_fake_score(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, warm_start="none", fake_score_warmup_steps=3, max_steps=0)
    before = weights(trainer)
    trainer.train()
    assert changed(before["fake_score"], trainer.networks.state_dict("fake_score"))
    assert not changed(before["policy"], trainer.networks.state_dict("policy"))
    assert [row["phase_step"] for row in trainer.state.log_history] == [1, 2, 3]
    assert all("fake_score_warmup/loss" in row for row in trainer.state.log_history)


# ----- what is told and shown -----


def test_the_log_says_what_is_documented(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, max_steps=4, logging_steps=2, **COLD)
    result = trainer.train()
    assert [row["step"] for row in trainer.state.log_history] == [2, 4]
    assert result == trainer.state.log_history[-1]
    expected = {
        *("policy/loss", "policy/grad_norm", "policy/learning_rate"),
        *("fake_score/loss", "fake_score/fresh_loss", "fake_score/lag", "fake_score/grad_norm"),
        *("fake_score/learning_rate", "rewards/rdm/gap", "rewards/rdm/mean", "rewards/rdm/std"),
        *(f"rewards/rdm/{name}" for name in ("acted", "direction_rms", "applicable", "faults")),
        *(f"rewards/rdm/{name}" for name in ("frac_zero_std", "lambda")),
        *("images_per_second", "samples_per_second", "memory_gib", "epoch", "step"),
    }
    for row in trainer.state.log_history:
        assert row.keys() == expected
        assert all(math.isfinite(value) for value in row.values())
        assert row["samples_per_second"] == pytest.approx(3 * row["images_per_second"])
        assert row["memory_gib"] > 0.1


def test_the_lag_makes_a_step_of_the_last_rollout_again_with_the_current_policy(base: Path, tmp_path: Path) -> None:
    """Same prompts, state, times and noise for both, so that only the policy's last update differs."""
    asked: list[tuple[str, int, list[int], torch.Tensor, float]] = []

    class Watching(RDMTrainer):
        def _fake_score_loss(self, rollout: Rollout, stream: str, update: int) -> LossOutput:
            made = super()._fake_score_loss(rollout, stream, update)
            asked.append((stream, update, list(rollout.batch.sample_ids), rollout.x_0, made.loss.item()))
            return made

    trainer = tiny_trainer(base, tmp_path, kind=Watching, max_steps=2, num_inference_steps=2, **COLD)
    trainer.train()
    assert [stream for stream, *_ in asked] == [*["fake_score"] * 2, *["health"] * 2, *["fake_score"] * 2]
    last, (again, seen), first = asked[1], asked[2:4], asked[4]
    assert again[:3] == seen[:3]
    assert any(torch.equal(seen[3], last[3][step : step + 1]) for step in range(2))
    assert not torch.equal(again[3], seen[3])
    row = trainer.state.log_history[1]
    assert row["fake_score/fresh_loss"] == first[4], "on samples that it has not learnt"
    assert row["fake_score/lag"] == again[4] - seen[4]
    assert "fake_score/lag" not in trainer.state.log_history[0]


def test_tensorboard_gets_numbers_and_grids(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = tiny_trainer(base, tmp_path, report_to="tensorboard", eval_steps=2, **EVALUATED, **COLD)
    trainer.train()
    (folder,) = {path.parent for path in (tmp_path / "events").rglob("events.*")}
    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()
    expected = {"train/policy/loss", "train/fake_score/lag", "train/rewards/rdm/gap", "eval/pixels/paired"}
    assert expected <= set(tags["scalars"])
    assert [one.step for one in events.Scalars("train/policy/loss")] == [1, 2]
    assert tags["images"] == ["samples"]
    assert [one.step for one in events.Images("samples")] == [2]


class HubStub:
    """Stands for huggingface_hub.HfApi: remembers what it is asked, and looks at the folder at that moment."""

    calls: list[tuple[str, Any]] = []  # noqa: RUF012

    def __init__(self, token: str | None = None) -> None:
        self.calls.append(("token", token))

    def create_repo(self, repo_id: str, **named: Any) -> None:
        self.calls.append(("create_repo", (repo_id, named)))

    def upload_folder(self, **named: Any) -> str:
        files = {path.name for path in Path(named["folder_path"]).rglob("*") if path.is_file()}
        self.calls.append(("upload_folder", ({**named}, files)))
        return "https://hub/commit"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[HubStub]]:
    import sys

    for name, module in list(sys.modules.items()):
        if name.startswith("rdm_rl") and hasattr(module, "HfApi"):
            monkeypatch.setattr(module, "HfApi", HubStub)
    HubStub.calls = []
    yield HubStub


def test_the_student_is_uploaded_after_training(hub: type[HubStub], base: Path, tmp_path: Path) -> None:
    settings = {"hub_model_id": "owner/name", "hub_token": "secret", "hub_private_repo": True, "hub_revision": "dev"}
    trainer = tiny_trainer(base, tmp_path, push_to_hub=True, **settings, **COLD)
    assert hub.calls == []
    trainer.train()
    (_, token), (_, (repo_id, named)), (_, (upload, files)) = hub.calls
    assert (token, repo_id, named["private"], named["exist_ok"]) == ("secret", "owner/name", True, True)
    assert (upload["repo_id"], upload["revision"]) == ("owner/name", "dev")
    assert "2-step student after 2 updates" in upload["commit_message"]
    assert files == {
        *("pytorch_lora_weights.safetensors", "kohya_lora.safetensors"),
        *("scheduler_config.json", "student.json", "base.json", "training.json", "README.md", "manifest.json"),
    }
    assert trainer.push_to_hub() == "https://hub/commit"


def test_an_upload_needs_a_name(hub: type[HubStub], base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="hub_model_id"):
        tiny_trainer(base, tmp_path).push_to_hub()
    assert hub.calls == []


def test_training_again_is_refused(base: Path, tmp_path: Path) -> None:
    """A second warm start would undo what the first run learnt."""
    trainer = tiny_trainer(base, tmp_path, **COLD)
    trainer.train()
    with pytest.raises(RuntimeError, match="already trained"):
        trainer.train()


def test_solutions_of_another_prediction_type_are_kept_apart(base: Path, tmp_path: Path) -> None:
    """Correcting the type in the model's scheduler must not find what the wrong type made."""
    settings = {"warm_start_cache_dir": str(tmp_path / "cache"), "max_steps": 0}
    for kind in ("epsilon", "v_prediction"):
        args = tiny_config(tmp_path / kind, **settings)
        RDMTrainer(tiny_sd(tmp_path / kind, kind), "rdm", args, PROMPTS, peft_config=LoraConfig(r=2)).train()
    assert len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize("flow", [False, True])
def test_random_times_are_an_updates_own_and_only_the_last_is_learnt_from(
    flow: bool, base: Path, tmp_path: Path
) -> None:
    settings = {"sampler": "cps" if flow else "ddim", "eta": 0.0, "random_times": 12, "num_inference_steps": 2}
    pipeline = tiny_sd3(tmp_path / "sd3") if flow else base
    trainer = quick_trainer(pipeline, tmp_path, "rdm", **{**QUICK, **settings, "max_steps": 3})
    walked = [
        [trainer.generate_rollout(replace(batch, sample_ids=range(first, first + 4))) for first in (0, 4)]
        for batch in (next(trainer.prompt_batches(update)) for update in range(5))
    ]
    for one, two in walked:
        assert one.times.shape == (1,) and one.states.shape == one.x_0.shape
        assert torch.equal(one.times, two.times), "other samples of an update"
        assert not torch.equal(one.states, two.states)
        assert torch.equal(one.x_0[0], trainer.replay_step(one, 0).detach())
    assert len({one.times.item() for one, _ in walked}) > 2
    before = trained_weights(trainer)
    trainer.train()
    assert {name.partition("/")[0] for name in changed(before, trained_weights(trainer))} == {"policy", "fake_score"}
    # In use it walks its own two steps.
    assert len(trainer.sample_student(next(trainer.prompt_batches(0)), generator=torch.Generator()).times) == 2
