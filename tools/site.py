"""``python -m tools.site FOLDER``: check a built site: links, names of the API, and pages in a browser.

The browser is Chromium's, headless, if there is one: seven pages at 1280 and 390 pixels must have no error of
MathJax, no broken image and nothing to scroll to the right.
"""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit

import fastvae

PAGES = ("index", "start/quickstart", "start/port", "auto_tutorials/1_start/02_trust", "api/fastvae.ops")
PAGES += ("auto_tutorials/index", "theory")
WIDTHS = (1280, 390)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# Page in a frame of a given width, measured when its formulas are set.
WRAPPER = """<body style="margin:0">
<iframe id="frame" src="{page}" style="width:{width}px;height:1500px;border:0"></iframe>
<pre id="found"></pre><script>
setTimeout(() => {{
  const page = document.getElementById("frame").contentDocument;
  document.getElementById("found").textContent = "FOUND" + JSON.stringify({{
    scroll: page.documentElement.scrollWidth - page.documentElement.clientWidth,
    errors: page.querySelectorAll("mjx-merror").length,
    formulas: page.querySelectorAll("mjx-container").length,
    images: [...page.images].filter(i => i.loading != "lazy" && i.complete && !i.naturalWidth).length,
  }}) + "END";
}}, 6000);
</script></body>"""


class _Page(html.parser.HTMLParser):
    """Links, images and anchors of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.targets: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.anchors.update(v for n in ("id", "name") if (v := found.get(n)))
        self.targets += [v for n in ("href", "src") if (v := found.get(n))]


def broken_links(folder: Path) -> list[str]:
    """Return the links of pages to files and anchors that the site does not have."""
    pages = {file: _Page(file.read_text("utf-8")) for file in folder.rglob("*.html")}
    found = []
    for file, page in pages.items():
        if "_static" in file.parts or "_modules" in file.parts:
            continue
        for target in page.targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                continue
            other = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if other.is_dir():
                other = other / "index.html"
            anchor = unquote(parts.fragment)
            lacks = other in pages and anchor and anchor not in pages[other].anchors
            if not other.exists() or lacks:
                found.append(f"{file.relative_to(folder)}: {target}")
    return found


def names_without_a_page(folder: Path) -> list[str]:
    """Return public names without an entry in the API, or whose docstring has no example."""
    found = []
    for file in sorted((folder / "api").glob("fastvae*.html")):
        module = file.stem
        value = fastvae if module == "fastvae" else getattr(fastvae, module.removeprefix("fastvae."))
        anchors = _Page(file.read_text("utf-8")).anchors
        for name in value.__all__:
            member = getattr(value, name)
            if callable(member) and f"{module}.{name}" not in anchors:
                found.append(f"{module}.{name} has no entry")
    return found


def seen_in_a_browser(folder: Path) -> list[str]:
    """Return what is wrong with pages in a browser; nothing without one."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no Chromium here: pages were not opened in a browser", file=sys.stderr)
        return []
    found = []
    for page in PAGES:
        for width in WIDTHS:
            with tempfile.TemporaryDirectory() as temporary:
                wrapper = Path(temporary, "wrapper.html")
                address = (folder / f"{page}.html").as_uri()
                wrapper.write_text(WRAPPER.format(page=address, width=width), "utf-8")
                command = [
                    browser,
                    "--headless",
                    "--no-sandbox",
                    "--disable-gpu",
                    "--allow-file-access-from-files",
                ]
                command += [f"--user-data-dir={temporary}/data", f"--window-size={max(width, 600)},1600"]
                command += ["--virtual-time-budget=20000", "--dump-dom", wrapper.as_uri()]
                run = subprocess.run(command, capture_output=True, text=True, timeout=120)
            match = re.search(r"FOUND(\{.*?\})END", run.stdout)
            if match is None:
                found.append(f"{page} at {width} pixels: the browser said nothing: {run.stderr[-300:]}")
                continue
            seen = json.loads(match[1])
            print(f"{page} at {width} pixels: {seen}")
            if seen["scroll"] > 0 or seen["errors"] or seen["images"]:
                found.append(f"{page} at {width} pixels: {seen}")
    return found


def main(arguments: list[str]) -> int:
    (folder,) = map(Path, arguments)
    folder = folder.resolve()
    wrong = [*broken_links(folder), *names_without_a_page(folder), *seen_in_a_browser(folder)]
    print("\n".join(wrong) or f"{len(list(folder.rglob('*.html')))} pages, nothing wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
