"""Picture of a run's report, as the README shows it, taken by an installed Chromium.

    python benchmarks/report_picture.py RUN -o docs/report.png

Needs `chromium` or `google-chrome` on the PATH (Debian: apt-get install chromium); nothing is
fetched. --dark draws the dark palette, --height cuts the page after so many pixels.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from bitplan.errors import BitplanError
from bitplan.reports.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--virtual-time-budget=15000",
)


def take_picture(
    page: Path, picture: Path, *, width: int, height: int, scale: float, dark: bool
) -> None:
    """Draw the page in a browser without a window and write a PNG of its top."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        raise SystemExit(f"no browser found: install one of {', '.join(BROWSERS)}")
    theme = "dark" if dark else "light"
    picture = picture.resolve()
    picture.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        themed = Path(scratch) / "report.html"
        html = page.read_text(encoding="utf-8")
        themed.write_text(html.replace("<html ", f'<html data-theme="{theme}" ', 1), "utf-8")
        command = [
            browser,
            *FLAGS,
            f"--user-data-dir={scratch}/profile",
            f"--window-size={width},{height}",
            f"--force-device-scale-factor={scale}",
            f"--screenshot={picture}",
            themed.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    if done.returncode != 0 or not picture.is_file():
        raise SystemExit(f"{browser} made no picture: {done.stderr.strip()[-500:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/report.png"))
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=1180)
    parser.add_argument("--scale", type=float, default=1.5, help="pixels per CSS pixel")
    parser.add_argument("--dark", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            page = write_report([given.run], Path(scratch) / "report.html").path
        except BitplanError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        take_picture(
            page,
            given.output,
            width=given.width,
            height=given.height,
            scale=given.scale,
            dark=given.dark,
        )
    print(f"{given.output} ({given.output.stat().st_size / 1e3:.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
