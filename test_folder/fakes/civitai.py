"""CivitAI: models, versions and files by number; downloads that lead to a storage elsewhere, or to a login page."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from test_folder.fakes import Reply, Request, Server, Storage

AGENT = "klora"  # others are turned away at the door, as libraries are


@dataclass
class File:
    """content: also what its size and sha256 are told from, unless claims says otherwise."""

    number: int
    name: str = "lora.safetensors"
    content: bytes = b""
    kind: str = "Model"
    format: str | None = "SafeTensor"
    primary: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    claims: dict[str, Any] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        metadata = self.metadata | ({"format": self.format} if self.format else {})
        hashes = {"SHA256": hashlib.sha256(self.content).hexdigest().upper()}
        facts = {"id": self.number, "name": self.name, "type": self.kind, "sizeKB": len(self.content) / 1024}
        primary = {"primary": True} if self.primary else {}
        return facts | {"metadata": metadata, "hashes": hashes} | primary | self.claims

    def has(self, query: dict[str, str]) -> bool:
        """Whether a download link means this one."""
        told = {"type": self.kind, "format": self.format, **self.metadata}
        return all(told.get(key) == value for key, value in query.items())


@dataclass
class Version:
    """members_only: an account is needed.  early: only buyers may have it.  facts: what is told of it besides."""

    number: int
    model: int
    files: list[File]
    members_only: bool = False
    early: bool = False
    facts: dict[str, Any] = field(default_factory=dict)


class Civitai(Server):
    """tokens_issued: any other is refused.  buyers: tokens that may have what is early.  kinds, and
    claims, which are told instead of the truth: by a model's number.
    """

    def __init__(self, storage: Storage) -> None:
        super().__init__()
        self.storage = storage
        self.versions: dict[int, Version] = {}
        self.kinds: dict[int, str] = {}
        self.claims: dict[int, dict[str, Any]] = {}
        self.tokens_issued: set[str] = set()
        self.buyers: set[str] = set()

    def publish(self, model: int, version: int, /, *files: File, kind: str = "LORA", **facts: Any) -> Version:
        """A new version, the newest one of its model."""
        self.kinds[model] = kind
        told = {key: facts.pop(key) for key in list(facts) if key not in ("members_only", "early")}
        self.versions[version] = Version(version, model, list(files), facts=told, **facts)
        return self.versions[version]

    def answer(self, request: Request) -> Reply:
        if not (request.headers["User-Agent"] or "").startswith(AGENT):
            return Reply(403, b"<html>blocked</html>")
        if request.token not in (None, *self.tokens_issued):
            return _json(401, {"error": "Unauthorized"})
        match request.path.strip("/").split("/"):
            case ["api", "v1", "models", number] if int(number) in self.kinds:
                return self._model(int(number))
            case ["api", "v1", "model-versions", number] if int(number) in self.versions:
                return _json(200, self._told(self.versions[int(number)]))
            case ["api", "download", "models", number] if int(number) in self.versions:
                return self._download(request, self.versions[int(number)])
            case ["login"]:
                return Reply(200, b"<!DOCTYPE html><title>Log in</title>", {"Content-Type": "text/html"})
        return _json(404, {"error": "Not found"})

    def _model(self, number: int) -> Reply:
        versions = [version for version in self.versions.values() if version.model == number]
        told = [self._told(version) for version in reversed(versions)]
        model = {"id": number, "type": self.kinds[number], "modelVersions": told}
        return _json(200, model | self.claims.get(number, {}))

    def _told(self, version: Version) -> dict[str, Any]:
        told = {"id": version.number, "modelId": version.model, "model": {"type": self.kinds[version.model]}}
        return told | {"files": [file.told() for file in version.files]} | version.facts

    def _download(self, request: Request, version: Version) -> Reply:
        speaks_json = request.headers["Content-Type"] == "application/json"
        if version.members_only and request.token is None:
            refusal = _json(401, {"error": "Unauthorized", "message": "requires you to be logged in"})
            return refusal if speaks_json else Reply(307, headers={"Location": "/login?returnUrl=/"})
        if version.early and request.token not in self.buyers:
            return _json(403, {"error": "Early Access"}) if speaks_json else Reply(307, headers={"Location": "/login"})
        file = next((file for file in version.files if file.has(dict(request.query))), None)
        if file is None:
            return _json(404, {"error": "File not found"})
        return Reply(307, headers={"Location": self.storage.signed(f"/civitai/{file.number}", file.content)})


def _json(status: int, value: Any) -> Reply:
    return Reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})
