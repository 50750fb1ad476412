"""Callbacks, trackers and progress bars, as transformers has them, for a loop of our own."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import PrinterCallback, ProgressCallback
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import (
    CallbackHandler,
    DefaultFlowCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)

from rdm_rl.trainers.rdm_config import RDMConfig


class QuietProgressCallback(ProgressCallback):
    """A progress bar with two health numbers beside it, instead of a printed line for every log entry."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description("distribution matching")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the gap and the lag."""
        if self.training_bar is not None:
            names = [name for name in ("rewards/rdm/gap", "fake_score/lag") if name in (logs or {})]
            self.training_bar.set_postfix({name: f"{logs[name]:.3g}" for name in names}, refresh=False)


class StopAtOnce(TrainerCallback):
    """Ends a run before its first update, where others are to begin: warm start and warm-up are done."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the run."""
        control.should_training_stop = True


def make_trackers(args: RDMConfig) -> list[TrainerCallback]:
    """The trackers in ``report_to``.

    Args:
        args: The settings.

    Returns:
        Their callbacks.

    Raises:
        ValueError: If one is unknown, or not installed.
    """
    trackers = []
    for kind in get_reporting_integration_callbacks(args.report_to):
        try:
            trackers.append(_beginning_once(kind()))
        except (ImportError, RuntimeError) as error:
            raise ValueError(
                f"report_to={args.report_to!r} cannot be used: {error} Install it, or leave it out."
            ) from error
    return trackers


def make_callback_handler(
    args: RDMConfig,
    trackers: Sequence[TrainerCallback],
    callbacks: Sequence[TrainerCallback | type[TrainerCallback]],
    model: torch.nn.Module,
) -> CallbackHandler:
    """The handler of transformers' default callbacks, the trackers and the user's own.

    Args:
        args: The settings.
        trackers: What :func:`make_trackers` made.
        callbacks: The user's callbacks, instances or classes.
        model: What callbacks receive as ``model``: the policy's network.

    Returns:
        The handler.
    """
    progress = PrinterCallback if args.disable_tqdm else ProgressCallback
    return CallbackHandler([DefaultFlowCallback, *trackers, *callbacks, progress], model, None, None, None)


def _beginning_once(tracker: TrainerCallback) -> TrainerCallback:
    """The tracker, which begins once, before or with the training.

    It is shown no model then: several expect its configuration to be of transformers' kind.
    """
    begin, begun = tracker.on_train_begin, False

    def on_train_begin(args: RDMConfig, state: TrainerState, control: TrainerControl, **named: Any) -> Any:
        nonlocal begun
        named.pop("model", None)
        if not begun:
            begun = True
            begin(args, state, control, **named)
        return control

    tracker.on_train_begin = on_train_begin
    return tracker


def make_state(handler: CallbackHandler, is_local_zero: bool, is_world_zero: bool) -> TrainerState:
    """A fresh trainer state that exports the callbacks that can be exported."""
    return TrainerState(
        is_local_process_zero=is_local_zero,
        is_world_process_zero=is_world_zero,
        stateful_callbacks=callback_states(handler),
    )


def callback_states(handler: CallbackHandler) -> dict[str, Any]:
    """The present state of the callbacks that can be exported, by the name of their class, in transformers' format."""
    stateful = [each for each in [*handler.callbacks, TrainerControl()] if isinstance(each, ExportableState)]
    states: dict[str, Any] = TrainerState(stateful_callbacks=stateful).stateful_callbacks
    return states


def load_callback_states(handler: CallbackHandler, states: Mapping[str, Any]) -> None:
    """Give callbacks the attributes back that they have exported; what they were made with stays as it is.

    Args:
        handler: The callbacks, several of one class in the order in which they were saved.
        states: What :func:`callback_states` gave.
    """
    for name, saved in states.items():
        same_class = [each for each in handler.callbacks if type(each).__name__ == name]
        for callback, state in zip(same_class, saved if isinstance(saved, list) else [saved], strict=False):
            for attribute in callback.state()["attributes"].keys() & state["attributes"].keys():
                setattr(callback, attribute, state["attributes"][attribute])


def log_image(handler: CallbackHandler, name: str, image: Image.Image, step: int) -> None:
    """Send a picture to those trackers that show pictures: TensorBoard, Weights & Biases and Trackio.

    Args:
        handler: The run's callbacks.
        name: What the picture is called there.
        image: The picture.
        step: The policy update it belongs to.
    """
    for callback in handler.callbacks:
        match type(callback).__name__:
            case "TensorBoardCallback" if callback.tb_writer is not None:
                callback.tb_writer.add_image(name, np.asarray(image), step, dataformats="HWC")
            case "WandbCallback" if callback._initialized:
                tracker: Any = callback._wandb
                tracker.log({name: tracker.Image(image), "train/global_step": step})
            case "TrackioCallback" if callback._initialized:
                tracker = callback._trackio
                tracker.log({name: tracker.Image(image)}, step=step)
