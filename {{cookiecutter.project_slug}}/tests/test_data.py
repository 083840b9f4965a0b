"""From CSV to Parquet: what is kept, where each row goes, and what is refused."""

import csv
import hashlib
import math
import subprocess
import sys

import duckdb
import numpy as np
import pytest

from core.errors import UserError
from core.schema import parse_number
from tests.conftest import mixed_rows
from trainer import csv_reader, data


@pytest.fixture
def prepare(tmp_path):
    """Prepare a CSV file in tmp_path; returns the two tables and the summary."""

    def run(path, label, **options):
        paths = tmp_path / "train.parquet", tmp_path / "test.parquet"
        summary = data.prepare(path, label, *paths, **options)
        return data.read_rows(paths[0]), data.read_rows(paths[1]), summary

    return run


def test_every_row_goes_to_exactly_one_side(mixed_csv, prepare):
    train, test, summary = prepare(mixed_csv, "animal", ignore=["id"])
    assert summary["train_rows"] + summary["test_rows"] == 300
    assert len(train["animal"]) == summary["train_rows"]
    assert 0.1 < summary["test_rows"] / 300 < 0.3
    assert "id" not in train
    assert "id" not in test


def test_the_side_is_the_documented_hash_of_the_row(make_csv, prepare):
    rows = [["b", "a", "y"]] + [[number, f"x{number}", "AB"[number % 2]] for number in range(200)]
    _, test, _ = prepare(make_csv(rows), "y", split_seed=7)

    def in_test(row):
        text = "\x1f".join(
            ["7", str(row[1]), str(row[0]), str(row[2])]
        )  # the seed, then the cells by column name
        return int(hashlib.md5(text.encode()).hexdigest()[:8], 16) < round(0.2 * 16**8)

    assert sorted(test["a"]) == sorted(row[1] for row in rows[1:] if in_test(row))


def test_no_row_changes_side_when_rows_are_added_or_columns_moved(make_csv, prepare):
    few, many = mixed_rows(200), mixed_rows(400)
    assert many[:201] == few
    _, test, _ = prepare(make_csv(few), "animal", ignore=["id"])
    moved = [[row[3], row[4], row[1], row[2], row[0]] for row in many]
    more_train, more_test, _ = prepare(make_csv(moved), "animal", ignore=["id"])

    def keys(table):
        return {
            tuple(str(table[name][row]) for name in ("width", "height", "colour", "animal"))
            for row in range(len(table["width"]))
        }

    assert keys(test) <= keys(more_test)
    assert not keys(test) & keys(more_train)


def test_the_seed_changes_the_split(mixed_csv, prepare):
    first = prepare(mixed_csv, "animal", split_seed=0)[1]["id"].tolist()
    assert first != prepare(mixed_csv, "animal", split_seed=1)[1]["id"].tolist()


def test_equal_rows_are_on_the_same_side(make_csv, prepare):
    rows = [["x", "y"]] + [[number % 40, "AB"[number % 2]] for number in range(400)]
    train, test, _ = prepare(make_csv(rows), "y")
    assert set(test["x"])
    assert not set(train["x"]) & set(test["x"])


def test_kinds_follow_from_all_values(make_csv, prepare):
    rows = [["number", "gaps", "zip", "word", "forced", "y"]]
    rows += [
        [
            number / 7,
            ["", "NA", "5"][number % 3],
            f"0{number}",
            f"w{number % 3}",
            number % 2,
            "ab"[number % 2],
        ]
        for number in range(90)
    ]
    train, _, summary = prepare(make_csv(rows), "y", categorical=["forced"])
    assert summary["kinds"] == {
        "number": "numeric",
        "gaps": "numeric",
        "zip": "categorical",
        "word": "categorical",
        "forced": "categorical",
    }
    assert np.isnan(train["gaps"]).any()
    assert set(train["gaps"][~np.isnan(train["gaps"])]) == {5.0}
    assert train["number"].dtype == np.float64


def test_schema_knows_categories_missing_values_and_classes(tmp_path):
    rows = "('a', 1.5, '10'), ('a', 2, '9'), ('b', NULL, '8'), ('b', 4, '10'), (NULL, 5, '9'), ('once', 6, '8')"
    path = tmp_path / "train.parquet"
    origin = """KV_METADATA {origin: '{"label": "y", "sha256": "0", "split": "0"}'}"""
    duckdb.execute(
        f"COPY (SELECT c, n::DOUBLE AS n, y FROM (VALUES {rows}) t(c, n, y)) TO '{path}' (FORMAT parquet, {origin})"
    )
    assert data.read_rows(path)["c"].tolist() == ["a", "a", "b", "b", None, "once"]
    assert np.array_equal(data.read_rows(path)["n"], [1.5, 2, math.nan, 4, 5, 6], equal_nan=True)
    schema = data.read_schema(path)
    assert schema.classes == (8, 9, 10)  # integers, in their order as numbers
    category, number = schema.columns
    assert category.values == ("a", "b")  # what occurs once shares the code of unknown ones
    assert category.optional
    assert number.optional


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_spreadsheet_files_are_read(make_csv, prepare, ending):
    lines = ['größe, note ,"a ""b""",y'] + [
        f'{number}.5," two\nlines, {number % 2} ", -,{"ab"[number % 2]}' for number in range(60)
    ]
    train, _, summary = prepare(make_csv(b"\xef\xbb\xbf" + ending.join(lines).encode()), "y")
    assert list(summary["kinds"]) == ["größe", "note", 'a "b"']
    assert set(train["note"]) == {"two\nlines, 0", "two\nlines, 1"}


@pytest.mark.parametrize(
    "cell",
    [
        "1",
        "-2.5",
        "+3",
        ".5",
        "1.",
        "1e5",
        "1E-3",
        "1e308",
        "1e400",
        "inf",
        "-inf",
        "nan",
        "NA",
        "?",
        "1_000",
        "0x1F",
        "1,5",
        "1d",
        "١",
        "true",
        "--1",
        "1 2",
    ],
)
def test_the_laptop_and_the_server_agree_on_what_a_number_is(cell):
    condition = f"SELECT {csv_reader.IS_NUMBER.format('cell')}, {csv_reader.IS_MISSING.format('cell')} FROM (SELECT ? AS cell)"
    number, missing = duckdb.execute(condition, [cell]).fetchone()
    try:
        parsed = parse_number(cell)
    except ValueError:
        assert not number
        assert not missing
    else:
        assert missing if math.isnan(parsed) else number


def lines(*rows: str) -> str:
    return "\n".join(rows) + "\n"


GOOD = [f"{number},{'ab'[number % 2]}" for number in range(40)]
BAD_FILES = {
    "empty": ("", "y", ["is empty", "first line"]),
    "header only": ("x,y\n", "y", ["no rows"]),
    "no label column": (lines("x,z", *GOOD), "y", ["no label column 'y'", "data.label", "x, z"]),
    "duplicate names": (lines("x,x,y", "1,2,a"), "y", ["more than once", "x"]),
    "names that SQL takes for one": (lines("x,X,y", "1,2,a"), "y", ["more than once", "X", "x"]),
    "unnamed column": (lines("x,,y", "1,2,a"), "y", ["column 2 has no name"]),
    "line break in a name": (
        lines('x,"wi\nth",y', *GOOD),
        "y",
        ["column 2", "line break", "one line"],
    ),
    "text among numbers": (
        lines("x,y", *GOOD, "abc,a"),
        "y",
        ["row 41", "column 'x'", "'abc'", "data.categorical"],
    ),
    "too large a number": (
        lines("x,y", *GOOD, "1e999,a"),
        "y",
        ["row 41", "column 'x'", "'1e999'"],
    ),
    "infinity": (lines("x,y", *GOOD, "inf,a"), "y", ["row 41", "'inf'"]),
    "one class": (
        lines("x,y", *[f"{n},a" for n in range(20)]),
        "y",
        ["every row says 'a'", "two classes"],
    ),
    "label seen once": (
        lines("x,y", *GOOD, "3,c"),
        "y",
        ["row 41", "label 'y'", "'c'", "only once"],
    ),
    "blank label": (lines("x,y", *GOOD, "3,"), "y", ["row 41", "label 'y'", "blank"]),
    "a quantity as label": (
        lines("x,y", *[f"{n},{n}.5\n{n},{n}.5" for n in range(1001)]),
        "y",
        ["1,001 different", "quantity"],
    ),
    "column without values": (
        lines("x,e,y", *[f"{n},,{'ab'[n % 2]}" for n in range(40)]),
        "y",
        ["column 'e'", "data.ignore"],
    ),
    "too many cells": (lines("x,y", "1,a,2", *GOOD), "y", ["line 2", "3 cells", "header has 2"]),
    "too few cells": (
        lines("x,z,y", *[f"{n},1,a" for n in range(5)], "7"),
        "y",
        ["line 7", "1 cells", "header has 3"],
    ),
    "open quote": (lines("x,y", *GOOD, '"1,a'), "y", ["line 42", "quote"]),
    "endless line": (lines("x,y", *GOOD, "z" * 3_000_000 + ",a"), "y", ["line 42", "2 MB"]),
    "other encoding": (b"x,y\n" + b"\xe9,a\n" * 9, "y", ["UTF-8"]),
    "mixed line ends": ("x,y\r\n1,a\n2,b\r\n", "y", ["CRLF", "sed -i"]),
    "semicolons": (lines("x;y", "1;a"), "y", ["separated", "comma"]),
    "nothing to test on": (
        lines("x,y", "1,a", "1,a", "2,b", "2,b"),
        "y",
        ["no row to test on", "data.test_fraction"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_are_told_and_leave_nothing(case, make_csv, tmp_path):
    content, label, fragments = BAD_FILES[case]
    path = make_csv(content)
    with pytest.raises(UserError) as told:
        data.prepare(
            path, label, tmp_path / "out" / "train.parquet", tmp_path / "out" / "test.parquet"
        )
    for fragment in fragments:
        assert fragment in str(told.value)
    assert "\n" not in str(told.value)
    assert not list((tmp_path).glob("out/*"))


def test_a_class_without_training_rows_is_told(make_csv, tmp_path):
    rows = (
        [["x", "y"]]
        + [[number, "ab"[number % 2]] for number in range(40)]
        + [["77", "rare"], ["77", "rare"]]
    )
    path = make_csv(rows)

    def try_every_seed():
        for seed in range(100):  # some seed puts both rows into the test part
            data.prepare(
                path, "y", tmp_path / "train.parquet", tmp_path / "test.parquet", split_seed=seed
            )

    with pytest.raises(UserError, match=r"class 'rare' has 2 rows.*data\.split_seed"):
        try_every_seed()


def test_a_column_that_looks_like_an_id_is_noted(mixed_csv, prepare):
    train, _, _ = prepare(mixed_csv, "animal")
    (note,) = data.notes(train)
    assert note.startswith("note: column 'id' has ")
    assert "data.ignore" in note
    assert data.notes(prepare(mixed_csv, "animal", ignore=["id"])[0]) == []


def test_a_column_whose_first_rows_are_numbers_may_be_text(make_csv, prepare, monkeypatch):
    rows = [["x", "z", "y"]] + [
        [number if number < 100 else f"t{number % 3}", "0.5", "ab"[number % 2]]
        for number in range(200)
    ]
    path = make_csv(rows)
    train, test, summary = prepare(path, "y")
    monkeypatch.setattr(csv_reader, "FIRST_ROWS", 50)  # now the guess is wrong
    for guessed, known in zip(prepare(path, "y")[:2], (train, test), strict=True):
        assert {name: values.tolist() for name, values in guessed.items()} == {
            n: v.tolist() for n, v in known.items()
        }
    assert prepare(path, "y")[2] == summary
    assert summary["kinds"] == {"x": "categorical", "z": "numeric"}


def test_names_of_files_are_no_patterns(mixed_csv, tmp_path):
    path = mixed_csv.rename(tmp_path / "a[1]*?.csv")
    sides = tmp_path / "[b]" / "train*.parquet", tmp_path / "[b]" / "test?.parquet"
    summary = data.prepare(path, "animal", *sides)
    assert [len(data.read_rows(side)["animal"]) for side in sides] == [
        summary["train_rows"],
        summary["test_rows"],
    ]


def test_unknown_columns_in_the_settings_are_told(mixed_csv, tmp_path):
    with pytest.raises(
        UserError, match=r"data\.ignore names columns that are not there: idd.*width"
    ):
        data.prepare(mixed_csv, "animal", tmp_path / "a", tmp_path / "b", ignore=["idd"])


def test_a_failed_write_leaves_the_old_files(mixed_csv, tmp_path, monkeypatch):
    paths = tmp_path / "train.parquet", tmp_path / "test.parquet"
    data.prepare(mixed_csv, "animal", *paths)
    before = [path.read_bytes() for path in paths]
    paths[1].with_name("test.parquet.partial").mkdir()  # writing the second file fails
    with pytest.raises((UserError, duckdb.Error, OSError)):
        data.prepare(mixed_csv, "animal", *paths, split_seed=3)
    assert [path.read_bytes() for path in paths] == before


def test_command_line(mixed_csv, tmp_path):
    command = [
        sys.executable,
        "-m",
        "trainer.data",
        "--csv",
        mixed_csv,
        "--train",
        tmp_path / "a.parquet",
        "--test",
        tmp_path / "b.parquet",
    ]
    done = subprocess.run(
        [*command, "--label", "animal", "--ignore", "id"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert data.read_origin(tmp_path / "a.parquet")["label"] == "animal"
    done = subprocess.run(
        [*command, "--label", "plant"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no label column 'plant'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "rows", "columns", "label"),
    [
        ("digits", 1797, 64, "digit"),
        ("wine", 178, 13, "cultivar"),
        ("breast_cancer", 569, 30, "diagnosis"),
    ],
)
def test_samples_are_real_datasets(name, rows, columns, label, tmp_path):
    path = data.find_csv(f"sample:{name}", tmp_path / "data")
    with path.open() as stream:
        header, *body = csv.reader(stream)
    assert (len(body), len(header) - 1, header[-1]) == (rows, columns, label)
    from sklearn import datasets

    sample = getattr(datasets, f"load_{name}")()
    assert np.array_equal(np.array([row[:-1] for row in body], dtype=float), sample.data)


def test_paths_are_taken_from_the_project_folder(tmp_path):
    assert data.find_csv("data/my.csv", tmp_path / "data") == tmp_path / "data" / "my.csv"


def test_origin_is_kept_with_the_rows(mixed_csv, tmp_path):
    data.prepare(mixed_csv, "animal", tmp_path / "a.parquet", tmp_path / "b.parquet")
    origin = data.read_origin(tmp_path / "a.parquet")
    assert origin == data.read_origin(tmp_path / "b.parquet")
    assert (origin["label"], origin["sha256"]) == (
        "animal",
        hashlib.sha256(mixed_csv.read_bytes()).hexdigest(),
    )
    data.prepare(mixed_csv, "animal", tmp_path / "c.parquet", tmp_path / "d.parquet", split_seed=1)
    assert data.read_origin(tmp_path / "c.parquet")["split"] != origin["split"]
    duckdb.execute(f"COPY (SELECT 1 AS x) TO '{tmp_path / 'other.parquet'}' (FORMAT parquet)")
    with pytest.raises(UserError, match=r"not written by trainer\.data"):
        data.read_rows(tmp_path / "other.parquet")
