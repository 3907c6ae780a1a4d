"""The cocotb side of `simulate`: drives a `*_matvec` module and checks the stream protocol at every clock.

Runs inside the simulator. Reads the job that `simulate` wrote (environment variable SEEDLM_RTL_JOB) and leaves results
beside it.
"""

import json
import os
import random
from pathlib import Path
from typing import Any

import cocotb
from cocotb.clock import Clock
from cocotb.triggers import RisingEdge


async def send(dut: Any, name: str, words: list[int], stall: float, rng: random.Random) -> None:
    """One packet on an AXI-Stream input, with pauses before a share `stall` of its beats."""
    valid, ready, data = (getattr(dut, f"{name}_{s}") for s in ("tvalid", "tready", "tdata"))
    last = getattr(dut, f"{name}_tlast", None)
    for i, word in enumerate(words):
        while stall and rng.random() < stall:
            await RisingEdge(dut.clk)
        data.value = word
        valid.value = 1
        if last is not None:
            last.value = int(i == len(words) - 1)
        await RisingEdge(dut.clk)
        while not ready.value:
            await RisingEdge(dut.clk)
        valid.value = 0


async def receive(dut: Any, count: int, stall: float, rng: random.Random, now: list[int]) -> tuple[list[int], list[int]]:
    """One packet of results and the clock of each. Checks that an offer stands until it is taken and where tlast is."""
    words: list[int] = []
    times: list[int] = []
    offered: tuple[int, int] | None = None
    while len(words) < count:
        dut.m_axis_y_tready.value = int(not stall or rng.random() >= stall)
        await RisingEdge(dut.clk)
        if not dut.m_axis_y_tvalid.value:
            assert offered is None, "tvalid fell before tready"
            continue
        offer = int(dut.m_axis_y_tdata.value), int(dut.m_axis_y_tlast.value)
        assert offered in (None, offer), "tdata or tlast changed before tready"
        offered = offer
        if dut.m_axis_y_tready.value:
            words.append(offer[0])
            times.append(now[0])
            assert offer[1] == (len(words) == count), f"tlast is {offer[1]} with result {len(words)} of {count}"
            offered = None
    return words, times


@cocotb.test()
async def products(dut: Any) -> None:
    """Runs all products of the job, streams independent of each other, and writes results and clock counts."""
    path = Path(os.environ["SEEDLM_RTL_JOB"])
    job = json.loads(path.read_text())
    rng = random.Random(job["seed"])
    stall, beat = job["stall"], job["beat_bytes"]

    def words(name: str) -> list[int]:
        data = (path.parent / name).read_bytes()
        return [int.from_bytes(data[i : i + beat], "little") for i in range(0, len(data), beat)]

    now = [0]

    async def count() -> None:
        while True:
            await RisingEdge(dut.clk)
            now[0] += 1

    async def send_all(name: str, key: str) -> None:
        for product in job["products"]:
            packet = [product["command"]] if key == "command" else words(product[key])
            await send(dut, name, packet, stall, rng)
            if key == "command":
                started.append(now[0])

    started: list[int] = []
    Clock(dut.clk, 2, "ns").start()
    for name in ("s_axis_cmd_tvalid", "s_axis_x_tvalid", "s_axis_w_tvalid", "m_axis_y_tready"):
        getattr(dut, name).value = 0
    dut.rst.value = 1
    for _ in range(4):
        await RisingEdge(dut.clk)
    dut.rst.value = 0
    cocotb.start_soon(count())
    for name, key in (("s_axis_cmd", "command"), ("s_axis_x", "x"), ("s_axis_w", "w")):
        cocotb.start_soon(send_all(name, key))
    results = []
    for i, product in enumerate(job["products"]):
        y, times = await receive(dut, product["rows"], stall, rng, now)
        results.append({"y": y, "times": [t - started[i] for t in times]})
    (path.parent / "results.json").write_text(json.dumps(results))
