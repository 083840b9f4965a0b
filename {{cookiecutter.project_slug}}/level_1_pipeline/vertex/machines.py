"""Load machine types, GPUs and list prices of Vertex AI training from machines.yaml."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

STANDARD, SPOT, FLEX_START = "STANDARD", "SPOT", "FLEX_START"
STRATEGIES = (STANDARD, SPOT, FLEX_START)
SHARED = (SPOT, FLEX_START)  # spare capacity: cheaper, but starts later or is preempted

_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
AS_OF: str = _DATA["as_of"]
FEE: float = _DATA["fee"]


@dataclass(frozen=True)
class Gpu:
    """A GPU: `name` is the API's acceleratorType, memory in GB, price in USD per hour."""

    name: str
    short: str
    memory: int
    regions: frozenset[str] | None  # None: unknown
    flex_start: bool = False
    price: float | None = None  # None: part of the machine's price


@dataclass(frozen=True)
class Machine:
    """A machine type: `gpus` maps acceleratorType to the allowed counts; prices in USD per hour."""

    name: str
    gpus: Mapping[str, tuple[int, ...]]
    price: float | None  # with built-in GPUs; None: unknown
    spot: float | None = None  # None: unknown, but less than `price`
    built_in: bool = True  # a job must name built-in GPUs; others are optional
    disks: tuple[str, ...] = ("pd-ssd", "pd-standard")
    strategies: tuple[str, ...] = STRATEGIES


def _load_machines() -> dict[str, Machine]:
    machines = []
    for family, row in _DATA["families"].items():
        for vcpus in row["vcpus"]:
            gpus = {
                gpu: tuple(count for count, most in counts.items() if vcpus <= most)
                for gpu, counts in _DATA["n1_gpus"].items()
                if family.startswith("n1")
            }
            price = round(vcpus * (row["vcpu"] + row["gb"] * row["memory"]), 4)
            machines.append(Machine(f"{family}-{vcpus}", gpus, price, built_in=False))
    for name, row in _DATA["machines"].items():
        gpus = {row["gpu"]: (row["count"],)}
        options: dict[str, Any] = {
            key: tuple(row[key]) for key in ("disks", "strategies") if key in row
        }
        machines.append(Machine(name, gpus, row.get("price"), row.get("spot"), **options))
    return {machine.name: machine for machine in machines}


GPUS = {
    name: Gpu(name, **{**row, "regions": frozenset(row["regions"]) if "regions" in row else None})
    for name, row in _DATA["gpus"].items()
}
MACHINES = _load_machines()


def machines_with(accelerator: str, count: int = 0) -> list[str]:
    """Return the machines that support this GPU (and count, if given), cheapest first."""
    machines = (
        machine
        for machine in MACHINES.values()
        if accelerator in machine.gpus and (not count or count in machine.gpus[accelerator])
    )
    return [machine.name for machine in sorted(machines, key=lambda machine: machine.price or 1e9)]


def price(
    machine: Machine, accelerator: str, count: int, strategy: str
) -> tuple[float | None, str]:
    """Return USD per hour of one machine in a job (None: unknown), and a sign.

    The sign is "" for exact, "≈" for a Spot price, which changes daily, and "<" for an upper bound:
    the STANDARD price, if the price of the strategy is unknown.
    """
    if strategy == SPOT and machine.spot is not None:
        return machine.spot * FEE, "≈"
    sign = "<" if strategy in SHARED else ""
    if machine.price is None:
        return None, sign
    gpu = GPUS.get(accelerator)
    attached = gpu.price * count if gpu and gpu.price and not machine.built_in else 0.0
    return (machine.price + attached) * FEE, sign
