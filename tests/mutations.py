"""Damage to a packed folder, systematically and at random, and what becomes of it by each way in.

    Mutation   a name, and what it does to a copy of the folder
    table      every mutation of a kind: JSON values, keys, numbers, bytes, lengths, links, files that are none
    outcome    what a way in made of it: refused, same (no bit is other), silent (other weights), foreign (other's exception)

The tests go through a part of the table, `bench/fuzz.py` through all of it and through random pairs.
"""

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from seedlm.errors import SeedLMError
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import join, split

VALUES = [None, True, -1, 0, 1, 1.0, 1e308, 1 << 63, "", "x", "../x", "\x1b[2J", [], [1], {}, {"x": 1}]
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Mutation:
    """A name, and the damage."""

    name: str
    apply: Callable[[Path], None]


@dataclass(frozen=True)
class _Place:
    """A JSON text in a folder: how to read it and how to put another one there."""

    name: str
    read: Callable[[Path], Any]
    write: Callable[[Path, str], None]


def _header_place(file: str) -> _Place:
    def write(folder: Path, text: str) -> None:
        (folder / file).write_bytes(join(text, split(folder / file)[1]))

    return _Place(f"header of {file}", lambda folder: split(folder / file)[0], write)


def _metadata_place(file: str) -> _Place:
    def read(folder: Path) -> Any:
        return json.loads(split(folder / file)[0]["__metadata__"]["seedlm"])

    def write(folder: Path, text: str) -> None:
        header, data = split(folder / file)
        header["__metadata__"]["seedlm"] = text
        (folder / file).write_bytes(join(header, data))

    return _Place(f"metadata of {file}", read, write)


def _config_place() -> _Place:
    """The parts of config.json that are the format's."""

    def read(folder: Path) -> Any:
        config = json.loads((folder / "config.json").read_text())
        return {key: config[key] for key in ("quantization_config", "fusion_config")}

    def write(folder: Path, text: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        rest = json.dumps({key: value for key, value in config.items() if key not in ("quantization_config", "fusion_config")})
        inner = text.strip()[1:-1]
        (folder / "config.json").write_text(rest[:-1] + (f", {inner}" if inner.strip() else "") + "}")

    return _Place("config.json", read, write)


def _index_place() -> _Place:
    return _Place(
        INDEX, lambda folder: json.loads((folder / INDEX).read_text()), lambda folder, text: (folder / INDEX).write_text(text)
    )


def _paths(tree: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield from _paths(value, (*at, key))


def _get(tree: Any, at: tuple[Any, ...]) -> Any:
    for key in at:
        tree = tree[key]
    return tree


def _replaced(tree: Any, at: tuple[Any, ...], value: Any) -> Any:
    if not at:
        return value
    copy = json.loads(json.dumps(tree))
    _get(copy, at[:-1])[at[-1]] = value
    return copy


def _json_mutations(place: _Place, folder: Path) -> Iterator[Mutation]:
    tree = place.read(folder)

    def put(what: str, at: tuple[Any, ...], text: str) -> Mutation:
        return Mutation(f"{place.name}: {what} {'/'.join(map(str, at))}"[:160], lambda copy: place.write(copy, text))

    for at in _paths(tree):
        value = _get(tree, at)
        for other in VALUES:
            if other != value or type(other) is not type(value):
                yield put(f"{other!r} at", at, json.dumps(_replaced(tree, at, other)))
        if type(value) is int:
            for other in (value + 1, value - 1, value * 2, -value):
                yield put(f"{value} to {other} at", at, json.dumps(_replaced(tree, at, other)))
        if isinstance(value, str):
            for number, digit in [(n, c) for n, c in enumerate(value) if c.isdigit()][:4]:
                other = value[:number] + str((int(digit) + 1) % 10) + value[number + 1 :]
                yield put(f"digit {number} of", at, json.dumps(_replaced(tree, at, other)))
        if not at:
            continue
        parent = _get(tree, at[:-1])
        copy = json.loads(json.dumps(tree))
        del _get(copy, at[:-1])[at[-1]]
        yield put("without", at, json.dumps(copy))
        if isinstance(parent, dict):
            renamed = {("zz" + key if key == at[-1] else key): item for key, item in parent.items()}
            yield put("renamed", at, json.dumps(_replaced(tree, at[:-1], renamed)))
            commanding = {(f"\x1b[2J{key}\n" if key == at[-1] else key): item for key, item in parent.items()}
            yield put("a command in", at, json.dumps(_replaced(tree, at[:-1], commanding)))
            other = next((key for key in parent if key != at[-1] and parent[key] != value), None)
            if other is not None:
                swapped = {**parent, at[-1]: parent[other], other: value}
                yield put("swapped", at, json.dumps(_replaced(tree, at[:-1], swapped)))
            mark = json.dumps(_replaced(tree, at[:-1], {"@": 0, **parent}))
            twice = mark.replace('"@": 0', f"{json.dumps(at[-1])}: {json.dumps(value)}", 1)
            yield put("twice", at, twice)


def _byte_mutations(file: str, folder: Path) -> Iterator[Mutation]:
    data = (folder / file).read_bytes()
    header, body = split(folder / file)
    start = len(data) - len(body)

    def put(what: str, change: Callable[[bytearray], Any]) -> Mutation:
        def apply(copy: Path) -> None:
            content = bytearray((copy / file).read_bytes())
            result = change(content)
            (copy / file).write_bytes(content if result is None else result)

        return Mutation(f"{file}: {what}", apply)

    for length in (0, 1, 7, 8, 9, start - 1, start, len(data) - 1):
        yield put(f"cut to {length}", lambda b, n=length: b[:n])
    yield put("one byte more", lambda b: b + b"\0")
    for bit in range(0, 64, 5):
        yield put(f"bit {bit} of the header's length", lambda b, n=bit: b.__setitem__(n // 8, b[n // 8] ^ 1 << n % 8))
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = (start + n for n in entry["data_offsets"])
        for place in sorted({begin, (begin + end) // 2, end - 1}):
            for bit in (0, 3, 7):
                yield put(f"bit {bit} of byte {place} in {name}", lambda b, p=place, n=bit: b.__setitem__(p, b[p] ^ 1 << n))
        yield put(f"zeros in {name}", lambda b, x=begin, y=end: b.__setitem__(slice(x, y), bytes(y - x)))
    for place in range(8, start, max(1, (start - 8) // 60)):
        yield put(f"header byte {place}", lambda b, p=place: b.__setitem__(p, b[p] ^ 4))


def _file_mutations(folder: Path) -> Iterator[Mutation]:
    names = ["config.json", *sorted(path.name for path in folder.iterdir() if path.name.startswith("model"))]

    def replace(name: str, what: str, make: Callable[[Path], Any]) -> Mutation:
        def apply(copy: Path) -> None:
            (copy / name).unlink()
            make(copy / name)

        return Mutation(f"{name}: {what}", apply)

    def sparse(path: Path) -> None:
        with open(path, "wb") as file:
            file.truncate(1 << 40)

    for name in names:
        yield replace(name, "gone", lambda path: None)
        yield replace(name, "a folder", lambda path: path.mkdir())
        yield replace(name, "a FIFO", os.mkfifo)
        yield replace(name, "a link to itself", lambda path: path.symlink_to(path.name))
        yield replace(name, "a link to nowhere", lambda path: path.symlink_to("nowhere"))
        yield replace(name, "a link to /dev/zero", lambda path: path.symlink_to("/dev/zero"))
        yield replace(name, "empty", lambda path: path.write_bytes(b""))
        yield replace(name, "a terabyte of zeros", sparse)
        yield replace(name, "no UTF-8", lambda path: path.write_bytes(b"\xff" * 64))
        yield replace(name, "deep", lambda path: path.write_bytes(b"[" * 200_000))
        yield Mutation(f"{name}: a link out of the folder", lambda copy, name=name: _link_out(copy, name))
    shards = [name for name in names if name.endswith(".safetensors")]
    if len(shards) > 1:
        yield Mutation("shards exchanged", lambda copy: _exchange(copy / shards[0], copy / shards[1]))
        yield Mutation("a shard twice", lambda copy: shutil.copyfile(copy / shards[0], copy / shards[1]))


def _link_out(copy: Path, name: str) -> None:
    outside = copy.parent / f"outside-{copy.name}-{name}"
    os.replace(copy / name, outside)
    (copy / name).symlink_to(outside)


def _exchange(one: Path, other: Path) -> None:
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)


def table(folder: Path) -> list[Mutation]:
    """Every mutation of a folder."""
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    places = [_config_place(), *([_index_place()] if (folder / INDEX).exists() else [])]
    places += [make(shard) for shard in shards for make in (_header_place, _metadata_place)]
    found = [mutation for place in places for mutation in _json_mutations(place, folder)]
    found += [mutation for shard in shards for mutation in _byte_mutations(shard, folder)]
    return [*found, *_file_mutations(folder)]


def by_reader(folder: Path) -> dict[str, torch.Tensor]:
    """All that our own reader gives out, digests checked."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify(threads=1)
    return dict(checkpoint.weights())


def by_transformers(folder: Path) -> dict[str, torch.Tensor]:
    """What `from_pretrained` makes of it."""
    from transformers import AutoModelForCausalLM

    return {name: tensor.clone() for name, tensor in AutoModelForCausalLM.from_pretrained(folder).state_dict().items()}


def by_evaluate(folder: Path) -> dict[str, torch.Tensor]:
    """What `evaluate` and `generate` make of it."""
    from seedlm.integrations.transformers.opening import open_language_model

    return {name: tensor.clone() for name, tensor in open_language_model(folder).state_dict().items()}


def outcome(way: Callable[[Path], dict[str, torch.Tensor]], folder: Path, sound: dict[str, torch.Tensor]) -> tuple[str, str]:
    """One of refused, same, silent, foreign; and the message or what is other."""
    try:
        found = way(folder)
    except SeedLMError as error:
        message = str(error)
        return ("refused" if message.isprintable() and len(message) < 2000 else "foreign", message)
    except Exception as error:
        return "foreign", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    other = [name for name in {**sound, **found} if not _same(sound.get(name), found.get(name))]
    return ("silent", other[0]) if other else ("same", "")


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None or one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(one.contiguous().flatten().view(torch.uint8), other.contiguous().flatten().view(torch.uint8))


def attempt(mutations: list[Mutation], sound: Path, copy: Path) -> Path:
    """A fresh copy with some mutations applied one after the other; one that no longer fits is passed over."""
    shutil.rmtree(copy, ignore_errors=True)
    for stray in copy.parent.glob(f"outside-{copy.name}-*"):
        stray.unlink()
    shutil.copytree(sound, copy)
    for mutation in mutations:
        if any(path.exists() and not path.is_file() and not path.is_dir() for path in copy.rglob("*")):
            break  # a device or a pipe, which another mutation would read to no end
        try:
            mutation.apply(copy)
        except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, MemoryError):
            continue
    return copy


def sample(mutations: list[Mutation], count: int, seed: int = 0) -> list[Mutation]:
    """Some of a table, spread over all of its kinds."""
    step = len(mutations) / count
    rng = random.Random(seed)
    return [mutations[min(len(mutations) - 1, int((n + rng.random()) * step))] for n in range(count)]
