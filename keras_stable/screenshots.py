"""The figures of a page as PNG files, drawn by a headless Chromium."""

import base64
import os
import re
import shutil
from pathlib import Path

NAMES = "chromium chromium-browser google-chrome google-chrome-stable chrome"


def find_browser():
    """Path of a Chromium or Chrome, or None.

    `KERAS_STABLE_BROWSER`, if it is set; else the first of `NAMES` that the
    system finds; else the one that `playwright install chromium` brought,
    which Playwright finds itself: `""`.

    Raises:
        FileNotFoundError: if `KERAS_STABLE_BROWSER` names no program.
    """
    named = os.environ.get("KERAS_STABLE_BROWSER")
    if named and shutil.which(named) is None:
        raise FileNotFoundError(
            f"KERAS_STABLE_BROWSER is {named!r}, and no program is there: let "
            "it be the path of a Chromium or Chrome, or unset it."
        )
    names = [named] if named else NAMES.split()
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        cache = Path.home() / ".cache/ms-playwright"
        return "" if any(cache.glob("chromium*")) else None
    return found


def open_browser(playwright):
    """A headless Chromium, to be closed by the caller.

    Args:
        playwright: what `playwright.sync_api.sync_playwright()` gives.

    Raises:
        FileNotFoundError: if there is none.
        OSError: if it does not start.
    """
    path = find_browser()
    if path is None:
        raise FileNotFoundError(
            "Figures are drawn by a headless Chromium, and none was found. "
            "Install one (Debian, Ubuntu: apt install chromium; or playwright "
            "install chromium), or name it in KERAS_STABLE_BROWSER."
        )
    # Chromium's sandbox does not run as root, in most containers.
    arguments = ["--disable-gpu", "--no-zygote"]
    if getattr(os, "geteuid", lambda: 1)() == 0:
        arguments.append("--no-sandbox")
    from playwright.sync_api import Error

    try:
        return playwright.chromium.launch(
            executable_path=path or None, args=arguments
        )
    except Error as error:
        # Playwright's message is the whole log of the program.
        raise OSError(
            f"{path or 'The browser of Playwright'} does not start as a "
            f"headless Chromium: {str(error).splitlines()[0]}"
        ) from error


def save_figures(page, folder, width=1200):
    """Writes `NAME.png` of every figure of a page.

    Args:
        page: path of the HTML file.
        folder: directory. Made if it is not there.
        width: int, of the window, in pixels; figures have twice as many.

    Returns:
        List of paths.

    Raises:
        ImportError: if Playwright is not installed.
        FileNotFoundError: if there is no Chromium.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise ImportError(
            "PNG files are drawn through Playwright, which is not installed: "
            "pip install 'keras-stable[lab]'. The page's own buttons save "
            "them without it."
        ) from error
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    with sync_playwright() as playwright:
        browser = open_browser(playwright)
        try:
            view = browser.new_page(viewport={"width": width, "height": 900})
            view.goto(Path(page).resolve().as_uri())
            images = view.evaluate("stabilityReport.pngs()")
        finally:
            browser.close()
    for name, image in images.items():
        file = folder / (re.sub(r"[^\w-]", "_", name) + ".png")
        file.write_bytes(base64.b64decode(image.partition(",")[2]))
        files.append(file)
    return files
