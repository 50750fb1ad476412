"""Distillation of an exactly known teacher, S replicates side by side, through rdm_rl's own functions."""

import copy
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from arms import Arm, projected, sgmd_push, without_group_residual
from networks import Networks, move_towards
from problems import NUM_PROMPTS, PROBLEMS, SCHEDULE, Mixture, energy_distance, mode_shares
from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.policy import X0Predictor, cps, ode_solution, random_times, renoise, rollout, student_times
from rdm_rl.randomness import seeded_generator
from rdm_rl.rdm import distribution_matching, fake_score_loss, policy_loss
from rdm_rl.records import Conditioning, Direction, PromptBatch, Rollout
from rdm_rl.renoise import renoise_times
from rdm_rl.rewards.rdm import anchored

GENERATIONS = 8
PRETRAINING_UPDATES = 2000
WARM_START_UPDATES = 30  # A warm start this short leaves something to do.
WARM_START_STATES = 256
FAKE_SCORE_WARM_UP = 200
# Of one step and of several: with the first, students of four steps lose modes (seeds 0 to 7).
POLICY_RATES = (1e-3, 2e-4)
EMA_DECAY = 0.995
RENOISE_RANGE = (0.02, 0.98)
EVALUATION_SAMPLES = 512  # For each prompt.
NO_PROMPT = Conditioning()  # The networks know a sample's prompt from its place.


def decaying_adam(networks: Networks, rate: float, updates: int):
    optimizer = torch.optim.Adam(networks.parameters(), rate)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)


def minimise(loss: Tensor, optimizer: torch.optim.Optimizer, replicates: int) -> None:
    """One step of every replicate: the loss is a mean over them, and each descends its own."""
    optimizer.zero_grad()
    (replicates * loss).backward()
    optimizer.step()


def pretrained(name: str, problem: Mixture, seeds: Sequence[int], folder: Path) -> Networks:
    """Networks that have learnt the teacher at every time, where student and fake score begin."""
    file = folder / f"{name}-{seeds[0]}-{len(seeds)}.pt"
    networks = Networks(seeds, problem.centres.shape[-1], NUM_PROMPTS)
    if file.exists():
        networks.load_state_dict(torch.load(file, weights_only=True))
        return networks
    draw, average = seeded_generator(seeds[0], "lab/pretraining"), copy.deepcopy(networks)
    optimizer, scheduler = decaying_adam(networks, 3e-3, PRETRAINING_UPDATES)
    for _ in range(PRETRAINING_UPDATES):
        x_0 = problem.sample(64, draw)
        t = 0.001 + 0.999 * torch.rand(x_0.shape[:3], generator=draw)
        x_t = SCHEDULE.perturb(x_0, torch.randn(x_0.shape, generator=draw), t)
        error = (networks(x_t, t) - problem.denoise(x_t, t)) / t[..., None]
        minimise(error.square().mean(), optimizer, len(seeds))
        scheduler.step()
        move_towards(average, networks, 0.01)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(average.state_dict(), file)
    return average


class Replicates:
    """S students of one problem and their fake scores.

    Args:
        name: The problem.
        seeds: The replicates; each has its own teacher and its own first weights.
        arm: How updates are made.
        steps: Steps K of the student.
        folder: Where pretrained networks are kept.
    """

    def __init__(self, name: str, seeds: Sequence[int], arm: Arm, steps: int, folder: Path) -> None:
        self.arm, self.seeds, self.times = arm, seeds, student_times(steps)
        self.sampler = partial(cps, eta=0) if arm.deterministic else renoise
        self.problem: Mixture = PROBLEMS[name](seeds)
        self.dimensions = self.problem.centres.shape[-1]
        self.batch = self._batch(GENERATIONS)
        self.group_ids = self.batch.group_ids
        streams = ("warm start", "rollout", "fake score", "times", "renoise", "step", "levels", "off path")
        self.draws = {stream: seeded_generator(seeds[0], f"lab/{stream}") for stream in streams}
        self.policy, self.fake_score = (pretrained(name, self.problem, seeds, folder) for _ in range(2))
        self._warm_start()
        self.average = copy.deepcopy(self.policy)
        # Without momentum, as DMD2 has it.
        self.optimizer = torch.optim.Adam(self.policy.parameters(), POLICY_RATES[steps > 1], betas=(0.0, 0.999))
        self.fake_optimizer = torch.optim.Adam(self.fake_score.parameters(), 1e-3, betas=(0.0, 0.999))
        for _ in range(FAKE_SCORE_WARM_UP):
            self._update_fake_score(self._rollout())
        self.fake_optimizer.param_groups[0]["lr"] = arm.fake_rate

    def _batch(self, generations: int) -> PromptBatch:
        """Every prompt of every replicate, so many times each."""
        group_ids = torch.arange(len(self.seeds) * NUM_PROMPTS).repeat_interleave(generations)
        return PromptBatch(
            prompts=[""] * len(group_ids),
            conditioning=NO_PROMPT,
            group_ids=group_ids,
            sample_ids=range(len(group_ids)),
        )

    def predictor(self, network) -> X0Predictor:
        """A network of S replicates as the functions of rdm_rl call one: x_t (N, 1, 1, D), t (N,)."""

        def predict(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
            shape = (len(self.seeds), NUM_PROMPTS, -1)
            return network(x_t.view(*shape, self.dimensions), t.reshape(shape)).view_as(x_t)

        return predict

    def _warm_start(self) -> None:
        """Regress the policy on where the teacher's deterministic sampler ends, from the states of each step."""
        draw, teacher = self.draws["warm start"], self.predictor(self.problem.denoise)
        count = len(self.seeds) * NUM_PROMPTS * WARM_START_STATES
        start = torch.randn(count, 1, 1, self.dimensions, generator=draw)
        x_0 = ode_solution(teacher, start, 1.0, NO_PROMPT, SCHEDULE, 50)
        starts, ends = [start], [x_0]
        for before, t in pairwise(self.times):
            noise = torch.randn(x_0.shape, generator=draw)
            starts.append(self.sampler(SCHEDULE, before, t).next_state(x_0, starts[-1], noise))
            ends.append(ode_solution(teacher, starts[-1], float(t), NO_PROMPT, SCHEDULE, 50))
        shape = (len(self.times), len(self.seeds), NUM_PROMPTS, WARM_START_STATES, self.dimensions)
        states, targets = torch.stack(starts).view(shape), torch.stack(ends).view(shape)
        optimizer, scheduler = decaying_adam(self.policy, 2e-3, WARM_START_UPDATES)
        for update in range(WARM_START_UPDATES):
            step = update % len(self.times)
            rows = torch.randint(WARM_START_STATES, (32,), generator=draw)
            predicted = self.policy(states[step, :, :, rows], self.times[step].expand(*shape[1:3], 32))
            minimise((predicted - targets[step, :, :, rows]).square().mean(), optimizer, len(self.seeds))
            scheduler.step()

    def _rollout(self) -> Rollout:
        shape, policy, levels = (1, 1, self.dimensions), self.predictor(self.policy), self.arm.levels
        times = random_times(levels, self.draws["levels"]) if levels else self.times
        draw = self.draws["rollout"]
        chains = rollout(policy, self.batch, SCHEDULE, times, shape=shape, generator=draw, sampler=self.sampler)
        return chains.only(-1) if levels else chains

    def _update_fake_score(self, samples: Rollout) -> None:
        """A denoising step on one of the predictions of each sample."""
        draw, count = self.draws["fake score"], len(self.group_ids)
        x_0 = samples.x_0[torch.randint(len(samples.times), (count,), generator=draw), torch.arange(count)]
        t, noise = renoise_times(count, draw, interval=(0.001, 1.0)), torch.randn(x_0.shape, generator=draw)
        loss = fake_score_loss(self.predictor(self.fake_score), x_0, NO_PROMPT, t, noise, SCHEDULE, "flow").loss
        minimise(loss, self.fake_optimizer, len(self.seeds))

    def _group_times(self) -> Tensor:
        """A time for each prompt, the same for its samples, shape (N,)."""
        draw, groups = self.draws["times"], len(self.seeds) * NUM_PROMPTS
        if self.arm.times == "alone":
            return renoise_times(groups, draw, interval=RENOISE_RANGE)[self.group_ids]
        low, high = RENOISE_RANGE
        order = torch.rand(len(self.seeds), NUM_PROMPTS, generator=draw).argsort(1)
        strata = (order + torch.rand(order.shape, generator=draw)) / NUM_PROMPTS
        return (low + (high - low) * strata).flatten()[self.group_ids]

    def _direction(self, x_0: Tensor) -> Tensor:
        """Distribution matching's direction at predictions of the policy, shape (N, 1, 1, D)."""
        arm, draw = self.arm, self.draws["renoise"]
        teacher, fake_score = self.predictor(self.problem.denoise), self.predictor(self.fake_score)
        t = self._group_times()
        x_t = SCHEDULE.perturb(x_0, torch.randn(x_0.shape, generator=draw), t)
        if arm.sgmd:
            fake_x_0 = fake_score(x_t.requires_grad_(), t, NO_PROMPT)
            with torch.no_grad():
                push = sgmd_push(x_0, teacher(x_t, t, NO_PROMPT), fake_x_0, SCHEDULE.sigma(t), arm.sgmd)
            (pulled,) = torch.autograd.grad(fake_x_0, x_t, push)
            return append_dims(SCHEDULE.alpha(t), x_0) * pulled
        with torch.no_grad():
            teacher_x_0, fake_x_0 = (network(x_t, t, NO_PROMPT) for network in (teacher, fake_score))
        if arm.correction == "residual":
            fake_x_0 = without_group_residual(x_0, fake_x_0, self.group_ids)
        direction = distribution_matching(x_0, teacher_x_0, fake_x_0, self.group_ids, arm.scale)
        if arm.correction == "projection":
            direction = projected(direction, x_0, fake_x_0)
        return direction

    def _loss(self, states: Tensor, t: Tensor, values: Tensor | None) -> Tensor:
        """The policy's loss from states at a time t, shape (); the direction is taken at its predictions if None."""
        x_0 = self.predictor(self.policy)(states, t.expand(len(states)), NO_PROMPT)
        values = self._direction(x_0.detach()) if values is None else values
        direction = Direction(values=values, applicable=torch.ones(len(values), dtype=torch.bool))
        return policy_loss(x_0, direction).loss

    def _off_path(self, states: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """CDM's second term: the loss where the velocity of the anchor's prediction leads at a lower time."""
        lower = t * (1 - torch.rand((), generator=self.draws["off path"]))
        ahead = cps(SCHEDULE, t, lower, eta=0).mean(x_0, states)
        return self._loss(ahead, lower, None)

    def update(self) -> None:
        """One update of the policy, after those of the fake score."""
        samples = self._rollout()
        for _ in range(self.arm.fake_updates):
            self._update_fake_score(samples)
        step = int(torch.randint(len(samples.times), (1,), generator=self.draws["step"]))
        if step == 0 and self.arm.anchor:
            values = anchored(samples, self.predictor(self.problem.denoise), SCHEDULE, self.arm.anchor).values
        else:
            values = self._direction(samples.x_0[step])
        loss = self._loss(samples.states[step], samples.times[step], values)
        if self.arm.off_path:
            loss = loss + self._off_path(samples.states[step], samples.x_0[step], samples.times[step])
        minimise(loss, self.optimizer, len(self.seeds))
        move_towards(self.average, self.policy, 1 - EMA_DECAY)
        if self.arm.sync_to_policy:
            move_towards(self.fake_score, self.policy, self.arm.sync_to_policy)

    @torch.no_grad()
    def measure(self) -> dict[str, list[float]]:
        """Distances to the truth of the averaged policy, a number for each replicate; smaller is better.

        ``energy`` is the energy distance, ``weights`` the total variation between the modes' shares and weights, and
        ``missed`` the share of modes with less than a quarter of their weight; means over the prompts.
        """
        draw = seeded_generator(self.seeds[0], "lab/evaluation")
        truth = self.problem.sample(EVALUATION_SAMPLES, draw)
        shape, student = (1, 1, self.dimensions), self.predictor(self.average)
        samples = rollout(
            student,
            self._batch(EVALUATION_SAMPLES),
            SCHEDULE,
            self.times,
            shape=shape,
            generator=draw,
            sampler=self.sampler,
        ).sample.view_as(truth)
        shares = mode_shares(samples, self.problem)
        return {
            "energy": energy_distance(samples, truth).mean(1).tolist(),
            "weights": (0.5 * (shares - self.problem.weights).abs().sum(-1)).mean(1).tolist(),
            "missed": (shares < self.problem.weights / 4).float().mean((1, 2)).tolist(),
        }
