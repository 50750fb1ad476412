r"""The memory model: how much of a GPU each phase of a run takes. Pure arithmetic, in bytes.

With n processes that share sharded networks, :math:`1_{full}` for full copies (adapters are not cut), and

======================  ======================================================================================
:math:`F`               frozen denoising networks: the base, and a separate teacher
:math:`W_p, W_f`        trained weights of the policy and the fake score, in float32
:math:`s`               optimiser state for each byte of trained weights: 2 for Adam, 0 for SGD
:math:`e`               copies of the policy: 1 for the EMA, 1 for the policy that ``beta`` compares with
:math:`D, T, R`         decoder, text encoders, reward models
:math:`X`               recorded rollouts and the rewards' directions
======================  ======================================================================================

what stays on the GPU in every phase is

.. math:: S = \frac{F}{n} + \frac{(1 + s + e) W_p + (1 + s) W_f}{n^{1_{full}}} + G + D + T + R + X

where :math:`G` is what FSDP gathers at once (0 for n = 1): the outermost weights, the largest block and the next one.
What is offloaded counts only in the phases that use it: T when prompts are encoded, R when rewards are asked, F (full
copies alone) when the teacher is. Where prompts are cached, they are encoded before the first update, without optimiser
state, averages, R and X. A phase's peak is S plus its working memory, which is measured on shapes
(:mod:`rdm_rl.cli.plan.activations`): activations, gradients and everything in between. An optimiser's step, when the
activations are gone, has the gradients and one more copy of the weights as working memory, unless it is fused.

A run fits a card if the largest peak, 5 % for the allocator's gaps, and 0.7 GiB for CUDA's own needs fit it. Both
figures are assumptions. Not counted: the text encoders' and the reward models' own activations, kernels' workspaces,
and what loading needs for a moment.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

GIB = 2**30
CARDS = (16, 24, 48, 80, 141)
"""Sizes of cards in GB, as they are sold."""

_GAPS = 1.05
_CONTEXT = 0.7 * GIB
# 16 to 80 GB cards have about as many GiB; the H200's 141 GB are 139 GiB.
_USABLE = {141: 139.0}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a run keeps, in bytes, before anything is sharded or offloaded.

    Args:
        frozen: The frozen denoising networks.
        policy: The policy's trained weights.
        fake_score: The fake score's trained weights.
        gathered: What FSDP gathers at once.
        decoder: The decoder of latents.
        text_encoders: The text encoders.
        rewards: The reward models.
        records: Recorded rollouts and directions.
    """

    frozen: int
    policy: int
    fake_score: int
    gathered: int = 0
    decoder: int = 0
    text_encoders: int = 0
    rewards: int = 0
    records: int = 0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What changes where things are.

    Args:
        full: Whether full copies are trained.
        shards: Processes that share the networks; 1 without sharding.
        offload: ``text_encoders``, ``rewards``, ``teacher``.
        state: Bytes of optimiser state for each byte of trained weights.
        fused: Whether the optimiser's step needs no copy of the weights.
        averages: Further copies of the policy.
        trains_fake_score: Whether the fake score is ever updated.
        caches_prompts: Whether all prompts are encoded at the start, when there is no optimiser state yet.
    """

    full: bool = False
    shards: int = 1
    offload: frozenset[str] = field(default_factory=frozenset)
    state: float = 2.0
    fused: bool = False
    averages: int = 1
    trains_fake_score: bool = True
    caches_prompts: bool = False


@dataclass(frozen=True, kw_only=True)
class Phase:
    """The memory of one phase, in bytes.

    Args:
        stays: What is there before and after it.
        working: The most that it takes beside that.
    """

    stays: int
    working: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.stays + self.working


# What may be offloaded, as the setting and as the part of :func:`kept`.
OFFLOADED = {"text_encoders": "text encoders", "rewards": "reward models", "teacher": "frozen networks"}
# The parts of :func:`kept` that appear in the first update.
NOT_YET = {"optimiser state", "averaged policy", "reward models", "recorded rollouts"}
# The phases of a run, and what each of them needs of what may be offloaded.
NEEDS: dict[str, frozenset[str]] = {
    "encode prompts": frozenset({"text_encoders"}),
    "rollout": frozenset(),
    "fake-score update": frozenset(),
    "teacher and fake score": frozenset({"teacher"}),
    "reward images": frozenset({"rewards"}),
    "reward gradient": frozenset({"rewards"}),
    "policy update": frozenset(),
    "optimiser step": frozenset(),
    "sample grid": frozenset(),
}


def kept(sizes: Sizes, settings: Settings) -> dict[str, int]:
    """What stays on the GPU, part by part, as if nothing were offloaded.

    Args:
        sizes: The sizes.
        settings: The settings.

    Returns:
        Bytes by part.

    Example:
        >>> parts = kept(Sizes(frozen=100, policy=10, fake_score=10), Settings(shards=4))
        >>> parts["frozen networks"], parts["optimiser state"]
        (25, 40)
    """
    cut = settings.shards if settings.full else 1
    fake_state = settings.state if settings.trains_fake_score else 0.0
    return {
        "frozen networks": sizes.frozen // settings.shards,
        "policy": sizes.policy // cut,
        "fake score": sizes.fake_score // cut,
        "optimiser state": int(settings.state * sizes.policy + fake_state * sizes.fake_score) // cut,
        "averaged policy": settings.averages * sizes.policy // cut,
        "gathered blocks": sizes.gathered if settings.shards > 1 else 0,
        "decoder": sizes.decoder,
        "text encoders": sizes.text_encoders,
        "reward models": sizes.rewards,
        "recorded rollouts": sizes.records,
    }


def phases(sizes: Sizes, settings: Settings, working: Mapping[str, int]) -> dict[str, Phase]:
    """The memory of every phase that a run has.

    Args:
        sizes: The sizes.
        settings: The settings.
        working: Working memory by phase; a phase that the run has not is left out. That of the optimiser's step is
            added here.

    Returns:
        The phases by name, in the order of :data:`NEEDS`.

    Example:
        >>> found = phases(Sizes(frozen=100, policy=10, fake_score=10), Settings(averages=0), {"rollout": 7})
        >>> found["rollout"]
        Phase(stays=160, working=7)
    """
    parts = kept(sizes, settings)
    cut = settings.shards if settings.full else 1
    trained = max(sizes.policy, sizes.fake_score if settings.trains_fake_score else 0) // cut
    known = {**working, "optimiser step": trained * (1 if settings.fused else 2)}

    def stays(name: str) -> int:
        absent = {OFFLOADED[part] for part in settings.offload - NEEDS[name]}
        if name == "encode prompts" and settings.caches_prompts:
            absent |= NOT_YET
        return sum(size for part, size in parts.items() if part not in absent)

    return {name: Phase(stays=stays(name), working=known[name]) for name in NEEDS if name in known}


def fits(peak: int, card: int) -> bool:
    """Whether a peak fits a card, gaps and CUDA's own needs included.

    Args:
        peak: Bytes.
        card: The card's size in GB.

    Example:
        >>> fits(22 * GIB, 24), fits(23 * GIB, 24)
        (True, False)
    """
    return peak * _GAPS + _CONTEXT <= _USABLE.get(card, card) * GIB
