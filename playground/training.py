"""The tab in which a LoRA is trained by a server in train mode, and handed to the other tab."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from playground.connection import Run
from playground.controls import control, in_form_order, parted, told
from playground.errors import PlaygroundError
from playground.form import Field, inputs_of
from playground.fusion import FusionTab
from playground.outputs import files_of, samples_in
from playground.progress import Server, Ticket, bar, cancel, followed, note, problem
from playground.trained import MOST_CHARACTERS, handed_over

VISIBLE = (
    "input_images", "base_model", "lora_type", "trigger_word", "class_word", "steps", "resolution", "lora_rank", "seed",
)  # fmt: skip

Update = dict[Any, Any]
Connect = Callable[[str], Server]
"""An address -> the trainer there. Raises PlaygroundError."""


class TrainingTab:
    """The tab. fields: of the form of trainings; address: of the trainer at first; fusing: where the result goes."""

    def __init__(
        self, connect: Connect, address: str, fields: Sequence[Field], fusing: FusionTab, folder: Path
    ) -> None:
        self._server_at, self._fusing, self._folder = connect, fusing, folder
        known, others = parted(fields, VISIBLE)
        self._ticket, self._result = gr.State(None), gr.State(None)
        with gr.Row():
            with gr.Column(scale=5, min_width=320):
                self._address = gr.Textbox(
                    address, label="Training server", info="Start one with: script/serve --train --port 5001",
                    elem_id="trainer",
                )  # fmt: skip
                self._controls = {name: control(field) for name, field in known.items()}
                with gr.Accordion("Everything else", open=False, elem_id="every-setting"):
                    self._controls |= {field.name: control(field) for field in others}
            with gr.Column(scale=6, min_width=420):
                self._lay_out_results()
        self._fields, self._filled = in_form_order(fields, self._controls)
        self._connect()

    def _lay_out_results(self) -> None:
        gr.Markdown(
            "A zip of pictures of one subject, or in one style, becomes a LoRA. Then hand it over, as the content "
            "LoRA or the style LoRA of the other tab."
        )
        with gr.Row():
            self._train = gr.Button("Train", variant="primary", elem_id="train", scale=2)
            self._cancel = gr.Button("Cancel", elem_id="cancel-training")
        self._standing = told(elem_id="training-standing")
        self._samples = gr.Gallery(
            label="Samples", columns=4, height=300, object_fit="contain", elem_id="samples", visible=False
        )
        with gr.Row():
            self._use = {
                name: gr.Button(f"Use as {name.replace('_', ' ').replace('lora', 'LoRA')}", interactive=False,
                                elem_id=f"use-{name}")
                for name in self._fusing.loras
            }  # fmt: skip
        self._tar = gr.DownloadButton("Download the LoRA (tar)", visible=False, elem_id="tar")

    def _connect(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        self._train.click(
            self._trained, [self._ticket, self._address, *self._filled],
            [self._ticket, self._result, self._standing, self._samples, self._tar, *self._use.values()],
            concurrency_limit=None, **private,
        )  # fmt: skip
        self._cancel.click(cancel, self._ticket, None, queue=False, **private)
        trained = self._fusing.trained
        for name, button in self._use.items():
            button.click(handed_over, [self._result, trained], [self._fusing.loras[name], trained], **private)

    def _trained(self, ticket: Ticket | None, address: str, *values: Any) -> Iterator[Update]:
        ticket = (ticket or Ticket()).replace()
        yield {self._ticket: ticket, self._standing: bar(Run("starting"))}
        try:
            inputs = inputs_of(self._fields, values)
            server = self._server_at(address)
            for standing, end in followed(server, inputs, ticket):
                yield {self._standing: standing} if end is None else self._update(server, end, inputs)
        except PlaygroundError as error:
            yield {self._standing: problem(str(error))}

    def _update(self, server: Server, end: Run, inputs: Mapping[str, Any]) -> Update:
        """The samples, the tar, and what the buttons hand over. Raises PlaygroundError."""
        name = inputs.get("trigger_word") or inputs.get("class_word") or inputs.get("lora_type", "LoRA")
        [tar] = files_of(end.output, server.connection.fetch, "lora", name)
        samples = [(file.saved(self._folder), file.name) for file in samples_in(tar.data)]
        [given] = end.output.values() if isinstance(end.output, dict) else [end.output]
        fits = not given.startswith("data:") or len(given) <= MOST_CHARACTERS
        said = "Done. Hand it to the other tab." if fits else (
            f"Done. The tar has {len(tar.data) >> 20} MB, more than the field of a LoRA takes: put it into the "
            "server's KLORA_LORA_ROOT and name it there."
        )  # fmt: skip
        return {
            self._result: (f"trained here: {name}, {len(tar.data) / 1e6:.1f} MB", given),
            self._standing: note(said),
            self._samples: gr.Gallery(samples, visible=bool(samples)),
            self._tar: gr.DownloadButton(value=tar.saved(self._folder), visible=True),
            **{button: gr.Button(interactive=fits) for button in self._use.values()},
        }
