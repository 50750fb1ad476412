"""What the documentation and ``rdm-rl rewards list`` say of a reward."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RewardInfo:
    """Facts about a reward, for people.

    Args:
        description: What it rewards, in one line.
        paper: Title, authors, year and address; empty if there is none.
        units: Units of the value.
        expected_range: Values that ordinary images get, in words, with the source of the figure.
        license: Licence of the weights and of the code they come from; empty if nothing is downloaded.
        weights: Hub name of the default weights; empty if nothing is downloaded.
        memory: Memory of the weights, and how the figure was obtained.
        columns: Columns of the data set that it reads.

    Example:
        >>> RewardInfo(description="Mean brightness of the image.", units="grey level", expected_range="0 to 1").paper
        ''
    """

    description: str
    paper: str = ""
    units: str = ""
    expected_range: str = ""
    license: str = ""
    weights: str = ""
    memory: str = ""
    columns: tuple[str, ...] = ()
