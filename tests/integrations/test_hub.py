"""A model goes to the Hub and comes back: cards, `push_to_hub`, and sources and folders by their repository's name."""

import json
import os
import shutil
import subprocess

import pytest
import yaml

from hub import Hub
from seedlm.storage.card import read_card, repository_of
from tiny_models import SMALL, STORIES, folder_bytes

CARD = """---
license: mit
language: [en]
pipeline_tag: text-generation
base_model: somebody/else
widget: [{text: hello}]
---
# A model
"""

CIRCLE = f"""
import sys
import seedlm
from huggingface_hub import HfApi
from transformers import AutoModelForCausalLM
work = sys.argv[1]
api = HfApi(token="hf_none")
api.create_repo("maker/stories")
api.upload_folder(repo_id="maker/stories", folder_path=work + "/source")
seedlm.compress_checkpoint("maker/stories", work + "/packed", format={SMALL!r}, backend="torch")
api.create_repo("me/stories-packed")
api.upload_folder(repo_id="me/stories-packed", folder_path=work + "/packed")
model = AutoModelForCausalLM.from_pretrained("me/stories-packed")
model.push_to_hub("me/pushed", token="hf_none")
again = AutoModelForCausalLM.from_pretrained("me/pushed")
print(type(model.model.layers[0].mlp.up_proj).__name__, type(again.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture(scope="module")
def circle(tmp_path_factory, forked):
    """The stand-in after a model went to it, was compressed from it, and went back twice; the work folder; what was said."""
    work, hub = tmp_path_factory.mktemp("hub"), Hub()
    shutil.copytree(STORIES, work / "source")
    (work / "source" / "README.md").write_text(CARD)
    with hub.serving() as address:
        environment = {"HF_ENDPOINT": address, "HF_HOME": str(work / "home"), "HF_HUB_DISABLE_XET": "1", "no_proxy": "*"}
        done = subprocess.run(
            forked(work, code=CIRCLE, bare=True), capture_output=True, text=True, timeout=300, env={**os.environ, **environment}
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return hub, work, done.stdout


def front(card):
    return yaml.safe_load(card.split("---")[1])


def test_what_was_uploaded_loads_packed(circle):
    hub, work, said = circle
    assert said.split()[-2:] == ["SeedLinear", "SeedLinear"]
    assert hub.files["me/stories-packed"] == folder_bytes(work / "packed")


def test_the_card_names_its_base_and_carries_the_licence(circle):
    hub, _, _ = circle
    card = hub.files["me/stories-packed"]["README.md"].decode()
    assert front(card) == {
        "license": "mit",
        "language": ["en"],
        "pipeline_tag": "text-generation",
        "base_model": "maker/stories",
        "base_model_relation": "quantized",
        "library_name": "transformers",
        "tags": ["seedlm"],
    }
    assert card in hub.cards  # which the Hub was asked to check
    for said in (" bits a weight", "import seedlm", "relative error of the weights", "seedlm evaluate"):
        assert said in card


def test_a_pushed_model_says_that_it_is_packed(circle):
    config = json.loads(circle[0].files["me/pushed"]["config.json"])
    assert config["quantization_config"]["quant_method"] == "seedlm"


def test_a_local_folder_has_a_card_without_a_base(finished):
    card = (finished[0] / "README.md").read_text()
    assert "base_model" not in front(card)
    assert "A local model, LlamaForCausalLM, compressed by seedlm" in card


@pytest.mark.parametrize(
    ("card", "kept"),
    [
        (CARD, {"license": "mit", "language": ["en"], "pipeline_tag": "text-generation"}),
        ("# no front matter", {}),
        ("---\nlicense: [a\n---\n", {}),
        ("---\nlicense: {a: b}\nlanguage: en\n---\n", {"language": "en"}),
        ("---\nlicense: !!python/object/apply:os.system [true]\n---\n", {}),
        ('---\nlicense: "a\\e[2J"\n---\n', {}),
        ("---\nlicense: " + "x" * 300 + "\n---\n", {}),
        ("---\n- license\n---\n", {}),
        ("\x80", {}),
    ],
    ids=["whole", "none", "broken", "object", "python", "escape", "long", "list", "bytes"],
)
def test_of_a_strangers_card_only_plain_fields_are_taken(card, kept, tmp_path):
    (tmp_path / "README.md").write_bytes(card.encode("latin-1"))
    assert read_card(tmp_path) == kept


def test_a_folder_without_a_card_has_no_fields(tmp_path):
    assert read_card(tmp_path) == {}
    assert repository_of(tmp_path) is None
    assert repository_of(tmp_path / "models--a--b-c" / "snapshots" / "0123") == "a/b-c"
