"""The rewards and their registry. Imported as ``rdm_rl.rewards``."""

from typing import TYPE_CHECKING

from rdm_rl._lazy import lazy_names

__all__ = [
    "RewardError",
    "RewardInfo",
    "RewardModel",
    "get_reward",
    "list_rewards",
    "register_reward",
    "unregister_reward",
]

if TYPE_CHECKING:
    from rdm_rl.rewards.model import RewardModel
    from rdm_rl.rewards.protocol import RewardError, RewardInfo
    from rdm_rl.rewards.registry import get_reward, list_rewards, register_reward, unregister_reward
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "RewardError": "rdm_rl.rewards.protocol",
            "RewardInfo": "rdm_rl.rewards.protocol",
            "RewardModel": "rdm_rl.rewards.model",
            "get_reward": "rdm_rl.rewards.registry",
            "list_rewards": "rdm_rl.rewards.registry",
            "register_reward": "rdm_rl.rewards.registry",
            "unregister_reward": "rdm_rl.rewards.registry",
        },
    )

# A second import under the folder's own name would make a second registry, whose rewards nobody finds.
if __name__ != "rdm_rl.rewards":
    raise ImportError("Import `rdm_rl.rewards`, not `rewards`: the folder is mapped into the package.")
