"""What a person reads in a file of prompts is what is trained, or one line says where it is unclear."""

import gzip
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from rdm_rl.cli.train import TrainArguments, load_prompts
from rdm_rl.trainers.prompt_files import PromptRows, read_prompt_file, read_prompts
from rdm_rl.trainers.prompts import PromptSource
from tests.helpers import tiny_trainer

BICYCLE, DOOR = "a red bicycle", "a blue door"
BOTH = [BICYCLE, DOOR]


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


READ: dict[str, tuple[str | bytes, list[str], int]] = {
    "plain.txt": ("a red bicycle\na blue door\n", BOTH, 0),
    "without_end.txt": ("a red bicycle\na blue door", BOTH, 0),
    "windows.txt": ("a red bicycle\r\na blue door\r\n", BOTH, 0),
    "old_mac.txt": ("a red bicycle\ra blue door\r", BOTH, 0),
    "blank_lines.txt": ("a red bicycle\na blue door  \n   \n\n", BOTH, 2),
    "bom.txt": (b"\xef\xbb\xbfa red bicycle\n\xef\xbb\xbfa blue door\n", BOTH, 0),
    "utf16.txt": ("a red bicycle\n".encode("utf-16"), [BICYCLE], 0),
    "utf32.txt": ("a red bicycle\n".encode("utf-32"), [BICYCLE], 0),
    "SHOUT.TXT": ("a red bicycle\n", [BICYCLE], 0),
    "commas.txt": ('a "red" bicycle, at night\n', ['a "red" bicycle, at night'], 0),
    "separators.txt": ("a red\x0b \u2028bicycle\n", ["a red\x0b \u2028bicycle"], 0),
    "brackets[1] * ?.txt": ("a red bicycle\n", [BICYCLE], 0),
    "packed.txt.gz": (gzip.compress(b"a red bicycle\n"), [BICYCLE], 0),
    "PACKED.CSV.GZ": (gzip.compress(b"prompt\na red bicycle\n"), [BICYCLE], 0),
    "plain.csv": ("prompt\na red bicycle\na blue door\n", BOTH, 0),
    "bom.csv": (b"\xef\xbb\xbfprompt\na red bicycle\n", [BICYCLE], 0),
    "quoted.csv": ('"prompt"\n"a ""red"" bicycle, at night"\n', ['a "red" bicycle, at night'], 0),
    "spaces.csv": ('prompt, seed\n"a red bicycle, at night", 1\n', ["a red bicycle, at night"], 0),
    "two_lines.csv": ('prompt\n"a red\nbicycle"\n', ["a red\nbicycle"], 0),
    "blank_rows.csv": ("\nprompt,seed\na red bicycle,1\n\n,\n,2\n", [BICYCLE], 3),
    "semicolons.csv": ("prompt;seed\na red bicycle, at night;1\n", ["a red bicycle, at night"], 0),
    "names.csv": ("prompt\nNone\nNA\nnull\n007\n", ["None", "NA", "null", "007"], 0),
    "tab.tsv": ("prompt\tseed\na red bicycle\t1\n", [BICYCLE], 0),
    "commas.tsv": ("prompt\tseed\na red bicycle, at night\t1\n", ["a red bicycle, at night"], 0),
    "lines.ndjson": ('{"prompt": "a red bicycle"}\n', [BICYCLE], 0),
    "lines.jsonl": ('{"prompt": "a red bicycle"}\n\n{"prompt": " "}\n{"prompt": null}\n', [BICYCLE], 2),
    "lines.json": ('{"prompt": "a red bicycle"}\n{"prompt": "a blue door"}', BOTH, 0),
    "list.json": ('[\n {"prompt": "a red bicycle"},\n "a blue door"\n]', BOTH, 0),
    "texts.jsonl.gz": (gzip.compress(b'"a red bicycle"\n"a blue door"\n'), BOTH, 0),
    "table.parquet": (as_parquet([{"prompt": BICYCLE}, {"prompt": None}]), [BICYCLE], 1),
    "TABLE.PARQUET.gz": (gzip.compress(as_parquet([{"prompt": BICYCLE}])), [BICYCLE], 0),
}


@pytest.mark.parametrize("name", READ)
def test_what_a_person_reads_is_trained(name: str, tmp_path: Path) -> None:
    content, prompts, blank = READ[name]
    path = written(tmp_path / name, content)
    rows = load_prompts(TrainArguments("digits", str(path)))
    assert ([row["prompt"] for row in rows], rows.blank) == (prompts, blank)
    assert [*PromptSource(path, seed=0).texts()] == prompts  # From Python, too.


REFUSED: dict[str, tuple[str | bytes, str]] = {
    "one_comma.csv": ("prompt\na red bicycle, at night\na blue door, open\n", r"line 2: .* is 2, .* 1 .*a comma in"),
    "more_commas.csv": ("prompt\na red bicycle, at night\na blue door, open, wet\n", "line 2: .* a comma in double"),
    "ragged.csv": ('prompt,seed\n"a\nb",1\na red bicycle\n', r"line 4: .* is 1, but that of columns 2 \(prompt, seed"),
    "ragged.tsv": ("prompt\na red bicycle\t1\n", "line 2: .* a tab in double quotes"),
    "no_header.csv": ("a red bicycle\na blue door\n", "line 1: the columns are 'a red bicycle', none of them 'prompt'"),
    "which.csv": ("text,caption\na,b\n", "line 1: the columns are 'text', 'caption', none .* Set prompt_column"),
    "twice.csv": ("prompt,prompt\na,b\n", "two columns 'prompt'"),
    "no_name.csv": ("prompt,\na,b\n", "line 1: column 2 has no name"),
    "open_quote.csv": ('prompt\na\n"a red bicycle\n', "line 3: unexpected end of data"),
    "half_quoted.csv": ('prompt\n"Hello" she said\n', "line 2: .* write two for one"),
    "header.csv": ("prompt\n", "holds no prompt: it has no rows"),
    "empty.txt": ("", "holds no prompt"),
    "empty.csv.gz": (gzip.compress(b""), "holds no prompt"),
    "blank.txt": (" \n\n", "holds no prompt: its 2 rows are blank"),
    "latin.txt": ("a red bicycle\nun caf\xe9\n".encode("latin-1"), r"line 2: byte 20 \(0xe9\) is not utf-8.* cp1252"),
    "unmarked.txt": ("a red bicycle\n".encode("utf-16-le"), "line 1: there is a zero byte, .*'utf-16-le'"),
    "cut_off.txt": ("a red\nbicycle".encode("utf-16")[:-1], "line 2: byte 26 .* is not utf-16"),
    "cut_off.jsonl": ('{"prompt": "a red bicycle"}\n{"prompt": "a bl', "line 2: no whole JSON .* cut off"),
    "cut_off.json": ('[{"prompt": "a red bicycle"},\n{"prompt"', "line 2: no whole JSON value"),
    "cut_off.txt.gz": (gzip.compress(b"a red bicycle\n")[:-9], "gzip: "),
    "not_packed.txt.gz": ("a red bicycle\n", "gzip: Not a gzipped file"),
    "cut_off.parquet": (as_parquet([{"prompt": BICYCLE}])[:-9], "no whole parquet file"),
    "typing_error.jsonl": ('{"prompt": "a"}\n{"prmpt": "b"}\n', "line 2: there is no 'prompt', but 'prmpt'"),
    "which.parquet": (as_parquet([{"text": "a", "caption": "b"}]), "row 1: .* but 'text', 'caption'. Set prompt_col"),
    "number.json": ('[{"prompt": "a"}, {"prompt": 3}]', "row 2: 'prompt' holds int, not text"),
    "half.jsonl": (r'{"prompt": "\ud83d"}', "line 1: 'prompt' holds half a character"),
    "columns.json": ('{"prompt": ["a", "b"]}', "line 1: 'prompt' holds list, not text"),
    "numbers.json": ("[1, 2]", "row 1: int instead of an object"),
    "prompts.docx": ("PK", r"no file of prompts that is known here: use \.txt"),
    "prompts.gz": (gzip.compress(b"a"), "no file of prompts that is known here"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_or_one_line_names_the_fault(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    path = written(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as caught:
        load_prompts(TrainArguments("digits", str(path)))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        PromptSource(path, seed=0)


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path: Path) -> None:
    for name in ("none.txt", "none.csv.gz", "none.PARQUET"):
        with pytest.raises(FileNotFoundError, match="does not exist"):
            read_prompts(tmp_path / name)


TWO_COLUMNS: dict[str, str | bytes] = {
    "two_text_columns.csv": "prompt,caption\nid-1,a red bicycle\n",
    "two_text_columns.jsonl": '{"prompt": "id-1", "caption": "a red bicycle"}\n',
    "two_text_columns.parquet": as_parquet([{"prompt": "id-1", "caption": "a red bicycle"}]),
}


@pytest.mark.parametrize("name", TWO_COLUMNS)
def test_the_column_that_was_asked_for_is_taken(name: str, tmp_path: Path) -> None:
    path = written(tmp_path / name, TWO_COLUMNS[name])
    assert load_prompts(TrainArguments("digits", str(path), prompt_column="caption")) == [{"prompt": BICYCLE}]
    assert read_prompts(path) == [{"prompt": "id-1", "caption": BICYCLE}]


@pytest.mark.parametrize(
    ("encoding", "content", "read"),
    [
        ("latin-1", "caf\xe9".encode("latin-1"), "caf\xe9"),
        ("utf-16-le", "caf\xe9".encode("utf-16-le"), "caf\xe9"),
        ("utf8", b"\xef\xbb\xbfcaf\xc3\xa9", "caf\xe9"),
        (
            "cp1252",
            b"\xef\xbb\xbfcaf\xc3\xa9",
            "line 1: it begins with the mark of utf-8, but dataset_encoding='cp1252'",
        ),
        ("latin-77", b"cafe", "dataset_encoding='latin-77': Python knows no such encoding"),
        ("rot13", b"cafe", "dataset_encoding='rot13': Python knows no such encoding"),
    ],
)
def test_an_encoding_can_be_set(encoding: str, content: bytes, read: str, tmp_path: Path) -> None:
    path = written(tmp_path / "prompts.txt", content)
    arguments = TrainArguments("digits", str(path), dataset_encoding=encoding)
    if "dataset_encoding" in read:
        with pytest.raises(ValueError, match=read):
            load_prompts(arguments)
    else:
        assert load_prompts(arguments) == [{"prompt": read}]


def test_an_encoding_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "prompts.parquet", as_parquet([{"prompt": BICYCLE}]))
    for source in (tmp_path / "prompts.parquet", tmp_path):
        with pytest.raises(ValueError, match="dataset_encoding='latin-1'"):
            read_prompts(source, dataset_encoding="latin-1")


def test_other_columns_are_values(tmp_path: Path) -> None:
    """Numbers, truths and names, as a person takes them; None where a field is empty."""
    path = written(
        tmp_path / "prompts.csv",
        ",prompt,digit,weight,ok,zip,word\n0,a,1,.5,True,01,x\n1,b,,2,false,1.50,\n2,c,-3,1e-3,TRUE,2,3\n",
    )
    assert read_prompt_file(path) == [
        {"prompt": "a", "digit": 1, "weight": 0.5, "ok": True, "zip": "01", "word": "x"},
        {"prompt": "b", "digit": None, "weight": 2.0, "ok": False, "zip": "1.50", "word": None},
        {"prompt": "c", "digit": -3, "weight": 1e-3, "ok": True, "zip": "2", "word": "3"},
    ]


def test_optional_keys_are_none_where_they_are_missing(tmp_path: Path) -> None:
    """Metadata of GenEval: not every kind of prompt excludes something."""
    path = written(
        tmp_path / "metadata.jsonl",
        '{"tag": "counting", "include": [{"class": "bus", "count": 2}], "exclude": [3], "prompt": "two buses"}\n'
        '{"tag": "colors", "include": [{"class": "bus", "color": "red"}], "prompt": "a red bus"}\n',
    )
    assert PromptSource(path, seed=0)[1] == {
        "prompt": "a red bus",
        "tag": "colors",
        "include": [{"class": "bus", "color": "red"}],
        "exclude": None,
    }


def test_a_folder_is_a_data_set_whatever_its_name(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"prompt": ["id-1"], "caption": [BICYCLE]})
    DatasetDict({"few": rows}).save_to_disk(tmp_path / "saved.json")
    taken = read_prompts(tmp_path / "saved.json", prompt_column="caption", dataset_split="few")
    assert [*taken] == [{"prompt": BICYCLE}]
    with pytest.raises(ValueError, match=r"has the splits \['few'\], not 'train': set dataset_split"):
        read_prompts(tmp_path / "saved.json")


def test_slices_remember_what_was_left_out(tmp_path: Path) -> None:
    rows = read_prompt_file(written(tmp_path / "prompts.txt", "a\n\nb\nc\n"))
    assert isinstance(rows[1:], PromptRows)
    assert PromptSource(rows[1:], seed=0).describe() == "2 prompts (1 blank left out)"


def test_a_trainer_reads_what_its_data_are_called(base: Path, tmp_path: Path) -> None:
    """And rows of the evaluation have every column that rewards read in training."""
    path = written(tmp_path / "prompts.jsonl", '{"prompt": "the digit 1", "digit": 1}\n{"prompt": "a cat"}\n')
    eval_rows = [{"prompt": "a dog", "colour": "red"}]
    trainer = tiny_trainer(base, tmp_path / "run", train_dataset=str(path), given={"eval_dataset": eval_rows})
    digits = {"the digit 1": 1, "a cat": None}
    batches = [*trainer.prompt_batches(0), *trainer.prompt_batches(1)]
    for batch in batches:
        assert batch.columns == {"digit": [digits[text] for text in batch.prompts]}
    assert trainer.eval_columns == {"digit": [None], "colour": ["red"]}
