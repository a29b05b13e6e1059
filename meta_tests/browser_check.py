"""``python meta_tests/browser_check.py [--screenshots DIR]``: the pages of reports in a real browser.

Run by hand, with a Chromium on the PATH; the tests of CI read the pages without one. Pages of made-up
runs (with every kind of thing on them, the whole suite passed, several side by side, what changed) are
opened at the width of a desktop and of a phone, in light and dark, with every part unfolded. Of each:

- the page does not scroll sideways, and nothing but what scrolls in a box of its own reaches out of it;
- nothing is fetched;
- every text has the contrast that WCAG AA asks for: 4.5, or 3 where it is large.

Prints a line for each page and exits with status 1 where something is wrong, 4 without a browser.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")

WIDTHS = {"desktop": 1200, "phone": 390}

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--allow-file-access-from-files",
    "--virtual-time-budget=4000",
)

# The page forbids scripts, so that it is looked at from a page around it.
AROUND = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe id="page" src="PAGE" style="border:0;width:WIDTHpx;height:900px"></iframe>
<pre id="result">nothing</pre>
<script>
document.getElementById("page").addEventListener("load", event => {
  const frame = event.target.contentWindow, page = frame.document, root = page.documentElement;
  const found = {wide: [], pale: [], fetched: [], background: ""};
  const luminance = ([r, g, b]) => [r, g, b].map(c => c / 255).map(
    c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4
  ).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const parts = text => text.match(/[\\d.]+/g).map(Number);
  const background = element => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(frame.getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return [255, 255, 255];
  };
  page.querySelectorAll("details").forEach(each => each.open = true);
  found.width = root.clientWidth;
  found.scrolls = root.scrollWidth;
  found.background = frame.getComputedStyle(page.body).backgroundColor;
  found.fetched = frame.performance.getEntriesByType("resource").map(entry => entry.name);
  for (const element of page.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (box.right > root.clientWidth + 1 && !element.closest(".scroll, pre"))
      found.wide.push(element.tagName + ": " + element.textContent.trim().slice(0, 60));
    const own = [...element.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || element.closest("svg") || !box.width) continue;
    const style = frame.getComputedStyle(element);
    const [a, b] = [luminance(parts(style.color)), luminance(background(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const size = parseFloat(style.fontSize);
    const large = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    if (contrast < (large ? 3 : 4.5))
      found.pale.push(contrast.toFixed(2) + " " + element.textContent.trim().slice(0, 60));
  }
  document.getElementById("result").textContent = JSON.stringify(found);
});
</script>
"""


def made_pages() -> dict[str, str]:
    """The pages that are looked at, by name."""
    from made_reports import ended, report_of, three
    from test_reports_page import everything, many

    from conformance.reports import changes_pages, several_pages
    from conformance.reports.changes import compare
    from conformance.reports.page import page
    from conformance.reports.several import side_by_side

    passed = many(("pass",), 1299)
    for number, record in enumerate(passed.records):
        share = (number * 37 % 100) / 101
        record.update(drawn=20, executed=20, closest=share, comparisons={"semantic": 20})
    whole = report_of(passed.records)
    broken = [
        ended(
            record["slug"], "fail" if number % 9 == 0 else "declined" if number % 9 == 1 else "pass"
        )
        for number, record in enumerate(whole.records)
    ]
    other = report_of(broken)
    parts = [("one", whole), ("two", other), ("three", many(("pass", "pass", "fail"), 1299))]
    return {
        "everything": page(everything()),
        "passed": page(whole),
        "failed": page(other),
        "nothing": page(three("not_offered", "not_offered", "not_offered")),
        "matrix": several_pages.page(side_by_side(parts)),
        "changes": changes_pages.page(compare(whole, other)),
    }


def browser() -> str | None:
    """The Chromium on the PATH, if there is one."""
    return next(filter(None, map(shutil.which, BROWSERS)), None)


def looked_at(program: str, page: Path, width: int, dark: bool, folder: Path) -> dict:
    """What a browser finds on a page of this width; RuntimeError where it finds nothing."""
    around = folder / "around.html"
    around.write_text(AROUND.replace("PAGE", page.as_uri()).replace("WIDTH", str(width)), "utf-8")
    shown = run(program, dark, folder, 1300, "--dump-dom", around.as_uri())
    found = re.search(r'<pre id="result">(.*?)</pre>', shown, re.DOTALL)
    if found is None or found[1] == "nothing":
        raise RuntimeError(f"{program} shows nothing of {page.name}")
    return json.loads(html.unescape(found[1]))


def run(program: str, dark: bool, folder: Path, width: int, *arguments: str) -> str:
    """The output of a browser."""
    scheme = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command = [program, *FLAGS, *scheme, f"--user-data-dir={folder / 'profile'}"]
    command += [f"--window-size={width},2400", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    return done.stdout


def problems(found: dict, width: int) -> list[str]:
    """What is wrong with a page, from what the browser found."""
    said = [f"reaches out of the page: {each}" for each in found["wide"][:3]]
    if found["scrolls"] > found["width"] or found["width"] != width:
        said.append(f"scrolls sideways: {found['scrolls']} of {found['width']} pixels")
    said += [f"fetches {each}" for each in found["fetched"][:3]]
    return said + [f"too little contrast: {each}" for each in sorted(set(found["pale"]))[:3]]


def main() -> int:
    """Look at every page; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--screenshots", type=Path, metavar="DIR")
    options = parser.parse_args()
    program = browser()
    if program is None:
        print(f"browser_check: none of {', '.join(BROWSERS)} is on the PATH", file=sys.stderr)
        return 4
    wrong = 0
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        for title, text in made_pages().items():
            page = folder / f"{title}.html"
            page.write_text(text, "utf-8")
            backgrounds = set()
            for device, width in WIDTHS.items():
                for dark in (False, True):
                    found = looked_at(program, page, width, dark, folder)
                    backgrounds.add(found["background"])
                    said = problems(found, width)
                    shown = f"{title}, {device}, {'dark' if dark else 'light'}"
                    print(f"{shown}: {'; '.join(said) or 'as it must be'}")
                    wrong += bool(said)
                    if options.screenshots:
                        options.screenshots.mkdir(parents=True, exist_ok=True)
                        image = options.screenshots / f"{shown.replace(', ', '-')}.png"
                        target = f"--screenshot={image.resolve()}"
                        # A window is never narrower than 500 pixels.
                        run(program, dark, folder, max(width, 500), target, page.as_uri())
            if len(backgrounds) != 2:
                print(f"{title}: light and dark have the same background")
                wrong += 1
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
