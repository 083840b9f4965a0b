"""All documented gcloud commands are valid: checked by gcloud's own linter, offline."""

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from gcp.environment import Environment
from level_1_pipeline.vertex import doctor as vertex_doctor

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *PROJECT.rglob("*.md")]
SOURCES = sorted(PROJECT.glob("src/**/*.py")) + sorted(PROJECT.glob("level_*/**/*.py"))
OTHERS = [
    path
    for path in (ROOT / "Makefile", PROJECT / "Makefile", *sorted(PROJECT.glob("level_*/**/*")))
    if path.name.startswith(("Makefile", "Dockerfile", "targets.mk"))
    or path.suffix in (".sh", ".yaml", ".yml", ".tf")
]

FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What ends a command within a sentence.
END = re.compile(r";|, |: |(?<=\w)\.(?=\s|$)| \(| #| && | \| | > | or ")

MENTION = re.compile(r"gcloud( [a-z-]+)+|.*=")


def whole(text: str) -> str:
    """Return the command at the start of a text, with X for placeholders."""
    command = re.sub(r"\{[^{}]*\}|\[[^\]]*\]", "X", text)
    return END.split(command)[0].replace("…", "").strip()


def in_backticks(text: str) -> Iterator[str]:
    for command in re.findall(r"`(gcloud [a-z][^`]*)`", text):
        yield " ".join(command.replace("…", "").split())


def in_page(text: str) -> Iterator[str]:
    """Commands in sentences and code blocks; a backslash joins lines."""
    yield from in_backticks(FENCE.sub("", text))
    for block in FENCE.findall(text):
        yield from in_lines(block)


def in_lines(text: str) -> Iterator[str]:
    """Commands at the start of a line, after a comment sign or a shell prompt."""
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if found := re.match(r"\s*(?:#\s*|\$\s*|@)?(?:\w+=\S+ )*(gcloud [a-z].*)", line):
            yield whole(found[1])


def in_source(text: str) -> Iterator[str]:
    """Commands in messages: in backticks, at the start, or after a colon."""
    for message in messages(ast.parse(text)):
        yield from in_backticks(message)
        yield from (whole(command) for command in re.findall(r"(?:^|: )(gcloud [a-z].*)", message))


def messages(tree: ast.AST) -> Iterator[str]:
    """The texts of a program, with X for values."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.JoinedStr):
            parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        else:
            yield from messages(node)


def commands() -> dict[str, str]:
    """Command → the file that contains it."""
    found: dict[str, str] = {}
    for paths, reader in (
        (PAGES, in_page),
        (SOURCES, in_source),
        (OTHERS, in_lines),
        (OTHERS, in_backticks),
    ):
        for path in paths:
            for command in reader(path.read_text(encoding="utf-8")):
                found.setdefault(command, path.relative_to(ROOT).as_posix())
    return found


def normalize(command: str) -> str:
    """Insert a project ID, and move --recursive to the end: the linter takes the next word for its value."""
    command = re.sub(
        r"--project=(?:X|[A-Z]+|\$\{local\.project\})(?=\s|$)", "--project=my-project", command
    )
    return re.sub(r"(.*) --recursive( .*)", r"\1\2 --recursive", command)


def problems(written: list[str], folder: Path) -> dict[str, str]:
    """Command → gcloud's error message; one process for all."""
    if shutil.which("gcloud") is None:
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    file = folder / "commands.json"
    file.write_text(
        json.dumps([{"command_string": normalize(command)} for command in written]),
        encoding="utf-8",
    )
    done = subprocess.run(
        ["gcloud", "meta", "lint-gcloud-commands", f"--commands-file={file}"],
        env={
            **os.environ,
            "CLOUDSDK_CONFIG": str(folder / "gcloud"),
            "CLOUDSDK_CORE_DISABLE_PROMPTS": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    judged = json.loads(done.stdout)
    assert len(judged) == len(written)
    said = {
        command: judgement["error_message"]
        for command, judgement in zip(written, judged, strict=True)
    }
    # A bare command name, or one that ends in =, is only mentioned.
    return {
        command: error
        for command, error in said.items()
        if error and not (MENTION.fullmatch(command) and error.endswith("Must be specified."))
    }


def test_documented_commands_are_valid(tmp_path: Path) -> None:
    found = commands()
    wrong = problems(list(found), tmp_path)
    assert not wrong, "\n".join(
        f"{found[command]}: {command}\n    {error}" for command, error in wrong.items()
    )


def test_invalid_commands_are_found(tmp_path: Path) -> None:
    page = "Type `gcloud storage buckets creat gs://B`.\n\n```bash\ngcloud ai endpoints list \\\n    --region=R --bogus  # no\n```\n"
    source = 'raise E(f"it failed. Type: gcloud services enabel {api}; then again")\nmend = "gcloud projects lst" "s, and more"\n'
    makefile = "# `gcloud auth logon` and so on\nrun:\n\t@gcloud builds submitt .\n"
    written = [*in_page(page), *in_source(source), *in_backticks(makefile), *in_lines(makefile)]
    assert written == [
        "gcloud storage buckets creat gs://B",
        "gcloud ai endpoints list --region=R --bogus",
        "gcloud services enabel X",
        "gcloud projects lsts",
        "gcloud auth logon",
        "gcloud builds submitt .",
    ]
    assert set(problems([*written, "gcloud projects list"], tmp_path)) == set(written)


def test_documentation_and_make_doctor_show_the_same_commands() -> None:
    """The commands that create the bucket and the repository."""
    where = Environment("dev", "NAME", "PROJECT", "REGION", "", "", "", "", "", "", by_hand=True)
    wanted = {
        vertex_doctor.create_bucket(where, "BUCKET"),
        vertex_doctor.create_repository(where, "NAME"),
    }
    for page in (ROOT / "docs" / "level-1-cloud.md", PROJECT / "level_1_pipeline" / "README.md"):
        assert wanted <= set(in_page(page.read_text(encoding="utf-8"))), page
