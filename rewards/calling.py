"""Calling a plain reward: in batches, within a time limit, and never taking an answer on trust.

A plain reward is a callable ``(images, prompts, **columns)`` that returns a tensor of shape (N,), or a list of N
numbers, scalar tensors or None (not applicable). It gets the columns that its signature names. It may declare, by
attributes:

==========================  ==========================================================================================
attribute                   meaning
==========================  ==========================================================================================
``differentiable``          its values have a graph to the images
``inputs``                  ``"images"``, or ``"latents"``: it is given latents of shape (N, C, H, W) instead
``wants_teacher_images``    it is also given ``teacher_images``, the teacher's images from the same noise and prompts
``whole_groups``            a batch never splits the generations of one prompt, and ``group_ids`` may be asked for
``batch_size``              most samples in a call; ``reward_batch_size`` may lower it
``concurrency``             most calls in flight at the same time, for an ``async def`` reward
``required_columns``        columns that it needs beside those that its signature names
``prepare``                 a method that is called once, before training: load what must be loaded
``release``                 a method that is called after each use
==========================  ==========================================================================================

An ``async def`` reward has all of its batches in flight at once, unless it declares ``concurrency``. After a failure
that stops the run no further batch begins, and what is in flight is cancelled.
"""

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from rdm_rl.records import PromptBatch
from rdm_rl.rewards.model import RewardModel
from rdm_rl.rewards.protocol import RewardError
from rdm_rl.settings import Count, Folder, Positive, setting

logger = logging.getLogger(__name__)

Answer = tuple[Tensor, Tensor | None]  # Values, and their gradient at the inputs.
Call = tuple[Tensor, list[str], dict[str, Any]]  # What a reward is called with: inputs, prompts, columns.

_POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)

# The attributes of the table above; those of any reward are its name in the log, and what `rdm-rl rewards list` says.
DECLARATIONS = (
    *("differentiable", "inputs", "wants_teacher_images", "whole_groups", "batch_size", "concurrency"),
    *("required_columns", "prepare", "release", "name", "info"),
)

# Names by which a reward may ask for what is no column of the data set.
EXTRAS = ("teacher_images", "group_ids")


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """The values of one reward.

    Args:
        values: The values, shape (N,), float32; NaN where the reward does not apply. Only the library writes NaN: a
            NaN that a reward returns is a fault.
        gradient: Their gradient at the reward's inputs, of the inputs' shape, 0 where not applicable; or None.
        faults: How many samples are not applicable because the reward failed on them.
    """

    values: Tensor
    gradient: Tensor | None = None
    faults: int = 0

    @property
    def applicable(self) -> Tensor:
        """Whether the reward has a value, shape (N,), bool."""
        return ~self.values.isnan()


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a reward's signature asks for beside images and prompts.

    Args:
        required: Names without a default.
        optional: Names with one.
        everything: Whether it takes any column.
    """

    required: frozenset[str]
    optional: frozenset[str]
    everything: bool

    def pick(self, available: Mapping[str, Any]) -> dict[str, Any]:
        """The part of what there is that the reward asks for."""
        return {
            name: value
            for name, value in available.items()
            if name in self.required | self.optional or (self.everything and name not in EXTRAS)
        }


def needs(reward: Callable[..., Any]) -> Needs:
    """The names that a reward's signature asks for beside images and prompts.

    Raises:
        TypeError: If it does not take two positional arguments, or prompts first.

    Example:
        >>> def brightness(images, prompts, target, weight=1.0): ...
        >>> sorted(needs(brightness).required), sorted(needs(brightness).optional)
        (['target'], ['weight'])
    """
    if isinstance(reward, RewardModel):
        parameters = list(inspect.signature(reward.rewards).parameters.values())[1:]  # Its first is the network.
    else:
        called = reward.forward if isinstance(reward, nn.Module) else reward
        parameters = list(inspect.signature(called).parameters.values())
    kinds = {parameter.kind for parameter in parameters}
    positional = [parameter for parameter in parameters if parameter.kind in _POSITIONAL]
    if len(positional) < 2 and Parameter.VAR_POSITIONAL not in kinds:
        raise TypeError(f"The reward {reward!r} must take (images, prompts, **columns); its signature does not.")
    if {parameter.name for parameter in positional[:1]} & {"prompt", "prompts", "completions"}:
        raise TypeError(
            f"The reward {reward!r} takes {positional[0].name!r} first, as a reward of TRL does. Here the first are "
            "images, and the second their prompts: (images, prompts, **columns)."
        )
    named = positional[2:] + [parameter for parameter in parameters if parameter.kind == Parameter.KEYWORD_ONLY]
    optional = {parameter.name for parameter in named if parameter.default is not Parameter.empty}
    required = {parameter.name for parameter in named} - optional | {*getattr(reward, "required_columns", ())}
    return Needs(required=frozenset(required), optional=frozenset(optional), everything=Parameter.VAR_KEYWORD in kinds)


def check_columns(name: str, reward: Callable[..., Any], columns: Sequence[str]) -> None:
    """Check that the data set has what a reward asks for.

    Args:
        name: The reward's name, for the message.
        reward: The reward.
        columns: The data set's columns beside the prompt.

    Raises:
        ValueError: If a column is missing, or has a name that means something else to rewards.
    """
    wanted = needs(reward)
    missing = sorted(wanted.required - {*columns, *EXTRAS})
    if missing:
        raise ValueError(
            f"The reward {name!r} reads the column(s) {', '.join(missing)}, but the training data has only "
            f"{', '.join(['prompt', *columns])}. Add the column, or give the argument a default."
        )
    if "teacher_images" in wanted.required and not getattr(reward, "wants_teacher_images", False):
        raise ValueError(f"The reward {name!r} takes teacher_images; set its attribute wants_teacher_images = True.")
    taken = sorted({*columns} & {*EXTRAS, *(("images", "prompts") if wanted.everything else ())})
    if taken:
        raise ValueError(f"The column name(s) {', '.join(taken)} mean something else to rewards. Rename the column.")


def read_answer(answer: Any, count: int) -> Tensor:
    """A reward's answer, shape (N,), float32, with its graph: NaN stands for None, infinity for what is not finite.

    Args:
        answer: What it returned.
        count: How many values it should have.

    Raises:
        TypeError: If it is no list or tensor of real numbers.
        ValueError: If its length is wrong.

    Example:
        >>> read_answer([1, None, float("nan")], 3)
        tensor([1., nan, inf])
    """
    if isinstance(answer, np.ndarray):
        answer = torch.from_numpy(answer)
    if isinstance(answer, Tensor):
        if answer.shape != (count,):
            raise ValueError(f"it returned a tensor of shape {tuple(answer.shape)} for {count} samples, not ({count},)")
        return _finite_or_inf(answer)
    if not isinstance(answer, Sequence) or isinstance(answer, str | bytes):
        raise TypeError(f"it returned {type(answer).__name__}, not a list or a tensor")
    if len(answer) != count:
        raise ValueError(f"it returned {len(answer)} values for {count} samples")
    values = []
    for value in answer:
        if value is None:
            values.append(torch.tensor(torch.nan))
        elif isinstance(value, Tensor) and value.ndim == 0:
            values.append(_finite_or_inf(value))
        elif isinstance(value, str | bytes | Tensor) or np.iscomplexobj(value) or not hasattr(value, "__float__"):
            raise TypeError(f"it returned {type(value).__name__} {str(value)[:40]!r} among its values, not a number")
        else:
            values.append(_finite_or_inf(torch.tensor(float(value))))
    device = next((value.device for value in values if value.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([value.to(device) for value in values]) if values else torch.zeros(0)


def _finite_or_inf(values: Tensor) -> Tensor:
    if values.is_complex():
        raise TypeError("it returned complex numbers")
    values = values.float()
    return torch.where(values.isfinite(), values, torch.inf)


def shorten_prompts(prompts: Sequence[str]) -> str:
    """Prompts for a message: each once, at most four, and of a long one its beginning.

    Example:
        >>> shorten_prompts(["a cat", "a cat", "a dog"])
        "'a cat', 'a dog'"
    """
    distinct = list(dict.fromkeys(prompts))
    return ", ".join(repr(prompt[:80]) for prompt in distinct[:4]) + (", ..." if len(distinct) > 4 else "")


class PlainReward:
    """A plain reward and how it is called.

    Args:
        name: Its name.
        function: The callable.
        batch_size: Most samples in a call; None for all. With ``whole_groups`` a multiple of the group is taken, and
            at least one group.
        timeout: Seconds for all batches of a rollout together; None for no limit.
        on_error: ``raise``, or ``skip``: samples on which it fails count as not applicable.
        last_checkpoint: Gives the folder of the last checkpoint, for the error; None if there is no run to resume.
    """

    def __init__(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        batch_size: int | None = None,
        timeout: float | None = None,
        on_error: str = "raise",
        last_checkpoint: Callable[[], Path | None] | None = None,
    ) -> None:
        """Read its signature and declarations."""
        self.name = name
        self.function = function
        self.needs = needs(function)
        self.differentiable = bool(getattr(function, "differentiable", False))
        self.inputs = getattr(function, "inputs", "images")
        self.wants_teacher_images = bool(getattr(function, "wants_teacher_images", False))
        self.whole_groups = bool(getattr(function, "whole_groups", False))
        call = getattr(function, "__call__", None)  # noqa: B004
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)
        if self.inputs not in ("images", "latents"):
            raise ValueError(f"The reward {name!r} declares inputs={self.inputs!r}; use 'images' or 'latents'.")
        self.batch_size, self.timeout, self.on_error = batch_size, timeout, on_error
        self.last_checkpoint = last_checkpoint
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(
        self, inputs: Tensor, batch: PromptBatch, *, gradient: bool, teacher_images: Tensor | None = None
    ) -> Callable[[], RewardOutput]:
        """Begin to evaluate a batch in a thread of its own; the function that is returned waits for the values.

        It raises :class:`RewardError` if the reward fails and that is not to be skipped.

        Args:
            inputs: Images or latents, shape (N, ...), without a graph.
            batch: Their prompts.
            gradient: Whether the gradient at the inputs is wanted.
            teacher_images: The teacher's images, shape (N, 3, H', W'), if the reward wants them.
        """
        cuts = self._cuts(batch)
        calls = [self._call_for(inputs, batch, rows, gradient, teacher_images) for rows in cuts]
        answers: dict[int, Answer | Exception] = {}  # By the number of the call, in the order in which they come.
        given_up = threading.Event()
        together: list[Future[None]] = []

        def work() -> None:
            device = torch.cuda.device(inputs.device) if inputs.is_cuda else nullcontext()  # A new thread has its own.
            with device, torch.set_grad_enabled(gradient):
                if self.is_async:
                    work_of_all = self._answer_together(calls, answers)
                    together.append(asyncio.run_coroutine_threadsafe(work_of_all, self._event_loop()))
                    with suppress(CancelledError):
                        together[0].result()
                else:
                    for index, call in enumerate(calls):
                        answers[index] = self._answer(call)
                        if self._stops_after(answers[index]):
                            break
                if hasattr(self.function, "release") and not given_up.is_set():
                    self.function.release()

        thread = threading.Thread(target=work, name=f"reward {self.name}", daemon=True)
        thread.start()

        def wait() -> RewardOutput:
            thread.join(self.timeout)
            missing: Exception = RuntimeError("it ended without an answer")
            in_time = dict(answers)  # Before calls that are given up answer that they were.
            if thread.is_alive():
                given_up.set()  # A newer call may use the reward before this one ends.
                for call in together:
                    call.cancel()
                missing = TimeoutError(f"no answer within {self.timeout} seconds (reward_timeout)")
            absent = {index: missing for index in range(len(cuts)) if index not in in_time}
            return self._collect({**in_time, **absent}, cuts, inputs, batch, gradient)

        return wait

    def _event_loop(self) -> asyncio.AbstractEventLoop:
        """The loop of an asynchronous reward: one for the whole run, so that its locks and connections stay valid."""
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            threading.Thread(target=self._loop.run_forever, name=f"loop of reward {self.name}", daemon=True).start()
        return self._loop

    def _cuts(self, batch: PromptBatch) -> list[slice]:
        count = len(batch.prompts)
        limits = [limit for limit in (self.batch_size, getattr(self.function, "batch_size", None)) if limit]
        size = min(limits, default=max(1, count))
        if self.whole_groups:
            group = int((batch.group_ids == batch.group_ids[0]).sum())
            size = max(group, size // group * group)
        return [slice(first, min(first + size, count)) for first in range(0, count, size)]

    def _call_for(
        self, inputs: Tensor, batch: PromptBatch, rows: slice, gradient: bool, teacher_images: Tensor | None
    ) -> Call:
        """What the reward is called with for some samples: copies, so that it cannot change what others see."""
        extra: dict[str, Any] = {name: list(column[rows]) for name, column in batch.columns.items()}
        extra["group_ids"] = batch.group_ids[rows].tolist()
        if teacher_images is not None:
            extra["teacher_images"] = teacher_images[rows].clone()
        part = inputs[rows].detach().clone().requires_grad_(gradient)
        return part, list(batch.prompts[rows]), self.needs.pick(extra)

    def _answer(self, call: Call) -> Answer | Exception:
        part, prompts, columns = call
        try:
            return self._read(self.function(part, prompts, **columns), part)
        except Exception as error:  # Whatever it is, the training process decides what becomes of it.
            return error

    def _stops_after(self, answer: Answer | Exception) -> bool:
        return isinstance(answer, Exception) and self.on_error == "raise"

    async def _answer_together(self, calls: Sequence[Call], answers: dict[int, Answer | Exception]) -> None:
        limit = asyncio.Semaphore(getattr(self.function, "concurrency", None) or max(1, len(calls)))

        async def answer(index: int) -> None:
            part, prompts, columns = calls[index]
            try:
                async with limit:
                    torch.set_grad_enabled(part.requires_grad)  # The loop's thread has a mode and a device of its own.
                    if part.is_cuda:
                        torch.cuda.set_device(part.device)
                    answers[index] = self._read(await self.function(part, prompts, **columns), part)
            except Exception as error:  # As above.
                answers[index] = error
            except (asyncio.CancelledError, SystemExit) as error:  # These would end the loop, and the others with it.
                answers[index] = RuntimeError(f"it ended without an answer ({type(error).__name__})")
            if self._stops_after(answers[index]):
                for other in tasks:
                    other.cancel()

        tasks = [asyncio.ensure_future(answer(index)) for index in range(len(calls))]
        await asyncio.gather(*tasks, return_exceptions=True)

    def _read(self, answer: Any, part: Tensor) -> Answer:
        """The values of one batch, NaN where not applicable and inf where faulty, and their gradient at the inputs.

        There is no gradient if none is wanted, or the values have no path to the inputs.
        """
        values = read_answer(answer, len(part))
        usable = values[values.isfinite()]
        slope = None
        if part.requires_grad and usable.requires_grad:
            slope = torch.autograd.grad(usable.sum(), part, allow_unused=True)[0]
        return values.detach(), None if slope is None else slope.detach().float()

    def _collect(
        self,
        answers: Mapping[int, Answer | Exception],
        cuts: Sequence[slice],
        inputs: Tensor,
        batch: PromptBatch,
        gradient: bool,
    ) -> RewardOutput:
        """The values of all batches, with every fault raised or skipped."""
        values = torch.full((len(batch.prompts),), torch.nan, device=inputs.device)
        slopes = torch.zeros_like(inputs, dtype=torch.float32)
        pathless = torch.zeros(len(values), dtype=torch.bool, device=inputs.device)
        faults = 0
        for index, answer in answers.items():
            rows = cuts[index]
            if isinstance(answer, Exception):
                faults += self.fault(batch.prompts[rows], answer)
                continue
            values[rows] = answer[0].to(inputs.device)
            if answer[1] is None:
                pathless[rows] = True
            else:
                slopes[rows] = answer[1]
        known = ~values.isnan()
        steep = known & ~slopes.flatten(1).isfinite().all(1)
        constant = values[known & pathless & values.isfinite()]
        # The gradient of a constant is 0; values that differ must depend on something.
        severed = known & pathless & (gradient and bool((constant != constant[:1]).any()))
        for wrong, error in (
            (values.isinf(), ValueError("its value is NaN or infinite; return None where the reward does not apply")),
            (steep, ValueError("its gradient is NaN or infinite")),
            (severed, TypeError("it declares differentiable = True, but its values have no graph to its inputs")),
        ):
            if bool((wrong & known).any()):
                places = (wrong & known).nonzero().flatten().tolist()
                self._check_inputs(inputs[places], [batch.prompts[place] for place in places])
                faults += self.fault([batch.prompts[place] for place in places], error)
                known = known & ~wrong
        slopes = torch.where(known.view(-1, *[1] * (inputs.ndim - 1)), slopes, 0.0)
        return RewardOutput(
            values=values.masked_fill(~known, torch.nan), gradient=slopes if gradient else None, faults=faults
        )

    def _check_inputs(self, inputs: Tensor, prompts: Sequence[str]) -> None:
        """Raise if a reward has no finite answer to what was not finite: that is not its fault, and no sample's."""
        if not bool(inputs.isfinite().all()):
            source = "The decoder overflowed: set reward_decoder, or fp16=False" if self.inputs == "images" else ""
            raise FloatingPointError(
                f"The {self.inputs} that the reward {self.name!r} was asked about are not finite for the prompt(s) "
                f"{shorten_prompts(prompts)}, so it cannot judge them. {source or 'Look at what made them'}."
            )

    def fault(self, prompts: Sequence[str], error: Exception) -> int:
        """Stop the run with a :class:`RewardError`, or skip samples: their number.

        Args:
            prompts: The prompts of the samples on which the reward failed.
            error: How.
        """
        what = (
            f"The reward {self.name!r} failed on {len(prompts)} sample(s) of the prompt(s) {shorten_prompts(prompts)}"
        )
        reason = f"{type(error).__name__}: {error}"
        if self.on_error == "skip":
            logger.warning("%s: %s. They count as not applicable (on_reward_error='skip').", what, reason)
            return len(prompts)
        if self.last_checkpoint is None:
            raise RewardError(f"{what}: {reason}. Mend the reward.") from error
        checkpoint = self.last_checkpoint()
        saved = f"The last checkpoint is {str(checkpoint)!r}" if checkpoint else "No checkpoint was written yet"
        raise RewardError(
            f"{what}: {reason}. {saved}. Mend the reward and resume, or set on_reward_error='skip' to go on without "
            "these samples."
        ) from error


@dataclass
class RewardCallSettings:
    """Calling the rewards."""

    decode_batch_size: Count = setting(4, "Samples that are decoded at once for rewards: memory against speed.")
    reward_decoder: Folder | None = setting(
        None, "Folder or hub name of a tiny autoencoder that makes the rewards' images. Default: the model's own."
    )
    reward_batch_size: Count | None = setting(
        None, "Most samples that a reward is called with. Default: all of a micro-batch."
    )
    reward_timeout: Positive | None = setting(
        600.0, "Seconds after which a reward counts as hung; `none` waits for ever."
    )
    on_reward_error: Literal["raise", "skip"] = setting(
        "raise", "What happens when a reward fails: `raise`, or `skip` the samples concerned."
    )
    teacher_num_inference_steps: Count = setting(50, "Steps of the teacher's images, for rewards that ask for them.")
    teacher_cache_dir: Folder | None = setting(
        None,
        "Where the teacher's images are kept on disk, for rewards that ask for them and for evaluations. Default: "
        "those of evaluations, and with `ReDiFConfig` all, in `output_dir/teacher-images`; others nowhere.",
    )
    teacher_cache_gib: Positive | None = setting(
        20.0, "Most disk space that they take, in GiB; the least recently used go first. `none` is without a limit."
    )
