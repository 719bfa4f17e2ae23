"""Draws docs/images/report.png: the top of a run's page, in Chromium.

python docs/screenshot.py runs/quickstart
"""

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PICTURE = Path(__file__).resolve().parent / "images" / "report.png"
WIDTH, HEIGHT = 1180, 1130


def main(run: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Chromium is not installed")
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}",
             "--virtual-time-budget=10000", f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={PICTURE}",
             (run / "report.html").resolve().as_uri()],
            check=True, capture_output=True,
        )  # fmt: skip
    print(f"wrote {PICTURE} ({PICTURE.stat().st_size / 1000:.0f} kB)")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
