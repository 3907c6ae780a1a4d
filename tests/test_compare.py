"""Comparison of runs: synthetic results with known answers, as a table, as JSON, and as a page in a real browser."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import subprocess
import sys
import time

import pytest

from seedlm.cli.compare import compare
from seedlm.compare import compare_runs, load_runs, to_html, to_markdown
from seedlm.errors import EvaluationError, OutputError
from seedlm.records import pack_records

EVIL = "</script><script>document.title='broken'</script><img src=x onerror=alert(1)>"
PIECES = {"0": " the", "1": " cat", "2": " sat", "3": "\n", "4": EVIL}
IDS = [[0, 1, 2, 0, 3, 1], [4, 0, 1, 2, 4, 0]]
FORMAT = "block-k16-c8-p3-q4-e4"


def estimate(mean, error=0.01):
    return {"mean": mean, "standard_error": error}


def model(name, fingerprint, **changes):
    info = {"name": name, "format": "float32", "bits_per_weight": 32.0, "model_bits_per_weight": 32.0, "weights": 1_000_000}
    return {**info, "bytes": 4_000_000, "fingerprint": fingerprint, **changes}


def synthetic(number):
    """Results and records of a compressed model; the higher its number, the worse."""
    bits = 4 - 0.05 * number
    nbytes = int(bits * 1e6 / 8)
    results = {
        "evaluation_version": 1,
        "model": model(
            f"packed {number}", f"p{number}", format=FORMAT, bits_per_weight=bits, bytes=nbytes, model_bits_per_weight=bits
        ),
        "reference": model("original", "o"),
        "settings": {"context": 6},
        "text": {"path": "/texts/wiki_test.raw", "sha256": "abc", "tokens": 12, "windows": 2},
        "protocol": "windows & tokens",
        "environment": {"device_name": "cpu", "torch": "2", "transformers": "5", "commit": "c"},
        "metrics": {
            "nll": estimate(3 + 0.1 * number),
            "perplexity": estimate(20.5 + number, 0.25),
            "kl": estimate(0.1 + 0.1 * number, 0.004),
            "top1_agreement": estimate(0.9 - 0.01 * number),
            "reference_nll": estimate(2.9),
            "reference_perplexity": estimate(18.0, 0.2),
            "perplexity_ratio": estimate(1.1),
        },
        "tasks": {"arc_easy": {"version": 1.0, "questions": 3, "acc": estimate(0.5, 0.1), "acc_norm": estimate(1 / 3, 0.2)}},
        "run": {"dtype": "float32", "reference_dtype": "float32", "tokens_per_second": 5.0, "peak_memory_bytes": 7},
    }
    kl = [[0.01 * (number + 1)] * 5 for _ in IDS]
    kl[1][number % 5] = 5.0 + number
    errors = [
        {"module": f"model.layers.{n}.mlp.up_proj", "shape": [4, 4], "weight_error": 0.1, "output_error": 0.2} for n in (0, 1)
    ]
    records = {
        "tokens": {
            "token_ids": IDS,
            "nll": [[1.0 + number] * 5] * 2,
            "top1": [[2, 2, 0, 4, 1], [0, 1, 2, 4, 0]],
            "kl": kl,
            "reference_nll": [[0.5] * 5] * 2,
            "reference_top1": [[1, 2, 0, 3, 1], [2, 1, 2, 4, 0]],
            "pieces": PIECES,
        },
        "distributions": {
            "kl": {"edges": [0.1, 1, 10], "counts": [9, 1]},
            "nll_change": {"edges": [-1, 0, 1], "counts": [4, 6]},
        },
        "prompts": [{"prompt": f"Say {EVIL}", "text": f" {EVIL} {number}", "reference_text": " something else"}],
        "layers": {"linears": errors, "hidden": [0.1, round(0.2 + 0.01 * number, 2)]},
        "tasks": {
            "arc_easy": [
                {
                    "id": n,
                    "right": 0,
                    "chosen": chosen,
                    "log_likelihoods": scores,
                    "question": f"{EVIL}{n}?",
                    "choices": ["yes", EVIL],
                }
                for n, (chosen, scores) in enumerate([(1, [-2.0, -1.0]), (0, [-1.0, -3.0]), (1, [-9.0, -1.0])])
            ]
        },
    }
    return results, records


def original_run():
    """The same for the model that all were made from: it answers the first two questions right."""
    results, records = synthetic(0)
    results["model"], results["reference"] = results["reference"], None
    results["metrics"] = {"nll": estimate(2.9), "perplexity": estimate(18.0, 0.2)}
    records["layers"], records["distributions"] = None, {}
    for field in ("kl", "reference_nll", "reference_top1"):
        del records["tokens"][field]
    records["prompts"][0].update(text=" something else", reference_text=None)
    for row, scores in zip(records["tasks"]["arc_easy"], [(-1.0, -2.0), (-1.0, -3.0), (-3.0, -1.0)], strict=True):
        row.update(log_likelihoods=list(scores), chosen=int(scores[1] > scores[0]))
    return results, records


def write(folder, name, results, records=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    if records is not None:
        data = pack_records(records)
        file = f"{name}.records.json.gz"
        (folder / file).write_bytes(data)
        results = {**results, "records": {"file": file, "sha256": hashlib.sha256(data).hexdigest()}}
    path.write_text(json.dumps(results))
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [
        write(folder, "4bit", *synthetic(0)),
        write(folder, "3bit", *synthetic(5)),
        write(folder, "original", *original_run()),
    ]


@pytest.fixture(scope="module")
def forty(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forty")
    return [write(folder, f"run{number:02}", *synthetic(number)) for number in range(40)]


class TestTable:
    def test_two_runs_and_their_original(self, two):
        lines = to_markdown(compare_runs(load_runs(two))).splitlines()
        assert lines[0].split(" | ")[-2:] == ["same top token, %", "arc\\_easy (acc\\_norm), % |"]
        assert lines[2:5] == [
            "| original | dense |  | 32.000 | 32.000 | 4.00 | 18.00 ± 0.20 |  |  | 33.3 ± 20.0 |",
            "| 4bit | SeedLM | yes | 4.000 | 4.000 | 0.50 | 20.50 ± 0.25 | 0.100 ± 0.004 | 90.0 ± 1.0 | 33.3 ± 20.0 |",
            "| 3bit | SeedLM | yes | 3.750 | 3.750 | 0.47 | 25.50 ± 0.25 | 0.600 ± 0.004 | 85.0 ± 1.0 | 33.3 ± 20.0 |",
        ]
        assert "wiki\\_test.raw: 2 windows of 6 tokens." in lines[6]

    def test_an_original_that_nobody_ran_is_told_of_by_the_others(self, two):
        comparison = compare_runs(load_runs(two[:2]))
        first = comparison["models"][0]
        assert (first["label"], first["original"], first["metrics"]["perplexity"]["mean"]) == ("original", True, 18.0)
        assert [row["parent"] for row in comparison["models"]] == [None, 0, 0]
        assert comparison["tokens"][0]["models"][0] is None

    def test_forty_runs(self, forty):
        comparison = compare_runs(load_runs(forty))
        assert [row["label"] for row in comparison["models"]] == ["original", *(f"run{number:02}" for number in range(40))]
        assert len(to_markdown(comparison).splitlines()) == 2 + 41 + 2
        assert all(len(item["models"]) == 41 for item in comparison["tokens"])

    def test_other_libraries(self, tmp_path, two):
        results, records = synthetic(1)
        results["model"] = results["reference"]
        results["run"]["baseline"] = {
            "name": "awq-4",
            "libraries": {"quants": "1.2"},
            "options": "groups of 128",
            "calibrated": True,
            "bits_per_weight": 4.25,
            "weights": 800_000,
            "relative_error": None,
        }
        path = write(tmp_path, "awq", results, records)
        strange = synthetic(2)[0]
        strange["model"]["format"] = "aqlm"
        comparison = compare_runs(load_runs([*two, path, write(tmp_path, "strange", strange)]))
        rows = {row["label"]: row for row in comparison["models"]}
        awq = rows["awq"]
        assert (awq["method"], awq["data_free"], awq["options"], awq["parent"]) == (
            "awq-4",
            False,
            "groups of 128; quants 1.2",
            0,
        )
        assert awq["bytes"] == 4_000_000 - 800_000 * (32 - 4.25) / 8
        assert rows["original"]["original"]
        place = list(rows).index("awq")
        assert comparison["layers"][place] == {"hidden": [0.1, 0.21], "weight_error": None, "output_error": None}
        assert (rows["strange"]["method"], rows["strange"]["data_free"]) == ("aqlm", None)

    def test_fronts_hold_what_nothing_beats(self, tmp_path):
        """Bits, bytes, KL and tasks of four models."""
        paths = []
        for number, (bits, nbytes, kl, accuracy) in enumerate(
            [(4, 50, 0.1, 0.6), (3, 60, 0.2, 0.7), (3, 40, 0.3, 0.6), (2, 70, 0.4, 0.6)]
        ):
            results, _ = synthetic(number)
            results["model"].update(bits_per_weight=bits, bytes=nbytes)
            results["metrics"]["kl"]["mean"] = kl
            results["tasks"]["arc_easy"]["acc_norm"]["mean"] = accuracy
            paths.append(write(tmp_path, str(number), results))
        comparison = compare_runs(load_runs(paths))
        labels = [row["label"] for row in comparison["models"]]
        fronts = {
            metric: {cost: "".join(labels[place] for place in places) for cost, places in front.items()}
            for metric, front in comparison["fronts"].items()
        }
        assert fronts["kl"] == {"bits_per_weight": "310", "bytes": "20"}
        assert fronts["tasks"] == {"bits_per_weight": "31", "bytes": "21"}

    def test_names_are_no_markup(self, tmp_path, two):
        results, _ = synthetic(1)
        path = write(tmp_path, "a|b<img>`c`", results)
        assert "| a\\|b&#60;img&#62;\\`c\\` |" in to_markdown(compare_runs(load_runs([two[0], path])))

    def test_labels_are_as_long_as_they_must_be(self, tmp_path):
        paths = [write(tmp_path / folder, "run", *synthetic(n)) for n, folder in enumerate("ab")]
        assert [run.label for run in load_runs(paths)] == ["a/run", "b/run"]

    def test_a_run_that_was_renamed_keeps_its_records(self, tmp_path):
        path = write(tmp_path, "old", *synthetic(1))
        for file in tmp_path.iterdir():
            file.rename(tmp_path / file.name.replace("old", "new"))
        other = write(tmp_path, "other", *synthetic(2))
        runs = load_runs([path.with_name("new.json"), other])
        assert [run.records["layers"]["hidden"] for run in runs] == [[0.1, 0.21], [0.1, 0.22]]

    def test_notes(self, tmp_path, two):
        results, _ = synthetic(1)
        results["run"]["dtype"] = "bfloat16"
        results["environment"]["commit"] = f"{'7' * 40}-dirty"
        alone = synthetic(2)[0] | {"reference": None}
        del alone["metrics"]["kl"]
        runs = load_runs([two[0], write(tmp_path, "other", results), write(tmp_path, "alone", alone)])
        comparison = compare_runs(runs)
        assert comparison["notes"] == [
            "The runs have different dtypes: bfloat16, float32.",
            "The runs have different commits of seedlm: 777777777-dirty, c.",
            "Measured without a reference, so without KL divergence and layers: alone.",
            "No records beside the results, so no tokens, prompts, questions or layers: other, alone.",
        ]
        assert "- The runs have different dtypes: bfloat16, float32." in to_markdown(comparison)
        assert {row["label"]: row["parent"] for row in comparison["models"]}["alone"] is None


class TestBehaviour:
    def test_predictions_that_changed_most_come_first(self, two):
        """Run 5's largest is 10.0 at the first place of the second window, run 0's 5.0 at the same place."""
        comparison = compare_runs(load_runs(two))
        first = comparison["tokens"][0]
        assert (first["window"], first["place"]) == (1, 1)
        assert (first["before"], first["token"], first["after"]) == (EVIL, " the", f" cat sat{EVIL} the")
        assert first["original"] == {"top": " sat", "probability": 0.607}
        assert first["models"] == [
            {"top": " the", "probability": 0.368, "kl": None},
            {"top": " the", "probability": 0.368, "kl": 5.0},
            {"top": " the", "probability": 0.00248, "kl": 10.0},
        ]
        assert len(comparison["tokens"]) == 10

    def test_questions_lost_and_gained(self, two):
        questions = compare_runs(load_runs(two))["questions"]
        assert questions["counts"]["arc_easy"][1] == {"lost": 1, "gained": 0, "changed": 1, "questions": 3}
        assert questions["counts"]["arc_easy"][0]["lost"] == 0
        item = questions["items"][0]  # from e / (1 + e) to 1 / (1 + e)
        assert (item["id"], item["right"], item["change"]) == (0, 0, 0.4622)
        assert [answer["chosen"] for answer in item["models"]] == [0, 1, 1]
        assert [answer["id"] for answer in questions["items"]] == [0, 2]  # the second did not change

    def test_prompts(self, two):
        (item,) = compare_runs(load_runs(two))["prompts"]
        assert item["original"] == " something else"
        assert item["models"] == [" something else", f" {EVIL} 0", f" {EVIL} 5"]


def change(*path):
    """A change of one value in the results."""

    def apply(results):
        for key in path[:-2]:
            results = results[key]
        results[path[-2]] = path[-1]

    return apply


class TestRefusals:
    @pytest.mark.parametrize(
        ("apply", "message"),
        [
            (change("text", "sha256", "xyz"), "4bit.json and .*other.json cannot be compared: text abc and xyz"),
            (change("settings", "context", 7), "cannot be compared: context 6 and 7"),
            (change("text", "windows", 3), "cannot be compared: windows 2 and 3"),
            (change("text", "tokens", 13), "cannot be compared: tokens in the text 12 and 13"),
            (change("reference", "fingerprint", "q"), r"their references differ \(original, original\)"),
            (change("tasks", "arc_easy", "questions", 9), "arc_easy version 1.0 with 3 questions, and version 1.0 with 9"),
            (change("evaluation_version", 2), "other.json: has version 2, this package reads 1"),
        ],
        ids=["text", "context", "windows", "tokenizer", "reference", "tasks", "version"],
    )
    def test_what_cannot_be_compared(self, tmp_path, two, apply, message):
        results, _ = synthetic(1)
        apply(results)
        with pytest.raises(EvaluationError, match=message):
            load_runs([two[0], write(tmp_path, "other", results)])

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"{", "other.json: is not JSON"),
            (b"\xff", "other.json: is not JSON"),
            (b"[]", "is not a results file of `seedlm evaluate --out`"),
            (b'{"evaluation_version": 1}', "lacks model, reference, settings"),
        ],
        ids=["json", "bytes", "list", "empty"],
    )
    def test_what_is_no_run(self, tmp_path, two, content, message):
        (tmp_path / "other.json").write_bytes(content)
        with pytest.raises(EvaluationError, match=message):
            load_runs([two[0], tmp_path / "other.json"])

    def test_a_file_that_lacks_a_number_is_named(self, tmp_path, two):
        results, _ = synthetic(1)
        del results["metrics"]["nll"], results["model"]["bytes"]
        with pytest.raises(EvaluationError, match=r"other\.json: lacks model bytes, metrics nll"):
            load_runs([two[0], write(tmp_path, "other", results)])

    def test_too_few(self, two, tmp_path):
        with pytest.raises(EvaluationError, match="needs at least 2 runs, got 1"):
            load_runs(two[:1])
        with pytest.raises(EvaluationError, match="a run was given twice"):
            load_runs([two[0], two[0].parent / "." / two[0].name])
        with pytest.raises(EvaluationError, match=r"none\.json: cannot be read"):
            load_runs([two[0], tmp_path / "none.json"])

    def test_records_of_another_text(self, tmp_path, two):
        results, records = synthetic(1)
        records["tokens"]["token_ids"] = [[0] * 6] * 2
        with pytest.raises(EvaluationError, match="their tokens differ"):
            compare_runs(load_runs([two[0], write(tmp_path, "other", results, records)]))
        results, records = synthetic(1)
        records["tasks"]["arc_easy"][1]["question"] = "What?"
        with pytest.raises(EvaluationError, match="question 1 of arc_easy differs"):
            compare_runs(load_runs([two[0], write(tmp_path, "another", results, records)]))

    def test_without_the_library_it_says_what_to_install(self, two, monkeypatch):
        monkeypatch.setitem(sys.modules, "vl_convert", None)
        with pytest.raises(EvaluationError, match=r"pip install 'seedlm\[report\]'; the table and --json do not"):
            to_html(compare_runs(load_runs(two)))


def test_command(two, tmp_path):
    command = [sys.executable, "-m", "seedlm", "compare", *map(str, two)]
    done = subprocess.run([*command, "--json-out", tmp_path / "c.json"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == to_markdown(compare_runs(load_runs(two)))
    assert json.loads((tmp_path / "c.json").read_text()) == json.loads(json.dumps(compare_runs(load_runs(two))))
    with pytest.raises(OutputError, match=r"c\.json: exists already"):
        compare(two, json_out=tmp_path / "c.json")


# ---- the page ----


@pytest.fixture(scope="module")
def pages(two, forty, tmp_path_factory):
    """Pages of a few and of many runs."""
    pytest.importorskip("vl_convert")
    paths = {name: tmp_path_factory.mktemp("page") / f"{name}.html" for name in ("two", "forty")}
    for path, runs in zip(paths.values(), (two, forty), strict=True):
        path.write_text(to_html(compare_runs(load_runs(runs))), encoding="utf-8")
    return paths


class Reader(html.parser.HTMLParser):
    """Elements with their attributes, and the text in all scripts."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.scripts, self._open = [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self._open = None

    def handle_data(self, data):
        if self._open == "script":
            self.scripts[-1] += data


def test_the_page_holds_all_that_it_needs_and_nothing_of_others(pages):
    text = pages["two"].read_text()
    page = Reader(text)
    assert [tag for tag, _ in page.elements].count("script") == 3
    assert not [tag for tag, _ in page.elements if tag in ("img", "iframe", "object", "embed", "base")]
    for _, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,"))
        assert "src" not in attributes
    data, library, script = page.scripts
    assert json.loads(data)["prompts"][0]["prompt"] == f"Say {EVIL}"
    own = text.replace(library, "")
    assert set(re.findall(r"\w+://[^\"'` ]+", own)) == {
        "https://vega.github.io/schema/vega-lite/v6.json"
    }  # a name, never fetched
    policy = next(attributes["content"] for tag, attributes in page.elements if attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'; ")
    for part in (library, script):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'" in policy
    assert pages["forty"].stat().st_size < 3e6


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("no chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-component-update", "disable-sync", "disable-dev-shm-usage"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


class TestBrowser:
    @pytest.fixture
    def show(self, browser, pages):
        """Open a page at a width and wait until its charts are drawn."""

        def show(name, width=1200):
            metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
            browser.get(f"file://{pages[name]}")
            charts = 5 + (2 if name == "two" else 4)
            self.wait(lambda: browser.execute_script("return document.querySelectorAll('svg.marks').length") == charts)

        return show

    @staticmethod
    def wait(condition):
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @pytest.mark.parametrize("name", ["two", "forty"])
    def test_it_loads_without_a_word_and_draws(self, browser, show, name):
        show(name)
        assert browser.get_log("browser") == []
        assert browser.title == ("original · 4bit · 3bit" if name == "two" else "41 models")
        marks = "return [...document.querySelectorAll('svg.marks')].map(s => s.querySelectorAll('path').length)"
        assert min(browser.execute_script(marks)) > 5
        assert browser.execute_script("return document.querySelectorAll('#tokens .item').length") == 10
        assert EVIL in browser.execute_script("return document.querySelector('#prompts .item').textContent")

    def test_the_filter_filters(self, browser, show):
        show("two")
        search = browser.find_element("id", "search")

        def found(kind="all", text=""):
            browser.find_element("css selector", f"#kind [value={kind}]").click()
            search.send_keys("\ue009a\ue000", text or "\ue003")  # control and a, then text or backspace
            lists = ("prompts", "tokens", "questions")
            return [browser.execute_script(f"return document.querySelectorAll('#{name} .item').length") for name in lists]

        assert found() == [1, 10, 2]
        assert found(text="IMG SRC") == [1, 6, 2]  # the second window begins with it; once it is the most likely token
        assert found(text="2?") == [0, 0, 1]
        assert found(text="nowhere") == [0, 0, 0]
        assert browser.find_element("id", "tokens-count").text == "0 of 10"
        assert found(kind="changed") == [1, 3, 1]
        assert found(kind="lost") == [1, 2, 1]
        assert found(kind="gained") == [1, 1, 0]

    def test_ticking_chooses_what_is_shown(self, browser, show):
        show("two")
        heads = "return [...document.querySelectorAll('#tokens .item:first-child tbody th')].map(e => e.textContent)"
        assert browser.execute_script(heads) == ["original", "●4bit", "■3bit"]
        browser.find_element("css selector", "[data-model='1']").click()
        assert browser.execute_script(heads) == ["original", "■3bit"]
        self.wait(lambda: browser.execute_script("return document.querySelectorAll('#maps svg.marks').length") == 1)
        browser.find_element("css selector", "#layer-error [value=weight_error]").click()
        label = "return (document.querySelector('#maps [aria-label*=weight]') || {}).ariaLabel"
        self.wait(lambda: browser.execute_script(label) == "weight error of every linear layer of 3bit")
        browser.find_element("css selector", "#metric [value=perplexity]").click()
        text = "return document.querySelector('#by-bits').textContent"
        self.wait(lambda: "original 18.00" in browser.execute_script(text))
        assert browser.get_log("browser") == []

    def test_no_more_than_six_are_ticked(self, browser, show):
        show("forty")
        boxes = browser.find_elements("css selector", "[data-model]")
        assert [box.is_selected() for box in boxes].count(True) == 4
        for box in [box for box in boxes if not box.is_selected()][:2]:
            box.click()
        assert [box.is_enabled() for box in boxes].count(True) == 6

    def test_names_in_a_chart_do_not_cover_each_other(self, browser, show):
        show("forty")
        names = """return [...document.querySelectorAll('#by-bits .mark-text:not(.role-axis-label) text')].filter(
            node => /^run\\d/.test(node.textContent)).map(node => {
            const box = node.getBoundingClientRect(); return [box.left, box.right, box.top, box.bottom]; })"""
        boxes = browser.execute_script(names)
        assert 4 <= len(boxes) < 20
        for place, (left, right, top, bottom) in enumerate(boxes):
            for other in boxes[:place]:
                assert right <= other[0] or other[1] <= left or bottom <= other[2] + 2 or other[3] <= top + 2

    @pytest.mark.parametrize("name", ["two", "forty"])
    def test_a_phone_needs_no_sideways_scrolling(self, browser, show, name):
        show(name, width=360)
        assert browser.execute_script("return document.documentElement.scrollWidth") == 360

    def test_it_prints(self, browser, show):
        show("two")
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", {})["data"])
        assert pdf.startswith(b"%PDF")
        assert len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 2
