"""The pictures of README and docs/report.md: reports of runs that anyone can make, opened in a headless Chromium.

    make quickstart
    python -m rltrain.train +experiment=quickstart algorithm=tempo run_dir=runs/tempo
    python scripts/report_pictures.py runs/quickstart runs/tempo --out docs/images

Needs playwright (extra dev) and Chromium (Debian: chromium). A picture has at most 128 colours, to stay below 200 kB.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from rltrain import cli
from rltrain.registry import discover
from rltrain.report import page as report

DESKTOP, PHONE = {"width": 1180, "height": 800}, {"width": 390, "height": 800}
MOST_BYTES, COLOURS = 200_000, 128


def main() -> None:
    """Take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="the run whose results and credit are shown")
    parser.add_argument("other", type=Path, nargs="+", help="runs to show beside it as curves")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--estimators", default="grpo,tempo,spae")
    flags = parser.parse_args()
    cli.setup_logging()
    discover()
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        one, several = Path(scratch) / "one.html", Path(scratch) / "several.html"
        one.write_text(report.build([flags.run], estimators=flags.estimators.split(",")))
        several.write_text(report.build([flags.run, *flags.other]))
        desktop = opened(browser, one, DESKTOP, "light")
        results(desktop, flags.out / "report_results.png")
        tree(desktop, flags.out / "report_tree.png")
        credit(desktop, flags.out / "report_credit.png", top=".chooser")
        credit(opened(browser, one, PHONE, "dark"), flags.out / "report_phone.png", top="#viewer .completion >> nth=1")
        curves(opened(browser, several, DESKTOP, "light"), flags.out / "report_curves.png")


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless browser. Its own sandbox refuses to start as root."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield browser
        browser.close()


def opened(browser: Any, path: Path, size: dict[str, int], scheme: str) -> Any:
    """The page at a size, in a colour scheme."""
    page = browser.new_page(viewport=size, color_scheme=scheme)
    page.goto(path.resolve().as_uri())
    page.add_style_tag(content="section, #drawings { padding: 0 12px 8px; }")
    return page


def results(page: Any, out: Path) -> None:
    """The table and its curves."""
    page.locator("#results").screenshot(path=out)
    shrink(out)


def tree(page: Any, out: Path) -> None:
    """Prefix tree and potentials, without the panel that floats over them."""
    page.add_style_tag(content="#inspector { visibility: hidden; }")
    page.locator("#drawings").screenshot(path=out)
    page.add_style_tag(content="#inspector { visibility: visible !important; }")
    shrink(out)


def credit(page: Any, out: Path, *, top: str) -> None:
    """The viewer from ``top`` on, with a token of the first wrong completion under the mouse."""
    page.locator(".completion .t.down").nth(13).hover()
    page.locator(top).evaluate("one => scrollBy(0, one.getBoundingClientRect().top - 8)")
    page.screenshot(path=out)
    shrink(out)


def curves(page: Any, out: Path) -> None:
    """The curves of several runs."""
    page.locator("#curves").screenshot(path=out)
    shrink(out)


def shrink(path: Path) -> None:
    """A palette instead of true colours; refused where that is not enough."""
    with Image.open(path) as picture:
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{path}: {path.stat().st_size} bytes, over {MOST_BYTES}")
    print(f"{path}: {path.stat().st_size // 1000} kB")


if __name__ == "__main__":
    main()
