"""What the Python programs of this folder begin with: set up .venv, and run in it. Any Python can import this."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def enter() -> None:
    """Start the program again in .venv, once that is there, unless it runs there; the repository can be imported."""
    subprocess.run([ROOT / "script" / "setup"], check=True)
    python = ROOT / ".venv" / "bin" / "python"
    if Path(sys.prefix) != python.parent.parent:
        os.execv(python, [python, *sys.argv])
    sys.path.insert(0, str(ROOT))
