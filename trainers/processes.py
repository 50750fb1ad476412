"""The processes of a run: whether they are as many as were asked for, how long they wait, and why one has ended."""

import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed
from accelerate.commands.config.config_args import default_config_file, load_config_from_file
from accelerate.commands.launch import launch_command_parser
from torch.distributed import distributed_c10d

_FOREIGN = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "accelerate's FSDP plugin",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


# How long a process that others broke off from waits to hear from the rest, so that it can say who is missing.
SECONDS_TO_SPEAK = 5.0

# What `accelerate launch --mixed_precision` or its configuration asked for. Read once: transformers may change it.
LAUNCHED_PRECISION = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")


def refuse_foreign_sharding() -> None:
    """Refuse what ``accelerate launch`` can wrap around a model, before it tries to.

    Raises:
        ValueError: If the launch asks for DeepSpeed, accelerate's FSDP plugin or Megatron-LM.
    """
    for variable, name in _FOREIGN.items():
        if os.environ.get(variable, "").lower() in ("true", "1", "yes"):
            raise ValueError(
                f"The launch asks for {name} ({variable} is set). It wraps one model with its own forward and backward "
                "pass, but here one frozen base plays three roles, two of which are trained in turn, so it cannot hold "
                "them. Set distributed_type to MULTI_GPU in accelerate's configuration, and shard=True in the settings "
                "if the networks do not fit on one GPU: that is torch's FSDP2, used by this library itself."
            )


def check_processes(count: int) -> None:
    """Compare the number of processes of the run with what was asked for.

    ``accelerate launch`` starts a single process without a word where it finds no several GPUs, whatever
    ``--num_processes`` says: on a CPU with ``--cpu``, for example. The run would then have fewer samples in each update
    than was meant. Nothing in the environment says what was asked, so the command line of the launching process is
    read; where that is not ``accelerate launch``, nothing is compared.

    Args:
        count: The number of processes that train together.

    Raises:
        ValueError: If torchrun started several processes, but each would train alone and write the same files.
    """
    started = int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1
    if started > count:
        raise ValueError(
            f"{started} processes were started, but {count} train together: accelerate found no GPUs, so each would "
            "train alone and overwrite the others' files. Set use_cpu=True to train on CPUs, or start one process."
        )
    asked = processes_asked_for()
    if asked is not None and count < asked:
        warnings.warn(
            f"`accelerate launch` was asked for {asked} processes, but started {count}: it starts several only on "
            f"several GPUs. Each update has {count}/{asked} of the samples that were meant. On CPUs, use "
            f"`torchrun --nproc_per_node {asked} script.py` with use_cpu=True; on GPUs, check that they are visible "
            "and that accelerate's configuration says distributed_type: MULTI_GPU.",
            stacklevel=2,
        )


def join_on_cpu(backend: str | None, seconds: float) -> None:
    """Join the processes of a launch on CPUs, which then wait for each other no longer than so many seconds.

    On GPUs transformers does the same; on CPUs it leaves out the time, and processes would wait half an hour.

    Args:
        backend: The backend; None for gloo.
        seconds: The longest wait.
    """
    launched = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend or "gloo", timeout=timedelta(seconds=seconds))


@contextmanager
def shared_failures(rank: int, count: int) -> Iterator[None]:
    """A context in which a process that others break off from says why they did, where that is known.

    Args:
        rank: This process.
        count: How many there are.

    Raises:
        RuntimeError: If another process ended or hung; its error, where it left one, else its number.
    """
    if count < 2:
        yield
        return
    store = distributed_c10d.PrefixStore("rdm_rl", distributed_c10d._get_default_store())
    try:
        yield
    except BaseException as error:
        # gloo's errors are of no kind of their own.
        if not isinstance(error, torch.distributed.DistError) and "gloo" not in str(error):
            with suppress(RuntimeError):  # The process that kept the store may be gone; this error is raised anyway.
                store.set("failure", f"Process {rank} of {count} failed: {type(error).__name__}: {error}")
            raise
        cause = _failure_in(store, rank, count)
        os.write(2, f"{cause}\n".encode())  # A launcher ends the rest at once, and is quicker than a traceback.
        raise RuntimeError(cause) from error


def _failure_in(store: distributed_c10d.Store, rank: int, count: int) -> str:
    """What the process that failed first has left, or which processes have not even said that they wait."""
    silent = "Another process"
    with suppress(RuntimeError):  # As above.
        store.set(f"waits/{rank}", "")
        until = time.monotonic() + SECONDS_TO_SPEAK
        while not (failed := store.check(["failure"])) and time.monotonic() < until:
            time.sleep(0.1)
        if failed:
            return str(store.get("failure").decode())
        numbers = [str(other) for other in range(count) if not store.check([f"waits/{other}"])]
        silent = f"Process {', '.join(numbers)} of {count}" if numbers else silent
    return (
        f"{silent} ended or hung, and left no word: it was killed (out of memory, say), or did not come within "
        "ddp_timeout. Its own output may say more. Resume from the last checkpoint."
    )


def processes_asked_for() -> int | None:
    """The number of processes that the ``accelerate launch`` above this process was asked for.

    Returns:
        The number; None if this process was started otherwise, or if the number was left to accelerate.
    """
    try:
        parent = psutil.Process().parent()
        words, folder = ([], "") if parent is None else (parent.cmdline(), parent.cwd())
    except psutil.Error:  # It ended, or belongs to somebody else.
        return None
    launch = _launch_words(words)
    if launch is None:
        return None
    args, _ = launch_command_parser().parse_known_args(launch)
    if args.num_processes is not None:
        return int(args.num_processes)
    if args.config_file is None and args.cpu:
        return None  # accelerate does not look at its default configuration then.
    try:
        settings = load_config_from_file(str(Path(folder) / (args.config_file or default_config_file)))
    except (OSError, ValueError):  # There is none, or it was changed since.
        return None
    number = int(getattr(settings, "num_processes", -1))
    return number if number > 0 else None


def _launch_words(words: Sequence[str]) -> list[str] | None:
    """What follows ``accelerate launch`` on a command line, in any of its spellings.

    Example:
        >>> _launch_words(["python", "/bin/accelerate", "launch", "--cpu", "train.py"])
        ['--cpu', 'train.py']
        >>> _launch_words(["python", "-m", "accelerate.commands.launch", "train.py"])
        ['train.py']
        >>> _launch_words(["bash", "-c", "accelerate launch train.py && python evaluate.py"])
    """
    for index, word in enumerate(words):
        name = Path(word).name
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(words[index + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and words[index + 1 : index + 2] == ["launch"]:
            return list(words[index + 2 :])
    return None
