"""The fields of transformers' ``TrainingArguments`` that a run acts on, in this library's terms."""

UNUSED = "Without effect"
"""Title of the group of fields that launchers and old scripts give, and with which a run does nothing."""

# By the title of the group that explains them. Some exist only in older or in newer versions of transformers.
INHERITED: dict[str, dict[str, str]] = {
    "Optimisation": {
        "max_steps": "Policy updates; -1 counts `num_train_epochs` instead.",
        "num_train_epochs": "Times that the prompts are gone through, if `max_steps` is -1.",
        "per_device_train_batch_size": "Samples (not prompts) at once on a device: a multiple of `num_generations`.",
        "gradient_accumulation_steps": "Batches for each update, which sees batch size x this x processes samples.",
        "learning_rate": "Learning rate of the policy. The fake score has its own.",
        "lr_scheduler_type": (
            "Schedule of both learning rates, of each over its own updates: `constant`, `constant_with_warmup`, "
            "`linear`, `cosine`, ..."
        ),
        "lr_scheduler_kwargs": "Further arguments of the schedule: a mapping, or JSON as a flag.",
        "warmup_steps": "Updates over which the learning rate rises from 0; below 1, a share of all.",
        "warmup_ratio": "The same as a share of all updates, in older versions of transformers.",
        "optim": "Both optimisers: `adamw_torch`, `adamw_torch_fused`, `adamw_bnb_8bit`, `adafactor`, `sgd`, ...",
        "optim_args": "Further arguments of the optimiser: `name=value,name=value`.",
        "weight_decay": "Weight decay, of policy and fake score.",
        "adam_beta1": "Adam's decay of the first moment.",
        "adam_beta2": "Adam's decay of the second moment.",
        "adam_epsilon": "Adam's epsilon.",
        "max_grad_norm": "Gradient norm the policy is clipped to; 0 does not clip.",
        "seed": "Seed of everything that is drawn.",
        "data_seed": "Seed of the order of the prompts. Default: `seed`.",
    },
    "Memory and processes": {
        "bf16": "Networks in bfloat16; what is trained stays in float32.",
        "fp16": "Networks in float16, with loss scaling; what is trained stays in float32.",
        "tf32": "TF32 for what is left in float32, on Ampere GPUs and newer.",
        "activation_checkpointing": "Recompute activations in the backward pass: less memory, more time.",
        "gradient_checkpointing": "The same under its older name.",
        "use_cpu": "Stay on the CPU even if there is a GPU.",
        "ddp_backend": "Backend between processes: `nccl` or `gloo`. Default: by device.",
        "ddp_timeout": "Seconds that processes wait for each other.",
    },
    "Output, checkpoints and evaluation": {
        "output_dir": "Where the student, checkpoints, sample grids, kept images and solutions of the warm start go.",
        "resume_from_checkpoint": "Folder of a checkpoint, or `true` for the newest complete one in `output_dir`.",
        "save_strategy": "Write checkpoints: `steps` or `no`.",
        "save_steps": "Policy updates between checkpoints.",
        "save_total_limit": "Checkpoints that are kept. Default: all.",
        "eval_strategy": "Evaluate, with a sample grid: `steps` or `no`.",
        "eval_steps": "Policy updates between evaluations. Default: `logging_steps`.",
        "eval_delay": "Updates before the first evaluation.",
        "eval_on_start": "Evaluate before the first update, too.",
        "per_device_eval_batch_size": "Evaluation prompts at once on a device, and in a sample grid.",
    },
    "Logging": {
        "logging_strategy": "Log numbers: `steps` or `no`.",
        "logging_steps": "Policy updates between lines of the log; the last update is logged, too.",
        "logging_first_step": "Log the first update, too.",
        "logging_dir": "Folder for TensorBoard, in older versions of transformers.",
        "disable_tqdm": "No progress bar.",
        "report_to": "Trackers: `tensorboard`, `wandb`, `trackio`, `none`, or another that transformers knows.",
        "run_name": "Name of the run for trackers.",
        "project": "Project of the run, for Trackio.",
        "trackio_space_id": "Hub space for Trackio.",
        "trackio_bucket_id": "Hub bucket for Trackio.",
        "trackio_static_space_id": "Read-only hub space for Trackio.",
    },
    "Hub": {
        "push_to_hub": "Upload the student at the end.",
        "hub_model_id": "Name to upload to: `owner/name`.",
        "hub_private_repo": "Make it a private repository.",
        "hub_revision": "Branch to upload to.",
        "hub_token": "Token to upload with. Default: the one you are logged in with.",
    },
    UNUSED: {
        "do_train": "Accepted from scripts that set it.",
        "do_eval": "Accepted from scripts that set it.",
        "local_rank": "Accepted from older launchers.",
        "remove_unused_columns": "Columns beside the prompt always stay: rewards may need them.",
    },
}

_SHARD = "Networks that many GPUs share: shard=True."
_EVALUATE = "Checkpoints that save_steps keeps are compared by `rdm-rl evaluate`."
_COMPILE = "Compile the pipeline's repeated blocks yourself, where that pays: docs/making_it_fast.md says how."
INSTEAD = {
    "torch_compile": _COMPILE,
    "torch_compile_backend": _COMPILE,
    "torch_compile_mode": _COMPILE,
    "fsdp": _SHARD,
    "deepspeed": _SHARD,
    "auto_find_batch_size": "What fits, says `rdm-rl plan`.",
    "load_best_model_at_end": _EVALUATE,
    "metric_for_best_model": _EVALUATE,
}
"""What to set in place of a field that is refused."""

HONOURED = frozenset(name for group in INHERITED.values() for name in group)
"""Any other field of ``TrainingArguments`` is refused when it is set, never ignored."""
