"""The page of a comparison: what it holds, and how a real browser shows it."""

import base64
import hashlib
import html.parser
import json
import re
import shutil
import time

import pytest

from seedlm.compare import compare_runs, load_runs, to_html
from synthetic_runs import EVIL


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
