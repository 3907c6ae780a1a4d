"""The command line in processes of its own, without the five seconds that each would spend on imports.

One process imports what the commands import and then only forks: what it forks is a process like any other, with its own
streams, signals, terminal and end. A test starts `python forked.py run SOCKET CODE ARGUMENT...`, which hands its streams over,
passes SIGINT and SIGTERM on and ends as that process ends. What happens while `seedlm` imports needs a process of its own.

There are two that fork, each at a socket. At SOCKET.bare is one that has imported torch and what comes with it, but nothing of
transformers, of the Hub's client or of ours: for what depends on the order in which those come, or on what their environment
says when they do. From it the other one is forked when it is first asked for, and imports the rest.
"""

import json
import os
import signal
import socket
import sys

BARE = ("numba", "sympy", "torch", "torch._dynamo", "torch.distributed.tensor", "torch.export")
IMPORTED = (
    "seedlm.cli",
    "seedlm.compress.run",
    "seedlm.compress.statistics",
    "seedlm.evaluation.run",
    "seedlm.integrations.transformers.generate",
    "seedlm.integrations.transformers.quantizer",
    "seedlm.codes.trellis.kernels.cpu",
    "seedlm.codes.trellis.viterbi.numba",
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
)
PASSED_ON = (signal.SIGINT, signal.SIGTERM)


def serve(path):
    """Fork for everyone who connects, until stdin ends. In what was forked: the code to run, with its streams and arguments."""
    import gc
    import importlib
    import select

    for name in BARE:
        importlib.import_module(name)
    assert not {"transformers", "huggingface_hub", "seedlm"} & {*sys.modules}
    gc.freeze()
    interrupted = signal.signal(signal.SIGINT, signal.SIG_IGN)
    waiting: list[int] = []
    with socket.socket(socket.AF_UNIX) as bare, socket.socket(socket.AF_UNIX) as whole:
        for listening, name in ((bare, f"{path}.bare"), (whole, path)):
            listening.bind(name)
            listening.listen()
        print("ready", flush=True)
        watched = [bare, whole, sys.stdin]
        while True:
            ready = select.select(watched, [], [])[0]
            waiting = [pid for pid in waiting if not os.waitpid(pid, os.WNOHANG)[0]]
            if sys.stdin in ready:
                os._exit(0)
            if bare in watched and whole in watched and whole in ready:
                if pid := os.fork():
                    waiting.append(pid)
                    watched.remove(whole)
                else:
                    waiting.clear()
                    watched.remove(bare)
                    for name in IMPORTED:
                        importlib.import_module(name)
                    gc.freeze()
                continue
            asking, _ = ready[0].accept()
            if pid := os.fork():
                waiting.append(pid)
                asking.close()
            else:
                break
    message, streams, _, _ = socket.recv_fds(asking, 1 << 16, 3)
    while not message.endswith(b"\n"):
        message += asking.recv(1 << 16)
    if child := os.fork():
        _watch(child, asking, streams)
    asking.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    folder, environment, sys.argv = json.loads(message)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, interrupted)
    return sys.argv[0]


def _watch(child, asking, streams):
    """Tell who asked its number and how it ended; end it if nobody is there any more."""
    import threading

    for stream in (0, 1, 2, *streams):
        os.close(stream)
    asking.sendall(b"%d\n" % child)
    threading.Thread(target=lambda: asking.recv(1) or os.kill(child, signal.SIGKILL), daemon=True).start()
    asking.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def run(path, *arguments):
    """Be that process for whoever started this one."""
    early = []
    for number in PASSED_ON:
        signal.signal(number, lambda number, frame: early.append(number))
    with socket.socket(socket.AF_UNIX) as asking:
        asking.connect(path)
        message = json.dumps([os.getcwd(), dict(os.environ), arguments]).encode() + b"\n"
        socket.send_fds(asking, [message], [0, 1, 2])
        for stream in (0, 1, 2):
            os.close(stream)
        with asking.makefile() as told:
            child = int(told.readline())
            for number in PASSED_ON:
                signal.signal(number, lambda number, frame: os.kill(child, number))
            for number in early:
                os.kill(child, number)
            code = int(told.readline())
    if code < 0:
        if -code in PASSED_ON:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(*sys.argv[2:])
    exec(serve(sys.argv[2]), {"__name__": "__main__"})
