"""The error of a reward that fails."""


class RewardError(RuntimeError):
    """A reward raised, hung, or gave an answer that is none."""
