"""A program in pget's place. How it behaves is in a file beside it, for its environment has to be empty."""

import hashlib
import json
import sys
from pathlib import Path

PGET = """#!{python} -I
import argparse, json, os, pathlib, subprocess, sys, time, urllib.request

parser = argparse.ArgumentParser()
parser.add_argument("-f", "--force", action="store_true")
parser.add_argument("-c", "--concurrency", type=int)
parser.add_argument("-m", "--chunk-size")
parser.add_argument("--pid-file", default="/run/pget.pid")
parser.add_argument("url")
parser.add_argument("dest", type=pathlib.Path)
given = parser.parse_args()
here = pathlib.Path(__file__).parent
how = (here / "how").read_text()
pathlib.Path(given.pid_file).write_text(str(os.getpid()))
pids = [os.getpid()]
if how == "hang":
    pids.append(subprocess.Popen(["sleep", "60"]).pid)
with (here / "runs").open("a") as runs:
    runs.write(json.dumps(dict(argv=sys.argv, environ=dict(os.environ), pids=pids)) + "\\n")
if given.dest.exists() and not given.force:
    sys.exit("destination exists")
body = urllib.request.urlopen(given.url).read()
if how == "nothing":
    sys.exit(0)
if how == "wrong":
    body = body[:-1] + bytes([body[-1] ^ 1])
if how in ("partial", "hang"):
    body = body[: len(body) // 2]
given.dest.write_bytes(body)
if how == "hang":
    time.sleep(60)
os.remove(given.pid_file)
sys.exit(how == "partial")
"""


class FakePget:
    """The program and what it was run with."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.path = folder / "pget"
        self.path.write_text(PGET.replace("{python}", sys.executable))
        self.path.chmod(0o755)
        self.sha256 = hashlib.sha256(self.path.read_bytes()).hexdigest()
        self.behave("well")

    def behave(self, how: str) -> None:
        (self.path.parent / "how").write_text(how)

    def runs(self) -> list[dict[str, list[str]]]:
        runs = self.path.parent / "runs"
        return [json.loads(line) for line in runs.read_text().splitlines()] if runs.exists() else []


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
