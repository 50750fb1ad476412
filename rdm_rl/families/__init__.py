"""Families of diffusers pipelines: one small adapter file each, chosen by the pipeline's class."""

from rdm_rl.families.base import Family
from rdm_rl.families.dit import DiTFamily
from rdm_rl.families.flow import FlowFamily
from rdm_rl.families.flux import FluxFamily
from rdm_rl.families.klein import Flux2KleinFamily
from rdm_rl.families.loading import FAMILIES, check_model_name, load_family, load_policy_init, register_family
from rdm_rl.families.pixart import PixArtFamily
from rdm_rl.families.sana import SanaFamily
from rdm_rl.families.sd import StableDiffusionFamily
from rdm_rl.families.sd3 import StableDiffusion3Family
from rdm_rl.families.sdxl import StableDiffusionXLFamily
from rdm_rl.families.unconditional import UnconditionalFamily
from rdm_rl.families.variance_preserving import VariancePreservingFamily
from rdm_rl.families.zimage import ZImageFamily

__all__ = [
    "FAMILIES",
    "DiTFamily",
    "Family",
    "FlowFamily",
    "Flux2KleinFamily",
    "FluxFamily",
    "PixArtFamily",
    "SanaFamily",
    "StableDiffusion3Family",
    "StableDiffusionFamily",
    "StableDiffusionXLFamily",
    "UnconditionalFamily",
    "VariancePreservingFamily",
    "ZImageFamily",
    "check_model_name",
    "load_family",
    "load_policy_init",
    "register_family",
]
