"""Replicate's pages of trained models, which lead to tars that lie elsewhere."""

from test_folder.fakes import Reply, Request, Server


class Replicate(Server):
    """weights: the address of a tar by "owner/name" or "owner/name:version".  readers: tokens, of what is private.

    moved: pages that lead to another page, by path.  failing: a status for every answer instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weights: dict[str, str] = {}
        self.readers: dict[str, set[str]] = {}
        self.moved: dict[str, str] = {}
        self.pages: set[str] = set()
        self.failing: int | None = None

    def answer(self, request: Request) -> Reply:
        if self.failing:
            return Reply(self.failing)
        if request.path in self.moved:
            return Reply(302, headers={"Location": self.moved[request.path]})
        if request.path in self.pages:
            return Reply(200, b"<!DOCTYPE html><title>A model</title>")
        match request.path.strip("/").split("/"):
            case [owner, name, "_weights"]:
                model, known = f"{owner}/{name}", f"{owner}/{name}"
            case [owner, name, "versions", version, "_weights"]:
                model, known = f"{owner}/{name}", f"{owner}/{name}:{version}"
            case _:
                return Reply(404, b"<!DOCTYPE html><title>Not found</title>")
        if known not in self.weights:
            return Reply(404, b"<!DOCTYPE html><title>Not found</title>")
        if model in self.readers and request.token not in self.readers[model]:
            return Reply(302, headers={"Location": f"/signin?next={request.path}"})
        return Reply(302, headers={"Location": self.weights[known]})
