"""A denoiser is recorded on a stream of its own, which is left again however that ends: with torch's CUDA stood in for,
as for want of a GPU nothing can be recorded. test_cuda records."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from klora.models.recording import Recording


@pytest.mark.parametrize(
    ("ended", "broken"),
    [(True, False), (False, False), (False, True)],
    ids=["as it ends", "as it begins", "and what was recorded is of no use"],
)
def test_a_cancellation_while_torch_records_leaves_the_stream_and_no_recording(
    monkeypatch: pytest.MonkeyPatch, ended: bool, broken: bool
) -> None:
    """Where torch's own block does not clean up: after the recording has ended, or before it gave us the block."""
    state = SimpleNamespace(stream="default", recording=False)

    class Graph:
        def capture_end(self) -> None:
            assert state.stream == "capture" and state.recording
            state.recording = False
            if broken:
                raise RuntimeError

    @contextmanager
    def graph(_: Graph) -> Iterator[None]:
        state.stream, state.recording = "capture", True
        if ended:
            yield
            state.recording = False
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: state.stream)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(state, "stream", stream))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.recording)
    forward = Recording(lambda: torch.ones(1))
    forward()
    with pytest.raises(RuntimeError if broken else KeyboardInterrupt):
        forward()
    assert (state.stream, state.recording) == ("default", False)
