"""Which checkpoint a run goes on from, and which settings it may change: the kind of a setting says what happens."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from math import prod
from pathlib import Path
from signal import Signals
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from transformers import TrainingArguments

from rdm_rl.files import config_facts
from rdm_rl.manifest import read_manifest
from rdm_rl.trainers.checkpointing import find_checkpoint, read_settings, set_aside
from rdm_rl.trainers.warm_start import solutions_folder

if TYPE_CHECKING:
    from rdm_rl.trainers.student_run import StudentRun

Kind = Literal["state", "cut", "method", "schedule", "free"]

RULES: dict[Kind, str] = {
    "state": "The saved state fits no other value, or the place in the data is counted with it: refused.",
    "cut": "How an update's samples are cut into batches: changed if their product, the samples of an update, stays; "
    "otherwise refused with both products.",
    "method": "What is trained, and on what: old and new are named, and it is refused without `allow_config_change`.",
    "schedule": "Learning rates and length: changed as you like; old and new are printed.",
    "free": "Logging, saving, evaluation, memory and machine: changed as you like.",
}
KINDS: dict[Kind, frozenset[str]] = {
    "state": frozenset(
        "num_inference_steps num_generations optim optim_args".split(),
    ),
    "cut": frozenset(("per_device_train_batch_size", "gradient_accumulation_steps", "num_processes")),
    "method": frozenset(
        """base_quantization policy_init_scale resolution sampler eta random_times guidance_scale group_noise
        noise_pool ema_decay reward_weights reward_weighting adaptive_reference fidelity_budget
        reward_start_step reward_ramp_steps reward_conflict reward_gradient pathwise_steps reward_decoder
        teacher_num_inference_steps teacher_cache_dir teacher_guidance_scale dm_normalization dm_scale_floor
        first_step_anchor renoise_distribution renoise_range renoise_anneal_steps
        fake_score_updates_per_policy_update fake_score_warmup_steps fake_score_max_grad_norm
        num_replayed_steps num_iterations importance_weight_clip importance_sampling_level epsilon
        epsilon_high reward_baseline scale_rewards advantage_clip step_weighting beta warm_start
        warm_start_steps warm_start_learning_rate warm_start_num_states warm_start_ode_steps weight_decay
        adam_beta1 adam_beta2 adam_epsilon max_grad_norm seed data_seed bf16 fp16""".split()
    ),
    "schedule": frozenset(
        """learning_rate fake_score_learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio
        max_steps num_train_epochs""".split()
    ),
    "free": frozenset(
        """decode_batch_size reward_batch_size reward_timeout on_reward_error teacher_cache_gib warm_start_cache_dir
        model_config prompt_cache_dir offload adapter_pass shard save_ema sanity_check allow_config_change
        max_skipped_updates
        stop_signals tf32 activation_checkpointing gradient_checkpointing use_cpu ddp_backend ddp_timeout output_dir
        resume_from_checkpoint save_strategy save_steps save_total_limit eval_strategy eval_steps eval_delay
        eval_on_start eval_features per_device_eval_batch_size logging_strategy logging_steps logging_first_step
        logging_dir disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        push_to_hub hub_model_id hub_private_repo hub_revision hub_token do_train do_eval local_rank
        remove_unused_columns""".split()
    ),
}
# Whether they are set at all decides over the state, or over how noise is drawn.
_SWITCHES = ("ema_decay", "beta")
_FOLDERS = ("teacher_cache_dir",)
_ADAPTER_SHAPE = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
_NO_SETTINGS = frozenset(each.name for each in fields(TrainingArguments))


class Change(NamedTuple):
    """A setting that a resumed run has otherwise than its checkpoint.

    Args:
        name: The setting, or a fact of the run: its rewards, its prompts.
        saved: The checkpoint's value.
        now: This run's value.
        kind: What follows from it.
    """

    name: str
    saved: Any
    now: Any
    kind: Kind

    def __str__(self) -> str:
        """The change in words."""
        return f"{self.name}={self.saved!r} (now {self.now!r})"


def kind_of(name: str) -> Kind:
    """The kind of a setting: that of a subclass's own is ``method``, that of a field that cannot be set ``free``."""
    unknown: Kind = "free" if name in _NO_SETTINGS else "method"
    return next((kind for kind, names in KINDS.items() if name in names), unknown)


def changes(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What a run has otherwise than its checkpoint.

    Args:
        saved: Settings and facts of the checkpoint by name; those of the cut are all there.
        now: Those of the run; what one of the two does not know is not compared.

    Example:
        >>> cut = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_processes": 1}
        >>> changes({**cut, "num_replayed_steps": 1}, {**cut, "num_replayed_steps": 2})
        [Change(name='num_replayed_steps', saved=1, now=2, kind='method')]
    """
    changed = []
    for name in sorted(saved.keys() & now.keys()):
        before, after = saved[name], now[name]
        switched = bool(before) != bool(after)
        if before != after and (switched or name not in _FOLDERS):
            changed.append(Change(name, before, after, "state" if switched and name in _SWITCHES else kind_of(name)))
    # Random numbers and the place in the data belong to the samples, which are the same however they are cut.
    before, after = (prod(made_with[name] for name in KINDS["cut"]) for made_with in (saved, now))
    if before != after:
        changed.append(Change("samples of an update", before, after, "state"))
    return changed


def check_settings(name: str, saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Check that a run may continue a checkpoint.

    Args:
        name: The checkpoint, for messages.
        saved: Its settings and facts.
        now: Those of the run.

    Returns:
        What has changed and may, without what is ``free``.

    Raises:
        ValueError: If a setting has changed that must not.
    """
    changed = changes(saved, now)
    fixed = [change for change in changed if change.kind == "state"]
    method = [change for change in changed if change.kind == "method"]
    if fixed:
        cut = [change for change in changed if change.kind == "cut"]
        hint = _accumulation_hint(fixed, now)
        raise ValueError(
            f"The checkpoint {name!r} was made with {_listed([*fixed, *cut])}, and its state fits no other value. "
            f"{hint}Resume with the same, or start a new run."
        )
    if method and not now["allow_config_change"]:
        raise ValueError(
            f"The checkpoint {name!r} was made with {_listed(method)}: that would change the method or the data in the "
            "middle of a run. Resume with the same, start a new run, or, if you mean it, set allow_config_change=True "
            "(--allow_config_change)."
        )
    return [change for change in changed if change.kind != "free"]


def check_place(name: str, step: int, steps: int, now: Mapping[str, Any]) -> None:
    """Check that a checkpoint is at the end of a rollout, which is not saved.

    Only the last one of a run can be inside of one: where ``max_steps`` ended it there.

    Args:
        name: The checkpoint, for messages.
        step: Updates before it.
        steps: Updates of the run that is to go on.
        now: The run's settings.

    Raises:
        ValueError: If the run would go on inside a rollout.
    """
    reuse = now["num_iterations"]
    if step % reuse and step < steps and not now["allow_config_change"]:
        raise ValueError(
            f"The checkpoint {name!r} is of update {step}, inside a rollout of num_iterations={reuse} updates, where "
            f"its run ended; the rollout is not saved, so this run (max_steps={steps}) would not be the one that had "
            f"not stopped. Resume from a checkpoint at a multiple of {reuse} (with save_steps there are some), or set "
            "allow_config_change=True (--allow_config_change): the updates up to the next rollout are then made on a "
            "new one of the same prompts."
        )


def _accumulation_hint(fixed: list[Change], now: Mapping[str, Any]) -> str:
    """Which accumulation gives an update its samples again, if any does."""
    at_once = now["per_device_train_batch_size"] * now["num_processes"]
    for change in fixed:
        if change.name == "samples of an update" and change.saved % at_once == 0:
            return f"With these batches and processes, set gradient_accumulation_steps={change.saved // at_once}. "
    return ""


def _listed(changed: list[Change]) -> str:
    return ", ".join(map(str, changed))


# ----- a run -----


def made_with(run: "StudentRun") -> dict[str, Any]:
    """What a run is made with, by name, as JSON can hold it: its settings, and what is no setting."""
    adapter = getattr(run.networks.module("policy"), "peft_config", {}).get("policy")
    shape = {} if adapter is None else config_facts(adapter)
    facts = {
        "num_processes": run.accelerator.num_processes,
        "rewards": list(run.rewards),
        "weighting": type(run.weighting).__name__,
        "prompts": run.prompts.fingerprint,
        "adapters": adapter is not None,
        **{f"peft_config.{name}": shape[name] for name in _ADAPTER_SHAPE if name in shape},
        **{f"weights of the {role}": name for role, name in run.fingerprints.items()},
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=sorted))  # Names of modules are sets.
    return {**json.loads(run.args.to_json_string()), **plain}


def checkpoint_to_resume(run: "StudentRun", wish: str | Path | bool) -> tuple[Path, list[Change]]:
    """The checkpoint that ``resume_from_checkpoint`` means, on all processes, and what has changed since then.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or the run may not continue it.
    """
    folder = run.on_first_process(lambda: find_checkpoint(run.args.output_dir, wish))
    now = made_with(run)
    changed = check_settings(str(folder), read_settings(folder), now)
    check_place(str(folder), read_manifest(folder)["step"], run.count_steps(), now)
    return folder, changed


def begin_in_folder(run: "StudentRun", checkpoint: Path | None, changed: Sequence[Change]) -> None:
    """Say what is continued, if anything, and move checkpoints and a student that are not out of the way."""
    if not run.accelerator.is_main_process:
        return
    step, steps, folder = run.state.global_step, run.state.max_steps, run.args.output_dir
    if checkpoint is not None:
        now = ", ".join(f"{change.name}={change.now!r} (it had {change.saved!r})" for change in changed)
        print(f"Resuming {checkpoint} after {step} updates{f' with {now}' if now else ''}")
        if step >= steps:
            print(f"The run is already finished: max_steps={steps}")
    place = set_aside(folder, run.run_id, step)
    if place is not None:
        print(f"Checkpoints and a saved student in {folder} that this run does not continue are now in {place}")


def say_how_to_go_on(run: "StudentRun", signal: int) -> str:
    """What a run that a signal ended leaves, printed by one process."""
    advice = "no checkpoint was written: start again"
    solutions = solutions_folder(run.args, run.args.output_dir)
    if run.args.warm_start != "none" and solutions.exists():
        advice += f", from the teacher's solutions that are kept in {solutions}"
    if run.last_checkpoint is not None:
        advice = (
            f"go on from {run.last_checkpoint} with --resume_from_checkpoint true, or "
            "train(resume_from_checkpoint=True)"
        )
    message = f"Ended by {Signals(signal).name} after {run.state.global_step} updates; {advice}"
    if run.accelerator.is_main_process:
        print(message, file=sys.stderr)
    return message
