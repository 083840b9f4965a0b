"""The documentation is correct: commands, files, links, questions, packages, settings, messages."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml
from level_1_pipeline.vertex import gpu_jobs

from tests.projects import CRUFT

ROOT = Path(__file__).resolve().parents[1]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
LEVELS = sorted(PROJECT.glob("level_*/README.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "AGENTS.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(PROJECT / "README.md", PROJECT / "AGENTS.md", *LEVELS),
]
PICTURES = sorted((ROOT / "docs").glob("*.svg"))

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name(path: Path) -> str:
    """Return the path as a test id."""
    return path.relative_to(ROOT).as_posix()


pages = pytest.mark.parametrize("page", PAGES, ids=name)


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    """Return the page's code blocks in a language."""
    return [text for kind, text in FENCE.findall(read(page)) if kind == language]


def spans(page: Path) -> list[str]:
    """Return the page's inline code."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", read(page)))


def section(page: Path, title: str) -> str:
    """Return the text below a second-level heading."""
    return re.split(
        r"^## ", read(page).split(f"\n## {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE
    )[0]


# ── commands ────────────────────────────────────────────────────────────────────────────────────────────────

# Pages with commands for both folders, or for the template only.
BOTH = {
    "README.md",
    "docs/index.md",
    "docs/decisions.md",
    "docs/gotchas.md",
    "docs/benchmarks.md",
    "CHANGELOG.md",
}
IN_TEMPLATE = {"CONTRIBUTING.md", "AGENTS.md"}


def targets(folder: Path) -> set[str]:
    """Return the make targets of the template or of a project."""
    makefiles = [folder / "Makefile", *folder.glob("level_*/targets.mk")]
    return set(re.findall(r"^([a-z0-9-]+):", "\n".join(map(read, makefiles)), re.MULTILINE))


def goals(words: list[str]) -> set[str]:
    """Return the targets in a make command."""
    return {word for word in words[1:] if "=" not in word and not word.startswith("-")}


def calls(code: str) -> Iterator[set[str]]:
    """Yield the targets of each make command in code."""
    for call in re.findall(r"(?:^|[;&|]\s*)(make\s[^;&|>\n]*)", code):
        yield goals(shlex.split(call.replace("…", ""), comments=True))


@pages
def test_inline_make_targets_exist(page: Path) -> None:
    available = targets(ROOT) if name(page) in IN_TEMPLATE else targets(PROJECT)
    if name(page) in BOTH:
        available |= targets(ROOT)
    for code in spans(page):
        assert all(call <= available for call in calls(code)), code


def make_commands(page: Path, template: Path, project: Path) -> Iterator[tuple[Path, list[str]]]:
    """Yield each make command of the page's bash blocks, with its folder."""
    folder = template
    if page.is_relative_to(PROJECT) or page.name.startswith(("level-", "update")):
        folder = project
    for block in blocks(page, "bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["cd"]:
                folder = project
            elif words[:1] == ["make"]:
                yield folder, words


def make(folder: Path, *words: str) -> str:
    """Run make in a folder, without this test run's own environment."""
    own = ("MAKEFLAGS", "MAKELEVEL", "MFLAGS", "VIRTUAL_ENV", "PYTHONPATH")
    environment = {key: value for key, value in os.environ.items() if key not in own}
    command = ["make", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"make {' '.join(words)} in {folder}\n{done.stdout}{done.stderr}"
    return done.stdout


WITH_COMMANDS = [page for page in PAGES if blocks(page, "bash")]


@pytest.mark.parametrize("page", WITH_COMMANDS, ids=name)
def test_make_commands_are_valid(page: Path, default_project: Path) -> None:
    """A dry run; test_project.py and .ci/run run the commands."""
    commands = list(make_commands(page, ROOT, default_project))
    assert commands
    for folder, words in commands:
        assert goals(words) <= targets(folder), words
        # `make -n demo` runs make in the demo's project: use this one.
        demo = [f"DEMO={default_project.parent}"] if "demo" in words else []
        done = make(folder, "-n", *words[1:], *demo)
        assert "Nothing to be done" not in done or goals(words) == {"setup"}, words
    assert not (default_project / ".venv").exists()


def test_readme_shows_two_commands() -> None:
    first = blocks(ROOT / "README.md", "bash")[0]
    assert re.findall(r"^make (\w+)", first, re.MULTILINE) == ["demo", "test"]


# ── files and links ─────────────────────────────────────────────────────────────────────────────────────────


def anchors(page: Path) -> set[str]:
    """Return the anchors that code hosts make from the page's headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", read(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pages
def test_links_are_valid(page: Path) -> None:
    text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", read(page)))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert target.is_relative_to(PROJECT if page.is_relative_to(PROJECT) else ROOT), link
        assert not anchor or anchor in anchors(target), link


@pages
def test_source_paths_exist(page: Path) -> None:
    example = "src/trainer/copy.py"
    folders = (ROOT, PROJECT, page.parent)
    for path in re.findall(r"\b(?:src|level_\d_\w+|hooks|tests)/[\w/.-]*\w", " ".join(spans(page))):
        assert path == example or any((folder / path).exists() for folder in folders), path


def test_start_page_links_every_page() -> None:
    start = read(ROOT / "docs" / "index.md")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in start, page.name


def tree(page: Path, holding: str) -> list[str]:
    """Return the paths of the annotated tree that contains a path."""
    for block in blocks(page, "text"):
        paths = re.findall(r"^(\S+) {2,}\S.*$", block, re.MULTILINE)
        if holding in paths:
            return paths
    raise AssertionError(f"{page} has no tree with {holding}")


def top(paths: list[str]) -> set[str]:
    return {path.split("/")[0] for path in paths}


@pytest.mark.parametrize("page", [ROOT / "README.md", PROJECT / "README.md"], ids=name)
def test_project_tree_is_complete(page: Path, default_project: Path) -> None:
    paths = tree(page, "project.yaml")
    if page.parent == PROJECT:  # it shows apart what the template maintains
        paths += tree(page, "Makefile")
    generated = {path.name for path in default_project.iterdir()} | {CRUFT}
    assert top(paths) == generated
    for path in set(paths) - {CRUFT}:  # depends on git
        target = default_project / path
        assert target.is_dir() if path.endswith("/") else target.is_file(), path
    packages = {f"src/{path.name}/" for path in (default_project / "src").iterdir()}
    assert {path for path in paths if path.startswith("src/")} == packages


def test_created_folders_are_ignored_by_git() -> None:
    ignored = {line.strip("/") for line in read(PROJECT / ".gitignore").splitlines()}
    assert {path.strip("/") for path in tree(PROJECT / "README.md", "runs/")} <= ignored


def test_template_tree_is_complete() -> None:
    paths = tree(ROOT / "CONTRIBUTING.md", "cookiecutter.json")
    assert all((ROOT / path).exists() for path in paths), paths
    ignored = {line.strip("/") for line in read(ROOT / ".gitignore").splitlines()} | {".git"}
    assert top(paths) == {path.name for path in ROOT.iterdir()} - ignored


def test_project_readme_shows_every_level() -> None:
    text = read(PROJECT / "README.md")
    folders = " ".join(tree(PROJECT / "README.md", "project.yaml"))
    for level in LEVELS:
        number = level.parent.name.split("_")[1]
        row = re.search(rf"^\| \[{number} · .*$", text, re.MULTILINE)
        assert row and "later version" not in row[0]
        assert level.parent.name in folders


# ── questions, packages, settings ───────────────────────────────────────────────────────────────────────────


def test_questions_page_has_every_choice_and_default(
    questions: dict[str, Any], default_project: Path
) -> None:
    page = ROOT / "docs" / "questions.md"
    values = {
        variable: value for variable, value in questions.items() if not variable.startswith("_")
    }
    assert re.findall(r"^## ([a-z_]+)$", read(page), re.MULTILINE) == list(values)
    for variable, value in values.items():
        text = section(page, variable)
        default = value[0] if isinstance(value, list) else value
        if variable == "project_slug":
            default = default_project.name
        assert re.search(rf"\*\*Default:\*\* [^\n]*`{re.escape(default)}`", text), variable
        assert isinstance(value, list) or "**Rules:**" in text
        assert re.findall(r"^\| `([^`]+)`", text, re.MULTILINE) == (
            value if isinstance(value, list) else []
        )


def test_questions_page_has_the_jobs_of_each_gpu(questions: dict[str, Any]) -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\| (.*) \|$", section(ROOT / "docs/questions.md", "gpu"), re.MULTILINE
    )
    assert {gpu: re.findall(r"`([^`]+)`", jobs) for gpu, jobs in rows} == questions["_train_jobs"]


@pytest.mark.parametrize(
    "requirements",
    [
        "requirements/dev.in",
        *(f"{PROJECT.name}/requirements/{part}" for part in ("dev.in", "torch.txt", "uv.in")),
    ],
)
def test_every_package_has_a_reason(requirements: str) -> None:
    text = " ".join(re.findall(r"\*\*([^*]+)\*\*", read(ROOT / "docs" / "decisions.md")))
    for package in re.findall(r"^([A-Za-z0-9_.-]+)", read(ROOT / requirements), re.MULTILINE):
        assert re.search(rf"(?<![\w-]){package}(?![\w-])", text, re.IGNORECASE), package


FILES = {"py", "ipynb", "html", "parquet", "json", "csv"}


@pages
def test_settings_exist_in_project_yaml(page: Path) -> None:
    settings = yaml.safe_load(read(PROJECT / "project.yaml"))
    lines = [line for line in read(page).splitlines() if "no such key" not in line]
    blocks_of_settings = "|".join(key for key, value in settings.items() if isinstance(value, dict))
    for path in re.findall(
        rf"(?<![\w./-])((?:{blocks_of_settings})(?:\.[a-z_0-9]+)+)", "\n".join(lines)
    ):
        if path.split(".")[1] in FILES:
            continue
        value: Any = settings
        for key in path.split("."):
            assert isinstance(value, dict), path
            assert key in value, path
            value = value[key]


@pages
def test_yaml_examples_match_project_yaml(page: Path) -> None:
    settings = yaml.safe_load(read(PROJECT / "project.yaml"))
    for example in blocks(page, "yaml"):
        for key, block in yaml.safe_load(example).items():
            assert set(block) <= set(settings[key])


def test_changelog_has_the_current_version(questions: dict[str, Any]) -> None:
    versions = re.findall(
        r"^## \[(\d+\.\d+\.\d+)\] - (?:unreleased|\d{4}-\d\d-\d\d)$",
        read(ROOT / "CHANGELOG.md"),
        re.M,
    )
    assert versions[0] == questions["_template_version"]
    assert versions == sorted(
        versions, key=lambda version: [*map(int, version.split("."))], reverse=True
    )


def test_job_prices_match_the_table() -> None:
    prices: dict[str, str] = {}
    for page in (ROOT / "docs" / "level-1-cloud.md", *LEVELS):
        prices |= {
            job: price
            for price, job in re.findall(r"([\d.]+)(?: an hour)? for `([a-z0-9-]+)`", read(page))
        }
    assert set(prices) == {"cpu", "l4", "h100x8"}
    for job, price in prices.items():
        digits = len(price.partition(".")[2])
        assert (
            f"{float(gpu_jobs.describe(job, PROJECT, 'europe-west4').price):.{digits}f}" == price
        ), job


# ── messages ────────────────────────────────────────────────────────────────────────────────────────────────

# A file, its label column, and the start of the message; docs/level-0.md has the whole message.
BAD_FILES = [
    ("", "y", "there is no file"),
    (
        "customer,age,plan,post_code,spend,left\n" + "C,1,a,1,1,x\n" * 2,
        "digit",
        "there is no label column",
    ),
    ("x;y\n1;a\n", "y", "data/bad.csv: the columns seem"),
    ("x,y\n1,a\n2,a,3\n3,b\n", "y", "data/bad.csv: line 3"),
    (
        "x,y\n" + "".join(f"{n}{'o' * (n == 7)},{'ab'[n % 2]}\n" for n in range(1, 31)),
        "y",
        "row 7, column",
    ),
    ("x,y\n1,a\n2,\n3,b\n", "y", "row 2, label"),
    ("x,y\n1,a\n2,a\n", "y", "label 'y': every row"),
    ("x,y\n1,a\n2,a\n3,b\n", "y", "row 3, label"),
]
BAD_SETTINGS = ["hyperparameters.epoch=50", "gate.threshold=1.5"]

SAY = """
import json, sys
from pathlib import Path
from project.settings import load_settings
from core.errors import UserError
from trainer.data import prepare
files, overrides = json.load(sys.stdin)
messages = []
for content, label in files:
    path = Path("data/bad.csv" if content else "none.csv")
    path.write_text(content) if content else None
    try:
        prepare(path, label, Path("train.parquet"), Path("test.parquet"))
    except UserError as error:
        messages.append(f"error: {error}")
for override in overrides:
    try:
        load_settings(override)
    except UserError as error:
        messages.append(str(error).splitlines()[-1].strip())
json.dump(messages, sys.stdout)
"""


def test_messages_match_the_code(default_project: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "project.yaml").write_bytes((default_project / "project.yaml").read_bytes())
    done = subprocess.run(
        [sys.executable, "-B", "-c", SAY],
        input=json.dumps([[(content, label) for content, label, _ in BAD_FILES], BAD_SETTINGS]),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{PROJECT / 'src'}:{PROJECT}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert len(messages) == len(BAD_FILES) + len(BAD_SETTINGS)
    text = read(ROOT / "docs" / "level-0.md")
    for message, (_, _, beginning) in zip(messages, BAD_FILES, strict=False):
        assert message.startswith(f"error: {beginning}")
    for message in messages:
        assert f"`{message}`" in text


# ── the rest ────────────────────────────────────────────────────────────────────────────────────────────────

DEVCONTAINER_KEYS = {
    *("name", "image", "features", "remoteUser", "postCreateCommand"),
    *("forwardPorts", "portsAttributes", "customizations"),
}


def test_dev_container_is_valid() -> None:
    container = json.loads(read(PROJECT / ".devcontainer" / "devcontainer.json"))
    assert set(container) <= DEVCONTAINER_KEYS
    assert re.fullmatch(
        r"mcr\.microsoft\.com/devcontainers/python:\d+-3\.\d+-[a-z]+", container["image"]
    )
    assert tuple(map(int, container["image"].split("-")[1].split("."))) >= (3, 11)
    assert container["features"]
    assert all(
        re.fullmatch(r"ghcr\.io/devcontainers/features/[a-z-]+:\d+", name)
        for name in container["features"]
    )
    assert container["remoteUser"] == "vscode"
    assert list(calls(container["postCreateCommand"])) == [{"setup"}]
    assert container["forwardPorts"] == [8888]
    editor = container["customizations"]["vscode"]
    assert set(editor["extensions"]) == {
        "ms-python.python",
        "ms-toolsai.jupyter",
        "charliermarsh.ruff",
    }
    assert editor["settings"]["python.defaultInterpreterPath"].endswith("/.venv/bin/python")


@pytest.mark.parametrize("picture", PICTURES, ids=name)
def test_pictures_are_valid_svg(picture: Path) -> None:
    svg = ElementTree.fromstring(read(picture))
    assert svg.tag == "{http://www.w3.org/2000/svg}svg"
    assert {"viewBox", "role"} <= set(svg.attrib)
    assert "href" not in read(picture)  # no downloads
    code = re.findall(r'class="code">make (\w+)<', read(picture))
    assert set(code) - {"level1"} <= targets(PROJECT)


def test_pictures_have_alt_text() -> None:
    for page in PAGES:
        assert all(re.findall(r"!\[([^\]]*)\]", read(page)))


@pytest.mark.parametrize("path", [*PAGES, *PICTURES], ids=name)
def test_no_placeholders_or_local_paths(path: Path) -> None:
    text = read(path)
    assert not re.findall(r"\b(TODO|FIXME|XXX|TBD|YOUR_\w+|DEMO_OUTPUT)\b|(?i:lorem ipsum)", text)
    assert not re.findall(r"(?<![\w.])/(?:root|opt|tmp|work|home|Users|mnt|var)\b", text)
    assert text.endswith("\n")
    assert not re.findall(r"[ \t]+$", FENCE.sub("", text), re.MULTILINE)


@pytest.mark.parametrize("page", LEVELS, ids=name)
def test_level_pages_have_the_same_headings(page: Path) -> None:
    """Other headings may be between them."""
    titles = re.findall(r"^## (.+)$", read(page), re.MULTILINE)
    same = [
        "Goal",
        "What is new",
        "Run it",
        "What you have now",
        "When to move on",
        "What it costs",
    ]
    assert [title for title in titles if title in same] == same
