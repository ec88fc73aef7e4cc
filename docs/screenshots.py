"""A picture of each tab of an app that is open over a finished run; README's were made so.

python -m lowmem_rmu.run tiny --name tiny --runs-dir runs && python app.py --runs-dir runs &
python docs/screenshots.py http://127.0.0.1:7860 --to docs
python docs/screenshots.py http://127.0.0.1:7860 --to dark --scheme dark --width 400
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer
from playwright.sync_api import Page, sync_playwright

from lowmem_rmu.console import prepare_streams

HEIGHT, SETTLED_MS = 900, 1500


def ask_both(page: Page) -> None:
    page.get_by_role("button", name="Load", exact=True).click()
    page.get_by_text("Loaded: the model of").wait_for(timeout=120_000)
    suggested = page.locator(".gallery-item, .gallery button").first
    suggested.click()
    page.wait_for_timeout(SETTLED_MS)
    page.get_by_role("button", name="Send").click()
    page.locator(".parting-common").wait_for(timeout=120_000)
    page.mouse.move(0, 0)


def audit(page: Page) -> None:
    """With all attacks, unless one was run before; what they found stands below what is asked."""
    if not page.get_by_text("Is it gone?").last.is_visible():
        page.get_by_role("button", name="Audit", exact=True).click()
    page.get_by_text("Is it gone?").last.wait_for(timeout=3_600_000)
    page.get_by_text("not run: not yet").first.wait_for(state="hidden", timeout=3_600_000)
    page.get_by_text("Is it gone?").last.evaluate("element => element.scrollIntoView()")


def export(page: Page) -> None:
    """The smallest format, unless it is there from before."""
    if not page.get_by_text("Asked the run's own questions").is_visible():
        page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_text("Asked the run's own questions").wait_for(timeout=300_000)


BEFORE: dict[str, Callable[[Page], None]] = {"Chat": ask_both, "Audit": audit, "Export": export}
"""What is done in a tab before its picture is taken."""


def open_tab(page: Page, name: str) -> None:
    """In a narrow window the last tabs stand in a menu."""
    page.get_by_role("tab").first.wait_for()
    tab = page.get_by_role("tab", name=name, exact=True)
    if not tab.is_visible():
        page.get_by_label("More tabs").click()
        tab = page.locator(".overflow-dropdown button", has_text=name)
    tab.click()
    page.wait_for_timeout(SETTLED_MS)


def main(
    address: Annotated[str, typer.Argument(help="Where the app listens.")],
    to: Annotated[Path, typer.Option(help="The folder for the pictures.")] = Path("docs"),
    scheme: Annotated[Literal["light", "dark"], typer.Option(help="light or dark.")] = "light",
    width: Annotated[int, typer.Option(min=300, help="Of the window, in pixels.")] = 1280,
    full: Annotated[
        bool, typer.Option("--full", help="The whole page, not only what the window shows.")
    ] = False,
) -> None:
    """Takes them with the system's Chromium."""
    to.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
        page.goto(address)
        for tab in ("Unlearn", "Results", "Chat", "Audit", "Export", "Runs"):
            open_tab(page, tab)
            BEFORE.get(tab, lambda page: None)(page)
            page.wait_for_timeout(SETTLED_MS)
            page.screenshot(path=to / f"{tab.lower()}.png", full_page=full)
        browser.close()


if __name__ == "__main__":
    prepare_streams()
    typer.run(main)
