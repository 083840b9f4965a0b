"""make cost: what each environment costs, from project.yaml and list prices: a month of idling, a run, 1,000 predictions.

python -m level_2_cicd.costs [--minutes 30]       asks nobody; prices are of level_1_pipeline.vertex.machines, and of PRICES below

It is an estimate: what is by the gigabyte, networks and taxes are left out.
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

HOURS = 730  # of a month
STEPS = 4  # of the pipeline, beside training; each has an e2-standard-4 for some minutes
STEP_MINUTES = 3.0
ANSWERED = (1, 10, 100)  # requests each second

# List prices in US dollars, as believed in November 2026; look them up before you rely on them.
PRICES = {
    "run": 0.03,  # one run of a pipeline: https://cloud.google.com/vertex-ai/pricing
    "key version": 0.06,  # a month: https://cloud.google.com/kms/pricing
    "Airflow, small": 350.0,  # a month, idle: https://cloud.google.com/composer/pricing
    "clock": 0.10,  # a month, each job beyond the first three: https://cloud.google.com/scheduler/pricing
    "forwarding rule": 0.01,  # an hour: https://cloud.google.com/vpc/network-pricing
    "disk": 0.10,  # a GB of pd-balanced for a month: https://cloud.google.com/compute/disks-image-pricing
}
FREE_CLOCKS = 3  # of a billing account
SMALL = (
    "e2",
    "n1",
    "n2",
)  # families with a machine of two processors, which serves and does not train
WORKBENCH = ("e2-standard-4", 250)  # its machine, and the GB of its disks


@dataclass(frozen=True)
class Cost:
    """An amount in dollars, and what it is for.

    Attributes:
        amount: nan: not known.
        sign: "<" less than that, "≈" about that; see level_1_pipeline.vertex.machines.price.
    """

    what: str
    amount: float
    note: str = ""
    sign: str = ""


def hour(machine: str) -> float:
    """A machine that serves, or runs a step or Jupyter, with Vertex AI's share."""
    found = MACHINES.get(machine) or _small(machine)
    if found is None or found.price is None:
        known = [name for name, other in MACHINES.items() if other.price is not None]
        raise UserError(
            f"cloud.serve.machine in {PROJECT_FILE}: the price of {machine} is not known here{nearest(machine, known)}. "
            "If it is a machine of Google's, write its price into level_1_pipeline/vertex/machines.yaml."
        )
    return found.price * FEE


def _small(machine: str) -> machines.Machine | None:
    """A machine of two processors: half of the one with four."""
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
    """A month in which nobody does anything."""
    cloud = settings.cloud
    serve = cloud.serve
    each = hour(serve.machine)
    yield Cost(
        "endpoint",
        serve.replicas[0] * each * HOURS,
        f"{serve.replicas[0]} × {serve.machine}, day and night, from the first model on",
    )
    if cloud.encryption == "customer-managed":
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
    clocks = bool(cloud.events.schedule) + (cloud.data_ingestion == "scheduled-job")
    if clocks:
        note = f"{clocks} of the {FREE_CLOCKS} free jobs of a billing account; otherwise {_usd(PRICES['clock'])} each"
        yield Cost("Cloud Scheduler", 0.0, note)


def run(settings: Settings, root: Path, minutes: float) -> Iterator[Cost]:
    """One run of the pipeline, whose training takes so many minutes on the first of its jobs."""
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
        total += math.nan if each is None else each * pool["replicaCount"]
        signs.add(sign)
    note = f"{minutes:g} minutes of '{name}' (others: MINUTES=30)"
    if strategy in machines.SHARED:
        note += ", on spare capacity, whose price changes daily"
    if math.isnan(total):
        note += "; its price is not known here"
    yield Cost("training", total * minutes / 60, note, _sign(signs))


def predictions(settings: Settings) -> Iterator[Cost]:
    """1,000 predictions, while the endpoint's fewest replicas answer so many requests each second."""
    serve = settings.cloud.serve
    for rate in ANSWERED:
        yield Cost(
            f"at {rate} each second", serve.replicas[0] * hour(serve.machine) / (rate * 3600) * 1000
        )


def report(settings: Settings, root: Path, minutes: float) -> str:
    """All of it, for each environment."""
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
    """Of a sum."""
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
    """Command line."""
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
