"""Where a training process runs: device, threads, ranks, checkpoints. It knows nothing of the model."""

import json
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed
from safetensors import safe_open

from core.manifest import write_bytes

CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Runtime:
    """This process's device, and its place among the processes that train together."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """True in the one process that prints and saves."""
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """This rank's part of a batch that all ranks know."""
        return rows[self.rank :: self.world_size]


@contextmanager
def start(threads: int) -> Iterator[Runtime]:
    """Choose the device, make arithmetic repeatable, join the other ranks if torchrun started several."""
    torch.set_num_threads(threads)
    device = find_device(int(os.environ.get("LOCAL_RANK", "0")))
    if (
        device.type == "cuda"
    ):  # on the CPU the network's operations are repeatable as they are, and this costs seconds
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS wants a fixed workspace for it
        torch.use_deterministic_algorithms(True)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield Runtime(device)
        return
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Runtime(device, torch.distributed.get_rank(), world_size)
    finally:
        torch.distributed.destroy_process_group()


@contextmanager
def stoppable(checkpoints: Path | None) -> Iterator[None]:
    """On SIGTERM end with exit code 143 and one line that says how to go on.

    The cloud sends it before it takes a machine away, and `docker stop` sends it. The first process of a container would
    ignore it without this, and be killed some seconds later.
    """
    previous = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    except SystemExit:
        if os.environ.get("RANK", "0") == "0":
            if checkpoints and (checkpoints / CHECKPOINT).is_file():
                advice = f"a checkpoint is in {checkpoints}: the same command goes on from there"
            else:
                advice = "there is no checkpoint: the same command starts anew (--checkpoint-dir FOLDER keeps them)"
            print(f"\nstopped by SIGTERM; {advice}.", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, previous)


def find_device(local_rank: int = 0) -> torch.device:
    """A CUDA GPU (one for each local rank), else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # MPS has no float64, in which features arrive: such numbers are scaled on the CPU and moved afterwards.
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def restart_on_all_gpus(module: str) -> None:
    """On a machine with several GPUs, or several machines, run this command line under torchrun, in this process's place.

    Several machines are announced by CLUSTER_SPEC, the cloud's JSON: workerpool0[0] is the master "host:port" and
    rank 0, index i of workerpool1 is rank i + 1.
    """
    if "RANK" in os.environ:
        return
    cluster = json.loads(os.environ.get("CLUSTER_SPEC", "{}"))
    pools = cluster.get("cluster", {"workerpool0": ["localhost:29500"]})
    nodes = len(pools["workerpool0"]) + len(pools.get("workerpool1", []))
    gpus = torch.cuda.device_count()
    if nodes == 1 and gpus <= 1:
        return
    task = cluster.get("task", {"type": "workerpool0", "index": 0})
    node_rank = task["index"] + (0 if task["type"] == "workerpool0" else len(pools["workerpool0"]))
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={max(gpus, 1)}",
    ]
    meeting = [
        f"--node-rank={node_rank}",
        "--rdzv-backend=static",
        f"--rdzv-endpoint={pools['workerpool0'][0]}",
    ]
    # In this process's place, so that signals reach torchrun, which hands them to its processes.
    os.execv(sys.executable, [*torchrun, *meeting, "-m", module, *sys.argv[1:]])  # noqa: S606 (no shell)


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Keep where training stands, as one file that is whole or not there; no pickle."""
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(
        folder / CHECKPOINT, safetensors.torch.save(on_cpu, {"state": json.dumps(dict(state))})
    )


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """What `save_checkpoint` kept, on the CPU; None when there is none that can be read."""
    path = folder / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return tensors, json.loads(file.metadata()["state"])
    except safetensors.SafetensorError as error:
        print(
            f"{path} cannot be read ({error}): training starts from the beginning.", file=sys.stderr
        )
        return None
