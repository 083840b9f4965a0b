"""The benchmarks run, and the page shows what was measured. No test looks at a time."""

import importlib
import math
import os
import shutil

import pytest

from tests.bench import report
from tests.bench.__main__ import NAMES


@pytest.mark.heavy
@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_measures(name: str, request: pytest.FixtureRequest) -> None:
    module = importlib.import_module(f"tests.bench.{name}")
    if getattr(module, "NEEDS_DOCKER", False):
        request.getfixturevalue("docker")
    if getattr(module, "NEEDS_GCLOUD", False) and not shutil.which("gcloud"):
        (pytest.fail if os.environ.get("REQUIRE_DOCKER") else pytest.skip)("this test needs gcloud")
    figures = list(module.measure(small=True))
    assert figures
    for figure in figures:
        assert math.isfinite(figure.value), figure
        assert figure.value > 0 or (figure.value == 0 and figure.goal == "≤ 0"), figure


def test_every_benchmark_was_kept_and_the_page_shows_it() -> None:
    kept = report.read()
    assert list(kept) == NAMES
    assert report.PAGE.read_text(encoding="utf-8") == report.page(kept)


def test_a_figure_knows_whether_its_goal_is_reached() -> None:
    assert report.Figure("a", 1.4, "×", "≤ 1.5").met is True
    assert report.Figure("a", 2.9, "×", "≥ 3").met is False
    assert report.Figure("a", 2.9, "s").met is None
