"""``seedlm serve`` and ``seedlm run``: other programs, in which packed folders load because this package is imported first."""

import importlib.util
import runpy
import socket
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer

from seedlm.cli.console import note
from seedlm.cli.options import Backend, Device, Dtype, TrustRemoteCode
from seedlm.errors import BackendError, FormatError, extra


def serve(
    model: Annotated[str, typer.Argument(help="Model folder, GGUF file or Hub repository, compressed or not.")],
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=1, max=65535)] = 8000,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Backend = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a model to OpenAI clients: chat, completions, streaming, at http://HOST:PORT/v1.

    The server is transformers' own; `seedlm run transformers serve` has all of its options.
    """
    from seedlm.integrations.transformers.before import check_backend, find, has_chat_template
    from seedlm.storage.source import is_repository

    chats, loaded = None, model
    if not is_repository(model):
        found = find(model)
        if found.path.is_file():
            raise BackendError(f"{model}: a server takes folders and Hub repositories; compress the file first")
        check_backend(backend, found.path)
        chats, loaded = has_chat_template(found.path), f"{model}: {found}"
    for name in ("fastapi", "uvicorn", "openai"):
        if importlib.util.find_spec(name) is None:
            raise BackendError(f"serving needs {name}: {extra('serve')}")
    _check_port(host, port)
    note(f"{loaded}; loading")
    from seedlm.device import choose_device

    choose_device(device)
    from seedlm.integrations.transformers.serving import Server

    if chats is False:
        note(f"{model} has no chat template: completions are answered, chats are refused")
    note(f"{model} at http://{host}:{port}/v1; Ctrl-C ends")
    how = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    Server(model, backend=backend, host=host, port=port, **how)


def _check_port(host: str, port: int) -> None:
    """Raise BackendError if nothing can listen there: the server would find out after the model is loaded."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as reason:
        raise BackendError(f"{host}:{port}: cannot listen there ({reason.strerror or reason}); choose another --port") from None


def run(
    program: Annotated[
        str, typer.Argument(help="A command of this Python's packages (lm_eval, transformers), a .py file, or a module.")
    ],
    arguments: Annotated[list[str] | None, typer.Argument(help="What follows is the program's.")] = None,
) -> None:
    """Run another Python program that can load compressed models: it finds seedlm imported.

    seedlm run lm_eval --model hf --model_args pretrained=OUT --tasks arc_easy

    Programs that start others (accelerate launch, torchrun) need `import seedlm` in those.
    """
    sys.argv = [program, *(arguments or [])]
    scripts = entry_points(group="console_scripts", name=program)
    if scripts:
        start = next(iter(scripts)).load()
        sys.exit(start())
    elif program.endswith(".py") and Path(program).is_file():
        sys.path.insert(0, str(Path(program).resolve().parent))
        runpy.run_path(program, run_name="__main__")
    elif _is_module(program):
        runpy.run_module(program, run_name="__main__", alter_sys=True)
    else:
        raise FormatError(f"{program!r:.80} is no command of this Python's packages, no .py file that is there, and no module")


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
