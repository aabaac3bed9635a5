"""The upload of a training's folder to the Hugging Face hub."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # public by its documentation

from klora.errors import RequestError
from klora.training.writing import RESUME_STATE


def check_repo_id(repo_id: str) -> None:
    """Raise RequestError, before training starts, for a name that the hub would refuse."""
    try:
        validate_repo_id(repo_id if "/" in repo_id else "")
    except HFValidationError:
        seen = "a token" if repo_id.startswith("hf_") else repr(repo_id)  # pasted into the wrong field
        accepted = "owner/name, of letters, digits, '-', '_' and '.', at most 96 each, without '--' and '..'"
        raise RequestError(f"hf_repo_id is {seen}. Expected {accepted}.") from None


def push(folder: Path, repo_id: str, token: str, private: bool = True) -> str:
    """Upload a training's folder, without the state from which only its owner resumes; return the address. Raises
    RequestError.

    private: make the repository private, and refuse an existing one that is public.
    """
    api = HfApi(token=token)
    with _silenced():
        return _pushed(api, folder, repo_id, private)


@contextmanager
def _silenced() -> Iterator[None]:
    """In the block the hub's libraries log nothing: their lines show signed addresses, which give access."""
    loggers = [logging.getLogger(name) for name in ("huggingface_hub", "httpx2", "httpcore2")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _pushed(api: HfApi, folder: Path, repo_id: str, private: bool) -> str:
    try:
        address = api.create_repo(repo_id, private=private, exist_ok=True)
        # An existing repository stays as it is: create_repo does not make it private, nor raise.
        if private and not api.model_info(repo_id).private:
            seen = f"hf_repo_id is {repo_id!r}, which is public, and hf_private is true"
            raise RequestError(f"{seen}. Expected a private repository, or hf_private=false.")
        api.upload_folder(repo_id=repo_id, folder_path=folder, ignore_patterns=[RESUME_STATE, f"*/{RESUME_STATE}"])
    except RequestError:
        raise
    except Exception as error:  # a hub out of reach raises what its HTTP library raises, a portal a JSON error
        # Not chained: the hub may quote the token in what it answers, and logs show causes.
        raise RequestError(f"hf_repo_id is {repo_id!r}, but {_refusal(error)}") from None
    return str(address)


def _refusal(error: Exception) -> str:
    """What went wrong and what is expected, without what the error says."""
    if not isinstance(error, HfHubHTTPError):
        return f"the upload broke off ({type(error).__name__}). Expected a hub that can be reached and answers."
    accepted = {
        401: "a valid token with the right to write", 403: "a token with the right to write for this owner",
        404: "an owner for whom the token may write", 409: "a repository that nothing else changes meanwhile",
    }  # fmt: skip
    wanted = accepted.get(error.response.status_code, "a repository that takes the upload")
    return f"the hub refused it ({error.response.status_code}). Expected {wanted}."
