"""Measures the template: python -m tests.bench [NAME …]; see `report.py` for what a benchmark gives."""

import sys

from tests.bench.report import PROJECT

sys.path.insert(0, str(PROJECT / "src"))  # the project's modules are imported where they lie
sys.path.insert(0, str(PROJECT / "level_2_cicd"))  # and the fakes
