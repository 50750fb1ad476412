"""From a plain reward to a direction, on a real pipeline: the true gradient, in whatever pieces it is computed."""

import asyncio
import threading
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rdm_rl import RDMTrainer
from rdm_rl.records import Judgement, Rollout
from rdm_rl.rewards.kinds import PathwiseReward, WatchedReward
from tests.helpers import (
    CHECKPOINTING,
    QUICK,
    WITHOUT_RDM,
    StepAway,
    batches_of,
    changed,
    count_convolutions,
    declare,
    latents,
    one_rollout,
    quick_trainer,
    snapshot,
    stock_images,
)
from tests.tiny_pipelines import tiny_autoencoder

PATTERNS = latents(10, 3, 16, 16, seed=5)
RANDOM_TIMES = {"random_times": 4, "sampler": "ddim", "eta": 0.0, "num_inference_steps": 2, "reward_weighting": "fixed"}


def likeness(images: Tensor, prompts: list[str], digit: list[int]) -> Tensor:
    """A reward that differs for each digit and is not linear in the image."""
    patterns = PATTERNS[torch.tensor(digit)]
    return ((images * patterns).sum((1, 2, 3)) / 10).tanh() + (images * patterns).square().mean((1, 2, 3))


declare(likeness, differentiable=True)


def directions(
    base: Path, folder: Path, reward: Any, step: int = 0, rollout: Rollout | None = None, **settings: Any
) -> tuple[dict[str, Judgement], Rollout, RDMTrainer]:
    """What a trainer's rewards say of one step of its first rollout, or of another one."""
    rewards = reward if isinstance(reward, list) else [reward]
    trainer = quick_trainer(base, folder, rewards, **{**WITHOUT_RDM, **settings})
    rollout = rollout or one_rollout(trainer)
    return trainer.compute_rewards(rollout, step), rollout, trainer


# ----- the gradient -----


def test_the_direction_is_the_slope_of_the_reward_through_the_decoder(base: Path, tmp_path: Path) -> None:
    """Finite differences in float64, decoded by hand."""
    settings = {"per_device_train_batch_size": 6, "decode_batch_size": 4, "reward_batch_size": 5}
    made, rollout, trainer = directions(base, tmp_path, likeness, **settings)
    one, digits = made["likeness"], rollout.batch.columns["digit"]
    vae = deepcopy(trainer.family.pipeline.vae).double()

    def reward(x_0: Tensor) -> Tensor:
        with torch.no_grad():
            images = (vae.decode(x_0 / vae.config.scaling_factor, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
        patterns = PATTERNS[torch.tensor(digits)].double()
        return ((images * patterns).sum((1, 2, 3)) / 10).tanh() + (images * patterns).square().mean((1, 2, 3))

    x_0 = rollout.sample.double()
    torch.testing.assert_close(one.rewards.double(), reward(x_0), rtol=1e-4, atol=1e-5)
    for seed in range(8):
        way = latents(*x_0.shape, seed=seed).double()
        slope = (reward(x_0 + 1e-5 * way) - reward(x_0 - 1e-5 * way)) / 2e-5
        gradient = one.direction.values / x_0[0].numel()
        length = gradient.flatten(1).norm(dim=1)
        torch.testing.assert_close((gradient * way).sum((1, 2, 3)) / length, slope / length, rtol=0, atol=1e-3)
    assert one.direction.applicable.all()
    assert len(set(digits)) == 3


def test_the_cut_into_batches_does_not_matter(base: Path, tmp_path: Path) -> None:
    whole, rollout, _ = directions(base, tmp_path, likeness, decode_batch_size=4)
    for decode_batch_size, reward_batch_size in ((1, 3), (3, 1), (4, 2), (9, 9)):
        sizes: list[int] = []

        def counting(images: Tensor, prompts: list[str], digit: list[int], sizes: list[int] = sizes) -> Tensor:
            sizes.append(len(images))
            return likeness(images, prompts, digit)

        trainer = quick_trainer(
            base,
            tmp_path,
            declare(counting, differentiable=True),
            **WITHOUT_RDM,
            decode_batch_size=decode_batch_size,
            reward_batch_size=reward_batch_size,
        )
        with batches_of(trainer.family.pipeline.vae.decoder) as decoded:
            cut = trainer.compute_rewards(rollout, 0)["counting"]
        scale = whole["likeness"].direction.values.abs().max()
        torch.testing.assert_close(
            cut.direction.values / scale, whole["likeness"].direction.values / scale, rtol=0, atol=1e-5
        )
        torch.testing.assert_close(cut.rewards, whole["likeness"].rewards, rtol=1e-5, atol=1e-6)
        assert max(sizes) == min(4, reward_batch_size)
        assert sum(sizes) == 4
        assert max(decoded) == min(4, decode_batch_size)
        assert sum(decoded) == 2 * 4, "once without a graph, once to pull the gradient back"


def test_a_run_leaves_the_weights_of_reward_and_decoder_alone(base: Path, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.LazyLinear(1))
    network(torch.zeros(1, 3, 16, 16))

    def learned(images: Tensor, prompts: list[str]) -> Tensor:
        return network(images).squeeze(1)

    trainer = quick_trainer(base, tmp_path, ["rdm", declare(learned, differentiable=True)], **QUICK)
    parts = {"reward": network, "vae": trainer.family.pipeline.vae, "text": trainer.family.pipeline.text_encoder}
    before = {name: snapshot(part) for name, part in parts.items()}
    policy = {name: value.clone() for name, value in trainer.networks.state_dict("policy").items()}
    trainer.train()
    for name, part in parts.items():
        assert all(parameter.grad is None for parameter in part.parameters()), name
        assert not changed(before[name], snapshot(part)), name
    assert all(parameter.requires_grad for parameter in network.parameters()), "it stays as the user left it"
    assert changed(policy, trainer.networks.state_dict("policy"))
    assert trainer.state.log_history[0]["rewards/learned/direction_rms"] > 0


def test_checkpointing_the_decoder_changes_nothing(base: Path, tmp_path: Path) -> None:
    _, rollout, trainer = directions(base, tmp_path, likeness)
    frugal = quick_trainer(base, tmp_path, likeness, **{CHECKPOINTING: True}, **WITHOUT_RDM)
    vae, calls, values = [one.family.pipeline.vae for one in (trainer, frugal)], [], []
    for one in (trainer, frugal):
        calls.append(
            count_convolutions(
                lambda one=one: values.append(one.compute_rewards(rollout, 0)["likeness"].direction.values)
            )
        )
    assert calls[1] > 1.2 * calls[0], "the forward pass is repeated in the backward pass"
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-7)
    assert vae[0] is not vae[1]


def test_a_reward_of_latents_needs_no_decoder(base: Path, tmp_path: Path) -> None:
    def small(latents: Tensor, prompts: list[str]) -> Tensor:
        return -latents.square().mean((1, 2, 3))

    declare(small, differentiable=True, inputs="latents")
    watched = declare(lambda x_0, prompts: x_0.amax((1, 2, 3)), inputs="latents", __name__="largest")
    trainer = quick_trainer(base, tmp_path, [small, watched], reward_weights=[1.0, 0.0], **WITHOUT_RDM)
    rollout = one_rollout(trainer)
    with batches_of(trainer.family.pipeline.vae.decoder) as decoded:
        made = trainer.compute_rewards(rollout, 0)
    assert decoded == []
    torch.testing.assert_close(made["small"].direction.values, -2 * rollout.sample)
    assert torch.equal(made["largest"].rewards, rollout.sample.amax((1, 2, 3)))


# ----- which step -----


def test_gradients_act_on_the_last_step_or_on_any(base: Path, tmp_path: Path) -> None:
    settings = {"num_inference_steps": 3}
    made, rollout, last = directions(base, tmp_path, likeness, step=1, **settings)
    nowhere = made["likeness"]
    assert not nowhere.direction.applicable.any()
    assert nowhere.rewards is None
    assert nowhere.faults == 0
    somewhere, _, _ = directions(base, tmp_path, likeness, 1, rollout, pathwise_steps="any", **settings)
    one = somewhere["likeness"]
    assert one.direction.applicable.all()
    images = last.family.decode(rollout.x_0[1])
    torch.testing.assert_close(one.rewards, likeness(images, [], rollout.batch.columns["digit"]))
    assert not torch.allclose(
        one.direction.values, last.compute_rewards(rollout, 2)["likeness"].direction.values, rtol=0.01
    )


def test_the_log_tells_on_how_many_updates_a_gradient_acted(base: Path, tmp_path: Path) -> None:
    steps: list[int] = []

    class Recording(RDMTrainer):
        def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Judgement]:
            steps.append(step)
            return super().compute_rewards(rollout, step)

    settings = {**QUICK, "num_inference_steps": 2, "max_steps": 8, "logging_steps": 8}
    trainer = quick_trainer(base, tmp_path, ["rdm", likeness], kind=Recording, **settings)
    trainer.train()
    (row,) = trainer.state.log_history
    assert 0 < steps.count(1) < 8
    assert row["rewards/likeness/acted"] == steps.count(1) / 8
    assert row["rewards/likeness/applicable"] == 1, "over the updates in which it was asked"


def test_watched_rewards_judge_the_finished_samples(base: Path, tmp_path: Path) -> None:
    grey = declare(lambda images, prompts: images.mean((1, 2, 3)).tolist(), __name__="grey")
    made, rollout, trainer = directions(
        base, tmp_path, [likeness, grey], step=0, num_inference_steps=3, reward_weights=[1.0, 0.0]
    )
    assert isinstance(trainer.rewards["likeness"], PathwiseReward)
    assert isinstance(trainer.rewards["grey"], WatchedReward)
    torch.testing.assert_close(made["grey"].rewards, trainer.family.decode(rollout.sample).mean((1, 2, 3)))
    assert not made["grey"].direction.applicable.any()
    # Asked about another rollout than the one it works on, it judges that one.
    other = trainer.generate_rollout(next(trainer.prompt_batches(1)))
    trainer.rewards["grey"].begin(rollout, 0)
    again = trainer.rewards["grey"].judge(other, 0, generator=torch.Generator())
    torch.testing.assert_close(again.rewards, trainer.family.decode(other.sample).mean((1, 2, 3)))


# ----- what rewards are shown -----


def test_a_tiny_decoder_makes_the_rewards_images(base: Path, tmp_path: Path) -> None:
    folder = tiny_autoencoder(tmp_path / "tiny")
    seen: list[Tensor] = []

    def looking(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(images.detach().clone())
        return (images * PATTERNS[0]).sum((1, 2, 3))

    declare(looking, differentiable=True)
    made, rollout, trainer = directions(base, tmp_path, looking, reward_decoder=str(folder))
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny.from_pretrained(folder)
    torch.testing.assert_close(seen[0], stock_images(trainer.family.pipeline, tiny, rollout.sample))
    leaf = rollout.sample.clone().requires_grad_()
    images = (tiny.decode(leaf, return_dict=False)[0] / 2 + 0.5).clamp(0, 1)
    (expected,) = torch.autograd.grad((images * PATTERNS[0]).sum(), leaf)
    torch.testing.assert_close(made["looking"].direction.values / leaf[0].numel(), expected, rtol=1e-4, atol=1e-5)
    # The student's own images are still those of its VAE.
    generated = trainer.generate(["a"], generator=torch.Generator().manual_seed(0))
    assert generated.shape == (1, 3, 16, 16)
    with batches_of(trainer.family.pipeline.vae.decoder) as decoded:
        trainer.generate(["a"], generator=torch.Generator().manual_seed(0))
    assert decoded == [1]


def test_rewards_get_the_teachers_images_of_the_same_noise(base: Path, tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def distance(images: Tensor, prompts: list[str], teacher_images: Tensor) -> Tensor:
        seen.append((images.detach().clone(), teacher_images.clone()))
        return -(images - teacher_images).square().mean((1, 2, 3))

    settings = {"teacher_num_inference_steps": 3, "reward_batch_size": 3}
    trainer = quick_trainer(
        base, tmp_path, declare(distance, differentiable=True, wants_teacher_images=True), **WITHOUT_RDM, **settings
    )
    for parameter in trainer.networks.parameters("policy"):
        parameter.data += 0.1
    rollout = one_rollout(trainer)
    made = trainer.compute_rewards(rollout, 0)["distance"]
    assert [len(images) for images, _ in seen] == [3, 1]
    teacher = torch.cat([one for _, one in seen])

    x_t, schedule, network = rollout.states[0], trainer.family.schedule, trainer.networks.predictor("teacher", 1.0)
    for now, then in ((1.0, 2 / 3), (2 / 3, 1 / 3), (1 / 3, 0.0)):
        now, then = torch.tensor(now), torch.tensor(then)
        with torch.no_grad():
            x_0 = network(x_t, now.expand(4), rollout.batch.conditioning)
        noise = (x_t - schedule.alpha(now) * x_0) / schedule.sigma(now)
        x_t = schedule.perturb(x_0, noise, then) if then > 0 else x_0
    pipeline = trainer.family.pipeline
    # The teacher's images have 8 bits per channel.
    torch.testing.assert_close(teacher, stock_images(pipeline, pipeline.vae, x_t), rtol=0, atol=0.5 / 255 + 1e-4)

    leaf = rollout.sample.clone().requires_grad_()
    value = -(trainer.family.decode(leaf) - teacher).square().mean((1, 2, 3))
    (expected,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(made.direction.values / leaf[0].numel(), expected, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(made.rewards, value.detach())


def test_nobody_asks_the_teacher_for_images_in_vain(base: Path, tmp_path: Path) -> None:
    trainer = quick_trainer(base, tmp_path, [likeness], **WITHOUT_RDM)
    rollout = one_rollout(trainer)
    with batches_of(trainer.networks.module("teacher")) as asked:
        trainer.compute_rewards(rollout, 0)
    assert asked == []


def test_groups_are_shown_whole(base: Path, tmp_path: Path) -> None:
    groups: list[tuple[list[int], list[str]]] = []

    def ranked(images: Tensor, prompts: list[str], group_ids: list[int]) -> Tensor:
        groups.append((group_ids, prompts))
        return images.mean((1, 2, 3)).argsort().argsort().float()

    declare(ranked, whole_groups=True)
    settings = {"per_device_train_batch_size": 9, "num_generations": 3, "reward_batch_size": 4}
    trainer = quick_trainer(base, tmp_path, [StepAway(), ranked], reward_weights=[1.0, 0.0], **WITHOUT_RDM, **settings)
    trainer.train()
    assert [len(ids) for ids, _ in groups] == [3, 3, 3] * 2
    assert all(len(set(ids)) == len(set(prompts)) == 1 for ids, prompts in groups)
    assert [ids[0] for ids, _ in groups] == [0, 1, 2, 3, 4, 5]


def test_columns_travel_to_the_rewards_that_name_them(base: Path, tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    def named(images: Tensor, prompts: list[str], digit: list[int], style: str = "none") -> list[float]:
        seen["named"] = list(prompts), digit, style
        return [0.0] * len(images)

    def everything(images: Tensor, prompts: list[str], **columns: Any) -> list[float]:
        seen["everything"] = columns
        return [0.0] * len(images)

    _, rollout, _ = directions(base, tmp_path, [StepAway(), named, everything], reward_weights=[1.0, 0.0, 0.0])
    prompts, digits, style = seen["named"]
    assert prompts == list(rollout.batch.prompts) == [f"the digit {digit}" for digit in digits]
    assert style == "none"
    assert seen["everything"] == {"digit": digits}


# ----- at the same time -----


def test_coroutines_of_a_rollout_run_together(base: Path, tmp_path: Path) -> None:
    """Each batch waits until all have begun."""
    begun: list[int] = []

    async def served(images: Tensor, prompts: list[str]) -> Tensor:
        begun.append(len(images))
        for _ in range(2000):
            if len(begun) == 4:
                return images.mean((1, 2, 3))
            await asyncio.sleep(0.01)
        raise TimeoutError("the others never began")

    made, rollout, trainer = directions(
        base, tmp_path, [StepAway(), served], reward_weights=[1.0, 0.0], reward_batch_size=1
    )
    torch.testing.assert_close(made["served"].rewards, trainer.family.decode(rollout.sample).mean((1, 2, 3)))


@pytest.mark.parametrize(
    "names",
    [
        ["learned", "first", "second"],
        ["first", "learned", "second"],
    ],
)
def test_watched_rewards_work_while_others_do(names: list[str], base: Path, tmp_path: Path) -> None:
    """Each of three waits until all have begun: two that are watched, and one whose gradient is needed."""
    begun = {name: threading.Event() for name in names}

    def meeting(name: str) -> Any:
        def reward(images: Tensor, prompts: list[str]) -> Tensor:
            begun[name].set()
            if not all(one.wait(2) for one in begun.values()):
                raise TimeoutError("the others never began")
            return images.mean((1, 2, 3))

        return declare(reward, __name__=name, differentiable=name == "learned")

    weights = [float(name == "learned") for name in names]
    made, _, _ = directions(base, tmp_path, [meeting(name) for name in names], reward_weights=weights)
    assert all(one.rewards is not None for one in made.values())


# ----- refused before a model is loaded -----


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)


def black_box(images: Tensor, prompts: list[str]) -> list[float]:
    return [0.0] * len(images)


def reads_colour(images: Tensor, prompts: list[str], colour: list[str]) -> list[float]:
    return [0.0] * len(images)


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (
            black_box,
            {"reward_weights": [1.0, 0.5]},
            r"'black_box' is a black box: .* num_inference_steps=1, .* no random step .* watch it with the weight 0",
        ),
        (black_box, {"reward_weights": [1.0]}, r"1 entries for 2 rewards \(rdm, black_box\)"),
        (
            reads_colour,
            {"reward_weights": [1.0, 0.0]},
            r"'reads_colour' reads the column\(s\) colour, but .* only prompt, digit",
        ),
        (declare(lambda a, b: [0.0], inputs="pixels"), {"reward_weights": [1.0, 0.0]}, "use 'images' or 'latents'"),
        (likeness, {"adaptive_reference": "online", "reward_weights": [1.0, 1.0]}, r"together 1\) reach its own \(1\)"),
        (likeness, {"reward_weighting": "budget"}, "set reward_start_step to at least 1"),
        (likeness, {"fake_score_updates_per_policy_update": 0}, "the fake score is never trained"),
        (likeness, {"first_step_anchor": 0.1, "num_inference_steps": 1}, "the student has no other"),
        (
            likeness,
            {**RANDOM_TIMES, "first_step_anchor": 0.1},
            "begins with its first noise",
        ),
        (likeness, RANDOM_TIMES, "Set pathwise_steps='any' if that is meant"),
        ("teacher_mse", RANDOM_TIMES, "begins with its first noise"),
        (likeness, {"first_step_anchor": 0.1, "num_inference_steps": 2}, "Set reward_weighting='fixed'"),
    ],
)
def test_rewards_that_cannot_work_are_refused(
    reward: Any, settings: dict[str, Any], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        quick_trainer(base, tmp_path, ["rdm", reward], **{**QUICK, **settings})


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("weighting", [black_box, object(), {"rdm": 1.0}])
def test_what_is_no_weighting_is_refused(weighting: Any, base: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="does not derive from"):
        quick_trainer(base, tmp_path, "rdm", given={"weighting": weighting}, **QUICK)
