"""The saved model: whole or not at all, and the same answers from torch and from ONNX."""

import json
import math

import numpy as np
import pytest
import torch

from core import manifest
from core.errors import UserError
from core.onnx_model import Model
from trainer import export
from trainer.data import read_rows


def test_onnx_answers_as_torch_does(trained):
    network, schema = export.load(trained / "model")
    model = Model.load(trained / "model")
    table = {name: list(values) for name, values in read_rows(trained / "test.parquet").items()}
    for name, value in (
        ("width", math.nan),
        ("width", 1e308),
        ("colour", "never seen"),
        ("colour", None),
    ):
        table = {
            other: [*values, value if other == name else values[0]]
            for other, values in table.items()
        }
    with torch.inference_mode():
        expected = network(torch.from_numpy(schema.encode(table))).softmax(dim=1).numpy()
    answered = model.probabilities(table)
    assert len(answered) > 50
    assert np.abs(answered - expected).max() < 1e-5
    assert np.allclose(answered.sum(axis=1), 1)
    for size in (1, 7):
        part = {name: values[:size] for name, values in table.items()}
        assert np.abs(model.probabilities(part) - expected[:size]).max() < 1e-5


def test_the_manifest_says_where_the_model_came_from(trained, options):
    document = json.loads((trained / "model" / "model.json").read_text())
    assert document["data_sha256"] == manifest.sha256(trained / "animals.csv")
    assert document["hyperparameters"]["epochs"] == options.epochs
    assert set(document["files"]) == {"model.safetensors", "model.onnx", "metrics.json"}
    assert [column["name"] for column in document["schema"]["columns"]] == [
        "width",
        "height",
        "colour",
    ]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_manifest(change):
    def edit(folder):
        path = folder / "model.json"
        document = json.loads(path.read_text())
        change(document)
        path.write_text(json.dumps(document))

    return edit


TAMPERING = {
    "no manifest": (lambda folder: (folder / "model.json").unlink(), "no saved model"),
    "empty manifest": (
        lambda folder: (folder / "model.json").write_text(""),
        "not a model's manifest",
    ),
    "manifest is a list": (
        lambda folder: (folder / "model.json").write_text("[]"),
        "not a model's manifest",
    ),
    "half a manifest": (
        lambda folder: (folder / "model.json").write_text(
            (folder / "model.json").read_text()[:100]
        ),
        "not a model's manifest",
    ),
    "weights changed": (
        lambda folder: flip_a_byte(folder / "model.safetensors"),
        r"model\.safetensors was changed",
    ),
    "graph changed": (
        lambda folder: flip_a_byte(folder / "model.onnx"),
        r"model\.onnx was changed",
    ),
    "truncated": (
        lambda folder: (folder / "model.onnx").write_bytes(b"x"),
        r"model\.onnx has 1 bytes instead of",
    ),
    "file missing": (
        lambda folder: (folder / "metrics.json").unlink(),
        r"metrics\.json is missing",
    ),
    "file added": (
        lambda folder: (folder / "extra.pkl").write_bytes(b"x"),
        r"extra\.pkl is not in the manifest",
    ),
    "path outside": (
        edit_manifest(lambda d: d["files"].update({"../x": {"bytes": 1, "sha256": ""}})),
        "not a model's manifest",
    ),
    "newer format": (edit_manifest(lambda d: d.update(format=99)), "format 99"),
}


@pytest.mark.parametrize("case", TAMPERING)
def test_a_damaged_model_is_refused(case, model_copy):
    damage, message = TAMPERING[case]
    damage(model_copy)
    for load in (export.load, Model.load):
        with pytest.raises(UserError, match=message):
            load(model_copy)


def test_saving_is_whole_or_nothing(trained, model_copy, monkeypatch):
    network, schema = export.load(trained / "model")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(export, "to_onnx", fail)
    with pytest.raises(OSError, match="disk full"):
        export.save(model_copy, network, schema, {}, {})  # over an older model
    with pytest.raises(UserError, match="no saved model"):
        Model.load(model_copy)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.json"
    manifest.write_json(path, {"old": 1})
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match=r"x\.json cannot be written: disk full"):
        manifest.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [path]
