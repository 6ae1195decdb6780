"""Builds the site: ``python .ci/docs/build.py`` writes ``site/``, without network; any warning is an error.

The pages are docs/, and those made here from the code: the command line from its parser, notebooks from their cells.
All are put together in build/docs, where Zensical reads them (mkdocs.yml).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / ".ci"), str(ROOT / ".ci" / "docs")]
PAGES, SITE = ROOT / "build" / "docs", ROOT / "site"
FONT = "STIXTwoMath-Regular.ttf"

# A page opened from the file system may not start the search worker from a file, but may start it from a string.
LOCAL_WORKER = """if (location.protocol === "file:") {
  const code = new Blob([%s], { type: "text/javascript" })
  const Native = window.Worker
  window.Worker = function () { return new Native(URL.createObjectURL(code)) }
}
"""


def gather() -> None:
    """All pages in build/docs."""
    from commands import write_pages
    from rooms import picture

    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.copytree(ROOT / "docs", PAGES)
    write_pages(PAGES / "command-line")
    contributing = PAGES / "contributing.md"
    contributing.write_text(
        contributing.read_text(encoding="utf-8").replace("<!-- rooms -->", picture()), encoding="utf-8"
    )
    for notebook in sorted(PAGES.rglob("*.ipynb")):
        convert_notebook(notebook)
    fonts = PAGES / "assets" / "fonts"
    fonts.mkdir(parents=True)
    shutil.copy(str(files("ziamath.fonts") / FONT), fonts / FONT)


def convert_notebook(notebook: Path) -> None:
    """A page in the notebook's place, with its pictures next to it."""
    from notebook_pages import as_page

    page = as_page(json.loads(notebook.read_text(encoding="utf-8")), notebook.stem)
    notebook.with_suffix(".md").write_text(page.markdown, encoding="utf-8")
    for name, picture in page.pictures.items():
        notebook.with_name(name).write_bytes(picture)


def main() -> None:
    """Gather the pages, build the site, and make its search work from the file system."""
    gather()
    shutil.rmtree(SITE, ignore_errors=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path[:3])}  # mkdocs.yml names our extensions
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "-f", str(ROOT / "mkdocs.yml")],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    warnings, _, _ = done.stderr.partition("Traceback")  # which --strict ends with
    print(warnings, end="")
    if done.returncode:
        sys.exit(f"the site was not built: {'see above' if warnings else done.stderr}")
    (worker,) = (SITE / "assets" / "javascripts" / "workers").glob("search.*.js")
    script = LOCAL_WORKER % json.dumps(worker.read_text(encoding="utf-8"))
    (SITE / "assets" / "iframe-worker.js").write_text(script, encoding="utf-8")
    (SITE / "404.html").unlink(missing_ok=True)  # its links start at a server's root, so they are dead in a file
    for page in SITE.rglob("*.html"):
        if 'src="https:' in page.read_text(encoding="utf-8"):
            sys.exit(f"{page} loads a script from the network")
    print(f"{SITE}/index.html")


if __name__ == "__main__":
    main()
