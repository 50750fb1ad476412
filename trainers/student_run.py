"""What a run does with its student beside the updates: optimisers, the warm start, samples and files."""

import logging
import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from torch import Tensor

from rdm_rl.evaluation.features import Features
from rdm_rl.evaluation.pictures import image_grid
from rdm_rl.families import Family
from rdm_rl.families.encoding import EMPTY_PROMPT
from rdm_rl.manifest import read_manifest
from rdm_rl.networks.roles import Networks, Role
from rdm_rl.networks.sharding import gather
from rdm_rl.policy import Sampler, make_sampler, rollout
from rdm_rl.randomness import Generators, drawn_index, seeded_generators
from rdm_rl.records import PromptBatch, Rollout
from rdm_rl.rewards.kinds import TrainingReward
from rdm_rl.rewards.protocol import RewardContext
from rdm_rl.student import save_student
from rdm_rl.trainers.callbacks import callback_states, load_callback_states, log_image
from rdm_rl.trainers.checkpointing import read_checkpoint, rotate_checkpoints, write_checkpoint
from rdm_rl.trainers.evaluation import evaluate_student
from rdm_rl.trainers.faults import update_cause, weights_cause
from rdm_rl.trainers.loop import TrainingLoop
from rdm_rl.trainers.model_card import card_facts
from rdm_rl.trainers.optimization import OptimizerFactory, PolicyAverage, RoleOptimizer, make_optimizer, make_scheduler
from rdm_rl.trainers.processes import shared_failures
from rdm_rl.trainers.prompts import PromptSource, noise_seeds, other_columns
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.resuming import begin_in_folder, checkpoint_to_resume, made_with, say_how_to_go_on
from rdm_rl.trainers.sanity import check_run
from rdm_rl.trainers.setup import LoadedModels, teacher_fingerprint, teacher_key
from rdm_rl.trainers.signals import TrainingStopped
from rdm_rl.trainers.warm_start import OdePairs, collect_pairs, regress, solutions_folder
from rdm_rl.weighting import RunningMean, Weighting

logger = logging.getLogger(__name__)


class StudentRun(TrainingLoop):
    """A student with its networks, rewards and files; :class:`~rdm_rl.RDMTrainer` loads them and says how it learns.

    Args:
        args: The settings.
        num_prompts: Prompts in one epoch.
        optimizers: Makes the optimisers of policy and fake score; None for ``args.optim``.
    """

    networks: Networks
    family: Family
    prompts: PromptSource
    rewards: dict[str, TrainingReward]
    reward_weights: dict[str, float]
    weighting: Weighting
    sampler: Sampler
    times: Tensor
    sizes: list[Family]
    eval_prompts: list[str]
    eval_columns: dict[str, list[Any]]
    eval_features: list[Features]
    context: RewardContext
    models: LoadedModels
    fingerprints: Mapping[str, str]

    def __init__(
        self, args: RDMConfig, num_prompts: int, optimizers: tuple[OptimizerFactory | None, OptimizerFactory | None]
    ) -> None:
        """Find the processes and devices; nothing is trained or saved yet."""
        super().__init__(args, num_prompts)
        self.run_id = token_hex(8)
        self.last_checkpoint: Path | None = None
        self._optimizer_factories = optimizers
        self.optimizers: dict[Role, RoleOptimizer] = {}
        self.average: PolicyAverage | None = None
        self.reference: PolicyAverage | None = None
        self.reward_spreads = defaultdict[str, RunningMean](lambda: RunningMean(decay=0.95))
        self._skipped = defaultdict[Role, int](int)
        self._last_rollout: Rollout | None = None

    # ----- the run -----

    def train(self, resume_from_checkpoint: str | Path | bool | None = None) -> dict[str, float]:
        """Run from the start, or from a checkpoint as if the run had not stopped.

        Args:
            resume_from_checkpoint: True for the newest complete checkpoint in ``output_dir``, or a checkpoint's folder.

        Returns:
            The numbers that were logged last: of an update, and of the evaluation after it.

        Raises:
            RuntimeError: If this trainer has trained before; a warm start would undo what it learnt.
            FileNotFoundError: If there is no such checkpoint, or no complete one.
            ValueError: If the checkpoint that was named is damaged, or was made with settings that must not change.
            FloatingPointError: If too many updates in succession were left out because numbers were not finite.
            TrainingStopped: If one of ``stop_signals`` came, after the update was finished and a checkpoint written. It
                is a ``SystemExit``: uncaught, it ends the process with 128 + the signal's number.
        """
        if self.optimizers:
            raise RuntimeError("This trainer has already trained. Make a new one, and resume from a checkpoint there.")
        process = self.accelerator
        try:
            with self.signals, shared_failures(process.process_index, process.num_processes):
                self._train(resume_from_checkpoint or self.args.resume_from_checkpoint)
        except TrainingStopped as stopped:
            raise TrainingStopped(stopped.number, say_how_to_go_on(self, stopped.number)) from None
        except (torch.OutOfMemoryError, MemoryError) as error:
            saved = f"The last checkpoint is {self.last_checkpoint}. " if self.last_checkpoint else ""
            error.add_note(
                f"{saved}Set activation_checkpointing=True, a smaller per_device_train_batch_size with as many more "
                "gradient_accumulation_steps, decode_batch_size=1, or offload; `rdm-rl plan` says what a run takes "
                "and what each of these saves."
            )
            raise
        if self.args.push_to_hub:
            self.push_to_hub()
        history = self.state.log_history
        return {name: value for row in history if row["step"] == history[-1]["step"] for name, value in row.items()}

    def _train(self, resume: str | Path | bool | None) -> None:
        """All phases of the run."""
        checkpoint, changed = checkpoint_to_resume(self, resume) if resume else (None, [])
        self.state.max_steps = self.count_steps()
        self.state.compute_steps(self.args, self.state.max_steps)
        self.create_optimizers()
        if self.accelerator.is_main_process:
            print(f"Training on {self.prompts.describe(self.family.cut_prompts(self.prompts.texts()))}")
            if resolution := self.family.describe_resolution():
                print(resolution)
        if self.args.sanity_check:
            check_run(self)  # Before a checkpoint is loaded: its optimisers would be written whole.
        if checkpoint is not None:
            self._load_checkpoint(checkpoint, {change.name for change in changed if change.kind != "schedule"})
        begin_in_folder(self, checkpoint, changed)
        self.cache_prompts()
        if checkpoint is None:
            if self.args.warm_start != "none":
                self.run_warm_start()
            self._start_average()
            self.warm_up_fake_score()

        self.run_updates(evaluate_first=self.args.eval_on_start and not resume)

    @abstractmethod
    def generate_rollout(self, batch: PromptBatch) -> Rollout:
        """The policy's chains for a batch of prompts, without a graph."""

    @abstractmethod
    def warm_up_fake_score(self) -> None:
        """Let the fake score learn the initial policy."""

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
                noise_seeds=noise_seeds(args, prompts, sample_ids, stream, update),
                stream=stream,
                update=update,
            )

    def generators(self, stream: str, batch: PromptBatch, update: int | None = None) -> list[torch.Generator]:
        """One generator for each sample of a batch, a function of seed, stream, update and sample."""
        number = batch.update if update is None else update
        return seeded_generators(self.args.seed, f"{batch.stream}/{stream}", number, batch.sample_ids)

    # ----- before the first update -----

    def create_optimizers(self) -> None:
        """Make the optimiser of each role: the policy's from the inherited settings, the fake score's from its own."""
        args, (policy_factory, fake_score_factory) = self.args, self._optimizer_factories
        rollouts = -(-self.state.max_steps // args.num_iterations)
        updates = (args.fake_score_warmup_steps or 0) + rollouts * args.fake_score_updates_per_policy_update
        self.optimizers["policy"] = self._role_optimizer(
            "policy", args.learning_rate, self.state.max_steps, args.max_grad_norm, policy_factory, warm_up=True
        )
        # The fake score has its own warm-up, before the policy's first update.
        self.optimizers["fake_score"] = self._role_optimizer(
            "fake_score", args.fake_score_learning_rate, updates, args.fake_score_max_grad_norm, fake_score_factory
        )

    def _role_optimizer(
        self,
        role: Role,
        learning_rate: float,
        steps: int,
        max_grad_norm: float,
        factory: OptimizerFactory | None = None,
        *,
        warm_up: bool = False,
    ) -> RoleOptimizer:
        parameters = self.networks.parameters(role)
        optimizer = factory(parameters) if factory else make_optimizer(self.args, parameters, learning_rate)
        return RoleOptimizer(
            parameters=parameters,
            optimizer=optimizer,
            scheduler=make_scheduler(self.args, optimizer, steps, warm_up=warm_up),
            scaler=torch.amp.GradScaler(self.device.type, enabled=self.args.fp16),
            max_grad_norm=max_grad_norm,
            reduce=self.reduce_gradients,
        )

    def cache_prompts(self) -> None:
        """Encode every prompt that the run will see, if ``prompt_cache_dir`` is set: each process its share."""
        if self.family.prompt_cache is None:
            return
        args, process = self.args, self.accelerator
        # Each phase begins with the first prompts; the warm-up makes a rollout for so many updates of the fake score.
        updates = args.fake_score_updates_per_policy_update
        rollouts = [-(-self.state.max_steps // args.num_iterations)]
        rollouts += [-(-(args.fake_score_warmup_steps or 0) // updates)] if updates else []
        seen = max(rollouts) * self.prompts_per_step
        seen = max(seen, args.warm_start_num_states if args.warm_start != "none" else 0)
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
            "policy", args.warm_start_learning_rate, args.warm_start_steps, args.max_grad_norm
        )
        teacher = teacher_fingerprint(self.networks, args)
        pairs = [self._collect_pairs(family, teacher) for family in self.sizes]
        self.networks.release_teacher()
        losses = regress(
            self.networks.predictor("policy", self.args.guidance_scale),
            pairs,
            optimizer,
            step=lambda loss, texts: self.make_update("policy", optimizer, [loss], [texts], "the warm start"),
            encode=self.family.encode,
            steps=args.warm_start_steps,
            batch_size=args.per_device_train_batch_size,
            seed=(args.seed, self.accelerator.process_index),
            device=self.device,
            show_progress=not self.hides_progress,
        )
        self.record_phase("warm_start/loss", losses)

    def _collect_pairs(self, family: Family, teacher: str) -> OdePairs:
        """The teacher's solutions at one resolution: each has its share of them, named by the teacher's fingerprint."""
        args, times = self.args, self.times_of(family)
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        count = -(-args.warm_start_num_states // (processes * len(self.sizes)))
        rows = self.prompts.rows(rank * count, count)
        guidance = self.teacher_guidance_scale
        name = teacher_key(
            teacher,
            self.networks,
            family.resolution,
            guidance=guidance,
            steps=args.warm_start_ode_steps,
            start=times[0].item(),
            seed=args.seed,
            first=rank * count,
        )
        return collect_pairs(
            self.networks.predictor("teacher", guidance),
            self.family.encode,
            family.schedule,
            prompts=[row["prompt"] for row in rows],
            times=times.tolist(),
            sampler=self.sampler,
            solve_later=args.warm_start == "ode",
            shape=family.latent_shape,
            ode_steps=args.warm_start_ode_steps,
            batch_size=args.per_device_train_batch_size,
            seed=args.seed,
            first=rank * count,
            folder=solutions_folder(args, args.output_dir) / name,
            device=self.device,
            show_progress=not self.hides_progress,
            anywhere=self.on_any_process if args.shard else bool,
        )

    def _start_average(self) -> None:
        """Begin the average, and keep a copy of the policy that ``beta`` compares with."""
        parameters = self.networks.named_parameters("policy")
        if self.args.ema_decay:
            self.average = PolicyAverage(parameters, self.args.ema_decay)
        if self.args.beta:
            self.reference = PolicyAverage(parameters, decay=1.0)  # Never stepped.

    # ----- updates -----

    def make_update(
        self,
        role: Role,
        optimizer: RoleOptimizer,
        losses: Sequence[float],
        prompts: Sequence[Sequence[str]],
        phase: str = "training",
    ) -> float:
        """Update a role with the accumulated gradient, or leave the update out if a number is not finite.

        Args:
            role: The role.
            optimizer: Has the gradient.
            losses: The losses that it is of, on this process.
            prompts: The prompts of each.
            phase: What the update belongs to.

        Returns:
            The gradient norm before clipping; the update was made if it is finite, which all processes agree on.

        Raises:
            FloatingPointError: If too many successive ones were left out, or the weights themselves are not finite.
        """
        wrong = not all(map(math.isfinite, losses))
        if wrong:
            optimizer.spoil()
        norm = optimizer.step()
        if math.isfinite(norm):
            self._skipped[role] = 0
            return norm
        wrong_anywhere = self.on_any_process(wrong)
        if wrong_anywhere or not optimizer.scale_is_falling:
            # Where some losses are at fault, only their processes know why.
            cause = "" if wrong_anywhere and not wrong else update_cause(losses, prompts, norm)
            self.skip_update(role, cause, phase)
        return norm

    def skip_update(self, role: Role, cause: str, phase: str = "training") -> None:
        """Count an update that is not made and say why; the same on every process.

        Args:
            role: Whose update it is.
            cause: What went wrong on this process; empty if nothing did.
            phase: What the update belongs to.

        Raises:
            FloatingPointError: If that was one too many, or the weights themselves are not finite.
        """
        self._skipped[role] += 1
        count, limit = self._skipped[role], self.args.max_skipped_updates
        limit *= self.args.num_iterations if role == "policy" else 1
        weights = {each: self.networks.named_parameters(each) for each in self.optimizers}
        cause, damage = self.first_cause(cause), self.first_cause(weights_cause(weights))
        what = f"The {role} is not updated in {phase}, at update {self.state.global_step + 1}: {cause}"
        if damage or count > limit:
            saved = self.last_checkpoint
            raise FloatingPointError(
                f"{what}. {damage or f'That makes {count} in succession'}. "
                f"{'Start again' if saved is None else f'Resume from {str(saved)!r}'} with a lower learning_rate or "
                "fake_score_learning_rate, max_grad_norm above 0, or bf16 instead of fp16; if these prompts alone are "
                "at fault, leave them out or raise max_skipped_updates."
            )
        if self.accelerator.is_main_process:
            logger.warning("%s. %d in succession; after %d the run stops (max_skipped_updates).", what, count, limit)

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
        return self._decode(self.sample_student(batch, generator=generator).sample)

    def _decode(self, sample: Tensor) -> Tensor:
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
            return self._walk(batch, generator, make_sampler(self.args.sampler, 0.0), self.family)

    def times_of(self, family: Family) -> Tensor:
        """The times that the student visits, shape (K,), at a family's resolution."""
        if family is self.family:
            return self.times
        return family.student_times(self.args.num_inference_steps, self.args.sampler).to(self.device)

    def family_at(self, batch: PromptBatch) -> Family:
        """The family at the resolution that is drawn for a batch's update: the same on every process."""
        number = drawn_index(len(self.sizes), self.args.seed, f"{batch.stream}/resolution", batch.update)
        return self.sizes[number]

    def _walk(
        self,
        batch: PromptBatch,
        generator: Generators,
        sampler: Sampler,
        family: Family,
        times: Tensor | None = None,
    ) -> Rollout:
        """The chains of the policy as it is, at a family's resolution; without other times, at the student's."""
        return rollout(
            self.networks.predictor("policy", self.args.guidance_scale),
            batch,
            family.schedule,
            self.times_of(family) if times is None else times,
            shape=family.latent_shape,
            generator=generator,
            sampler=sampler,
            step_noise=self.family.step_noise,
        )

    def evaluate(self) -> dict[str, float]:
        """Measure the student on the evaluation prompts, and save a grid of the first and send it to the trackers.

        The student is the one that :meth:`save_model` saves, and each prompt has a noise of its own, always the same.
        All processes must ask together.

        Returns:
            Numbers, the same on every process: the distance to the teacher's images of the same noises
            (``eval_pixels/paired``), the mean of every reward of images (``eval_rewards/<name>/mean``), and two
            distances for each of ``eval_features`` (``docs/metrics.md``). What a subclass adds is logged with ``eval_``
            before it.
        """
        numbers = evaluate_student(self, self._show_samples)
        return {f"eval_{name}": value for name, value in numbers.items()}

    def _show_samples(self, chains: Rollout) -> None:
        """Save a grid of finished samples, and send it to the trackers."""
        images = {f"step {self.state.global_step}": self._decode(chains.sample).cpu()}
        grid = image_grid(images, chains.batch.prompts)
        folder = Path(self.args.output_dir) / "samples"
        folder.mkdir(parents=True, exist_ok=True)
        grid.save(folder / f"step-{self.state.global_step:06d}.png")
        log_image(self.callback_handler, "samples", grid, self.state.global_step)

    @property
    def teacher_guidance_scale(self) -> float:
        """The teacher's guidance: the setting, or the family's published value."""
        setting = self.args.teacher_guidance_scale
        return self.networks.teacher_family.teacher_guidance_scale if setting is None else setting

    # ----- saving -----

    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the student as plain diffusers: a LoRA, or a whole pipeline, with its scheduler and a model card.

        A LoRA is also saved for ComfyUI, A1111 and kohya's scripts (``docs/draw_with_your_student.md``).

        Args:
            output_dir: Where to; None for ``args.output_dir``.

        Raises:
            FloatingPointError: If weights are not finite. Nothing is written then.
        """
        with self.averaged_policy():
            damage = self.first_cause(weights_cause({"policy": self.networks.named_parameters("policy")}))
            if damage:
                raise FloatingPointError(
                    f"{damage}, so it is not saved as a student. Resume from the last good checkpoint with a lower "
                    f"learning_rate (`rdm-rl checkpoint {self.args.output_dir}` lists them), or start again."
                )
            save_student(
                Path(output_dir or self.args.output_dir),
                self.networks,
                num_inference_steps=self.args.num_inference_steps,
                sampler=self.args.sampler,
                guidance_scale=self.args.guidance_scale,
                base=self.models.name,
                single_file=self.models.single_file,
                whole=not self.models.is_pipeline,
                name=self.args.hub_model_id,
                facts=card_facts(self),
                write=self.accelerator.is_main_process,
            )

    def whole_state(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights and settings."""
        return {
            "optimizers": {role: optimizer.state_dict() for role, optimizer in self.optimizers.items()},
            "weighting": self.weighting.state_dict(),
            "reward_spreads": {name: spread.state() for name, spread in self.reward_spreads.items()},
            "ema_updates": 0 if self.average is None else self.average.updates,
            "skipped": dict(self._skipped),
            "own": self.state_dict(),
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

        Raises:
            ValueError: If weights are not finite; the checkpoints before stay.
            OSError: If it cannot be written; the checkpoints before stay.
        """
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        tensors: dict[str, Mapping[str, Tensor]] = {role: self.networks.state_dict(role) for role in self.optimizers}
        if self.average is not None:
            tensors["ema"] = self.average.tensors()
        if self.reference is not None:
            tensors["reference"] = self.reference.tensors()
        if self._last_rollout is not None:
            tensors["last_samples"] = {name: getattr(self._last_rollout, name) for name in ("times", "states", "x_0")}
        self.state.stateful_callbacks = callback_states(self.callback_handler)
        writes = self.accelerator.is_main_process
        tensors, state = gather(
            (tensors, self.whole_state()), keep=writes
        )  # Sharded weights take all processes to put together.

        def write() -> None:
            before = self.last_checkpoint
            if before is not None and not before.exists():
                logger.warning("%s is gone: somebody removed it or its folder, and what was in it is lost.", before)
            write_checkpoint(folder, tensors, state, made_with(self), self.state, self.run_id)
            rotate_checkpoints(folder, self.args.save_total_limit)

        self.on_first_process(write)  # If it fails, it fails on all.
        self.last_checkpoint = folder
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)
        return folder

    def _load_checkpoint(self, folder: Path, changed: Collection[str]) -> None:
        """Take everything back but what belongs to facts, or to a cut of the batch, that have changed since."""
        tensors, state, saved = read_checkpoint(folder)
        self.run_id = read_manifest(folder)["run"]
        self.state.global_step, self.state.epoch = saved.global_step, saved.epoch
        self.state.log_history = saved.log_history
        load_callback_states(self.callback_handler, saved.stateful_callbacks)
        for role, optimizer in self.optimizers.items():
            self.networks.load_state_dict(role, tensors[role])
            optimizer.load_state_dict(state["optimizers"][role])
        self._start_average()
        if self.average is not None:
            self.average.load(tensors["ema"], state["ema_updates"])
        if self.reference is not None:
            self.reference.load(tensors["reference"], 0)
        if "weighting" not in changed:
            self.weighting.load_state_dict(state["weighting"])
        self._skipped.update(state["skipped"])
        self.load_state_dict(state["own"])
        for name, spread in state["reward_spreads"].items():
            self.reward_spreads[name].load(spread)
        self.last_checkpoint = folder
        # Another process's samples are not saved: with several, the first lag after resuming is left out.
        alone = self.accelerator.num_processes == 1
        if "last_samples" in tensors and self.state.global_step > 0 and alone and not changed:
            batch = next(self.prompt_batches((self.state.global_step - 1) // self.args.num_iterations))
            times, states, x_0 = (tensors["last_samples"][name].to(self.device) for name in ("times", "states", "x_0"))
            self._last_rollout = Rollout(batch=batch, times=times, states=states, x_0=x_0)
