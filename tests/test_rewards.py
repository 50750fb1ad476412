"""The registry, and distribution matching as a registered reward."""

import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rdm_rl.policy import ode_chord
from rdm_rl.randomness import normal, seeded_generators
from rdm_rl.rdm import distribution_matching
from rdm_rl.records import Direction, Rollout
from rdm_rl.renoise import group_times
from rdm_rl.rewards import get_reward, list_rewards, register_reward
from rdm_rl.rewards.calling import needs
from rdm_rl.rewards.jpeg import JpegCompressibility
from rdm_rl.rewards.kinds import PathwiseReward, PolicyGradientReward, WatchedReward, as_training_rewards
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardInfo
from rdm_rl.rewards.rdm import DistributionMatchingReward
from rdm_rl.rewards.registry import (
    find_reward,
    load_rewards,
    name_of,
    reward_weights,
    unregister_reward,
)
from rdm_rl.trainers.rdm_trainer import RDMTrainer
from rdm_rl.weighting import FixedWeighting
from tests.helpers import StepAway, changed, randomize, tiny_trainer, trained_weights
from tests.tiny_rewards import save_clip


@pytest.fixture
def registered() -> str:
    register_reward("away")(StepAway)
    yield "away"
    unregister_reward("away")


def test_rdm_is_registered() -> None:
    assert "rdm" in list_rewards()
    assert isinstance(get_reward("rdm"), DistributionMatchingReward)
    assert get_reward("rdm") is not get_reward("rdm")


def test_own_reward_is_registered_once(registered: str) -> None:
    assert registered in list_rewards()
    assert isinstance(get_reward(registered), StepAway)
    with pytest.raises(ValueError, match="'away' is already registered"):
        register_reward("away")(StepAway)
    with pytest.raises(ValueError, match="'rdm' is already registered"):
        register_reward("rdm")(StepAway)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"No reward is named 'rmd'\. Did you mean 'rdm'\?"):
        get_reward("rmd")
    with pytest.raises(ValueError, match="rdm-rl rewards list"):
        get_reward("zzzz")


def test_own_rewards_only_can_be_removed() -> None:
    with pytest.raises(KeyError):
        unregister_reward("rdm")


def test_names_and_objects_are_resolved_in_order(registered: str) -> None:
    reward = StepAway(name="other")
    resolved = load_rewards([registered, reward, "rdm"])
    assert list(resolved) == ["away", "other", "rdm"]
    assert resolved["other"] is reward
    assert list(load_rewards("rdm")) == ["rdm"]
    assert list(load_rewards(reward)) == ["other"]


@pytest.mark.parametrize(
    ("specs", "error", "message"),
    [
        ([], ValueError, "reward_funcs is empty"),
        (["rdm", "rdm"], ValueError, "names 'rdm' twice"),
        ([object()], TypeError, "neither a name, nor a callable"),
        ("rmd", ValueError, "Did you mean 'rdm'"),
    ],
)
def test_what_is_no_reward_is_refused(specs: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_rewards(specs)


def test_weights_of_rewards() -> None:
    assert reward_weights(["rdm", "away"], [1.0, 0.0]) == {"rdm": 1.0, "away": 0.0}
    assert reward_weights(["rdm", "away"], None) == {"rdm": 1.0, "away": 1.0}
    with pytest.raises(ValueError, match=r"1 entries for 2 rewards \(rdm, away\)"):
        reward_weights(["rdm", "away"], [1.0])


def test_rdm_without_networks_says_so(base: Path, tmp_path: Path) -> None:
    rollout = one_rollout(tiny_trainer(base, tmp_path))
    with pytest.raises(RuntimeError, match="needs the networks"):
        DistributionMatchingReward().direction(rollout, 0, generator=torch.Generator())


def one_rollout(trainer: RDMTrainer) -> Rollout:
    return trainer.generate_rollout(next(trainer.prompt_batches(0)))


def ask(trainer: RDMTrainer, rollout: Rollout, step: int = 1) -> Direction:
    generator = seeded_generators(0, "reward", 0, rollout.batch.sample_ids)
    direction = trainer.rewards["rdm"].judge(rollout, step, generator=generator).direction
    assert direction is not None
    return direction


@pytest.mark.parametrize("settings", [{}, {"dm_normalization": "group", "dm_scale_floor": 1e-6}])
@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_rdm_follows_the_settings(settings: dict, guidance: float, base: Path, tmp_path: Path) -> None:
    """The reward is `distribution_matching` with the run's settings and draws made here in the documented order."""
    trainer = tiny_trainer(
        base,
        tmp_path,
        renoise_range=[0.3, 0.4],
        renoise_distribution="beta",
        teacher_guidance_scale=guidance,
        **settings,
    )
    randomize(trainer.networks)
    rollout = one_rollout(trainer)
    groups, generator = rollout.batch.group_ids, seeded_generators(0, "reward", 0, rollout.batch.sample_ids)
    t = group_times(groups, generator, distribution="beta", interval=(0.3, 0.4))
    noise = normal(rollout.x_0[1].shape, generator)
    assert len(t.unique()) == 2  # One for each group.
    x_0, schedule, prompts = rollout.x_0[1], trainer.family.schedule, rollout.batch.conditioning
    teacher = trainer.networks.predictor("teacher", guidance)
    fake_score = trainer.networks.predictor("fake_score")
    x_t = schedule.perturb(x_0, noise, t)
    with torch.no_grad():
        real, fake = (network(x_t, t, prompts) for network in (teacher, fake_score))
    scale = {"normalization": settings.get("dm_normalization", "group_rms")}
    expected = distribution_matching(x_0, real, fake, groups, **scale, scale_floor=settings.get("dm_scale_floor", 0.1))
    direction = ask(trainer, rollout)
    assert torch.equal(direction.values, expected)
    torch.testing.assert_close(direction.rewards, -(real - fake).square().mean((1, 2, 3)))
    gap = ((real - fake).square().mean() / (x_0 - real).square().mean()).sqrt()
    assert direction.metrics["gap"] == pytest.approx(gap.item())
    assert direction.applicable.all()
    assert direction.values.abs().sum() > 0
    assert not direction.values.requires_grad


def test_an_anchored_first_step_follows_the_teachers_own(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, first_step_anchor=0.25, teacher_guidance_scale=4.0)
    plain = tiny_trainer(base, tmp_path, teacher_guidance_scale=4.0)
    for each in (trainer, plain):
        randomize(each.networks)
    rollout = one_rollout(trainer)
    teacher, prompts = trainer.networks.predictor("teacher", 4.0), rollout.batch.conditioning
    aim = ode_chord(teacher, rollout.states[0], 1.0, prompts, trainer.family.schedule, 30, 5)
    direction = ask(trainer, rollout, 0)
    torch.testing.assert_close(direction.values, 0.25 * (aim - rollout.x_0[0]))
    assert direction.values.abs().sum() > 0
    assert torch.equal(ask(trainer, rollout, 1).values, ask(plain, rollout, 1).values)


@pytest.mark.parametrize("settings", [{}, {"num_iterations": 2}])
def test_a_run_with_an_anchored_first_step(settings: dict, base: Path, tmp_path: Path) -> None:
    anchored = {**settings, "first_step_anchor": 0.05, "num_replayed_steps": 2, "max_steps": 2, "logging_steps": 1}
    trainer = tiny_trainer(base, tmp_path, **anchored)
    before = trained_weights(trainer)
    trainer.train()
    assert any(name.startswith("policy/") for name in changed(before, trained_weights(trainer)))
    assert any(row.get("rewards/rdm/anchor_distance", 0) > 0 for row in trainer.state.log_history)


def test_guidance_of_the_family_is_the_default(base: Path, tmp_path: Path) -> None:
    default = tiny_trainer(base, tmp_path, teacher_guidance_scale=None)
    published = tiny_trainer(base, tmp_path, teacher_guidance_scale=default.family.teacher_guidance_scale)
    rollout = one_rollout(default)
    assert torch.equal(ask(default, rollout).values, ask(published, rollout).values)
    assert default.teacher_guidance_scale == 1.75


def test_annealing_follows_the_run(base: Path, tmp_path: Path) -> None:
    trainer = tiny_trainer(base, tmp_path, renoise_distribution="annealed_beta", renoise_anneal_steps=10)
    randomize(trainer.networks)
    rollout = one_rollout(trainer)
    start = ask(trainer, rollout)
    trainer.state.global_step = 10
    end = ask(trainer, rollout)
    uniform = tiny_trainer(base, tmp_path)
    randomize(uniform.networks)
    assert torch.equal(end.values, ask(uniform, rollout).values)
    assert not torch.equal(start.values, end.values)


# ----- where names come from -----


def grey(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.mean((1, 2, 3))


class Scaled:
    """A reward that takes options."""

    differentiable = True

    def __init__(self, scale: float = 1.0, *, shift: float = 0.0) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return self.scale * images.mean((1, 2, 3)) + self.shift


@pytest.fixture
def own_rewards() -> Any:
    register_reward("grey")(grey)
    register_reward("scaled")(Scaled)
    yield
    unregister_reward("grey")
    unregister_reward("scaled")
    vars(grey).clear()


@pytest.mark.usefixtures("own_rewards")
def test_a_name_stands_for_a_function_or_for_what_makes_a_reward() -> None:
    assert get_reward("grey") is grey
    reward = get_reward("scaled", scale=3.0, shift=1.0)
    assert (reward.scale, reward.shift) == (3.0, 1.0)
    assert get_reward("scaled") is not get_reward("scaled")
    with pytest.raises(ValueError, match="'grey' is a function and takes no options; got scale"):
        get_reward("grey", scale=1.0)
    with pytest.raises(ValueError, match=r"'scaled' cannot be made: .*'size'.* Its options are: scale, shift"):
        get_reward("scaled", size=1.0)
    assert "scaled" in list_rewards()
    assert "grey" in list_rewards()


def test_declarations_are_set_on_what_is_registered() -> None:
    @register_reward("declared", differentiable=True, inputs="latents")
    def declared(x_0: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return x_0.mean((1, 2, 3))

    unregister_reward("declared")
    assert declared.differentiable is True
    assert declared.inputs == "latents"
    with pytest.raises(ValueError, match="a colon means module:attribute"):
        register_reward("my:reward")(grey)


def test_a_declaration_that_no_reward_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"declares what no reward has\. Did you mean 'differentiable'"):
        register_reward("misspelt", differentiabel=True)(grey)
    assert "misspelt" not in list_rewards() and not hasattr(grey, "differentiabel")


def test_a_name_that_is_taken_is_not_touched(registered: str) -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_reward(registered, differentiable=True)(Scaled)
    assert find_reward(registered) is StepAway
    assert isinstance(get_reward("jpeg_compressibility"), JpegCompressibility)


def test_rewards_of_a_module_need_no_registration() -> None:
    assert get_reward("tests.test_rewards:grey") is grey
    assert get_reward("tests.test_rewards:Scaled", scale=2.0).scale == 2.0
    with pytest.raises(ValueError, match=r"'tests\.test_rewards' has no 'gray'\. Did you mean 'grey'\?"):
        get_reward("tests.test_rewards:gray")
    with pytest.raises(ModuleNotFoundError, match=r"there is no module 'no_such_package\.rewards'"):
        get_reward("no_such_package.rewards:grey")


SOURCE = """
def grey(images, prompts):
    return images.mean((1, 2, 3))

class Scaled:
    def __init__(self, scale=1.0):
        self.scale = scale
    def __call__(self, images, prompts):
        return self.scale * images.mean((1, 2, 3))
"""


def test_rewards_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(SOURCE)
    assert get_reward(f"{file}:grey")(torch.ones(2, 3, 2, 2), ["a", "b"]).tolist() == [1, 1]
    assert get_reward(f"{file}:Scaled", scale=2.0).scale == 2.0
    assert list(load_rewards(["rdm", f"{file}:grey"])) == ["rdm", "grey"]
    with pytest.raises(ValueError, match="has no 'gray'"):
        get_reward(f"{file}:gray")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        get_reward(f"{tmp_path / 'other.py'}:grey")


def test_a_file_may_hold_a_dataclass(tmp_path: Path) -> None:
    (tmp_path / "typed.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n@dataclass\nclass Reward:\n"
        "    scale: float = 1.0\n    def __call__(self, images, prompts):\n        return [self.scale] * len(images)\n"
    )
    assert get_reward(f"{tmp_path / 'typed.py'}:Reward", scale=2.0).scale == 2.0


def test_a_file_that_registers_rewards_may_be_named_twice(tmp_path: Path) -> None:
    file = tmp_path / "registering.py"
    file.write_text(f"from rdm_rl.rewards import register_reward\n{SOURCE}\nregister_reward('own grey')(grey)\n")
    try:
        assert list(load_rewards([f"{file}:grey", f"{file}:Scaled"])) == ["grey", "Scaled"]
    finally:
        unregister_reward("own grey")


def install(folder: Path, distribution: str, entries: str, module: str = "") -> None:
    """An installed package with rewards, as pip would leave it."""
    info = folder / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[rdm_rl.rewards]\n{entries}\n")
    if module:
        (folder / f"{distribution.replace('-', '_')}.py").write_text(module)


def test_installed_packages_bring_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path / "one", "grey-rewards", "their grey = grey_rewards:grey\nscaled = grey_rewards:Scaled", SOURCE)
    monkeypatch.syspath_prepend(tmp_path / "one")
    try:
        assert {"their grey", "scaled"} <= set(list_rewards())
        assert get_reward("scaled", scale=5.0).scale == 5.0
        assert get_reward("their grey")(torch.ones(1, 3, 2, 2), ["a"]).tolist() == [1]
        with pytest.raises(ValueError, match="'scaled' is already registered"):
            register_reward("scaled")(Scaled)
    finally:
        sys.modules.pop("grey_rewards", None)


def test_two_packages_with_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, distribution in enumerate(("first-rewards", "second-rewards")):
        install(tmp_path / str(index), distribution, "clash = some_module:reward")
        monkeypatch.syspath_prepend(tmp_path / str(index))
    with pytest.raises(ValueError, match=r"Several rewards are named 'clash'.*(first|second)-rewards"):
        get_reward("clash")
    install(tmp_path / "2", "third-rewards", "rdm = some_module:reward")
    monkeypatch.syspath_prepend(tmp_path / "2")
    with pytest.raises(ValueError, match=r"Several rewards are named 'rdm'.*third-rewards"):
        get_reward("rdm")


def test_a_package_that_lacks_something_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = "plain = lacking_rewards:grey\nextra = lacking_rewards:grey [models]"
    install(tmp_path, "lacking-rewards", entries, "import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match=r"needs 'no_such_package', .*pip install no_such_package"):
        get_reward("plain")
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'lacking-rewards\[models\]'"):
        get_reward("extra")


# ----- names and weights -----


def test_names_in_the_log() -> None:
    named = StepAway(name="further")
    assert [name_of(one) for one in ("rdm", "tests.test_rewards:grey", "a/b.py:Own", grey, named, Scaled())] == [
        *("rdm", "grey", "Own", "grey", "further", "Scaled")
    ]
    assert name_of(lambda images, prompts: []) == "lambda"
    assert name_of(partial(grey)) == "partial"


def test_rewards_under_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="names 'grey' twice"):
        load_rewards([grey, "tests.test_rewards:grey"])
    assert list(load_rewards((grey, Scaled()))) == ["grey", "Scaled"]
    assert list(load_rewards(grey)) == ["grey"]


def test_a_class_in_place_of_an_object_is_refused() -> None:
    with pytest.raises(TypeError, match="StepAway"):
        load_rewards([StepAway])


def test_what_becomes_of_each_kind() -> None:
    away, scaled = StepAway(), Scaled()
    rewards = {"away": away, "grey": grey, "scaled": scaled, "jpeg": JpegCompressibility()}
    made = as_training_rewards(rewards, {"away": 0.0, "grey": 0.0, "scaled": 0.5, "jpeg": 0.0}, [])
    assert made["away"].reward is away
    assert isinstance(made["scaled"], PathwiseReward)
    assert isinstance(made["grey"], WatchedReward)
    assert isinstance(made["jpeg"], WatchedReward)
    watched = as_training_rewards({"scaled": scaled}, {"scaled": 0.0}, [])["scaled"]
    assert isinstance(watched, WatchedReward), "a weight of 0 needs no gradient"
    negative = as_training_rewards({"scaled": scaled}, {"scaled": -1.0}, [])["scaled"]
    assert isinstance(negative, PathwiseReward)
    box = as_training_rewards({"jpeg": JpegCompressibility()}, {"jpeg": 1.0}, [])["jpeg"]
    assert isinstance(box, PolicyGradientReward)
    without = as_training_rewards({"scaled": scaled}, {"scaled": 1.0}, [], pathwise=False)["scaled"]
    assert isinstance(without, PolicyGradientReward)
    assert isinstance(
        as_training_rewards({"scaled": scaled}, {"scaled": 0.0}, [], pathwise=False)["scaled"], WatchedReward
    )


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_are_finite(wrong: float) -> None:
    with pytest.raises(ValueError, match="reward_weights"):
        reward_weights(["rdm", "away"], [1.0, wrong])


def test_a_module_is_asked_for_what_its_forward_takes() -> None:
    class Critic(nn.Module):
        def forward(self, images: Tensor, prompts: list[str], digit: list[int]) -> Tensor:
            return images.mean((1, 2, 3))

    assert needs(Critic()).required == {"digit"}
    assert not needs(Critic()).everything


def test_reward_models_are_loaded_before_training(base: Path, tmp_path: Path) -> None:
    """A wrong folder must not cost a warm start, nor a download the time limit of a call."""
    loaded = []

    class Critic(RewardModel):
        name, info = "critic", RewardInfo(description="None.")

        def load(self) -> nn.Module:
            loaded.append(threading.current_thread() is threading.main_thread())
            return nn.Identity()

        def rewards(self, network: nn.Module, images: Tensor, prompts: list[str]) -> Tensor:
            return network(images).mean((1, 2, 3))

    tiny_trainer(base, tmp_path, given={"reward_funcs": ["rdm", Critic()]})
    assert loaded == [True]
    with pytest.raises((OSError, ValueError), match="nowhere"):  # Which one depends on the version of transformers.
        reward = get_reward("clip_score", model=str(tmp_path / "nowhere"))
        tiny_trainer(base, tmp_path, given={"reward_funcs": ["rdm", reward]})


@pytest.mark.parametrize(
    ("given", "settings", "message"),
    [
        ({"weighting": FixedWeighting({"rdm": 1.0})}, {"reward_start_step": 3}, "reward_start_step would not be acted"),
        ({"reward_funcs": [StepAway()]}, {"reward_conflict": "project"}, "'rdm' is not in reward_funcs"),
        ({"reward_funcs": [StepAway()]}, {"adaptive_reference": "online"}, "'rdm' is not in reward_funcs"),
    ],
)
def test_settings_that_would_not_be_acted_on_are_refused(
    given: dict, settings: dict, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_trainer("no/model", tmp_path, given=given, **settings)


@pytest.mark.parametrize("name", ["pickscore", "hpsv2", "aesthetic", "image_reward", "ocr", "teacher_dino"])
def test_a_reward_that_the_hub_cannot_give(name: str) -> None:
    """Whatever loads it: the tests run without a hub."""
    with pytest.raises(
        OSError, match=rf"The reward '{name}': \w+='\S+/\S+' cannot be loaded: .*HF_HUB_OFFLINE"
    ) as refusal:
        get_reward(name).prepare()
    assert "\n" not in str(refusal.value)


def test_a_part_of_a_reward_that_the_hub_cannot_give(tmp_path: Path) -> None:
    model = save_clip(tmp_path)[0]
    with pytest.raises(OSError, match="'clip_score': processor='owner/other' cannot be loaded"):
        get_reward("clip_score", model=model, processor="owner/other").prepare()
