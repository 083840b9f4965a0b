"""Checks every answer before a file is written, and reports all problems in one message.

cookiecutter renders this file and runs it in the new, still empty project; a non-zero exit removes the
project. The Jinja expressions stand in raw strings, so the file is valid Python as it lies here. Anywhere
else, comments included, no opening brace may be followed by a brace, a percent sign or a hash.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator

# As in cookiecutter.json, which a hook cannot read. cookiecutter compares with that, but not what it replays.
CHOICES = {
    "region": [
        *("europe-west4", "europe-west1", "europe-west3", "europe-west9", "europe-southwest1"),
        *("europe-north1", "europe-west2", "us-central1", "us-east4", "us-west1"),
        *("asia-northeast1", "asia-southeast1"),
    ],
    "gpu": ["l4", "none", "t4", "a100-40gb", "a100-80gb", "h100", "h200", "b200"],
    "ci": ["github-actions", "gitlab", "azure-devops", "cloud-build"],
    "data_ingestion": ["scheduled-job", "managed-airflow", "none"],
    "license": ["Apache-2.0", "MIT", "Proprietary"],
}

# An installer takes a project of the same name for the package itself.
PACKAGES = {
    *("trainer", "predictor", "launcher", "project"),  # contained; the others are installed
    *("apache-airflow", "airflow", "duckdb", "fastapi", "functions-framework", "hypothesis", "ipykernel"),
    *("jupyter", "jupyterlab", "jupytext", "kfp", "matplotlib", "mypy", "nbclient", "nbconvert", "notebook"),
    *("numpy", "onnx", "onnxruntime", "onnxscript", "pandas", "pip", "pre-commit", "pyarrow", "pydantic"),
    *("pytest", "pyyaml", "yaml", "ruff", "safetensors", "scikit-learn", "sklearn", "scipy", "setuptools"),
    *("torch", "tqdm", "uv", "uvicorn"),
}
WINDOWS_DEVICES = re.compile("con|prn|aux|nul|(com|lpt)[1-9]")

SLUG = r"[a-z][a-z0-9-]{1,18}[a-z0-9]"  # service accounts have at most 30 characters, and get suffixes
EMAIL_NAME = r"[A-Za-z0-9_%+'-]+(\.[A-Za-z0-9_%+'-]+)*"
EMAIL_DOMAIN = r"([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]*[A-Za-z0-9]"

JINJA = ["{" + second for second in "%#{"]
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, invisible, half a character, and the two line separators
JOINERS = "\u200c\u200d"  # invisible too, but Persian words and emoji of several persons are made with them


def hidden_characters(value: str) -> list[str]:
    """Characters that nobody sees, or that YAML and TOML do not take."""
    return sorted(
        {
            f"U+{ord(c):04X}"
            for c in value
            if (unicodedata.category(c) in HIDDEN and c not in JOINERS) or ord(c) & 0xFFFE == 0xFFFE
        }
    )


def line_rules(value: str, limit: int) -> Iterator[str]:
    """The rules for free text that ends up in YAML, TOML, Markdown and a licence."""
    if not value.strip():
        yield "must not be empty"
    elif value != value.strip():
        yield "must not begin or end with a blank"
    if len(value) > limit:
        yield f"must have at most {limit} characters (this has {len(value)})"
    if hidden := hidden_characters(value):
        yield f"must be one line of visible characters (this has {', '.join(hidden)})"
    if any(mark in value for mark in JINJA):
        yield f"must not contain {', '.join(JINJA)}: they would be run as code of the template"


def name_rules(value: str) -> Iterator[str]:
    """A project's name is also a heading in Markdown."""
    yield from line_rules(value, 60)
    if found := sorted(set(value) & set("<>`|*[]#\\")):
        yield f"must not contain {' '.join(found)}: it becomes a heading, where they have a meaning"


def slug_rules(value: str) -> Iterator[str]:
    """A slug names a folder, a Python project and everything in the cloud."""
    if not re.fullmatch(SLUG, value):
        yield "must be 3 to 20 of a-z, 0-9 and -; the first a letter, the last a letter or a digit"
    if WINDOWS_DEVICES.fullmatch(value.lower()):
        yield "must not be the name of a device on Windows"
    if "google" in value.lower() or value.lower().startswith("goog"):
        yield 'must not contain "google" or begin with "goog": no bucket may be called so'
    if value.lower().replace("_", "-") in PACKAGES:
        yield "must not be the name of a package that the project contains or installs"


def email_rules(value: str) -> Iterator[str]:
    """Stricter than the standard: what every service takes."""
    if len(value) > 254 or not re.fullmatch(f"{EMAIL_NAME}@{EMAIL_DOMAIN}", value):
        yield (
            "must be one plain address, name@domain, with a dot in the domain: letters without accents,"
            " digits and . _ % + ' - before the @, 254 characters at most"
        )


RULES: dict[str, tuple[Callable[[str], Iterator[str]], str]] = {
    "project_name": (name_rules, "Digit Reader"),
    "project_slug": (slug_rules, "digit-reader"),
    "description": (lambda value: line_rules(value, 200), "Reads handwritten digits."),
    "author_name": (lambda value: line_rules(value, 60), "Ada Lovelace"),
    "author_email": (email_rules, "ada@example.com"),
}


def broken_rules(variable: str, value: object) -> list[str]:
    """What is wrong with this answer, in words; nothing if it is good."""
    if not isinstance(value, str):
        return ["must be text; in a YAML file put it in quotes"]
    if variable in CHOICES:
        return [] if value in CHOICES[variable] else [f"must be one of {', '.join(CHOICES[variable])}"]
    return list(RULES[variable][0](value))


def shown(value: object) -> str:
    """The value as it was given; escaped where it cannot be seen, and cut where it is too long to read."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}…"


def report(answers: dict[str, object]) -> str:
    """All problems in one message; empty if there are none."""
    problems = []
    for variable in [*RULES, *CHOICES]:
        if broken := broken_rules(variable, answers[variable]):
            example = RULES[variable][1] if variable in RULES else CHOICES[variable][0]
            rules = "".join(f"\n    rule:    {rule}" for rule in broken)
            problems.append(f"  {variable}: {shown(answers[variable])}{rules}\n    example: {example}")
    if not problems:
        return ""
    many = "1 answer" if len(problems) == 1 else f"{len(problems)} answers"
    head = f"\n{many} cannot be used, and no project was made:"
    # cookiecutter reports every failed hook with a traceback of its own, and cannot be told not to.
    foot = "Run the command again with other answers. What cookiecutter says below is only that it stopped.\n"
    return "\n\n".join([head, *problems, foot])


def given_answers() -> dict[str, object]:
    """The answers as they were given.

    What comes from the command line or a file has been run as a Jinja template before it arrives here.
    cookiecutter keeps the original (cruft does not), and it is the original that has to be refused.
    """
    answers: dict[str, object] = json.loads(r"""{{ cookiecutter | jsonify }}""")
    originals = json.loads(r"""{{ _cookiecutter | default({}) | jsonify }}""")
    for variable in ("project_name", "description", "author_name", "author_email"):
        original = originals.get(variable)
        if isinstance(original, str) and any(mark in original for mark in JINJA):
            answers[variable] = original
    return answers


if __name__ == "__main__" and (message := report(given_answers())):
    sys.exit(message)
