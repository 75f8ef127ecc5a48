"""The page in a browser: nothing is fetched or complained of, keys and labels work, and all can be read."""

import pytest

from tests.looking.browser import Browser, installed
from tests.looking.pages import images_page, rows_page, texts_page

pytestmark = pytest.mark.skipif(installed() is None, reason="no Chromium is installed")
PAGES = {"texts": texts_page, "rows": rows_page, "images": images_page}
CONTRAST = """
(() => {
  const dab = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const read = (color) => {
    dab.clearRect(0, 0, 1, 1); dab.fillStyle = color; dab.fillRect(0, 0, 1, 1);
    return dab.getImageData(0, 0, 1, 1).data;
  };
  const over = (top, under) => [0, 1, 2].map((i) => (top[i] * top[3] + under[i] * (255 - top[3])) / 255);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((x) => (x / 255 <= 0.04045 ? x / 255 / 12.92 : ((x / 255 + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const own = (e) => read(getComputedStyle(e).backgroundColor);
  const behind = (e) => over(own(e), e.parentElement ? behind(e.parentElement) : [255, 255, 255]);
  const texts = [...document.querySelectorAll("body *")].filter((e) =>
    !e.closest("script, svg, .unseen") && [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim()));
  return texts.map((e) => {
    const ground = behind(e), ink = read(getComputedStyle(e).color);
    const faded = [...ink.slice(0, 3), 255 * getComputedStyle(e).opacity];
    const [a, b] = [light(over(faded, ground)), light(ground)].sort((x, y) => y - x);
    return [(a + 0.05) / (b + 0.05), e.tagName + "." + e.className + " " + e.textContent.trim().slice(0, 20)];
  }).filter(([ratio]) => ratio < 4.5);
})()
"""
NAMES = """
[...document.querySelectorAll("button, input, select, [role=region], [role=img], aside")].filter((e) =>
  !(e.getAttribute("aria-label") || e.labels?.[0]?.textContent.trim())).map((e) => e.outerHTML)
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    opened = Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Each page as a file."""
    folder = tmp_path_factory.mktemp("pages")
    for name, made in PAGES.items():
        (folder / f"{name}.html").write_text(made(), encoding="utf-8")
    return {name: folder / f"{name}.html" for name in PAGES}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_fetched_or_complained_of_and_all_fits_and_can_be_read(browser, files, name, width, scheme):
    browser.open(files[name], width=width, scheme=scheme)
    browser.click(".item")
    for details in range(browser("document.querySelectorAll('details').length")):
        browser(f"document.querySelectorAll('details')[{details}].open = true")
    assert browser.complaints == []
    assert [own for own in browser.requests if not own.startswith(("data:", files[name].as_uri()))] == []
    assert browser("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    for measure in range(browser("document.querySelectorAll('[name=measure]').length")):
        browser(f"document.querySelectorAll('[name=measure]')[{measure}].click()")
        assert browser(CONTRAST) == []
    page = browser("getComputedStyle(document.documentElement).backgroundColor")
    assert page == {"light": "rgb(252, 252, 250)", "dark": "rgb(16, 19, 23)"}[scheme]


@pytest.mark.parametrize("name", PAGES)
def test_every_control_has_a_name_and_an_item_says_site_and_number(browser, files, name):
    browser.open(files[name])
    assert browser(NAMES) == []
    labels = browser("items.map((item) => item.getAttribute('aria-label'))")
    site = browser("data.sites[+one('#site').value]")
    assert len(labels) > 4 and all(f" at {site}: " in label for label in labels)
    kind = {"texts": "token", "rows": "row", "images": "image"}[name]
    assert all(label.startswith(f"{kind} ") for label in labels)


def test_a_label_has_the_number_that_was_measured(browser, files):
    browser.open(files["texts"])
    said = browser("items[1].getAttribute('aria-label').split(': ').at(-1)")
    number = browser("data.items[0][0].along[+one('#site').value][0][1]")
    assert float(said.replace("−", "-")) == float(f"{number:.3g}")
    assert "differs" in browser("one('.differs').getAttribute('aria-label')")


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_is_enough(browser, files, name):
    browser.open(files[name], width=400)
    assert browser("document.querySelectorAll('.item[tabindex=\"0\"]').length") == 1  # the whole is one stop for Tab
    for _ in range(20):
        browser.press("Tab")
        if browser("document.activeElement.classList.contains('item')"):
            break
    here = "items.indexOf(document.activeElement)"
    assert browser(here) == 0
    browser.press("ArrowRight")
    assert browser(here) == 1
    browser.press("ArrowLeft")
    browser.press("ArrowDown")
    below = browser(here)
    assert below > 0
    assert browser(f"items[{below}].getBoundingClientRect().top >= items[0].getBoundingClientRect().bottom - 1")
    browser.press("ArrowUp")
    assert browser(here) == 0
    browser.press("End")
    assert browser(f"{here} === items.length - 1")
    browser.press("Home")
    browser.press("ArrowRight")
    assert browser("one('#panel').dataset.empty") == "yes"
    browser.press("Enter")
    assert browser("one('#panel').dataset.empty") == "no" and "2" in browser("one('#where').textContent")
    assert browser("one('#every').rows.length") == browser("data.sites.length")
    browser.press("Enter")
    assert browser("one('#panel').dataset.empty") == "yes"
    browser.press("Enter")
    site = browser("one('#site').selectedIndex")
    browser.press("[")
    assert browser("one('#site').selectedIndex") == max(0, site - 1)
    browser.press("]")
    assert browser(
        "one('#site').selectedIndex === Math.min(one('#site').length - 1, 1 + " + str(max(0, site - 1)) + ")"
    )


def test_the_switches_change_what_is_shown(browser, files):
    browser.open(files["texts"])
    before = browser("items.map((item) => item.getAttribute('aria-label'))")
    browser("document.querySelector('[value=added]').click()")
    added = browser("items.map((item) => item.getAttribute('aria-label'))")
    assert all("moved by" in label for label in added) and added != before
    assert browser("one('#ramp').dataset.hue") == "added"
    browser("document.querySelector('[value=gate]').click()")
    browser("one('#concept').selectedIndex = 1; one('#concept').dispatchEvent(new Event('change'))")
    shares = browser("items.map((item) => item.style.getPropertyValue('--share'))")
    assert set(shares) == {"0.00", "1.00"}  # what the gate decided
    assert browser.complaints == []


def test_what_a_hostile_name_would_run_does_not(browser, files):
    for path in files.values():
        browser.open(path)
        assert browser("document.querySelectorAll('script').length") == 2
        assert browser("[...document.querySelectorAll('img')].every((own) => own.src.startsWith('data:image/png'))")
        assert browser.complaints == []
