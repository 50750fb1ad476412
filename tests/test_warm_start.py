"""The teacher's ODE solutions are diffusers' own, and their cache is honest."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from rdm_rl.families import load_family
from rdm_rl.files import fingerprint
from rdm_rl.noise_schedule import FlowMatching, NoiseSchedule, VariancePreserving, append_dims
from rdm_rl.policy import make_sampler, ode_chord, ode_solution, renoise
from rdm_rl.records import Conditioning
from rdm_rl.trainers.warm_start import OdePairs, collect_pairs
from tests.helpers import changed, latents, tiny_sd, tiny_trainer

VP = VariancePreserving(DDIMScheduler(beta_schedule="scaled_linear").alphas_cumprod)


class CountingTeacher:
    """A teacher that counts how often it is asked."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls += 1
        return torch.tanh(x_t) + append_dims(conditioning.tensors["length"], x_t)


def collect(teacher: CountingTeacher, folder: Path, prompts: list[str] | None = None, **changes: Any) -> OdePairs:
    settings = {
        "prompts": prompts or ["a", "bb", "ccc", "dddd", "eeeee"],
        "times": (1.0, 0.75, 0.5, 0.25),
        "sampler": renoise,
        "solve_later": True,
        "shape": (2, 2, 2),
        "ode_steps": 4,
        "batch_size": 2,
        "seed": 0,
        "folder": folder,
        "device": torch.device("cpu"),
        "show_progress": False,
    }

    def encode(texts: list[str]) -> Conditioning:
        return Conditioning(tensors={"length": torch.tensor([float(len(text)) for text in texts])})

    return collect_pairs(teacher, encode, VP, **{**settings, **changes})


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_ode_solution_is_the_ddim_sampler(prediction_type: str, steps: int, tmp_path: Path) -> None:
    family = load_family(tiny_sd(tmp_path, prediction_type))
    conditioning, noise = family.encode(["the digit 3", "the digit 4"]), latents(2, 4, 8, 8)
    scheduler = DDIMScheduler.from_config(family.pipeline.scheduler.config, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    x_t, states = noise, []
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            states.append(x_t)
            output = family.forward(family.network, x_t, ((timestep + 1) / 1000).expand(2), conditioning)
            x_t = scheduler.step(output, timestep, x_t, eta=0.0).prev_sample

    def teacher(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return family.predict_x_0(family.network, x_t, t, conditioning)

    size = x_t.abs().max().item()
    solution = ode_solution(teacher, noise, 1.0, conditioning, family.schedule, steps)
    torch.testing.assert_close(solution, x_t, rtol=0, atol=1e-5 * size)
    if steps > 1:  # A start half way takes half the steps.
        half = ode_solution(teacher, states[steps // 2], 0.5, conditioning, family.schedule, steps)
        torch.testing.assert_close(half, x_t, rtol=0, atol=1e-5 * size)


@pytest.mark.parametrize("schedule", [VP, FlowMatching()], ids=["variance-preserving", "flow"])
def test_one_step_along_the_chord_ends_where_the_teacher_does(schedule: NoiseSchedule) -> None:
    def teacher(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return (x_t * (2 - t[:, None, None, None])).tanh()

    x_t = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    whole = ode_chord(teacher, x_t, 1.0, Conditioning(), schedule, 6, 6)
    torch.testing.assert_close(
        whole, ode_solution(teacher, x_t, 1.0, Conditioning(), schedule, 6), rtol=1e-4, atol=1e-4
    )
    first = ode_chord(teacher, x_t, 1.0, Conditioning(), schedule, 6, 1)
    torch.testing.assert_close(first, teacher(x_t, torch.ones(2), Conditioning()), rtol=1e-4, atol=1e-4)
    # Three steps by hand, and the one step that replaces them.
    times, state = schedule.descent(1.0, 6), x_t
    for now, then in pairwise(times[:4]):
        x_0 = teacher(state, now.expand(2), Conditioning())
        noise = (state - schedule.alpha(now) * x_0) / schedule.sigma(now)
        state = schedule.alpha(then) * x_0 + schedule.sigma(then) * noise
    aim = ode_chord(teacher, x_t, 1.0, Conditioning(), schedule, 6, 3)
    noise = (x_t - schedule.alpha(times[0]) * aim) / schedule.sigma(times[0])
    reached = schedule.alpha(times[3]) * aim + schedule.sigma(times[3]) * noise
    torch.testing.assert_close(reached, state, rtol=1e-4, atol=1e-4)


def test_ode_solution_of_a_straight_flow_is_exact() -> None:
    x_0, noise = latents(2, 1, 2, 2), latents(2, 1, 2, 2, seed=1)
    x_t = FlowMatching().perturb(x_0, noise, torch.tensor(0.8))
    solution = ode_solution(lambda *_: x_0, x_t, 0.8, Conditioning(), FlowMatching(), 5)
    torch.testing.assert_close(solution, x_0)


def test_pairs_are_what_they_say(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    pairs = collect(teacher, tmp_path)
    assert len(pairs.states) == 5 * 4
    assert sorted(set(pairs.times.tolist())) == [0.25, 0.5, 0.75, 1.0]
    assert {prompt: pairs.prompts.count(prompt) for prompt in pairs.prompts} == dict.fromkeys(
        ["a", "bb", "ccc", "dddd", "eeeee"], 4
    )
    for state, solution, t, prompt in zip(pairs.states, pairs.solutions, pairs.times, pairs.prompts, strict=True):
        conditioning = Conditioning(tensors={"length": torch.tensor([float(len(prompt))])})
        again = ode_solution(teacher, state[None], t.item(), conditioning, VP, 4)[0]
        torch.testing.assert_close(solution, again, rtol=1e-5, atol=1e-5)
    # States at lower noise are the teacher's own samples with noise: at the lowest level the sample shows through.
    first, last = pairs.times == 1, pairs.times == 0.25
    together = torch.stack([pairs.solutions[first].flatten(), pairs.states[last].flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.9
    assert pairs.states[first].std().item() == pytest.approx(1, abs=0.3)


def test_second_collection_reads_files(tmp_path: Path) -> None:
    first, second = CountingTeacher(), CountingTeacher()
    pairs, again = collect(first, tmp_path), collect(second, tmp_path)
    assert first.calls == 3 * (4 + 3 + 2 + 1)
    assert second.calls == 0
    assert torch.equal(pairs.states, again.states)
    assert torch.equal(pairs.solutions, again.solutions)
    assert list(pairs.prompts) == list(again.prompts)


@pytest.mark.parametrize("time", ["1.0000", "0.5000"])
def test_interrupted_collection_continues(time: str, tmp_path: Path) -> None:
    pairs = collect(CountingTeacher(), tmp_path)
    (file,) = tmp_path.glob(f"t{time}-000002-2*.safetensors")
    file.unlink()
    teacher = CountingTeacher()
    again = collect(teacher, tmp_path)
    assert teacher.calls == 4 * float(time)
    assert torch.equal(pairs.states, again.states)
    assert torch.equal(pairs.solutions, again.solutions)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    class Interrupted(CountingTeacher):
        def __call__(self, *inputs: Any) -> Tensor:
            if self.calls == 15:
                raise KeyboardInterrupt
            return super().__call__(*inputs)

    with pytest.raises(KeyboardInterrupt):
        collect(Interrupted(), tmp_path)
    kept = list(tmp_path.iterdir())
    assert len(kept) == 5
    assert all(file.suffix == ".safetensors" for file in kept)
    expected = collect(CountingTeacher(), tmp_path / "fresh")
    assert torch.equal(collect(CountingTeacher(), tmp_path).states, expected.states)


def test_other_prompts_are_solved_anew(tmp_path: Path) -> None:
    collect(CountingTeacher(), tmp_path)
    kept = set(tmp_path.iterdir())
    other = collect(CountingTeacher(), tmp_path, ["a", "bb", "other", "dddd", "eeeee"])
    assert "other" in other.prompts
    assert kept < set(tmp_path.iterdir())


def test_students_share_what_they_have_in_common(tmp_path: Path) -> None:
    collect(CountingTeacher(), tmp_path)
    teacher = CountingTeacher()
    pairs = collect(teacher, tmp_path, times=(1.0,))
    assert teacher.calls == 0
    assert len(pairs.states) == 5


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_students_that_keep_noise_share_what_has_the_same_way(eta: float, tmp_path: Path) -> None:
    """The first solutions, and no states that other steps lead to."""
    settings = {"sampler": make_sampler("ddim", eta), "times": (1.0, 0.5)}
    alone = collect(CountingTeacher(), tmp_path / "alone", **settings)
    collect(CountingTeacher(), tmp_path / "shared")  # It draws its noise anew.
    collect(CountingTeacher(), tmp_path / "shared", sampler=settings["sampler"])  # In four steps.
    teacher = CountingTeacher()
    shared = collect(teacher, tmp_path / "shared", **settings)
    assert teacher.calls == 3 * 2  # At the second time alone.
    assert torch.equal(shared.states, alone.states)
    assert torch.equal(shared.solutions, alone.solutions)


def test_denoising_goes_back_to_the_samples_that_the_states_are_made_from(tmp_path: Path) -> None:
    teacher = CountingTeacher()
    solved, pairs = collect(CountingTeacher(), tmp_path / "solved"), collect(teacher, tmp_path / "x", solve_later=False)
    assert teacher.calls == 3 * 4
    assert torch.equal(pairs.states, solved.states)
    first = pairs.times == 1
    assert torch.equal(pairs.solutions[first], solved.solutions[first])
    samples = dict(zip([pairs.prompts[row] for row in first.nonzero()], pairs.solutions[first], strict=True))
    for solution, prompt in zip(pairs.solutions, pairs.prompts, strict=True):
        assert torch.equal(solution, samples[prompt])


def test_a_deterministic_student_keeps_the_noise_it_began_with(tmp_path: Path) -> None:
    pairs = collect(CountingTeacher(), tmp_path, sampler=make_sampler("ddim", 0.0), solve_later=False, batch_size=5)
    states, samples = pairs.states.view(4, 5, 2, 2, 2), pairs.solutions[:5]
    start = torch.tensor(1.0)
    noise = (states[0] - VP.alpha(start) * samples) / VP.sigma(start)
    for state, time in zip(states, (1.0, 0.75, 0.5, 0.25), strict=True):
        t = torch.tensor(time)
        torch.testing.assert_close(state, VP.alpha(t) * samples + VP.sigma(t) * noise, rtol=1e-4, atol=1e-4)


def test_noise_depends_on_the_seed(tmp_path: Path) -> None:
    one = collect(CountingTeacher(), tmp_path / "one", times=(1.0,))
    two = collect(CountingTeacher(), tmp_path / "two", times=(1.0,), seed=1)
    assert not torch.equal(one.states, two.states)
    assert len(one.states.flatten(1)[:, 0].unique()) == 5


def test_adapters_do_not_change_the_fingerprint(tmp_path: Path) -> None:
    from peft import LoraConfig

    from rdm_rl.networks.roles import AdapterNetworks

    family = load_family(tiny_sd(tmp_path))
    name = fingerprint(family.network)
    AdapterNetworks(family, LoraConfig(r=2), torch.Generator())
    assert fingerprint(family.network) == name


def test_pairs_of_unequal_length_are_refused() -> None:
    two = torch.zeros(2, 1, 1, 1)
    with pytest.raises(ValueError, match="one entry for each pair"):
        OdePairs(states=two, solutions=two, times=torch.zeros(2), prompts=["a"])


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_warm_start_brings_the_student_to_the_teacher(lora: bool, bases: Callable[..., Path], tmp_path: Path) -> None:
    """On states and noise it was not trained on, the student ends where the teacher's ODE does, more nearly."""
    settings = {"max_steps": 0, "warm_start_steps": 40, "warm_start_num_states": 32, "warm_start_learning_rate": 5e-3}
    trainer = tiny_trainer(
        bases("v_prediction"), tmp_path, lora=lora, num_inference_steps=1, fake_score_warmup_steps=0, **settings
    )
    networks, family = trainer.networks, trainer.family
    conditioning, noise, t = family.encode(["the digit 3"]).repeat(16), latents(16, 4, 8, 8, seed=9), torch.ones(16)
    target = ode_solution(networks.predictor("teacher"), noise, 1.0, conditioning, family.schedule, 2)

    @torch.no_grad()
    def error() -> float:
        return (networks.predict("policy", noise, t, conditioning) - target).abs().mean().item()

    before, fake_score = error(), {name: value.clone() for name, value in networks.state_dict("fake_score").items()}
    trainer.train()
    assert error() < 0.9 * before
    assert not changed(fake_score, networks.state_dict("fake_score"))
    losses = [row["warm_start/loss"] for row in trainer.state.log_history if "warm_start/loss" in row]
    assert len(losses) == 40
    assert sum(losses[-5:]) < sum(losses[:5])


def test_runs_share_the_cache_they_are_given(base: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    runs = []
    for index, steps in enumerate((4, 1)):
        trainer = tiny_trainer(
            base, tmp_path / str(index), num_inference_steps=steps, max_steps=0, warm_start_cache_dir=cache
        )
        trainer.train()
        runs.append({path.relative_to(cache): path.stat().st_mtime_ns for path in Path(cache).rglob("*.safetensors")})
        assert not (tmp_path / str(index) / "warm_start").exists()
    assert runs[0] == runs[1]
    assert len(runs[0]) == 4
    other = tiny_trainer(base, tmp_path / "other", max_steps=0, warm_start_cache_dir=cache, teacher_guidance_scale=2.0)
    other.train()
    assert len(list(Path(cache).iterdir())) == 2
