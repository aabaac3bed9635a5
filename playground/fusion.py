"""The tab in which a subject and a style are fused: the form, the slider, the picture beside the one before it.

Knows the inputs that it lays out by name; all the others come as the server's form has them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from playground import dial
from playground.connection import Run
from playground.controls import control, in_form_order, parted, told
from playground.errors import PlaygroundError
from playground.form import Field, inputs_of
from playground.outputs import Made, Output, files_of, samples_in, sorted_out
from playground.progress import Server, Ticket, bar, cancel, followed, note, problem

LORAS = ("content_lora", "style_lora")
SCALES = ("content_scale", "style_scale")
VISIBLE = ("prompt", *LORAS, "fusion", "pattern", *SCALES, "seed", "num_inference_steps", "aspect_ratio")
VIEWS = {
    "compare": ("Compare", "Content alone, style alone, their sum, both K-LoRA patterns"),
    "sweep": ("Sweep the slider", "Five places of the slider on one sheet"),
}
SETTLED_BY = {"compare": ("pattern", "fusion", "num_outputs"), "sweep": ("style_bias", "fusion", "num_outputs")}
EXAMPLE = {
    "prompt": "a sbu robot, in szn style", "content_lora": "flux-dev/robot.safetensors",
    "style_lora": "flux-dev/neon.safetensors", "pattern": "s", "seed": 3, "num_inference_steps": 20,
    "output_format": "png", "disable_safety_checker": True,
}  # fmt: skip

Update = dict[Any, Any]


@dataclass(frozen=True)
class Shown:
    """What a tab shows last. picture: a path; all: (path, caption) of every picture made in it, the newest first."""

    picture: str | None = None
    meter: str = ""
    seed: int | None = None
    all: tuple[tuple[str, str], ...] = ()


class FusionTab:
    """The tab. fields: of the server's form; folder: for the pictures that it has made."""

    def __init__(self, server: Server, fields: Sequence[Field], folder: Path) -> None:
        self._server, self._folder = server, folder
        self._controls: dict[str, Any] = {}
        known, others = parted([f for f in fields if f.name not in ("style_bias", "report", *VIEWS)], VISIBLE)
        names = {field.name: field for field in fields}
        self._ticket, self._shown = gr.State(None), gr.State(Shown())
        self.trained = gr.State({})  # {what stands in the field of a LoRA: the data URI that it stands for}
        with gr.Row():
            with gr.Column(scale=5, min_width=360):
                self._lay_out_form(known, others)
            with gr.Column(scale=7, min_width=480):
                self._lay_out_dial(dial.knob(fields), reports="report" in names)
                self._lay_out_buttons(names)
                self._lay_out_pictures()
        self._fields, self._filled = in_form_order(fields, self._controls)
        self._connect()

    @property
    def loras(self) -> dict[str, gr.Textbox]:
        """The fields in which LoRAs are named."""
        return {name: self._controls[name] for name in LORAS}

    # What there is to see.

    def _lay_out_form(self, known: Mapping[str, Field], others: Sequence[Field]) -> None:
        def place(*names: str) -> None:
            for name in (name for name in names if name in known):
                self._controls[name] = control(known[name], **({"lines": 2} if name == "prompt" else {}))

        place("prompt", *LORAS)
        self._example = gr.Button("No LoRAs at hand? Fill in the toy example", size="sm", elem_id="example")
        place("fusion", "pattern", *SCALES)
        with gr.Row():
            place("seed", "num_inference_steps")
        place("aspect_ratio")
        with gr.Accordion("Everything else", open=False, elem_id="everything-else"):
            self._controls |= {field.name: control(field) for field in others}

    def _lay_out_dial(self, field: Field, *, reports: bool) -> None:
        first = dial.start(field)
        with gr.Column(elem_id="dial"):
            gr.HTML(dial.ENDS)
            self._controls["style_bias"] = self._dial = gr.Slider(
                *dial.RANGE, first, step=dial.STEP, show_label=False, container=False, buttons=[], elem_id="style-bias",
                label="Style slider",
            )  # fmt: skip
            gr.HTML(dial.TICKS)
            self._said = told(dial.said(first))
            with gr.Row():
                self._again = gr.Checkbox(
                    True,
                    label="Draw again when a slider is let go, with the same seed",
                    container=False,
                    scale=2,
                    elem_id="again",
                )
                self._reports = gr.Checkbox(
                    True, label="Show the heat map", container=False, scale=1, visible=reports, elem_id="with-report"
                )

    def _lay_out_buttons(self, names: Mapping[str, Field]) -> None:
        with gr.Row(elem_id="buttons"):
            self._make = gr.Button("Make", variant="primary", elem_id="make", scale=2, min_width=120)
            self._views = {
                view: gr.Button(text, elem_id=view, scale=1, min_width=150)
                for view, (text, _) in VIEWS.items()
                if view in names
            }
            self._cancel = gr.Button("Cancel", elem_id="cancel")
        self._standing = told(elem_id="standing")

    def _lay_out_pictures(self) -> None:
        def picture(label: str, **more: Any) -> gr.Image:
            return gr.Image(label=label, type="filepath", interactive=False, buttons=["download", "fullscreen"], **more)

        with gr.Row():
            with gr.Column(min_width=200):
                self._before = picture("Before", height=330, elem_id="before")
                self._before_meter = gr.HTML(elem_id="before-meter")
            with gr.Column(min_width=200):
                self._now = picture("Now", height=330, elem_id="now")
                self._now_meter = gr.HTML(elem_id="now-meter")
        self._sheet = picture("Compared", elem_id="sheet", visible=False)
        self._map = picture("Heat map: which LoRA acts in which layer and step", elem_id="heat-map", visible=False)
        self._words = gr.Textbox(label="What the fusion did", lines=2, elem_id="words", visible=False)
        self._table = gr.DownloadButton("The report's numbers (JSON)", size="sm", elem_id="table", visible=False)
        self._tar = gr.DownloadButton("All images and captions (tar)", size="sm", elem_id="images-tar", visible=False)
        self._gallery = gr.Gallery(
            label="Made in this tab",
            columns=6,
            fit_columns=False,
            height=190,
            elem_id="gallery",
            visible=False,
            object_fit="contain",
        )

    # What happens.

    def _connect(self) -> None:
        private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
        outputs = [
            self._ticket, self._shown, self._standing, self._before, self._before_meter, self._now, self._now_meter,
            self._sheet, self._map, self._words, self._table, self._tar, self._gallery,
        ]  # fmt: skip
        run = private | {
            "inputs": [self._ticket, self._shown, self.trained, self._reports, *self._filled],
            "outputs": outputs,
            "concurrency_limit": None,
            "trigger_mode": "multiple",  # the new request takes the place of the one that runs
        }
        self._make.click(self._drawn(None), **run)
        for view, button in self._views.items():
            button.click(self._drawn(view), **run)
        self._dial.change(dial.said, self._dial, self._said, queue=False, trigger_mode="always_last", **private)
        for slider in (self._dial, *(self._controls[name] for name in SCALES if name in self._controls)):
            if isinstance(slider, gr.Slider):
                slider.release(self._drawn_again, **run | {"inputs": [self._again, *run["inputs"]]})
        self._cancel.click(cancel, self._ticket, None, queue=False, **private)
        example = [name for name in EXAMPLE if name in self._controls]
        self._example.click(
            lambda: [EXAMPLE[name] for name in example], None, [self._controls[n] for n in example], **private
        )

    def _drawn(self, view: str | None) -> Callable[..., Iterator[Update]]:
        def drawn(ticket: Ticket | None, shown: Shown, *asked: Any) -> Iterator[Update]:
            yield from self._draw({view: True} if view else {}, ticket, shown, *asked)  # Gradio looks for a generator

        return drawn

    def _drawn_again(
        self, again: bool, ticket: Ticket | None, shown: Shown, trained: Mapping[str, str], reports: bool, *values: Any
    ) -> Iterator[Update]:
        """The same seed, the sliders as they are now; nothing where nothing was made before, or where they stand as
        they did: Gradio's fields beside them say that they are let go when they are merely passed by. Nor of a file of
        prompts: it takes long, and would be ended by this to begin anew."""
        many = any(field.name == "prompts" and value for field, value in zip(self._fields, values, strict=True))
        moved = ticket is None or ticket.sliders != self._sliders(values)
        if again and shown.seed is not None and not many and moved:
            yield from self._draw({"seed": shown.seed}, ticket, shown, trained, reports, *values)
        else:
            yield {self._standing: gr.skip()}

    def _draw(
        self, changes: Mapping[str, Any], ticket: Ticket | None, shown: Shown, trained: Mapping[str, str],
        reports: bool, *values: Any,
    ) -> Iterator[Update]:  # fmt: skip
        """Run one request; the newest of a tab takes the place of the one before. changes: to what the form holds."""
        ticket = (ticket or Ticket()).replace(self._sliders(values))
        yield {self._ticket: ticket, self._standing: bar(Run("starting"))}
        try:
            inputs = self._inputs(values, changes, trained, reports)
            for standing, end in followed(self._server, inputs, ticket):
                yield {self._standing: standing} if end is None else self._update(end, inputs, shown)
        except PlaygroundError as error:
            if not ticket.replaced:
                yield {self._standing: problem(str(error))}

    def _sliders(self, values: Sequence[Any]) -> list[Any]:
        """Where they stand that draw again. values: of the whole form."""
        named = ("style_bias", *SCALES)
        return [value for field, value in zip(self._fields, values, strict=True) if field.name in named]

    def _inputs(
        self, values: Sequence[Any], changes: Mapping[str, Any], trained: Mapping[str, str], reports: bool
    ) -> dict[str, Any]:
        """What to send. Raises PlaygroundError."""
        inputs = inputs_of(self._fields, values)
        inputs["style_bias"] = dial.bias(inputs["style_bias"])
        inputs |= {name: trained[inputs[name]] for name in LORAS if inputs.get(name) in trained}
        settled = [name for view in VIEWS if view in changes for name in SETTLED_BY[view]]
        if reports and self._reports.visible and not settled and dial.chooses(inputs) and "prompts" not in inputs:
            inputs["report"] = True
        return dial.heeded({name: value for name, value in inputs.items() if name not in settled} | dict(changes))

    def _update(self, end: Run, inputs: Mapping[str, Any], shown: Shown) -> Update:
        """What the page shows of a request that has succeeded. Raises PlaygroundError."""
        view = next((view for view in VIEWS if view in inputs), None)
        files = files_of(end.output, self._server.connection.fetch, "klora", end.metrics.get("seed"), view)
        made = sorted_out(files, reported="report" in inputs)
        if made.tar:
            return self._tar_update(made.tar, shown)
        if not made.images:
            raise PlaygroundError("The server answers without an image. Expected one: see its log.")
        return self._sheet_update(made, view) if view else self._picture_update(made, end, inputs, shown)

    def _sheet_update(self, made: Made, view: str) -> Update:
        text, what = VIEWS[view]
        sheet = gr.Image(made.images[0].saved(self._folder), label=f"{text}: {what}", visible=True)
        return {self._standing: note("Done."), self._sheet: sheet}

    def _tar_update(self, tar: Output, shown: Shown) -> Update:
        """What a file of prompts came to."""
        pictures = tuple((image.saved(self._folder), image.name) for image in samples_in(tar.data))
        now = replace(shown, all=pictures + shown.all)
        return {
            self._shown: now,
            self._standing: note("Done. All are in the tar; those that could not be made are in its failures.txt."),
            self._tar: gr.DownloadButton(value=tar.saved(self._folder), visible=True),
            self._gallery: gr.Gallery(list(now.all), visible=True),
        }

    def _picture_update(self, made: Made, end: Run, inputs: Mapping[str, Any], shown: Shown) -> Update:
        """The new picture in its place, the one before beside it."""
        paths = [image.saved(self._folder) for image in made.images]
        bias, seed = inputs.get("style_bias"), end.metrics.get("seed", inputs.get("seed"))
        meter, said = dial.meter(end.metrics, bias), f"seed {seed}" if bias is None else f"{bias:g}, seed {seed}"
        captions = tuple((path, said) for path in paths)
        now = Shown(paths[0], meter, seed, captions + shown.all)
        words, table, heat = end.metrics.get("fusion"), made.table, made.heat_map
        return {
            self._shown: now,
            self._standing: note("Done. Move the slider to change it."),
            self._before: shown.picture, self._before_meter: shown.meter,
            self._now: now.picture, self._now_meter: now.meter,
            self._map: gr.Image(heat.saved(self._folder) if heat else None, visible=bool(heat)),
            self._words: gr.Textbox(words, visible=bool(words)),
            self._table: gr.DownloadButton(value=table.saved(self._folder) if table else None, visible=bool(table)),
            self._gallery: gr.Gallery(list(now.all), visible=len(now.all) > 1),
        }  # fmt: skip
