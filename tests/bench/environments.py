"""Rivals' packages, in environments of their own that the benches make themselves.

An environment lies on top of ours: it sees our packages and adds the rival's, so that torch is not
installed twice and both sides run the same versions of what they share.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig

from lib import storage


def rival_python(name: str, *packages: str) -> str:
    """The Python of `.whorl/bench/envs/NAME` with `packages` (exact versions) on top of ours."""
    folder = storage.PROJECT / ".whorl" / "bench" / "envs" / name
    python = folder / "bin" / "python"
    wanted = folder / "packages.txt"
    if not wanted.is_file() or wanted.read_text().split() != list(packages):
        print(f"installing {', '.join(packages)} into {folder}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        ours = folder / "lib" / version / "site-packages" / "ours.pth"
        ours.write_text(sysconfig.get_paths()["purelib"] + "\n")
        # Dependencies are ours already; resolving them again could bring in another torch.
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", *packages], check=True)
        wanted.write_text("\n".join(packages))
    return str(python)
