"""What a GPU's instructions cost beside each other, in clocks of a scheduler: why products take as long as they do.

    python bench/instructions_gpu.py [--warps 12] [--json]

Each row is a loop of independent instructions, run by so many warps of every multiprocessor, a quarter of them on each
scheduler. The instructions are those of which `product` of the trellis code consists: multiplications of a hash (imad), shifts,
products of bytes by tensor cores (mma m16n8k32) or without them (dp4a). `sum` is what the row would take if an mma kept the
scheduler from everything else for as long as it takes alone, and any other instruction for one clock. Where a row takes about
its sum, and more than its busiest pipe, the scheduler's slots are the limit.
"""

import argparse
import json
import statistics
import sys

import torch

from seedlm import nvrtc

ROUNDS = 500
INSTRUCTIONS = {
    "mma": 'asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 '
    + '{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : '
    + ", ".join(f'"+r"(c[#][{i}])' for i in range(4))
    + ' : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));',
    "imad": """asm volatile("mad.lo.u32 %0, %0, 0x83dcd12d, %1;" : "+r"(r[#]) : "r"(k));""",
    "dp4a": """asm volatile("dp4a.u32.s32 %0, %0, %1, %0;" : "+r"(r[16 + #]) : "r"(k));""",
    "shift": """asm volatile("shf.r.wrap.b32 %0, %0, %1, 7;" : "+r"(r[32 + #]) : "r"(k));""",
    "fma": """asm volatile("fma.rn.f32 %0, %0, %1, %1;" : "+f"(f[#]) : "f"(g));""",
}
PIPES = {"imad": "multiply", "dp4a": "multiply", "shift": "shift"}
"""The two pipes that take a warp's instruction every second clock."""

MIXES = [
    {"mma": 8},
    {"imad": 32},
    {"shift": 32},
    {"dp4a": 32},
    {"fma": 32},
    {"imad": 32, "shift": 32},
    {"mma": 8, "fma": 32},
    {"mma": 8, "imad": 32},
    {"mma": 8, "shift": 32},
    {"mma": 8, "imad": 32, "shift": 32},
    {"mma": 8, "imad": 32, "shift": 48},
    {"dp4a": 32, "imad": 32, "shift": 48},
    {"mma": 8, "imad": 32, "shift": 64},
    {"dp4a": 32, "imad": 32, "shift": 64},
]
"""32 hashes are 32 multiplications, 8 mma or 32 dp4a, and about 40 (4 bits) to 64 (3 bits) shifts, permutations and masks."""


def source(mix: dict[str, int], warps: int) -> str:
    """A kernel whose loop is the mix, each kind of instruction spread evenly."""
    order = sorted(((i + 0.5) / count, kind, i) for kind, count in mix.items() for i in range(count))
    loop = "\n    ".join(INSTRUCTIONS[kind].replace("#", str(i % (8 if kind == "mma" else 16))) for _, kind, i in order)
    return (
        nvrtc.common()
        + f"""
extern "C" __global__ void __launch_bounds__({32 * warps}, 1) mix(u64* clocks, u32* out, int rounds, u32 k) {{
  u32 r[48], a[4], b[2] = {{k * 3, k * 5}};
  int c[8][4];
  float f[16], g = k;
  for (int i = 0; i < 48; i++) r[i] = k * i + threadIdx.x;
  for (int i = 0; i < 4; i++) a[i] = k * threadIdx.x + i;
  for (int i = 0; i < 16; i++) f[i] = k * i;
  for (int i = 0; i < 32; i++) c[i / 4][i % 4] = i * k;
  __syncthreads();
  const long long begin = clock64();
#pragma unroll 1
  for (int round = 0; round < rounds; round++) {{
    {loop}
  }}
  __syncthreads();  // the last warp's time, as a scheduler need not be fair
  if (threadIdx.x == 0) clocks[blockIdx.x] = clock64() - begin;
  u32 sum = 0;
  for (int i = 0; i < 48; i++) sum += r[i];
  for (int i = 0; i < 16; i++) sum += __float_as_uint(f[i]);
  for (int i = 0; i < 32; i++) sum += c[i / 4][i % 4];
  out[threadIdx.x] = sum;
}}
"""
    )


def clocks(mix: dict[str, int], warps: int) -> float:
    """Of a scheduler, for one warp's turn of the loop."""
    device = torch.device("cuda", torch.cuda.current_device())
    kernel = nvrtc.load(source(mix, warps), "mix", "PPiI", device=device)
    blocks = nvrtc.processors(nvrtc.index_of(device))
    found = torch.zeros(blocks, dtype=torch.int64, device=device)
    out = torch.empty(32 * warps, dtype=torch.int32, device=device)
    each = []
    for _ in range(3):
        kernel((blocks,), 32 * warps, found, out, ROUNDS, 3)
        each.append(found.double().median().item() / ROUNDS / (warps / 4))
    return statistics.median(each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--warps", type=int, default=12, help="of a multiprocessor; a multiple of four, at most 16")
    parser.add_argument("--json", action="store_true", help="one line of JSON at the end")
    options = parser.parse_args()
    if not torch.cuda.is_available() or (reason := nvrtc.reason_unavailable()):
        sys.exit("no CUDA device" if not torch.cuda.is_available() else reason)
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, {options.warps} warps of a multiprocessor")
    alone = clocks({"mma": 8}, options.warps) / 8
    rows = []
    for mix in MIXES:
        took = clocks(mix, options.warps)
        total = sum(count * (alone if kind == "mma" else 1) for kind, count in mix.items())
        busiest = max(2 * sum(mix[kind] for kind in mix if PIPES.get(kind) == pipe) for pipe in ("multiply", "shift"))
        rows.append({"mix": mix, "clocks": took, "sum": total, "busiest pipe": busiest})
        text = ", ".join(f"{count} {kind}" for kind, count in mix.items())
        print(f"  {text:34} {took:6.1f} clocks, sum {total:6.1f}, busiest pipe {busiest:4}", flush=True)
    if options.json:
        print(json.dumps({"device": device, "torch": torch.__version__, "warps": options.warps, "rows": rows}))


if __name__ == "__main__":
    main()
