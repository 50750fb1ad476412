"""The teacher of the scenes, and the guidance scale that it is used with."""

from diffusers import StableDiffusionPipeline

from rdm_rl.scenes.data import TEACHER_FOLDER

GUIDANCE_SCALE = 3.0


def load_teacher() -> StableDiffusionPipeline:
    """The teacher as the plain pipeline it is, without progress bars."""
    pipeline: StableDiffusionPipeline = StableDiffusionPipeline.from_pretrained(TEACHER_FOLDER)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
