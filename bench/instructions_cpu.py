"""Which of a processor's units instructions of 512 bits wait for: loops of one kind, and of two by turns, in clocks.

    python bench/instructions_cpu.py [--json]

Needs gcc and a processor with AVX-512 (VBMI, VNNI). Loops are assembly, eight of each instruction, which depend on nothing that
they wait for; the least processor time of 60 runs, in clocks by a chain of additions. Two kinds that share their units take
the sum of both, others the longer of the two. "A step" is what a kernel (`numba_pairs`) does for 128 weights at 4 bits, but for
loads (docs/log/products_cpu.md).
"""

import argparse
import json
import subprocess
import tempfile
from itertools import chain
from pathlib import Path

KINDS = {
    "vpmulld": "%%zmm9,%%zmm{a},%%zmm{d}",
    "vdbpsadbw": "$0,%%zmm11,%%zmm{a},%%zmm{d}",
    "vpdpwssd": "%%zmm10,%%zmm{a},%%zmm{s}",
    "vpdpbusd": "%%zmm10,%%zmm{a},%%zmm{s}",
    "vpmultishiftqb": "%%zmm11,%%zmm{a},%%zmm{d}",
    "vpshufb": "%%zmm11,%%zmm{a},%%zmm{d}",
    "vpermb": "%%zmm11,%%zmm{a},%%zmm{d}",
    "vpermi2b": "%%zmm11,%%zmm{a},%%zmm{d}",
    "vpsrld": "$4,%%zmm{a},%%zmm{d}",
    "vpandd": "%%zmm11,%%zmm{a},%%zmm{d}",
    "vpblendmw": "%%zmm11,%%zmm{a},%%zmm{d}%{{%%k1%}}",
    "vmovdqu64": "{load}(%1),%%zmm{d}",
}


def some(kind: str, count: int = 8, first: int = 16) -> list[str]:
    """Instructions of a kind, on registers that nobody waits for; sums go to eight others."""
    numbers = ({"a": 12 + i % 4, "d": first + i % 8, "s": i % 8, "load": 64 * i} for i in range(count))
    return [f"{kind} {KINDS[kind].format(**each)}" for each in numbers]


def by_turns(*lists: list[str]) -> list[str]:
    return list(chain.from_iterable(zip(*lists, strict=True)))


def loops() -> dict[str, list[str]]:
    found = {kind: some(kind) for kind in KINDS}
    for first in ("vpmulld", "vpsrld", "vpandd"):
        found |= {f"{first}, {kind}": by_turns(some(first, first=24), some(kind)) for kind in KINDS if kind != first}
    windows = some("vpsrld", 4) + some("vpandd", 6) + some("vpshufb", 2)
    products = by_turns(some("vpmulld", first=24), some("vdbpsadbw"))
    found["a step, in pairs"] = windows + products + by_turns(some("vpblendmw", 4), some("vpdpwssd", 4)) + some("vpermb", 1)
    found["a step, int8"] = windows + by_turns(some("vpmulld", first=24), some("vpdpbusd")) + some("vpermb", 2)
    return found


def program(bodies: dict[str, list[str]]) -> str:
    clobbered = ", ".join(f'"{name}"' for name in ("rax", "memory", "cc", *(f"xmm{i}" for i in range(32))))
    lines = ["#include <stdio.h>", "#include <time.h>", "static char memory[65536] __attribute__((aligned(64)));"]
    lines.append(
        "static double now() { struct timespec t; clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);"
        " return t.tv_sec + 1e-9 * t.tv_nsec; }"
    )
    for n, body in enumerate([["add $1,%%rax"] * 100, *bodies.values()]):
        text = "\\n\\t".join(["1:", *body, "dec %0", "jnz 1b"])
        lines.append(f'static void f{n}(long n) {{ asm volatile("{text}" : "+r"(n) : "r"(memory) : {clobbered}); }}')
    count = len(bodies) + 1
    lines.append(f"int main() {{ double best[{count}]; for (int i = 0; i < {count}; i++) best[i] = 1e9;")
    lines.append("for (int round = 0; round < 60; round++) { double start;")
    lines += [
        f"start = now(); f{n}(20000); start = now() - start; if (start < best[{n}]) best[{n}] = start;" for n in range(count)
    ]
    lines.append(f'}} for (int i = 0; i < {count}; i++) printf("%.9g\\n", best[i]); }}')
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    bodies = loops()
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "loops.c"), Path(folder, "loops")
        source.write_text(program(bodies))
        subprocess.run(["gcc", "-O2", "-mavx512f", "-o", str(binary), str(source)], check=True)
        seconds = [*map(float, subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout.split())]
    clock = 100 * 20000 / seconds[0]
    clocks = {name: round(each / 20000 * clock, 2) for name, each in zip(bodies, seconds[1:], strict=True)}
    if options.json:
        print(json.dumps({"GHz": round(clock / 1e9, 3), "clocks": clocks}))
        return
    print(f"{clock / 1e9:.2f} GHz")
    for name, each in clocks.items():
        print(f"{name:28}{each:8.2f}")


if __name__ == "__main__":
    main()
