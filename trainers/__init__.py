"""What a training script uses: the configuration and the trainer. Imported as ``rdm_rl.trainers``."""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__all__ = ["RDMConfig", "RDMTrainer", "ReDiFConfig", "ReDiFTrainer"]

if TYPE_CHECKING:
    from rdm_rl.trainers.rdm_config import RDMConfig
    from rdm_rl.trainers.rdm_trainer import RDMTrainer
    from rdm_rl.trainers.redif_trainer import ReDiFConfig, ReDiFTrainer
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "RDMConfig": "rdm_rl.trainers.rdm_config",
            "RDMTrainer": "rdm_rl.trainers.rdm_trainer",
            "ReDiFConfig": "rdm_rl.trainers.redif_trainer",
            "ReDiFTrainer": "rdm_rl.trainers.redif_trainer",
        },
    )

# A second import under the folder's own name would load every module, and its state, twice.
if __name__ != "rdm_rl.trainers":
    raise ImportError("Import `rdm_rl.trainers`, not `trainers`: the folder is mapped into the package.")
