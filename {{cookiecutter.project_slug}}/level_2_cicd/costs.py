"""Estimate the cost of an idle month, a pipeline run and 1,000 predictions: make cost.

python -m level_2_cicd.costs [--minutes 30]    makes no API call

List prices come from level_1_pipeline/vertex/machines.yaml and PRICES below. Charges per gigabyte,
networks and taxes are left out.
"""

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from core.errors import UserError, run_command
from core.paths import PROJECT_FILE, project_root
from gcp.config import EnvironmentConfig, KeyUse
from level_1_pipeline.vertex import gpu_jobs, machines
from level_1_pipeline.vertex.job_checks import nearest
from level_1_pipeline.vertex.machines import AS_OF, FEE, MACHINES
from project.settings import Settings, load_settings

HOURS = 730  # per month
STEPS = 4  # pipeline steps besides training
STEP_MINUTES = 3.0  # assumed time of a step on an e2-standard-4
ANSWERED = (1, 10, 100)  # requests per second

# List prices in US dollars, November 2026, unverified: check the pages before relying on them.
PRICES = {
    "run": 0.03,  # per pipeline run: https://cloud.google.com/vertex-ai/pricing
    "key version": 0.06,  # per month: https://cloud.google.com/kms/pricing
    "Airflow, small": 350.0,  # per idle month: https://cloud.google.com/composer/pricing
    # Per month, for each job beyond the first three: https://cloud.google.com/scheduler/pricing
    "clock": 0.10,
    "forwarding rule": 0.01,  # per hour: https://cloud.google.com/vpc/network-pricing
    # Per GB of pd-balanced and month: https://cloud.google.com/compute/disks-image-pricing
    "disk": 0.10,
}
FREE_CLOCKS = 3  # per billing account
# Families with a machine of two vCPUs: for serving, so machines.yaml, for training, lacks it.
SMALL = ("e2", "n1", "n2")
WORKBENCH = ("e2-standard-4", 250)  # machine type, GB of disks


@dataclass(frozen=True)
class Cost:
    """One cost item in US dollars; an unknown amount is nan.

    `sign` is "<" for an upper bound and "≈" for an approximation, as in machines.price.
    """

    what: str
    amount: float
    note: str = ""
    sign: str = ""


def hour(machine: str) -> float:
    """Return USD per hour of a machine for serving, steps or Jupyter, with Vertex AI's fee."""
    found = MACHINES.get(machine) or _small(machine)
    if found is None or found.price is None:
        known = [name for name, other in MACHINES.items() if other.price is not None]
        raise UserError(
            f"cloud.serve.machine in {PROJECT_FILE}: the price of {machine} is not known here{nearest(machine, known)}. "
            "If it is a machine of Google's, write its price into level_1_pipeline/vertex/machines.yaml."
        )
    return found.price * FEE


def _small(machine: str) -> machines.Machine | None:
    """Return a machine with two vCPUs at half the price of the one with four, or None."""
    family, _, size = machine.rpartition("-")
    four = MACHINES.get(f"{family}-4")
    if (
        size != "2"
        or family.split("-", maxsplit=1)[0] not in SMALL
        or four is None
        or four.price is None
    ):
        return None
    return machines.Machine(machine, {}, round(four.price / 2, 4), built_in=False)


def idle(settings: Settings, where: EnvironmentConfig) -> Iterator[Cost]:
    """Yield the monthly costs of an idle environment."""
    cloud = settings.cloud
    serve = cloud.serve
    each = hour(serve.machine)
    yield Cost(
        "endpoint",
        serve.replicas[0] * each * HOURS,
        f"{serve.replicas[0]} × {serve.machine}, day and night, from the first model on",
    )
    if cloud.encryption == "customer-managed":
        # Keys for optional services exist only if the service is chosen.
        of_choice = {
            "airflow": cloud.data_ingestion == "managed-airflow",
            "compute": cloud.workbench,
        }
        uses = {use for use in get_args(KeyUse) if of_choice.get(use, True)}
        made = len(uses - set(where.existing.keys))
        yield Cost(
            "keys",
            made * PRICES["key version"],
            f"{made} keys in Cloud KMS; every 90 days each costs as much again",
        )
    if cloud.data_ingestion == "managed-airflow":
        yield Cost("Airflow", PRICES["Airflow, small"], "a small environment of Composer, idle")
    if cloud.private and not where.existing.network:
        yield Cost(
            "private network",
            PRICES["forwarding rule"] * HOURS,
            "a forwarding rule, the way to Google's APIs",
        )
    if cloud.workbench:
        yield Cost(
            "Workbench's disks",
            WORKBENCH[1] * PRICES["disk"],
            f"{WORKBENCH[1]} GB, also while it is stopped; while it runs, {_usd(hour(WORKBENCH[0]))} more each hour",
        )
    # Assumed free: the number of free jobs is per billing account, which may have other jobs.
    clocks = bool(cloud.events.schedule) + (cloud.data_ingestion == "scheduled-job")
    if clocks:
        note = f"{clocks} of the {FREE_CLOCKS} free jobs of a billing account; otherwise {_usd(PRICES['clock'])} each"
        yield Cost("Cloud Scheduler", 0.0, note)


def run(settings: Settings, root: Path, minutes: float) -> Iterator[Cost]:
    """Yield the costs of one pipeline run that trains for `minutes` on the first job."""
    yield Cost("pipeline", PRICES["run"], "a fee for each run")
    steps = STEPS * STEP_MINUTES / 60 * hour("e2-standard-4")
    yield Cost(
        "steps",
        steps,
        f"{STEPS} × {STEP_MINUTES:g} minutes of e2-standard-4, if they take so long",
        "≈",
    )
    name = settings.cloud.train.jobs[0]
    job = gpu_jobs.resolve(name, root, None, "")
    total, signs = 0.0, set()
    for pool in job["workerPoolSpecs"]:
        spec = pool["machineSpec"]
        strategy = job.get("scheduling", {}).get("strategy", machines.STANDARD)
        each, sign = machines.price(
            MACHINES[spec["machineType"]],
            spec.get("acceleratorType", ""),
            spec.get("acceleratorCount", 0),
            strategy,
        )
        # nan makes the sum unknown.
        total += math.nan if each is None else each * pool["replicaCount"]
        signs.add(sign)
    note = f"{minutes:g} minutes of '{name}' (others: MINUTES=30)"
    if strategy in machines.SHARED:
        note += ", on spare capacity, whose price changes daily"
    if math.isnan(total):
        note += "; its price is not known here"
    yield Cost("training", total * minutes / 60, note, _sign(signs))


def predictions(settings: Settings) -> Iterator[Cost]:
    """Yield the cost of 1,000 predictions at several request rates, with the fewest replicas."""
    serve = settings.cloud.serve
    for rate in ANSWERED:
        yield Cost(
            f"at {rate} each second", serve.replicas[0] * hour(serve.machine) / (rate * 3600) * 1000
        )


def report(settings: Settings, root: Path, minutes: float) -> str:
    """Return the estimate of all environments as text."""
    lines = []
    for name, where in settings.cloud.environments.items():
        costs = list(idle(settings, where))
        lines += [f"{name}: a month in which nothing happens", *_lines(costs), ""]
    lines += [
        "one run of the pipeline, in any environment",
        *_lines(list(run(settings, root, minutes))),
        "",
    ]
    title = "1,000 predictions: their share of the endpoint's price, which the month above has paid already"
    lines += [title, *_lines(list(predictions(settings)), total=False), ""]
    elsewhere = (
        ""
        if AS_OF.startswith(f"{settings.cloud.region},")
        else f" Those of {settings.cloud.region} may differ."
    )
    lines += [
        "US dollars; < less than that, ≈ about that, ? not known.",
        f"Machines: list prices, {AS_OF}; some are only believed.{elsewhere} The rest: believed, November 2026.",
        "Left out: what is by the gigabyte (buckets, images, logs), builds and the scan of each new image, networks, taxes; more",
        "replicas when many ask, and a new version's second machine for the minutes of its trial.",
    ]
    return "\n".join(lines)


def _lines(costs: list[Cost], total: bool = True) -> list[str]:
    if total and len(costs) > 1:
        signs = {cost.sign for cost in costs}
        costs = [*costs, Cost("together", sum(cost.amount for cost in costs), sign=_sign(signs))]
    return [
        f"  {cost.what:<20} {_usd(cost.amount, cost.sign):>12}   {cost.note}".rstrip()
        for cost in costs
    ]


def _sign(signs: set[str]) -> str:
    """Return the sign of a sum: "<" if any item is an upper bound, else "≈" if any has it."""
    return next((sign for sign in ("<", "≈") if sign in signs), "")


def _usd(amount: float, sign: str = "") -> str:
    if math.isnan(amount):
        return "?"
    return (
        f"{sign} {amount:,.2f}".strip()
        if amount >= 0.01 or not amount
        else f"{sign} {amount:.4f}".strip()
    )


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m level_2_cicd.costs", description="What the cloud costs, as an estimate."
    )
    parser.add_argument(
        "--minutes", type=gpu_jobs.minutes_of, default=10.0, help="of training in a run"
    )
    asked = parser.parse_args()
    print(report(load_settings(), project_root(), asked.minutes))


if __name__ == "__main__":
    run_command(main)
