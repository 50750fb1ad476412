"""What scripts give the trainer, as it must be: its arguments, and what their hooks return."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from peft import LoraConfig
from torch import Tensor
from transformers.trainer_callback import EarlyStoppingCallback

from rdm_rl.records import Judgement
from rdm_rl.trainers.rdm_config import RDMConfig

Result = TypeVar("Result")

# Methods that scripts for the trainers of transformers and TRL override, and what does the same here.
FOREIGN_HOOKS = {
    "compute_loss": "compute_policy_loss() or compute_fake_score_loss()",
    "create_optimizer": "create_optimizers(), or RDMTrainer(optimizers=...) with a function for each role",
    "create_scheduler": "lr_scheduler_type and warmup_steps set it",
    "create_optimizer_and_scheduler": "create_optimizers(), or RDMTrainer(optimizers=...) and lr_scheduler_type",
    "get_train_dataloader": "RDMTrainer(train_dataset=...) takes the prompts, and generate_rollout() answers them",
    "get_eval_dataloader": "RDMTrainer(eval_dataset=...) takes the prompts of evaluate()",
    "prediction_step": "evaluate()",
    "evaluation_loop": "evaluate()",
    "_generate_and_score_completions": "generate_rollout() and compute_rewards()",
    "_calculate_rewards": "compute_rewards()",
}


def check_hooks(trainer: object, base: type) -> None:
    """Refuse a subclass that overrides what no run would call, or so that no run can call it.

    Args:
        trainer: The trainer.
        base: The library's class that it derives from.

    Raises:
        TypeError: If it has a hook of transformers' or TRL's trainers, or one that does not take what it is given.
    """
    kind = type(trainer)
    for name, instead in FOREIGN_HOOKS.items():
        if hasattr(kind, name):
            raise TypeError(
                f"{kind.__name__}.{name} is a hook of transformers' or TRL's trainers, and no run would call it. "
                f"Here it is: {instead}. Give a method of your own another name."
            )
    for name, hook in inspect.getmembers(base, inspect.isfunction):
        if getattr(kind, name) is not hook and not name.startswith("_"):
            _check_signature(f"{kind.__name__}.{name}", getattr(trainer, name), hook)


def _check_signature(name: str, method: Callable[..., Any], hook: Callable[..., Any]) -> None:
    """Raise where a method does not take what the library's own, without a default, is given."""
    taken, own = inspect.signature(method), list(inspect.signature(hook).parameters.values())[1:]  # Without self.
    given = [each for each in own if each.default is inspect.Parameter.empty]
    names = [each.name for each in given]
    by_name = {each.name for each in given if each.kind is inspect.Parameter.KEYWORD_ONLY}
    try:
        taken.bind(*(name for name in names if name not in by_name), **dict.fromkeys(by_name))
    except TypeError as error:
        raise TypeError(
            f"{name} takes ({', '.join(taken.parameters)}), but a run calls it with ({', '.join(names)}): {error}. "
            "Take these; what it takes beside them needs a default."
        ) from None


def check_arguments(args: Any, peft_config: Any, callbacks: Iterable[Any], optimizers: Sequence[Any]) -> None:
    """Raise where an argument is what other trainers take, and this one cannot.

    Args:
        args: The settings.
        peft_config: The adapter.
        callbacks: The user's callbacks, instances or classes.
        optimizers: What makes the optimisers.

    Raises:
        TypeError: If one is of another kind.
        ValueError: If a callback waits for what no run has.
    """
    if args is not None and not isinstance(args, RDMConfig):
        raise TypeError(f"args is a {type(args).__name__}, but the settings of a run are an RDMConfig.")
    if peft_config is not None and not isinstance(peft_config, LoraConfig):
        kind = type(peft_config).__name__
        raise TypeError(f"peft_config is a {kind}. Pass a peft.LoraConfig, or None to train all weights.")
    for index, factory in enumerate(optimizers):
        if factory is not None and not callable(factory):
            raise TypeError(
                f"optimizers[{index}] is a {type(factory).__name__}, but what is trained exists only once the adapters "
                "are made. Pass a function: lambda parameters: torch.optim.AdamW(parameters, lr=1e-5)."
            )
    for callback in callbacks:
        if isinstance(callback, EarlyStoppingCallback) or callback is EarlyStoppingCallback:
            raise ValueError(
                "EarlyStoppingCallback compares metric_for_best_model, on which a run does not act. Write a callback "
                "whose on_evaluate(args, state, control, metrics) sets control.should_training_stop = True."
            )


def returned(hook: str, value: Any, kind: type[Result]) -> Result:
    """What a hook of the trainer returned.

    Raises:
        TypeError: If it is of another kind, as where a ``return`` was forgotten.

    Example:
        >>> returned("training_step", None, dict)
        Traceback (most recent call last):
        ...
        TypeError: training_step returned a NoneType, but its caller needs a dict.
    """
    if not isinstance(value, kind):
        raise TypeError(f"{hook} returned a {type(value).__name__}, but its caller needs a {kind.__name__}.")
    return value


def returned_direction(value: Any, x_0: Tensor) -> Tensor:
    """What ``compute_distribution_matching`` returned: a direction for each of the predictions.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If its shape is another.
    """
    direction: Tensor = returned("compute_distribution_matching", value, Tensor)
    if direction.shape != x_0.shape:
        raise ValueError(
            f"compute_distribution_matching returned a tensor of shape {tuple(direction.shape)}, but it is the "
            f"direction of predictions of shape {tuple(x_0.shape)}. Return one of that shape."
        )
    return direction


def returned_judgements(value: Any, rewards: Iterable[str]) -> dict[str, Judgement]:
    """What ``compute_rewards`` returned: a judgement for each reward, by name.

    Raises:
        TypeError: If it is something else.
        ValueError: If there are judgements of other rewards, or of too few.
    """
    judgements: Mapping[str, Any] = returned("compute_rewards", value, dict)
    if judgements.keys() != {*rewards}:
        raise ValueError(
            f"compute_rewards returned judgements of {', '.join(judgements) or 'no reward'}, but the rewards are "
            f"{', '.join(rewards)}."
        )
    return {name: returned(f"compute_rewards, for {name!r},", item, Judgement) for name, item in judgements.items()}
