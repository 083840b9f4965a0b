"""What Vertex AI rents out for training: machine types, their GPUs, disks, regions and list prices. Standard library only.

Google answers none of this without an account, so it is a table by hand, as known in November 2026:
- machines, GPUs and counts: https://cloud.google.com/vertex-ai/docs/training/configure-compute;
- regions: where Compute Engine offers the GPU, by SkyPilot's catalog; Vertex AI may offer it in fewer of them;
- prices: Compute Engine's list in us-central1, USD for an hour. Those of A2 High, A3 and G2 were looked up (July to October
  2026); those of N1, N2, E2, C2, A2 Ultra and of the GPUs that N1 takes are believed. Another region may cost more.
Something new, or wrong here? Change it here: nothing else knows of machines.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

AS_OF = "us-central1, November 2026"  # some are believed: see docs/gpu-jobs.md of the template
FEE = 1.15  # Vertex AI takes 15 % more than Compute Engine for a machine in a training job

STANDARD, SPOT, FLEX_START = "STANDARD", "SPOT", "FLEX_START"
STRATEGIES = (STANDARD, SPOT, FLEX_START)
SHARED = (
    SPOT,
    FLEX_START,
)  # spare capacity: cheaper, later, or taken back; Google asks for one of them where it has little

PERSISTENT = ("pd-ssd", "pd-standard")
SSD = ("pd-ssd",)
HYPERDISK = ("hyperdisk-balanced",)


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        name: the API's acceleratorType; short: what people say.
        memory: GB of each.
        regions: where it is offered; None: not known.
        flex_start: whether jobs can wait for it with Flex-start.
        price: USD for an hour of one, where it is not part of a machine's price.
    """

    name: str
    short: str
    memory: int
    regions: frozenset[str] | None
    flex_start: bool = False
    price: float | None = None


@dataclass(frozen=True)
class Machine:
    """A machine type.

    Attributes:
        name: the API's machineType.
        gpus: acceleratorType → how many it takes.
        price: USD for an hour, with GPUs that are built in; None: not known.
        spot: the same on Spot, which changes daily; None: not known, but less than `price`.
        built_in: its GPUs are a part of it, and must be named; otherwise they may be left out.
        disks: the boot disks it takes.
        strategies: how it can be had.
    """

    name: str
    gpus: Mapping[str, tuple[int, ...]]
    price: float | None
    spot: float | None = None
    built_in: bool = True
    disks: tuple[str, ...] = PERSISTENT
    strategies: tuple[str, ...] = STRATEGIES


def _regions(text: str) -> frozenset[str]:
    """ "europe: west1 west4; us: central1" as the regions' names."""
    parts = (part.split(":") for part in text.split(";"))
    return frozenset(
        f"{area.strip()}-{place}" for area, places in parts for place in places.split()
    )


_T4 = _regions(
    "asia: east1 east2 northeast1 northeast3 south1 southeast1 southeast2; australia: southeast1; "
    "europe: central2 west1 west2 west3 west4; me: west1; northamerica: northeast1; southamerica: east1; "
    "us: central1 east1 east4 west1 west2 west4"
)
_L4 = _regions(
    "asia: east1 northeast1 northeast3 south1 southeast1; europe: west1 west2 west3 west4 west6; me: central2; "
    "northamerica: northeast1 northeast2; us: central1 east1 east4 west1 west4"
)
_A100 = _regions(
    "asia: northeast1 northeast3 southeast1; europe: west4; me: west1; us: central1 east1 west1 west3 west4"
)
_A100_80GB = _regions("asia: southeast1; europe: west4; us: central1 east4 east5")
_H100 = _regions(
    "asia: east1 northeast1 south1 south2 southeast1; australia: southeast1; europe: north1 west1 west3 west4 west8 west9; "
    "us: central1 east4 east5 west1 west4"
)
_H100_MEGA = _regions(
    "asia: northeast1 northeast3 south1 southeast1; australia: southeast1; europe: west1 west3 west4; "
    "northamerica: northeast2; us: central1 east4 east5 west1 west4"
)
_H200 = _regions("asia: south1 south2; europe: west1 west4; us: central1 east4 east5 south1 west1")
_B200 = _regions(
    "asia: northeast1 southeast1; europe: north1 west4; us: central1 east1 east4 south1 west2 west3"
)
_P100 = _regions(
    "asia: east1; australia: southeast1; europe: west1 west4; us: central1 east1 west1"
)
_P4 = _regions(
    "asia: southeast1; australia: southeast1; europe: west4; northamerica: northeast1; us: central1 east4 west2"
)
_V100 = _regions("asia: east1; europe: west4; us: central1 east1 west1")

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("NVIDIA_TESLA_T4", "T4", 16, _T4, price=0.35),
        Gpu("NVIDIA_TESLA_P4", "P4", 8, _P4, price=0.60),
        Gpu("NVIDIA_TESLA_P100", "P100", 16, _P100, price=1.46),
        Gpu("NVIDIA_TESLA_V100", "V100", 16, _V100, price=2.48),
        Gpu("NVIDIA_L4", "L4", 24, _L4, flex_start=True),
        Gpu("NVIDIA_TESLA_A100", "A100", 40, _A100, flex_start=True),
        Gpu("NVIDIA_A100_80GB", "A100", 80, _A100_80GB, flex_start=True),
        Gpu("NVIDIA_H100_80GB", "H100", 80, _H100, flex_start=True),
        Gpu("NVIDIA_H100_MEGA_80GB", "H100", 80, _H100_MEGA, flex_start=True),
        Gpu("NVIDIA_H200_141GB", "H200", 141, _H200, flex_start=True),
        Gpu("NVIDIA_B200", "B200", 180, _B200, flex_start=True),
        Gpu("NVIDIA_GB200", "GB200", 186, None),
        Gpu("NVIDIA_RTX_PRO_6000", "RTX PRO 6000", 96, None),
    )
}


def _with_gpus() -> Iterator[Machine]:
    """Machines whose GPUs are a part of them."""
    for name, count, price in (
        *(
            ("g2-standard-4", 1, 0.7068),
            ("g2-standard-8", 1, 0.8536),
            ("g2-standard-12", 1, 1.0004),
        ),
        *(
            ("g2-standard-16", 1, 1.1472),
            ("g2-standard-32", 1, 1.7344),
            ("g2-standard-24", 2, 2.0008),
        ),
        *(("g2-standard-48", 4, 4.0017), ("g2-standard-96", 8, 8.0034)),
    ):
        yield Machine(name, {"NVIDIA_L4": (count,)}, price, disks=SSD)
    for count in (1, 2, 4, 8):
        yield Machine(
            f"a2-highgpu-{count}g", {"NVIDIA_TESLA_A100": (count,)}, round(3.67339 * count, 4)
        )
        yield Machine(
            f"a2-ultragpu-{count}g", {"NVIDIA_A100_80GB": (count,)}, round(5.0688 * count, 4)
        )
        yield Machine(
            f"g4-standard-{48 * count}",
            {"NVIDIA_RTX_PRO_6000": (count,)},
            4.5 * count,
            disks=HYPERDISK,
        )
    yield Machine("a2-megagpu-16g", {"NVIDIA_TESLA_A100": (16,)}, 55.7395)
    for count in (1, 2, 4, 8):  # the small ones are had from spare capacity only
        had = SHARED if count < 8 else STRATEGIES
        prices = round(10.9791 * count, 4), round(6.571 * count, 4)
        yield Machine(
            f"a3-highgpu-{count}g",
            {"NVIDIA_H100_80GB": (count,)},
            *prices,
            disks=(*SSD, *HYPERDISK),
            strategies=had,
        )
    yield Machine("a3-megagpu-8g", {"NVIDIA_H100_MEGA_80GB": (8,)}, None, disks=(*SSD, *HYPERDISK))
    yield Machine(
        "a3-ultragpu-8g", {"NVIDIA_H200_141GB": (8,)}, 83.492, spot=50.086, disks=HYPERDISK
    )
    yield Machine("a4-highgpu-8g", {"NVIDIA_B200": (8,)}, 90.216, disks=HYPERDISK)
    yield Machine(
        "a4x-highgpu-4g", {"NVIDIA_GB200": (4,)}, None, disks=HYPERDISK
    )  # Arm: the image must be built for it


def _n1_gpus(processors: int) -> dict[str, tuple[int, ...]]:
    """What can be attached to an N1 machine: each GPU serves so many processors at most."""
    small = (1, 2, 4) if processors <= 16 else (2, 4) if processors == 32 else (4,)
    large = (
        (1, 2, 4, 8)
        if processors <= 8
        else (2, 4, 8)
        if processors == 16
        else (4, 8)
        if processors == 32
        else (8,)
    )
    return {
        **dict.fromkeys(("NVIDIA_TESLA_T4", "NVIDIA_TESLA_P4", "NVIDIA_TESLA_P100"), small),
        "NVIDIA_TESLA_V100": large,
    }


def _without_gpus() -> Iterator[Machine]:
    """Machines of processors; GPUs can be attached to N1."""
    # family, sizes, USD for a processor, USD for a GB, GB for each processor
    for family, sizes, processor, gigabyte, memory in (
        ("e2-standard", (4, 8, 16, 32), 0.021812, 0.002924, 4.0),
        ("e2-highmem", (4, 8, 16), 0.021812, 0.002924, 8.0),
        ("n1-standard", (4, 8, 16, 32, 64, 96), 0.031611, 0.004237, 3.75),
        ("n1-highmem", (4, 8, 16, 32, 64, 96), 0.031611, 0.004237, 6.5),
        ("n2-standard", (4, 8, 16, 32, 48, 64, 80), 0.031611, 0.004237, 4.0),
        ("n2-highmem", (4, 8, 16, 32, 48, 64, 80), 0.031611, 0.004237, 8.0),
        ("c2-standard", (4, 8, 16, 30, 60), 0.03398, 0.00455, 4.0),
    ):
        for size in sizes:
            gpus = _n1_gpus(size) if family.startswith("n1") else {}
            price = round(size * (processor + gigabyte * memory), 4)
            yield Machine(f"{family}-{size}", gpus, price, built_in=False)


MACHINES = {machine.name: machine for machine in (*_without_gpus(), *_with_gpus())}


def machines_with(accelerator: str, count: int = 0) -> list[str]:
    """The machines that take this GPU, in this number if one is given; the smallest first."""
    fitting = (
        machine
        for machine in MACHINES.values()
        if (count in machine.gpus.get(accelerator, ()) if count else accelerator in machine.gpus)
    )
    return [machine.name for machine in sorted(fitting, key=lambda machine: machine.price or 1e9)]


def price(
    machine: Machine, accelerator: str, count: int, strategy: str
) -> tuple[float | None, str]:
    """USD for an hour of a training job on one such machine, and a sign: "" that much, "≈" it changes daily, "<" less.

    Returns:
        None: not known. "<": the price of STANDARD, where that of the strategy is not known.
    """
    gpu = GPUS.get(accelerator)
    attached = gpu.price * count if gpu and gpu.price and not machine.built_in else 0.0
    if strategy == SPOT and machine.spot is not None:
        return machine.spot * FEE, "≈"
    return (
        None if machine.price is None else (machine.price + attached) * FEE
    ), "<" if strategy in SHARED else ""
