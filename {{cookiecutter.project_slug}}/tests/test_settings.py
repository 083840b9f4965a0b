"""project.yaml: read as it is, and refused with the key and the rule."""

import contextlib
import re
from pathlib import Path

import pydantic
import pytest
import yaml

from core.errors import UserError
from project.settings import load_settings
from tests.conftest import ROOT


def test_the_project_file_is_valid():
    with contextlib.chdir(ROOT):
        settings = load_settings("")
    assert settings.name
    assert settings.cloud.environments
    assert settings.cloud.train.jobs


def test_overrides_hold_for_one_run(project):
    assert (
        load_settings(
            "hyperparameters.epochs=3 hyperparameters.learning_rate=1e-2 data.ignore=[a,b]"
        ).hyperparameters.epochs
        == 3
    )
    changed = load_settings("hyperparameters.learning_rate=1e-2 data.ignore=[a,b]")
    assert changed.hyperparameters.learning_rate == 0.01
    assert changed.data.ignore == ("a", "b")
    assert load_settings("").hyperparameters.epochs != 3


def test_the_set_variable_is_read(project, monkeypatch):
    monkeypatch.setenv("SET", "hyperparameters.dropout=0.25")
    assert load_settings().hyperparameters.dropout == 0.25


def test_settings_are_frozen(settings):
    with pytest.raises(pydantic.ValidationError):
        settings.data.label = "x"


CHANGES = {
    "unknown key": (
        "hyperparameters.epoch",
        3,
        ["hyperparameters.epoch", "no such key", "did you mean 'epochs'"],
    ),
    "misspelt": ("hyperparameters", {"epoch": 3}, ["epoch: there is no such key"]),
    "unknown block": ("clout", {}, ["clout", "did you mean 'cloud'"]),
    "unknown key below": (
        "cloud.serve.machin",
        "x",
        ["cloud.serve.machin", "did you mean 'machine'"],
    ),
    "unknown key of an environment": (
        "cloud.environments.dev.buket",
        "x",
        ["dev.buket", "did you mean 'bucket'"],
    ),
    "a bucket's address": (
        "cloud.environments.dev.bucket",
        "gs://b",
        ["dev.bucket", "without gs://"],
    ),
    "a project's number": (
        "cloud.environments.dev.project",
        "123456789",
        ["dev.project", "not its number"],
    ),
    "files gathered without rows in a bucket": (
        "cloud.events.batch_window_minutes",
        30,
        ["batch_window_minutes", "gs://", "Allowed here: 0"],
    ),
    "no list": ("cloud.train.jobs", "cpu", ["cloud.train.jobs", "a list, such as [a, b]"]),
    "wrong type": (
        "hyperparameters.epochs",
        "many",
        ["hyperparameters.epochs", "valid integer", "'many'"],
    ),
    "a truth value for a number": (
        "hyperparameters.epochs",
        True,
        ["hyperparameters.epochs", "True"],
    ),
    "a truth value for a share": (
        "gate.max_regression",
        True,
        ["gate.max_regression", "should be a number", "True"],
    ),
    "a truth value for a rate": (
        "hyperparameters.learning_rate",
        True,
        ["hyperparameters.learning_rate", "should be a number"],
    ),
    "out of range": ("gate.threshold", 1.5, ["gate.threshold", "less than or equal to 1", "1.5"]),
    "negative": (
        "hyperparameters.learning_rate",
        -1,
        ["hyperparameters.learning_rate", "greater than 0"],
    ),
    "no such choice": ("gate.metric", "rmse", ["gate.metric", "'accuracy' or 'macro_f1'"]),
    "no such sample": ("data.source", "sample:mnist", ["data.source", "sample:digits"]),
    "ignored label": ("data.ignore", ["digit"], ["data.ignore", "label"]),
    "a number as a name": ("data.label", 3, ["data.label", "quotes"]),
    "replicas upside down": ("cloud.serve.replicas", [3, 1], ["cloud.serve.replicas"]),
    "no environment": ("cloud.environments", {}, ["cloud.environments"]),
    "missing": ("data", None, ["data"]),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_wrong_key_or_value_is_told(case, project):
    path, value, fragments = CHANGES[case]
    document = yaml.safe_load((project / "project.yaml").read_text())
    document["data"]["label"] = "digit"
    *parents, key = path.split(".")
    block = document
    for parent in parents:
        block = block[parent]
    block[key] = value
    (project / "project.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(UserError) as told:
        load_settings("")
    for fragment in fragments:
        assert fragment in str(told.value)


def test_all_mistakes_are_told_at_once(project):
    with pytest.raises(UserError) as told:
        load_settings("hyperparameters.epochs=0 gate.max_regression=2")
    assert "hyperparameters.epochs" in str(told.value)
    assert "gate.max_regression" in str(told.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("- a", "mapping"),
        ("a: [", "not valid YAML"),
        ("name: a\nname: b", "'name' stands twice"),
    ],
)
def test_a_file_that_is_no_settings(project, text, message):
    (project / "project.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_settings("")


@pytest.mark.parametrize(
    "overrides",
    [
        "epochs",
        "hyperparameters.epochs",
        "nope.x=1",
        "hyperparameters.epochs.x=1",
        "=3",
        "hyperparameters.epochs='5",
    ],
)
def test_a_malformed_override_is_told(project, overrides):
    with pytest.raises(UserError, match="SET"):
        load_settings(overrides)


def test_an_unknown_override_is_told(project):
    with pytest.raises(
        UserError, match=r"hyperparameters\.epoch: there is no such key; did you mean 'epochs'"
    ):
        load_settings("hyperparameters.epoch=3")


def test_outside_a_project_the_way_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no project\.yaml"):
        load_settings("")


def test_a_name_that_cannot_be_one_is_told_in_words(project):
    text = Path("project.yaml").read_text(encoding="utf-8")
    Path("project.yaml").write_text(
        re.sub(r"(?m)^name: .*$", "name: My Project", text), encoding="utf-8"
    )
    with pytest.raises(
        UserError, match=r"name: should be 3 to 20 of a-z, 0-9 and -.*it is 'My Project'"
    ):
        load_settings("")


def test_alerts_go_to_an_address():
    with pytest.raises(UserError, match=r"cloud\.alerts: should be an e-mail address"):
        load_settings("cloud.alerts=nobody")


def test_a_misspelt_block_is_guessed():
    with pytest.raises(UserError, match=r"did you mean 'hyperparameters\.epochs'\?"):
        load_settings("hyperparamters.epochs=3")
