"""The command that links a project to its template."""

import json
import shlex

import pytest
import yaml
from core.errors import UserError
from project.template import link_command

COMMIT = "0123456789" * 4
ANSWERS = {"project_name": "O'Brien's \"$HOME\" 🙂", "description": "a\\b"}


@pytest.fixture
def record(project):
    """Write a commit, and nasty answers, into project.yaml."""

    def record(commit):
        path = project / "project.yaml"
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        document["template"] = {"version": "1.0.0", "commit": commit, "answers": ANSWERS}
        path.write_text(yaml.safe_dump(document), encoding="utf-8")

    return record


def test_the_command_names_the_commit_and_all_answers_as_a_shell_reads_them(record):
    record(COMMIT)
    *command, answers = shlex.split(link_command("https://example.com/my template.git"))
    assert command[:3] == ["cruft", "link", "https://example.com/my template.git"]
    assert command[3:] == ["--no-input", "--checkout", COMMIT, "--extra-context"]
    assert json.loads(answers) == ANSWERS


@pytest.mark.parametrize("commit", ["", "unknown", f"{COMMIT}-dirty"])
def test_what_is_no_commit_is_told_with_what_to_do(record, commit):
    record(commit)
    with pytest.raises(
        UserError,
        match=rf"template.commit in project.yaml is '{commit}'.*Write the commit that comes nearest",
    ):
        link_command("https://example.com/template.git")


def test_a_folder_that_is_not_there_is_no_template(record, tmp_path):
    record(COMMIT)
    with pytest.raises(UserError, match="there is no such folder"):
        link_command(str(tmp_path / "nowhere"))
    assert link_command(str(tmp_path)).startswith("cruft link")
    assert link_command("gh:org/template").startswith("cruft link")
