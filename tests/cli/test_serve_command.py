"""`seedlm serve`, asked by the `openai` package, and `seedlm run`: programs in which packed folders load."""

import asyncio
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from types import SimpleNamespace

import pytest

from tiny_models import STORIES

COMMAND = [sys.executable, "-m", "seedlm"]


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def server(talking):
    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name, reason="serving needs the extra: pip install '.[serve]'")
    port = free_port()
    process = subprocess.Popen(
        [*COMMAND, "serve", str(talking), "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    address = f"http://localhost:{port}"
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5).close()
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(process.communicate()[1])
            time.sleep(0.2)
    yield f"{address}/v1", port
    process.terminate()
    assert process.wait(timeout=60) in (0, 143, -15)
    assert process.stderr is not None
    loading, serving = process.stderr.read().splitlines()[:2]
    assert re.fullmatch(rf"seedlm: {re.escape(str(talking))}: \S+ MB, .* weights in \d+ tensors; loading", loading)
    assert serving == f"seedlm: {talking} at {address}/v1; Ctrl-C ends"


@pytest.fixture(scope="module")
def client(server):
    import openai

    return openai.OpenAI(base_url=server[0], api_key="none")


TURNS = [{"role": "user", "content": "Once upon a time"}]


def test_an_openai_client_chats_and_streams(client, talking, here):
    ask = {"model": str(talking), "messages": TURNS, "max_tokens": 8, "temperature": 0}
    answer = client.chat.completions.create(**ask)
    assert answer.choices[0].message.content
    pieces = client.chat.completions.create(**ask, stream=True)
    streamed = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert streamed == answer.choices[0].message.content
    shown = here("generate", talking, "Once upon a time", "--max-new-tokens", 8).stdout
    assert streamed.strip() == shown.strip()


def test_an_openai_client_completes(client, talking):
    ask = {"model": str(talking), "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**ask).choices[0].text
    assert whole
    assert "".join(piece.choices[0].text or "" for piece in client.completions.create(**ask, stream=True)) == whole


def test_a_text_ends_where_the_positions_do_and_a_prompt_beyond_is_the_clients_error(client, talking):
    import openai

    dog, ask = "Once upon a time there was a dog. ", {"model": str(talking), "temperature": 0}
    answer = client.completions.create(**ask, prompt=dog * 50, max_tokens=100)
    assert (answer.usage.total_tokens, answer.choices[0].finish_reason) == (512, "length")
    *_, last = client.completions.create(**ask, prompt=dog * 50, max_tokens=100, stream=True)
    assert (last.usage.total_tokens, last.choices[0].finish_reason) == (512, "length")
    too_long, turns = r"the prompt has 52\d tokens, the model knows 512 positions", [{"role": "user", "content": dog * 52}]
    for create, what in (
        (client.completions.create, {"prompt": dog * 52}),
        (client.chat.completions.create, {"messages": turns}),
    ):
        with pytest.raises(openai.BadRequestError, match=too_long) as refused:
            create(**ask, **what)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.APIError) as refused:
            list(create(**ask, **what, stream=True))
        assert re.fullmatch(too_long, refused.value.body)


def test_a_port_that_is_taken_is_refused_before_the_model_loads(server, talking, here):
    done = here("serve", talking, "--port", server[1])
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "cannot listen there" in done.stderr


def test_what_is_loaded_is_said_before_it_loads(talking, monkeypatch, here):
    def serving(model, **options):
        print("imported, and now it loads", file=sys.stderr)

    monkeypatch.setattr(sys.modules["seedlm.cli.serve"], "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=bool)))
    monkeypatch.setitem(sys.modules, "seedlm.integrations.transformers.serving", SimpleNamespace(Server=serving))
    lines = here("serve", talking, "--port", free_port()).stderr.splitlines()
    assert re.fullmatch(rf"seedlm: {re.escape(str(talking))}: \S+ MB, [\d,]+ weights in \d+ tensors; loading", lines[0])
    assert lines[1].endswith("/v1; Ctrl-C ends")
    assert lines[2] == "imported, and now it loads"


def test_a_server_multiplies_by_a_backend_by_name(talking, monkeypatch, here):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="serving needs the extra: pip install '.[serve]'")
    from seedlm.integrations.transformers import serving
    from seedlm.modeling.quantize import seed_linears

    served = []

    class Server(serving.Server):
        def start_server(self):
            super().start_server()
            served.append({layer.backend for held in self._model_manager.loaded_models.values() for layer in layers(held)})

    def layers(held):
        return [layer for _, layer in seed_linears(held.model)]

    monkeypatch.setattr("uvicorn.Server.run", lambda self: None)
    monkeypatch.setattr(serving, "Server", Server)
    asked = ["serve", talking, "--port", free_port(), "--device", "cpu"]
    assert here(*asked).returncode == 0
    assert here(*asked, "--backend", "torch").returncode == 0
    assert served == [{"auto"}, {"torch"}]
    done = here(*asked, "--backend", "tosch")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("seedlm: no packed layer has a backend 'tosch', known: auto, cuda, ")
    done = here(*asked, "--backend", "cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("seedlm: model.layers.0.")
    assert len(served) == 2


def test_a_model_that_is_not_there_is_refused(tmp_path, here):
    done = here("serve", tmp_path / "nosuch")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no such file or folder" in done.stderr


PROGRAM = """
import sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1]).model.layers[0].mlp.up_proj).__name__, sys.argv[2:])
"""


def test_a_program_that_is_run_loads_packed_folders(talking, tmp_path, forked):
    (tmp_path / "program.py").write_text(PROGRAM)
    alone = subprocess.run(forked(talking, code=PROGRAM, bare=True), capture_output=True, text=True, timeout=120)
    assert "seedlm run PROGRAM" in alone.stderr
    arguments = [*COMMAND, "run", str(tmp_path / "program.py"), str(talking), "--help", "-x"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
    assert done.stdout == "SeedLinear ['--help', '-x']\n"


def test_commands_of_packages_and_modules_are_run(here, call):
    done = here("run", "json.tool", "--help")
    assert (done.returncode, "usage" in done.stdout) == (0, True)
    done = call("run", "transformers", "version")
    assert done.stdout.strip().startswith("5.")


@pytest.mark.parametrize("name", ["nosuch", "nosuch.py", "no such"])
def test_what_cannot_be_run_is_refused(name, here):
    done = here("run", name)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is no command of this Python's packages" in done.stderr


TASK = """
task: tiny
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["dog", "cat"]
doc_to_target: 0
metric_list: [{{metric: acc}}]
"""


def test_lm_evaluation_harness_opens_a_packed_folder(talking, tmp_path):
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install '.[eval]'")
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"question": f"Once {n} times there was a"}) + "\n" for n in range(3)))
    (tmp_path / "tiny.yaml").write_text(TASK.format(data=data))
    arguments = ["run", "lm_eval", "--model", "hf", "--model_args", f"pretrained={talking}", "--tasks", "tiny"]
    arguments += ["--include_path", str(tmp_path), "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, env=environment)
    assert "|tiny |" in done.stdout, done.stderr[-2000:]


def test_chats_with_a_model_without_a_template_are_the_clients_error(monkeypatch):
    for name in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(name, reason="serving needs the extra: pip install '.[serve]'")
    monkeypatch.setattr("uvicorn.Server.run", lambda self: None)
    from seedlm.integrations.transformers.serving import Server

    server = Server(str(STORIES), device="cpu")

    def ask(path, **body):
        sent = []

        async def receive():
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}

        async def send(message):
            sent.append(message)

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b"", "http_version": "1.1"}
        asyncio.run(server.server.config.app(scope, receive, send))
        return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent))

    status, answer = ask("/v1/chat/completions", model=str(STORIES), messages=TURNS)
    assert (status, answer["error"]["type"], answer["error"]["code"]) == (400, "invalid_request_error", "no_chat_template")
    assert "ask for /v1/completions with a prompt" in answer["error"]["message"]
    status, answer = ask("/v1/completions", model=str(STORIES), prompt="Once upon a time", max_tokens=4)
    assert (status, bool(answer["choices"][0]["text"])) == (200, True)
