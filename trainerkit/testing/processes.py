"""Runs of the bench in two real processes on gloo: data parallel, and with sharded parameters."""

import multiprocessing
import os
import socket
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from trainerkit.testing.bench import Bench, module_class, witness_class

Ranks = list[dict[str, Any]]


def in_two_ranks(bench: Bench) -> Ranks | str:
    """What each rank of a data-parallel run ends with, or what it raised."""
    return _in_two_processes(bench, "ddp")


def sharded_in_two_ranks(bench: Bench) -> Ranks | str:
    """What each rank ends with where FSDP2 has its parameters in pieces (DTensor), or what it raised."""
    return _in_two_processes(bench, "fsdp2")


def _in_two_processes(bench: Bench, strategy: str) -> Ranks | str:
    # Forked: the callbacks' makers need not be importable, and nothing is imported anew.
    context = multiprocessing.get_context("fork")
    port = free_port()
    files = [bench.folder / f"{strategy}-{rank}.pt" for rank in range(2)]
    processes = [context.Process(target=_rank, args=(bench, strategy, rank, port, files[rank])) for rank in range(2)]
    bench.folder.mkdir(parents=True, exist_ok=True)
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        if process.is_alive():
            process.kill()
            return "two ranks wait for each other for ever"
    results = [torch.load(file, weights_only=True) for file in files if file.exists()]
    errors = [result["error"] for result in results if "error" in result]
    if errors:
        return str(errors[0])
    return results if len(results) == 2 else "a rank died"


def _rank(bench: Bench, strategy: str, rank: int, port: int, file: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    result: dict[str, Any] = {}
    try:
        _fit(bench, strategy, result)
    except BaseException as error:
        result = {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
    torch.save(result, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)
    os._exit(0)  # without what the parent process would do at its end


def _fit(bench: Bench, strategy: str, result: dict[str, Any]) -> None:
    made = [make() for make in bench.makers]
    witness = witness_class()(bench.folder)
    options: dict[str, Any] = {"devices": 2, "strategy": strategy}
    subject = module_class()()
    if strategy == "fsdp2":
        from lightning.pytorch.strategies import ModelParallelStrategy

        options["strategy"] = ModelParallelStrategy(
            data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False
        )
        subject = _sharded_class()()
    trainer = bench.trainer([*made, _Ends(result, witness), witness], **options)
    trainer.fit(subject)


def _sharded_class() -> Any:
    from torch.distributed.fsdp import fully_shard

    class Sharded(module_class()):  # type: ignore[misc]
        def configure_model(self) -> None:
            mesh = self.device_mesh["data_parallel"]
            for part in (self.backbone, self.frozen, self.head):
                fully_shard(part, mesh=mesh)

    return Sharded


class _Ends(Callback):
    """Notes what a rank ends with while the processes still know each other."""

    def __init__(self, result: dict[str, Any], witness: Any) -> None:
        self.result = result
        self.witness = witness

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        weights = {name: tensor.detach() for name, tensor in pl_module.state_dict().items()}
        whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in weights.items()}
        self.result |= {"weights": whole, "validated": list(self.witness.validated)}


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
