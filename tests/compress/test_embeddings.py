"""Embeddings and heads in codes, from a model on disk to its tokens, and folders that contradict themselves about them."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import toy_family  # noqa: F401 (registers its family)
from seedlm import Mixture, SeedLMConfig, compress_checkpoint, inspect_checkpoint
from seedlm.calibration.statistics import measure_statistics
from seedlm.codes.registry import family
from seedlm.compress.request import tables_format
from seedlm.errors import CheckpointError, FormatError, OutputError, SourceError
from seedlm.modeling.embedding import SeedEmbedding, TiedLinear
from seedlm.modeling.linear import SeedLinear
from seedlm.storage.checkpoint import Checkpoint
from tiny_models import SMALL, STORIES, folder_bytes, join, split, tiny_gguf, tiny_llama, tiny_model

TOY = "toy-4"
TRELLIS = "trellis-r3-l12-t32-h8"
EMBEDDING = "model.embed_tokens"
IDS = torch.arange(1, 13).view(2, 6)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    for name, tied in (("tied", True), ("untied", False)):
        tiny_llama(folder / name, tie_word_embeddings=tied, num_key_value_heads=4, pad_token_id=0, vocab_size=80)
    return folder


@pytest.fixture(scope="module")
def packed(dense, tmp_path_factory):
    """The tied model with everything in the toy code."""
    out = tmp_path_factory.mktemp("packed") / "out"
    compress_checkpoint(dense / "tied", out, format=TOY, embeddings=TOY, device="cpu")
    return out


@pytest.fixture
def folder(packed, tmp_path):
    """A copy to be spoilt."""
    return shutil.copytree(packed, tmp_path / "copy")


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def tokens(model):
    options = {"attention_mask": torch.ones_like(IDS), "do_sample": False, "pad_token_id": 0}
    return model.generate(IDS, max_new_tokens=6, **options)


@pytest.mark.parametrize("spec", [TOY, TRELLIS, SMALL])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_from_a_folder_to_the_tokens_of_the_dequantized_model(dense, tmp_path, tied, spec):
    options = {"embeddings": spec} if tied else {"embeddings": spec, "head": TOY}
    compress_checkpoint(dense / ("tied" if tied else "untied"), tmp_path / "out", format=TOY, device="cpu", **options)
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert described["format_version"] == 3
    assert described["modules_to_not_convert"] == []
    found = {tensor.module: tensor for tensor in inspect_checkpoint(tmp_path / "out").tensors}
    assert found[EMBEDDING].format == spec
    assert found[EMBEDDING].shape == (80, 32)
    assert 0 < found[EMBEDDING].relative_error < 0.7
    assert ("lm_head" in found) is not tied
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.embed_tokens, SeedEmbedding)
    assert isinstance(model.lm_head, TiedLinear if tied else SeedLinear)
    opened = Checkpoint.open(tmp_path / "out")
    assert torch.equal(model.model.embed_tokens(IDS), opened.tensor(EMBEDDING).dequantize(torch.bfloat16)[IDS])
    expected = tokens(model)
    model.save_pretrained(tmp_path / "saved")
    assert Checkpoint.open(tmp_path / "saved").packed == opened.packed
    Checkpoint.open(tmp_path / "saved").verify()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"] == described
    model.dequantize()
    assert torch.equal(tokens(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert torch.equal(tokens(AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), expected)


def test_without_the_options_nothing_is_different(dense, tmp_path):
    compress_checkpoint(dense / "tied", tmp_path / "out", format=TOY, device="cpu")
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (described["format_version"], described["modules_to_not_convert"]) == (2, ["lm_head"])
    assert '"embedding"' not in Checkpoint.open(tmp_path / "out").files.metadata.popitem()[1]["seedlm"]


def test_the_metadata_say_which_tensor_is_looked_up(packed):
    (strings,) = Checkpoint.open(packed).files.metadata.values()
    tables = json.loads(strings["seedlm"])
    assert tables["format_version"] == 3
    assert {name for name, item in tables["tensors"].items() if "embedding" in item} == {EMBEDDING}
    assert tables["tensors"][EMBEDDING] == {"shape": [80, 32], "format": TOY, "embedding": True}


def test_a_part_of_the_model_loads_alone(packed):
    base = AutoModel.from_pretrained(packed)
    assert isinstance(base.embed_tokens, SeedEmbedding)
    whole = AutoModelForCausalLM.from_pretrained(packed)
    with torch.no_grad():
        assert torch.equal(base(IDS).last_hidden_state, whole.model(IDS).last_hidden_state)


def test_a_stopped_run_goes_on_to_the_same_bytes_and_not_with_other_embeddings(dense, packed, tmp_path):
    def stop(phase, done, total):
        if phase == "compress" and done > total // 2:
            raise KeyboardInterrupt

    arguments = {"format": TOY, "device": "cpu"}
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(dense / "tied", tmp_path / "out", embeddings=TOY, on_progress=stop, **arguments)
    for other in ({}, {"embeddings": "toy-3"}):
        with pytest.raises(OutputError, match="arguments embeddings was"):
            compress_checkpoint(dense / "tied", tmp_path / "out", **arguments, **other)
    compress_checkpoint(dense / "tied", tmp_path / "out", head=TOY, **arguments)  # the same: it is tied
    assert folder_bytes(tmp_path / "out") == folder_bytes(packed)


def test_it_compresses_while_loading_and_saves_what_it_did(dense, tmp_path):
    config = SeedLMConfig(format=TOY, embeddings="toy-3")
    model = AutoModelForCausalLM.from_pretrained(dense / "tied", quantization_config=config)
    assert isinstance(model.lm_head, TiedLinear)
    model.save_pretrained(tmp_path / "saved")
    described = json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]
    assert described["format_version"] == 3
    assert described["overrides"].keys() == {EMBEDDING}
    assert not {"embeddings", "head"} & described.keys()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))


def test_a_gguf_files_embeddings_are_compressed(tmp_path):
    tiny_gguf(tmp_path / "m.gguf")
    compress_checkpoint(tmp_path / "m.gguf", tmp_path / "out", format=TOY, embeddings=TOY, device="cpu")
    assert EMBEDDING in Checkpoint.open(tmp_path / "out").packed
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out").model.embed_tokens, SeedEmbedding)


REFUSED = {
    "two formats": ("tied", {"embeddings": TOY, "head": "toy-3"}, FormatError, "tied to the embeddings, one set of codes"),
    "excluded": ("untied", {"head": TOY, "exclude": "lm_*"}, SourceError, "lm_head.weight: is excluded, and --head asks for"),
    "no format": ("tied", {"embeddings": "9"}, FormatError, "unknown format '9'"),
    "another search": ("tied", {"embeddings": "4-fast", "backend": "torch"}, Exception, "torch"),
}


@pytest.mark.parametrize(("source", "options", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_and_leaves_nothing(dense, tmp_path, source, options, error, message):
    with pytest.raises(error, match=message):
        compress_checkpoint(dense / source, tmp_path / "out", **{"format": TOY, "device": "cpu", **options})
    assert list(tmp_path.iterdir()) == []


def test_a_tied_head_that_is_stored_a_second_time_is_refused(dense, tmp_path):
    source = shutil.copytree(dense / "tied", tmp_path / "twice")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match=r"--embeddings: model.embed_tokens.weight is stored 2 times"):
        compress_checkpoint(source, tmp_path / "out", format=TOY, embeddings=TOY, device="cpu")


def test_tied_embeddings_that_are_stored_under_the_heads_name_are_refused(dense, tmp_path):
    source = shutil.copytree(dense / "tied", tmp_path / "renamed")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(SourceError, match="under a name that is no embedding's"):
        compress_checkpoint(source, tmp_path / "out", format=TOY, embeddings=TOY, device="cpu")


def test_embeddings_of_another_kind_are_refused_with_their_class(tmp_path):
    model = tiny_model("gpt_neox", tie_word_embeddings=False)
    model.config.architectures = ["NoSuchClass"]
    model.save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, "model_type": "nobody", "architectures": ["Nobody"]}))
    with pytest.raises(SourceError, match="--embeddings: what they are is told by the model's class"):
        compress_checkpoint(tmp_path / "m", tmp_path / "out", format=TOY, embeddings=TOY, device="cpu")


def change(folder, config=None, metadata=None, tensors=None):
    """Spoil a folder's config.json, its metadata and what it stores."""
    if config:
        found = json.loads((folder / "config.json").read_text())
        config(found)
        (folder / "config.json").write_text(json.dumps(found))
    path = folder / "model.safetensors"
    if tensors:
        stored, strings = load_file(path), split(path)[0]["__metadata__"]
        tensors(stored)
        save_file(stored, path, metadata=strings)
    if metadata:
        header, data = split(path)
        found = json.loads(header["__metadata__"]["seedlm"])
        metadata(found)
        header["__metadata__"]["seedlm"] = json.dumps(found)
        path.write_bytes(join(header, data))


def item(change_it, module=EMBEDDING):
    return lambda found: change_it(found["tensors"][module])


HEAD = {"shape": [80, 32], "format": TOY}


def add_packed_head(stored):
    stored |= {name.replace(EMBEDDING, "lm_head"): stored[name].clone() for name in list(stored) if EMBEDDING in name}


QPROJ = "model.layers.0.self_attn.q_proj"
HOSTILE = {
    "no embedding": ({"metadata": item(lambda i: i.pop("embedding"))}, "packed as a linear layer, and is an embedding in"),
    "an embedding that is none": (
        {"metadata": item(lambda i: i.update(embedding=True), QPROJ)},
        "has no embedding of that name",
    ),
    "not true": ({"metadata": item(lambda i: i.update(embedding=False))}, "embedding must be true"),
    "a text": ({"metadata": item(lambda i: i.update(embedding="yes"))}, "embedding must be true"),
    "another key": ({"metadata": item(lambda i: i.update(lookup=True))}, "must have shape and format"),
    "metadata of version 2": ({"metadata": lambda m: m.update(format_version=2)}, "from format_version 3 on"),
    "config of version 2": (
        {"config": lambda c: c["quantization_config"].update(format_version=2)},
        "format_version must be 3, got 2",
    ),
    "another format": (
        {"config": lambda c: c["quantization_config"].update(overrides={EMBEDDING: {"family": "toy", "bits": 3}})},
        "model.embed_tokens is stored as .*bits=4.*, config.json says",
    ),
    "another vocabulary": ({"config": lambda c: c.update(vocab_size=96)}, r"model.embed_tokens must be \[96, 32\]"),
    "another width": ({"metadata": item(lambda i: i.update(shape=[80, 40]))}, "must be"),
    "a dense head beside": (
        {"tensors": lambda t: t.update({"lm_head.weight": torch.zeros(80, 32)})},
        "lm_head.weight is stored, and LlamaForCausalLM ties it to model.embed_tokens",
    ),
    "a packed head beside": (
        {"tensors": add_packed_head, "metadata": lambda m: m["tensors"].update(lm_head=HEAD)},
        "lm_head.weight is stored, and LlamaForCausalLM ties it to model.embed_tokens",
    ),
    "a part missing": ({"tensors": lambda t: t.pop(f"{EMBEDDING}.weight_scales")}, "weight_scales is missing"),
}


@pytest.mark.parametrize(("changes", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_folder_that_contradicts_itself_is_refused(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(folder)


def test_an_embedding_that_was_relabelled_does_not_match_its_digest(folder):
    change(folder, metadata=item(lambda i: i.pop("embedding")))
    with pytest.raises(CheckpointError, match="is not what was written"):
        Checkpoint.open(folder).verify([f"{EMBEDDING}.weight"])


def test_errors_of_tied_embeddings_are_fed_back_by_what_the_head_reads(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(STORIES)
    weight = model.lm_head.weight.detach()
    statistics = measure_statistics(model, torch.randint(512, (8, 64), generator=torch.Generator().manual_seed(0)))
    statistics.save(tmp_path / "statistics.safetensors")
    products = statistics.input_of("lm_head").product().double()

    def costs(feedback):
        out = tmp_path / f"{len(str(feedback))}"
        options = {"format": "3-fast", "embeddings": "3-fast", "exclude": "*mlp*", "device": "cpu"}
        compress_checkpoint(STORIES, out, feedback=feedback, **options)
        error = Checkpoint.open(out).tensor(EMBEDDING).dequantize().double() - weight
        return float(((error @ products) * error).sum()), float(error.square().sum())

    (blind, least), (weighed, more) = costs("none"), costs(tmp_path / "statistics.safetensors")
    assert weighed < 0.8 * blind
    assert least < more < 4 * least  # no row bears the errors of all others


SIX = "trellis-r6-l12-t256-h128"
BY_WEIGHTS = {"feedback": "none", "device": "cpu"}
TWO_BITS = "trellis-r2-l12-t32-h8"
DEFAULTS = {
    "tied": ("tied", {}, {EMBEDDING: SIX}),
    "untied": ("untied", {}, {EMBEDDING: SIX, "lm_head": SIX}),
    "both dense": ("untied", {"embeddings": "dense", "head": "dense"}, {}),
    "one dense": ("untied", {"embeddings": "dense"}, {"lm_head": SIX}),
    "the other in a format": ("untied", {"embeddings": TRELLIS}, {EMBEDDING: TRELLIS, "lm_head": SIX}),
    "tied and one dense": ("tied", {"head": "dense"}, {}),
    "tied and one in a format": ("tied", {"head": TRELLIS}, {EMBEDDING: TRELLIS}),
    "excluded": ("untied", {"exclude": ["lm_head"]}, {EMBEDDING: SIX}),
    "included": ("untied", {"include": ["lm_head"]}, {EMBEDDING: SIX, "lm_head": TWO_BITS}),
    "6 bits": ("tied", {"format": "6-fast"}, {EMBEDDING: SIX}),
    "8 bits": ("tied", {"format": "8"}, {}),
    "the block code": ("tied", {"format": SMALL, "backend": "torch"}, {}),
    "the toy code": ("tied", {"format": TOY}, {}),
}


@pytest.mark.parametrize(("source", "options", "expected"), DEFAULTS.values(), ids=DEFAULTS)
def test_tables_have_6_bits_beside_layers_of_the_trellis_code_in_up_to_6(dense, tmp_path, source, options, expected):
    notes = []
    options = {"format": TWO_BITS, **BY_WEIGHTS, **options}
    compress_checkpoint(dense / source, tmp_path / "out", on_note=notes.append, **options)
    report = inspect_checkpoint(tmp_path / "out")
    assert {tensor.module: tensor.format for tensor in report.outside} == expected
    assert notes == []
    card = (tmp_path / "out" / "README.md").read_text()
    assert all(f"of `{module}`" in card for module in expected)
    assert (": embeddings, head, norms" in card) is (not expected)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert isinstance(model.model.embed_tokens, SeedEmbedding) is (EMBEDDING in expected)


@pytest.mark.parametrize(("bits", "default"), [(3.5, SIX), (6, SIX), (6.1, None)])
def test_a_mixture_has_its_average(bits, default):
    mixture = Mixture(bits=bits, formats=family("trellis").mixture)
    found = tables_format(mixture)
    assert (found and found.spec) == default


@pytest.mark.parametrize("vocabulary", [80, 200], ids=["small tables", "large tables"])
def test_a_size_counts_coded_tables_and_leaves_them_dense_where_there_is_room(vocabulary, tmp_path):
    tiny_llama(tmp_path / "m", hidden_size=64, intermediate_size=96, vocab_size=vocabulary)
    names = [name.removesuffix(".weight") for name in load_file(tmp_path / "m" / "model.safetensors") if "_proj" in name]
    sensitivity = {name: 1.0 + place for place, name in enumerate(names)}

    def compress(size, out, **options):
        mixture = Mixture(size=size, sensitivity=sensitivity, formats=family("trellis").mixture)
        compress_checkpoint(tmp_path / "m", tmp_path / out, format=mixture, **BY_WEIGHTS, **options)
        report = inspect_checkpoint(tmp_path / out)
        assert report.bytes <= size
        return report

    def at(bits, out, **options):
        compress_checkpoint(tmp_path / "m", tmp_path / out, format=bits, **BY_WEIGHTS, **options)
        return inspect_checkpoint(tmp_path / out).bytes

    layers = {"embeddings": "dense", "head": "dense"}
    room, most = at("6", "six", **layers), at("8", "eight and tables", embeddings="6-fast", head="6-fast")
    assert (room < most) is (vocabulary == 80)
    report = compress(min(room, most) - 1000, "less")
    assert {tensor.format for tensor in report.outside} == {SIX}
    if most < room:  # dense tables would leave less than 6 bits for the layers
        more = compress(most + 1000, "not used up")
        assert ({tensor.format for tensor in more.outside}, more.bytes) == ({SIX}, most)
    assert compress(room + 1000, "more").outside == []
    with pytest.raises(FormatError, match=f"can have {at('2', 'two'):,} to [\\d,]+ bytes, got 1,000"):
        compress(1000, "none")
    with pytest.raises(FormatError, match=rf"can have [\d,]+ to {at('8', 'eight'):,} bytes, got 900,000,000"):
        compress(900_000_000, "none")


def test_tables_that_no_code_can_stand_for_stay_dense_with_the_reason_and_are_refused_if_asked_for(dense, tmp_path):
    def check(source, reason, **options):
        notes = []
        options |= {"format": TWO_BITS, **BY_WEIGHTS}
        out = tmp_path / f"{source.name} out"
        compress_checkpoint(source, out, on_note=notes.append, **options)
        assert [note for note in notes if note.startswith("left dense: ")] == [f"left dense: {reason}"]
        assert inspect_checkpoint(out).outside == []
        with pytest.raises(SourceError, match="--embeddings: "):
            compress_checkpoint(source, tmp_path / "refused", embeddings="6", **options)

    twice = shutil.copytree(dense / "tied", tmp_path / "twice")
    tensors = load_file(twice / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, twice / "model.safetensors", metadata={"format": "pt"})
    stored = "model.embed_tokens.weight is stored 2 times (model.embed_tokens.weight, lm_head.weight)"
    check(twice, f"the embeddings and the head ({stored}, and codes stand for one tensor alone)")
    nobody = shutil.copytree(dense / "untied", tmp_path / "nobody")
    change(nobody, config=lambda found: found.update(model_type="nobody", architectures=["Nobody"]))
    told = f"transformers {transformers.__version__} has no model_type 'nobody'"
    check(nobody, f"the embeddings and the head (what they are is told by the model's class, and {told})")


def test_tables_that_would_be_no_smaller_stay_dense_and_a_head_that_is_not_there_is_no_matter(tmp_path):
    model = tiny_llama(tmp_path / "m", vocab_size=8)
    notes = []
    compress_checkpoint(tmp_path / "m", tmp_path / "out", format=TWO_BITS, on_note=notes.append, **BY_WEIGHTS)
    assert notes == ["left dense: the embeddings and the head (no smaller as codes)"]
    model.model.save_pretrained(tmp_path / "base")
    compress_checkpoint(tmp_path / "base", tmp_path / "base out", format=TWO_BITS, on_note=notes.append, **BY_WEIGHTS)
    assert notes[1:] == ["left dense: the embeddings (no smaller as codes)"]


def test_a_stopped_run_does_not_go_on_with_what_is_said_of_tables_changed(dense, tmp_path):
    def stop(phase, done, total):
        if phase == "compress" and done > total // 2:
            raise KeyboardInterrupt

    arguments = {"format": TWO_BITS, **BY_WEIGHTS}
    with pytest.raises(KeyboardInterrupt):
        compress_checkpoint(dense / "tied", tmp_path / "out", embeddings="dense", on_progress=stop, **arguments)
    with pytest.raises(OutputError, match=f'arguments embeddings was absent, is now "{SIX}"'):
        compress_checkpoint(dense / "tied", tmp_path / "out", **arguments)
    compress_checkpoint(dense / "tied", tmp_path / "out", head="dense", **arguments)
    compress_checkpoint(dense / "tied", tmp_path / "default", **arguments)
    compress_checkpoint(dense / "tied", tmp_path / "said", embeddings="6-fast", **arguments)
    assert folder_bytes(tmp_path / "default") == folder_bytes(tmp_path / "said")


def test_a_head_that_is_included_and_to_stay_dense_is_refused(tmp_path):
    tiny_llama(tmp_path / "m", tie_word_embeddings=False)
    with pytest.raises(SourceError, match=r"lm_head.weight: is included, and --head dense leaves it as it is"):
        compress_checkpoint(tmp_path / "m", tmp_path / "out", format="3-fast", include="lm_head", head="dense", **BY_WEIGHTS)
    assert not (tmp_path / "out").exists()
