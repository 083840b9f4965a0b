"""Validate all answers before a file is written.

cookiecutter renders this file, runs it in the new, empty project, and deletes the project if it
fails. It is valid Python too, because its Jinja expressions are in raw strings. Nowhere else may an
opening brace be followed by a brace, % or #.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections.abc import Iterator

# As in cookiecutter.json, which a hook cannot read. cookiecutter does not check replayed answers.
REGIONS = """
europe-west4 europe-west1 europe-west3 europe-west9 europe-southwest1 europe-north1 europe-west2
us-central1 us-east4 us-west1 asia-northeast1 asia-southeast1
"""
CHOICES = {
    "region": REGIONS.split(),
    "gpu": ["l4", "none", "t4", "a100-40gb", "a100-80gb", "h100", "h200", "b200"],
    "ci": ["github-actions", "gitlab", "azure-devops", "cloud-build"],
    "data_ingestion": ["scheduled-job", "managed-airflow", "none"],
    "license": ["Apache-2.0", "MIT", "Proprietary"],
}
EXAMPLES = {
    "project_name": "Digit Reader",
    "project_slug": "digit-reader",
    "description": "Reads handwritten digits.",
    "author_name": "Ada Lovelace",
    "author_email": "ada@example.com",
    **{question: choices[0] for question, choices in CHOICES.items()},
}
MAX_LENGTH = {"project_name": 60, "description": 200, "author_name": 60}
# The project's packages, and those it installs: pip would confuse a project of the same name.
PACKAGES = """
core gcp predictor project trainer
airflow apache-airflow duckdb fastapi functions-framework hypothesis ipykernel jupyter jupyterlab
jupytext kfp matplotlib mypy nbclient nbconvert notebook numpy onnx onnxruntime onnxscript pandas
pip pre-commit pyarrow pydantic pytest pyyaml ruff safetensors scikit-learn scipy setuptools sklearn
torch tqdm uv uvicorn yaml
"""
EMAIL_NAME = r"[A-Za-z0-9_%+'-]+(\.[A-Za-z0-9_%+'-]+)*"
EMAIL_DOMAIN = r"([A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z][A-Za-z0-9-]*[A-Za-z0-9]"
JINJA = ["{" + second for second in "%#{"]
HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode: control, format, surrogate, separator
JOINERS = "\u200c\u200d"  # invisible too, but part of Persian words and of some emoji


def text_rules(value: str, limit: int) -> Iterator[tuple[object, str]]:
    """Rules for text that is written to YAML, TOML, Markdown and a license."""
    hidden = [c for c in value if unicodedata.category(c) in HIDDEN and c not in JOINERS]
    hidden += [c for c in value if ord(c) & 0xFFFE == 0xFFFE]  # U+FFFE, U+FFFF: not for YAML, TOML
    codes = ", ".join(sorted({f"U+{ord(c):04X}" for c in hidden}))
    yield not value.strip(), "must not be empty"
    yield value.strip() not in {"", value}, "must not begin or end with a space"
    yield len(value) > limit, f"must have at most {limit} characters (this has {len(value)})"
    yield hidden, f"must be one line of visible characters (this has {codes})"
    yield any(m in value for m in JINJA), f"must not contain {', '.join(JINJA)}: Jinja would run it"


def rules(question: str, value: object) -> Iterator[tuple[object, str]]:
    """Yield each rule of a question, and whether the answer breaks it."""
    if not isinstance(value, str):
        yield True, "must be text; in a YAML file put it in quotes"
    elif question in CHOICES:
        yield value not in CHOICES[question], f"must be one of {', '.join(CHOICES[question])}"
    elif question == "project_slug":
        # Short, because service account names have at most 30 characters, with their suffixes.
        form, name = re.fullmatch("[a-z][a-z0-9-]{1,18}[a-z0-9]", value), value.lower()
        device = re.fullmatch("con|prn|aux|nul|(com|lpt)[1-9]", name)
        google = "google" in name or name.startswith("goog")
        package = name.replace("_", "-") in PACKAGES.split()
        yield not form, "must be 3 to 20 of a-z, 0-9 and -; first a letter, last a letter or digit"
        yield device, "must not be the name of a device on Windows"
        yield google, 'must not contain "google" or begin with "goog": bucket names must not'
        yield package, "must not be the name of a package that the project contains or installs"
    elif question == "author_email":  # stricter than the standard: what every service accepts
        form = re.fullmatch(f"{EMAIL_NAME}@{EMAIL_DOMAIN}", value)
        yield not form, "must be name@domain.tld, with only a-z, A-Z, 0-9 and . _ % + ' -"
        yield len(value) > 254, "must have at most 254 characters"
    else:
        yield from text_rules(value, MAX_LENGTH[question])
        markup = sorted(set(value) & set("<>`|*[]#\\")) if question == "project_name" else []
        yield markup, f"must not contain {' '.join(markup)}: it becomes a heading in Markdown"


def report(answers: dict[str, object]) -> str:
    """Describe all invalid answers in one message; empty if there are none."""
    problems = []
    for question, example in EXAMPLES.items():
        value = answers[question]
        if broken := [rule for is_broken, rule in rules(question, value) if is_broken]:
            shown = repr(value) if len(repr(value)) <= 120 else f"{repr(value)[:100]}…"
            lines = [f"  {question}: {shown}", *(f"    rule:    {rule}" for rule in broken)]
            problems.append("\n".join([*lines, f"    example: {example}"]))
    head = "\nInvalid answers; no project was created:"
    # cookiecutter always prints a traceback when a hook fails.
    foot = "Run the command again with other answers. Ignore cookiecutter's messages below.\n"
    return "\n\n".join([head, *problems, foot]) if problems else ""


if __name__ == "__main__":
    answers = json.loads(r"""{{ cookiecutter | jsonify }}""")
    # cookiecutter renders answers from the command line and from files as Jinja. It keeps the
    # originals, which are to be rejected; cruft does not keep them.
    originals = json.loads(r"""{{ _cookiecutter | default({}) | jsonify }}""")
    jinja = {q: originals[q] for q in MAX_LENGTH if any(m in str(originals.get(q)) for m in JINJA)}
    sys.exit(report({**answers, **jinja}) or 0)
