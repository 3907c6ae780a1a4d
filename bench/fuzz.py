"""Damaged files by every way in, for as long as one likes: `python bench/fuzz.py --seconds 300`.

GGUF headers, results files and records, and format texts have a share of the time; the rest goes to the table of mutations of
three packed folders (plain layers in two shards; stacked experts; the trellis code), through our own reader and through
transformers, and to random pairs of them. Prints every case that is silent, foreign or slow, the counts, and as the last line
a JSON object with them.
Exit code 1 if there was one.
"""

import argparse
import copy
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import torch
from transformers.utils import logging

from mutations import Mutation, attempt, by_evaluate, by_reader, by_transformers, outcome, table
from seedlm.codes.registry import format_from_dict, parse_format
from seedlm.compare import compare_runs, load_runs, to_markdown
from seedlm.errors import SeedLMError
from seedlm.storage.checkpoint import Checkpoint
from seedlm.storage.source import open_source
from synthetic_runs import original_run, synthetic, write
from tiny_models import run, tiny_gguf, tiny_llama, tiny_model

SLOW_SECONDS, HANGS_SECONDS = 2.0, 30.0
WAYS = {"reader": by_reader, "transformers": by_transformers, "evaluate": by_evaluate}


class Stopwatch:
    """Seconds of this process' processor time since it was made; of the wall's where it waited for something for long."""

    def __init__(self) -> None:
        self._processor, self._wall = time.process_time(), time.monotonic()

    @property
    def seconds(self) -> float:
        waited = time.monotonic() - self._wall
        return waited if waited > HANGS_SECONDS else time.process_time() - self._processor


class Counts:
    """What came of the cases of each kind, and those that must not be."""

    def __init__(self) -> None:
        self.kinds: dict[str, Counter[str]] = {}
        self.bad: list[str] = []

    def add(self, kind: str, name: str, result: str, message: str, seconds: float) -> None:
        self.kinds.setdefault(kind, Counter())[result] += 1
        if result in ("silent", "foreign") or seconds > SLOW_SECONDS:
            self.bad.append(f"{kind}: {result} after {seconds:.1f} s: {name}: {message}")
            print(self.bad[-1][:400], flush=True)


def folders(root: Path) -> list[Path]:
    """Three sound packed folders."""
    tiny_llama(root / "llama", layers=1)
    run(root / "llama", root / "packed", max_shard_size="8KB")
    tiny_model("gpt_oss", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1).save_pretrained(root / "experts")
    run(root / "experts", root / "stacked")
    run(root / "llama", root / "trellis", format="3-fast", backend="auto", feedback="none")
    return [root / "packed", root / "stacked", root / "trellis"]


def fuzz_folders(counts: Counts, root: Path, deadline: float, rng: random.Random, part: slice) -> None:
    """The whole table or a part of it, one by one, then pairs until the time is over."""
    tables, sounds = {}, {}
    for sound in folders(root):
        tables[sound] = table(sound)
        sounds[sound] = {name: way(sound) for name, way in WAYS.items()}
        print(f"{sound.name}: {len(tables[sound])} mutations", flush=True)

    def every(chosen: list[Mutation], kind: str, sound: Path) -> None:
        label = " + ".join(each.name for each in chosen)
        for name, way in WAYS.items():
            spoiled = attempt(chosen, sound, root / "copy")
            start = Stopwatch()
            result, message = outcome(way, spoiled, sounds[sound][name])
            seconds = start.seconds
            if result == "foreign" and name == "transformers" and any(each.name.startswith("config.json") for each in chosen):
                result = "theirs"  # it reads config.json itself, before it knows whose folder it is
            if result == "silent" and set(Checkpoint.open(spoiled).digests) < set(Checkpoint.open(sound).digests):
                result = "undigested"  # one took a digest away, which a file may lack, and the other damaged what it was of
            counts.add(f"{kind}, {sound.name}, {name}", label, result, message, seconds)

    singles = [(mutation, sound) for sound, mutations in tables.items() for mutation in mutations][part]
    rng.shuffle(singles)
    for mutation, sound in singles:
        if time.monotonic() > deadline:
            print("the time was over before the table was", flush=True)
            return
        every([mutation], "one", sound)
    while time.monotonic() < deadline:
        sound = rng.choice(list(tables))
        every(rng.sample(tables[sound], 2), "two", sound)


def guarded(counts: Counts, kind: str, name: str, call: Callable[[], object]) -> None:
    """A call that may only be refused in our own words."""
    start = Stopwatch()
    try:
        call()
        result, message = "accepted", ""
    except SeedLMError as error:
        result, message = ("refused" if str(error).isprintable() else "foreign"), str(error)
    except Exception as error:
        result, message = "foreign", f"{type(error).__name__}: {' '.join(str(error).split())}"
    counts.add(kind, name, result, message, start.seconds)


def fuzz_gguf(counts: Counts, root: Path, deadline: float, rng: random.Random) -> None:
    """Flipped bits, cut ends and large numbers in a GGUF header."""
    tiny_gguf(root / "sound.gguf")
    sound = (root / "sound.gguf").read_bytes()
    while time.monotonic() < deadline:
        data = bytearray(sound)
        place = rng.randrange(2500)
        what = rng.choice(["bit", "large", "zero", "cut", "copy"])
        if what == "bit":
            data[place] ^= 1 << rng.randrange(8)
        elif what == "large":
            data[place : place + 8] = rng.choice([0xFFFFFFFF, 1 << 40, (1 << 64) - 1, 1 << 63]).to_bytes(8, "little")
        elif what == "zero":
            data[place : place + 4] = bytes(4)
        elif what == "cut":
            del data[rng.randrange(len(data)) :]
        else:
            other = rng.randrange(2500)
            data[place : place + 8] = data[other : other + 8]
        (root / "m.gguf").write_bytes(data)
        guarded(counts, "GGUF", f"{what} at {place}", lambda: open_source(root / "m.gguf"))


def fuzz_runs(counts: Counts, root: Path, deadline: float, rng: random.Random) -> None:
    """Results and records with one value replaced."""
    first = write(root / "runs", "a", *original_run())
    values = [None, True, -1, 0, 1e308, 1 << 70, "", "x", "\x1b", [], [1], {}, [[1.5]], {"x": 1}]

    def spoil(tree: object) -> str:
        at, node = [], tree
        while isinstance(node, dict | list) and node and (not at or rng.random() < 0.85):
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            parent, node = node, node[key]
            at.append(key)
        if rng.random() < 0.25:
            del parent[key]
            return f"without {at}"
        parent[key] = rng.choice(values)
        return f"{parent[key]!r} at {at}"

    while time.monotonic() < deadline:
        results, records = copy.deepcopy(synthetic(rng.randrange(5)))
        name = spoil(results) if rng.random() < 0.5 else spoil(records)
        second = write(root / "runs", "b", results, records)
        guarded(counts, "runs", name, lambda second=second: to_markdown(compare_runs(load_runs([first, second]))))


def fuzz_formats(counts: Counts, deadline: float, rng: random.Random) -> None:
    """Texts, numbers and objects where a format is expected."""
    texts = ["block-k16-c8-p3-q4-e4", "4", "trellis", "block", "-", "9" * 30, "\x00", "k", "e-", "\ud800", ".5"]
    while time.monotonic() < deadline:
        text = "".join(rng.sample(texts, 2))[: rng.randrange(1, 40)]
        spoiled = "".join(rng.choice("0129-kcpqe.") if rng.random() < 0.15 else c for c in text)
        number = rng.choice([10**400, -1, float("inf"), float("nan"), 4, 2.7])
        guarded(counts, "formats", repr(spoiled), lambda spoiled=spoiled: parse_format(spoiled))
        guarded(counts, "formats", repr(number)[:40], lambda number=number: parse_format(number))
        data = {"family": rng.choice(["block", "trellis", [], None]), spoiled: number}
        guarded(counts, "formats", repr(data)[:80], lambda data=data: format_from_dict(data))


def main() -> None:
    """Fuzz for so many seconds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", default="1/1", help="2/5: of the table the second fifth, and nothing but the table and pairs")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    counts, rng, start = Counts(), random.Random(options.seed), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        number, of = map(int, options.part.split("/"))
        others = (
            ()
            if of > 1
            else (
                (0.10, lambda end: fuzz_gguf(counts, root, end, rng)),
                (0.20, lambda end: fuzz_runs(counts, root, end, rng)),
                (0.22, lambda end: fuzz_formats(counts, end, rng)),
            )
        )
        for share, fuzz in others:
            fuzz(start + share * options.seconds)
        fuzz_folders(counts, root, start + options.seconds, rng, slice(number - 1, None, of))
    for kind, found in counts.kinds.items():
        print(f"{kind:36} " + ", ".join(f"{count} {result}" for result, count in sorted(found.items())))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"seconds": round(time.monotonic() - start), "seed": options.seed, "peak_kib": peak, **counts.kinds}))
    sys.exit(bool(counts.bad))


if __name__ == "__main__":
    main()
