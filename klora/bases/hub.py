"""A repository of a base on the Hugging Face hub: what is in it, and its client. Never uses the machine's login."""

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.hf_api import RepoFile
from tqdm import tqdm

from klora.bases.table import Base
from klora.errors import BaseModelError

# What follows an address's question mark; and an address of which the client shows only the end.
_QUERY = re.compile(r"(https?://[^\s?'\"<>]*)\?[^\s'\"<>]*|\(…\)\S*")
# Those that log addresses, signed ones among them.
_LOGGERS = ("httpx2", "httpcore2.http11", "huggingface_hub.file_download", "huggingface_hub.utils._http")


class File(NamedTuple):
    """A file of a repository. size: in bytes; sha256: in hex, None for the small ones that git itself keeps."""

    path: str
    size: int
    sha256: str | None


class Repository:
    """A base's repository, read with a token or, without one, as anyone may. endpoint: the hub's address, None for
    huggingface.co's. public: whether no token is given and none is needed.

    Raises BaseModelError for a token that cannot be one.
    """

    def __init__(self, base: Base, token: str | None = None, endpoint: str | None = None) -> None:
        token = (token or "").strip() or None
        if token and not re.fullmatch("[!-~]+", token):  # a whole file of settings, say; the client would quote it
            raise BaseModelError(
                "HF_TOKEN, or the build's secret in its place, holds a space, a line break or a letter that no token "
                "has. Expected the token as it was issued and nothing else."
            )
        self.base = base
        self.public = token is None and not base.gated
        self.has_token = token is not None
        self._login: dict[str, Any] = {"token": token or False}  # None would be the machine's own
        self._endpoint = endpoint
        self._api = HfApi(endpoint=endpoint)

    def wanted(self) -> list[File]:
        """The base's files, of all that the hub lists."""
        base = self.base
        tree = self._api.list_repo_tree(base.repository, revision=base.revision, recursive=True, **self._login)
        files = [entry for entry in tree if isinstance(entry, RepoFile) and base.wants(entry.path)]
        return [File(file.path, file.size, file.lfs.sha256 if file.lfs else None) for file in files]

    def url(self, file: File) -> str:
        """The address at which anyone may fetch a public file."""
        return hf_hub_url(self.base.repository, file.path, revision=self.base.revision, endpoint=self._endpoint)

    def download(self, file: File, folder: Path, stopped: Callable[[], bool]) -> None:
        """Fetch a file into a folder by the hub's client, which resumes broken downloads; it ends soon after stopped()
        is true."""

        class Bar(tqdm):  # type: ignore[misc]  # untyped
            """In place of the client's progress bars: shows nothing, but ends the fetch when it is stopped."""

            monitor_interval = 0  # or a thread for each file would watch its bar, for as long as the process lives

            def __init__(self, *args: Any, **options: Any) -> None:
                super().__init__(*args, **options | {"disable": True})

            def update(self, n: float | None = 1) -> None:
                if stopped():
                    raise InterruptedError("the fetch was stopped")

        hf_hub_download(
            self.base.repository,
            file.path,
            revision=self.base.revision,
            local_dir=folder,
            endpoint=self._endpoint,
            tqdm_class=Bar,
            **self._login,
        )


def stay_offline() -> None:
    """Let no library of Hugging Face's go online from this process any more, for whatever reason."""
    constants.HF_HUB_OFFLINE = True  # HF_HUB_OFFLINE in the environment counts only before they are imported


def how_to_open(name: str, base: Base) -> str:
    """The sentence that says how to get access to a gated base."""
    return (
        f"{name} is gated: accept the licence at huggingface.co/{base.repository} and set HF_TOKEN to a token of the "
        "account that has."
    )


@contextmanager
def in_words(name: str, repository: Repository, target: Path) -> Iterator[None]:
    """Have every error in the block raised as a BaseModelError, in one sentence without signed addresses; they are
    kept out of what the hub's client logs, too."""
    try:
        with _logged_without_queries():
            yield
    except BaseModelError:
        raise
    except Exception as error:  # a hub out of reach raises what its HTTP library raises, a portal a JSON error
        if isinstance(error, OSError) and error.errno and error.strerror:
            raise BaseModelError(
                f"{name} cannot be written into {target}: {error.strerror}. Expected a disk with room for its files."
            ) from error
        raise BaseModelError(_refusal(name, repository, _origin(error))) from None  # the chain would show the address


def _origin(error: Exception) -> Exception:
    """The cause of a LocalEntryNotFoundError, which itself does not say what went wrong; else the error."""
    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return cause if isinstance(cause, Exception) else error


def _refusal(name: str, repository: Repository, error: Exception) -> str:
    base = repository.base
    if isinstance(error, GatedRepoError):
        return how_to_open(name, base)
    if repository.has_token and isinstance(error, HfHubHTTPError) and error.response.status_code == 401:
        return f"{name} cannot be fetched: Hugging Face does not know the token in HF_TOKEN. Expected a valid one."
    reason = " ".join(_QUERY.sub(r"\1", str(error)).split()) or type(error).__name__
    return (
        f"{name} cannot be fetched from {base.repository}: {reason.rstrip('.')}. "
        "What has come stays; the next attempt fetches the rest."
    )


class _WithoutQueries(logging.Filter):
    """Removes the queries of addresses from log lines: that of a gated file's address gives access to the file."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = _QUERY.sub(r"\1", record.getMessage()), ()
        return True


@contextmanager
def _logged_without_queries() -> Iterator[None]:
    with ExitStack() as undo:
        for logger in map(logging.getLogger, _LOGGERS):
            cleaner = _WithoutQueries()
            logger.addFilter(cleaner)
            undo.callback(logger.removeFilter, cleaner)
        yield
