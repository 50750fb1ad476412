"""What the laboratory compares: ways to estimate distribution matching's direction, each a row of settings."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rdm_rl.noise_schedule import append_dims
from rdm_rl.rdm import Normalization, group_mean


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to make an update; the defaults are DMD with one update of the fake score for each of the policy.

    Args:
        scale: ``dm_normalization``.
        times: One time for each prompt: drawn ``alone``, or ``stratified`` over the prompts of a batch.
        correction: What is done to the fake score's prediction (``residual``) or to the direction (``projection``).
        sgmd: Weight of the pull towards the fake score in SGMD's direction; 0 for another direction.
        anchor: Weight of DP-DMD's first step; 0 for distribution matching there too.
        fake_updates: Updates of the fake score for each of the policy.
        fake_rate: Its learning rate.
        sync_to_policy: Share of the way that the fake score's weights go to the policy's after each update of it.
        deterministic: The student's steps keep their noise, in training and in use, instead of drawing it anew.
        levels: Up to how many random times the student walks in training, as in CDM; 0 for its own K.
        off_path: CDM's second term, at a state that the student's velocity leads to.
    """

    scale: Normalization = "sample"
    times: Literal["alone", "stratified"] = "alone"
    correction: Literal["none", "residual", "projection"] = "none"
    sgmd: float = 0.0
    anchor: float = 0.0
    fake_updates: int = 1
    fake_rate: float = 1e-3
    sync_to_policy: float = 0.0
    deterministic: bool = False
    levels: int = 0
    off_path: bool = False

    def evaluations(self, steps: int) -> float:
        """Forward passes of a network for each sample and update; a backward pass counts as two.

        Args:
            steps: Steps K of the student.
        """
        walked = (self.levels + 3) / 4 if self.levels else steps  # On average.
        return walked + 3 * self.fake_updates + (5 + 2 * bool(self.sgmd)) * (1 + self.off_path)


LAGGING = {"fake_rate": 1e-4}
ARMS = {
    "dmd": Arm(),
    "dmd, 2 fake updates": Arm(fake_updates=2),
    "dmd, 5 fake updates": Arm(fake_updates=5),
    "group": Arm(scale="group"),
    "group_rms": Arm(scale="group_rms"),
    "none": Arm(scale="none"),
    "dmd, stratified": Arm(times="stratified"),
    "group_rms, stratified": Arm(scale="group_rms", times="stratified"),
    "none, stratified": Arm(scale="none", times="stratified"),
    "dmd, residual": Arm(correction="residual"),
    "none, residual": Arm(scale="none", correction="residual"),
    "dmd, projection": Arm(correction="projection"),
    "dmd, synchronised": Arm(sync_to_policy=0.03),
    "sgmd": Arm(sgmd=0.1),
    "dmd, lagging": Arm(**LAGGING),
    "group_rms, lagging": Arm(scale="group_rms", **LAGGING),
    "none, lagging": Arm(scale="none", **LAGGING),
    "dmd, residual, lagging": Arm(correction="residual", **LAGGING),
    "dmd, projection, lagging": Arm(correction="projection", **LAGGING),
}
DETERMINISTIC = {"deterministic": True}
CONTINUOUS = {**DETERMINISTIC, "levels": 28}
SEVERAL_STEPS = {
    "dmd, anchor": Arm(anchor=0.05),
    "none, anchor": Arm(scale="none", anchor=0.05),
    "dmd, deterministic": Arm(**DETERMINISTIC),
    "group_rms, deterministic": Arm(scale="group_rms", **DETERMINISTIC),
    "none, deterministic": Arm(scale="none", **DETERMINISTIC),
    "dmd, continuous": Arm(**CONTINUOUS),
    "group_rms, continuous": Arm(scale="group_rms", **CONTINUOUS),
    "none, continuous": Arm(scale="none", **CONTINUOUS),
    "dmd, continuous, off path": Arm(**CONTINUOUS, off_path=True),
    "none, continuous, off path": Arm(scale="none", **CONTINUOUS, off_path=True),
}
CORE = ("dmd", "dmd, 5 fake updates", "group", "group_rms", "none", "none, stratified")


# ----- the arms' mathematics -----


def without_group_residual(x_0: Tensor, fake_x_0: Tensor, group_ids: Tensor) -> Tensor:
    r"""The fake score's predictions without their mean error over the group, as far as it is no accident.

    With the exact fake score :math:`E[\mu_{fake}(x_t)] = E[\hat x_0]` for each prompt and time. So the group's mean
    :math:`\bar r` of :math:`r_i = \mu_{fake}(x_{t,i}) - \hat x_{0,i}` estimates its mean error, with a noise of
    :math:`q = \sum_i |r_i - \bar r|^2 / (G (G - 1))`; the part :math:`\max(0, 1 - q / |\bar r|^2)` of it is taken off.

    Args:
        x_0: The policy's predictions, shape (N, C, H, W).
        fake_x_0: The fake score's at a re-noising of them.
        group_ids: Prompt of each sample, shape (N,), int64 from 0; at least two samples each.
    """
    residual = fake_x_0 - x_0
    mean = group_mean(residual.movedim(0, -1), group_ids).movedim(-1, 0)
    sizes = torch.bincount(group_ids)[group_ids]
    noise = group_mean((residual - mean).flatten(1).square().sum(1), group_ids) / (sizes - 1)
    share = 1 - noise / mean.flatten(1).square().sum(1).clamp_min(1e-30)
    return fake_x_0 - append_dims(share.clamp_min(0), mean) * mean


def projected(direction: Tensor, x_0: Tensor, fake_x_0: Tensor) -> Tensor:
    r"""A direction without its part along the fake score's residual: :math:`A - \frac{<A, r>}{<r, r>} r`.

    References:
        | PDMD (arXiv 2609.35768), as it is known to us from notes on the paper

    Args:
        direction: A, shape (N, C, H, W).
        x_0: The policy's predictions, the same shape.
        fake_x_0: The fake score's.
    """
    residual = fake_x_0 - x_0
    along, square = ((each * residual).flatten(1).sum(1) for each in (direction, residual))
    return direction - append_dims(along / square.clamp_min(1e-30), residual) * residual


def sgmd_push(x_0: Tensor, teacher_x_0: Tensor, fake_x_0: Tensor, sigma_t: Tensor, weight: float) -> Tensor:
    r"""What SGMD sends back through the fake score.

    It is :math:`(\mu_{real} - \mu_{fake})/n + \lambda (\mu_{fake} - \hat x_0)/\sigma_t`, where n is the mean of
    :math:`|\hat x_0 - \mu_{real}|` over the sample. The direction is :math:`\alpha_t J^T` times this, with J the
    derivative of :math:`\mu_{fake}` by :math:`x_t`.

    References:
        | SGMD (ICML 2026), as it is in LightX2V's code

    Args:
        x_0: The policy's predictions, shape (N, C, H, W).
        teacher_x_0: The teacher's, the same shape.
        fake_x_0: The fake score's, the same shape.
        sigma_t: The noise of each, shape (N,).
        weight: :math:`\lambda`.
    """
    scale = (x_0 - teacher_x_0).abs().flatten(1).mean(1)
    gap = (teacher_x_0 - fake_x_0) / append_dims(scale, x_0)
    return gap + weight * (fake_x_0 - x_0) / append_dims(sigma_t, x_0)
