"""The cache's folder: whose it must be, what lies where, and the secret that it keeps."""

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

from klora.cache.pins import alone
from klora.errors import SourceError
from klora.sources.deadline import Deadline

_ROOMS = ("blobs", "refs", "scores", "tmp", "locks", "quarantine")
_SECRET_BYTES = 32
_PATIENCE = 10.0  # seconds for another process to make the secret


@dataclass(frozen=True)
class Folder:
    """A root that is this user's own, and the folders in it, mode 0700."""

    root: Path

    @property
    def blobs(self) -> Path:
        """Whole files by their sha256, mode 0400."""
        return self.root / "blobs"

    @property
    def refs(self) -> Path:
        """What is known of references: JSON files."""
        return self.root / "refs"

    @property
    def scores(self) -> Path:
        """Scores of LoRAs: a JSON file each, called by the sha256 of the blobs that the LoRA is read from."""
        return self.root / "scores"

    @property
    def drafts(self) -> Path:
        """Files in the making, and a folder for each loan, of hard links to blobs."""
        return self.root / "tmp"

    @property
    def locks(self) -> Path:
        """Lock files; each is gone when it is released."""
        return self.root / "locks"

    @property
    def quarantine(self) -> Path:
        """What lay in a blob's place and was none."""
        return self.root / "quarantine"

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        disk = os.statvfs(self.root)
        return disk.f_bavail * disk.f_frsize

    def secret(self) -> bytes:
        """The key of scopes' hashes: made where there is none, the same for every process and after a restart."""
        path = self.root / "secret"
        with alone(self.locks / "secret", Deadline(_PATIENCE)):
            return _read_secret(path) or _make_secret(path)


def open_folder(root: Path) -> Folder:
    """The folder at root, made where there is none. Raises SourceError where others could meddle with it."""
    root = root.absolute()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check(root)
        for room in _ROOMS:
            (root / room).mkdir(mode=0o700, exist_ok=True)
            _check(root / room)
        folder = Folder(root)
        folder.secret()  # fails now, and not in a request, where the disk cannot be written
    except OSError as error:
        raise SourceError(
            f"The LoRA cache cannot be at {root}: {error.strerror}. Expected KLORA_CACHE to say where it can."
        ) from error
    return folder


def sync(folder: Path) -> None:
    """Make the names in a folder outlast a crash."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check(path: Path) -> None:
    """Refuse what somebody else could write in, or have put there to lead elsewhere."""
    status = path.lstat()
    faults = {
        "a symbolic link": stat.S_ISLNK(status.st_mode),
        "no folder": not stat.S_ISDIR(status.st_mode),
        f"owned by user {status.st_uid}": status.st_uid != os.geteuid(),
        f"writable by others (mode {stat.S_IMODE(status.st_mode):o})": bool(status.st_mode & 0o022),
    }
    for fault, present in faults.items():
        if present:
            raise SourceError(
                f"The LoRA cache cannot be at {path}, which is {fault}. "
                f"Expected a folder of user {os.geteuid()} that nobody else may write, mode 0700."
            )


def _read_secret(path: Path) -> bytes | None:
    """None where it is missing, cut short, or for others to read."""
    try:
        with path.open("rb") as file:
            secret, status = file.read(_SECRET_BYTES), os.fstat(file.fileno())
    except FileNotFoundError:
        return None
    trusted = status.st_uid == os.geteuid() and not status.st_mode & 0o077
    return secret if trusted and len(secret) == _SECRET_BYTES else None


def _make_secret(path: Path) -> bytes:
    secret = secrets.token_bytes(_SECRET_BYTES)
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(secret)
        os.fsync(file.fileno())
    return secret
