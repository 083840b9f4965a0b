"""Any CSV file is refused with one message, or prepared, trained on, served; hypothesis makes the files."""

import contextlib
import csv
import hashlib
import io
import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from core.errors import UserError
from core.onnx_model import Model
from core.schema import BLANKS, parse_number
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from predictor import contract
from trainer import csv_reader, data, distributed, export
from trainer.config import Hyperparameters
from trainer.model import Network
from trainer.train import fit

pytestmark = pytest.mark.heavy

QUICK = Hyperparameters(seed=0, threads=1, epochs=2, batch_size=64, learning_rate=0.01)
NEAR_NUMBERS = ["1,5", "1_000", "0x1F", "--1", "1 2", "1e", "١", "inf", "1d"]
AWKWARD = [
    'says "no"',
    "two\nlines",
    "a, b",
    "'",
    "x\r\ny",
    '"',
    "a;b",
    "\\",
    "ÄÖ",
    "日本🙂",
    "NULL",
    "#",
    "%s {0}",
]

# Each kind of column: a cell for a row's number.
KINDS: dict[str, Callable[[random.Random, int], object]] = {
    "integers": lambda chance, row: chance.randint(-50, 50),
    "floats": lambda chance, row: f"{chance.gauss(0, 3):.17g}",
    "huge": lambda chance, row: chance.choice(
        ["1e308", "-1e308", "1.7e308", "5e-324", "0", "-0.0"]
    ),
    "tiny": lambda chance, row: chance.choice(["5e-324", "1e-310", "2e-323"]),
    "one far out": lambda chance, row: "1e300" if row == 3 else chance.random(),
    "written oddly": lambda chance, row: chance.choice(
        ["+3", ".5", "1.", "1E-3", "00.5", " 7", "8 ", "\t9"]
    ),
    "codes": lambda chance, row: f"{chance.randint(0, 40):05d}",
    "signed codes": lambda chance, row: chance.choice(["-01", "+02", "5"]),
    "categories": lambda chance, row: chance.choice(["red", " green", "blue ", "light grey"]),
    "dates": lambda chance, row: f"2026-{chance.randint(1, 12):02d}-{chance.randint(1, 28):02d}",
    "near numbers": lambda chance, row: chance.choice([*NEAR_NUMBERS, "12"]),
    "a mistake": lambda chance, row: "12o" if row == 37 else row,
    "numbers, then text": lambda chance, row: row if row < 30 else f"t{row % 3}",
    "text": lambda chance, row: chance.choice(AWKWARD),
    "ids": lambda chance, row: f"id-{row}",
    "constant": lambda chance, row: "7",
    "truth": lambda chance, row: chance.choice(["true", "false"]),
    "missing in words": lambda chance, row: chance.choice(["NA", "null", "?", "nan", "3", "4"]),
}
NAMES = [
    "a",
    "größe",
    'a "b"',
    "select",
    "x y",
    "💡",
    "a,b",
    "'; drop",
    "{0}",
    "%s",
    "1",
    "[x]*",
]


@dataclass(frozen=True)
class Table:
    """A CSV file to be: a header, rows of cells, and how they are written."""

    names: list[str]
    rows: list[list[str]]
    line_end: str
    mark: bool
    quote_all: bool
    blank_lines: bool

    def write(self, path: Path) -> Path:
        text = io.StringIO()
        quoting = csv.QUOTE_ALL if self.quote_all else csv.QUOTE_MINIMAL
        writer = csv.writer(text, lineterminator=self.line_end, quoting=quoting)
        writer.writerow(self.names)
        for number, row in enumerate(self.rows):
            writer.writerow(row)
            if self.blank_lines and number % 7 == 5:
                text.write(self.line_end)
        path.write_bytes(text.getvalue().encode("utf-8-sig" if self.mark else "utf-8"))
        return path


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """The shape is drawn, so that it shrinks; the cells follow from a seed."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=5))
    shares = [draw(st.sampled_from([0, 0, 0, 0.02, 0.1, 0.1, 0.5, 0.5, 0.97, 1])) for _ in kinds]
    names = draw(
        st.lists(st.sampled_from(NAMES), min_size=len(kinds), max_size=len(kinds), unique=True)
    )
    classes = draw(st.sampled_from([2, 2, 2, 3, 5, 10, 100, 1000, 1001]))
    rows = draw(st.integers(0, 250)) + (6 * classes if classes > 5 else 0)
    dominating = draw(st.booleans())
    label_form = draw(st.sampled_from(["{}", "class {}", "0{}", "{}.5", 'ü"{}', " {} "]))
    table = []
    for row in range(rows):
        cells = [
            "" if chance.random() < share else str(KINDS[kind](chance, row))
            for kind, share in zip(kinds, shares, strict=True)
        ]
        number = row % classes if classes > 5 else chance.randrange(classes)
        table.append(
            [*cells, label_form.format(0 if dominating and row % 3 and classes < 10 else number)]
        )
    if draw(st.booleans()):
        table += table[: len(table) // 2]  # rows that stand twice
    flags = [draw(st.booleans()) for _ in range(3)]
    return Table([*names, "the label"], table, draw(st.sampled_from(["\n", "\r\n"])), *flags)


def clean(cell: str) -> str | None:
    return cell.strip(BLANKS) or None


def expected(table: Table, kinds: dict[str, str]) -> tuple[Counter[Any], Counter[Any]]:
    """The rows of both sides as plain Python would read and divide them."""
    sides: tuple[Counter[Any], Counter[Any]] = Counter(), Counter()
    names = [name.strip(BLANKS) for name in table.names]
    for cells in table.rows:
        row = dict(zip(names, map(clean, cells), strict=True))
        text = "\x1f".join(["0", *(row[name] or "" for name in sorted(names))])
        in_test = int(hashlib.md5(text.encode()).hexdigest()[:8], 16) < round(0.2 * 16**8)
        sides[in_test][tuple(repr(_value(row[name], kinds.get(name))) for name in names)] += 1
    return sides


def _value(cell: str | None, kind: str | None) -> float | str | None:
    return parse_number(cell) if kind == "numeric" else cell


def found(path: Path, names: list[str]) -> Counter[Any]:
    rows = data.read_rows(path)
    return Counter(
        zip(*(map(repr, rows[name.strip(BLANKS)].tolist()) for name in names), strict=True)
    )


def prepare(table: Table, folder: Path) -> dict[str, Any] | None:
    """What `prepare` says; None when the file was refused as it should be."""
    path, out = table.write(folder / "any.csv"), folder / "out"
    try:
        return data.prepare(path, "the label", out / "train.parquet", out / "test.parquet")
    except UserError as error:
        told = str(error)
        assert "\n" not in told
        assert "any.csv" not in told, told  # the file itself is sound
        assert len(told) < 600
        assert not list(out.iterdir())
        return None


def train(folder: Path) -> tuple[Network, Any]:
    """A network after two epochs, and its schema."""
    schema, rows = (
        data.read_schema(folder / "train.parquet"),
        data.read_rows(folder / "train.parquet"),
    )
    network = Network(schema)
    features, labels = schema.encode(rows), schema.encode_labels(rows[schema.label])
    with contextlib.redirect_stdout(io.StringIO()):  # the progress bar
        fit(network, features, labels, QUICK, distributed.Runtime(torch.device("cpu")))
    for name, values in network.state_dict().items():
        assert values.isfinite().all(), name
    return network, schema


def unseen(schema: Any) -> dict[str, Any]:
    """A row that training never saw: new categories, far numbers, and nothing where that is allowed."""
    row: dict[str, Any] = {}
    for column in schema.columns:
        if not column.optional:
            row[column.name] = -1.7e308 if column.kind == "numeric" else "never seen"
    return row


def ask(model: Model, row: dict[str, Any]) -> list[dict[str, Any]]:
    """What the server answers to one row."""
    answer = json.loads(contract.answer(model, 1, json.dumps({"instances": [row]}).encode()))
    predictions: list[dict[str, Any]] = answer["predictions"]
    return predictions


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[], Path]:
    """A new folder for each example."""
    count = iter(range(10**9))

    def make() -> Path:
        path = tmp_path / str(next(count))
        (path / "out").mkdir(parents=True)
        return path

    return make


def check_answers(network: Network, schema: Any) -> None:
    with torch.inference_mode():
        row = {name: [value] for name, value in unseen(schema).items()} or {
            schema.columns[0].name: [None]
        }
        probabilities = network(torch.from_numpy(schema.encode(row))).softmax(dim=1)
    assert probabilities.isfinite().all()
    for column in schema.columns:
        if not column.optional:
            with pytest.raises(UserError) as told:
                schema.encode({**row, column.name: [None]})
            assert f"column '{column.name}'" in str(told.value)


settings.register_profile(
    "any", deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
RELAXED = settings.get_profile("any")


def test_any_file_is_told_or_trained_on(
    folder: Callable[[], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: Counter[str] = Counter()

    @settings(RELAXED, max_examples=150)
    @given(tables(), st.sampled_from([0, 20, 10_000]))
    def check(table: Table, first_rows: int) -> None:
        monkeypatch.setattr(csv_reader, "FIRST_ROWS", first_rows)  # a guess that must not matter
        at = folder()
        summary = prepare(table, at)
        outcomes["told" if summary is None else "trained"] += 1
        if summary is None:
            return
        paths = at / "out" / "train.parquet", at / "out" / "test.parquet"
        assert tuple(found(path, table.names) for path in paths) == expected(
            table, summary["kinds"]
        )
        try:
            network, schema = train(at / "out")
        except UserError as error:
            assert "too few to hold any back" in str(error)
            return
        check_answers(network, schema)

    check()
    assert min(outcomes["told"], outcomes["trained"]) > 0.2 * outcomes.total(), outcomes


def test_any_model_is_saved_and_served_as_it_was_trained(folder: Callable[[], Path]) -> None:
    served = 0

    @settings(RELAXED, max_examples=80)
    @given(tables())
    def check(table: Table) -> None:
        nonlocal served
        at = folder()
        if served == 8 or prepare(table, at) is None:
            return
        try:
            network, schema = train(at / "out")
        except UserError:
            return
        export.save(at / "model", network, schema, {}, {})
        model = Model.load(at / "model")
        rows = data.read_rows(at / "out" / "test.parquet")
        rows = {name: values[:20] for name, values in rows.items()}
        try:
            features = schema.encode(rows)
        except UserError as error:
            assert "training never saw this column without a value" in str(error)
        else:
            with torch.inference_mode():
                as_trained = network(torch.from_numpy(features)).softmax(dim=1).numpy()
            np.testing.assert_allclose(model.probabilities(rows), as_trained, atol=1e-5)
        row = unseen(schema)
        (prediction,) = ask(model, row)
        assert prediction["label"] in schema.classes
        assert math.isfinite(prediction["score"])
        for name in row:  # all that training never saw missing
            with pytest.raises(contract.BadRequest, match=re.escape(name)):
                ask(model, {other: value for other, value in row.items() if other != name})
        served += 1

    check()
    assert served == 8


def test_a_table_may_be_wide(tmp_path: Path) -> None:
    header = [f"pixel_{row}_{column}" for row in range(28) for column in range(28)]
    rows = [[(number * environment) % 256 for environment in range(784)] for number in range(300)]
    with (tmp_path / "wide.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([[*header, "digit"], *([*row, row[7] % 10] for row in rows)])
    sides = tmp_path / "train.parquet", tmp_path / "test.parquet"
    summary = data.prepare(tmp_path / "wide.csv", "digit", *sides)
    assert summary["kinds"] == dict.fromkeys(header, "numeric")
    tables = [data.read_rows(side) for side in sides]
    found = np.concatenate([np.stack([table[name] for name in header], axis=1) for table in tables])
    assert sorted(found.tolist()) == sorted(np.array(rows, dtype=float).tolist())
