"""What benchmarks give, and how it is kept: docs/benchmarks.json, and the same as a page for people.

Every benchmark is a module of this folder with a docstring (how it measures, for the page) and

    def measure(small: bool) -> Iterator[Figure]:

`small` takes seconds and shows only that the benchmark works: its figures mean nothing.
"""

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ROOT / "{{cookiecutter.project_slug}}"
KEPT = ROOT / "docs" / "benchmarks.json"
PAGE = ROOT / "docs" / "benchmarks.md"
RATIO = "×"


@dataclass(frozen=True)
class Figure:
    """One number. A goal is a bound, such as "≤ 1.5": only ratios within one run, and sizes, have one."""

    what: str
    value: float
    unit: str
    goal: str = ""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None when there is none."""
        if not self.goal:
            return None
        sign, bound = self.goal.split()
        return self.value <= float(bound) if sign == "≤" else self.value >= float(bound)

    def cells(self) -> list[str]:
        """A table's row."""
        shown = f"{self.value:,.0f}" if self.value >= 1000 else f"{self.value:.3g}"
        sign = {None: "", True: "reached", False: "**missed**"}[self.met]
        return [self.what, f"{shown} {self.unit}", self.goal, sign, self.note]


def machine() -> dict[str, Any]:
    """Enough to judge absolute figures by."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), model
        )
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": model,
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit that is measured, marked when it is not quite that."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def keep(name: str, how: str, figures: Iterable[Figure]) -> None:
    """Put a benchmark's figures into the JSON file, in the place of older ones, and write the page."""
    kept = read()
    kept[name] = {
        "how": how,
        "measured": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "machine": machine(),
        "figures": [asdict(figure) for figure in figures],
    }
    KEPT.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(kept), encoding="utf-8")


def read() -> dict[str, Any]:
    """What was measured last, by benchmark."""
    kept: dict[str, Any] = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.is_file() else {}
    return kept


HEADER = ["what", "measured", "goal", "", "note"]


def page(kept: dict[str, Any]) -> str:
    """docs/benchmarks.md."""
    lines = [
        "# Benchmarks",
        "",
        "`make bench` measures all of this again, and writes this page; `make bench ONLY=server` one part. "
        "Goals are set for ratios within one run and for sizes: they hold on other machines too. "
        "Seconds are this machine's.",
    ]
    for name, part in kept.items():
        on = part["machine"]
        where = (
            f"{on['processor']}, {on['cores']} cores, {on['memory_gb']} GB, Python {on['python']}"
        )
        lines += ["", f"## {name.capitalize().replace('_', ' ')}", "", part["how"], ""]
        lines += [f"*{part['measured']}, commit {part['commit']}, {where}.*", ""]
        rows = [Figure(**figure).cells() for figure in part["figures"]]
        lines += [f"| {' | '.join(HEADER)} |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def table(figures: list[Figure]) -> str:
    """The figures for a terminal."""
    rows = [HEADER, *(figure.cells() for figure in figures)]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join(
            [cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)]
        ).rstrip()
        for row in rows
    )
