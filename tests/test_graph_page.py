"""The page of a graph in a real browser: headless Chromium walks it, by buttons and by keys."""

import re
import shutil

import pytest

import gpuad
from gpuad import nn

webdriver = pytest.importorskip("selenium.webdriver", reason='the page is tested with selenium: "gpuad[test]"')
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402

OPTIONS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--window-size=1280,800",
]  # fmt: skip


def f(x, y):
    a = x + y
    b = x - y
    return a * b


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    started = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield started
    started.quit()


@pytest.fixture
def open_page(browser, tmp_path):
    """Write a graph's page and open it; at the end the page must have reported no error."""

    def open_it(graph):
        path = tmp_path / "graph.html"
        graph.to_html(path)
        browser.get(path.as_uri())
        return browser

    yield open_it
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


@pytest.fixture
def page(open_page):
    x, y = gpuad.tensor(3.0), gpuad.tensor(2.0)
    return open_page(gpuad.graph.trace(f, x, y, tangents=(gpuad.tensor(1.0), gpuad.tensor(0.0))))


def shown(browser, row):
    """What each node's card shows in a row: {name: text}."""
    cards = browser.find_elements(By.CSS_SELECTOR, ".node[data-node]")
    return {
        card.get_attribute("data-node"): card.find_element(By.CSS_SELECTOR, f"text.{row}").text for card in cards
    }  # fmt: skip


def press(browser, key):
    browser.find_element(By.TAG_NAME, "body").send_keys(key)


def caption(browser):
    return browser.find_element(By.ID, "caption").text.splitlines()


def test_step_forward_to_the_end_and_back_to_the_start(page):
    next_, back = page.find_element(By.ID, "next"), page.find_element(By.ID, "back")
    start = {"x": "3", "y": "2", "a": "?", "b": "?", "f": "?"}
    assert shown(page, "value") == start
    assert shown(page, "tangent") == {"x": "1", "y": "0", "a": "?", "b": "?", "f": "?"}
    assert not back.is_enabled()
    captions, gradients = [], []
    while next_.is_enabled():
        next_.click()
        captions.append(caption(page)[0])
        gradients.append(shown(page, "gradient"))
    assert captions == [
        "a = x + y = 3 + 2 = 5",
        "b = x − y = 3 − 2 = 1",
        "f = a · b = 5 · 1 = 5",
        "∂f/∂f = 1: the walk back begins",
        "f has its gradient, 1, and sends 1 to a, 5 to b",
        "b has its gradient, 5, and sends 5 to x, −5 to y",
        "a has its gradient, 1, and sends 1 to x, 1 to y",
    ]
    assert shown(page, "value") == {"x": "3", "y": "2", "a": "5", "b": "1", "f": "5"}
    assert shown(page, "tangent") == {"x": "1", "y": "0", "a": "1", "b": "1", "f": "6"}
    unknown = dict.fromkeys("xyabf", "?")
    assert gradients[:4] == [unknown, unknown, unknown, {**unknown, "f": "1"}]
    assert gradients[4:] == [
        {"x": "?", "y": "?", "a": "1", "b": "5", "f": "1"},
        {"x": "5 (1/2)", "y": "−5 (1/2)", "a": "1", "b": "5", "f": "1"},
        {"x": "6", "y": "−4", "a": "1", "b": "5", "f": "1"},
    ]
    while back.is_enabled():
        back.click()
    assert shown(page, "value") == start
    assert shown(page, "gradient") == unknown
    assert caption(page)[1] == "step 0 of 7"


def test_keyboard_and_slider(page):
    press(page, Keys.END)
    assert shown(page, "gradient")["x"] == "6"
    press(page, Keys.ARROW_LEFT)
    assert shown(page, "gradient")["x"] == "5 (1/2)"
    press(page, Keys.HOME)
    press(page, Keys.ARROW_RIGHT)
    assert shown(page, "value")["a"] == "5" and shown(page, "value")["b"] == "?"
    slider = page.find_element(By.ID, "slider")
    assert slider.get_attribute("aria-valuetext") == "step 1 of 7"
    slider.send_keys(Keys.ARROW_RIGHT)  # its own keys: one step, not two
    assert slider.get_attribute("value") == "2"
    assert shown(page, "value")["b"] == "1" and shown(page, "value")["f"] == "?"
    press(page, Keys.HOME)
    page.execute_script("document.activeElement.blur()")
    press(page, Keys.SPACE)
    assert page.find_element(By.ID, "play").text == "pause"
    press(page, Keys.SPACE)
    assert page.find_element(By.ID, "play").text == "play"


def test_a_node_in_detail(page):
    press(page, Keys.END)
    node = page.find_element(By.CSS_SELECTOR, '[data-node="b"]')
    assert node.get_attribute("aria-label") == "b = x − y, value 1, tangent 1, gradient 5"
    page.execute_script("arguments[0].focus()", node)
    node.send_keys(Keys.ENTER)
    panel = page.find_element(By.ID, "inspector")
    equations = [e.text for e in panel.find_elements(By.CLASS_NAME, "equation")]
    assert equations == [
        "b = x − y = 3 − 2 = 1",
        "Σ local derivative · tangent = 1·1 + (−1)·0 = 1",
        "1·5 (by f) = 5",
    ]
    rows = [[c.text for c in row.find_elements(By.TAG_NAME, "td")] for row in panel.find_elements(By.TAG_NAME, "tr")]
    assert rows[1:] == [["x", "1", "5"], ["y", "−1", "−5"]]
    assert re.search(r"test_graph_page\.py:\d+", panel.text)
    assert panel.find_element(By.TAG_NAME, "pre").text == "b = x - y"
    page.find_element(By.TAG_NAME, "body").send_keys(Keys.ESCAPE)
    page.find_element(By.CSS_SELECTOR, '[data-node="f"]').click()
    panel.find_element(By.TAG_NAME, "summary").click()
    select = panel.find_element(By.TAG_NAME, "select")
    assert "mul(x0, x1)" in panel.find_element(By.CSS_SELECTOR, "details pre").text
    select.send_keys("CUDA, b")
    assert "(u0 * u2)" in panel.find_element(By.CSS_SELECTOR, "details pre").text
    assert "8 bytes" in panel.text


def test_modules_collapse_and_expand(open_page):
    block = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(6)]
    graph = gpuad.graph.trace(nn.Sequential(*block, nn.Linear(4, 1)), gpuad.ones(2, 4))
    browser = open_page(graph)

    def groups():
        return [g.get_attribute("data-group") for g in browser.find_elements(By.CSS_SELECTOR, "[data-group]")]

    def nodes():
        return len(browser.find_elements(By.CSS_SELECTOR, ".node"))

    assert groups() == [] and nodes() == len(graph.nodes) == 28
    browser.find_element(By.ID, "collapse").click()
    assert groups() == ["0", "1", "2", "3", "4", "5", "6"] and nodes() == 8
    group = browser.find_element(By.CSS_SELECTOR, '[data-group="2"]')
    assert group.get_attribute("aria-expanded") == "false"
    browser.execute_script("arguments[0].focus()", group)
    group.send_keys(Keys.ENTER)
    assert groups() == ["0", "1", "3", "4", "5", "6"]
    assert nodes() == 7 + 4  # two operations, weight and bias
    press(browser, Keys.END)
    press(browser, Keys.HOME)
    for _ in range(3):
        press(browser, Keys.ARROW_RIGHT)
    active = browser.find_element(By.CSS_SELECTOR, ".node.now")
    assert active.get_attribute("data-group") == "1"
    browser.find_element(By.CSS_SELECTOR, '[data-module="2"]').click()
    assert len(groups()) == 7
    browser.find_element(By.ID, "expand").click()
    assert groups() == [] and nodes() == 28


def test_a_large_graph_opens_collapsed(open_page):
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(20)]
    browser = open_page(gpuad.graph.trace(nn.Sequential(*layers), gpuad.ones(2, 4)))
    assert len(browser.find_elements(By.CSS_SELECTOR, ".node")) == 21
    assert len(browser.find_elements(By.CSS_SELECTOR, "[data-group]")) == 20


def test_a_layer_called_twice_is_two_groups_of_one_order(open_page):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return self.layer(gpuad.tanh(self.layer(x)))

    browser = open_page(gpuad.graph.trace(Shared(), gpuad.ones(1, 3)))
    browser.find_element(By.ID, "collapse").click()
    groups = browser.find_elements(By.CSS_SELECTOR, "[data-group]")
    assert [g.get_attribute("data-group") for g in groups] == ["layer", "layer (call 2)"]


def test_boxes_do_not_overlap_and_arrows_go_one_way(open_page):
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 2))
    target = gpuad.zeros(2, 2)
    browser = open_page(
        gpuad.graph.trace(lambda x: nn.functional.mse_loss(net(x) + x[:, :2], target), gpuad.ones(2, 3))
    )
    for _ in range(2):
        overlaps, backward = browser.execute_script("""
            const boxes = drawn.boxes, along = downwards ? "y" : "x";
            const near = (a, b, at, size) => Math.abs(a[at] - b[at]) < (a[size] + b[size]) / 2;
            const overlap = (a, b) => near(a, b, "x", "width") && near(a, b, "y", "height");
            return [boxes.filter((a, i) => boxes.some((b, j) => i < j && overlap(a, b))).length,
                    drawn.links.filter(k => boxes[k.from][along] >= boxes[k.to][along]).length];
        """)
        assert (overlaps, backward) == (0, 0)
        browser.find_element(By.ID, "turn").click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_are_both_readable(page, scheme):
    if page.execute_script("return document.documentElement.dataset.theme") != scheme:
        page.find_element(By.ID, "theme").click()
    contrast = page.execute_script("""
        const linear = v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
        const light = color => {
            const [r, g, b] = color.match(/[\\d.]+/g).map(v => linear(v / 255));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05;
        };
        const ratio = (a, b) => Math.max(light(a), light(b)) / Math.min(light(a), light(b));
        const color = name => {
            const sample = document.createElement("i");
            sample.style.color = `var(--${name})`;
            document.body.append(sample);
            return getComputedStyle(sample).color;
        };
        return ["ink", "soft", "value", "tangent", "gradient", "group"].map(n => ratio(color(n), color("surface")));
    """)  # fmt: skip
    assert min(contrast) >= 4.5  # WCAG 2.1, AA


def test_a_narrow_window_keeps_everything_in_reach(page):
    page.set_window_size(420, 900)
    try:
        assert page.execute_script("return document.documentElement.scrollWidth <= innerWidth")
        page.find_element(By.ID, "next").click()
        assert shown(page, "value")["a"] == "5"
    finally:
        page.set_window_size(1280, 800)


def test_the_page_is_one_file_without_a_network():
    x = gpuad.tensor([1.0, float("nan"), float("inf")])
    page = gpuad.graph.trace(lambda x: (x * 2).sum(), x).to_html()
    links = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!#)[\w/:]""", page)
    assert links == [] and not re.search(r"https?://(?!www\.w3\.org)", page)
    assert '"nan"' in page and '"inf"' in page  # as text: JSON has no such numbers


def test_names_cannot_end_the_script(open_page):
    graph = gpuad.graph.trace(f, gpuad.tensor(1.0), gpuad.tensor(2.0))
    graph.nodes[0].name = "</script><b>x"
    graph.title = "<b>f"
    browser = open_page(graph)
    assert "</script><b>x" in shown(browser, "value")
    assert browser.find_element(By.ID, "title").text == browser.title.partition(" · ")[0] == "<b>f"


def test_a_large_graph_without_modules_opens_in_parts(open_page):
    def chain(x):
        for _ in range(130):
            x = gpuad.sin(x)
        return x

    browser = open_page(gpuad.graph.trace(chain, gpuad.tensor(1.0)))
    groups = browser.find_elements(By.CSS_SELECTOR, "[data-group]")
    assert [g.get_attribute("data-group") for g in groups][::6] == ["operations 1–20", "operations 121–130"]
    assert len(browser.find_elements(By.CSS_SELECTOR, ".node")) == 1 + 7
    press(browser, Keys.END)
    assert shown(browser, "gradient")["x"] != "?"
