"""ReDiF: pairs of the same prompt and noise, the teacher's kept images, presets, the control, and what is refused."""

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import DDIMScheduler, StableDiffusionPipeline
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor

from rdm_rl import RDMConfig, ReDiFConfig, ReDiFTrainer
from rdm_rl.networks.roles import Networks
from rdm_rl.records import PromptBatch, Rollout
from rdm_rl.rewards.calling import PlainReward
from rdm_rl.rewards.teacher_match import TeacherMSE
from rdm_rl.student import load_student
from rdm_rl.trainers.methods import method_settings
from rdm_rl.trainers.redif_trainer import PRESETS
from tests.helpers import EXAMPLES, PROMPTS, changed, declare, one_rollout, run_example, same, trained_weights

# As little as possible beside what a test looks at; a teacher of 4 steps and without guidance.
SMALL: dict[str, Any] = {
    "use_cpu": True,
    "disable_tqdm": True,
    "save_strategy": "no",
    "max_steps": 2,
    "logging_steps": 1,
    "num_inference_steps": 2,
    "num_generations": 2,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "per_device_eval_batch_size": 3,
    "guidance_scale": 1.0,
    "teacher_guidance_scale": 1.0,
    "teacher_num_inference_steps": 4,
    "learning_rate": 1e-3,
    "seed": 7,
}
PROBE = "the digit 3"


def redif_trainer(base: Path, folder: Path, reward: Any = None, *, kind: Any = ReDiFTrainer, **settings: Any) -> Any:
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv_out"])
    args = ReDiFConfig(output_dir=str(folder), **{**SMALL, **settings})
    return kind(str(base), reward or TeacherMSE(), args, PROMPTS, peft_config=adapter)


class Spy:
    """A black box that keeps what it is given."""

    wants_teacher_images = True

    def __init__(self) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(self, images: Tensor, prompts: list[str], teacher_images: Tensor) -> Tensor:
        self.seen.append((images.clone(), teacher_images.clone()))
        return TeacherMSE()(images, prompts, teacher_images)


def rewards_of(trainer: ReDiFTrainer, rollout: Rollout) -> Tensor:
    (reward,) = trainer.rewards.values()
    return reward.start(rollout, -1, gradient=False)().values


def probe(trainer: ReDiFTrainer, seeds: list[int]) -> Rollout:
    """The student's chains of one prompt from the noises of these seeds."""
    batch = PromptBatch(
        prompts=[PROBE] * len(seeds),
        conditioning=trainer.family.encode([PROBE] * len(seeds)),
        group_ids=torch.arange(len(seeds)),
        sample_ids=range(len(seeds)),
        noise_seeds=seeds,
    )
    return trainer.sample_student(batch, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How many samples each role was asked about."""
    counted, predict = Counter[str](), Networks.predict

    def counting(networks: Networks, role: Any, x_t: Tensor, *others: Any, **options: Any) -> Tensor:
        counted[role] += len(x_t)
        return predict(networks, role, x_t, *others, **options)

    monkeypatch.setattr(Networks, "predict", counting)
    yield counted


# ----- pairs -----


@pytest.mark.parametrize("settings", [{}, {"group_noise": "own", "noise_pool": None}], ids=["shared", "own"])
def test_student_and_teacher_begin_with_the_same_noise(settings: dict[str, Any], base: Path, tmp_path: Path) -> None:
    spy = Spy()
    trainer = redif_trainer(base, tmp_path, spy, **settings)
    rollout = one_rollout(trainer)
    rewards_of(trainer, rollout)
    ((images, teacher_images),) = spy.seen
    torch.testing.assert_close(images, trainer.family.decode(rollout.sample))

    stock = StableDiffusionPipeline.from_pretrained(base)
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True, clip_sample=False
    )
    call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "pt"}
    expected = stock(rollout.batch.prompts, latents=rollout.states[0], **call).images
    torch.testing.assert_close(teacher_images, expected, rtol=0, atol=0.5 / 255 + 1e-4)  # They have 8 bits.

    first, second = rollout.states[0][0], rollout.states[0][1]  # Of one group.
    assert torch.equal(first, second) == (settings == {})


def test_other_noise_is_rewarded_otherwise(base: Path, tmp_path: Path) -> None:
    trainer = redif_trainer(base, tmp_path)
    first, again, other = rewards_of(trainer, probe(trainer, [5, 5, 6]))
    assert first == again
    assert first != other


def test_a_pair_that_is_broken_is_rewarded_otherwise(base: Path, tmp_path: Path) -> None:
    spy = Spy()
    trainer = redif_trainer(base, tmp_path, spy)
    right = rewards_of(trainer, probe(trainer, [5, 6, 7]))
    ((images, teacher_images),) = spy.seen
    wrong = TeacherMSE()(images, [PROBE] * 3, teacher_images.roll(1, 0))
    assert (right != wrong).all()


def test_a_student_that_does_what_the_teacher_does_has_the_highest_reward(base: Path, tmp_path: Path) -> None:
    trainer = redif_trainer(base, tmp_path, teacher_num_inference_steps=2)
    rewards = rewards_of(trainer, probe(trainer, [5, 6]))  # Untrained, it is the teacher, and here of as many steps.
    assert (rewards <= 0).all()
    assert rewards.min() > -((0.5 / 255) ** 2) - 1e-7  # What rounding to 8 bits leaves.


# ----- the teacher's images are made once -----


def test_a_second_run_makes_no_teacher_image(base: Path, tmp_path: Path, passes: Counter[str]) -> None:
    runs = []
    for name in ("cold", "warm"):
        passes.clear()
        trainer = redif_trainer(base, tmp_path / name, teacher_cache_dir=str(tmp_path / "images"), noise_pool=2)
        trainer.train()
        runs.append((passes["teacher"], trained_weights(trainer)))
    (cold, first), (warm, second) = runs
    kept = list((tmp_path / "images").glob("*/*.png"))
    assert cold == 4 * len(kept) > 0
    assert warm == 0
    assert not changed(first, second)


def test_a_group_with_shared_noise_has_one_teacher_image(base: Path, tmp_path: Path, passes: Counter[str]) -> None:
    for group_noise, images in (("shared", 2), ("own", 4)):
        passes.clear()
        trainer = redif_trainer(base, tmp_path / group_noise, group_noise=group_noise, noise_pool=None)
        rewards_of(trainer, one_rollout(trainer))
        assert passes["teacher"] == 4 * images


def test_images_are_kept_in_the_output_folder_unless_told_otherwise(base: Path, tmp_path: Path) -> None:
    trainer = redif_trainer(base, tmp_path, max_steps=1)
    trainer.train()
    assert list((tmp_path / "teacher-images").glob("*/*.png"))


# ----- presets -----


def test_the_method_is_the_default() -> None:
    plain = ReDiFConfig(use_cpu=True)
    for name, value in method_settings("redif").items():
        assert getattr(plain, name) == value, name


def test_the_preset_of_the_paper() -> None:
    args = ReDiFConfig.from_preset("paper", use_cpu=True, output_dir="somewhere")
    for name, value in PRESETS["paper"].items():
        assert getattr(args, name) == value, name
    assert args.clip_range == (1e-4, 1e-4)
    assert args.teacher_cache_dir == str(Path("somewhere") / "teacher-images")


def test_overrides_win() -> None:
    assert ReDiFConfig.from_preset("paper", use_cpu=True, eta=0.2).eta == 0.2


def test_an_unknown_preset_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'papers' is unknown\. Use one of paper"):
        ReDiFConfig.from_preset("papers")


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_with_guidance_in_rollout_and_update(preset: str, base: Path, tmp_path: Path) -> None:
    settings = {"num_generations": 2, "per_device_train_batch_size": 2, "teacher_num_inference_steps": 2}
    args = ReDiFConfig.from_preset(
        preset,
        output_dir=str(tmp_path),
        **{**{name: SMALL[name] for name in ("use_cpu", "disable_tqdm", "save_strategy", "logging_steps")}, **settings},
        max_steps=1,
    )
    assert args.guidance_scale == 5.0
    adapter = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_v", "conv_out"])
    trainer = ReDiFTrainer(str(base), TeacherMSE(), args, PROMPTS, peft_config=adapter)
    before = trained_weights(trainer)
    logged = trainer.train()  # The ratio is checked on the first update of a rollout.
    assert logged["rewards/TeacherMSE/log_ratio_max"] == logged["rewards/TeacherMSE/log_ratio_min"] == 0
    assert changed(before, trained_weights(trainer))


def test_an_update_without_the_guidance_of_the_rollout_is_stopped(base: Path, tmp_path: Path) -> None:
    class Forgetful(ReDiFTrainer):
        def replay_step(self, rollout: Rollout, step: int) -> Tensor:
            t = rollout.times[step].expand(len(rollout.batch.prompts))
            return self.networks.predict("policy", rollout.states[step], t, rollout.batch.conditioning)

    trainer = redif_trainer(base, tmp_path, kind=Forgetful, guidance_scale=5.0)
    with pytest.raises(RuntimeError, match="guidance"):
        trainer.train()


# ----- the control -----


def test_copies_are_refused_and_the_control_makes_none() -> None:
    with pytest.raises(ValueError, match="they would be copies"):
        ReDiFConfig(use_cpu=True, eta=0.0)
    assert ReDiFConfig(use_cpu=True, reward_gradient="pathwise").num_generations == 1
    assert ReDiFConfig(use_cpu=True, reward_gradient="pathwise", eta=0.4).num_generations == 8


@pytest.mark.parametrize("preset", PRESETS)
def test_the_switch_works_with_every_preset(preset: str) -> None:
    args = ReDiFConfig.from_preset(preset, use_cpu=True, reward_gradient="pathwise")
    assert (args.eta, args.epsilon, args.step_weighting) == (0.0, None, ReDiFConfig(use_cpu=True).step_weighting)
    method = RDMConfig.from_method("redif", use_cpu=True, reward_gradient="pathwise")
    assert (method.eta, method.num_generations, method.step_weighting) == (0.0, 1, "none")


def test_the_control_draws_no_noise_unless_told_to() -> None:
    assert ReDiFConfig(use_cpu=True).eta == 0.4
    assert ReDiFConfig(use_cpu=True, reward_gradient="pathwise").eta == 0.0
    assert ReDiFConfig(use_cpu=True, reward_gradient="pathwise", eta=0.4).eta == 0.4


def test_one_switch_sends_the_gradient_through_the_last_step_alone(base: Path, tmp_path: Path) -> None:
    settings = {"num_inference_steps": 4, "num_replayed_steps": 3, "max_steps": 1}
    replayed: dict[str, list[int]] = {}
    for gradient in ("score_function", "pathwise"):
        steps = replayed[gradient] = []

        class Watched(ReDiFTrainer):
            def replay_step(self, rollout: Rollout, step: int, steps: list[int] = steps) -> Tensor:
                steps.append(step)
                return super().replay_step(rollout, step)

        redif_trainer(base, tmp_path / gradient, kind=Watched, reward_gradient=gradient, **settings).train()
    assert sorted(replayed["score_function"]) == [0, 1, 2]
    assert replayed["pathwise"] == [3]


def test_the_control_follows_the_gradient_of_the_same_reward(base: Path, tmp_path: Path) -> None:
    spy = declare(Spy(), differentiable=True)
    trainer = redif_trainer(base, tmp_path, spy, reward_gradient="pathwise")
    rollout = one_rollout(trainer)
    (judgement,) = trainer.compute_rewards(rollout, 1).values()
    x_0 = rollout.x_0[1].clone().requires_grad_(True)
    rewards = TeacherMSE()(trainer.family.decode(x_0), rollout.batch.prompts, spy.seen[-1][1])
    (expected,) = torch.autograd.grad(rewards.sum(), x_0)
    torch.testing.assert_close(judgement.direction.values, expected * x_0[0].numel())
    assert expected.abs().max() > 0


# ----- what is refused, before a model is looked for -----


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        ("ink", {}, "compares nothing with the teacher's images"),
        (["rdm", TeacherMSE()], {}, "'rdm'.*matches images in pairs"),
        (TeacherMSE(), {"eta": 0.0, "group_noise": "own"}, "leave no random step"),
        (TeacherMSE(), {"num_inference_steps": 1, "group_noise": "own"}, "leave no random step"),
        (TeacherMSE(), {"num_generations": 1}, "compared with the mean of its group"),
        (TeacherMSE(), {"reward_gradient": "pathwise", "epsilon": 0.1}, "epsilon is set"),
    ],
    ids=["no match", "rdm", "no noise", "one step", "no group", "clip without ratio"],
)
def test_refused_before_a_model_is_loaded(reward: Any, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    args = ReDiFConfig(output_dir=str(tmp_path), **{**SMALL, **settings})
    with pytest.raises(ValueError, match=message):
        ReDiFTrainer(tmp_path / "no-such-model", reward, args, PROMPTS)


def test_guidance_and_a_warm_start_are_refused_together(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"guidance_scale=5\.0 asks the policy with guidance, but the warm start"):
        redif_trainer(base, tmp_path, guidance_scale=5.0, warm_start="ode")


def test_a_match_of_ones_own_is_enough(base: Path, tmp_path: Path) -> None:
    def darker(images: Tensor, prompts: list[str], teacher_images: Tensor) -> list[float]:
        return (teacher_images - images).mean((1, 2, 3)).tolist()

    trainer = redif_trainer(base, tmp_path, declare(darker, wants_teacher_images=True))
    assert {*trainer.evaluate()} == {"eval_pixels/paired", "eval_rewards/darker/mean"}
    assert PlainReward("darker", darker).wants_teacher_images


# ----- evaluation -----


def test_the_alignment_is_that_of_the_student_without_randomness(base: Path, tmp_path: Path) -> None:
    spy = Spy()
    trainer = redif_trainer(base, tmp_path, spy)
    numbers = trainer.evaluate()
    ((images, teacher_images),) = spy.seen
    expected = TeacherMSE()(images, [], teacher_images).mean().item()
    assert numbers["eval_rewards/Spy/mean"] == pytest.approx(expected)
    assert len(images) == 3  # per_device_eval_batch_size
    torch.manual_seed(1)
    assert trainer.evaluate() == numbers


def test_watching_changes_nothing(base: Path, tmp_path: Path) -> None:
    runs = []
    for name, settings in (("blind", {}), ("watched", {"eval_strategy": "steps", "eval_steps": 1})):
        trainer = redif_trainer(base, tmp_path / name, max_steps=3, eval_on_start=bool(settings), **settings)
        before = torch.get_rng_state()
        trainer.train()
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(trainer)
    blind, watched = runs
    assert same(trained_weights(blind), trained_weights(watched))
    seen = [entry for entry in watched.state.log_history if "eval_rewards/TeacherMSE/mean" in entry]
    assert [entry["step"] for entry in seen] == [0, 1, 2, 3]
    assert len({entry["eval_rewards/TeacherMSE/mean"] for entry in seen}) > 1  # It follows the student.
    assert {file.name for file in (tmp_path / "watched" / "samples").iterdir()} == {
        f"step-00000{step}.png" for step in range(4)
    }


# ----- what is saved -----


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_the_saved_student_is_the_trained_one_in_stock_diffusers(guidance: float, base: Path, tmp_path: Path) -> None:
    trainer = redif_trainer(base, tmp_path, guidance_scale=guidance, max_steps=1)
    untrained = trainer.generate([PROBE], generator=torch.Generator().manual_seed(3))
    trainer.train()
    trainer.save_model(tmp_path / "student")
    ours = trainer.generate([PROBE] * 2, generator=torch.Generator().manual_seed(3))
    student = load_student(tmp_path / "student", base)
    assert student.call == {"num_inference_steps": 2, "guidance_scale": guidance}
    stock = student.draw([PROBE] * 2, generator=torch.Generator().manual_seed(3), output_type="pt")
    torch.testing.assert_close(ours, stock, rtol=0, atol=2e-5)
    assert not torch.allclose(ours[:1], untrained, rtol=0, atol=2e-5)


# ----- the example for Stable Diffusion -----


def test_the_example_runs_as_a_script(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("cat\ndog\nhorse\nowl\n", encoding="utf-8")
    words = ["--config", EXAMPLES / "redif.yaml", "--model_name_or_path", base, "--dataset", prompts]
    words += ["--output_dir", tmp_path / "run", "--reward_funcs", "teacher_mse", "--held_out", "1", "--use_cpu"]
    words += ["--bf16", "false", "--max_steps", "1", "--per_device_train_batch_size", "2", "--num_generations", "2"]
    words += ["--teacher_num_inference_steps", "2", "--logging_steps", "1", "--eval_strategy", "no"]
    run_example("redif", *words)
    assert re.search(r"teacher_mse/mean: -\d\.\d+ before, -\d\.\d+ after", capsys.readouterr().out)
    weights = load_file(tmp_path / "run" / "pytorch_lora_weights.safetensors")
    assert any(value.any() for name, value in weights.items() if "lora_B" in name)
    use = json.loads((tmp_path / "run" / "student.json").read_text())
    assert use == {"num_inference_steps": 5, "guidance_scale": 5.0}


def test_its_settings_are_the_recommended_ones() -> None:
    given = yaml.safe_load((EXAMPLES / "redif.yaml").read_text(encoding="utf-8"))
    recommended = method_settings("redif")
    spelt_out = recommended.keys() & given.keys()
    assert {"eta", "guidance_scale", "group_noise", "noise_pool", "scale_rewards", "step_weighting"} <= spelt_out
    for name in spelt_out:
        assert given[name] == recommended[name], name
