"""The machinery around an update: processes, callbacks, trackers, log and upload, as transformers has it."""

import logging
import math
import sys
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import AutocastKwargs, broadcast_object_list, gather_object
from huggingface_hub import HfApi
from torch import Tensor, nn
from transformers.trainer_callback import TrainerCallback, TrainerControl, TrainerState

from rdm_rl.networks.sharding import check_sharding, is_sharded
from rdm_rl.trainers.arguments import returned
from rdm_rl.trainers.callbacks import make_callback_handler, make_state, make_trackers
from rdm_rl.trainers.health import signs
from rdm_rl.trainers.processes import check_processes
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.setup import precision
from rdm_rl.trainers.signals import StopSignals, TrainingStopped

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


class TrainingLoop(ABC):
    """What surrounds the updates of a run; :class:`~rdm_rl.RDMTrainer` says what an update is.

    Args:
        args: The settings.
        num_prompts: Prompts in one epoch.
    """

    state: TrainerState

    def __init__(self, args: RDMConfig, num_prompts: int) -> None:
        """Find the processes and devices."""
        self.args = args
        self.accelerator = Accelerator(mixed_precision=precision(args), cpu=args.use_cpu)
        self.device: torch.device = self.accelerator.device
        self.trackers = make_trackers(args)
        check_processes(self.accelerator.num_processes)
        if args.shard:
            check_sharding(self.accelerator.num_processes)
        self.signals = StopSignals(args.stop_signals, speaks=self.accelerator.is_main_process)
        self._num_prompts = num_prompts
        self._save_due = False
        self._window = MetricWindow()
        self._warned_of = set[str]()

    def start_callbacks(self, callbacks: Sequence[TrainerCallback | type[TrainerCallback]], model: nn.Module) -> None:
        """Make the callback handler and the trainer state that callbacks see.

        Args:
            callbacks: The user's callbacks.
            model: What callbacks receive as ``model``.
        """
        process = self.accelerator
        self.callback_handler = make_callback_handler(self.args, self.trackers, callbacks, model)
        self.state = make_state(self.callback_handler, process.is_local_main_process, process.is_main_process)
        self.control = self.callback_handler.on_init_end(self.args, self.state, TrainerControl())

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback, as in transformers' trainer."""
        self.callback_handler.add_callback(callback)

    def remove_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Remove a callback, as in transformers' trainer."""
        self.callback_handler.remove_callback(callback)

    @abstractmethod
    def training_step(self) -> dict[str, float]:
        """One update; returns numbers for the log."""

    @abstractmethod
    def evaluate(self) -> dict[str, float]:
        """A look at the student; returns numbers for the log."""

    @abstractmethod
    def save_model(self, output_dir: str | Path | None = None) -> None:
        """Save the student for use."""

    @abstractmethod
    def save_checkpoint(self) -> Path:
        """Save everything that a resumed run needs."""

    def run_updates(self, evaluate_first: bool) -> None:
        """Make updates until ``max_steps``, or until a callback or a signal stops the run.

        Args:
            evaluate_first: Evaluate before the first update.

        Raises:
            TrainingStopped: If a signal did, after a checkpoint was written.
        """
        signal = 0
        self.signals.begin_updates()
        self.control = self.callback_handler.on_train_begin(self.args, self.state, self.control)
        if evaluate_first:
            self._evaluate_and_log()
        self._window = MetricWindow()
        self._save_due = False
        while self.state.global_step < self.state.max_steps and not (
            self.control.should_training_stop and self.rollout_is_used_up
        ):
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            self._window.add(returned("training_step", self.training_step(), dict))
            self.state.global_step += 1
            self.state.epoch = self.prompts_per_step / self._num_prompts * self.state.global_step
            self.state.epoch /= self.args.num_iterations
            self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
            if self.state.global_step >= self.state.max_steps and self.args.logging_strategy == "steps":
                self.control.should_log = True  # However short, a run ends with numbers.
            # All save together. The number is small, and the host has just waited for the gradient's norm anyway.
            signal = signal or int(self.largest_over_processes(self.signals.number))
            if signal:
                self.control.should_save = self.control.should_training_stop = True
            self._act_on_control()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        if signal:
            self.signals.heed()
            raise TrainingStopped(signal)

    def _act_on_control(self) -> None:
        """Log, evaluate and save where the callbacks have asked for it."""
        if self.control.should_log:
            self.log(self._window_means())
            self.control.should_log = False
        if self.control.should_evaluate:
            self._evaluate_and_log()
            self.control.should_evaluate = False
        # A rollout is not saved: a checkpoint waits until it is used up, so that a resumed run goes on with the next.
        self._save_due = self._save_due or self.control.should_save
        self.control.should_save = False
        if self._save_due and (self.rollout_is_used_up or self.state.global_step >= self.state.max_steps):
            self.save_checkpoint()
            self._save_due = False

    @property
    def rollout_is_used_up(self) -> bool:
        """Whether the next update begins with new samples."""
        return int(self.state.global_step) % self.args.num_iterations == 0

    def _evaluate_and_log(self) -> None:
        start = time.perf_counter()
        # The prefix of transformers, by which trackers file them.
        numbers = returned("evaluate", self.evaluate(), dict)
        measured = {f"eval_{name.removeprefix('eval_')}": value for name, value in numbers.items()}
        self._window.leave_out(time.perf_counter() - start)
        if measured:
            self.log(measured)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, measured)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which networks run: mixed precision, if ``bf16`` or ``fp16`` is set."""
        # Autocast keeps the weights that it has cast until the context ends. Of sharded networks these would be whole.
        handler = AutocastKwargs(cache_enabled=not self.args.shard)
        context: AbstractContextManager[Any] = self.accelerator.autocast(handler)
        return context

    def _window_means(self) -> dict[str, float]:
        """Means since the last log, over processes too, with throughput and memory."""
        steps, seconds, means = self._window.flush()
        if self.accelerator.num_processes > 1:
            # By name: a reward that applied to no sample of a process has no number there.
            everyone = gather_object([means])
            names = {name: None for means in everyone for name in means}
            means = {name: fmean(means[name] for means in everyone if name in means) for name in names}
        images = steps / self.args.num_iterations * self.prompts_per_step * self.args.num_generations
        passes = self.args.num_iterations + self.args.fake_score_updates_per_policy_update
        return means | {
            "images_per_second": images / seconds,
            "samples_per_second": images * passes / seconds,
            "memory_gib": peak_memory_gib(self.device),
        }

    def log(self, logs: dict[str, float]) -> None:
        """Write numbers to the log history and the trackers.

        Args:
            logs: Numbers by name; ``docs/metrics.md`` says what each means.
        """
        if self.state.epoch is not None:
            logs = {**logs, "epoch": float(self.state.epoch)}
        self.state.log_history.append({**logs, "step": self.state.global_step})
        if self.accelerator.is_main_process:
            for name, text in signs(self.state.log_history).items():
                if name not in self._warned_of:
                    logger.warning("After %d updates %s.", self.state.global_step, text)
                    self._warned_of.add(name)
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def is_logging_step(self) -> bool:
        """Whether an update on the coming rollout will be logged: the fake score's lag costs three passes."""
        args, first = self.args, self.state.global_step + 1
        return args.logging_strategy == "steps" and any(
            step % self.state.logging_steps == 0
            or (step == 1 and args.logging_first_step)
            or step == self.state.max_steps
            for step in range(first, first + args.num_iterations)
        )

    def record_phase(self, name: str, losses: Sequence[float]) -> None:
        """Keep a phase's losses, means over the processes; trackers, which count policy updates, do not see them.

        Args:
            name: Their name in the log.
            losses: One for each update of a phase before the first policy update, as many on every process.
        """
        sums = self.sum_over_processes(torch.tensor(losses, dtype=torch.float64))
        losses = (sums / self.accelerator.num_processes).tolist()
        every = max(1, int(self.state.logging_steps or 1))
        for update in (number for number in range(every - 1, len(losses), every) if math.isfinite(losses[number])):
            self.state.log_history.append({name: losses[update], "step": 0, "phase_step": update + 1})

    @property
    def hides_progress(self) -> bool:
        """Whether this process shows no progress bars."""
        return bool(self.args.disable_tqdm) or not self.accelerator.is_local_main_process

    @property
    def prompts_per_step(self) -> int:
        """Prompts in one rollout, over all micro-batches and processes."""
        groups: int = self.args.per_device_train_batch_size // self.args.num_generations
        micro_batches: int = self.args.gradient_accumulation_steps * self.accelerator.num_processes
        return groups * micro_batches

    def count_steps(self) -> int:
        """Updates in the run: ``max_steps``, or what ``num_train_epochs`` comes to."""
        if self.args.max_steps >= 0:
            return int(self.args.max_steps)
        rollouts = math.ceil(float(self.args.num_train_epochs) * self._num_prompts / self.prompts_per_step)
        return rollouts * self.args.num_iterations

    def reduce_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Average the gradients over the processes, in place; those of sharded weights are already averages."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if is_sharded(parameter):
                    continue
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad, op=torch.distributed.ReduceOp.SUM)
                parameter.grad /= self.accelerator.num_processes

    def share_parameters(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give all processes the first one's weights; sharded ones are in parts, each of which one process has."""
        if self.accelerator.num_processes > 1:
            for parameter in parameters:
                if not is_sharded(parameter):
                    torch.distributed.broadcast(parameter.data, src=0)

    def on_first_process(self, work: Callable[[], Answer]) -> Answer:
        """What the first process finds out, on all of them; so is its error, if it is one of files or values."""
        answers: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                answers = [work()]
            except (OSError, ValueError) as error:
                answers = [error]
        broadcast_object_list(answers)
        if isinstance(answers[0], Exception):
            raise answers[0]
        answer: Answer = answers[0]
        return answer

    def on_any_process(self, condition: bool) -> bool:
        """Whether a condition holds on any process; all must ask."""
        return bool(self.sum_over_processes(torch.tensor(float(condition))) > 0)

    def first_cause(self, cause: str) -> str:
        """The first process's cause that is not empty, on all of them; all must ask."""
        if self.accelerator.num_processes > 1 and self.on_any_process(bool(cause)):
            return str(next(filter(None, gather_object([cause]))))
        return cause

    def largest_over_processes(self, number: float) -> float:
        """The largest of a number over the processes; all must ask."""
        if self.accelerator.num_processes > 1:
            numbers = torch.tensor(float(number), device=self.device)
            torch.distributed.all_reduce(numbers, op=torch.distributed.ReduceOp.MAX)
            return numbers.item()
        return number

    def sum_over_processes(self, sums: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on the CPU."""
        if self.accelerator.num_processes > 1:
            sums = sums.to(self.device)
            torch.distributed.all_reduce(sums, op=torch.distributed.ReduceOp.SUM)
        return sums.cpu()

    def push_to_hub(self) -> str:
        """Save the student and upload it to ``hub_model_id``.

        Returns:
            The commit's address.

        Raises:
            ValueError: If ``hub_model_id`` is not set.
        """
        args = self.args
        if not args.hub_model_id:
            raise ValueError("push_to_hub needs hub_model_id='owner/name'.")
        folder = Path(args.output_dir) / "student"
        self.save_model(folder)
        if not self.accelerator.is_main_process:
            return ""
        api = HfApi(token=args.hub_token)
        api.create_repo(args.hub_model_id, private=args.hub_private_repo, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=args.hub_model_id,
                folder_path=folder,
                revision=args.hub_revision,
                commit_message=f"{args.num_inference_steps}-step student after {self.state.global_step} updates",
            )
        )


class MetricWindow:
    """The numbers of the updates since the last log entry.

    Example:
        >>> window = MetricWindow()
        >>> window.add({"loss": 1.0})
        >>> window.add({"loss": 3.0})
        >>> steps, seconds, means = window.flush()
        >>> steps, means
        (2, {'loss': 2.0})
    """

    def __init__(self) -> None:
        """Start the clock."""
        self._values: dict[str, list[float]] = defaultdict(list)
        self._steps = 0
        self._start = time.perf_counter()

    def add(self, metrics: Mapping[str, float]) -> None:
        """Add the numbers of one update; not every update has all of them."""
        self._steps += 1
        for name, value in metrics.items():
            self._values[name].append(value)

    def leave_out(self, seconds: float) -> None:
        """Do not count seconds that have passed without updates."""
        self._start += seconds

    def flush(self) -> tuple[int, float, dict[str, float]]:
        """The number of updates, the seconds they took, and the mean of each number; starts a new window."""
        now = time.perf_counter()
        result = self._steps, max(now - self._start, 1e-9), {k: sum(v) / len(v) for k, v in self._values.items()}
        self._values.clear()
        self._steps, self._start = 0, now
        return result


def peak_memory_gib(device: torch.device) -> float:
    """The highest memory use so far, in GiB: of the accelerator if there is one, else of the process.

    Args:
        device: Where the networks are.

    Returns:
        The peak, in GiB.

    Example:
        >>> peak_memory_gib(torch.device("cpu")) > 0
        True
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # Not on Windows.

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS and in KiB on Linux.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
