"""Any number of workers leave the same bytes, and one that dies loses nothing: processes, GPUs, a Ray cluster."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from seedlm.codes.base import totals
from seedlm.codes.block.encode import encode_rows
from seedlm.codes.block.format import PRESETS
from seedlm.codes.registry import family, parse_format
from seedlm.compress import workers as engine
from seedlm.compress.allocate import Mixture
from seedlm.compress.run import compress_checkpoint
from seedlm.errors import BackendError, OutputError, SourceError
from tiny_models import SMALL, folder_bytes, run, save_tensors, tiny_llama, told


@pytest.fixture(scope="module")
def finished(finished):
    """Every file of the folder that a run alone leaves."""
    return folder_bytes(finished[0])


@pytest.fixture
def child(monkeypatch):
    """What the worker process is heard to say, and whether it is waited for before the first unit is given out."""
    said, real = [], engine.Engine.post

    def post(self, workers, event):
        if isinstance(workers, engine.Child):
            said.append((workers, event))
        real(self, workers, event)

    def run(self, units, real=engine.Engine.run):
        deadline = time.monotonic() + 60
        while not said:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        return real(self, units)

    monkeypatch.setattr(engine.Engine, "post", post)
    monkeypatch.setattr(engine.Engine, "run", run)
    return said


class TestSums:
    """What the report says of errors, to the last bit."""

    @pytest.mark.parametrize("columns", [8, 13, 40], ids=str)
    def test_they_depend_neither_on_pieces_nor_on_their_order(self, columns):
        format, weight = parse_format(SMALL), torch.randn(23, columns) * torch.logspace(-3, 3, 23).unsqueeze(1)
        whole = encode_rows(weight, 4, format, backend="torch")[1]
        pieces = [encode_rows(part, 4, format, backend="torch")[1] for part in weight.split(5)]
        assert totals(pieces[::-1]) == totals(pieces) == totals([whole])


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        (["cuda:0", "cuda:1", "cuda:2", "cuda:3"], [4, 4, 4, 4]),
        (["cuda:0"] * 16, [2] * 16),
        (["cpu", "cpu"], [32, 32]),
        (["cuda:0", "cpu"], [4, 64]),
    ],
    ids=["four GPUs", "sixteen", "two CPUs", "both"],
)
def test_processes_share_the_processors(devices, expected):
    """Of 64: a process on a GPU needs few, and waits for them where others take them all."""
    assert engine.share_threads([torch.device(device) for device in devices], 64) == expected


def test_torch_has_its_threads_again_after_a_run(llama, tmp_path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(6)
        shares = set()
        run(llama, tmp_path / "out", device="cpu,cpu", on_progress=lambda *_: shares.add(torch.get_num_threads()))
        assert 3 in shares
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)


class TestDisk:
    """A unit is finished when its bytes have reached the disk, and nobody but one thread waits for that."""

    def test_one_that_fails_to_write_finishes_nothing(self, llama, finished, tmp_path, monkeypatch):
        def fail(fd, real=os.fsync):
            if threading.current_thread() is not threading.main_thread():  # which writes the plan
                raise OSError(errno.ENOSPC, "No space left on device")
            real(fd)

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OutputError, match="No space left on device"):
            run(llama, tmp_path / "out")
        assert not (tmp_path / "out.partial" / "journal.jsonl").exists()
        monkeypatch.undo()
        run(llama, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == finished

    def test_a_slow_one_keeps_no_search_waiting(self, llama, finished, tmp_path, monkeypatch):
        """The first wait ends when every weight is encoded."""
        encoded, waits = threading.Event(), []

        def wait(fd, real=os.fsync):
            if threading.current_thread() is not threading.main_thread():
                waits.append(encoded.wait(60))
            real(fd)

        def look(phase, done, total):
            if (phase, done) == ("compress", total):
                encoded.set()

        monkeypatch.setattr(os, "fsync", wait)
        run(llama, tmp_path / "out", on_progress=look)
        assert waits
        assert all(waits)
        assert folder_bytes(tmp_path / "out") == finished


class TestProcesses:
    def test_two_leave_the_same_bytes_as_one(self, llama, finished, tmp_path, child):
        report = run(llama, tmp_path / "out", device="cpu,cpu")
        assert folder_bytes(tmp_path / "out") == finished
        assert sum(isinstance(event, engine.Finished) for _, event in child) > 1  # each had its share
        assert child[0][0]._process.poll() is not None
        assert report.devices == ["cpu"]
        assert report.peak_host_bytes > 1e8

    def test_a_killed_one_is_reported_and_the_run_is_gone_on_from(self, llama, finished, tmp_path, child):
        out, starts = tmp_path / "out", []

        def kill(phase, done, total):
            if phase == "compress" and done > total / 3:
                child[0][0]._process.kill()

        with pytest.raises(BackendError, match=r"the worker for cpu died \(SIGKILL\); what is finished is kept"):
            run(llama, out, device="cpu,cpu", on_progress=kill)
        assert not out.exists()
        run(llama, out, on_progress=lambda phase, done, total: starts.append(done) if phase == "compress" else None)
        assert starts[0] > 0
        assert folder_bytes(out) == finished

    def test_an_error_in_one_is_the_runs_error(self, tmp_path, child):
        def change(phase, done, total):
            if (phase, done) == ("read", 0):
                (tmp_path / "m" / "config.json").write_text("{}")

        tiny_llama(tmp_path / "m")
        with pytest.raises(SourceError, match="m: changed while it was being compressed"):
            run(tmp_path / "m", tmp_path / "out", device="cpu,cpu", on_progress=change)

    @pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=lambda how: how.name)
    def test_none_outlives_the_run(self, llama, finished, tmp_path, how, forked):
        script = (
            "import subprocess, sys, time\nfrom seedlm.compress import workers as engine, workfolder\n"
            "class Popen(subprocess.Popen):\n"
            "    def __init__(self, *a, **k): super().__init__(*a, **k); print(self.pid, flush=True)\n"
            "engine.subprocess.Popen = Popen\n"
            "real = workfolder.WorkFolder.finish_tensor\n"
            "def finish(*a, **k): real(*a, **k); print('done', flush=True); time.sleep(0.5)\n"
            "workfolder.WorkFolder.finish_tensor = finish\nfrom seedlm.cli import main; main()"
        )
        arguments = ["compress", str(llama), str(tmp_path / "out"), "--format", SMALL, "--backend", "torch"]
        process = subprocess.Popen(
            forked(*arguments, "--device", "cpu,cpu", code=script),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        pids = [int(line) for line in iter(process.stdout.readline, "done\n")]
        process.send_signal(how)
        _, stderr = process.communicate(timeout=60)
        if how == signal.SIGINT:
            assert process.returncode == 130
            assert len(told(stderr)) == 1
            assert "run the same command again to go on" in stderr
        deadline = time.monotonic() + 30
        while any(map(is_alive, pids)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        run(llama, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == finished


class TestStopping:
    """Ctrl-C at any moment leaves no thread behind. Python waits for every one before a process ends, for ever if need be."""

    @pytest.fixture
    def started(self, monkeypatch):
        """The threads of workers, and what is called after each has started."""
        threads, calls = [], []

        def start(thread, real=threading.Thread.start):
            ours = thread.name.startswith("seedlm cpu")
            thread.daemon |= ours  # so that a failure here is one, and no process without an end
            real(thread)
            if ours:
                threads.append(thread)
                for call in calls:
                    call()

        monkeypatch.setattr(threading.Thread, "start", start)
        return threads, calls

    @staticmethod
    def interrupt(*_):
        raise KeyboardInterrupt

    @pytest.mark.parametrize(("devices", "at"), [("cpu", 1), ("cpu", 2), ("cpu,cpu", 1), ("cpu,cpu", 2)])
    def test_while_they_start(self, llama, finished, tmp_path, started, devices, at):
        threads, calls = started
        calls.append(lambda: len(threads) == at and self.interrupt())
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", device=devices)
        for thread in threads:
            thread.join(60)
        assert [thread.is_alive() for thread in threads] == [False] * at
        calls.clear()
        run(llama, tmp_path / "out")
        assert folder_bytes(tmp_path / "out") == finished

    def test_before_the_first_begins(self, started):
        """One that is late finds that nobody waits: it opens no source and compiles nothing."""
        workers = engine.Threads(SimpleNamespace(statistics=None), torch.device("cpu"), None, self.interrupt)
        workers.close()
        workers.start()
        for thread in started[0]:
            thread.join(60)
        assert [thread.is_alive() for thread in started[0]] == [False, False]

    def test_again_while_they_end(self, llama, tmp_path, started, monkeypatch):
        monkeypatch.setattr(engine, "_wait_for", self.interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(llama, tmp_path / "out", on_progress=lambda phase, *_: phase == "compress" and self.interrupt())
        for thread in started[0]:
            thread.join(60)
        assert [thread.is_alive() for thread in started[0]] == [False, False]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("code", "bits"), [*(("block", bits) for bits in PRESETS), ("trellis", "4-fast"), ("trellis", "2-fast")]
)
def test_one_gpu_two_and_the_cpu_leave_the_same_bytes(tmp_path, request, code, bits):
    """Where there is one GPU, two processes share it."""
    torch.manual_seed(0)
    shapes = [(40, 96), (64, 64), (7, 130), (96, 40), (1, 8), (300, 24)]
    tensors = {f"model.layers.{n}.a.weight": torch.randn(shape).bfloat16() for n, shape in enumerate(shapes)}
    source = save_tensors(tmp_path / "m", {**tensors, "model.embed_tokens.weight": torch.randn(50, 8)})
    two = "cuda:0,cuda:1" if torch.cuda.device_count() > 1 else "cuda:0,cuda:0"
    outputs = {}
    for device in ("cuda:0", "cpu", two):
        if device == two:
            request.getfixturevalue("child")  # waits for it: these tensors are done before it has begun
        report = compress_checkpoint(source, tmp_path / device, format=parse_format(bits, code), device=device)
        assert report.devices == sorted(set(device.split(",")))
        assert report.peak_device_bytes > 0 or device == "cpu"
        outputs[device] = folder_bytes(tmp_path / device)
    assert outputs["cuda:0"] == outputs[two] == outputs["cpu"]


SMALL_CARD = """
import sys, threading, torch
from seedlm.codes.registry import parse_format
from seedlm.compress.run import compress_checkpoint
torch.cuda.set_per_process_memory_fraction(float(sys.argv[3]) / torch.cuda.get_device_properties(0).total_memory)
threads = set()
def look(*progress):
    threads.update(thread.ident for thread in threading.enumerate() if thread.name == "seedlm cuda:0")
compress_checkpoint(sys.argv[1], sys.argv[2], format=parse_format(sys.argv[4], "block"), device="cuda:0", on_progress=look)
print(len(threads), torch.cuda.max_memory_reserved())
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("bits", ["4", "4.5", "3"])
def test_a_card_of_8_gb_is_enough_for_a_7b_and_leaves_the_same_bytes(tmp_path, bits):
    """All threads at once. Of 8 GB, 1.5 are left to CUDA itself and the desktop."""
    limit = 6_500_000_000
    names = [f"model.layers.{n}.a.weight" for n in range(5)]
    tensors = {name: (torch.randn(4096, 11008, device="cuda") * 0.02).bfloat16().cpu() for name in names}
    source = save_tensors(tmp_path / "m", tensors)
    script = [sys.executable, "-c", SMALL_CARD, source, tmp_path / "small", str(limit), bits]
    result = subprocess.run(script, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert result.returncode == 0, result.stderr
    threads, reserved = map(int, result.stdout.split())
    assert threads == 4
    assert reserved <= limit
    compress_checkpoint(source, tmp_path / "large", format=parse_format(bits, "block"), device="cuda:0")
    assert folder_bytes(tmp_path / "small") == folder_bytes(tmp_path / "large")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_mixtures_one_after_the_other_leave_the_same_bytes(tmp_path):
    """Threads that change their formats, and with them their graphs, while others capture and replay."""
    torch.manual_seed(0)
    names = [f"model.layers.{n}.{kind}" for n in range(12) for kind in "abc"]
    source = save_tensors(tmp_path / "m", {f"{name}.weight": torch.randn(96, 64).bfloat16() for name in names})
    sensitivity = dict(zip(names, (10 ** torch.randn(len(names))).tolist(), strict=True))
    formats = family("block").mixture
    mixtures = [Mixture(bits=bits, sensitivity=sensitivity, formats=formats) for bits in (3.5, 2.75, 4.25)]
    assert all(len(set(mixture.assign(dict.fromkeys(names, (96, 64))).values())) > 4 for mixture in mixtures)
    for place, mixture in enumerate(mixtures):
        compress_checkpoint(source, tmp_path / f"cpu{place}", format=mixture, device="cpu")
    for turn in range(9):
        place, out = turn % 3, tmp_path / f"gpu{turn}"
        compress_checkpoint(source, out, format=mixtures[place], device="cuda:0")
        assert folder_bytes(out) == folder_bytes(tmp_path / f"cpu{place}")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of two nodes on this machine, a CPU each."""
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed (pip install '.[ray]')")
class TestRay:
    def test_two_nodes_leave_the_same_bytes_though_a_worker_is_killed(self, cluster, llama, finished, tmp_path):
        import psutil

        killed = []

        def kill(phase, done, total):
            if phase == "compress" and done > total / 3 and not killed:
                deadline = time.monotonic() + 30
                while not killed:
                    assert time.monotonic() < deadline
                    at_work = [p for p in psutil.Process().children(recursive=True) if p.name().startswith("ray::_run")]
                    for process in at_work[:1]:
                        process.kill()
                        killed.append(process.pid)

        report = run(llama, tmp_path / "out", device="ray", on_progress=kill)
        assert len(killed) == 1
        assert folder_bytes(tmp_path / "out") == finished
        assert all(device.endswith(" cpu") for device in report.devices)

    def test_a_stopped_run_is_gone_on_from(self, cluster, llama, finished, tmp_path):
        def stop(phase, done, total):
            if phase == "compress" and done > total / 3:
                raise KeyboardInterrupt

        out, starts = tmp_path / "out", []
        with pytest.raises(KeyboardInterrupt):
            run(llama, out, device="ray", on_progress=stop)
        run(llama, out, device="ray", on_progress=lambda phase, done, total: starts.append((phase, done)))
        assert next(done for phase, done in starts if phase == "compress") > 0
        assert folder_bytes(out) == finished

    def test_a_node_that_does_not_see_the_output_says_so(self, cluster, llama, tmp_path, monkeypatch):
        from seedlm.compress import run as compress

        real = compress.Job
        monkeypatch.setattr(compress, "Job", lambda *fields: real(*fields[:3], "another run", *fields[4:]))
        with pytest.raises(
            OutputError, match=r"on node [\d.]+: .*out.partial: is not the folder of this run; source and output"
        ):
            run(llama, tmp_path / "out", device="ray")


def test_a_cluster_that_is_not_there_is_one_line(llama, tmp_path):
    if importlib.util.find_spec("ray"):
        pytest.skip("Ray is installed")
    with pytest.raises(BackendError, match=r"device 'ray' needs Ray: pip install '\.\[ray\]' in a copy of seedlm's repository"):
        run(llama, tmp_path / "out", device="ray")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cpu,abacus", "cuda:99", "cpu,,"], ids=str)
def test_a_device_that_is_not_there_is_named(llama, tmp_path, device):
    with pytest.raises(BackendError, match=r"device '(abacus|cuda:99|)' cannot be used here"):
        run(llama, tmp_path / "out", device=device)
    assert os.listdir(tmp_path) == []
