"""The pictures of docs/img: python -m tests.browser.pictures docs/img   (make pictures)."""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

import loratool as lt
from tests.browser.chromium import SCHEMES, WIDTHS, browser, looking, view
from tests.browser.models import make_models
from tests.browser.scene import make_collection

MOST = 250_000
HEIGHT = {390: 1200, 1440: 1400}


def main(target: Path) -> None:
    """Make pages of a collection of 300 files, of two adapters, of an extraction; look at them."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_collection(folder / "loras")
        for file in [*(folder / "loras").glob("*alert*"), folder / "loras" / "broken.safetensors"]:
            file.unlink()
        make_models(folder)
        pages = {word: folder / f"{word}.html" for word in ("gallery", "compare", "extract")}
        lt.inspect(folder / "loras", html=pages["gallery"])
        lt.compare([folder / "style", folder / "sql"], html=pages["compare"])
        lt.extract(folder / "tuned", base=folder / "base", output=folder / "lora",
                   html=pages["extract"])  # fmt: skip
        with browser() as chrome:
            for word, file in pages.items():
                for width in WIDTHS:
                    for scheme in SCHEMES:
                        size = view(width, HEIGHT[width])
                        with looking(chrome, file, viewport=size, color_scheme=scheme) as (page, _):
                            taken = page.screenshot()
                        save(target / f"{word}-{scheme}-{width}.png", taken)


def save(path: Path, data: bytes) -> None:
    """As small as it gets without another colour."""
    from PIL import Image

    Image.open(io.BytesIO(data)).convert("RGB").save(path, optimize=True)
    print(f"{path.name}  {path.stat().st_size // 1000} kB")
    assert path.stat().st_size <= MOST, path


if __name__ == "__main__":
    main(Path(sys.argv[1]))
