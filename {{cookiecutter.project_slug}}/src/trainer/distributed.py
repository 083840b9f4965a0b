"""Set up a training process: device, threads, ranks, signals and checkpoint files."""

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
    """Device and rank of this process."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        """Return True in the process that prints and saves (rank 0)."""
        return self.rank == 0

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this rank's part of a batch."""
        return rows[self.rank :: self.world_size]


@contextmanager
def start(threads: int) -> Iterator[Runtime]:
    """Select the device, make CUDA deterministic and join the process group of torchrun."""
    torch.set_num_threads(threads)
    device = find_device(int(os.environ.get("LOCAL_RANK", "0")))
    # Only for CUDA: the CPU operations are deterministic anyway, and the call takes seconds.
    if device.type == "cuda":
        # cuBLAS is deterministic only with a fixed workspace.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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
    """On SIGTERM, print how to resume and exit with code 143."""
    # The cloud sends SIGTERM before it reclaims a machine, and so does `docker stop`. Without a
    # handler, process 1 of a container ignores it and is killed some seconds later.
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
    """Return the CUDA GPU of the local rank, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    # MPS has no float64: raw features are standardised on the CPU and moved afterwards.
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def restart_on_all_gpus(module: str) -> None:
    """Re-execute the command line under torchrun if there are several GPUs or machines.

    Vertex AI describes several machines in CLUSTER_SPEC (JSON): workerpool0[0] is the master's
    "host:port" and node 0; entry i of workerpool1 is node i + 1.
    """
    if "RANK" in os.environ:  # already under torchrun
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
    # Replace this process, so that signals reach torchrun, which forwards them to its processes.
    os.execv(sys.executable, [*torchrun, *meeting, "-m", module, *sys.argv[1:]])  # noqa: S606 (no shell)


def save_checkpoint(
    folder: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint atomically, as one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    # clone(), because the weights are views of one vector and safetensors rejects shared memory.
    on_cpu = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_bytes(
        folder / CHECKPOINT, safetensors.torch.save(on_cpu, {"state": json.dumps(dict(state))})
    )


def load_checkpoint(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return the checkpoint's tensors, on the CPU, and state; None if missing or unreadable."""
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
