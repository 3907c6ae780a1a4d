"""The generated Verilog of the full-width designs under Verilator: clocks, stalls and real layers. Run by `make rtl-test`.

Not collected with the quick tests: each design takes minutes to compile. SEEDLM_SMOLLM2 names a SmolLM2 GGUF file, which the
make target gets; without it that layer is skipped.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from seedlm.codes.block.format import BlockFormat
from seedlm.codes.encoded import encode
from seedlm.rtl import report, twin
from seedlm.rtl.design import SeedDesign
from seedlm.rtl.simulate import Product, Simulator

BUILD = Path("build/rtl")
DATA = Path(__file__).parent.parent / "data"


@pytest.fixture(scope="module", params=list(report.DESIGNS))
def simulator(request):
    return request.param, Simulator(report.DESIGNS[request.param], BUILD)


def check(design, products, runs):
    for product, run in zip(products, runs, strict=True):
        assert run.y.tobytes() == twin.product(design, product.weights, product.x, product.bias).tobytes()


def test_no_stall_and_the_same_overhead_at_every_size(simulator):
    _, simulated = simulator
    design, sizes = simulated.design, (512, 1024)
    products = [report.random_product(design, n, n) for n in sizes]
    runs = simulated.run(products)
    check(design, products, runs)
    extra = [run.clocks - report.stream_clocks(design, n, n) for n, run in zip(sizes, runs, strict=True)]
    assert 0 < max(extra) < 70
    if (
        design.chunk_units == design.beat_units
    ):  # else beats taken while x is loaded give a head start that sizes share unequally
        assert extra[0] == extra[1]
        for n, run in zip(sizes, runs, strict=True):
            assert set(np.diff(run.times)) == {design.command(n, n).chunks}, "a clock was lost between two results"


@pytest.mark.parametrize("stall", [0.2, 0.7])
def test_stalling_streams_and_odd_shapes_change_no_bit(simulator, stall):
    _, simulated = simulator
    design = simulated.design
    shapes = [(5, 1), (70, design.lanes), (3, design.lanes + 1), (9, 1001), (64, 130), (2, design.max_features)]
    products = [report.random_product(design, *shape, seed=i) for i, shape in enumerate(shapes)]
    check(design, products, simulated.run(products, stall=stall, seed=int(stall * 10)))


def stories_layer() -> torch.Tensor:
    """The first query projection of stories260K, [64, 64]."""
    with safe_open(DATA / "stories260k" / "model.safetensors", framework="pt") as tensors:
        return tensors.get_tensor("model.layers.0.self_attn.q_proj.weight")


def smollm2_layer() -> torch.Tensor:
    """The first key projection of SmolLM2-135M, [192, 576]."""
    path = Path(os.environ.get("SEEDLM_SMOLLM2", DATA / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    gguf = pytest.importorskip("gguf")
    if not path.exists():
        pytest.skip(f"no {path.name}: set SEEDLM_SMOLLM2")
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.attn_k.weight"]
    return torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())


@pytest.mark.parametrize("layer", [stories_layer, smollm2_layer])
def test_a_real_layer_gives_the_software_s_result(simulator, layer):
    _, simulated = simulator
    design, weight = simulated.design, layer()
    x = np.random.default_rng(0).standard_normal(weight.shape[1]).astype(np.float16)
    if isinstance(design, SeedDesign):
        encoded, _ = encode(weight, design.format)
        decoded, bias = encoded.dequantize(), int(encoded.parts["exponent_bias"])
        product = Product(encoded.parts["words"], x, bias)
    else:
        decoded = weight.half().float()
        product = Product(weight.half(), x)
    (run,) = simulated.run([product])
    check(design, [product], [run])
    software = decoded.double().numpy() @ x.astype(np.float64)
    # The decoder is exact; software's float32 weights are within 2^-23 of that.
    allowed = twin.error_bound(design, decoded.abs().double().numpy(), x, run.y)
    allowed += 2.0**-23 * decoded.abs().double().numpy() @ np.abs(x.astype(np.float64))
    assert (np.abs(run.y - software) <= allowed).all()


def test_the_paper_s_ratios_are_reached():
    clocks = {}
    for name in ("FP16", "4 bit"):
        measured = report.measure(name, BUILD)
        assert all(m.largest_gap == n * n // report.DESIGNS[name].lanes // n for n, m in measured.items())
        clocks[name] = {n: m.clocks for n, m in measured.items()}
    assert clocks["FP16"][2048] / clocks["4 bit"][2048] >= 3.98
    assert clocks["FP16"][512] / clocks["4 bit"][512] >= 3.67


def test_a_format_that_is_no_preset_works_as_well():
    format = BlockFormat(seed_bits=12, block_size=4, num_coefficients=2)
    design = SeedDesign(format=format, beat_bits=128, max_features=256)
    products = [report.random_product(design, 6, 100)]
    check(design, products, Simulator(design, BUILD).run(products, stall=0.3))
