"""Load, check and list the GPU jobs in level_1_pipeline/gpu_jobs/*.yaml.

python -m level_1_pipeline.vertex.gpu_jobs [--minutes N]   list the jobs with prices
python -m level_1_pipeline.vertex.gpu_jobs NAME            print one for
                                                           `gcloud ai custom-jobs create --config=`

A file is a CustomJobSpec of the API: machine, GPU, disk, scheduling. `resolve` adds the fields that
depend on the project: image, command, service account. The encryption key is not part of a
CustomJobSpec but of the CustomJob around it.
"""

import argparse
import copy
import math
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from core.config import StrictLoader
from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from gcp.environment import Environment, resolve_environment
from level_1_pipeline import containers
from level_1_pipeline.vertex import machines
from level_1_pipeline.vertex.job_checks import check, nearest
from level_1_pipeline.vertex.machines import GPUS, MACHINES, STANDARD
from project.settings import Settings, load_settings

FOLDER = Path("level_1_pipeline/gpu_jobs")
# The training image has no ENTRYPOINT; each training adds its own arguments.
COMMAND = ("python", "-m", "trainer.train")
NOT_TRIED = re.compile(r"^# not tried: ", re.MULTILINE)


# ── files ─────────────────────────────────────────────────────────────────────────────────────────
def names(root: Path) -> list[str]:
    """Return the names of all jobs, sorted."""
    return sorted(path.stem for path in (root / FOLDER).glob("*.yaml"))


def load(name: str, root: Path) -> dict[str, Any]:
    """Return the content of a job's file, unchecked."""
    known = names(root)
    if name not in known:
        raise UserError(
            f"there is no GPU job '{name}'{nearest(name, known)}. make gpu-jobs lists them."
        )
    path = FOLDER / f"{name}.yaml"
    try:
        document = yaml.load((root / path).read_text(encoding="utf-8"), Loader=StrictLoader)  # noqa: S506 (a SafeLoader)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path} is empty, or not a mapping of fields to values.")
    return document


def resolve(name: str, root: Path, environment: Environment | None, image: str) -> dict[str, Any]:
    """Return a checked job with image, command, service account and network filled in.

    Fields that depend on an unknown `environment` (None) or `image` (empty) are left out.
    """
    job = load(name, root)
    check(job, environment.region if environment else "", str(FOLDER / f"{name}.yaml"))
    filled = copy.deepcopy(job)
    for pool in filled["workerPoolSpecs"]:
        container = (
            {"imageUri": image, "command": list(COMMAND)} if image else {"command": list(COMMAND)}
        )
        # The file's own values take precedence.
        pool["containerSpec"] = container | pool.get("containerSpec", {})
    account, attachment = (
        (environment.account("trainer"), environment.network_attachment)
        if environment
        else ("", "")
    )
    return {
        **({"serviceAccount": account} if account else {}),
        **({"pscInterfaceConfig": {"networkAttachment": attachment}} if attachment else {}),
        **filled,
    }


def require_known(settings: Settings, root: Path) -> None:
    """Reject unknown names in cloud.train.jobs."""
    known = names(root)
    for name in settings.cloud.train.jobs:
        if name not in known:
            raise UserError(
                f"cloud.train.jobs in {PROJECT_FILE}: there is no GPU job '{name}'{nearest(name, known)}. make gpu-jobs lists them."
            )


def chosen_jobs(
    settings: Settings, root: Path, environment: Environment | None, image: str
) -> list[dict[str, Any]]:
    """Return the resolved jobs of cloud.train.jobs, in their order."""
    require_known(settings, root)
    return [resolve(name, root, environment, image) for name in settings.cloud.train.jobs]


# ── list ──────────────────────────────────────────────────────────────────────────────────────────
@dataclass(frozen=True)
class Row:
    """One job in the list; all cells are text."""

    name: str
    machine: str
    gpus: str
    memory: str
    strategy: str
    price: str
    offered: str
    tried: str
    total: str = ""


def describe(name: str, root: Path, region: str, minutes: float | None = None) -> Row:
    """Return one job as a row of the list."""
    job = resolve(name, root, None, "")
    pools = job["workerPoolSpecs"]
    machine = pools[0]["machineSpec"]
    replicas = sum(pool["replicaCount"] for pool in pools)
    accelerator, count = machine.get("acceleratorType", ""), machine.get("acceleratorCount", 0)
    gpu = GPUS.get(accelerator)
    strategy = job.get("scheduling", {}).get("strategy", STANDARD)
    each, sign = machines.price(MACHINES[machine["machineType"]], accelerator, count, strategy)
    regions = gpu.regions if gpu else {region}
    return Row(
        name=name,
        machine=(f"{replicas} × " if replicas > 1 else "") + machine["machineType"],
        gpus=f"{count * replicas} × {gpu.short}" if gpu else "–",
        memory=f"{gpu.memory} GB" if gpu else "–",
        strategy=strategy,
        price=_money(each and each * replicas, sign),
        total=_money(each and each * replicas * (minutes or 0) / 60, sign),
        offered="?" if regions is None else "yes" if region in regions else "no",
        tried="never"
        if NOT_TRIED.search((root / FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
        else "yes",
    )


def _money(amount: float | None, sign: str) -> str:
    return "?" if amount is None else f"{sign} {amount:,.2f}".strip()


def table(root: Path, region: str, minutes: float | None = None) -> str:
    """Return a table of all jobs, cheapest first."""
    rows = sorted((describe(name, root, region, minutes) for name in names(root)), key=_expense)
    columns = {
        "job": [row.name for row in rows],
        "machine": [row.machine for row in rows],
        "GPUs": [row.gpus for row in rows],
        "memory each": [row.memory for row in rows],
        "strategy": [row.strategy for row in rows],
        "USD/hour": [row.price for row in rows],
        **({f"{minutes:g} minutes": [row.total for row in rows]} if minutes else {}),
        f"in {region}": [row.offered for row in rows],
        "tried": [row.tried for row in rows],
    }
    widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
    numbers = [title.startswith("USD") or title.endswith("minutes") for title in columns]
    lines = [tuple(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, numbers, strict=True)
        ).rstrip()
        for line in lines
    )


def _expense(row: Row) -> tuple[float, str]:
    # Sort by the shown price; unknown prices come last.
    amount = row.price.lstrip("<≈ ").replace(",", "")
    return (math.inf if amount == "?" else float(amount)), row.name


LEGEND = f"""
USD: list prices with Vertex AI's share, {machines.AS_OF}; they may have changed, and some are only believed.
<: less than that, because Spot and Flex-start are cheaper than STANDARD. ≈: Spot, which changes daily. ?: not known here.
in …: whether Google offers the GPU in that region; whether one is free shows only when a job asks.
tried: has this file ever run on such a machine? never: its fields are checked, no more."""


# ── command line ──────────────────────────────────────────────────────────────────────────────────
def _place(settings: Settings) -> Environment | None:
    """Return the environment, or None if project.yaml does not define one yet."""
    try:
        return resolve_environment(settings)
    except UserError:
        # An environment that the caller named must exist.
        if os.environ.get("ENVIRONMENT"):
            raise
        return None


def show(name: str, settings: Settings, root: Path) -> str:
    """Return one job as YAML for gcloud; print what is missing to standard error."""
    # Notes go to standard error, so that standard output can be piped into a file.
    environment = _place(settings)
    image = (
        containers.image(containers.find(root, ["train"])[0], environment.images)
        if environment
        else ""
    )
    job = resolve(name, root, environment, image)
    if environment is None:
        missing = "containerSpec.imageUri, without which gcloud refuses it, and serviceAccount, if there is one"
        print(
            f"# cloud.environments in {PROJECT_FILE} names no Google Cloud project yet, so these are left out: {missing}.",
            file=sys.stderr,
        )
    elif environment.key:
        print(
            f"# Its key is no part of this file: add --kms-key={environment.key}", file=sys.stderr
        )
    arguments = f"^;^--train;gs://BUCKET/train.parquet;--hyperparameters;{settings.hyperparameters.to_json()}"
    print(
        f"# What differs from training to training is not in this file: add --args='{arguments}'\n"
        "# and the folder that the model goes to, as baseOutputDirectory: {outputUriPrefix: gs://BUCKET/FOLDER}.",
        file=sys.stderr,
    )
    return yaml.safe_dump(job, sort_keys=False, width=200)


def minutes_of(text: str) -> float:
    minutes = float(text) if re.fullmatch(r"\d{1,6}(\.\d+)?", text) else 0.0
    if not minutes:
        raise UserError(f"MINUTES={text}: how many? For example: MINUTES=30")
    return minutes


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="make gpu-jobs",
        description="List the machines that a training job can rent, or print one job.",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="print this job as gcloud takes it")
    parser.add_argument("--minutes", metavar="N", help="what each costs for so long")
    given = parser.parse_args()
    root, settings = project_root(), load_settings()
    if given.name:
        print(show(given.name, settings, root), end="")
        return
    print(
        table(
            root,
            settings.cloud.region,
            minutes_of(given.minutes) if given.minutes is not None else None,
        )
    )
    print(LEGEND)
    require_known(settings, root)


if __name__ == "__main__":
    run_command(main)
