"""Units on a Ray cluster: a task for each, on whatever nodes the user has. The work is `units.Worker`'s, as everywhere else.

A task takes half a GPU, so that one searches while another reads and writes; on a cluster without GPUs it takes one CPU. When a
worker process or a node dies, Ray runs its tasks again elsewhere, which is safe for the reason that resuming is: a unit writes
the same bytes to the same place.

Every node has to see the source and the output under their paths, and to have seedlm installed. A worker checks this before
its first unit: the source by its fingerprint, the output by the number in its lock.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import torch

from seedlm.compress import workers
from seedlm.compress.worker import Job, Unit, Worker
from seedlm.compress.workers import KEPT, Encoded, Finished
from seedlm.compress.workfolder import is_held
from seedlm.device import peak_memory
from seedlm.errors import BackendError, OutputError, SeedLMError, SourceError, extra

_SHARED: Final = "source and output must be on storage that every node sees under the same paths"
_RETRIES: Final = 3
"""Times that a unit is tried again after its worker died."""


class Cluster:
    """The cluster as an `workers.Runner`."""

    def __init__(self, job: Job, address: str) -> None:
        try:
            import ray
        except ImportError:
            raise BackendError(f"device 'ray' needs Ray: {extra('ray')}") from None
        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            try:
                ray.init(address, log_to_driver=False, logging_level="ERROR", namespace="seedlm")
            except (ConnectionError, RuntimeError, ValueError) as reason:
                raise BackendError(
                    f"no Ray cluster at {address!r} ({' '.join(str(reason).split())}); start one with `ray start --head`"
                ) from None
        on_gpu = ray.cluster_resources().get("GPU", 0) > 0
        needs: dict[str, Any] = {"num_gpus": 0.5, "num_cpus": 0.5} if on_gpu else {"num_cpus": 1}
        # Ray would end a worker after each task on a GPU, and with it the tables and compiled searches.
        self._task = ray.remote(max_retries=_RETRIES, max_calls=0, **needs)(_run)
        self._job = ray.put(job)

    def run(self, units: Iterable[Unit]) -> Iterator[Encoded | Finished]:
        """Run all units; Ray holds back what does not fit the cluster."""
        running: list[Any] = []
        for unit in units:
            running.append(self._task.remote(self._job, unit))
            yield from self._finished(running, 0)
        while running:
            yield from self._finished(running, None)

    def _finished(self, running: list[Any], seconds: float | None) -> Iterator[Encoded | Finished]:
        """Take one that is done off the list, if there is one by then."""
        ray = self._ray
        for done in ray.wait(running, timeout=seconds)[0]:
            running.remove(done)
            try:
                finished: Finished = ray.get(done)
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, SeedLMError | OSError) else error from None
            except ray.exceptions.RayError as error:
                raise BackendError(f"Ray gave a unit up ({' '.join(str(error).split())}); {KEPT}") from None
            yield Encoded(finished.unit.item.weights)
            yield finished

    def close(self) -> None:
        """Leave the cluster, which ends what is still running there."""
        if self._mine:
            self._ray.shutdown()


@contextmanager
def start(job: Job, address: str) -> Iterator[workers.Runner]:
    """Connect to a cluster: ``ray`` is the one this machine belongs to, or the one that RAY_ADDRESS names."""
    cluster = Cluster(job, "auto" if address == "ray" else address)
    try:
        yield cluster
    finally:
        cluster.close()


def _run(job: Job, unit: Unit) -> Finished:
    """One unit, in a worker of the cluster."""
    import ray

    node = ray.util.get_node_ip_address()
    device = torch.device("cuda" if ray.get_runtime_context().get_accelerator_ids().get("GPU") else "cpu")
    try:
        worker = _worker(job, device)
        facts = worker.run(unit, lambda weights: None)
        worker.settle([unit.destination.file])
    except SeedLMError as reason:
        raise type(reason)(f"on node {node}: {reason}") from None
    return Finished(unit, facts, f"{node} {device}", *peak_memory(device))


@lru_cache(maxsize=1)
def _worker(job: Job, device: torch.device) -> Worker:
    """Kept for the process's life: its tables take seconds. Raises OutputError or SourceError if a path leads elsewhere."""
    if not is_held(job.folder.parent, job.token):
        raise OutputError(f"{job.folder.parent}: is not the folder of this run; {_SHARED}")
    if not Path(job.source).exists():
        raise SourceError(f"{job.source}: is not there; {_SHARED}")
    return Worker(job, device)
