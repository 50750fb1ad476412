"""Prompts by the name of their source: one local file, read as a person reads it, or a data set of ``datasets``."""

import codecs
import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from io import StringIO
from os.path import expanduser
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow
from pyarrow import parquet

KINDS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".ndjson", ".parquet")
"""Kinds of files with prompts; each may be gzipped."""

# Byte order marks, the longer one first: that of UTF-32 begins like that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
    (codecs.BOM_UTF8, "utf-8"),
)
_SEPARATORS = {",": "comma", ";": "semicolon", "\t": "tab"}
_WHOLE_NUMBER = re.compile(r"[-+]?(0|[1-9]\d*)", re.ASCII)  # 007 is a name.
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)
_TRUTHS = {"true": True, "false": False}

Row: TypeAlias = tuple[str, dict[str, Any]]  # Where it stands in the file, and its values by column.


class PromptRows(list[dict[str, Any]]):
    """Rows of a file, each with a ``prompt``; slices are such rows, too.

    Args:
        rows: The rows.
        blank: So many rows without a prompt were left out.

    Example:
        >>> PromptRows([{"prompt": "a"}, {"prompt": "b"}], blank=3)[1:].blank
        3
    """

    def __init__(self, rows: Iterable[dict[str, Any]] = (), blank: int = 0) -> None:
        """Keep the rows."""
        super().__init__(rows)
        self.blank = blank

    def __getitem__(self, index: Any) -> Any:
        """A row, or the rows of a slice."""
        part = super().__getitem__(index)
        return PromptRows(part, self.blank) if isinstance(index, slice) else part


class _UnreadableError(Exception):
    """Where in a file something is wrong, what, and what to do."""


def read_prompts(
    source: str | Path,
    *,
    prompt_column: str = "prompt",
    dataset_split: str = "train",
    dataset_encoding: str | None = None,
) -> Any:
    """The rows that a file, a folder or a hub name leads to, with their text in ``prompt``.

    Args:
        source: One file, as :func:`read_prompt_file` reads it; a folder that ``save_to_disk`` wrote; or what
            ``datasets.load_dataset`` takes: a folder of data files or a hub name.
        prompt_column: Name of the text column. A column ``prompt`` beside it is left out.
        dataset_split: Split of a data set that has several.
        dataset_encoding: Encoding of a file, as in :func:`read_prompt_file`.

    Returns:
        :class:`PromptRows` of a file, else a ``datasets.Dataset``.

    Raises:
        FileNotFoundError: If there is no such file or data set.
        ValueError: If it cannot be read, or has no such column or split.
    """
    name = expanduser(source)
    path = Path(name)
    if path.is_file() or (_kind(path) in KINDS and not path.is_dir()):
        return read_prompt_file(path, prompt_column, dataset_encoding)
    if dataset_encoding is not None:
        raise ValueError(f"dataset_encoding={dataset_encoding!r} is for one file of text, but {name} is none.")
    return _read_data_set(name, prompt_column, dataset_split)


def read_prompt_file(path: str | Path, prompt_column: str = "prompt", encoding: str | None = None) -> PromptRows:
    r"""The rows of one local file: what a person would read in it, or one line that says where that is unclear.

    - ``.txt``: each line is a prompt.
    - ``.csv``, ``.tsv``: the first line names the columns, separated by commas (by semicolons or tabs if it has no
      comma). A row with more or fewer fields is refused, also where there is but one column: whether the rest of
      ``a red bicycle, at night`` is text or another column cannot be told. Quotes say it. Of the other columns, those
      that hold nothing but numbers, or true and false, are read as such; an empty field is None. A first column
      without a name, the index that pandas writes, is left out.
    - ``.json``, ``.jsonl``, ``.ndjson``: objects, or texts, in a list or one after the other.
    - ``.parquet``.

    Each may be gzipped (``.csv.gz``). Blanks around a prompt are removed; rows without one are left out and counted.

    Args:
        path: The file; brackets and stars in its name are nothing but themselves.
        prompt_column: Name of the column that becomes ``prompt``. A column of that name beside it is left out.
        encoding: Encoding of a text; None for UTF-8, or what a byte order mark says.

    Returns:
        The rows.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it cannot be read; the message names the file, the line and the fault.

    Example:
        >>> from tempfile import mkdtemp
        >>> file = Path(mkdtemp()) / "prompts.csv"
        >>> _ = file.write_text('prompt,seed\n"a red bicycle, at night",1\n')
        >>> list(read_prompt_file(file))
        [{'prompt': 'a red bicycle, at night', 'seed': 1}]
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"The file of prompts {path} does not exist.")
    kind = _kind(path)
    if kind not in KINDS:
        raise ValueError(f"{path} is no file of prompts that is known here: use {', '.join(KINDS)}, or one with .gz.")
    try:
        rows = _with_prompts(_rows(path, kind, prompt_column, encoding), prompt_column)
    except _UnreadableError as fault:
        raise ValueError(f"{path}, {fault}") from None
    if not rows:
        what = f"its {rows.blank} rows are blank" if rows.blank else "it has no rows"
        raise ValueError(f"{path} holds no prompt: {what}. Write one a line.")
    return rows


def text_fault(value: Any) -> str | None:
    r"""What keeps a value from being a prompt, if anything does.

    Example:
        >>> text_fault(3), text_fault("a"), text_fault("\ud83d")
        ('holds int, not text', None, 'holds half a character, a lone surrogate')
    """
    if not isinstance(value, str):
        return f"holds {type(value).__name__}, not text"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "holds half a character, a lone surrogate"
    return None


def _kind(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _rows(path: Path, kind: str, prompt_column: str, encoding: str | None) -> Iterator[Row]:
    """All rows of a file, also those without a prompt."""
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise _UnreadableError(f"gzip: {error}. Pack it anew.") from None
    if kind == ".parquet":
        if encoding is not None:
            raise _UnreadableError(f"dataset_encoding={encoding!r}: parquet has an encoding of its own. Leave it out.")
        return _read_parquet(data)
    text = _decoded(data, encoding)
    if kind == ".txt":
        return ((f"line {number}", {"prompt": line}) for number, line in enumerate(_lines(text), 1))
    if kind in (".csv", ".tsv"):
        return _read_table(text, kind, prompt_column)
    return _read_json(text)


def _with_prompts(rows: Iterable[Row], prompt_column: str) -> PromptRows:
    """The rows that have a prompt, in ``prompt``, and how many have none."""
    kept = PromptRows()
    for place, row in rows:
        if prompt_column not in row:
            raise _UnreadableError(
                f"{place}: there is no {prompt_column!r}, but {', '.join(map(repr, row)) or 'nothing'}. Set "
                "prompt_column to the one with the prompts."
            )
        prompt = row[prompt_column]
        fault = None if prompt is None else text_fault(prompt)
        if fault is not None:
            raise _UnreadableError(f"{place}: {prompt_column!r} {fault}.")
        prompt = (prompt or "").strip()
        if prompt:
            others = {name: value for name, value in row.items() if name not in ("prompt", prompt_column)}
            kept.append({"prompt": prompt, **others})
        else:
            kept.blank += 1
    return kept


def _decoded(data: bytes, encoding: str | None) -> str:
    """The text of a file, without byte order marks."""
    marked = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    try:
        if encoding and marked and not codecs.lookup(encoding).name.startswith(marked):
            raise _UnreadableError(f"line 1: it begins with the mark of {marked}, but dataset_encoding={encoding!r}.")
        text = data.decode(encoding or marked or "utf-8")
    except LookupError:
        raise _UnreadableError(f"dataset_encoding={encoding!r}: Python knows no such encoding of text.") from None
    except UnicodeDecodeError as error:
        line = data[: error.start].decode(error.encoding, "replace").count("\n") + 1
        raise _UnreadableError(
            f"line {line}: byte {error.start} ({data[error.start]:#04x}) is not {error.encoding}. Save the file as "
            "UTF-8, or set dataset_encoding to what it was written in: cp1252, latin-1, utf-16, ..."
        ) from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise _UnreadableError(
            f"line {line}: there is a zero byte, as in UTF-16 without a mark, or in what is no text. Set "
            "dataset_encoding='utf-16-le', or save the file as UTF-8."
        )
    return text.replace("\ufeff", "")  # Also in the middle, where files were joined: it has no other meaning left.


def _lines(text: str) -> list[str]:
    """The lines as editors number them; what ends the last one begins no other."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n")
    return lines.split("\n") if lines else []


def _read_table(text: str, kind: str, prompt_column: str) -> Iterator[Row]:
    """The rows of a table whose first line names the columns."""
    first = next((line for line in _lines(text) if line.strip()), "")
    separator = "\t" if kind == ".tsv" else next((mark for mark in _SEPARATORS if mark in first), ",")
    header: list[str] = []
    places, rows = list[str](), list[list[str]]()
    for place, fields in _records(text, separator):
        is_blank = not any(field.strip() for field in fields)
        if not header:
            header = [] if is_blank else [name.strip() for name in fields]
            _check_header(place, header, prompt_column)
            continue
        if len(fields) != len(header) and not is_blank:
            raise _UnreadableError(
                f"{place}: the number of fields is {len(fields)}, but that of columns {len(header)} "
                f"({', '.join(header)}). Put a prompt that holds a {_SEPARATORS[separator]} in double quotes, or call "
                "the file .txt, where each line is a prompt."
            )
        places.append(place)
        rows.append([""] * len(header) if is_blank else fields)
    cells = zip(*rows, strict=True) if rows else ()
    columns = {
        name: list(column) if name == prompt_column else _typed(column)
        for name, column in zip(header, cells, strict=False)
        if name
    }
    for index, place in enumerate(places):
        yield place, {name: column[index] for name, column in columns.items()}


def _records(text: str, separator: str) -> Iterator[tuple[str, list[str]]]:
    """The fields of each record, and the line that it begins in."""
    reader = csv.reader(StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise _UnreadableError(
                f"line {line}: {error}. Open and close a field with one double quote; inside it, write two for one."
            ) from None
        if fields is None:
            return
        yield f"line {line}", fields
        line = reader.line_num + 1


def _check_header(place: str, header: Sequence[str], prompt_column: str) -> None:
    if header and prompt_column not in header:
        raise _UnreadableError(
            f"{place}: the columns are {', '.join(map(repr, header))}, none of them {prompt_column!r}. Set "
            "prompt_column to the one with the prompts, or write the names of the columns into that line."
        )
    repeated = [name for index, name in enumerate(header) if name and name in header[:index]]
    if repeated:
        raise _UnreadableError(f"{place}: there are two columns {repeated[0]!r}. Give each its own name.")
    if "" in header[1:]:
        raise _UnreadableError(f"{place}: column {header.index('', 1) + 1} has no name. Name or delete it.")


def _typed(cells: Sequence[str]) -> list[Any]:
    """A column's values: None where a cell is empty; numbers, or true and false, if all the others are such."""
    values = [cell.strip() for cell in cells]
    texts = [value for value in values if value]
    if all(_WHOLE_NUMBER.fullmatch(value) for value in texts):
        return [int(value) if value else None for value in values]
    if all(_NUMBER.fullmatch(value) for value in texts) and not any(re.match(r"[-+]?0\d", value) for value in texts):
        return [float(value) if value else None for value in values]
    if all(value.lower() in _TRUTHS for value in texts):
        return [_TRUTHS.get(value.lower()) for value in values]
    return [cell or None for cell in cells]


def _read_json(text: str) -> Iterator[Row]:
    """Objects in a list, or one after the other; a text stands for an object with that prompt."""
    values = list(_json_values(text))
    if len(values) == 1 and isinstance(values[0][1], list):
        values = [(f"row {number}", value) for number, value in enumerate(values[0][1], 1)]
    for place, value in values:
        if isinstance(value, str):
            yield place, {"prompt": value}
        elif isinstance(value, dict):
            yield place, value
        else:
            raise _UnreadableError(f"{place}: {type(value).__name__} instead of an object with a prompt, or a text.")


def _json_values(text: str) -> Iterator[tuple[str, Any]]:
    """The values that follow each other in a text, and the line that each begins in."""
    decoder, spaces = json.JSONDecoder(), re.compile(r"\s*")
    position, line = 0, 1
    while True:
        start = spaces.match(text, position).end()  # type: ignore[union-attr]
        if start == len(text):
            return
        line += text.count("\n", position, start)
        try:
            value, position = decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise _UnreadableError(
                f"line {error.lineno}: no whole JSON value: {error.msg} (column {error.colno}). Is the file cut off?"
            ) from None
        yield f"line {line}", value
        line += text.count("\n", start, position)


def _read_parquet(data: bytes) -> Iterator[Row]:
    try:
        rows = parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _UnreadableError(f"no whole parquet file: {error}") from None
    return ((f"row {number}", row) for number, row in enumerate(rows, 1))


def _read_data_set(name: str, prompt_column: str, split: str) -> Any:
    """A split of what ``datasets`` reads, with the text column called ``prompt``."""
    from datasets import DatasetDict, load_dataset, load_from_disk  # Seconds of imports that a file does not need.

    if any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json")):  # Of save_to_disk.
        data = load_from_disk(name)
        if isinstance(data, DatasetDict):
            if split not in data:
                raise ValueError(f"{name} has the splits {[*data]}, not {split!r}: set dataset_split.")
            data = data[split]
    else:
        data = load_dataset(name, split=split)
    if prompt_column not in data.column_names:
        raise ValueError(f"{name} has the columns {data.column_names}, not {prompt_column!r}: set prompt_column.")
    if prompt_column == "prompt":
        return data
    return data.remove_columns([*{"prompt"} & {*data.column_names}]).rename_column(prompt_column, "prompt")
