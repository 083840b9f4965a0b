"""Check a GPU job before it is submitted: Vertex AI reports some errors only after minutes.

The job is validated first against the API's CustomJobSpec, strictly, then against machines.yaml.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from core.errors import UserError
from core.paths import PROJECT_FILE
from level_1_pipeline.vertex import machines
from level_1_pipeline.vertex.machines import FLEX_START, GPUS, MACHINES, SPOT, STANDARD

DISK_GB = (100, 64_000)
LONGEST = timedelta(days=7)  # the longest timeout with Flex-start
OLD_NAMES = {"ON_DEMAND": STANDARD, "LOW_COST": SPOT}
MOST = 15  # the most choices listed in a message
ASK = "Is it new? level_1_pipeline/vertex/machines.yaml lists what is known."


def check(job: dict[str, Any], region: str, where: str) -> None:
    """Reject a job that Vertex AI would reject or never start; makes no API call.

    An empty `region` skips the check of regions; `where` names the job in messages.
    """
    from google.cloud.aiplatform_v1 import types  # slow: about a second
    from google.protobuf import json_format

    spec = types.CustomJobSpec.pb(types.CustomJobSpec())
    problems = list(_not_of(spec.DESCRIPTOR, job, ""))
    if not problems:
        try:
            json_format.ParseDict(job, spec, ignore_unknown_fields=False)
        except json_format.ParseError as error:
            problems = [" ".join(str(error).split())]
    problems = problems or list(_mistakes(spec, region))
    if problems:
        # Schedule problems are found once per worker pool: report each only once.
        told = list(dict.fromkeys(problems))
        raise UserError(f"{where}: " + "\n  ".join(["", *told] if len(told) > 1 else told))


def _not_of(kind: Any, value: Any, path: str) -> Iterator[str]:
    """Yield unknown fields and invalid values of an API message."""
    if not isinstance(value, dict):
        yield f"{path or 'the job'} is {_shown(value)}; it takes {', '.join(field.json_name for field in kind.fields)}."
        return
    known = {field.json_name: field for field in kind.fields}
    for name, inner in value.items():
        here = f"{path}.{name}" if path else str(name)
        if name not in known:
            yield f"{here}: there is no such field{nearest(str(name), known)}."
        elif inner is None:
            yield f"{here} has no value; give it one, or remove it."
        elif not known[name].is_repeated:
            yield from _not_in(known[name], inner, here)
        elif not isinstance(inner, list):
            yield f"{here} is {_shown(inner)}; it takes a list."
        else:
            for number, element in enumerate(inner):
                yield from _not_in(known[name], element, f"{here}[{number}]")


def _not_in(field: Any, value: Any, path: str) -> Iterator[str]:
    """Yield the problems of one field's value."""
    if field.message_type and field.message_type.full_name == "google.protobuf.Duration":
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,11}(\.\d{1,9})?s", value):
            yield f'{path} is {_shown(value)}; it takes seconds with an s, such as "3600s".'
    elif field.message_type:
        yield from _not_of(field.message_type, value, path)
    elif field.enum_type:
        choices = [choice.name for choice in field.enum_type.values if choice.number]
        if value not in choices:
            yield f"{path} is {_shown(value)}{nearest(str(value), choices)}."
    else:
        python, described = {
            field.CPPTYPE_STRING: (str, "text; numbers stand in quotes"),
            field.CPPTYPE_BOOL: (bool, "true or false"),
        }.get(field.cpp_type, (int, "a whole number"))
        if type(value) is not python:  # not isinstance: a bool is an int in Python
            yield f"{path} is {_shown(value)}; it takes {described}."


def _mistakes(spec: Any, region: str) -> Iterator[str]:
    """Yield problems that the API's definition allows but its machines do not."""
    yield from _mistakes_of_pools(spec.worker_pool_specs)
    for number, pool in enumerate(spec.worker_pool_specs):
        here = f"workerPoolSpecs[{number}]"
        if pool.HasField("python_package_spec"):
            yield f"{here}.pythonPackageSpec: a job runs the training image, and no package; remove it."
        problem = _mistake_of_machine(pool.machine_spec, f"{here}.machineSpec")
        if problem:
            yield problem
            continue
        yield from _mistakes_of_disk(pool, here)
        yield from _mistakes_of_region(pool.machine_spec, region, here)
        yield from _mistakes_of_strategy(spec.scheduling, pool.machine_spec)
    yield from _mistakes_of_time(spec.scheduling)


def _mistakes_of_pools(pools: Any) -> Iterator[str]:
    """Yield problems of the number and the sizes of worker pools."""
    # The trainer reads CLUSTER_SPEC this way: pool 0 is the leader, pool 1 has the other machines.
    if not 1 <= len(pools) <= 2:
        yield f"workerPoolSpecs has {len(pools)} entries; it takes 1, or 2 for several machines (the first leads)."
    for number, pool in enumerate(pools):
        here = f"workerPoolSpecs[{number}]"
        if pool.replica_count < 1 or (number == 0 and pool.replica_count > 1):
            several = (
                "; for more machines add a second pool, like the first"
                if number == 0
                else " or more"
            )
            yield f"{here}.replicaCount is {pool.replica_count or 'missing'}; it takes 1{several}."
        for field in pool.machine_spec.DESCRIPTOR.fields:
            if getattr(pool.machine_spec, field.name) != getattr(pools[0].machine_spec, field.name):
                yield f"{here}.machineSpec.{field.json_name} differs from that of workerPoolSpecs[0]; it takes the same."


def _mistake_of_machine(machine: Any, path: str) -> str:
    """Return the problem of a machine, GPU and count that do not fit; empty if they do."""
    name = machine.machine_type
    if name not in MACHINES:
        said = (
            f"is {_shown(name)}{nearest(name, MACHINES)}"
            if name
            else "is missing; g2-standard-8 has one L4"
        )
        return f"{path}.machineType {said}. {ASK}"
    if machine.tpu_topology:
        return f"{path}.tpuTopology is {_shown(machine.tpu_topology)}; this project trains on GPUs, so remove it."
    accelerator, count, gpus = _accelerator(machine), machine.accelerator_count, MACHINES[name].gpus
    if not (accelerator or count or MACHINES[name].built_in):
        return ""
    return _mistake_of_gpu(name, gpus, accelerator, count, path)


def _mistake_of_gpu(
    name: str, gpus: Mapping[str, Sequence[int]], accelerator: str, count: int, path: str
) -> str:
    """Return which GPUs the machine supports and which machines support the requested GPU."""
    takes = f"machineType {name} takes " + (
        "; or ".join(f"{_or(counts)} {kind}" for kind, counts in gpus.items()) or "no GPU"
    )
    if accelerator in gpus:
        if count in gpus[accelerator]:
            return ""
        takes = f"machineType {name} takes {_or(gpus[accelerator])} {accelerator}"
        return f"{path}.acceleratorCount is {count or 'missing'}: {takes}{_use(count, accelerator, count)}."
    if accelerator:
        return f"{path}.acceleratorType is {accelerator}: {takes}{_use(accelerator, accelerator, count)}."
    if gpus:
        return f"{path}.acceleratorType is missing, beside acceleratorCount {count}: {takes}."
    return f"{path}.acceleratorCount is {count}: {takes}."


def _use(wanted: object, accelerator: str, count: int) -> str:
    """Return a suggestion of up to three machines with this GPU, or an empty string."""
    fitting = (
        machines.machines_with(accelerator, count) or machines.machines_with(accelerator)
        if count
        else []
    )
    return f"; for {wanted} use {', '.join(fitting[:3])}" if fitting else ""


def _mistakes_of_disk(pool: Any, path: str) -> Iterator[str]:
    """Yield problems of the boot disk's type and size."""
    # Without a type the API uses pd-ssd, which not every machine supports.
    machine, disk = MACHINES[pool.machine_spec.machine_type], pool.disk_spec
    if disk.boot_disk_type not in machine.disks and (
        disk.boot_disk_type or "pd-ssd" not in machine.disks
    ):
        said = f"is {_shown(disk.boot_disk_type)}" if disk.boot_disk_type else "is missing"
        yield f"{path}.diskSpec.bootDiskType {said}: machineType {machine.name} takes {_or(machine.disks)}."
    smallest, largest = DISK_GB
    if pool.disk_spec.boot_disk_size_gb and not smallest <= disk.boot_disk_size_gb <= largest:
        yield f"{path}.diskSpec.bootDiskSizeGb is {disk.boot_disk_size_gb}; it takes {smallest} to {largest}."


def _mistakes_of_region(machine: Any, region: str, path: str) -> Iterator[str]:
    """Yield a problem if the region does not offer the GPU; suggest the nearest regions."""
    gpu = GPUS.get(_accelerator(machine))
    if region and gpu and gpu.regions is not None and region not in gpu.regions:
        # Regions of the same continent first: the part before the hyphen, such as "europe".
        here = region.partition("-")[0]
        near = sorted(gpu.regions, key=lambda other: (other.partition("-")[0] != here, other))
        there = f"{region} (cloud.region in {PROJECT_FILE})"
        yield f"{path}.machineSpec.acceleratorType is {gpu.name}, which {there} does not offer; {', '.join(near[:3])} do. {ASK}"


def _mistakes_of_strategy(scheduling: Any, machine: Any) -> Iterator[str]:
    """Yield problems of the scheduling strategy."""
    strategy = type(scheduling).Strategy.Name(scheduling.strategy)
    found, gpu = MACHINES[machine.machine_type], GPUS.get(_accelerator(machine))
    if strategy in OLD_NAMES:
        yield f"scheduling.strategy is {strategy}, which is an old name; the new one is {OLD_NAMES[strategy]}."
        return
    strategy = strategy if scheduling.strategy else STANDARD
    if strategy not in found.strategies:
        larger = f"a3-highgpu-8g takes {STANDARD} too"
        yield f"scheduling.strategy is {strategy}: machineType {found.name} takes {_or(found.strategies)}; {larger}."
    elif strategy == FLEX_START and not (gpu and gpu.flex_start):
        fitting = _or([gpu.name for gpu in GPUS.values() if gpu.flex_start])
        instead = f"for machineType {found.name} use {STANDARD} or {SPOT}"
        yield f"scheduling.strategy is {strategy}, which is for acceleratorType {fitting}; {instead}."


def _mistakes_of_time(scheduling: Any) -> Iterator[str]:
    """Yield problems of timeout, waiting time and retries."""
    flexible = type(scheduling).Strategy.Name(scheduling.strategy) == FLEX_START
    if scheduling.HasField("timeout"):
        timeout = scheduling.timeout.ToTimedelta()
        if timeout <= timedelta(0):
            yield 'scheduling.timeout is 0; it takes the seconds after which the job is stopped, such as "3600s".'
        if flexible and timeout > LONGEST:
            said = f"{timeout.total_seconds():.0f}s; with {FLEX_START} it takes {LONGEST.total_seconds():.0f}s (7 days) at most"
            yield f"scheduling.timeout is {said}."
    if scheduling.HasField("max_wait_duration") and not flexible:
        yield f"scheduling.maxWaitDuration counts only with strategy {FLEX_START}; remove it, or change the strategy."
    if scheduling.disable_retries and scheduling.restart_job_on_worker_restart:
        yield "scheduling.disableRetries contradicts restartJobOnWorkerRestart; remove one of them."


def _accelerator(machine: Any) -> str:
    """Return the name of the GPU; empty without a GPU."""
    if not machine.accelerator_type:
        return ""
    return str(
        machine.DESCRIPTOR.fields_by_name["accelerator_type"]
        .enum_type.values_by_number[machine.accelerator_type]
        .name
    )


def nearest(wrong: str, choices: Iterable[str]) -> str:
    """Return the most similar choices, or else the first of all choices."""
    known = list(choices)
    near = difflib.get_close_matches(wrong, known, 3, 0.5)
    return (
        f"; near it are {', '.join(near)}"
        if near
        else f"; there are {', '.join(known[:MOST])}{', …' * (len(known) > MOST)}"
    )


def _or(choices: Sequence[object]) -> str:
    """Return choices as "1, 2 or 4"."""
    *others, last = map(str, choices)
    return f"{', '.join(others)} or {last}" if others else last


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
