"""Any combination of answers gives a complete project, or no project and an error message.

Each run tests the same 500 sets of answers. To test others:

    .venv/bin/python -m pytest tests/test_any_answers.py --hypothesis-profile=explore
"""

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from cookiecutter.exceptions import FailedHookException
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from project.settings import load_settings

from tests.projects import (
    RENDERED,
    assert_all_parse,
    assert_copied,
    assert_given_back,
    expected_files,
    files,
    template_files,
)

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text(encoding="utf-8"))
CHOICES = {
    name: value for name, value in QUESTIONS.items() if name[0] != "_" and isinstance(value, list)
}

# ── valid answers ───────────────────────────────────────────────────────────────────────────

# Text with a meaning in YAML, TOML, Markdown, HTML, Jinja or a shell; and difficult scripts.
NASTY = [
    *(
        '"',
        "'",
        '"""',
        "'''",
        "\\",
        "\\n",
        "\\u0041",
        '\\"',
        ": ",
        " #",
        "- ",
        "? ",
        "& ",
        "* ",
        "! ",
        "| ",
    ),
    *(
        "{",
        "}",
        "}}",
        "%}",
        "#}",
        "[",
        "]",
        "[[",
        "${HOME}",
        "$(id)",
        "`id`",
        "; ",
        "%",
        "@",
        "~",
        "<b>",
        ">",
    ),
    *(
        "&amp;",
        "null",
        "yes",
        "1e3",
        "0x1",
        "2026-01-01",
        "...",
        "---",
        'commit: ""',
        "--no-input",
        "../",
    ),
    *(
        "قارئ",
        "שלום",
        "数字",
        "می\u200cخوانم",
        "👩‍👩‍👧",
        "🏳️‍🌈",
        "\u00a0",
        "\u3000",
        "e\u0301",
        "ﬁ",
        "𝔘",
    ),
]
VISIBLE = st.characters(exclude_categories=["C", "Zl", "Zp"])
LOCAL, DOMAIN = r"[a-zA-Z0-9_%+'-]{1,9}", r"[a-z0-9]{1,9}"


def line(limit: int, without: str = "") -> st.SearchStrategy[str]:
    """One line of visible characters, with special ones."""
    pieces = st.lists(
        st.sampled_from(NASTY) | st.text(VISIBLE, max_size=8), min_size=1, max_size=30
    )
    text = pieces.map(
        lambda pieces: "".join(c for c in "".join(pieces) if c not in without)[:limit].strip()
    )
    return text.filter(lambda text: text and not re.search("{[{%#]", text))


GOOD: dict[str, st.SearchStrategy[str]] = {
    "project_name": line(60, without="<>`|*[]#\\"),
    "project_slug": st.from_regex("[a-z][a-z0-9-]{1,18}[0-9]", fullmatch=True),
    "description": line(200),
    "author_name": line(60),
    "author_email": st.from_regex(
        rf"{LOCAL}(\.{LOCAL})?@({DOMAIN}\.){{1,3}}[a-z]{{2,9}}", fullmatch=True
    ),
    **{question: st.sampled_from(choices) for question, choices in CHOICES.items()},
}

# ── answers that may be invalid ─────────────────────────────────────────────────────────────────────────────

HIDDEN = [
    *("\n", "\r", "\t", "\0", "\x1b[31m", "\x85", "\ud83d", "\ufeff", "\uffff"),
    *("\u2028", "\u202e", "\u2066", "\u200b"),
]
JINJA = [
    *("{{", "{%", "{#", "{{ 7 * 7 }}", "{{ nothing }}", "{% nonsense %}", "{# gone #}"),
    *("{{ cookiecutter.gpu }}", "{% if 1 %}x{% endif %}"),
]
ANY_TEXT = st.one_of(
    st.text(),
    st.lists(st.sampled_from(HIDDEN + JINJA + NASTY) | st.text(max_size=8), max_size=8).map(
        "".join
    ),
    st.sampled_from(["", " ", " padded ", "x" * 61, "x" * 201, "🙂" * 100_000]),
)
BAD_SLUGS = st.sampled_from(
    ["torch", "con", "a-google", "Reader", "9a", "-a", "a-", "a/b", "ab", "a" * 300]
)
BAD_CHOICES = st.sampled_from(["", "k80", "L4", "mit", " l4", "gitlab\n", "{{ 1 }}", "l4,t4"])


def stays_inside(slug: str) -> bool:
    """Paths outside the output folder are tested in test_answers.py."""
    return not slug.startswith("/") and ".." not in slug


ANY: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(
        ["project_name", "description", "author_name"], ANY_TEXT | st.none() | st.booleans()
    ),
    "project_slug": (ANY_TEXT | BAD_SLUGS).filter(stays_inside),
    "author_email": ANY_TEXT | st.emails(),
    **dict.fromkeys(CHOICES, BAD_CHOICES | st.text(max_size=5)),
}


@st.composite
def answers(draw: st.DrawFn) -> tuple[dict[str, Any], set[str]]:
    """Draw answers, and the set of questions whose answers may be invalid (often empty)."""
    values = {question: draw(valid) for question, valid in GOOD.items()}
    doubtful: set[str] = set()
    if draw(st.booleans()):
        doubtful = draw(st.sets(st.sampled_from(list(ANY)), min_size=1, max_size=4))
    values.update({question: draw(ANY[question]) for question in sorted(doubtful)})
    return values, doubtful


# ── assertions ───────────────────────────────────────────────────────────────────────────────────────


def assert_complete(project: Path, template: Path, answers: dict[str, Any]) -> None:
    """Every file is present and valid, and contains the answers."""
    assert files(project) == expected_files(template, answers)
    assert_copied(project, template)
    assert_all_parse(project, RENDERED & files(project))
    assert_given_back(project, answers)
    with contextlib.chdir(project):
        assert load_settings("").description == answers["description"]
    lint(project)


def lint(project: Path) -> None:
    """Ruff accepts the project with its own configuration."""
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    done = subprocess.run(ruff, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def assert_rejected(
    error: Exception, message: str, answers: dict[str, Any], doubtful: set[str]
) -> None:
    """The message names only answers that may be invalid."""
    if isinstance(error, FailedHookException):
        named = set(re.findall(r"^  (\w+): ", message, re.MULTILINE))
        assert named
        assert named <= doubtful
        assert "Traceback" not in message.split("Run the command again", maxsplit=1)[0]
        return
    # cookiecutter itself rejects an unknown choice, invalid Jinja, and a slug that cannot be a folder.
    assert str(error)
    wrong = {question for question in CHOICES if answers[question] not in CHOICES[question]}
    if wrong:
        assert any(question in str(error) for question in wrong)
    elif not any("{" in str(answers[question]) for question in doubtful):
        assert "project_slug" in doubtful


@pytest.fixture(scope="module")
def copied_files(template: Path, default_project: Path) -> None:
    """Check the copied files once: they are the same in every project."""
    lint(default_project)
    copied = template_files(template) - RENDERED
    assert_all_parse(template, copied)
    for path in copied:
        if path.endswith(".py"):
            compile((template / path).read_bytes(), path, "exec")


@pytest.mark.heavy
@pytest.mark.usefixtures("copied_files")
@given(answers())
@settings(
    max_examples=500,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_any_answers_give_a_complete_project_or_an_error(
    generate: Callable[..., Path],
    template: Path,
    capfd: pytest.CaptureFixture[str],
    drawn: tuple[dict[str, Any], set[str]],
) -> None:
    answers, doubtful = drawn
    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            project = generate(folder, **answers)
        except (
            Exception
        ) as error:  # cookiecutter also raises the operating system's and Jinja's errors
            event("rejected")
            assert_rejected(error, capfd.readouterr().err, answers, doubtful)
            assert not files(folder)
            assert "/" in str(answers["project_slug"]) or not list(folder.iterdir())
        else:
            event("created")
            assert_complete(project, template, answers)
            assert list(folder.iterdir()) == [project]
        capfd.readouterr()
