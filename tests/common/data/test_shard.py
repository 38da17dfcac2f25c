"""What the cells of a site's file mean, where the file may be, and that no refusal holds private text."""

import pytest

from tsugiki.common.data.columns import Column
from tsugiki.common.data.shard import Shard, read
from tsugiki.common.errors import DataError
from tsugiki.common.settings import DataFormat

TEXT, LABEL, SCORE = Column("text", "text"), Column("label", "label"), Column("score", "score")
CLASSIFIED = (TEXT, LABEL)
LABELS = ("no", "yes")
PRIVATE = "Patient Jane hf_abc"


def write(folder, name, content):
    """Write the text and return its path."""
    path = folder / name
    path.write_text(content)
    return path


def refusal(path, columns=CLASSIFIED, data_format=None, **options):
    """Return the error of a file that must be refused, having checked that it holds no private text."""
    with pytest.raises(DataError) as caught:
        read(path, columns, data_format or DataFormat(), **{"labels": LABELS, **options})
    error = caught.value
    while error is not None:
        assert PRIVATE not in str(error) + repr(error)
        error = error.__context__
    return caught.value


def test_columns_get_their_types(tmp_path):
    """Catches: labels or scores left as text, texts stripped, and 5 read as the int that a label would be."""
    path = write(tmp_path, "shard.csv", "text,label,score\n a ,yes,5\nb, 0,-1e-3\n")
    shard = read(path, (TEXT, LABEL, SCORE), DataFormat(), labels=LABELS)
    assert shard == Shard({"text": [" a ", "b"], "label": [1, 0], "score": [5.0, -0.001]})
    assert [type(shard.columns[name][0]) for name in ("text", "label", "score")] == [str, int, float]
    assert len(shard) == 2


def test_a_shard_does_not_print_its_rows():
    """Catches: the dataclass's own repr, which a log line or a traceback with locals would carry out."""
    assert repr(Shard({"text": [PRIVATE]}, {"ward": [PRIVATE]})) == "Shard(notes=())"


def test_a_mapped_column_is_required(tmp_path):
    """Catches: an absent optional column as a column of None, or a wrong mapping to one silently dropped."""
    columns = (TEXT, Column("negative", "text", required=False))
    path = write(tmp_path, "shard.csv", "text\none\n")
    assert read(path, columns, DataFormat()).columns == {"text": ["one"]}
    assert refusal(path, columns, DataFormat(columns={"negative": "bad"})).code == "shard-columns"
    path = write(tmp_path, "shard.csv", "text,bad\none,two\n")
    assert read(path, columns, DataFormat(columns={"negative": "bad"})).columns == {
        "text": ["one"],
        "negative": ["two"],
    }


def test_extra_columns_are_text_and_may_be_task_columns(tmp_path):
    """Catches: an extra column that the task reads too lost from either side, or its numbers not made text."""
    path = write(tmp_path, "shard.jsonl", '{"text": "a", "label": 1, "unit": 7}\n{"text": "b", "label": 0}\n')
    data_format = DataFormat(columns={"ward": "unit"})
    shard = read(path, CLASSIFIED, data_format, labels=LABELS, extra_columns=("ward", "label"))
    assert shard == Shard({"text": ["a", "b"], "label": [1, 0]}, {"ward": ["7", ""], "label": ["1", "0"]})
    columns = (*CLASSIFIED, Column("ward", "text", required=False))
    assert refusal(path, columns, extra_columns=("ward",)).code == "shard-columns"


def test_take_keeps_the_order_asked_for_and_renews_the_notes():
    """Catches: rows sorted by take, extra columns left whole, or the note of the whole shard on a part."""
    shard = Shard({"text": ["a", "b", "c"], "label": [0, 1, 1]}, {"ward": ["x", "y", "z"]})
    assert shard.take([2, 0]) == Shard({"text": ["c", "a"], "label": [1, 0]}, {"ward": ["z", "x"]})
    assert shard.take([2, 1]).notes == ("shard-one-class",)
    assert len(shard.take([])) == 0


def test_one_class_is_noted_of_labels_only(tmp_path):
    """Catches: equal scores taken for one class."""
    path = write(tmp_path, "shard.csv", "text,label,score\na,1,1\nb,yes,1\n")
    assert read(path, CLASSIFIED, DataFormat(), labels=LABELS).notes == ("shard-one-class",)
    assert read(path, (TEXT, SCORE), DataFormat()).notes == ()


def test_labels_that_are_numbers_are_names(tmp_path):
    """Catches: "1" read as position 1 where it is the name of class 0 in a file that counts from 1."""
    path = write(tmp_path, "shard.csv", "text,label\na,2\nb,1\n")
    assert read(path, CLASSIFIED, DataFormat(), labels=("1", "2")).columns["label"] == [1, 0]
    assert refusal(write(tmp_path, "shard.csv", "text,label\na,0\n"), labels=("1", "2")).code == "shard-label-range"


@pytest.mark.parametrize("label", ["2", "-1", "1.0", "", "YES", "\u0660", PRIVATE])
def test_a_label_that_is_no_class(tmp_path, label):
    """Catches: int() as the check, a negative index, other alphabets' digits, and the label in the message."""
    error = refusal(write(tmp_path, "shard.csv", f'text,label\n"{PRIVATE}\n",no\nx,{label}\ny,1\nz,{label}\n'))
    assert error.code == "shard-label-range"
    assert "2 of 4 rows" in error.problem
    assert error.problem.endswith("line 4")


@pytest.mark.parametrize("label", ["null", "true", "2", "-1", "1.0", "[1]"])
def test_a_json_label_that_is_no_class(tmp_path, label):
    """Catches: True taken for 1, and a float or a list that reaches the loss."""
    assert refusal(write(tmp_path, "shard.jsonl", f'{{"text": "a", "label": {label}}}')).code == "shard-label-range"


@pytest.mark.parametrize("score", [f'"{PRIVATE}"', "NaN", "Infinity", "1e999", "null", "true", "[1]", "1" + "0" * 400])
def test_a_score_that_is_no_finite_number(tmp_path, score):
    """Catches: float() as the check, which takes NaN and True and overflows on long integers."""
    error = refusal(write(tmp_path, "shard.jsonl", f'{{"score": 1}}\n{{"score": {score}}}\n'), (SCORE,))
    assert error.code == "shard-score"
    assert "1 of 2 rows" in error.problem
    assert error.problem.endswith("line 2")


def test_a_blank_text_is_counted(tmp_path):
    """Catches: only the empty string refused, and row numbers in the place of line numbers."""
    error = refusal(write(tmp_path, "shard.csv", f"text,label\n{PRIVATE},no\n,no\n \t ,no\n"))
    assert error.code == "shard-empty-text"
    assert "2 of 3 rows" in error.problem
    assert error.problem.endswith("line 3")
    assert refusal(write(tmp_path, "shard.jsonl", '{"text": "a"}\n{}\n'), (TEXT,)).code == "shard-empty-text"


@pytest.mark.parametrize("text", ["5", "0", "false", "[]", f'["{PRIVATE}"]'])
def test_a_text_of_another_type(tmp_path, text):
    """Catches: str() of a list as a training text, and 0 taken for a blank."""
    path = write(tmp_path, "shard.jsonl", f'{{"text": "a"}}\n{{"text": {text}}}\n')
    assert refusal(path, (TEXT,)).code == "shard-format"


def test_unpaired_surrogates(tmp_path):
    """Catches: half a character, which JSON can spell, passed on to a tokenizer or to a site's name."""
    path = write(tmp_path, "shard.jsonl", f'{{"text": "\\ud83d\\ude00"}}\n{{"text": "{PRIVATE} \\ud800"}}\n')
    error = refusal(path, (TEXT,))
    assert error.code == "shard-encoding"
    assert error.problem.endswith("line 2")
    path = write(tmp_path, "shard.jsonl", '{"text": "a", "ward": "\\ud800"}\n')
    assert refusal(path, (TEXT,), extra_columns=("ward",)).code == "shard-encoding"


def test_a_long_parquet_text(tmp_path):
    """Catches: a limit that holds for lines alone; and a line named in a file that has none."""
    import pyarrow
    from pyarrow.parquet import write_table

    write_table(pyarrow.table({"text": ["x", "x" * (2**20 + 1)]}), tmp_path / "shard.parquet")
    error = refusal(tmp_path / "shard.parquet", (TEXT,))
    assert error.code == "shard-line-too-long"
    assert error.problem.endswith("row 2")


def test_a_file_must_stay_in_its_folder(tmp_path):
    """Catches: names compared without following links, and a common prefix (data, data-private) taken for a folder."""
    folder, private = tmp_path / "data", tmp_path / "data-private"
    folder.mkdir()
    private.mkdir()
    inner = write(folder, "shard.csv", "text\none\n")
    (folder / "out.csv").symlink_to(write(private, "shard.csv", f"text\n{PRIVATE}\n"))
    (folder / "in.csv").symlink_to(inner)
    (folder / "gone.csv").symlink_to(private / "gone.csv")
    (folder / "loop.csv").symlink_to(folder / "loop.csv")
    for inside in (None, folder):
        assert len(read(folder / "in.csv", (TEXT,), DataFormat(), inside=inside)) == 1
        assert refusal(folder / "out.csv", (TEXT,), inside=inside).code == "shard-outside"
        assert refusal(folder / "gone.csv", (TEXT,), inside=inside).code == "shard-outside"
        assert refusal(folder / "loop.csv", (TEXT,), inside=inside).code == "shard-missing"
    assert refusal(folder / ".." / "data-private" / "shard.csv", (TEXT,), inside=folder).code == "shard-outside"
    assert len(read(folder / "out.csv", (TEXT,), DataFormat(), inside=tmp_path)) == 1


@pytest.mark.parametrize("name", ["gone.csv", ".", "a\0b.csv", "x" * 300 + ".csv"])
def test_what_is_no_file(tmp_path, name):
    """Catches: an OSError or ValueError of the operating system in the place of a code."""
    assert refusal(tmp_path / name, inside=tmp_path).code == "shard-missing"


def test_too_few_rows_are_counted(tmp_path):
    """Catches: min_rows compared with the number of lines, and min_rows = 0 as leave for an empty shard."""
    path = write(tmp_path, "shard.csv", "text,label\na,no\nb,yes\n")
    assert len(read(path, CLASSIFIED, DataFormat(), labels=LABELS, min_rows=2)) == 2
    error = refusal(path, min_rows=3)
    assert error.code == "shard-too-small"
    assert "2 rows" in error.problem
    assert error.expected == "at least 3"
    assert refusal(write(tmp_path, "shard.csv", "text,label\n"), min_rows=0).code == "shard-empty"
