"""``RDMTrainer``: the algorithm of ``rdm_rl.rdm`` with the state that a run needs, in the shape of a TRL trainer."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from tqdm import trange
from transformers.trainer_callback import TrainerCallback

from rdm_rl.families.resolution import read_resolutions
from rdm_rl.networks.roles import Role
from rdm_rl.policy import kl_divergence, make_sampler, random_times
from rdm_rl.randomness import drawn_index, normal, seeded_generator
from rdm_rl.ratio import check_unmoved, ratio_metrics
from rdm_rl.rdm import distribution_matching, fake_score_loss, normalize_rewards, policy_loss
from rdm_rl.records import Conditioning, Direction, Experience, Judgement, LossOutput, PromptBatch, Rollout
from rdm_rl.renoise import anneal_progress, renoise_times
from rdm_rl.rewards.kinds import as_training_rewards
from rdm_rl.rewards.registry import RewardSpec, load_rewards, reward_weights
from rdm_rl.settings import explains_names
from rdm_rl.statistics import measure_directions, measure_rewards, reward_metrics
from rdm_rl.trainers.arguments import check_arguments, check_hooks, returned, returned_direction, returned_judgements
from rdm_rl.trainers.evaluation import check_eval_columns, load_eval_features
from rdm_rl.trainers.faults import directions_cause, samples_cause
from rdm_rl.trainers.optimization import OptimizerFactory
from rdm_rl.trainers.prompts import PromptSource, eval_rows, other_columns
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.reward_context import make_reward_context
from rdm_rl.trainers.reward_settings import check_reward_settings, choose_weighting, warn_of_reward_settings
from rdm_rl.trainers.setup import check_models, load_networks
from rdm_rl.trainers.student_run import StudentRun
from rdm_rl.weighting import DirectionStatistics, Weighting


@explains_names
class RDMTrainer(StudentRun):
    r"""Distils a diffusion pipeline into a few-step student, guided by rewards.

    One step is one policy update: the policy rolls out samples, the fake score learns them, every reward judges them
    and says where they should move, and one recorded step of the policy is made again and moved there. Each part is a
    method that a subclass may override; ``docs/tutorials/your_own_trainer.md`` has a table of them:
    :meth:`generate_rollout`, :meth:`compute_fake_score_loss`, :meth:`compute_rewards`, :meth:`compute_advantages`,
    :meth:`compute_distribution_matching`, :meth:`compute_directions`, :meth:`compute_policy_loss`,
    :meth:`training_step`, :meth:`evaluate`, :meth:`log`, :meth:`save_model`, and :meth:`state_dict` with
    :meth:`load_state_dict` for state of its own.

    Args:
        model: The pipeline to distil: a folder, a hub name, a ``.safetensors`` file with the whole model
            (``args.model_config``), or a loaded ``DiffusionPipeline``. It is also the teacher.
        reward_funcs: Registered names, callables ``(images, prompts, **columns)`` or objects with a ``direction``, or a
            list of them; ``"rdm"`` is distribution matching.
        args: The settings; None for the defaults.
        train_dataset: Rows with a ``prompt``, a ``datasets.Dataset`` or a list of dictionaries, say, or the name of a
            file of prompts (see :mod:`rdm_rl.trainers.prompt_files`); other columns travel with the rollout.
        eval_dataset: Rows with a ``prompt`` for evaluations, which measure all of them; None uses the first
            ``per_device_eval_batch_size`` rows of the training set.
        teacher: Another pipeline of the same family and latent space as the teacher; None for ``model``.
        teacher_adapter: A LoRA that only the teacher has, of a style, say: a folder, a file, a hub name, or
            ``owner/name/file.safetensors``.
        policy_init: An already distilled student that the policy starts from: a LoRA of any rank (LCM, DMD2, Hyper; it
            is trained on, and ``peft_config`` is then the fake score's alone), a pipeline, or a bare network. Set
            ``warm_start="none"`` with it.
        peft_config: The adapters of policy and fake score; None trains two full copies of the network.
        weighting: Combines the rewards' directions (see :class:`~rdm_rl.weighting.Weighting`); None for
            ``args.reward_weighting``.
        callbacks: Transformers callbacks.
        optimizers: A function from parameters to an optimiser for the policy, and one for the fake score; None for
            ``args.optim``. (The trained parameters exist only after the adapters or copies are made.)

    Raises:
        ValueError: If settings, data or rewards cannot work together; before a model is loaded where possible.
        TypeError: If an argument is of another kind, or a subclass has a hook of transformers' or TRL's trainers, or
            one that does not take what a run gives it.
        FileNotFoundError: If a model folder does not exist.
    """

    def __init__(
        self,
        model: str | Path | DiffusionPipeline,
        reward_funcs: RewardSpec | Sequence[RewardSpec] = "rdm",
        args: RDMConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *,
        teacher: str | Path | DiffusionPipeline | None = None,
        teacher_adapter: str | Path | None = None,
        policy_init: str | Path | None = None,
        peft_config: LoraConfig | None = None,
        weighting: Weighting | None = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] = (),
        optimizers: tuple[OptimizerFactory | None, OptimizerFactory | None] = (None, None),
    ) -> None:
        """Check everything that can be checked without a model, then load."""
        check_hooks(self, RDMTrainer)
        check_arguments(args, peft_config, callbacks, optimizers)
        args = args or RDMConfig()
        rewards = load_rewards(reward_funcs)
        self.reward_weights = reward_weights(
            list(rewards), args.reward_weights, adaptive=args.reward_weighting != "fixed"
        )
        if train_dataset is None:
            raise ValueError("train_dataset is missing: pass rows with a 'prompt' column.")
        self.prompts = PromptSource(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        self.rewards = as_training_rewards(
            rewards,
            self.reward_weights,
            [name for name in self.prompts.columns if name != "prompt"],
            pathwise=args.reward_gradient == "pathwise",
        )
        check_reward_settings(args, self.rewards)
        self.weighting = choose_weighting(args, self.reward_weights, weighting)
        rows = eval_rows(eval_dataset, self.prompts, args.per_device_eval_batch_size)
        self.eval_prompts, self.eval_columns = [row["prompt"] for row in rows], other_columns(rows, 1)
        if eval_dataset is not None:
            check_eval_columns(self.rewards, self.eval_columns)
        check_models(args, model, teacher, teacher_adapter, policy_init, peft_config)

        super().__init__(args, len(self.prompts), optimizers)
        self.eval_features = load_eval_features(args.eval_features, self.device)
        self.models = load_networks(
            *(args, model, teacher, teacher_adapter, policy_init, peft_config),
            matches_distributions="rdm" in rewards,
            device=self.device,
            autocast=self.autocast,
        )
        self.networks = self.models.networks
        self.family = self.networks.family
        for role in get_args(Role):
            self.share_parameters(self.networks.parameters(role))
        # A checkpoint holds what is trained; these say what it belongs to.
        self.fingerprints = self.networks.fingerprints()
        self.sampler = make_sampler(args.sampler, args.eta)
        self.sizes = [self.family, *map(self.family.at, read_resolutions(args.resolution)[1:])]
        self.times = self.family.student_times(args.num_inference_steps, args.sampler).to(self.device)
        self.start_callbacks(callbacks, self.networks.module("policy"))
        self.context = make_reward_context(
            self.networks,
            args,
            self.teacher_guidance_scale,
            sizes=self.sizes,
            device=self.device,
            global_step=lambda: self.state.global_step,
            last_checkpoint=lambda: self.last_checkpoint,
            distribution_matching=lambda x_0, *others: returned_direction(
                self.compute_distribution_matching(x_0, *others), x_0
            ),
            anywhere=self.on_any_process if args.shard else bool,
        )
        for reward in self.rewards.values():
            reward.bind(self.context)
        warn_of_reward_settings(args, self.rewards, self.reward_weights, self.weighting)
        self.experiences: list[Experience] = []
        self._is_fresh = True  # No update has been made on the rollout yet.
        self._spoilt = ""  # Why none can be.

    def training_step(self) -> dict[str, float]:
        """One update of the method: rollouts, fake-score updates, rewards, policy update.

        With ``num_iterations`` M, all but the last of these are made for every Mth policy update only.

        Returns:
            Numbers for the log.
        """
        number, iteration = divmod(self.state.global_step, self.args.num_iterations)
        metrics: dict[str, float] = {}
        if iteration == 0 or not (self.experiences or self._spoilt):
            rollouts = self._rollouts(number)
            # Of samples that are not finite, nobody learns, and no reward is asked: it would be blamed for them.
            self.experiences, self._spoilt = [], self.first_cause(samples_cause(rollouts))
            if not self._spoilt:
                metrics |= self._update_fake_score_on(rollouts, number)
                metrics |= self._make_experiences(rollouts, number)
        if self._spoilt:
            self.skip_update("policy", self._spoilt)
            return metrics
        return metrics | self._update_policy()

    def _rollouts(self, number: int, stream: str = "train") -> list[Rollout]:
        """The policy's chains for each micro-batch of one rollout."""
        batches = self.prompt_batches(number, stream)
        return [returned("generate_rollout", self.generate_rollout(batch), Rollout) for batch in batches]

    def _update_fake_score_on(self, rollouts: Sequence[Rollout], number: int) -> dict[str, float]:
        """The fake score's updates on new samples, a rollout for each micro-batch."""
        count, metrics = self.args.fake_score_updates_per_policy_update, dict[str, float]()
        if count and self._last_rollout is not None and self.is_logging_step():
            metrics["fake_score/lag"] = self._fake_score_lag(self._last_rollout)
        for index in range(count):
            seen = self._update_fake_score(rollouts, "fake_score", number * count + index)
            if index == 0 and "fake_score/loss" in seen:  # Before it has learnt them.
                metrics["fake_score/fresh_loss"] = seen["fake_score/loss"]
            metrics |= seen
        self._last_rollout = rollouts[0]
        return metrics

    def _make_experiences(self, rollouts: Sequence[Rollout], number: int) -> dict[str, float]:
        """Values first, directions second: the rewards' say on the steps that will be replayed, and its weights."""
        steps = self.draw_steps(rollouts[0], number)
        recorded = [(rollout, step) for rollout in rollouts for step in steps]
        judgements = [
            returned_judgements(self.compute_rewards(rollout, step), self.rewards) for rollout, step in recorded
        ]
        judged = [rollout for rollout, _ in recorded]
        statistics = measure_rewards(
            judgements, [rollout.batch.group_ids for rollout in judged], self.sum_over_processes
        )
        advantages = returned("compute_advantages", self.compute_advantages(judged, judgements, statistics), list)
        moves = [
            returned("compute_directions", self.compute_directions(rollout, step, said, normalised), dict)
            for (rollout, step), said, normalised in zip(recorded, judgements, advantages, strict=True)
        ]
        self.experiences = [
            Experience(rollout=rollout, step=step, directions=directions)
            for (rollout, step), directions in zip(recorded, moves, strict=True)
        ]
        self._is_fresh = True
        directions = [experience.directions for experience in self.experiences]
        statistics = measure_directions(statistics, directions, self.sum_over_processes)
        # They are of all processes, which so agree at no cost; a running mean would keep what is not finite for ever.
        if not all(math.isfinite(seen.rms or 0.0) for seen in statistics.rewards.values()):
            self._spoilt = self.first_cause(directions_cause(self.experiences)) or "a direction is too large"
            return {}
        self.weighting.update(statistics, self.state.global_step)
        metrics = _means(_reward_numbers(*both) for both in zip(judgements, directions, strict=True))
        return metrics | reward_metrics(statistics, self.weighting)

    def draw_steps(self, rollout: Rollout, number: int) -> list[int]:
        """The recorded steps that will be replayed: ``num_replayed_steps`` of those that a reward or ``beta`` acts on.

        They are the same for all samples and processes.

        Args:
            rollout: A rollout.
            number: Its number, which seeds the choice.

        Returns:
            Their indices, without repetition.

        Raises:
            ValueError: If a likelihood is needed and no step has one.
        """
        acting = [reward for name, reward in self.rewards.items() if self.reward_weights[name]]
        every = range(len(rollout.times))
        likelihood = self.args.beta or any(reward.needs_likelihood for reward in acting)
        if likelihood and not any(rollout.is_random(step) for step in every):
            raise ValueError(
                "A black-box reward or beta needs the likelihood of random steps, but generate_rollout() returned a "
                "Rollout without any: give it the sampler's transitions, as rdm_rl.policy.rollout does."
            )
        candidates = [
            step
            for step in every
            if any(reward.acts_on(step, rollout) for reward in acting) or (self.args.beta and rollout.is_random(step))
        ]
        candidates = candidates or [*every]
        generator = seeded_generator(self.args.seed, "replayed_step", number)
        count = min(self.args.num_replayed_steps, len(candidates))
        return [candidates.pop(int(torch.randint(len(candidates), (1,), generator=generator))) for _ in range(count)]

    def generate_rollout(self, batch: PromptBatch) -> Rollout:
        """The policy's chains for a batch of prompts, without a graph.

        With ``random_times``, of which all processes draw the same for an update, they hold the last step alone.

        Args:
            batch: The prompts.

        Returns:
            The recorded chains.
        """
        family, noise, longest = self.family_at(batch), self.generators("rollout", batch), self.args.random_times
        if longest is None:
            return self._walk(batch, noise, self.sampler, family)
        draw = seeded_generator(self.args.seed, f"{batch.stream}/random_times", batch.update)
        times = family.schedule.spaced(random_times(longest, draw), self.args.num_inference_steps).to(self.device)
        return self._walk(batch, noise, self.sampler, family, times).only(-1)

    def compute_rewards(self, rollout: Rollout, step: int) -> dict[str, Judgement]:
        """What every reward says of the samples at one recorded step.

        Args:
            rollout: The recorded chains.
            step: Index of the step that will be replayed.

        Returns:
            The judgements by reward name: values, and directions where these come in the same pass.
        """
        early = [name for name, reward in self.rewards.items() if reward.begins_early]
        for name in early:
            self.rewards[name].begin(rollout, step)
        # Those that have begun are waited for last, so that they work while the others do.
        draws = f"/{step}" if self.args.num_replayed_steps > 1 else ""  # Each step is re-noised by itself.
        judgements = {
            name: self.rewards[name].judge(
                rollout, step, generator=self.generators(f"reward/{name}{draws}", rollout.batch)
            )
            for name in [*(name for name in self.rewards if name not in early), *early]
        }
        return {name: judgements[name] for name in self.rewards}

    def compute_advantages(
        self,
        rollouts: Sequence[Rollout],
        judgements: Sequence[Mapping[str, Judgement]],
        statistics: DirectionStatistics,
    ) -> list[dict[str, Tensor]]:
        """The values of black boxes as advantages, as ``reward_baseline`` and ``scale_rewards`` say.

        Args:
            rollouts: The rollout that each judgement is of; one stands several times if several of its steps are used.
            judgements: What each reward says, by name.
            statistics: Mean and spread of the values of all samples of all processes.

        Returns:
            For each rollout, the advantages, shape (N,), of each reward whose direction needs them, by name.
        """
        spreads = {}
        for name, seen in statistics.rewards.items():
            if seen.std is not None:
                spread = self.reward_spreads[name]
                spread.add(seen.std)
                spreads[name] = spread.value or 0.0
        by_batch = self.args.reward_baseline == "batch"
        return [
            {
                name: normalize_rewards(
                    said.rewards,
                    rollout.batch.group_ids,
                    self.args.scale_rewards,
                    spread=spreads.get(name, 0.0),  # It may have said nothing of any sample.
                    batch_mean=(statistics.rewards[name].mean or 0.0) if by_batch else None,
                )
                for name, said in judged.items()
                if said.direction is None and said.rewards is not None
            }
            for rollout, judged in zip(rollouts, judgements, strict=True)
        ]

    def compute_distribution_matching(
        self, x_0: Tensor, teacher_x_0: Tensor, fake_x_0: Tensor, t: Tensor, group_ids: Tensor
    ) -> Tensor:
        """R_dm's direction, of what policy, teacher and fake score predict; here a scale of your own belongs.

        Args:
            x_0: The policy's predictions at the recorded step, shape (N, C, H, W).
            teacher_x_0: The teacher's predictions at a re-noising of them, the same shape.
            fake_x_0: The fake score's there, the same shape.
            t: Times of the re-noising, shape (N,), in (0, 1].
            group_ids: Prompt of each sample, shape (N,), int64.

        Returns:
            The direction, shape (N, C, H, W).
        """
        args = self.args
        return distribution_matching(x_0, teacher_x_0, fake_x_0, group_ids, args.dm_normalization, args.dm_scale_floor)

    def compute_directions(
        self, rollout: Rollout, step: int, judgements: Mapping[str, Judgement], advantages: Mapping[str, Tensor]
    ) -> dict[str, Direction]:
        """Where each reward wants the predictions of a recorded step to move.

        Args:
            rollout: The recorded chains.
            step: Index of the step.
            judgements: What each reward says of it, by name.
            advantages: The advantages of those whose direction needs them, by name.

        Returns:
            The directions, shape (N, C, H, W), by name; what a direction holds depends on nothing that comes later.

        Raises:
            ValueError: If a black box has no advantages.
        """
        directions = {}
        for name, said in judgements.items():
            if said.direction is None and name not in advantages:
                raise ValueError(
                    f"The reward {name!r} is a black box, and compute_advantages() returned no advantages for it. Give "
                    "one of shape (N,) for each reward whose judgement has no direction."
                )
            directions[name] = said.direction or self.rewards[name].direction(rollout, step, said, advantages[name])
        return directions

    def replay_step(self, rollout: Rollout, step: int) -> Tensor:
        """The current policy's predictions at a recorded step, with gradients.

        Args:
            rollout: The recorded chains.
            step: Index of the step.

        Returns:
            The predictions, shape (N, C, H, W).
        """
        t = rollout.times[step].expand(len(rollout.batch.prompts))
        return self.networks.predict(
            "policy", rollout.states[step], t, rollout.batch.conditioning, self.args.guidance_scale
        )

    def compute_policy_loss(self, experience: Experience) -> LossOutput:
        """The policy's loss: one recorded step made again with gradients, and moved along the combined direction.

        Args:
            experience: The rollout, the step, and where each reward wants its predictions to move.

        Returns:
            The loss. Of its metrics, those whose name has no slash are logged as ``policy/<name>``.

        Raises:
            RuntimeError: If the policy has not been updated since the rollout, but disagrees with it.
        """
        rollout, step = experience.rollout, experience.step
        x_0 = self.replay_step(rollout, step)
        current, metrics = self._at_prediction(experience.directions, x_0.detach())
        output = policy_loss(x_0, self.weighting.combine(current))
        if self.reference is None or not rollout.is_random(step):
            return LossOutput(loss=output.loss, metrics=metrics)
        with self.reference.applied(), torch.no_grad():
            reference_x_0 = self.replay_step(rollout, step)
        level = self.args.importance_sampling_level
        divergence = kl_divergence(x_0, reference_x_0, rollout.transitions[step], level).mean()
        metrics |= {"loss": output.loss.item(), "kl": divergence.item()}
        return LossOutput(loss=output.loss + self.args.beta * divergence, metrics=metrics)

    def _at_prediction(
        self, directions: Mapping[str, Direction], x_0: Tensor
    ) -> tuple[dict[str, Direction], dict[str, float]]:
        """The directions at the current prediction, and what the log says of their likelihood ratios."""
        current, metrics = dict(directions), dict[str, float]()
        for name, direction in directions.items():
            if direction.recorded is not None:
                reweighted = direction.recorded.at(x_0)
                if self._is_fresh:
                    exact = not (self.args.bf16 or self.args.fp16)
                    check_unmoved(name, reweighted.log_ratio, self.args.importance_sampling_level, exact=exact)
                current[name] = replace(direction, values=reweighted.values)
                metrics |= {f"rewards/{name}/{key}": value for key, value in ratio_metrics(reweighted).items()}
        return current, metrics

    def compute_fake_score_loss(self, x_0: Tensor, conditioning: Conditioning, t: Tensor, noise: Tensor) -> LossOutput:
        """The fake score's denoising loss on the policy's predictions.

        Args:
            x_0: Predictions of the policy, of a randomly drawn step for each sample, shape (N, C, H, W).
            conditioning: Their prompts, N rows.
            t: Times to re-noise them to, shape (N,), in (0, 1].
            noise: Standard normal noise, shape (N, C, H, W).

        Returns:
            The loss. Of its metrics, those whose name has no slash are logged as ``fake_score/<name>``.
        """
        return fake_score_loss(
            self.networks.predictor("fake_score"),
            x_0,
            conditioning,
            t,
            noise,
            self.family.schedule,
            self.networks.family_of("fake_score").prediction_type,
        )

    def _fake_score_loss(self, rollout: Rollout, stream: str, update: int) -> LossOutput:
        """The loss on a rollout: the steps, times and noise are drawn here, from a stream for each phase."""
        generators = self.generators(stream, rollout.batch, update)
        count, steps = len(rollout.batch.prompts), len(rollout.times)
        drawn = torch.cat([torch.randint(steps, (1,), generator=generator) for generator in generators])
        t = renoise_times(
            count,
            generators,
            distribution=self.args.renoise_distribution,
            interval=(1e-3, 1.0),
            progress=anneal_progress(self.state.global_step, self.args.renoise_anneal_steps),
        )
        x_0 = rollout.x_0[drawn.to(self.device), torch.arange(count, device=self.device)]
        noise = normal(x_0.shape, generators, self.device)
        output = self.compute_fake_score_loss(x_0, rollout.batch.conditioning, t.to(self.device), noise)
        return returned("compute_fake_score_loss", output, LossOutput)

    def _update_fake_score(self, rollouts: Sequence[Rollout], stream: str, update: int) -> dict[str, float]:
        losses = (self._fake_score_loss(rollout, stream, update) for rollout in rollouts)
        return self._update("fake_score", losses, rollouts)

    def _update_policy(self) -> dict[str, float]:
        self.networks.release_teacher()
        losses = (
            returned("compute_policy_loss", self.compute_policy_loss(experience), LossOutput)
            for experience in self.experiences
        )
        metrics = self._update("policy", losses, [experience.rollout for experience in self.experiences])
        self._is_fresh = False
        return metrics

    def _update(self, role: Role, outputs: Iterable[LossOutput], rollouts: Sequence[Rollout]) -> dict[str, float]:
        """One update of a role with the mean of the losses, one of each rollout, each freed before the next is made."""
        optimizer, numbers, losses = self.optimizers[role], [], []
        for output in outputs:
            optimizer.backward(output.loss, 1 / len(rollouts))
            losses.append(output.loss.item())
            seen = {"loss": losses[-1], **output.metrics}
            numbers.append({key if "/" in key else f"{role}/{key}": value for key, value in seen.items()})
        rate = optimizer.learning_rate  # That of this update: the step below sets the next one's.
        norm = self.make_update(role, optimizer, losses, [rollout.batch.prompts for rollout in rollouts])
        metrics = {**_means(numbers), f"{role}/grad_norm": norm, f"{role}/learning_rate": rate}
        if not math.isfinite(norm):
            return {name: value for name, value in metrics.items() if math.isfinite(value)}
        if role == "policy" and self.average is not None:
            self.average.step()
        return metrics

    @torch.no_grad()
    def _fake_score_lag(self, rollout: Rollout) -> float:
        """How much worse the fake score knows the policy as it is than as it was in the last rollout.

        One step of that rollout, the one that the fake score last saw, is made again from the recorded states, and both
        predictions are judged at the same times and noise: only the policy's updates since differ. Two rollouts of
        other prompts would differ by chance far more than by that, and a whole rollout made again costs K passes.
        """
        update = self.state.global_step
        step = drawn_index(len(rollout.times), self.args.seed, "health/step", update)
        seen = rollout.only(step)
        again = replace(seen, x_0=self.replay_step(rollout, step).unsqueeze(0))
        now, before = (self._fake_score_loss(made, "health", update).loss.item() for made in (again, seen))
        return now - before

    # ----- before the first update -----

    def warm_up_fake_score(self) -> None:
        """Let the fake score learn the initial policy before it is asked where to go."""
        count = self.args.fake_score_updates_per_policy_update
        rollouts: list[Rollout] = []
        losses = []
        steps = self.args.fake_score_warmup_steps or 0
        bar = trange(steps, desc="fake score: warm-up", disable=self.hides_progress or not steps)
        for update in bar:
            if update % count == 0:  # As in training: so many updates on each rollout.
                rollouts = self._rollouts(update // count, "warmup")
            losses.append(self._update_fake_score(rollouts, "fake_score", update).get("fake_score/loss", math.nan))
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        self.record_phase("fake_score_warmup/loss", losses)


def _reward_numbers(judgements: Mapping[str, Judgement], directions: Mapping[str, Direction]) -> dict[str, float]:
    """The numbers of their own that rewards give with their judgements and directions."""
    metrics = {name: said.metrics for name, said in judgements.items()}
    metrics |= {name: {**metrics.get(name, {}), **direction.metrics} for name, direction in directions.items()}
    return {f"rewards/{name}/{key}": value for name, numbers in metrics.items() for key, value in numbers.items()}


def _means(numbers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over those entries that have it."""
    values = defaultdict[str, list[float]](list)
    for entry in numbers:
        for name, value in entry.items():
            values[name].append(value)
    return {name: sum(seen) / len(seen) for name, seen in values.items()}
