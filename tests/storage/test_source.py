"""Sources: folders, GGUF files, Hub repositories, and what is refused."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from seedlm.errors import SourceError
from seedlm.storage.source import open_source
from tiny_models import save_tensors, tiny_llama


def loaded(source):
    return {name: source.rows(name, 0, info.shape[0]) for name, info in source.tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["single", "sharded"])
def test_folder_gives_the_models_own_tensors(tmp_path, dtype, shard):
    model = tiny_llama(tmp_path / "m", dtype=dtype, shard=shard)
    assert (len(list((tmp_path / "m").glob("*.safetensors"))) > 1) == (shard == "20KB")
    source = open_source(tmp_path / "m")
    expected = model.state_dict()
    assert source.tensors.keys() == expected.keys()
    for name, tensor in loaded(source).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, expected[name])
        assert b"".join(map(bytes, source.chunks(name))) == expected[name].view(torch.uint8).numpy().tobytes()


def test_a_row_range_is_that_slice(tmp_path):
    weight = torch.randn(7, 5)
    source = open_source(save_tensors(tmp_path / "m", {"w": weight}))
    assert torch.equal(source.rows("w", 2, 6), weight[2:6])
    assert torch.equal(source.rows("w", 6, 7), weight[6:])


def test_small_files_are_carried_over_and_pickles_and_weights_are_not(tmp_path):
    folder = save_tensors(tmp_path / "m", {"w": torch.zeros(1)})
    for name in ("tokenizer.json", "chat_template.jinja", "merges.txt", "LICENSE", "generation_config.json"):
        (folder / name).write_text(f"content of {name}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool.jinja").write_text("tool")
    (folder / "tokenizer.model").write_bytes(pickle.dumps({"not": "sentencepiece"}))
    for name in ("pytorch_model.bin", "optimizer.pt", "README.md", "pytorch_model.bin.index.json"):
        (folder / name).write_text("x")
    out = tmp_path / "out"
    out.mkdir()
    open_source(folder).copy_side_files(out)
    assert {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()} == {
        "tokenizer.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    }
    assert (out / "tokenizer.json").read_text() == "content of tokenizer.json"


def test_a_link_out_of_the_folder_is_refused(tmp_path):
    folder = save_tensors(tmp_path / "m", {"w": torch.zeros(1)})
    (tmp_path / "secret.json").write_text("{}")
    (folder / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(SourceError, match=r"tokenizer.json: links to .*secret.json, outside of the folder"):
        open_source(folder)


def test_a_snapshot_of_the_hubs_cache_is_read_through_its_links(tmp_path):
    folder = save_tensors(tmp_path / "m", {"w": torch.ones(2, 2)})
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, name in enumerate(("model.safetensors", "config.json")):
        shutil.copy(folder / name, blobs / str(number))
        (snapshot / name).symlink_to(Path("../../blobs") / str(number))
    assert torch.equal(open_source(snapshot).rows("w", 0, 2), torch.ones(2, 2))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.pth"])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "folder"])
def test_pickles_are_refused_with_the_way_out(tmp_path, name, as_file):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SourceError, match=r"pickle.*save_pretrained"):
        open_source(tmp_path / name if as_file else tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such file or folder"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), r"config.json: cannot be read \(No such file"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not valid JSON"),
        (
            lambda f: (f / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}'),
            r"already quantized \(gptq\)",
        ),
        (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-1]), "truncated"),
    ],
    ids=["missing", "no-weights", "no-config", "bad-config", "quantized", "truncated"],
)
def test_a_damaged_folder_is_refused(tmp_path, spoil, message):
    folder = save_tensors(tmp_path / "m", {"w": torch.zeros(3)})
    spoil(folder)
    with pytest.raises(SourceError, match=message):
        open_source(folder)


def test_a_file_cut_short_while_it_is_read_is_an_error(tmp_path):
    folder = save_tensors(tmp_path / "m", {"w": torch.zeros(3)})
    source = open_source(folder)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-5])
    with pytest.raises(SourceError, match="ends inside 'w'"):
        source.rows("w", 0, 3)


class TestHub:
    """No network: the download is replaced by a local snapshot."""

    def test_a_repository_is_downloaded_without_pickles(self, tmp_path, monkeypatch):
        folder = save_tensors(tmp_path / "snapshot", {"w": torch.ones(2)})
        calls = []

        def snapshot_download(repo_id, **options):
            calls.append((repo_id, options))
            return str(folder)

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        source = open_source("someone/model", revision="v1")
        assert list(source.tensors) == ["w"]
        (repo_id, options) = calls[0]
        assert (repo_id, options["revision"]) == ("someone/model", "v1")
        assert not any(suffix in pattern for pattern in options["allow_patterns"] for suffix in (".bin", ".pt", ".ckpt"))

    def test_a_failed_download_is_one_line(self, monkeypatch):
        def snapshot_download(repo_id, **options):
            raise OSError("404: nothing there\nlong\nhelp")

        monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
        with pytest.raises(SourceError, match=r"^someone/model: no local folder .* \(404: nothing there\)$"):
            open_source("someone/model")

    def test_a_revision_of_a_local_folder_is_refused(self, tmp_path):
        with pytest.raises(SourceError, match="a revision belongs to a Hub repository"):
            open_source(save_tensors(tmp_path / "m", {"w": torch.zeros(1)}), revision="main")
