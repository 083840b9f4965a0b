"""Notebooks and modules are one; and they run without a browser."""

import json
import re

import jupytext
import nbformat
import pytest

from project import level0, notebooks, runs
from project.errors import UserError


def edit_notebook(name, old, new):
    path = notebooks.notebook_path(name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def edit_module(name, old, new):
    path = notebooks.module_path(name)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_both_halves_are_shipped_in_step_without_outputs():
    notebooks.require_in_step()
    for name in notebooks.ORDER:
        notebook = nbformat.read(notebooks.notebook_path(name), as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                assert not cell.outputs
                assert cell.execution_count is None


def test_each_notebook_names_its_own_module_only():
    for name in notebooks.ORDER:
        metadata = nbformat.read(notebooks.notebook_path(name), as_version=4).metadata
        assert metadata.jupytext.formats == "level_0_manual///ipynb,src/trainer///py:percent"
        found = jupytext.paired_paths.paired_paths(str(notebooks.notebook_path(name)), "ipynb", metadata.jupytext.formats)
        assert str(notebooks.module_path(name)) in [path for path, _ in found]


def test_an_edited_module_is_noticed_and_synced(project):
    edit_module("model", "min(50,", "min(40,")
    assert notebooks.out_of_step() == ["model"]
    with pytest.raises(UserError, match=r"level_0_manual/model\.ipynb and src/trainer/model\.py.*make sync FROM"):
        notebooks.require_in_step()
    assert notebooks.sync("module") == ["model"]
    assert "min(40," in notebooks.notebook_path("model").read_text()
    assert notebooks.out_of_step() == []


def test_an_edited_notebook_is_noticed_and_synced(project):
    edit_notebook("model", "min(50,", "min(40,")
    assert notebooks.out_of_step() == ["model"]
    assert notebooks.sync("notebook") == ["model"]
    assert "min(40," in notebooks.module_path("model").read_text()
    assert notebooks.out_of_step() == []


def test_the_chosen_side_wins_when_both_were_edited(project):
    edit_module("model", "min(50,", "min(30,")
    edit_notebook("model", "min(50,", "min(40,")
    notebooks.sync("module")
    assert "min(30," in notebooks.notebook_path("model").read_text()
    assert "min(40," not in notebooks.notebook_path("model").read_text()


def test_modification_times_do_not_count(project):
    edit_module("train", "cosine decay", "cosine decay, slowly")
    notebooks.notebook_path("train").touch()  # newer, and yet older in what it says
    assert notebooks.out_of_step() == ["train"]


def test_outputs_and_layout_are_no_difference(project):
    path = notebooks.notebook_path("train")
    notebook = nbformat.read(path, as_version=4)
    for number, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.execution_count = number
        cell.outputs = [nbformat.v4.new_output("stream", text="hello")]
        cell.metadata["collapsed"] = True
    nbformat.write(notebook, path)
    edit_module("train", "\n\n\n# %% [markdown]", "\n\n# %% [markdown]")
    assert notebooks.out_of_step() == []


def test_sync_is_repeatable_and_a_missing_half_is_made(project):
    before = {
        path: path.read_bytes()
        for name in notebooks.ORDER
        for path in (notebooks.notebook_path(name), notebooks.module_path(name))
    }
    for path, content in before.items():
        path.unlink()
        notebooks.sync("module" if path.suffix == ".ipynb" else "notebook")
        assert path.read_bytes() == content


def test_a_file_that_is_no_notebook_is_told(project):
    notebooks.notebook_path("data").write_text("{}")
    with pytest.raises(UserError, match=r"data\.ipynb"):
        notebooks.out_of_step()


@pytest.fixture
def quick(project, monkeypatch):
    """A project on the smallest sample, with short training."""
    monkeypatch.setenv("SET", "data.source=sample:wine data.label=cultivar train.epochs=15 train.batch_size=16")
    return project


def test_level0_leaves_reports_with_pictures_and_a_model(quick, capsys):
    level0.main()
    run = runs.find()
    assert {path.name for path in run.folder.iterdir()} == {
        *(f"{name}.html" for name in notebooks.ORDER),
        *("settings.json", "train.parquet", "test.parquet", "evaluation.json", "model"),
    }
    pictures = {name: (run.folder / f"{name}.html").read_text().count("<img") for name in notebooks.ORDER}
    assert pictures["data"] >= 2
    assert pictures["model"] >= 1
    assert pictures["train"] == 1
    assert pictures["evaluate"] >= 2
    for name in notebooks.ORDER:
        report = (run.folder / f"{name}.html").read_text()
        assert not re.search(r"<script|<link|src=[\"']?http|@import", report)  # it needs no network
        assert "Traceback" not in report
    metrics = json.loads(run.evaluation.read_text())
    assert metrics["accuracy"] > metrics["baseline"]
    assert json.loads(run.settings.read_text())["train"]["epochs"] == 15
    out = capsys.readouterr().out
    assert f"runs/{run.name}/evaluate.html" in out
    assert "make predict" in out
    assert run.name in runs.table("accuracy")


def test_a_wrong_column_is_told_before_anything_runs(quick, monkeypatch):
    monkeypatch.setenv("SET", "data.source=sample:wine data.label=vintage")
    with pytest.raises(UserError, match="no label column 'vintage'"):
        level0.main()
    assert not (quick / "runs").exists()


def test_a_failing_notebook_is_told_with_its_report(quick, monkeypatch):
    (quick / "one_class.csv").write_text("x,y\n1,a\n2,a\n")
    monkeypatch.setenv("SET", "data.source=one_class.csv data.label=y")
    with pytest.raises(UserError, match=r"every row says 'a'[\s\S]*data\.ipynb; the report"):
        level0.main()
    (report,) = (quick / "runs").glob("*/data.html")
    assert "every row says" in report.read_text()
    with pytest.raises(UserError, match="no model is trained yet"):
        runs.find()


def test_a_notebook_run_too_early_names_the_one_before(quick):
    run = runs.current()
    with pytest.raises(UserError, match=r"Run data\.ipynb first"):
        run.require(run.train_data, "data")


def test_runs_are_listed_best_first(project):
    for name, accuracy in (("a", 0.8), ("b", 0.95), ("c", None)):
        folder = project / "runs" / name
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text('{"data": {"source": "x.csv"}, "train": {"epochs": 7}}')
        if accuracy:
            (folder / "evaluation.json").write_text(
                json.dumps({"accuracy": accuracy, "macro_f1": 0.5, "log_loss": 1, "rows": 10})
            )
    lines = runs.table("accuracy").splitlines()
    assert [line.split()[0] for line in lines] == ["run", "b", "a", "c"]
    assert "0.9500" in lines[1]
    assert "not finished" in lines[3]


def test_without_runs_the_way_is_shown(project):
    with pytest.raises(UserError, match="make level0"):
        runs.table("accuracy")
