r"""The few-step student as a Gaussian policy.

Step k takes the state :math:`x_k` at time :math:`t_k` to

.. math::
    \hat x_0 = G_\theta(x_k, t_k, c), \qquad
    x_{k+1} = \alpha_{k+1} \hat x_0 + \sigma_{k+1} \epsilon
    \;\;\Rightarrow\;\; \pi_\theta(x_{k+1} \mid x_k) = N(\alpha_{k+1} \hat x_0,\ \sigma_{k+1}^2 I),

the re-noising sampler of consistency models. The last step has no noise: its prediction is the sample. Stock
``LCMScheduler`` walks the same chain (see ``rdm_rl.families``), bit for bit on the CPU.

References:
    | Consistency Models (Song et al., 2023), algorithm 1
    | https://arxiv.org/abs/2303.01469
    | Improved Distribution Matching Distillation for Fast Image Synthesis (Yin et al., 2024), section 4.4
    | https://arxiv.org/abs/2405.14867
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rdm_rl.data_types import Conditioning, PromptBatch, Rollout
from rdm_rl.noise_schedule import NoiseSchedule
from rdm_rl.randomness import Generators, normal

# A network wrapped to predict x_0: (x_t of shape (N, C, H, W), t of shape (N,), conditioning) -> shape (N, C, H, W).
X0Predictor = Callable[[Tensor, Tensor, Conditioning], Tensor]


def student_times(num_inference_steps: int) -> Tensor:
    """The times that a K-step student visits: 1, (K-1)/K, ..., 1/K.

    Args:
        num_inference_steps: K, at least 1.

    Returns:
        The times, shape (K,), float32.

    Raises:
        ValueError: If K < 1.

    Example:
        >>> student_times(4)
        tensor([1.0000, 0.7500, 0.5000, 0.2500])
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}, but a student needs at least one step.")
    return torch.arange(num_inference_steps, 0, -1, dtype=torch.float32) / num_inference_steps


@torch.no_grad()
def rollout(
    policy: X0Predictor,
    batch: PromptBatch,
    schedule: NoiseSchedule,
    times: Tensor,
    *,
    shape: Sequence[int],
    generator: Generators,
) -> Rollout:
    """Walk the policy from noise to samples and record every state and prediction, without a graph.

    Noise is drawn in the order of a diffusers pipeline: the initial state, then one draw for each step but the last.

    Args:
        policy: The student.
        batch: The prompts, N rows.
        schedule: The noise schedule.
        times: Time of each step, shape (K,), falling from 1.
        shape: The latent shape (C, H, W).
        generator: One generator, or one for each sample.

    Returns:
        The recorded chains.
    """
    count, device = len(batch.prompts), times.device
    states, predictions = [normal((count, *shape), generator, device)], []
    for step, t in enumerate(times):
        predictions.append(policy(states[-1], t.expand(count), batch.conditioning))
        if step + 1 < len(times):
            noise = normal((count, *shape), generator, device)
            states.append(schedule.perturb(predictions[-1], noise, times[step + 1]))
    return Rollout(batch=batch, times=times, states=torch.stack(states), x_0=torch.stack(predictions))
