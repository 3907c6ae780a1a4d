"""CUDA C++ compiled by NVRTC: without a GPU, kept on disk, refused in one line; and launched, where there is a device."""

import threading

import pytest
import torch

from seedlm import kept, nvrtc
from seedlm.errors import BackendError

COMPILER = pytest.mark.skipif(nvrtc.reason_unavailable() is not None, reason=str(nvrtc.reason_unavailable()))
GPU = [COMPILER, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

AXPY = """
extern "C" __global__ void axpy(const float* x, float* y, float a, int n, long long first) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] += a * x[first + i] + WIDTH;
}
"""


PAIR = """
struct Pair { const float* x; float* y; int n, unused; };
extern "C" __global__ void add(const __grid_constant__ Pair pair, float a) {
  for (int i = threadIdx.x; i < pair.n; i += blockDim.x) pair.y[i] += a * pair.x[i];
}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("SEEDLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@COMPILER
@pytest.mark.parametrize("arch", [80, 86, 89, 90, 100, 120])
def test_every_architecture_compiles_without_a_gpu(arch, folder):
    assert nvrtc.compile_only(AXPY, arch, ["-DWIDTH=0"]).startswith(b"\x7fELF")


def test_a_cubin_is_compiled_once_and_kept(folder, monkeypatch):
    compiled = []

    def compile(source, flags):
        compiled.append(flags)
        return f"cubin {len(compiled)}".encode()

    monkeypatch.setattr(nvrtc, "_version", lambda: "13.0")
    monkeypatch.setattr(nvrtc, "_compile", compile)
    assert [nvrtc.compile_only(AXPY, 90, ["-DWIDTH=0"]) for _ in range(2)] == [b"cubin 1"] * 2
    (file,) = folder.iterdir()
    assert kept.read(file.name) == b"cubin 1"
    others = [nvrtc.compile_only(AXPY, 90, ["-DWIDTH=1"]), nvrtc.compile_only(AXPY, 80, ["-DWIDTH=0"])]
    assert others == [b"cubin 2", b"cubin 3"]
    file.write_bytes(b"damaged")
    assert [nvrtc.compile_only(AXPY, 90, ["-DWIDTH=0"]) for _ in range(2)] == [b"cubin 4"] * 2


@COMPILER
def test_a_folder_that_takes_nothing_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SEEDLM_CACHE", str(tmp_path / "file"))
    assert nvrtc.compile_only(AXPY, 90, ["-DWIDTH=0"]).startswith(b"\x7fELF")


@COMPILER
def test_the_compilers_words_are_told(folder):
    with pytest.raises(BackendError, match=r"(?s)does not compile.*WIDTH"):
        nvrtc.compile_only(AXPY, 90)
    assert not folder.exists()


@pytest.mark.skipif(nvrtc.reason_unavailable() is None, reason="cuda-bindings is installed")
def test_without_the_extra_the_remedy_is_told_in_one_line():
    reason = nvrtc.reason_unavailable()
    assert nvrtc.REMEDY in reason
    assert "\n" not in reason
    with pytest.raises(BackendError, match="pip install"):
        nvrtc.compile_only(AXPY, 90)


class TestOnADevice:
    pytestmark = GPU

    @staticmethod
    def axpy(x, y, a, first=0, width=0):
        kernel = nvrtc.load(AXPY, "axpy", "PPfiq", device=x.device, options=(f"-DWIDTH={width}",))
        kernel((len(y) // 128 + 1,), 128, x, y, a, len(y), first)

    def test_arguments_of_every_width_arrive(self):
        x, y = torch.randn(1000, device="cuda"), torch.zeros(700, device="cuda")
        self.axpy(x, y, 2.5, first=123, width=3)
        torch.testing.assert_close(y, 2.5 * x[123:823] + 3)

    def test_a_structure_is_one_parameter(self):
        x, y = torch.randn(1000, device="cuda"), torch.zeros(1000, device="cuda")
        nvrtc.load(PAIR, "add", "{PPii}f", device=x.device)((1,), 128, x, y, 1000, 0, 2.5)
        torch.testing.assert_close(y, 2.5 * x)

    def test_a_kernel_is_loaded_once(self):
        device = torch.device("cuda", 0)
        one = nvrtc.load(AXPY, "axpy", "PPfiq", device=device, options=("-DWIDTH=0",))
        assert nvrtc.load(AXPY, "axpy", "PPfiq", device=device, options=("-DWIDTH=0",)) is one

    def test_graphs_capture_calls(self):
        x, y = torch.randn(500, device="cuda"), torch.zeros(500, device="cuda")
        self.axpy(x, y, 0.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.axpy(x, y, 1.0)
        for _ in range(3):
            graph.replay()
        torch.testing.assert_close(y, x + x + x)

    def test_the_current_stream_is_used(self):
        x, y = torch.randn(500, device="cuda"), torch.zeros(500, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(1_000_000_000)
            self.axpy(x, y, 1.0)
            assert not stream.query()
            found = y.clone()
        torch.cuda.current_stream().wait_stream(stream)
        torch.testing.assert_close(found, x)

    def test_threads_do_not_share_arguments(self):
        x = torch.randn(4096, device="cuda")
        results = [torch.zeros(4096, device="cuda") for _ in range(4)]
        torch.cuda.synchronize()

        def work(index):
            for _ in range(200):
                self.axpy(x, results[index], float(index))

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index, y in enumerate(results):
            torch.testing.assert_close(y, 200.0 * index * x, rtol=1e-4, atol=1e-3)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
    def test_the_tensors_device_is_used_whatever_is_current(self):
        x, y = torch.randn(500, device="cuda:1"), torch.zeros(500, device="cuda:1")
        with torch.cuda.device(0):
            self.axpy(x, y, 1.0)
        torch.testing.assert_close(y, x)

    def test_a_refused_launch_tells_kernel_and_grid(self):
        x = torch.randn(5, device="cuda")
        kernel = nvrtc.load(AXPY, "axpy", "PPfiq", device=x.device, options=("-DWIDTH=0",))
        with pytest.raises(BackendError, match=r"axpy could not be started.*2048"):
            kernel((1,), 2048, x, x, 1.0, 5, 0)
