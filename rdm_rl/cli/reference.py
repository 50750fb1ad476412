"""The tables of settings on the reference page, from their declarations.

``python -m rdm_rl.cli.reference docs/reference.md`` writes them anew between the page's markers.
"""

import re
import sys
from collections.abc import Mapping
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any

from rdm_rl.cli.train import TrainArguments
from rdm_rl.settings import groups, help_of
from rdm_rl.trainers.inherited import INHERITED
from rdm_rl.trainers.rdm_config import RDMConfig
from rdm_rl.trainers.resuming import KINDS, RULES

# An inherited field shows a default where it is this library's own: transformers' differ from version to version.
_OURS = {name: RDMConfig.__dataclass_fields__[name] for name in RDMConfig.__annotations__}


def settings_tables() -> dict[str, str]:
    """The tables of the reference page, in Markdown, by their marker.

    ``arguments`` are the flags of ``rdm-rl train`` alone, ``settings`` those of the method, ``inherited`` those of
    transformers, and ``changes`` says which of them a resumed run may change.
    """
    inherited = {
        title: {name: (_default(_OURS[name]) if name in _OURS else "", text) for name, text in members.items()}
        for title, members in INHERITED.items()
    }
    return {
        "arguments": _tables(_declared(TrainArguments)),
        "settings": _tables(_declared(RDMConfig)),
        "inherited": _tables(inherited),
        "changes": _changes_table(),
    }


def with_tables(page: str) -> str:
    """A page with its tables, between ``<!-- table: settings -->`` and ``<!-- end of table -->``, up to date.

    Example:
        >>> "| `lora_r` | `64` |" in with_tables("<!-- table: arguments --><!-- end of table -->")
        True
    """
    tables = settings_tables()
    return re.sub(
        r"<!-- table: (\w+) -->.*?<!-- end of table -->",
        lambda match: f"<!-- table: {match[1]} -->\n\n{tables[match[1]]}\n<!-- end of table -->",
        page,
        flags=re.DOTALL,
    )


def _declared(kind: type) -> dict[str, dict[str, tuple[str, str]]]:
    return {
        title: {name: (_default(each), help_of(kind, name)) for name, each in members.items()}
        for title, members in groups(kind).items()
    }


def _tables(rows: Mapping[str, Mapping[str, tuple[str, str]]]) -> str:
    return "\n".join(
        f"**{title}**\n\n| setting | default | meaning |\n|---|---|---|\n"
        + "".join(f"| `{name}` | {default} | {text} |\n" for name, (default, text) in members.items())
        for title, members in rows.items()
    )


def _changes_table() -> str:
    rows = {kind: ", ".join(f"`{name}`" for name in sorted(names)) for kind, names in KINDS.items()}
    lines = [f"| `{kind}` | {RULES[kind]} | {names} |\n" for kind, names in rows.items()]
    return "| kind | rule | settings |\n|---|---|---|\n" + "".join(lines)


def _default(each: Field[Any]) -> str:
    if each.default is each.default_factory is MISSING:
        return "needed"
    return f"`{each.default_factory() if each.default_factory is not MISSING else each.default}`"


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(with_tables(file.read_text(encoding="utf-8")), encoding="utf-8")
