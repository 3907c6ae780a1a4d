"""CPU kernels as machine code: found by the next process, which needs no compiler; made again where anything differs."""

import ctypes
import os
import platform
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from seedlm.codes import linking, machine_code
from seedlm.codes.threads import Kernel

pytest.importorskip("numba")

from llvmlite import binding

CPUINFO = Path("/proc/cpuinfo")
PROCESSOR = pytest.mark.skipif(not CPUINFO.exists(), reason="nothing says what the processor is")
LOADS = pytest.mark.skipif(not machine_code.loads(), reason="machine code is loaded on Linux alone")

GENERATE = """
import os, sys, torch
from seedlm.codes.registry import parse_format
from seedlm.inference import attention, backend

torch.set_num_threads(2)
draw = torch.Generator().manual_seed(0)
cpu, found = torch.device("cpu"), []
for spec in ("trellis-r4-l16-t64-h128", "block-k16-c8-p3-q4-e4"):
    format, shape = parse_format(spec), (130, 300)
    chosen, parts = backend.choose("auto", cpu, format, shape), {}
    for name, part in format.parts(*shape).items():
        parts[name] = torch.ones(part.shape, dtype=getattr(torch, part.dtype))
    words = parts["words"]
    words.copy_(torch.randint(-(2**31), 2**31, words.shape, generator=draw))
    prepared = chosen.prepare(parts, format, shape)

    def multiply(tokens):
        x = torch.linspace(-1, 1, tokens * 300).view(tokens, 300)
        return chosen.linear(x, prepared, format, shape, None)

    found += [multiply(tokens) for tokens in (1, 600)]
    if pid := os.fork():
        assert os.waitpid(pid, 0)[1] == 0
    else:
        os._exit(not torch.equal(multiply(1), found[-2]))
heads = [torch.randn(1, 1, 64 * count, generator=draw) for count in (6, 2, 2, 1, 1)]
caches = [torch.zeros(1, 2, 5, 64) for _ in range(2)]
found.append(attention.attend(*heads, *caches, torch.tensor([0]), 0.125))
torch.save(found, sys.argv[1])
print(*(name for name in ("numba", "llvmlite") if name in sys.modules))
"""


def generated(folder, **environment):
    """What a process of its own imported of these, and all that it computed."""
    command = [sys.executable, "-c", GENERATE, str(folder / "found.pt")]
    environment = {**os.environ, "SEEDLM_CACHE": str(folder), "NUMBA_CACHE_DIR": str(folder / "numba"), **environment}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split(), torch.load(folder / "found.pt")


@LOADS
def test_a_process_that_finds_kernels_imports_no_compiler_and_gives_the_same_bits(tmp_path):
    imported, first = generated(tmp_path)
    assert imported == ["numba", "llvmlite"]
    assert not [*(tmp_path / "numba").rglob("*.nb?")]  # they are kept once
    files = {path: path.read_bytes() for path in (tmp_path / "kernels").iterdir()}
    assert len(files) == 13  # what the processor has; two products each, attention, and what threads do
    imported, second = generated(tmp_path)
    assert imported == []
    assert all(map(torch.equal, first, second))

    for number, path in enumerate(sorted(files)[:3]):  # damaged in one way or another
        content = files[path]
        path.write_bytes([content[: len(content) // 2], b"", content[:40] + b"\x90" + content[41:]][number])
    imported, third = generated(tmp_path)
    assert imported == ["numba", "llvmlite"]
    assert all(map(torch.equal, first, third))
    assert {path: path.read_bytes() for path in (tmp_path / "kernels").iterdir()} == files


@pytest.fixture
def makers(tmp_path, monkeypatch):
    """A module with a maker, the folder that all is kept in, and this package's texts, as if they lay there."""
    monkeypatch.setenv("SEEDLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_code, "__file__", str(tmp_path / "codes" / "machine_code.py"))
    monkeypatch.setattr(machine_code, "_facts", machine_code._facts.__wrapped__)
    monkeypatch.setattr(machine_code, "_imported", machine_code._texts)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "codes" / "below").mkdir(parents=True)
    (tmp_path / "codes" / "below" / "called.py").write_text("called = 1\n")
    (tmp_path / "some_makers.py").write_text(
        "made = []\ndef make(*given):\n    made.append(given)\n    return repr(given).encode()\n"
    )
    yield tmp_path
    sys.modules.pop("some_makers", None)


def times_made(*parameters):
    """How often anything was made so far, with one call more."""
    assert machine_code.made("some_makers", "make", *parameters) == repr(parameters).encode()
    return len(sys.modules["some_makers"].made) if "some_makers" in sys.modules else 0


def test_what_is_made_is_kept_for_the_same_parameters(makers):
    assert [times_made(4, True), times_made(4, True), times_made(4, False), times_made(), times_made(4, True)] == [
        1,
        1,
        2,
        3,
        3,
    ]
    del sys.modules["some_makers"]
    assert times_made(4, False) == 0  # not even its module is needed


def text_of_a_called_file(makers, monkeypatch):
    (makers / "codes" / "below" / "called.py").write_text("called = 2\n")


def a_new_file(makers, monkeypatch):
    (makers / "codes" / "new.py").write_text("")


def text_of_the_makers_file(makers, monkeypatch):
    with (makers / "some_makers.py").open("a") as file:
        file.write("# another\n")


def version_of_numba(makers, monkeypatch):
    found = machine_code.metadata.version
    monkeypatch.setattr(machine_code.metadata, "version", lambda name: found(name) + ".1" * (name == "numba"))


def version_of_llvmlite(makers, monkeypatch):
    found = machine_code.metadata.version
    monkeypatch.setattr(machine_code.metadata, "version", lambda name: found(name) + ".1" * (name == "llvmlite"))


def setting(makers, monkeypatch):
    monkeypatch.setenv("NUMBA_ENABLE_AVX", "0")


def settings_in_a_file(makers, monkeypatch):
    (makers / "elsewhere").mkdir()
    monkeypatch.chdir(makers / "elsewhere")
    Path(".numba_config.yaml").write_text("enable_avx: 0")


def processor(makers, monkeypatch):
    change_processor(makers, monkeypatch, "flags\t\t:" if "flags\t" in CPUINFO.read_text() else "Features\t:")


def change_processor(makers, monkeypatch, line):
    text = CPUINFO.read_text()
    assert line in text
    (makers / "cpuinfo").write_text(text.replace(line, f"{line} 1", 1))
    monkeypatch.setattr(machine_code, "_CPUINFO", makers / "cpuinfo")


@PROCESSOR
@pytest.mark.parametrize(
    "change",
    [
        text_of_a_called_file,
        a_new_file,
        text_of_the_makers_file,
        version_of_numba,
        version_of_llvmlite,
        setting,
        settings_in_a_file,
        processor,
    ],
)
def test_whatever_code_depends_on_is_part_of_its_name(makers, monkeypatch, change):
    assert [times_made(4), times_made(4)] == [1, 1]
    change(makers, monkeypatch)
    assert [times_made(4), times_made(4)] == [2, 2]


@PROCESSOR
def test_a_package_without_texts_depends_on_what_it_has_instead(makers, monkeypatch):
    monkeypatch.setattr(machine_code, "__file__", str(makers / "codes" / "machine_code.pyc"))
    (makers / "codes" / "called.pyc").write_text("1")
    assert [times_made(4), times_made(4)] == [1, 1]
    (makers / "codes" / "called.pyc").write_text("2")
    assert times_made(4) == 2


@PROCESSOR
@pytest.mark.parametrize("again", [False, True])
def test_a_process_whose_texts_are_edited_keeps_nothing_more(makers, monkeypatch, again):
    """What it imported before is of the old texts, what it imports from then on of the new."""
    monkeypatch.setattr(machine_code, "_imported", cache(machine_code._texts))
    assert times_made(1) == 1
    text_of_a_called_file(makers, monkeypatch)
    assert [times_made(2), times_made(2), times_made(1)] == [2, 3, 3]
    if again:
        (makers / "codes" / "below" / "called.py").write_text("called = 1\n")
    machine_code._imported.cache_clear()  # as another process
    assert times_made(2) == 4
    assert times_made(1) == (4 if again else 5)


def test_texts_are_those_of_the_import():
    """Not of the first kernel, before which a model may load for a minute."""
    code = "from seedlm.codes import machine_code\nprint(machine_code._imported.cache_info().currsize)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "1\n"


@PROCESSOR
def test_what_does_not_change_code_is_not(makers, monkeypatch):
    assert times_made(4) == 1
    monkeypatch.setenv("NUMBA_CACHE_DIR", "elsewhere")
    (makers / "codes" / "note.txt").write_text("no code")
    change_processor(makers, monkeypatch, "BogoMIPS\t:" if "BogoMIPS\t" in CPUINFO.read_text() else "bogomips\t:")
    assert times_made(4) == 1


@pytest.mark.parametrize("spoilt", ["folder", "version", "processor"])
def test_where_nothing_can_be_kept_it_is_made_each_time(makers, monkeypatch, spoilt):
    def missing(name):
        raise machine_code.metadata.PackageNotFoundError

    if spoilt == "folder":
        (makers / "cache").write_text("")
    elif spoilt == "version":
        monkeypatch.setattr(machine_code.metadata, "version", missing)
    else:
        monkeypatch.setattr(machine_code, "_CPUINFO", makers / "nosuch")
    assert [times_made(4), times_made(4)] == [1, 2]


@LOADS
def test_code_lies_where_it_can_be_run_and_not_written():
    address = machine_code.kernel("seedlm.codes.team_numba", "run_all").address
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(each, 16) for each in line.split()[0].split("-"))
        if first <= address < last:
            assert line.split()[1] == "r-xp"
            break
    else:
        pytest.fail("it lies nowhere")


def rotated(kernel):
    """What a kernel makes of some inputs."""
    x, signs = torch.linspace(-1, 1, 3 * 200).view(3, 200), torch.ones(128)
    room, y = torch.zeros(200), torch.zeros(3, 200)
    kernel.share((3, x.data_ptr(), 0, 200, 128, signs.data_ptr(), room.data_ptr(), y.data_ptr(), 0, 1), 1)
    return y


@LOADS
@pytest.mark.parametrize("why", ["the system", "the linker"])
def test_where_machine_code_is_refused_numba_runs_its_own(monkeypatch, why):
    from seedlm.codes import hadamard_numba

    def refuse(*args):
        raise linking.Refused("for a test")

    own = hadamard_numba.rotation()
    assert isinstance(own, bytes)
    if why == "the system":
        kernel = "seedlm.codes.hadamard_numba", "rotation"
        assert isinstance(machine_code.kernel(*kernel), machine_code.Code)
        monkeypatch.setattr(machine_code, "loads", lambda: False)
        assert not isinstance(machine_code.kernel(*kernel), machine_code.Code)  # although it is kept
    else:
        monkeypatch.setattr(linking, "link", refuse)
    numbas = hadamard_numba.rotation()
    assert not isinstance(numbas, bytes)
    assert torch.equal(rotated(Kernel(numbas)), rotated(Kernel(machine_code.load(own))))


@LOADS
@pytest.mark.parametrize("missing", ["memfd_create", "mmap"])
def test_a_system_that_gives_no_such_memory_is_known(monkeypatch, missing):
    if missing == "memfd_create":
        monkeypatch.setattr(machine_code, "_NOT_INHERITED", 1 << 20)  # which no system knows
    else:
        monkeypatch.setattr(machine_code.mmap, "PROT_EXEC", 1 << 20)  # which no system knows
        monkeypatch.setattr(machine_code.mmap, "MAP_PRIVATE", 0)
    assert not machine_code.loads.__wrapped__()


@LOADS
def test_the_systems_c_library_is_asked_for_such_memory(monkeypatch):
    """Python's own way is not there in builds for older systems, such as most of uv's."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    assert machine_code.loads.__wrapped__()


def linked(text, entry="entry", **options):
    """The image of a text of LLVM, for x86-64."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("x86_64-unknown-linux-gnu")
    options = {"reloc": "pic", "codemodel": "small"} | options
    module = binding.parse_assembly(f'target triple = "x86_64-unknown-linux-gnu"\n{text}')
    return linking.link(target.create_target_machine(**options).emit_object(module), entry)


CALL = "declare void @{0}()\ndefine void @entry() {{ call void @{0}()\n ret void }}"
CONSTANT = "define float @entry(float %x) { %y = fadd float %x, 1.25\n ret float %y }"
VARIABLE = "@counter = internal global i32 {}\ndefine i32 @entry() {{ %x = load volatile i32, i32* @counter\n ret i32 %x }}"
ELSEWHERE = "@stdout = external global i32\ndefine i32 @entry() { %x = load i32, i32* @stdout\n ret i32 %x }"


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (CALL.format("puts"), {}, r"calls \['puts'\]"),
        (ELSEWHERE, {}, r"calls \['stdout'\]"),
        (ELSEWHERE.replace("stdout", "memset"), {}, "relocation (9|42)"),
        (CONSTANT, {"reloc": "static", "codemodel": "large"}, "relocation 1"),
        (VARIABLE.format("7"), {}, r"'\.data'|in \.data"),
        (VARIABLE.format("0"), {}, r"\.bss"),
        (CONSTANT, {"entry": "other"}, "has no other"),
    ],
)
def test_what_the_linker_does_not_understand_is_refused(text, options, reason):
    with pytest.raises(linking.Refused, match=reason):
        linked(text, **options)


@pytest.mark.parametrize(
    "start", [b"", b"\x7fELF\x01\x01", b"\x7fELF\x02\x02", b"MZ\x90\0\3\0", b"\x7fELF\x02\x01" + bytes(12) + b"\x03\0"]
)
def test_other_object_files_are_refused(start):
    with pytest.raises(linking.Refused):
        linking.link(start.ljust(64, b"\0"), "entry")


@LOADS
def test_functions_of_the_c_library_are_called_in_their_order():
    text = """
declare i64 @memset(i64, i32, i64)
declare i64 @memcpy(i64, i64, i64)
define void @entry(i64 %to, i64 %from) {
  %1 = call i64 @memcpy(i64 %to, i64 %from, i64 8)
  %2 = add i64 %to, 2
  %3 = call i64 @memset(i64 %2, i32 33, i64 3)
  ret void
}"""
    image = linked(text)
    assert image.functions == ("memcpy", "memset")
    if platform.machine() == "x86_64":
        made, given = ctypes.create_string_buffer(9), ctypes.create_string_buffer(b"abcdefgh")
        address = machine_code.load(image.packed()).address
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)(ctypes.addressof(made), ctypes.addressof(given))
        assert made.value == b"ab!!!fgh"


@LOADS
def test_kernels_of_other_kinds_are_kept_as_well():
    from seedlm.codes.trellis.kernels import numba_product, numba_source

    for made in (numba_source.norm(), numba_source.gate(), numba_product.product(3, 16, False, 2)):
        assert isinstance(made, bytes)
