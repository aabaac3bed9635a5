"""The LoRA files of a request: from the cache where they are and may be had, else fetched, all of them at once.

A user is given only what the authority allows that user: what lies here is lent to whoever fetched it in the same
scope, for at most MAX_AGE seconds after the authority was last asked.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, cast

from klora.cache.draft import STEP, DiskError, DiskFullError, Draft
from klora.cache.pins import Pin
from klora.cache.refs import MAX_AGE, PUBLIC, File, Moment, Ref, ref_name
from klora.cache.refusals import Refusals
from klora.cache.scope import Tokens, scope_of
from klora.cache.store import Loan, Store
from klora.errors import KLoRAError, SourceError
from klora.interruptible import interruptible
from klora.sources.deadline import Deadline
from klora.sources.download import Denied, Download, NotFound, Unreachable, base_of, family_of
from klora.sources.kinds import CivitaiFile, Data, Reference

logger = logging.getLogger(__name__)

Resolve = Callable[[Reference, Tokens, Deadline], tuple[Download, ...]]
Fetch = Callable[[Download, Draft, Deadline], str]


class Library:
    """The LoRA files that requests borrow: from the store, or fetched into it.

    resolve: asks the authority what a reference comes to now; the LoRA is the first download.   fetch: writes a
    download into a draft, and returns its sha256 in hex; both raise SourceError.   check: raises SourceError for a
    damaged file.
    """

    def __init__(self, store: Store, resolve: Resolve, fetch: Fetch, check: Callable[[Path], None]) -> None:
        self._store, self._resolve, self._fetch, self._check = store, resolve, fetch, check
        self._secret = store.secret()
        self._refusals = Refusals()

    @contextmanager
    def borrowed(
        self,
        references: Mapping[str, Reference],
        tokens: Tokens,
        deadline: Deadline,
        bases: Mapping[str, str] = MappingProxyType({}),
    ) -> Iterator[dict[str, "Borrowed"]]:
        """The file of each reference by its input, all fetched at the same time, unchanged until the end of the block.

        What a PEFT repository has beside its .safetensors file lies beside it. The first failure ends all: raises
        SourceError, NotFound, Denied, Unreachable or CacheFullError. The deadline is then cancelled.
        tokens: by authority, "hf", "civitai", "replicate".   bases: {name: family}; a LoRA that its authority states to
        be for none of these families is refused. Without any, none is.
        """
        with ExitStack() as loans:
            queries = {
                name: _Query(reference, scope_of(reference, tokens, self._secret), tokens, deadline, bases)
                for name, reference in references.items()
            }
            yield interruptible(lambda: self._borrow_all(queries, deadline, loans), deadline.cancel)

    def _borrow_all(
        self, queries: Mapping[str, "_Query"], deadline: Deadline, loans: ExitStack
    ) -> dict[str, "Borrowed"]:
        with ThreadPoolExecutor(max(1, len(queries)), "lora") as pool:
            futures = {name: pool.submit(self._borrow_named, name, query, loans) for name, query in queries.items()}
            try:
                for future in as_completed(futures.values()):
                    future.result()
            except BaseException:
                deadline.cancel()  # or leaving the pool would wait for downloads that nobody wants
                raise
        return {name: future.result() for name, future in futures.items()}

    def _borrow_named(self, name: str, query: "_Query", loans: ExitStack) -> "Borrowed":
        """_borrow(), with the name of the input in front of an error's text. Errors that are remembered have none:
        another request may name the same LoRA in another input."""
        try:
            return self._borrow(query, loans)
        except KLoRAError as error:
            raise type(error)(f"{name}: {error}") from error

    def _borrow(self, query: "_Query", loans: ExitStack) -> "Borrowed":
        start, reference = time.monotonic(), query.reference
        found = self._data(reference, query.deadline) if isinstance(reference, Data) else self._look_up(query)
        loans.callback(found.loan.close)  # a deque's append: safe from several threads
        ref = found.ref
        _check_pin(reference, ref.files[0].sha256)
        _check_base(query, ref.base_model)
        logger.info("%s: %s, %d bytes, %.3f s", reference, found.how, ref.size, time.monotonic() - start)
        if ref.base_model or ref.triggers:
            logger.info("%s", _description(ref))
        return Borrowed(found.loan.paths[0], self._store.scores(ref.files), ref.triggers, base_of(ref.base_model))

    def _look_up(self, query: "_Query") -> "_Result":
        if found := self._cached(query):
            return found
        with self._store.flight(query.name, query.deadline):
            return self._cached(query) or self._ask_authority(query)

    def _cached(self, query: "_Query") -> "_Result | None":
        """What can be lent without asking the authority: it was allowed lately, and is the pinned file if there is a
        pin; if it is not, the authority may have another by now. Raises again what was refused lately."""
        ref, pin = self._store.refs.get(query.name), query.reference.pin
        known = ref and ref.authorised.is_recent(MAX_AGE) and pin in (None, ref.files[0].sha256)
        if ref and known and (loan := self._store.lend(ref.files)):
            self._store.refs.touch(query.name)
            return _Result(loan, ref, "hit")
        self._refusals.check(query.name)
        return None

    def _ask_authority(self, query: "_Query") -> "_Result":
        """What the authority allows now, or what it last allowed everybody if it does not answer."""
        known = self._store.refs.get(query.name)
        try:
            with self._heeding_refusals(query):
                downloads = self._resolve(query.plain, query.tokens, query.deadline)
        except Unreachable as error:
            if query.scope == PUBLIC and known and (loan := self._store.lend(known.files)):
                self._store.refs.touch(query.name)
                logger.warning("%s: the copy in the cache serves, for it cannot be asked for: %s", query.plain, error)
                return _Result(loan, known, "stale")
            raise
        if query.scope == PUBLIC and any(download.credential for download in downloads):
            raise RuntimeError(f"{query.plain} was asked for with a credential that the request did not bring")
        lora = downloads[0]
        _check_pin(query.reference, lora.sha256)
        _check_base(query, lora.base_model)
        return self._fetch_making_room(query, downloads, known)

    @contextmanager
    def _heeding_refusals(self, query: "_Query") -> Iterator[None]:
        """Remember that a reference is refused, and forget its ref, which must not serve when the authority is
        silent."""
        try:
            with self._refusals.remembering(query.name):
                yield
        except (NotFound, Denied):
            self._store.refs.forget(query.name)
            raise

    def _fetch_making_room(self, query: "_Query", downloads: tuple[Download, ...], known: Ref | None) -> "_Result":
        """_fetch_missing(), and once more after an eviction if the disk was full."""
        try:
            return self._fetch_missing(query, downloads, known)
        except DiskFullError:
            if not self._store.evict(sum(download.size or STEP for download in downloads), query.deadline):
                raise
            return self._fetch_missing(query, downloads, known)

    def _fetch_missing(self, query: "_Query", downloads: tuple[Download, ...], known: Ref | None) -> "_Result":
        """Have every download as a blob, fetched where it is missing, and write the ref that names them."""
        before = {file.key: file.sha256 for file in known.files} if known else {}
        how, files = "revalidated", []
        with ExitStack() as pins:
            for download in downloads:
                sha256 = download.sha256 or before.get(download.key)
                held = self._store.blob(sha256) if sha256 else None
                if held is None:
                    with self._heeding_refusals(query):
                        sha256, held = self._download(download, query.deadline)
                    how = "fetched"
                pins.enter_context(held)
                files.append(File(download.key, download.name, cast(str, sha256), held.size()))
            lora = downloads[0]
            ref = Ref(str(query.plain), query.scope, tuple(files), Moment.now(), lora.base_model, lora.triggers)
            self._store.remember(ref, query.deadline)
            return _Result(self._lent(ref.files), ref, how)

    def _download(self, download: Download, deadline: Deadline) -> tuple[str, Pin]:
        with self._store.draft(download.size, deadline) as draft:
            sha256 = self._fetch(download, draft, deadline)
            draft.finish()
            if download.holds_weights:
                self._check(draft.path)
            return sha256, self._store.publish(draft, sha256, deadline)

    def _data(self, reference: Data, deadline: Deadline) -> "_Result":
        """The file that came within a request, as a blob without a ref: it is the first to be evicted."""
        name = "data.tar" if reference.payload[257:262] == b"ustar" else "data.safetensors"
        files = (File(str(reference), name, reference.sha256, len(reference.payload)),)
        ref = Ref(str(reference), PUBLIC, files, Moment.now())
        if loan := self._store.lend(files):
            return _Result(loan, ref, "hit")
        with self._store.draft(len(reference.payload), deadline) as draft:
            draft.write(reference.payload)
            draft.finish()
            self._check(draft.path)
            with self._store.publish(draft, reference.sha256, deadline):
                return _Result(self._lent(files), ref, "kept")

    def _lent(self, files: tuple[File, ...]) -> Loan:
        """A loan of files whose blobs are pinned already."""
        if (loan := self._store.lend(files)) is None:
            raise DiskError("The LoRA cache does not give back what was written to it. Expected a disk that works.")
        return loan


class Borrowed(NamedTuple):
    """A LoRA file, under its own name.  scores: of a fetched one, the path at which its scores are stored for the next
    time.  triggers, base: words that call it, and the base that it was made for, "" for none of ours, as its
    authority says."""

    path: Path
    scores: Path | None = None
    triggers: tuple[str, ...] = ()
    base: str = ""


class _Result(NamedTuple):
    """A ref and a loan of its files. how: a word for the log: "hit", "stale", "revalidated", "fetched" or "kept"."""

    loan: Loan
    ref: Ref
    how: str


@dataclass(frozen=True)
class _Query:
    """A reference, and for whom, until when and for which bases one request wants it."""

    reference: Reference
    scope: str
    tokens: Tokens = field(repr=False)
    deadline: Deadline
    bases: Mapping[str, str]

    @property
    def plain(self) -> Reference:
        """The reference without its pin, which only checks: it makes no other ref and selects no blob."""
        return replace(self.reference, pin=None)

    @property
    def name(self) -> str:
        """The name of its ref, its flight and its refusals."""
        return ref_name(str(self.plain), self.scope)


def _check_pin(reference: Reference, sha256: str | None) -> None:
    if reference.pin and sha256 and reference.pin != sha256:
        raise SourceError(
            f"{replace(reference, pin=None)} has the sha256 {sha256}, and not the pinned {reference.pin}. "
            "Expected the file that was pinned, or another pin."
        )


def _check_base(query: _Query, base_model: str | None) -> None:
    family = family_of(base_model)
    if query.bases and family is not None and family not in query.bases.values():
        newest = isinstance(query.plain, CivitaiFile) and query.plain.version is None
        raise SourceError(
            f"{query.plain} was made for {base_model!r:.60}, as its page says. "
            f"Expected a LoRA for {' or '.join(query.bases)}{', or the number of a version that is' if newest else ''}."
        )


def _description(ref: Ref) -> str:
    """What the authority says of a reference, in a line for the log."""
    facts = [f"made for {ref.base_model!r:.60}"] if ref.base_model else []
    facts += [f"called by {', '.join(map(repr, ref.triggers))}"] if ref.triggers else []
    return f"{ref.reference}: {', '.join(facts)}, as its page says"
