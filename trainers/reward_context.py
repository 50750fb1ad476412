"""What rewards are given of a run: its networks, its decoder, and the teacher's images."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from rdm_rl.families import Family
from rdm_rl.networks.roles import Networks
from rdm_rl.records import Rollout
from rdm_rl.rewards.images import ImageDecoder, load_tiny_decoder
from rdm_rl.rewards.protocol import RewardContext
from rdm_rl.rewards.teacher_images import TeacherCache, TeacherImages
from rdm_rl.trainers.evaluation import EVALUATION
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.setup import teacher_fingerprint, teacher_key


def make_reward_context(
    networks: Networks,
    args: RDMConfig,
    teacher_guidance_scale: float,
    *,
    sizes: Sequence[Family],
    device: torch.device,
    global_step: Callable[[], int],
    last_checkpoint: Callable[[], Path | None],
    distribution_matching: Callable[..., Tensor],
    anywhere: Callable[[bool], bool],
) -> RewardContext:
    """The record that a trainer gives to its rewards.

    Args:
        networks: The three roles.
        args: The settings.
        teacher_guidance_scale: Guidance of the teacher.
        sizes: The student's family at each resolution.
        device: Where decoders run.
        global_step: Gives the number of policy updates made so far.
        last_checkpoint: Gives the folder of the last checkpoint, or None.
        distribution_matching: Makes R_dm's direction.
        anywhere: Whether a condition holds on any process, if all must run the teacher together.

    Returns:
        The record.
    """
    family = networks.family
    decode: Callable[[Tensor], Tensor] = family.decode
    decoder_network = family.decoder
    if args.reward_decoder is not None:
        channels, checkpointing = family.latent_shape[0], args.gradient_checkpointing
        decode = tiny = load_tiny_decoder(args.reward_decoder, channels, device, checkpointing=checkpointing)
        decoder_network = tiny.network
    decoder = ImageDecoder(decode, args.decode_batch_size)
    teacher = networks.teacher_family

    @cache
    def fingerprint() -> str:
        return teacher_fingerprint(networks, args, decoder_network)

    def images_at(size: Family, folder: str | Path | None) -> TeacherImages:
        return TeacherImages(
            networks.predictor("teacher", teacher_guidance_scale),
            (teacher if size.resolution is None else teacher.at(size.resolution)).schedule,
            decoder,
            args.teacher_num_inference_steps,
            None
            if folder is None
            else _teacher_cache(fingerprint(), networks, args, teacher_guidance_scale, size, folder),
            anywhere,
        )

    by_size: dict[tuple[int, ...], TeacherImages] = {
        size.latent_shape[1:]: images_at(size, args.teacher_cache_dir) for size in sizes
    }

    @cache
    def of_evaluations() -> TeacherImages:
        """Few, and the same in every evaluation: they are always kept."""
        if args.teacher_cache_dir is not None:
            return by_size[family.latent_shape[1:]]
        return images_at(family, Path(args.output_dir) / "teacher-images")

    def teacher_images(rollout: Rollout) -> Tensor:
        images = of_evaluations() if rollout.batch.stream == EVALUATION else by_size[rollout.states.shape[-2:]]
        return images(rollout)

    return RewardContext(
        networks=networks,
        args=args,
        teacher_guidance_scale=teacher_guidance_scale,
        global_step=global_step,
        decoder=decoder,
        teacher_images=teacher_images,
        last_checkpoint=last_checkpoint,
        distribution_matching=distribution_matching,
    )


def _teacher_cache(
    teacher: str, networks: Networks, args: RDMConfig, teacher_guidance_scale: float, family: Family, folder: str | Path
) -> TeacherCache:
    """Where the teacher's images at a resolution are kept; no other teacher, decoder or setting has the name."""
    key = teacher_key(
        teacher,
        networks,
        family.resolution,
        steps=args.teacher_num_inference_steps,
        guidance=teacher_guidance_scale,
        start=float(family.student_times(args.num_inference_steps, args.sampler)[0]),
    )
    limit = None if args.teacher_cache_gib is None else args.teacher_cache_gib * 2**30
    return TeacherCache(folder, key, limit)
