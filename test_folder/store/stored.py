"""What is put into a store."""

from pathlib import Path

from klora.cache import Store
from klora.cache.refs import File, Moment, Ref
from klora.sources.deadline import Deadline
from test_folder.lending import ROOMY, sha256

SIZE = 1000


def opened(root: Path, max_bytes: int = ROOMY, min_free: int = 0) -> Store:
    return Store(root, max_bytes, min_free)


def put(store: Store, data: bytes, deadline: Deadline, name: str | None = None) -> str:
    """Publish a blob, with a ref of this name if it has one; its sha256."""
    with store.draft(len(data), deadline) as file:
        file.write(data)
        file.finish()
        with store.publish(file, sha256(data), deadline):
            if name:
                store.remember(ref(name, data), deadline)
    return sha256(data)


def ref(name: str, *files: bytes) -> Ref:
    return Ref(name, "public", tuple(File("k", f"{n}.x", sha256(f), len(f)) for n, f in enumerate(files)), Moment.now())


def blobs(root: Path) -> set[str]:
    return {path.name for path in (root / "blobs").iterdir()}
