r"""The memory model: how much of a GPU each phase of a run takes. Pure arithmetic, in bytes.

What stays on the GPU is a sum of parts. Networks that n processes share are cut into n; full copies, their optimiser
state and averages are cut too, adapters are not, and what FSDP gathers at once comes on top. A part that is offloaded
counts only in the phases that need it. Where prompts are cached, they are encoded before the first update, when nothing
of what updates make is there yet.

A phase's peak is what stays and its working memory, which is measured on shapes (:mod:`rdm_rl.cli.plan.passes`):
activations and everything in between. An update also has the gradients of what it trains: all of them, from the second
micro-batch on; in the only one, those of a layer come as its activations go, and some never meet. An optimiser's step
has them and, unless it is fused, one more copy of the weights.

A run fits a card if the largest peak, 5 % for the allocator's gaps, and 0.7 GiB for CUDA's own needs fit it. Both
figures are assumptions. Not counted: the text encoders' and the reward models' own activations, kernels' workspaces,
and what loading needs for a moment.
"""

from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
CARDS = (8, 12, 16, 24, 48, 80, 141)
"""Sizes of cards in GB, as they are sold."""

COPIES = {"policy", "fake score", "optimiser state", "averaged policy"}
# The parts that appear in the first update.
NOT_YET = {"optimiser state", "averaged policy", "reward models", "recorded rollouts"}
# What may be offloaded, as the setting and as the part.
OFFLOADED = {"text_encoders": "text encoders", "rewards": "reward models", "teacher": "frozen networks"}
# The phases of a run, and what each of them needs of that.
NEEDS: dict[str, set[str]] = {
    "encode prompts": {"text encoders"},
    "rollout": set(),
    "fake-score update": set(),
    "teacher and fake score": {"frozen networks"},
    "reward images": {"reward models"},
    "reward gradient": {"reward models"},
    "policy update": set(),
    "optimiser step": set(),
    "evaluation": {"frozen networks", "reward models"},
}
TRAINS = {"fake-score update": "fake score", "policy update": "policy"}
DECODES = {"reward images", "reward gradient"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What a user may change about where memory goes.

    Args:
        checkpointing: Activation checkpointing.
        offload: ``text_encoders``, ``rewards``, ``teacher``.
        caches_prompts: Whether all prompts are encoded at the start.
        shards: Processes that share the networks; 1 without sharding.
        full: Whether full copies are trained.
        fused: Whether the optimiser's step needs no copy of the weights.
        accumulates: Whether an update has several micro-batches.
        batch: Share of the measured samples that are in a batch.
        decoded: Share of the measured images that are decoded at once.
    """

    checkpointing: bool = False
    offload: frozenset[str] = frozenset()
    caches_prompts: bool = False
    shards: int = 1
    full: bool = False
    fused: bool = False
    accumulates: bool = True
    batch: float = 1.0
    decoded: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The memory of one phase, in bytes: what is there before and after it, and the most that it takes beside that."""

    stays: int
    working: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.stays + self.working


def kept(parts: Mapping[str, int], setup: Setup) -> dict[str, int]:
    """What stays on one GPU, part by part, as if nothing were offloaded; ``parts`` are bytes before anything is cut.

    Example:
        >>> kept({"frozen networks": 100, "policy": 10, "gathered blocks": 5}, Setup(shards=4))
        {'frozen networks': 25, 'policy': 10, 'gathered blocks': 5}
    """
    cut = {"frozen networks"} | (COPIES if setup.full else set())
    sizes = {name: size // setup.shards if name in cut else size for name, size in parts.items()}
    return sizes if setup.shards > 1 else {**sizes, "gathered blocks": 0}


def phases(
    parts: Mapping[str, int],
    passes: Mapping[str, tuple[int, int]],
    setup: Setup,
    added: Mapping[str, tuple[int, int]] = {},
) -> dict[str, Phase]:
    """The memory of every phase that a run has, in the order of :data:`NEEDS`.

    Args:
        parts: Bytes by part, before anything is cut.
        passes: Working memory by phase without and with checkpointing, gradients apart; a phase that the run has not is
            left out.
        setup: The setup.
        added: What gradients add to that in an only micro-batch, likewise; without it, all of them.

    Example:
        >>> phases({"frozen networks": 100, "policy": 10}, {"policy update": (7, 3)}, Setup())["policy update"]
        Phase(stays=110, working=17)
    """
    sizes = kept(parts, setup)
    gradients = {phase: sizes.get(part, 0) for phase, part in TRAINS.items() if phase in passes}
    working = {"optimiser step": max(gradients.values(), default=0) * (1 if setup.fused else 2)}
    for name, measured in passes.items():
        share = setup.decoded if name in DECODES else 1.0 if name == "evaluation" else setup.batch
        if name in added and not setup.accumulates:
            # Shared out, a bound: the most of gradients and activations together is convex in the gradients' weight.
            gradients[name] = added[name][setup.checkpointing] // (setup.shards if setup.full else 1)
        working[name] = int(measured[setup.checkpointing] * share) + gradients.get(name, 0)
    if "text_encoders" in setup.offload:
        working["encode prompts"] = 0  # What encoders need beside their weights is not counted.

    def stays(name: str) -> int:
        absent = {OFFLOADED[part] for part in setup.offload} - NEEDS[name]
        if name == "encode prompts" and setup.caches_prompts:
            absent |= NOT_YET
        return sum(size for part, size in sizes.items() if part not in absent)

    return {name: Phase(stays=stays(name), working=working[name]) for name in NEEDS if name in working}


def fits(peak: int, card: int) -> bool:
    """Whether a peak in bytes fits a card of a size in GB, gaps and CUDA's own needs included.

    Example:
        >>> fits(22 * GIB, 24), fits(23 * GIB, 24)
        (True, False)
    """
    # 16 to 80 GB cards have about as many GiB; the H200's 141 GB are 139 GiB.
    return peak * 1.05 + 0.7 * GIB <= min(card, 139) * GIB
