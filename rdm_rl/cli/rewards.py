"""``rdm-rl rewards``: what rewards there are, and what one of them says of some images."""

import inspect
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rdm_rl.pixels import read_image
from rdm_rl.records import Conditioning, PromptBatch
from rdm_rl.rewards.calling import EXTRAS, PlainReward
from rdm_rl.rewards.protocol import DirectionReward, RewardInfo
from rdm_rl.rewards.registry import find_reward, get_reward, list_rewards


def reward_info(name: str) -> tuple[RewardInfo, str]:
    """What a registered reward says of itself, and how it acts.

    It acts by ``direction`` (it gives one), ``gradient`` (it is differentiable) or as ``black box``. A reward without
    facts is described by the first line of its docstring.

    Example:
        >>> reward_info("rdm")[1]
        'direction'
    """
    reward = find_reward(name)
    documented = (inspect.getdoc(reward) or "").split("\n")[0]
    info = getattr(reward, "info", None) or RewardInfo(description=documented)
    if hasattr(reward, "direction"):
        return info, "direction"
    return info, "gradient" if getattr(reward, "differentiable", False) else "black box"


def rewards_as_markdown() -> str:
    """All registered rewards as a table and a list of facts, for ``docs/rewards.md``."""
    rows = ["| name | rewards | acts by | units | ordinary values |", "|---|---|---|---|---|"]
    facts = []
    for name in list_rewards():
        info, kind = reward_info(name)
        cells = [f"`{name}`", info.description, kind, info.units, info.expected_range]
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        entries = {
            "paper": info.paper,
            "weights": info.weights,
            "licence": info.license,
            "memory": info.memory,
            "columns": ", ".join(f"`{column}`" for column in info.columns),
        }
        known = [f"- {key}: {value}" for key, value in entries.items() if value]
        if known:
            facts.append("\n".join([f"### `{name}`", "", *known]))
    return "\n".join(rows) + "\n\n" + "\n\n".join(facts) + "\n"


def print_rewards() -> None:
    """A line for each registered reward."""
    names = list_rewards()
    width = max(map(len, names))
    for name in names:
        try:
            info, kind = reward_info(name)
            print(f"{name:{width}}  {kind:9}  {info.description}")
        except ModuleNotFoundError as error:  # Of another package's reward; the others are still worth showing.
            print(f"{name:{width}}  {'?':9}  {error}")


def try_reward(
    name: str,
    files: Sequence[Path],
    prompts: Sequence[str],
    *,
    options: Mapping[str, Any],
    columns: Mapping[str, Any],
    device: str = "cpu",
) -> None:
    """Print what a reward says of some images, and for a differentiable one the size of its gradient there.

    Args:
        name: The reward's name, ``module:attribute`` or ``path.py:attribute``.
        files: The images.
        prompts: A prompt for each, or one for all.
        options: What the reward's class takes.
        columns: Further columns, the same value for all images.
        device: Where the images are.

    Raises:
        FileNotFoundError: If an image does not exist.
        ValueError: If the numbers of images and prompts do not fit, or the reward needs a run.
        RewardError: If the reward fails.
    """
    if len(prompts) not in (1, len(files)):
        raise ValueError(f"{len(files)} images but {len(prompts)} prompts: give one --prompt for all, or one for each.")
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"--image {str(absent[0])!r} does not exist, or is no file.")
    reward = get_reward(name, **options)
    if isinstance(reward, DirectionReward):
        raise ValueError(f"The reward {name!r} compares networks of a run; it cannot judge an image alone.")
    plain = PlainReward(name, reward)
    if plain.inputs == "latents" or plain.wants_teacher_images:
        raise ValueError(
            f"The reward {name!r} looks at latents or at the teacher's images, which an image file has not."
        )
    missing = sorted(plain.needs.required - {*columns, *EXTRAS})
    if missing:
        raise ValueError(f"The reward {name!r} reads {', '.join(missing)}: give it as --column '{missing[0]}=VALUE'.")
    texts = list(prompts) if len(prompts) == len(files) else list(prompts) * len(files)
    for file, text in zip(files, texts, strict=True):  # One by one: image files differ in size.
        image = read_image(file)[None].to(device)
        batch = PromptBatch(
            prompts=[text],
            conditioning=Conditioning(),
            group_ids=torch.zeros(1, dtype=torch.int64),
            sample_ids=range(1),
            columns={key: [value] for key, value in columns.items()},
        )
        start = time.perf_counter()
        output = plain.start(image, batch, gradient=plain.differentiable)()
        seconds = time.perf_counter() - start
        shown = f"{output.values.item():.6g}" if output.applicable.item() else "not applicable"
        if output.gradient is not None and output.applicable.item():
            shown += f"   gradient rms {output.gradient.square().mean().sqrt().item():.3g} per pixel value"
        print(f"{file}  {text!r}: {shown}   ({seconds:.2f} s)")


def parse_pairs(pairs: Sequence[str], flag: str) -> dict[str, Any]:
    """The values of a flag that is repeated as ``key=value``; a value is JSON, or else text.

    Raises:
        ValueError: If an entry has no equals sign.

    Example:
        >>> parse_pairs(["device=cpu", "batch_size=4"], "--option")
        {'device': 'cpu', 'batch_size': 4}
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ValueError(f"{flag} {pair!r} is not of the form key=value.")
        try:
            values[key] = json.loads(text)
        except json.JSONDecodeError:
            values[key] = text
    return values
