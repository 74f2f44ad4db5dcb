"""Install torchvision only for tests, because vLLM's multimodal models import it.

Usage: torchvision_cpu.py FOLDER.  The published build is for CUDA and fails beside a CPU torch,
since its operators cannot be loaded and it registers what they do on the meta device. Without
these registrations its Python code works, which is all that processors of images need.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

VERSION = "0.28.0"


def main(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--progress-bar", "off", "--no-deps"]
    target = ["--upgrade", "--target", str(folder), f"torchvision=={VERSION}"]
    subprocess.run([*pip, *target], check=True)
    (folder / "torchvision" / "_meta_registrations.py").write_text("")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
