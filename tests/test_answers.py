"""A valid answer is in the project exactly as given; an invalid one stops before a file is written."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cookiecutter.exceptions import FailedHookException
from cookiecutter.main import cookiecutter

from tests.projects import assert_given_back

Generate = Callable[..., Path]

GOOD = {
    "project_name": "Digit Reader",
    "project_slug": "digit-reader",
    "description": "Reads digits.",
    "author_name": "Ada Lovelace",
    "author_email": "ada@example.com",
}
CHOSEN = {
    "region": "europe-west4",
    "gpu": "l4",
    "ci": "gitlab",
    "data_ingestion": "none",
    "license": "MIT",  # the author's name is in it
}
EXAMPLES = {**GOOD, "description": "Reads handwritten digits."}

VALID = [
    ("project_name", "X"),
    ("project_name", "6" * 60),
    ("project_name", "No"),
    ("project_name", "null"),
    ("project_name", "1.0"),
    ("project_name", 'R&D: it\'s 100 % "ours"!'),
    ("project_name", "- {a} }} %} $(id) ; ~ @ ?"),
    ("project_name", "../up"),
    ("project_name", "Zahlenleser für Ämter"),
    ("project_name", "数字识别 読み取り"),
    ("project_name", "قارئ الأرقام"),
    ("project_name", "می\u200cخوانم"),  # Persian needs the invisible non-joiner
    ("project_name", "Читатель 🙂"),
    ("project_slug", "abc"),
    ("project_slug", "a" * 20),
    ("project_slug", "null"),
    ("project_slug", "com10"),
    ("project_slug", "a--9"),
    ("description", "x" * 200),
    ("description", "no"),
    ("description", "~"),
    ("description", "2026-01-01"),
    ("description", "It's \"quoted\" and 'quoted', \"\"\"thrice\"\"\" and '''thrice'''"),
    ("description", 'ends with a quote "'),
    ("description", r"C:\new\table \u0041 \" \\"),
    ("description", "ends with a backslash \\"),
    ("description", "key: value # no comment, no key"),
    ("description", "- dash"),
    ("description", "--no-input"),
    ("description", "{a: [1, 2]} }} %} #} ${HOME} {"),
    ("description", "`id` $(id) ; rm -rf / | > < & * ! % @"),
    ("description", "👩‍👩‍👧 🏳️‍🌈 naïve ½ € \U0001f9ff"),
    ("description", "non-breaking\u00a0space"),
    ("author_name", 'O\'Brien "Bob" \\ Söhne & Co. KG'),
    ("author_name", "Ф" * 60),
    ("author_name", "*anchor"),
    ("author_email", "o'brien+ml_1%x@mail-2.example.co.uk"),
    ("author_email", "1@xn--bcher-kva.example"),
]

LINE = "must be one line of visible characters"
SLUG = "must be 3 to 20 of a-z, 0-9 and -"
EMAIL = "must be name@domain.tld"
INVALID = [
    ("project_name", "   ", "must not be empty"),
    ("project_name", "", "must not be empty"),
    ("project_name", "x" * 61, "at most 60 characters (this has 61)"),
    ("project_name", "x" * 100_000, "at most 60 characters (this has 100000)"),
    ("project_name", " padded", "must not begin or end with a space"),
    ("project_name", "padded\u3000", "must not begin or end with a space"),
    ("project_name", "two\nlines", LINE),
    ("project_name", "tab\there", LINE),
    ("project_name", "nul\0", LINE),
    ("project_name", "escape \x1b[31m", LINE),
    ("project_name", "rtl \u202e override", LINE),
    ("project_name", "isolate \u2066 me", LINE),
    ("project_name", "zero\u200bwidth", LINE),
    ("project_name", "byte order \ufeff mark", LINE),
    ("project_name", "half \ud83d emoji", LINE),
    ("project_name", "line\u2028separator", LINE),
    ("project_name", "next\u0085line", LINE),
    ("project_name", "not a character \uffff", LINE),
    ("project_name", "{{ 1 + 1 }}", "must not contain"),
    ("project_name", "a{# comment #}", "must not contain"),
    ("project_name", "{% if 1 %}x{% endif %}", "must not contain"),
    ("project_name", "<b>bold</b>", "it becomes a heading"),
    ("project_name", "`code`", "it becomes a heading"),
    ("project_name", "*bold*", "it becomes a heading"),
    ("project_name", "[link](x)", "it becomes a heading"),
    ("project_name", "C#", "it becomes a heading"),
    ("project_name", "back\\slash", "it becomes a heading"),
    ("project_name", False, "must be text"),  # `no` in a user's configuration file
    ("project_slug", "ab", SLUG),
    ("project_slug", "a" * 21, SLUG),
    ("project_slug", "Digit-Reader", SLUG),
    ("project_slug", "digit_reader", SLUG),
    ("project_slug", "digit reader", SLUG),
    ("project_slug", "-dash", SLUG),
    ("project_slug", "dash-", SLUG),
    ("project_slug", "1st", SLUG),
    ("project_slug", "zähler", SLUG),
    ("project_slug", "a.b.c", SLUG),
    ("project_slug", "x;id", SLUG),
    ("project_slug", "$(id)", SLUG),
    ("project_slug", "`id`", SLUG),
    ("project_slug", "digit-reader\n", SLUG),
    ("project_slug", "../above", SLUG),
    ("project_slug", "con", "device on Windows"),
    ("project_slug", "Lpt9", "device on Windows"),
    ("project_slug", "my-google-x", "google"),
    ("project_slug", "goog-reader", "google"),
    ("project_slug", "torch", "the name of a package"),
    ("project_slug", "trainer", "the name of a package"),
    ("project_slug", "scikit-learn", "the name of a package"),
    ("description", "", "must not be empty"),
    ("description", "x" * 201, "at most 200 characters (this has 201)"),
    ("description", "two\nlines", LINE),
    ("description", "a {{ cookiecutter.project_slug }}", "must not contain"),
    ("description", True, "must be text"),
    ("author_name", "x" * 61, "at most 60 characters (this has 61)"),
    ("author_name", "pop \u202c", LINE),
    ("author_name", "{{ cookiecutter }}", "must not contain"),
    ("author_email", "", EMAIL),
    ("author_email", "nobody", EMAIL),
    ("author_email", "ada@localhost", EMAIL),
    ("author_email", "ada@@example.com", EMAIL),
    ("author_email", "ada @example.com", EMAIL),
    ("author_email", "Ada <ada@example.com>", EMAIL),
    ("author_email", "ada@example.com,bob@example.com", EMAIL),
    ("author_email", "ada@example..com", EMAIL),
    ("author_email", ".ada@example.com", EMAIL),
    ("author_email", "ada@-example.com", EMAIL),
    ("author_email", "ada@10.0.0.1", EMAIL),
    ("author_email", "jörg@example.com", EMAIL),
    ("author_email", '"ada"@example.com', EMAIL),
    ("author_email", "ada@example.com\n", EMAIL),
    ("author_email", "a" * 250 + "@x.io", "must have at most 254 characters"),
]


def name(value: Any) -> str:
    """Return a printable, short test id."""
    return ascii(value)[:40]


def run_cookiecutter(
    root: Path, config: Path, output: Path, **answers: str
) -> "subprocess.CompletedProcess[str]":
    """Run cookiecutter's command line."""
    command = [
        sys.executable,
        "-m",
        "cookiecutter",
        str(root),
        "--no-input",
        "--config-file",
        str(config),
    ]
    given = [f"{variable}={value}" for variable, value in answers.items()]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    return subprocess.run(
        [*command, "--output-dir", str(output), *given],
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )


def load_pre_gen(root: Path) -> ModuleType:
    """Import the hook."""
    spec = importlib.util.spec_from_file_location(
        "pre_gen_project", root / "hooks/pre_gen_project.py"
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("variable", "value"), VALID, ids=name)
def test_valid_answer_is_in_the_project(
    generate: Generate, tmp_path: Path, variable: str, value: str
) -> None:
    answers = {**CHOSEN, **GOOD, variable: value}
    project = generate(tmp_path, **answers)
    assert_given_back(project, answers)


@pytest.mark.parametrize(("variable", "value", "rule"), INVALID, ids=name)
def test_invalid_answer_is_reported(
    generate: Generate,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    variable: str,
    value: Any,
    rule: str,
) -> None:
    with pytest.raises(FailedHookException):
        generate(tmp_path, **{**GOOD, variable: value})
    message = capfd.readouterr().err.split("Run the command again")[0]
    assert message.strip().startswith("Invalid answers; no project was created:")
    assert message.count("    example: ") == 1
    assert f"  {variable}: {repr(value)[:100]}" in message
    assert rule in message
    assert f"example: {EXAMPLES[variable]}" in message
    assert "Traceback" not in message
    assert len(message) < 1000
    assert list(tmp_path.iterdir()) == []


BAD_TOGETHER = {
    "project_name": "<Reader>",
    "project_slug": "../Reader;",
    "description": "{{ 7 * 7 }}",
    "author_name": "$(id) \u202e",
    "author_email": "nobody",
}


@pytest.mark.parametrize(
    "answers",
    [BAD_TOGETHER, *({variable: value} for variable, value in BAD_TOGETHER.items())],
    ids="+".join,
)
def test_all_invalid_answers_are_in_one_message(
    root: Path, config: Path, tmp_path: Path, answers: dict[str, str]
) -> None:
    output = tmp_path / "output"
    output.mkdir()
    done = run_cookiecutter(root, config, output, **{**GOOD, **answers})
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert done.stderr.count("    example: ") == len(answers)
    for variable, value in answers.items():
        assert f"  {variable}: {value!r}\n    rule:    must " in done.stderr
        assert f"    example: {EXAMPLES[variable]}\n" in done.stderr
    assert list(output.iterdir()) == []
    assert list(tmp_path.iterdir()) == [output]


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (
            {"gpu": "k80"},
            "k80 provided for choice variable gpu, but the choices are ['l4', 'none', 't4',",
        ),
        ({"description": "{% nonsense"}, "unknown tag 'nonsense'"),
        ({"description": "{{ nonsense }}"}, "Unable to render variable 'description'"),
        ({"project_slug": ""}, "directory already exists"),
        ({"project_slug": ".."}, "directory already exists"),
        ({"project_slug": "x" * 300}, "File name too long"),
    ],
    ids=name,
)
def test_cookiecutter_rejects_before_the_hook(
    root: Path, config: Path, tmp_path: Path, answers: dict[str, str], message: str
) -> None:
    """The hook does not run, so the message is cookiecutter's."""
    done = run_cookiecutter(root, config, tmp_path, **answers)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_slug_with_a_slash_leaves_no_file(
    generate: Generate, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """cookiecutter creates the folders before the hook, and deletes only the last one."""
    with pytest.raises(FailedHookException):
        generate(tmp_path, project_slug="a/b/c")
    assert SLUG in capfd.readouterr().err
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "a", tmp_path / "a/b"]


def test_replayed_choice_is_checked(
    generate: Generate, root: Path, config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """cookiecutter does not check a replay; an older template may have had other choices."""
    generate(tmp_path / "first")
    replay = max((config.parent / "replay_dir").glob("*.json"), key=os.path.getmtime)
    context = json.loads(replay.read_text(encoding="utf-8"))
    context["cookiecutter"].update(gpu="k80", license="GPL")
    (tmp_path / "replay.json").write_text(json.dumps(context), encoding="utf-8")
    output = tmp_path / "second"
    output.mkdir()
    with pytest.raises(FailedHookException):
        cookiecutter(
            str(root),
            replay=str(tmp_path / "replay.json"),
            output_dir=str(output),
            config_file=str(config),
        )
    message = capfd.readouterr().err
    assert "  gpu: 'k80'\n    rule:    must be one of l4, none, t4," in message
    assert "  license: 'GPL'\n    rule:    must be one of Apache-2.0, MIT, Proprietary\n" in message
    assert list(output.iterdir()) == []


@pytest.mark.parametrize(
    ("project_name", "slug"),
    [
        ("Digit Reader", "digit-reader"),
        ("Churn — 2026!", "churn-2026"),
        ("Zahlenleser für Ämter", "zahlenleser-fur-amte"),
        ("a very long name of nineteen x", "a-very-long-name-of"),
        ("数字识别", "shu-zi-shi-bie"),
        ("🙂🙂", "my-project"),
    ],
    ids=name,
)
def test_slug_default_comes_from_the_name(
    generate: Generate, tmp_path: Path, project_name: str, slug: str
) -> None:
    assert generate(tmp_path, project_name=project_name).name == slug


def test_every_question_has_a_prompt(questions: dict[str, Any]) -> None:
    choices_by_question = {
        variable: value for variable, value in questions.items() if not variable.startswith("_")
    }
    assert list(choices_by_question) == [
        *("project_name", "project_slug", "description", "author_name", "author_email"),
        *("region", "gpu", "ci", "data_ingestion", "license"),
    ]
    prompts = questions["__prompts__"]
    assert list(prompts) == list(choices_by_question)
    for variable, choices in choices_by_question.items():
        if isinstance(choices, list):
            assert list(prompts[variable]) == ["__prompt__", *choices]
            assert all(prompts[variable][choice].startswith(f"{choice}: ") for choice in choices)


def test_hook_has_the_choices_of_cookiecutter_json(root: Path, questions: dict[str, Any]) -> None:
    choices = {variable: value for variable, value in questions.items() if isinstance(value, list)}
    del choices["_copy_without_render"]
    assert choices == load_pre_gen(root).CHOICES
    assert set(questions["_train_jobs"]) == set(questions["gpu"])


def test_hooks_are_valid_python_and_short(root: Path) -> None:
    hooks = sorted((root / "hooks").glob("*.py"))
    assert [hook.name for hook in hooks] == ["post_gen_project.py", "pre_gen_project.py"]
    sources = [hook.read_text(encoding="utf-8") for hook in hooks]
    for hook, source in zip(hooks, sources, strict=True):
        compile(source, hook.name, "exec")
    assert sum(source.count("\n") for source in sources) <= 200
