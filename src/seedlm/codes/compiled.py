"""Functions compiled by numba, and whether these are kept for later processes.

to_machine_code   of a kernel: bytes that need no numba any more (`machine_code`), where a process can run such
KEPT              whether numba keeps what it compiles otherwise
"""

from collections.abc import Callable
from typing import Any, Final

import numba.core.config
from llvmlite import binding, ir
from numba import cfunc, njit, types
from numba.core.caching import FunctionCache
from numba.core.codegen import get_host_cpu_features

from seedlm.codes import linking, machine_code

_settings: Any = numba.core.config
_ENTRY: Final = "seedlm_entry"
_NO_WAYS_IN: Final[dict[str, Any]] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inner = njit(nogil=True, error_model="numpy", **_NO_WAYS_IN)
"""Compiles what only compiled functions call: ways in from Python and from C take their time to compile too."""


def can_be_kept() -> bool:
    """Whether there is a folder for it; numba raises RuntimeError where it is asked to keep a function and finds none.

    It looks for one beside the source, then in the user's home; neither can be written to in many a container. With
    ``NUMBA_CACHE_DIR`` it looks there first.
    """
    try:
        FunctionCache(can_be_kept)
    except RuntimeError:
        return False
    return True


KEPT: Final = can_be_kept()
"""Numba sees only changes of the file of a function, not of what it calls in others."""


def feature_list() -> bytes:
    """What numba compiles for (`processor.features`), in LLVM's words."""
    found = _settings.CPU_FEATURES
    return (get_host_cpu_features() if found is None else found).encode()


def to_machine_code(*arguments: types.Type, **options: Any) -> Callable[[Any], Any]:
    """A decorator for kernels, which cannot raise: what they compile to.

    arguments   of the function, by default the address of a job (`threads.Kernel`)
    options     of `numba.njit`
    returns     bytes for `machine_code.load`; where they could not be run, or are not understood, what `numba.cfunc` makes
    """
    arguments = arguments or (types.CPointer(types.int64),)

    def compile(function: Any) -> Any:
        if machine_code.loads():
            try:
                return linking.link(_object(function, arguments, options), _ENTRY).packed()
            except linking.Refused:
                pass
        return cfunc(types.void(*arguments), cache=KEPT, error_model="numpy", **options)(function)

    return compile


def _object(function: Any, arguments: tuple[types.Type, ...], options: dict[str, Any]) -> bytes:
    """An object file with a function that is entered at `_ENTRY` as C enters one, and needs nothing of numba's."""
    compiled: Any = njit(types.void(*arguments), nogil=True, error_model="numpy", **_NO_WAYS_IN, **options)(function)
    module = binding.parse_assembly(compiled.inspect_llvm(arguments))
    entry = _entry(compiled.overloads[arguments].fndesc.llvm_func_name, arguments)
    entry.triple = module.triple
    module.link_in(binding.parse_assembly(str(entry)))
    for each in module.functions:
        if not each.is_declaration and each.name != _ENTRY:
            each.linkage = "internal"
    target = binding.Target.from_triple(module.triple).create_target_machine(
        cpu=_settings.CPU_NAME or binding.get_host_cpu_name(),
        features=feature_list().decode(),
        opt=int(_settings.OPT),
        reloc="pic",
        codemodel="small",
    )
    return target.emit_object(module)


def _entry(name: str, arguments: tuple[types.Type, ...]) -> ir.Module:
    """A function that calls one of numba's, and what numba frees an array's memory with, none of which is a kernel's."""
    module, integer, place = ir.Module(), ir.IntType(64), ir.IntType(8).as_pointer()
    kinds = [integer.as_pointer() if isinstance(each, types.CPointer) else integer for each in arguments]
    kind = ir.FunctionType(ir.IntType(32), [place.as_pointer(), place.as_pointer(), *kinds])
    entered = ir.Function(module, ir.FunctionType(ir.VoidType(), kinds), _ENTRY)
    builder = ir.IRBuilder(entered.append_basic_block())
    returned_and_raised = [builder.alloca(place) for _ in range(2)]
    builder.call(ir.Function(module, kind, name), [*returned_and_raised, *entered.args])
    builder.ret_void()
    freed = ir.Function(module, ir.FunctionType(ir.VoidType(), [place]), "NRT_MemInfo_call_dtor")
    ir.IRBuilder(freed.append_basic_block()).ret_void()
    return module
