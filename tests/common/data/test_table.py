"""The forms of data files, and that every refusal has its code, its place and no private text."""

import json
import tracemalloc
from pathlib import Path

import pytest

from tsugiki.common.data.table import TableSpec, class_numbers, load
from tsugiki.common.errors import DataError
from tsugiki.common.settings import DataFormat

PRIVATE = "Patient Jane hf_abc"
NAMES = {"text": "text", "label": "label"}


def load_file(path, content, sources=NAMES, **data_format):
    """Write the content, unless it is None, and load the columns from it; `optional` may be missing."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return load(path, TableSpec(path, sources, frozenset({"optional"}), DataFormat(**data_format)))


def refusal(path, content, *args, **options):
    """Return the error of a file that must be refused, having checked that it holds no private text."""
    with pytest.raises(DataError) as caught:
        load_file(path, content, *args, **options)
    error = caught.value
    while error is not None:
        assert PRIVATE not in str(error) + repr(error)
        assert not isinstance(error, UnicodeError | json.JSONDecodeError)
        error = error.__context__
    return caught.value


def write_parquet(path, **columns):
    """Write the columns as Parquet."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table(columns), path)
    return path


TEXTS = ["good, but\nlong", 'so "so" 😀\u2028']
FORMS = {
    "shard.csv": ('text,label\n"good, but\nlong",yes\n"so ""so"" 😀\u2028",0\n', [2, 4]),
    "shard.tsv": ('text\tlabel\r\n"good, but\nlong"\tyes\r\n"so ""so"" 😀\u2028"\t0\r\n', [2, 4]),
    "SHARD.CSV": ('\ufefftext, label\n\n"good, but\nlong",yes\n\n"so ""so"" 😀\u2028",0\n\n', [3, 6]),
    "shard.jsonl": (
        '\ufeff{"text": "good, but\\nlong", "label": "yes"}\n\n{"label": "0", "text": "so \\"so\\" 😀\u2028"}',
        [1, 3],
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_cells(tmp_path, name):
    """Catches: str.splitlines (U+2028 ends no line), a byte order mark in the first name, blank lines not counted."""
    content, lines = FORMS[name]
    table = load_file(tmp_path / name, content)
    assert table.cells == {"text": TEXTS, "label": ["yes", "0"]}
    assert table.lines == lines


def test_parquet_gives_the_same_cells(tmp_path):
    """Catches: columns in the order of the file taken for the order asked for, and a dot taken for a path."""
    path = write_parquet(tmp_path / "shard.parquet", other=[1.5, 2.5], **{"a.b": [1, 0]}, text=TEXTS)
    assert load_file(path, None, {"text": "text", "label": "a.b"}).cells == {"text": TEXTS, "label": [1, 0]}
    assert load_file(path, None, {"text": 2}).cells == {"text": TEXTS}


@pytest.mark.parametrize("sources", [{"text": 2, "score": 0}, {"text": "2", "score": "0"}])
def test_columns_by_position(tmp_path, sources):
    """Catches: positions counted from 1, or the first row taken for a header."""
    table = load_file(tmp_path / "shard.tsv", "0.5\tx\tone\n1\ty\ttwo\n", sources, header=False)
    assert table.cells == {"text": ["one", "two"], "score": ["0.5", "1"]}
    assert table.lines == [1, 2]


def test_columns_by_name_and_quotation_marks_as_text(tmp_path):
    """Catches: the mapping read backwards, and quoting="none" ignored, when the first text would swallow the second."""
    content = 'sentence\tclass\n" one\tno\n"two\tyes\n'
    sources = {"text": "sentence", "label": "class"}
    table = load_file(tmp_path / "shard.tsv", content, sources, quoting="none")
    assert table.cells == {"text": ['" one', '"two'], "label": ["no", "yes"]}


def test_a_number_is_a_key_in_jsonl(tmp_path):
    """Catches: a key such as "2", which the run config turns into a number, lost."""
    assert load_file(tmp_path / "shard.jsonl", '{"2": "one"}\n{"1": "x"}\n', {"text": 2}).cells == {
        "text": ["one", None]
    }


@pytest.mark.parametrize("source", ["text", 0])
@pytest.mark.parametrize("name", ["shard.txt", "SHARD.TXT"])
def test_plain_text_is_a_text_a_line(tmp_path, name, source):
    """Catches: separators and quotation marks that mean something; U+2028 as an end; blanks inside a text lost."""
    content = '\ufeffa,\t"b\r\n\n \u2028\n  so #1\u2028so \nlast 😀'
    table = load_file(tmp_path / name, content, {"text": source})
    assert table.cells == {"text": ['a,\t"b', "  so #1\u2028so ", "last 😀"]}
    assert table.lines == [1, 4, 5]


def test_plain_text_has_no_other_column(tmp_path):
    """Catches: a label invented for every line, or a text handed out as one; private text in the error."""
    error = refusal(tmp_path / "shard.txt", f"{PRIVATE}\n")
    assert error.code == "shard-columns"
    assert "'label'" in error.problem
    optional = load_file(tmp_path / "shard.txt", "one\n", {"text": "text", "optional": "more"})
    assert optional.cells == {"text": ["one"]}


@pytest.mark.parametrize("name", ["shard.csv", "shard.jsonl"])
def test_an_optional_column_may_be_absent(tmp_path, name):
    """Catches: an absent column as one of empty cells."""
    content = "text\none\n" if name == "shard.csv" else '{"text": "one"}'
    assert load_file(tmp_path / name, content, {"text": "text", "optional": "more"}).cells == {"text": ["one"]}


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("shard.csv", f"text,label\n{PRIVATE},no\n{PRIVATE}\n", 3),
        ("shard.csv", f"text,label\n{PRIVATE},no,{PRIVATE}\n", 2),
        ("shard.csv", f'text,label\na,no\n"{PRIVATE},no\nb,no\n', 3),
        ("shard.csv", f'text,label\n"a\nb",no\n"{PRIVATE}"x,no\n', 4),
        ("shard.csv", f"text,label\n{PRIVATE},no\rb,no\r", 2),
        ("shard.jsonl", f'{{"text": "a", "label": 0}}\n{{"text": "{PRIVATE}\n', 2),
        ("shard.jsonl", f'\n["{PRIVATE}"]\n', 2),
        ("shard.jsonl", "[" * 100_000, 1),
        ("shard.jsonl", '{"text": ' + "1" * 5000 + "}", 1),
    ],
)
def test_broken_rows_name_their_line(tmp_path, name, content, line):
    """Catches: short rows padded, an open quotation mark that swallows the rest, and parser errors that escape."""
    error = refusal(tmp_path / name, content)
    assert error.code == "shard-format"
    assert f"line {line} " in error.problem


@pytest.mark.parametrize("name", ["shard.text", "shard", "shard.parquet"])
def test_a_file_of_another_form(tmp_path, name):
    """Catches: an unknown ending read as CSV, and pyarrow's own error."""
    assert refusal(tmp_path / name, f"text,label\n{PRIVATE},no\n").code == "shard-format"


def test_a_damaged_parquet_file(tmp_path):
    """Catches: an error that only reading the pages raises, not opening the file."""
    content = bytearray(write_parquet(tmp_path / "shard.parquet", text=[PRIVATE] * 50, label=[0] * 50).read_bytes())
    content[4:40] = bytes(36)
    assert refusal(tmp_path / "shard.parquet", bytes(content)).code == "shard-format"


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("shard.csv", b"text,label\na,no\n" + PRIVATE.encode() + b"\xff,no\n", 3),
        ("shard.csv", "text,label\na,no\n".encode("utf-16"), 1),
        ("shard.jsonl", b'{"text": "\xed\xa0\x80"}\n', 1),
        ("shard.txt", b"a\n" + PRIVATE.encode() + b"\xff\n", 2),
        ("shard.txt", "one\n".encode("utf-16"), 1),
    ],
)
def test_bytes_that_are_not_utf_8(tmp_path, name, content, line):
    """Catches: errors="replace", and UnicodeDecodeError in the chain, which holds all the bytes."""
    error = refusal(tmp_path / name, content, {"text": "text"} if name == "shard.txt" else NAMES)
    assert error.code == "shard-encoding"
    assert f"line {line} " in error.problem


def test_parquet_text_that_is_not_utf_8(tmp_path):
    """Catches: trust in pyarrow, which checks no string before it is taken out."""
    import pyarrow

    buffers = pyarrow.array([b"a", PRIVATE.encode() + b"\xff"]).buffers()
    text = pyarrow.StringArray.from_buffers(2, buffers[1], buffers[2])
    error = refusal(write_parquet(tmp_path / "shard.parquet", text=text), None, {"text": "text"})
    assert error.code == "shard-encoding"
    assert "row 2 " in error.problem


@pytest.mark.parametrize("name", ["shard.jsonl", "shard.txt"])
def test_a_long_line_is_refused_before_it_is_read(tmp_path, name):
    """Catches: the whole line, or the whole file, in memory before the check."""
    (tmp_path / name).write_bytes(b'{"text": "a"}\n' + b"x" * 10_000_000)
    tracemalloc.start()
    error = refusal(tmp_path / name, None, {"text": "text"})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert error.code == "shard-line-too-long"
    assert "line 2 " in error.problem
    assert peak_bytes < 5_000_000


def test_a_line_of_the_permitted_length_is_read(tmp_path):
    """Catches: the csv module's own limit of 131072 characters, and a limit that is off by one."""
    text = "x" * (2**20 - 1)
    assert load_file(tmp_path / "a.csv", f"text\n{text}\n", {"text": "text"}).cells == {"text": [text]}
    assert refusal(tmp_path / "a.csv", f"text\nx{text}\n", {"text": "text"}).code == "shard-line-too-long"


def test_missing_columns_are_named_beside_those_that_are_there(tmp_path):
    """Catches: a KeyError, or only the first missing column reported."""
    error = refusal(tmp_path / "shard.csv", f"sentence,class\n{PRIVATE},no\n")
    assert error.code == "shard-columns"
    assert all(name in error.problem for name in ("'text'", "'label'", "sentence", "class"))
    assert "[data.columns]" in error.hint


@pytest.mark.parametrize("name", ["shard.csv", "shard.tsv"])
def test_the_first_row_of_a_file_without_a_header_is_not_repeated(tmp_path, name):
    """Catches: private text listed as names of columns because nobody wrote header = false."""
    error = refusal(tmp_path / name, f"{PRIVATE},1\nother,0\n")
    assert error.code == "shard-columns"
    assert "header = false" in error.hint


@pytest.mark.parametrize(
    ("content", "sources", "header"),
    [
        ("a,0\n", NAMES, False),
        ("a,0\n", {"text": 0, "label": 2}, False),
        ("a,0\n", {"text": 0, "label": -1}, False),
        ("text,label,label\na,0,0\n", NAMES, True),
    ],
)
def test_columns_that_cannot_be_told(tmp_path, content, sources, header):
    """Catches: an IndexError, a negative position taken from the end, and one of two equal names picked silently."""
    assert refusal(tmp_path / "shard.csv", content, sources, header=header).code == "shard-columns"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", ""),
        ("a.csv", "\ufeff"),
        ("a.csv", "text,label\n\n"),
        ("a.tsv", "\n"),
        ("a.jsonl", "\n \n"),
        ("a.txt", "\ufeff\n \r\n"),
    ],
)
def test_a_file_without_rows(tmp_path, name, content):
    """Catches: a header or a blank line counted as a row, and columns missed where there are no rows."""
    assert len(load_file(tmp_path / name, content, {"text": "text"} if name == "a.txt" else NAMES).lines) == 0


def test_a_file_that_vanished(tmp_path):
    """Catches: FileNotFoundError in the place of a code."""
    assert refusal(Path(tmp_path / "gone.csv"), None).code == "shard-missing"


def test_a_number_means_a_class_unless_it_is_the_name_of_one():
    """Catches: "1" for the second class where a class is called 1."""
    assert class_numbers(("no", "yes"))[0] == {"no": 0, "yes": 1, "0": 0, "1": 1}
    assert class_numbers(("1", "0"))[0] == {"1": 0, "0": 1}
    assert class_numbers(("-1", "cat"))[0] == {"-1": 0, "cat": 1}
    assert class_numbers(("no", "yes"))[1] == "one of the classes no, yes, or a number from 0 to 1"
