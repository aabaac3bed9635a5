"""A Hugging Face hub: repositories, their commits, who may read them, and a storage elsewhere for large files."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlencode

from test_folder.fakes import Reply, Request, Server, Storage, ranged

LARGE = (".safetensors", ".tar", ".bin", ".pt")


@dataclass
class Repository:
    """branches: commit by name.  commits: files by path, by commit.  readers: tokens; None: everybody may.

    gated: everybody may list it, readers may read it.  claims: what is said of a file instead of the truth, by path.
    """

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    card: Mapping[str, Any] = field(default_factory=dict)
    readers: set[str] | None = None
    gated: bool = False
    claims: dict[str, Mapping[str, Any]] = field(default_factory=dict)


class Hub(Server):
    """tokens_issued: any other is refused everywhere.  storage: where large files are sent for, if there is one.

    failing: a status for every answer instead.  renamed: repositories' new names, by the old ones.
    """

    def __init__(self, storage: Storage | None = None) -> None:
        super().__init__()
        self.storage = storage
        self.repositories: dict[str, Repository] = {}
        self.tokens_issued: set[str] = set()
        self.failing: int | None = None
        self.renamed: dict[str, str] = {}

    def publish(self, name: str, files: Mapping[str, bytes], branch: str = "main", **facts: Any) -> str:
        """Commit these files, and no others, to a branch. facts: of the repository from now on. Returns the commit."""
        repository = self.repositories.setdefault(name, Repository())
        commit = hashlib.sha1(json.dumps([name, branch, len(repository.commits)]).encode()).hexdigest()
        repository.commits[commit] = dict(files)
        repository.branches[branch] = commit
        for fact, value in facts.items():
            setattr(repository, fact, value)
        return commit

    def answer(self, request: Request) -> Reply:
        if self.failing:
            return Reply(self.failing)
        if request.token not in (None, *self.tokens_issued):
            return _error(401, "", "Invalid credentials in Authorization header")
        kind, name, rest = _split(request.path)
        if name in self.renamed:
            query = f"?{urlencode(request.query)}" if request.query else ""
            return Reply(307, headers={"Location": request.path.replace(name, self.renamed[name]) + query})
        repository = self.repositories.get(name)
        if repository is None:
            return _error(401 if request.token is None else 404, "RepoNotFound")
        may_read = repository.readers is None or request.token in repository.readers
        if not may_read and not repository.gated:
            return _error(401 if request.token is None else 404, "RepoNotFound")
        if not may_read and (kind == "resolve" or rest == ["auth-check"]):
            return _error(401 if request.token is None else 403, "GatedRepo")
        return self._told(repository, name, rest) if kind == "api" else self._file(repository, request, name, rest)

    def _told(self, repository: Repository, name: str, rest: list[str]) -> Reply:
        if rest == ["auth-check"]:
            return Reply()
        commit = _commit(repository, rest[1] if rest[:1] == ["revision"] else "main")
        if commit is None:
            return _error(404, "RevisionNotFound")
        siblings = [_sibling(path, body, repository) for path, body in repository.commits[commit].items()]
        told = {"id": name, "sha": commit, "siblings": siblings, "cardData": repository.card}
        return Reply(body=json.dumps(told | {"gated": "auto" if repository.gated else False}).encode())

    def _file(self, repository: Repository, request: Request, name: str, rest: list[str]) -> Reply:
        commit, path = _commit(repository, rest[0]), "/".join(rest[1:])
        if commit is None or path not in repository.commits[commit]:
            return _error(404, "EntryNotFound" if commit else "RevisionNotFound")
        content = repository.commits[commit][path]
        if self.storage is None or not path.endswith(LARGE):
            return ranged(request, content, {"X-Repo-Commit": commit})
        location = self.storage.signed(f"/{name}/{hashlib.sha256(content).hexdigest()}", content)
        return Reply(302, headers={"Location": location, "X-Repo-Commit": commit})


def _split(path: str) -> tuple[str, str, list[str]]:
    """("api" or "resolve", owner/name, what follows, decoded)."""
    parts = path.strip("/").split("/")
    if parts[:2] == ["api", "models"]:
        return "api", "/".join(parts[2:4]), [unquote(part) for part in parts[4:]]
    return "resolve", "/".join(parts[:2]), [unquote(part) for part in parts[3:]]


def _commit(repository: Repository, revision: str) -> str | None:
    return revision if revision in repository.commits else repository.branches.get(revision)


def _sibling(path: str, content: bytes, repository: Repository) -> dict[str, Any]:
    told: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()}
    if path.endswith(LARGE):
        told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return told | dict(repository.claims.get(path, {}))


def _error(status: int, code: str, message: str = "") -> Reply:
    headers = {"X-Error-Code": code} if code else {"X-Error-Message": message}
    return Reply(status, json.dumps({"error": message or code}).encode(), headers)
