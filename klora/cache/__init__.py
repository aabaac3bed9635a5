"""Fetched LoRA files on the disk: bounded, shared by processes, and lent only to whoever may have them.

library     a request's references -> paths: what is fetched once, and lent to whom
scope       for whom a file is                  refusals    what was refused lately
store       files by their sha256: whole, verified, pinned while in use
draft       a file in the making                room        how much may lie here, what goes first
refs        what references came to             folder      whose the root must be
pins        who uses what: flocks

Nothing here connects to anything: what asks and what fetches is handed in.
"""

from klora.cache.library import Borrowed, Library
from klora.cache.store import Store

__all__ = ["Borrowed", "Library", "Store"]
