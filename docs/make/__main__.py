"""Make the pages, then the site: ``python -m docs.make`` writes ``build/docs``, ``build/site``.

Pages written by hand are those of ``docs``; the rest (commands, tables, figures, what commands
print) is made here, so that it cannot be out of date.  ``--pages`` stops before the site.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from docs.make import pages

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build"
# A page loads from nowhere else: no scripts, styles, fonts or pictures of other hosts.
REMOTE = re.compile(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?https?:|"
                    r"<link[^>]*rel=[\"']?(?:stylesheet|preload|preconnect|icon)[^>]*https?:|"
                    r"url\([\"']?https?:|@import [\"']?https?:", re.I)  # fmt: skip


def main() -> None:
    """Write pages and site; a non-zero exit code if anything in them is not right."""
    shutil.rmtree(BUILD / "docs", ignore_errors=True)
    made = pages.every()
    for name, text in made.items():
        path = BUILD / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    shutil.copytree(ROOT / "docs" / "img", BUILD / "docs" / "img", dirs_exist_ok=True)
    config = BUILD / "mkdocs.yml"
    config.write_text(pages.configuration(sorted(made)))
    print(f"{len(made)} pages in {BUILD / 'docs'}", flush=True)
    if "--pages" in sys.argv:
        return
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "DISABLE_MKDOCS_2_WARNING": "true"}
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-f", str(config)]
    subprocess.run(words, check=True, env=quiet)
    check_private(BUILD / "site")


def check_private(site: Path) -> None:
    """Raise if a page of the site would ask another host for anything."""
    for path in sorted(site.rglob("*")):
        if path.suffix in (".html", ".css"):
            found = REMOTE.search(path.read_text())
            assert found is None, f"{path}: {found and found[0]}"


if __name__ == "__main__":
    main()
