"""What the Python programs of this folder share: they set up .venv and run in it, and one can use another.

Any Python can import this.
"""

import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent


def enter() -> None:
    """Start the program again in .venv, once that is there, unless it runs there; the repository can be imported."""
    subprocess.run([ROOT / "script" / "setup"], check=True)
    python = ROOT / ".venv" / "bin" / "python"
    if Path(sys.prefix) != python.parent.parent:
        os.execv(python, [python, *sys.argv])
    sys.path.insert(0, str(ROOT))


def program(name: str) -> ModuleType:
    """Another program of this folder, as a module of its own at each call."""
    loader = SourceFileLoader(name.replace("-", "_"), str(ROOT / "script" / name))
    spec = spec_from_loader(loader.name, loader)
    assert spec
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module
