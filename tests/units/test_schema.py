"""What a row is, for training and for serving alike."""

import json
import math

import numpy as np
import pytest
from core.errors import UserError
from core.schema import Column, Schema

SCHEMA = Schema(
    "y",
    (
        Column("size", "numeric"),
        Column("age", "numeric", optional=True),
        Column("colour", "categorical", True, ("blue", "red")),
    ),
    ("no", "yes"),
)


def test_rows_become_one_matrix_in_the_columns_order():
    table = {
        "colour": ["red", " blue ", "green", None],
        "size": ["1", 2, 3.5, np.float32(4)],
        "age": ["", None, "NA", 7],
        "other": [0] * 4,
    }
    expected = [[1, math.nan, 2], [2, math.nan, 1], [3.5, math.nan, 0], [4, 7, 0]]
    assert np.array_equal(SCHEMA.encode(table), np.array(expected), equal_nan=True)


def test_a_category_that_looks_like_a_number_may_arrive_as_one():
    schema = Schema("y", (Column("c", "categorical", False, ("7", "8.5", "x")),), ("no", "yes"))
    assert schema.encode({"c": [7, 7.0, "7", 8.5, "x", 9]}).ravel().tolist() == [1, 1, 1, 2, 3, 0]


def test_plain_numbers_are_read_like_their_text():
    """All numeric columns at once, or cell by cell: the same matrix."""
    chance = np.random.default_rng(0)
    numbers = [
        *chance.normal(scale=10.0 ** chance.integers(-300, 300, 200)).tolist(),
        0,
        -0.0,
        2**70,
        -(2**60) - 1,
        5e-324,
    ]
    gaps = [None if number % 3 == 0 else value for number, value in enumerate(numbers)]
    plain = SCHEMA.encode({"size": numbers, "age": gaps, "colour": ["red"] * len(numbers)})
    text = SCHEMA.encode(
        {
            "size": list(map(repr, numbers)),
            "age": list(map(str, gaps)),
            "colour": ["red"] * len(numbers),
        }
    )
    assert np.array_equal(plain, text, equal_nan=True)
    assert np.isnan(plain[:, 1]).sum() == sum(value is None for value in gaps)


def test_an_optional_column_may_be_left_out():
    assert np.array_equal(
        SCHEMA.encode({"size": [1, 2]}),
        np.array([[1, math.nan, 0], [2, math.nan, 0]]),
        equal_nan=True,
    )


@pytest.mark.parametrize(
    ("table", "fragments"),
    [
        ({"age": [1]}, ["not in the data: size"]),
        ({"size": [1, "abc"]}, ["row 2", "column 'size'", "'abc'"]),
        ({"size": [1, ""]}, ["row 2", "column 'size'", "missing"]),
        ({"size": [1, math.nan]}, ["row 2", "column 'size'", "missing"]),
        ({"size": [1, None], "age": [1, math.inf]}, ["row 2", "column 'size'", "missing"]),
        (
            {"size": [1, 2], "age": [None, -math.inf]},
            ["row 2", "column 'age'", "-inf is not a finite number"],
        ),
        ({"size": [math.inf]}, ["row 1", "column 'size'", "finite"]),
        ({"size": np.array([1.0, math.inf])}, ["row 2", "column 'size'", "finite"]),
        ({"size": [True]}, ["row 1", "True"]),
        ({"size": [[1]]}, ["row 1", "[1]"]),
        ({"size": [10**400]}, ["row 1", "column 'size'"]),
        ({"size": [1], "colour": [{}]}, ["row 1", "column 'colour'"]),
    ],
)
def test_a_wrong_value_is_named(table, fragments):
    with pytest.raises(UserError) as told:
        SCHEMA.encode(table)
    for fragment in fragments:
        assert fragment in str(told.value)


def test_labels_become_positions():
    assert SCHEMA.encode_labels(["yes", "no", "yes"]).tolist() == [1, 0, 1]
    assert Schema("y", (), (3, 12)).encode_labels([12, "3"]).tolist() == [1, 0]
    with pytest.raises(UserError, match=r"row 2, label 'y': 'maybe' is none of the 2 classes"):
        SCHEMA.encode_labels(["yes", "maybe"])


def test_json_and_back():
    assert Schema.from_json(json.loads(json.dumps(SCHEMA.to_json()))) == SCHEMA


def test_pixels_in_order_are_an_image():
    names = [f"pixel_{row}_{column}" for row in range(2) for column in range(3)]
    assert Schema("y", tuple(Column(name, "numeric") for name in names), (0, 1)).image_shape == (
        2,
        3,
    )
    assert (
        Schema("y", tuple(Column(name, "numeric") for name in names[::-1]), (0, 1)).image_shape
        is None
    )
    assert SCHEMA.image_shape is None
