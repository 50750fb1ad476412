"""``RDMTrainer``: the algorithm of ``rdm_rl.rdm`` with the state that a run needs, in the shape of a TRL trainer."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args
from zlib import crc32

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor
from tqdm import trange
from transformers.trainer_callback import TrainerCallback, TrainerState

from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.families import Family
from rdm_rl.families.encoding import EMPTY_PROMPT
from rdm_rl.networks.roles import Role
from rdm_rl.networks.sharding import gather
from rdm_rl.policy import kl_divergence, make_sampler, rollout
from rdm_rl.randomness import Generators, normal, seeded_generator, seeded_generators
from rdm_rl.ratio import check_unmoved, ratio_metrics
from rdm_rl.rdm import distribution_matching, fake_score_loss, normalize_rewards, policy_loss
from rdm_rl.records import Conditioning, Direction, Experience, Judgement, LossOutput, PromptBatch, Rollout
from rdm_rl.renoise import anneal_progress, renoise_times
from rdm_rl.rewards.kinds import as_training_rewards
from rdm_rl.rewards.registry import RewardSpec, load_rewards, reward_weights
from rdm_rl.student import public_name, save_student
from rdm_rl.trainers.callbacks import log_image
from rdm_rl.trainers.checkpointing import (
    check_settings,
    find_checkpoint,
    read_checkpoint,
    rotate_checkpoints,
    write_checkpoint,
)
from rdm_rl.trainers.loop import TrainingLoop
from rdm_rl.trainers.optimization import OptimizerFactory, PolicyAverage, RoleOptimizer, make_optimizer, make_scheduler
from rdm_rl.trainers.prompts import PromptSource, other_columns
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.reward_context import make_reward_context
from rdm_rl.trainers.reward_settings import (
    check_policy_gradient_settings,
    check_weighting_settings,
    warn_of_reward_settings,
)
from rdm_rl.trainers.setup import check_models, load_networks, teacher_key
from rdm_rl.trainers.warm_start import OdePairs, collect_pairs, regress
from rdm_rl.weighting import (
    DirectionStatistics,
    RunningMean,
    Weighting,
    make_weighting,
    measure_directions,
    measure_rewards,
    reward_metrics,
)

EVALUATION_SEED = 12345
SPREAD_DECAY = 0.95


class RDMTrainer(TrainingLoop):
    r"""Distils a diffusion pipeline into a few-step student, guided by rewards.

    One step is one policy update: the policy rolls out samples, the fake score learns them, every reward judges them
    and says where they should move, and one recorded step of the policy is made again and moved there. Each part is a
    method that a subclass may override; ``docs/tutorials/your_own_trainer.md`` has a table of them:
    :meth:`generate_rollout`, :meth:`compute_fake_score_loss`, :meth:`compute_rewards`, :meth:`compute_advantages`,
    :meth:`compute_distribution_matching`, :meth:`compute_directions`, :meth:`compute_policy_loss`,
    :meth:`training_step`, :meth:`evaluate`, :meth:`log`, :meth:`save_model`, and :meth:`state_dict` with
    :meth:`load_state_dict` for state of its own.

    Args:
        model: The pipeline to distil: a folder, a hub name, or a loaded ``DiffusionPipeline``. It is also the teacher.
        reward_funcs: Registered names, callables ``(images, prompts, **columns)`` or objects with a ``direction``, or a
            list of them; ``"rdm"`` is distribution matching.
        args: The settings; None for the defaults.
        train_dataset: Rows with a ``prompt``; other columns travel with the rollout.
        eval_dataset: Rows with a ``prompt`` for the sample grids; None uses the first rows of the training set.
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
        args = args or RDMConfig()
        rewards = load_rewards(reward_funcs)
        self.reward_weights = reward_weights(
            list(rewards), args.reward_weights, adaptive=args.reward_weighting != "fixed"
        )
        if "rdm" in rewards and not args.fake_score_updates_per_policy_update:
            raise ValueError(
                "reward_funcs has 'rdm', which compares the teacher with the fake score, but the fake score is never "
                "trained: fake_score_updates_per_policy_update=0. Set it to 5, say, or leave out 'rdm'."
            )
        if train_dataset is None:
            raise ValueError("train_dataset is missing: pass rows with a 'prompt' column.")
        self.prompts = PromptSource(train_dataset, args.seed if args.data_seed is None else args.data_seed)
        self.rewards = as_training_rewards(
            rewards,
            self.reward_weights,
            list(other_columns([train_dataset[0]], 1)),
            pathwise=args.reward_gradient == "pathwise",
        )
        check_policy_gradient_settings(args, self.rewards)
        if weighting is not None and not isinstance(weighting, Weighting):
            raise TypeError(
                f"weighting={weighting!r} does not derive from rdm_rl.weighting.Weighting. Derive from it and override "
                "combine(directions), and update(statistics, step) if it learns from them."
            )
        check_weighting_settings(args, list(rewards), weighting)
        if weighting is None:
            weighting = make_weighting(
                args.reward_weighting,
                self.reward_weights,
                budget=args.fidelity_budget,
                reference=args.adaptive_reference,
                start_step=args.reward_start_step,
                ramp_steps=args.reward_ramp_steps,
                conflict=args.reward_conflict,
            )
        self.weighting = weighting
        self.reward_spreads: dict[str, RunningMean] = {}
        looked_at = train_dataset if eval_dataset is None else eval_dataset
        count = min(args.per_device_eval_batch_size, len(PromptSource(looked_at, 0, "eval_dataset")))
        eval_rows = [looked_at[index] for index in range(count)]
        self.eval_prompts = [row["prompt"] for row in eval_rows]
        self.eval_columns = other_columns(eval_rows, 1)
        check_models(args, model, teacher, teacher_adapter, policy_init, peft_config)

        super().__init__(args, len(self.prompts))
        self._models = load_networks(
            *(args, model, teacher, teacher_adapter, policy_init, peft_config),
            matches_distributions="rdm" in rewards,
            device=self.device,
            autocast=self.autocast,
        )
        self.networks, self.model_name = self._models.networks, self._models.name
        for role in get_args(Role):
            self.share_parameters(self.networks.parameters(role))
        # A checkpoint holds what is trained; these say what it belongs to.
        self._fingerprints = self.networks.fingerprints()
        self.sampler = make_sampler(args.sampler, args.eta)
        self.times = self.family.student_times(args.num_inference_steps, args.sampler).to(self.device)
        self.start_callbacks(callbacks, self.networks.module("policy"))
        self._last_checkpoint: Path | None = None
        context = make_reward_context(
            self.networks,
            args,
            self.teacher_guidance_scale,
            first_time=float(self.times[0]),
            device=self.device,
            global_step=self._global_step,
            last_checkpoint=lambda: self._last_checkpoint,
            distribution_matching=self.compute_distribution_matching,
            anywhere=self.on_any_process if args.shard else bool,
        )
        for reward in self.rewards.values():
            reward.bind(context)
        warn_of_reward_settings(args, self.rewards, self.reward_weights, self.weighting)
        self._own_optimizers = optimizers
        self.optimizers: dict[Role, RoleOptimizer] = {}
        self.average: PolicyAverage | None = None
        self.reference: PolicyAverage | None = None
        self.experiences: list[Experience] = []
        self._is_fresh = True  # No update has been made on the rollout yet.
        self._last_rollout: Rollout | None = None

    # ----- what a run is made of -----

    @property
    def family(self) -> Family:
        """The border to the model."""
        return self.networks.family

    def create_optimizers(self) -> None:
        """Make the optimiser of each role: the policy's from the inherited settings, the fake score's from its own."""
        args, (own_policy, own_fake_score) = self.args, self._own_optimizers
        rollouts = -(-self.state.max_steps // args.num_iterations)
        updates = args.fake_score_warmup_steps + rollouts * args.fake_score_updates_per_policy_update
        plan: tuple[tuple[Role, Any, float, int, float], ...] = (
            ("policy", own_policy, args.learning_rate, self.state.max_steps, args.max_grad_norm),
            ("fake_score", own_fake_score, args.fake_score_learning_rate, updates, args.fake_score_max_grad_norm),
        )
        for role, own, learning_rate, steps, max_grad_norm in plan:
            self.optimizers[role] = self._role_optimizer(role, own, learning_rate, steps, max_grad_norm)

    def _role_optimizer(
        self, role: Role, own: Any, learning_rate: float, steps: int, max_grad_norm: float, *, warm_up: bool = True
    ) -> RoleOptimizer:
        parameters = self.networks.parameters(role)
        optimizer = own(parameters) if own else make_optimizer(self.args, parameters, learning_rate)
        return RoleOptimizer(
            parameters=parameters,
            optimizer=optimizer,
            scheduler=make_scheduler(self.args, optimizer, steps, warm_up=warm_up),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.args.fp16),
            max_grad_norm=max_grad_norm,
            reduce=self.reduce_gradients,
        )

    # ----- the run -----

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> dict[str, float]:
        """Run from the start, or from a checkpoint as if the run had not stopped.

        Args:
            resume_from_checkpoint: True for the newest checkpoint in ``output_dir``, or a checkpoint's folder.

        Returns:
            The last logged numbers.

        Raises:
            RuntimeError: If this trainer has trained before; a warm start would undo what it learnt.
        """
        if self.optimizers:
            raise RuntimeError("This trainer has already trained. Make a new one, and resume from a checkpoint there.")
        resume = resume_from_checkpoint or self.args.resume_from_checkpoint
        checkpoint = find_checkpoint(self.args.output_dir, resume) if resume else None
        if checkpoint is not None:
            check_settings(checkpoint, self.args.to_dict(), self.accelerator.num_processes, self._fingerprints)
        self.state.max_steps = self.count_steps()
        self.state.compute_steps(self.args, self.state.max_steps)
        self.create_optimizers()
        if checkpoint is not None:
            self._load_checkpoint(checkpoint)
        self.cache_prompts()
        if checkpoint is None:
            if self.args.warm_start == "ode":
                self.run_warm_start()
            self._start_average()
            self.warm_up_fake_score()

        self.run_updates(evaluate_first=self.args.eval_on_start and not resume)
        if self.args.push_to_hub:
            self.push_to_hub()
        return self.state.log_history[-1] if self.state.log_history else {}

    def training_step(self) -> dict[str, float]:
        """One update of the method: rollouts, fake-score updates, rewards, policy update.

        With ``num_iterations`` M, all but the last of these are made for every Mth policy update only.

        Returns:
            Numbers for the log.
        """
        number, iteration = divmod(self._global_step(), self.args.num_iterations)
        metrics: dict[str, float] = {}
        if iteration == 0 or not self.experiences:
            rollouts = [self.generate_rollout(batch) for batch in self.prompt_batches(number)]
            metrics |= self._update_fake_score_on(rollouts, number)
            metrics |= self._make_experiences(rollouts, number)
        return metrics | self._update_policy()

    def _update_fake_score_on(self, rollouts: Sequence[Rollout], number: int) -> dict[str, float]:
        """The fake score's updates on new samples, a rollout for each micro-batch."""
        count = self.args.fake_score_updates_per_policy_update
        metrics = self._fake_score_health(rollouts[0]) if count and self.is_logging_step() else {}
        for index in range(count):
            metrics |= self._update_fake_score(rollouts, "fake_score", number * count + index)
        self._last_rollout = rollouts[0]
        return metrics

    def _make_experiences(self, rollouts: Sequence[Rollout], number: int) -> dict[str, float]:
        """Values first, directions second: the rewards' say on the steps that will be replayed, and its weights."""
        steps = self.draw_steps(rollouts[0], number)
        recorded = [(rollout, step) for rollout in rollouts for step in steps]
        judgements = [self.compute_rewards(rollout, step) for rollout, step in recorded]
        judged = [rollout for rollout, _ in recorded]
        statistics = measure_rewards(
            judgements, [rollout.batch.group_ids for rollout in judged], self.sum_over_processes
        )
        advantages = self.compute_advantages(judged, judgements, statistics)
        self.experiences = [
            Experience(rollout=rollout, step=step, directions=self.compute_directions(rollout, step, said, given))
            for (rollout, step), said, given in zip(recorded, judgements, advantages, strict=True)
        ]
        self._is_fresh = True
        directions = [experience.directions for experience in self.experiences]
        statistics = measure_directions(statistics, directions, self.sum_over_processes)
        self.weighting.update(statistics, self._global_step())
        metrics = _means(
            {f"rewards/{name}/{key}": value for name, said in every.items() for key, value in said.metrics.items()}
            for every in judgements
        )
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
        left = [
            step
            for step in every
            if any(reward.acts_on(step, rollout) for reward in acting) or (self.args.beta and rollout.is_random(step))
        ]
        left = left or [*every]
        generator = seeded_generator(self.args.seed, "replayed_step", number)
        count = min(self.args.num_replayed_steps, len(left))
        return [left.pop(int(torch.randint(len(left), (1,), generator=generator))) for _ in range(count)]

    def prompt_batches(self, update: int, stream: str = "train") -> Iterator[PromptBatch]:
        """The micro-batches of this process for one rollout.

        Args:
            update: Number of the rollout.
            stream: Keeps the samples of other phases apart from those of training.

        Yields:
            ``gradient_accumulation_steps`` batches of ``per_device_train_batch_size`` samples.
        """
        args, process = self.args, self.accelerator
        groups = args.per_device_train_batch_size // args.num_generations
        for micro in range(args.gradient_accumulation_steps):
            first = (
                (update * args.gradient_accumulation_steps + micro) * process.num_processes + process.process_index
            ) * groups
            rows = self.prompts.rows(first, groups)
            texts = [row["prompt"] for row in rows]
            sample_ids = range(first * args.num_generations, (first + groups) * args.num_generations)
            prompts = [text for text in texts for _ in range(args.num_generations)]
            yield PromptBatch(
                prompts=prompts,
                conditioning=self.family.encode(texts).repeat(args.num_generations),
                group_ids=torch.arange(first, first + groups, device=self.device).repeat_interleave(
                    args.num_generations
                ),
                sample_ids=sample_ids,
                columns=other_columns(rows, args.num_generations),
                noise_seeds=self._noise_seeds(prompts, sample_ids, stream, update),
                stream=stream,
                update=update,
            )

    def _noise_seeds(
        self, prompts: Sequence[str], sample_ids: Sequence[int], stream: str, update: int
    ) -> list[int] | None:
        """The seeds of the initial noises, where these are shared, drawn from a pool, or paired with kept images."""
        args = self.args
        if args.group_noise == "own" and args.noise_pool is None and args.teacher_cache_dir is None:
            return None
        size = args.num_generations if args.group_noise == "shared" else 1
        generators = seeded_generators(args.seed, f"{stream}/noise_seed", update, (one // size for one in sample_ids))
        if args.noise_pool is None:
            return [int(torch.randint(2**62, (1,), generator=one)) for one in generators]
        # A pool belongs to its prompt and not to the run, so that another run finds the same teacher images.
        drawn = [int(torch.randint(args.noise_pool, (1,), generator=one)) for one in generators]
        return [crc32(prompt.encode()) << 24 | number for prompt, number in zip(prompts, drawn, strict=True)]

    def generate_rollout(self, batch: PromptBatch) -> Rollout:
        """The policy's chains for a batch of prompts, without a graph.

        Args:
            batch: The prompts.

        Returns:
            The recorded chains.
        """
        return rollout(
            self.networks.predictor("policy", self.args.guidance_scale),
            batch,
            self.family.schedule,
            self.times,
            shape=self.family.latent_shape,
            generator=self.generators("rollout", batch),
            sampler=self.sampler,
            step_noise=self.family.step_noise,
        )

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
                spread = self.reward_spreads.setdefault(name, RunningMean(decay=SPREAD_DECAY))
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
            teacher_x_0: The teacher's predictions at R re-noisings of them, shape (R, N, C, H, W).
            fake_x_0: The fake score's there, the same shape.
            t: Times of the re-noisings, shape (R, N), in (0, 1].
            group_ids: Prompt of each sample, shape (N,), int64.

        Returns:
            The direction of each re-noising, shape (R, N, C, H, W); their mean is the reward's direction.
        """
        args = self.args
        return distribution_matching(
            x_0, teacher_x_0, fake_x_0, group_ids, args.dm_normalization, args.dm_group, args.dm_scale_floor
        )

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
        """
        return {
            name: self.rewards[name].direction(rollout, step, said, advantages[name])
            if said.direction is None
            else said.direction
            for name, said in judgements.items()
        }

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
        generator = self.generators(stream, rollout.batch, update)
        count, steps = len(rollout.batch.prompts), len(rollout.times)
        drawn = torch.cat([torch.randint(steps, (1,), generator=one) for one in generator])
        t = renoise_times(
            count,
            generator,
            distribution=self.args.renoise_distribution,
            interval=(1e-3, 1.0),
            progress=anneal_progress(self._global_step(), self.args.renoise_anneal_steps),
        )
        x_0 = rollout.x_0[drawn.to(self.device), torch.arange(count, device=self.device)]
        noise = normal(x_0.shape, generator, self.device)
        return self.compute_fake_score_loss(x_0, rollout.batch.conditioning, t.to(self.device), noise)

    def generators(self, stream: str, batch: PromptBatch, update: int | None = None) -> list[torch.Generator]:
        """One generator for each sample of a batch, a function of seed, stream, update and sample."""
        number = batch.update if update is None else update
        return seeded_generators(self.args.seed, f"{batch.stream}/{stream}", number, batch.sample_ids)

    def _update_fake_score(self, rollouts: Sequence[Rollout], stream: str, update: int) -> dict[str, float]:
        losses = (self._fake_score_loss(rollout, stream, update) for rollout in rollouts)
        return self._update("fake_score", losses, len(rollouts))

    def _update_policy(self) -> dict[str, float]:
        self.networks.release_teacher()
        losses = (self.compute_policy_loss(experience) for experience in self.experiences)
        metrics = self._update("policy", losses, len(self.experiences))
        self._is_fresh = False
        if self.average is not None:
            self.average.step()
        return metrics

    def _update(self, role: Role, outputs: Iterable[LossOutput], count: int) -> dict[str, float]:
        """One update of a role with the mean of so many losses, each freed before the next is computed."""
        optimizer, numbers = self.optimizers[role], []
        for output in outputs:
            optimizer.backward(output.loss, 1 / count)
            seen = {"loss": output.loss.item(), **output.metrics}
            numbers.append({key if "/" in key else f"{role}/{key}": value for key, value in seen.items()})
        rate = optimizer.learning_rate  # That of this update: the step below sets the next one's.
        return {**_means(numbers), f"{role}/grad_norm": optimizer.step(), f"{role}/learning_rate": rate}

    @torch.no_grad()
    def _fake_score_health(self, fresh: Rollout) -> dict[str, float]:
        """The fake score's loss on fresh samples, and its lag behind the policy.

        For the lag, the current policy repeats the rollout that the fake score last saw, from the same prompts and
        noise, and both are judged at the same times and noise: only the policy's updates since differ. Two rollouts
        of other prompts would differ by chance far more than by that.
        """
        update = self._global_step()
        metrics = {"fake_score/fresh_loss": self._fake_score_loss(fresh, "health", update).loss.item()}
        if self._last_rollout is not None:
            again, seen = self.generate_rollout(self._last_rollout.batch), self._last_rollout
            now, before = (self._fake_score_loss(one, "health", update).loss.item() for one in (again, seen))
            metrics["fake_score/lag"] = now - before
        return metrics

    # ----- before the first update -----

    def cache_prompts(self) -> None:
        """Encode every prompt that the run will see, if ``prompt_cache_dir`` is set: each process its share."""
        if self.family.prompt_cache is None:
            return
        args, process = self.args, self.accelerator
        # Each phase begins with the first prompts; the warm-up makes a rollout for so many updates of the fake score.
        updates = args.fake_score_updates_per_policy_update
        rollouts = [-(-self.state.max_steps // args.num_iterations)]
        rollouts += [-(-args.fake_score_warmup_steps // updates)] if updates else []
        seen = max(rollouts) * self.prompts_per_step
        seen = max(seen, args.warm_start_num_states if args.warm_start == "ode" else 0)
        rows = self.prompts.rows(0, min(seen, len(self.prompts)))
        texts = [*dict.fromkeys([EMPTY_PROMPT, *(row["prompt"] for row in rows), *self.eval_prompts])]
        self.family.fill_prompt_cache(
            texts[process.process_index :: process.num_processes], show_progress=not self.hides_progress
        )
        process.wait_for_everyone()

    def run_warm_start(self) -> None:
        """Regress the policy on the teacher's ODE solutions (see :mod:`rdm_rl.trainers.warm_start`)."""
        args = self.args
        optimizer = self._role_optimizer(
            "policy", None, args.warm_start_learning_rate, args.warm_start_steps, args.max_grad_norm, warm_up=False
        )
        pairs = self._collect_pairs()
        self.networks.release_teacher()
        losses = regress(
            self.networks.predictor("policy", self.args.guidance_scale),
            pairs,
            optimizer,
            encode=self.family.encode,
            steps=args.warm_start_steps,
            batch_size=args.per_device_train_batch_size,
            seed=(args.seed, self.accelerator.process_index),
            device=self.device,
            show_progress=not self.hides_progress,
        )
        self.record_phase("warm_start/loss", losses)

    def _collect_pairs(self) -> OdePairs:
        args = self.args
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        count = -(-args.warm_start_num_states // processes)
        rows = self.prompts.rows(rank * count, count)
        guidance = self.teacher_guidance_scale
        name = teacher_key(
            self.networks,
            args,
            guidance=guidance,
            steps=args.warm_start_ode_steps,
            start=self.times[0].item(),
            seed=args.seed,
            first=rank * count,
        )
        return collect_pairs(
            self.networks.predictor("teacher", guidance),
            self.family.encode,
            self.family.schedule,
            prompts=[row["prompt"] for row in rows],
            times=self.times.tolist(),
            shape=self.family.latent_shape,
            ode_steps=args.warm_start_ode_steps,
            batch_size=args.per_device_train_batch_size,
            seed=args.seed,
            first=rank * count,
            folder=Path(args.warm_start_cache_dir or Path(args.output_dir) / "warm_start") / name,
            device=self.device,
            show_progress=not self.hides_progress,
            anywhere=self.on_any_process if args.shard else bool,
        )

    def warm_up_fake_score(self) -> None:
        """Let the fake score learn the initial policy before it is asked where to go."""
        count = self.args.fake_score_updates_per_policy_update
        rollouts: list[Rollout] = []
        losses = []
        bar = trange(self.args.fake_score_warmup_steps, desc="fake score: warm-up", disable=self.hides_progress)
        for update in bar:
            if update % count == 0:  # As in training: so many updates on each rollout.
                rollouts = [self.generate_rollout(batch) for batch in self.prompt_batches(update // count, "warmup")]
            losses.append(self._update_fake_score(rollouts, "fake_score", update)["fake_score/loss"])
            bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
        self.record_phase("fake_score_warmup/loss", losses)

    def _start_average(self) -> None:
        """Begin the average, and keep a copy of the policy that ``beta`` compares with."""
        parameters = self.networks.named_parameters("policy")
        if self.args.ema_decay:
            self.average = PolicyAverage(parameters, self.args.ema_decay)
        if self.args.beta:
            self.reference = PolicyAverage(parameters, decay=1.0)  # Never stepped.

    # ----- looking at the student -----

    @contextmanager
    def averaged_policy(self) -> Iterator[None]:
        """The averaged policy in place of the last one, if ``ema_decay`` and ``save_ema`` are on."""
        if self.average is None or not self.args.save_ema:
            yield
        else:
            with self.average.applied():
                yield

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], *, generator: Generators) -> Tensor:
        """Images of the student, as stock diffusers makes them from what :meth:`save_model` saves.

        A sampler with ``eta`` runs with 0 here, as stock pipelines do: what is random in training need not be in use.

        Args:
            prompts: The prompts.
            generator: One generator, or one for each prompt.

        Returns:
            Images, shape (N, 3, H, W), in [0, 1].
        """
        batch = PromptBatch(
            prompts=list(prompts),
            conditioning=self.family.encode(prompts),
            group_ids=torch.arange(len(prompts)),
            sample_ids=range(len(prompts)),
        )
        sample = self.sample_student(batch, generator=generator).sample
        return torch.cat([self.family.decode(part) for part in sample.split(self.args.decode_batch_size)])

    @torch.no_grad()
    def sample_student(self, batch: PromptBatch, *, generator: Generators) -> Rollout:
        """The student's chains as :meth:`generate` walks them.

        Args:
            batch: The prompts.
            generator: One generator, or one for each prompt.

        Returns:
            The recorded chains.
        """
        with self.averaged_policy():
            return rollout(
                self.networks.predictor("policy", self.args.guidance_scale),
                batch,
                self.family.schedule,
                self.times,
                shape=self.family.latent_shape,
                generator=generator,
                sampler=make_sampler(self.args.sampler, 0.0),
                step_noise=self.family.step_noise,
            )

    def evaluate(self) -> dict[str, float]:
        """Draw a grid of samples with fixed noise, save it, and send it to the trackers.

        Returns:
            Numbers for the log; a subclass may measure something here.
        """
        generator = seeded_generators(EVALUATION_SEED, "evaluation", 0, range(len(self.eval_prompts)))
        images = self.generate(self.eval_prompts, generator=generator)
        if self.accelerator.is_main_process:
            grid = image_grid({f"step {self.state.global_step}": images.cpu()}, self.eval_prompts)
            folder = Path(self.args.output_dir) / "samples"
            folder.mkdir(parents=True, exist_ok=True)
            grid.save(folder / f"step-{self.state.global_step:06d}.png")
            log_image(self.callback_handler, "samples", grid, self.state.global_step)
        return {}

    @property
    def teacher_guidance_scale(self) -> float:
        """The teacher's guidance: the setting, or the family's published value."""
        setting = self.args.teacher_guidance_scale
        return self.networks.teacher_family.teacher_guidance_scale if setting is None else setting

    # ----- saving -----

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the student as plain diffusers: a LoRA, or a whole pipeline, with its scheduler and a model card.

        Args:
            output_dir: Where to; None for ``args.output_dir``.
        """
        with self.averaged_policy():
            save_student(
                Path(output_dir or self.args.output_dir),
                self.networks,
                num_inference_steps=self.args.num_inference_steps,
                sampler=self.args.sampler,
                guidance_scale=self.args.guidance_scale,
                base=self.model_name,
                whole=not self._models.is_pipeline,
                name=self.args.hub_model_id,
                facts=self._card_facts(),
                write=self.accelerator.is_main_process,
            )

    def _card_facts(self) -> dict[str, Any]:
        """What the model card says of the run."""
        averaged = self.average is not None and self.args.save_ema
        names = ["num_generations", "learning_rate", "seed"]
        names += ["dm_normalization", "dm_group"] if "rdm" in self.rewards else []
        usual = {"sampler": "renoise", "eta": None, "num_iterations": 1}
        names += [name for name, value in usual.items() if getattr(self.args, name) != value]
        return {
            "weights": "averaged over training (EMA)" if averaged else "of the last update",
            "rewards": ", ".join(f"{name} (weight {self.reward_weights[name]:g})" for name in self.rewards)
            if type(self.weighting).__module__ == Weighting.__module__
            else f"{', '.join(self.rewards)}, combined by {type(self.weighting).__name__}",
            **{setting: public_name(name) for setting, name in self._models.sources.items()},
            "policy updates": self.state.global_step,
            "teacher_guidance_scale": self.teacher_guidance_scale,
            **{name: getattr(self.args, name) for name in names},
            **({"weighting": type(self.weighting).__name__} if len(self.rewards) > 1 else {}),
        }

    def state_dict(self) -> dict[str, Any]:
        """State of a subclass's own, for a checkpoint: plain numbers, strings, lists, dicts and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the state of a subclass back, on every process.

        Args:
            state: What :meth:`state_dict` gave on the first process.
        """

    def save_checkpoint(self) -> Path:
        """Write ``checkpoint-<step>`` and delete the oldest ones over ``save_total_limit``.

        Returns:
            The checkpoint's folder.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        tensors: dict[str, Mapping[str, Tensor]] = {role: self.networks.state_dict(role) for role in self.optimizers}
        if self.average is not None:
            tensors["ema"] = self.average.tensors()
        if self.reference is not None:
            tensors["reference"] = self.reference.tensors()
        if self._last_rollout is not None:
            tensors["last_samples"] = {"states": self._last_rollout.states, "x_0": self._last_rollout.x_0}
        state = {
            "optimizers": {role: one.state_dict() for role, one in self.optimizers.items()},
            "weighting": self.weighting.state_dict(),
            "reward_spreads": {name: one.state() for name, one in self.reward_spreads.items()},
            "ema_updates": 0 if self.average is None else self.average.updates,
            "own": self.state_dict(),
        }
        writes = self.accelerator.is_main_process
        tensors, state = gather((tensors, state), keep=writes)  # Sharded weights take all processes to put together.
        if writes:
            settings, processes = self.args.to_json_string(), self.accelerator.num_processes
            write_checkpoint(folder, tensors, state, settings, self.state, processes, self._fingerprints)
            rotate_checkpoints(folder, self.args.save_total_limit)
        self.accelerator.wait_for_everyone()
        self._last_checkpoint = folder
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _load_checkpoint(self, folder: Path) -> None:
        tensors, state = read_checkpoint(folder)
        saved = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        self.state.global_step, self.state.epoch = saved.global_step, saved.epoch
        self.state.log_history = saved.log_history
        for role, optimizer in self.optimizers.items():
            self.networks.load_state_dict(role, tensors[role])
            optimizer.load_state_dict(state["optimizers"][role])
        self._start_average()
        if self.average is not None:
            self.average.load(tensors["ema"], state["ema_updates"])
        if self.reference is not None:
            self.reference.load(tensors["reference"], 0)
        self.weighting.load_state_dict(state["weighting"])
        self.load_state_dict(state["own"])
        self.reward_spreads = {}
        for name, spread in state["reward_spreads"].items():
            self.reward_spreads[name] = RunningMean(decay=SPREAD_DECAY)
            self.reward_spreads[name].load(spread)
        self._last_checkpoint = folder
        # Another process's samples are not saved: with several, the first lag after resuming is left out.
        if "last_samples" in tensors and self.state.global_step > 0 and self.accelerator.num_processes == 1:
            batch = next(self.prompt_batches((self.state.global_step - 1) // self.args.num_iterations))
            samples = {name: value.to(self.device) for name, value in tensors["last_samples"].items()}
            self._last_rollout = Rollout(batch=batch, times=self.times, states=samples["states"], x_0=samples["x_0"])


def _means(numbers: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each number over those entries that have it."""
    values = defaultdict[str, list[float]](list)
    for entry in numbers:
        for name, value in entry.items():
            values[name].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}
