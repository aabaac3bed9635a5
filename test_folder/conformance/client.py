"""A client of the HTTP contract that a Cog server keeps, in either mode. Knows nothing of where the server runs."""

import builtins
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from test_folder.conformance.payloads import in_order, pictures, pixels_of, upload

PROGRESS = re.compile(r"^\s*(\d+)%\s*\|.+?\|\s*(\d+)/(\d+)", re.MULTILINE)  # as Replicate's clients parse it
REFUSAL = re.compile(r"Prediction failed: (?:Prediction|Training) failed: (\w+): (.+)", re.DOTALL)


class Mode(NamedTuple):
    """What a server is started for: predictions or trainings.

    required: the one input without a default.   quick: inputs of a request that is soon done.   slow: of one that lasts
    until it is cancelled.   faulty: of one that is refused once it has begun, saying fault.
    """

    noun: str
    component: str
    required: str
    quick: Mapping[str, Any]
    slow: Mapping[str, Any]
    faulty: Mapping[str, Any]
    fault: str


BASES = os.environ.get("CONFORMANCE_BASES", "sdxl,flux-dev").split(",")  # that the servers have
_IMAGE = {
    "prompt": "a photo of a dog", "num_inference_steps": 2, "width": 64, "height": 64, "seed": 7,
    "output_format": "png", "disable_safety_checker": True,
}  # fmt: skip
_LORA = {
    "input_images": upload(*pictures()), "base_model": BASES[0], "steps": 1, "lora_rank": 2, "seed": 3,
    "resolution": "64", "sample_steps": 0, "gradient_checkpointing": "off",
}  # fmt: skip
PREDICT = Mode(
    "predictions", "Input", "prompt", _IMAGE, _IMAGE | {"num_inference_steps": 500, "num_outputs": 4},
    _IMAGE | {"prompt": " "}, "prompt is empty. Expected what the image shows.",
)  # fmt: skip
TRAIN = Mode(
    "trainings", "TrainingInput", "input_images", _LORA, _LORA | {"steps": 1000},
    _LORA | {"resolution": "big"}, "resolution is 'big'.",
)  # fmt: skip


@dataclass(frozen=True)
class Client:
    """One server, in one mode."""

    url: str
    mode: Mode = PREDICT

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        *,
        patient: bool = True,
    ) -> tuple[int, Any]:
        """(status, the JSON or the text of the answer). body: bytes as they are, anything else as JSON, None for none.

        patient: wait while the server's one slot is taken; Cog frees it a moment after it has answered.
        """
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, method=method)
        for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
            request.add_header(name, value)
        for _ in range(600 if patient else 1):
            status, answer = _answer(request)
            if status != 409 or not patient:
                return status, answer
            time.sleep(0.05)
        raise TimeoutError("The server stayed busy.")

    def health(self) -> dict[str, Any]:
        return self.call("GET", "/health-check")[1]

    def post(self, inputs: Any, headers: Mapping[str, str] | None = None, **envelope: Any) -> tuple[int, Any]:
        """Ask for one prediction or training. envelope: what stands beside the inputs, as id and webhook."""
        return self.call("POST", f"/{self.mode.noun}", {"input": inputs, **envelope}, headers)

    def put(self, name: str, inputs: Any, headers: Mapping[str, str] | None = None, **envelope: Any) -> tuple[int, Any]:
        """The same under a name of ours; while it runs, how far it is."""
        return self.call("PUT", f"/{self.mode.noun}/{name}", {"input": inputs, **envelope}, headers)

    def cancel(self, name: str) -> int:
        return self.call("POST", f"/{self.mode.noun}/{name}/cancel")[0]

    def predict(self, **inputs: Any) -> dict[str, Any]:
        """The answer to one prediction or training, whatever its end."""
        status, answer = self.post(inputs)
        assert status == 200, answer
        return answer

    def succeeded(self, **inputs: Any) -> dict[str, Any]:
        answer = self.predict(**inputs)
        assert answer["status"] == "succeeded", answer["error"]
        return answer

    def images(self, **inputs: Any) -> list[np.ndarray]:
        """The pixels of a prediction that succeeds."""
        return [pixels_of(uri) for uri in in_order(self.succeeded(**inputs)["output"])]

    def error(self, **inputs: Any) -> str:
        """What is said of a request that fails."""
        answer = self.predict(**inputs)
        assert answer["status"] == "failed", answer
        return answer["error"]

    def refusal(self, **inputs: Any) -> str:
        """What we say of a request that we refuse: one of our own errors, and no accident of Python's."""
        error = self.error(**inputs)
        match = REFUSAL.fullmatch(error)
        assert match and not hasattr(builtins, match[1]), error
        return match[2]

    def begin(self, name: str, headers: Mapping[str, str] | None = None, **envelope: Any) -> None:
        """Start a slow request that goes on by itself, and wait until it has made some steps."""
        asked = {"Prefer": "respond-async", **(headers or {})}
        self.wait_until_ready()
        assert self.put(name, self.mode.slow, asked, **envelope)[0] == 202
        self.wait_for_steps(name)

    def wait_for_steps(self, name: str) -> None:
        """Until a slow request has made some steps, that was asked for when the server was ready."""
        self.wait_for(lambda: self.health()["status"] == "BUSY")  # or the next call would itself be the first
        self.wait_for(lambda: len(progress(self.put(name, self.mode.slow)[1].get("logs", ""))) > 1)

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self.health()["status"] == "READY")

    def wait_for(self, true: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not true():
            assert time.monotonic() < end, "it did not come about within a minute"
            time.sleep(0.02)


def progress(logs: str) -> list[tuple[int, int, int]]:
    """(percentage, step, steps) of every line of the log that tells it."""
    return [(int(percent), int(step), int(steps)) for percent, step, steps in PROGRESS.findall(logs)]


def _answer(request: urllib.request.Request) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, _read(response.headers.get_content_type(), response.read())
    except urllib.error.HTTPError as error:
        return error.code, _read(error.headers.get_content_type(), error.read())


def _read(mime: str, body: bytes) -> Any:
    return json.loads(body) if mime == "application/json" else body.decode()
