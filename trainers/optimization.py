"""The optimiser of one role (accumulate, reduce, clip, step, schedule), and the average of the policy."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.optimization import get_scheduler

from rdm_rl.networks.sharding import cut_like, local, whole, with_local
from rdm_rl.settings import Size, Whole, Within, setting

if TYPE_CHECKING:
    from rdm_rl.trainers.rdm_config import RDMConfig

Decay = Annotated[float, Within(0, 1, but_not=1)]
OptimizerFactory = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
# Of an optimiser's groups, what is the run's to set; anything else in them may be state.
_SETTINGS = ("initial_lr", "weight_decay", "betas", "eps")


@dataclass(kw_only=True)
class RoleOptimizer:
    """What updates the weights of one role.

    Args:
        parameters: The weights.
        optimizer: The optimiser.
        scheduler: Its learning-rate schedule, stepped once for each update.
        scaler: The loss scaler; disabled except in fp16.
        max_grad_norm: The gradient norm to clip to; 0 does not clip.
        reduce: Averages the gradients over processes, in place.
    """

    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    scheduler: Any
    scaler: torch.amp.GradScaler
    max_grad_norm: float
    reduce: Callable[[Iterable[nn.Parameter]], None]

    def backward(self, loss: Tensor, share: float) -> None:
        """Accumulate the gradient of a micro-batch's loss, times its share of the batch."""
        self.scaler.scale(loss * share).backward()

    def step(self) -> float:
        """Make one update with what was accumulated.

        Returns:
            The gradient norm before clipping.
        """
        self.reduce(self.parameters)
        self.scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or float("inf")
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    @property
    def learning_rate(self) -> float:
        """The current learning rate."""
        return float(self.optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        """The state of optimiser, schedule and scaler; of sharded weights, this process's part of it."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take that state back, whole as a checkpoint has it; rates and other settings stay those of this run."""
        saved = state["optimizer"]
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        restored = {
            index: {name: _own(value, parameters[index]) for name, value in values.items()}
            for index, values in saved["state"].items()
        }
        settings = [{name: group[name] for name in _SETTINGS if name in group} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict({**saved, "state": restored})
        for group, values in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values)
        self.scheduler.load_state_dict({**state["scheduler"], "base_lrs": self.scheduler.base_lrs})
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        # The saved rate is that of the saved run's settings and length.
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.scheduler.last_epoch)


def _own(value: Any, parameter: nn.Parameter) -> Any:
    """A copy of a value of the optimiser's state, which may lie in a file; cut as the weight is if it is as large."""
    if not isinstance(value, Tensor):
        return value
    return (cut_like(value, parameter) if value.shape == parameter.shape else value).clone()


def make_optimizer(args: "RDMConfig", parameters: list[nn.Parameter], learning_rate: float) -> torch.optim.Optimizer:
    """The optimiser that ``args.optim`` names, as transformers builds it, with another learning rate.

    Args:
        args: The settings.
        parameters: What it updates.
        learning_rate: Its learning rate.

    Returns:
        The optimiser.
    """
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
    settings = {**settings, "lr": learning_rate, "weight_decay": args.weight_decay}
    optimizer: torch.optim.Optimizer = kind(parameters, **settings)
    return optimizer


def make_scheduler(args: "RDMConfig", optimizer: torch.optim.Optimizer, steps: int, *, warm_up: bool = True) -> Any:
    """The learning-rate schedule that the settings name.

    Args:
        args: The settings.
        optimizer: Whose learning rate it sets.
        steps: Updates in the whole run.
        warm_up: Whether the rate rises over ``warmup_steps`` first: the policy's does.

    Returns:
        The schedule.
    """
    return get_scheduler(
        args.lr_scheduler_type,
        optimizer,
        num_warmup_steps=args.get_warmup_steps(steps) if warm_up else 0,
        num_training_steps=steps,
        scheduler_specific_kwargs=args.lr_scheduler_kwargs or {},
    )


def check_schedule(args: "RDMConfig") -> None:
    """Make the schedule once for nothing, because transformers says only then what is wrong with its arguments.

    Args:
        args: The settings.

    Raises:
        ValueError: If ``lr_scheduler_type`` cannot be made with ``lr_scheduler_kwargs``.
    """
    try:
        make_scheduler(args, torch.optim.SGD([nn.Parameter(torch.zeros(1))], args.learning_rate), 2)
    except (TypeError, ValueError) as error:
        name = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
        raise ValueError(
            f"lr_scheduler_type={name!r} cannot be made with lr_scheduler_kwargs={args.lr_scheduler_kwargs!r}: "
            f"{error}. Give a mapping of what the schedule takes, or leave it out."
        ) from error


class PolicyAverage:
    """An exponential moving average of the policy's weights.

    After n updates the decay is (1 + n) / (10 + n) until that reaches its final value, so that a short run averages
    over about its last tenth instead of keeping the start: the first update replaces it. Of sharded weights, each
    process averages its own part.

    Args:
        parameters: The policy's weights by name; the average starts from them.
        decay: The final decay, in (0, 1]; a copy that is never stepped has 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        """Copy the weights."""
        self._parameters = dict(parameters)
        self._averages = [local(parameter).clone() for parameter in self._parameters.values()]
        self._decay = decay
        self._updates = 0

    def _pairs(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(self._averages, map(local, self._parameters.values()), strict=True)

    @torch.no_grad()
    def step(self) -> None:
        """Move the average towards the current weights."""
        n = self._updates
        decay = min(self._decay, (1 + n) / (10 + n)) if n else 0.0
        self._updates += 1
        for average, current in self._pairs():
            average.sub_((1 - decay) * (average - current))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the averaged weights into the policy for the length of the context."""
        kept = [current.to("cpu", copy=True) for _, current in self._pairs()]
        for average, current in self._pairs():
            current.copy_(average)
        try:
            yield
        finally:
            for (_, current), before in zip(self._pairs(), kept, strict=True):
                current.copy_(before)

    @property
    def updates(self) -> int:
        """How many updates went into the average."""
        return self._updates

    def tensors(self) -> dict[str, Tensor]:
        """The averaged weights by name; sharded if the weights are."""
        return {
            name: with_local(parameter, average)
            for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True)
        }

    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take averaged weights, whole, and their number of updates back."""
        for (name, parameter), average in zip(self._parameters.items(), self._averages, strict=True):
            average.copy_(local(cut_like(tensors[name], parameter)))
        self._updates = updates


@dataclass
class FakeScoreSettings:
    """Fake score."""

    fake_score_learning_rate: Size = setting(
        1e-4, "Learning rate of the fake score; it must be well above the policy's."
    )
    fake_score_updates_per_policy_update: Whole = setting(
        5,
        "Updates of the fake score before each policy update, or, with `num_iterations`, on each rollout; 0 does "
        "without it.",
    )
    fake_score_warmup_steps: Whole | None = setting(
        None,
        "Updates of the fake score on the initial policy before the first policy update, so that it knows the policy "
        "before it is asked where to go. Default: 100, or 0 where the fake score is not trained.",
    )
    fake_score_max_grad_norm: Size = setting(
        1.0, "Gradient norm that the fake score's gradients are clipped to; 0 does not clip."
    )


@dataclass
class AverageSettings:
    """The averaged policy."""

    ema_decay: Decay = setting(
        0.999,
        "Decay of the averaged policy, reached after about 9 / (1 - decay) updates; 0 switches averaging off.",
    )
    save_ema: bool = setting(True, "Save and evaluate the averaged policy instead of the last one.")
