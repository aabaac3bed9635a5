"""The `klora` command: what the forms do, from a shell and without Cog. Its options are the forms' fields, by name.

A verb imports what it needs when it runs, and has its LoRAs: torch takes seconds, and help, completion, misspelt
options and LoRAs that cannot be had need none.
"""

import errno
import logging
import signal
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from PIL import Image

import weights
from klora.bulk.batches import Bulk
from klora.bulk.lines import ALONE, read_prompts
from klora.errors import KLoRAError, SafetyError
from klora.form.fields import MAX_SEED
from klora.form.inputs import progress_line
from klora.form.options import FILE, options_of
from klora.form.outputs import check_new, check_writable, kept
from klora.form.pair import Export, Question
from klora.form.pictures import open_images
from klora.form.request import Request
from klora.training.config import TrainConfig
from klora.training.publishing import Publishing

if TYPE_CHECKING:
    from klora.bulk.batch import DrawBatch
    from klora.studio import Check, Studio
    from klora.training.loop import Progress

app = typer.Typer(no_args_is_help=True)


@app.callback()
def main() -> None:
    """K-LoRA: one LoRA's subject in another LoRA's style."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)  # it advises what is not needed here
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # as Ctrl-C: nothing stays half made


def fuse(
    out: Annotated[Path, typer.Option(help="Folder for the images.", file_okay=False)] = Path("out"), **given: Any
) -> None:
    """Make images from a prompt and up to two LoRAs, given as files or as the references that the server accepts."""
    started, facts = time.perf_counter(), dict[str, Any]()
    request = Request(**open_images(given))
    bases = weights.runnable(request.model)
    with weights.LoRAFiles(anywhere=True).borrowed(request.loras, weights.own_tokens(), bases) as files:
        from klora.report.pair import save_report

        studio = _studio()
        images = studio.make(request, files, facts.__setitem__)
        numbers = studio.report(request, files) if request.report else None
    for path in [*_saved(images, out, request), *(kept(partial(save_report, numbers), out) if numbers else [])]:
        typer.echo(path)
    share = f", style acts in {facts['style_share']:.0%}" if "style_share" in facts else ""
    fast = f", go_fast: {facts['go_fast']}" if "go_fast" in facts else ""
    typer.echo(f"seed {request.seed}{share}{fast}, {time.perf_counter() - started:.1f} s")


def reproduce(
    original: Annotated[
        Path, typer.Argument(help="An image that klora has made.", metavar="IMAGE", exists=True, dir_okay=False)
    ],
    out: Annotated[Path, typer.Option(help="Folder for the image.", file_okay=False)] = Path("reproduced"),
    content_lora: Annotated[str | None, typer.Option(help="Its content LoRA, if that has moved.")] = None,
    style_lora: Annotated[str | None, typer.Option(help="Its style LoRA, if that has moved.")] = None,
    image: Annotated[Path | None, typer.Option(help="The image that it was made from.", **FILE)] = None,
    mask: Annotated[Path | None, typer.Option(help="The mask that it was made with.", **FILE)] = None,
) -> None:
    """Make an image again from what its file records, and say whether the pixels are the same."""
    from klora.studio.likeness import difference
    from klora.studio.provenance import read_provenance

    made = read_provenance(original)
    given = {"content_lora": content_lora, "style_lora": style_lora, "image": image, "mask": mask}
    request = made.request(**open_images({name: value for name, value in given.items() if value is not None}))
    base = weights.find_base(request.model)
    for change in made.changes(base.path):
        typer.echo(f"Warning: {change}, so that the image may come out otherwise.", err=True)
    with weights.LoRAFiles(anywhere=True).borrowed(request.loras, weights.own_tokens(), [base.name]) as files:
        images = _studio().make(request, files, again=made)
    if made.place not in images:
        raise SafetyError(f"The safety checker withheld image {made.place}. Expected the checker that it had passed.")
    (path,) = _saved({made.place: images[made.place]}, out, request)
    typer.echo(path)
    other = difference(original, path)
    typer.echo(f"Warning: {other}" if other else f"the same pixels as {original.name}", err=bool(other))


def train(
    pictures: Annotated[Path, typer.Argument(help="A zip, a tar or a folder of pictures.", exists=True)],
    base_model: Annotated[
        Literal["sdxl", "illustrious-xl", "flux-dev"], typer.Option(help="Base model to train on.")
    ] = "sdxl",
    out: Annotated[
        Path, typer.Option(help="The tar to write: a new name, or that of resume_from.", dir_okay=False)
    ] = Path("trained_model.tar"),
    resume_from: Annotated[Path | None, typer.Option(help="Tar of a training to continue.", exists=True)] = None,
    **given: Any,
) -> None:
    """Train a LoRA on pictures."""
    check_new(out, resume_from)
    from klora.training.job import TrainingBase, run_training

    _quiet_unless_seen()
    base = TrainingBase(**weights.training_base(base_model))
    publishing = Publishing(**{item.name: given.pop(item.name) for item in fields(Publishing) if item.name in given})

    def show(progress: "Progress") -> None:
        typer.echo(progress_line(progress.step, progress.steps, str(progress)))

    run_training(base, pictures, given, out, resume_from=resume_from, publishing=publishing, on_progress=show)
    typer.echo(out)


def generate(
    prompts: Annotated[
        Path, typer.Argument(help="One prompt per line; in a .jsonl file, inputs by name.", exists=True, dir_okay=False)
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for the images; what is there already stays.", file_okay=False)
    ] = Path("out"),
    seed: Annotated[int, typer.Option(help="Seed of the first line; line i has seed + i.", min=0, max=MAX_SEED)] = 0,
    output_format: Annotated[Literal["png", "jpg", "webp"], typer.Option(help="File format.")] = "png",
    **given: Any,
) -> None:
    """Make one image per line of a prompt file: 00000.png, with its caption in 00000.txt and how it was made in
    00000.json. After an interruption, the same command continues."""
    from klora.bulk.run import run
    from klora.studio.digests import digests

    bulk = Bulk(**{item.name: given.pop(item.name) for item in fields(Bulk) if item.name in given})
    common = open_images({**given, "seed": seed, "output_format": output_format})
    result = run(read_prompts(prompts, common), bulk, out, open_studio, typer.echo, digests)
    if result.faults:
        raise typer.Exit(1)


def open_studio() -> "DrawBatch":
    """What makes the images of `klora generate`: here, or in a worker of a cluster."""
    weights.use_toys_if_no_bases()
    studio, loras = _studio(), weights.LoRAFiles(anywhere=True)

    def draw(requests: Sequence[Request], check: "Check") -> dict[int, Image.Image]:
        shared = requests[0]
        with loras.borrowed(shared.loras, weights.own_tokens(), weights.runnable(shared.model)) as files:
            return studio.draw(requests, files, check)

    return draw


def inspect(
    lora: Annotated[str, typer.Argument(help="A LoRA file, a tar that holds one, a PEFT repository, or a reference.")],
) -> None:
    """Say what a LoRA is, and which installed bases read it."""
    with weights.LoRAFiles(anywhere=True).borrowed({"lora": lora}, weights.own_tokens()) as files:
        from klora.report.inspection import inspect as inspected

        found = inspected(files["lora"].path, _bases())
    typer.echo(found)
    if not found.fits:
        raise typer.Exit(1)


def report(
    out: Annotated[
        Path, typer.Option(help="Folder for report.png and report.json; further ones are numbered.", file_okay=False)
    ] = Path("out"),
    **given: Any,
) -> None:
    """Say which of two LoRAs acts in which layer and step, and what would change it. Makes no image."""
    question = Question(**given)
    with weights.LoRAFiles(anywhere=True).borrowed(question.loras, weights.own_tokens()) as files:
        from klora.report.pair import answer, save_report

        numbers, pair = answer(question, files, _bases())
    typer.echo("\n".join([str(numbers), str(pair), *map(str, kept(partial(save_report, numbers), out))]))


def export(
    out: Annotated[Path, typer.Option(help="The .safetensors file to write: a new name.", dir_okay=False)], **given: Any
) -> None:
    """Bake a fusion into one ordinary LoRA, for tools without K-LoRA: its mean over some steps or all. The mean equals
    K-LoRA only if no layer flips in these steps; otherwise it is different, and the command says how far."""
    wanted = Export(**given)
    check_new(out)
    with weights.LoRAFiles(anywhere=True).borrowed(wanted.loras, weights.own_tokens()) as files:
        from klora.export import exported

        told = exported(wanted, files, _bases(), out)
    typer.echo(f"{out}\n{told}")


def _studio() -> "Studio":
    from klora.studio import Studio

    _quiet_unless_seen()
    return Studio(weights.find_base, weights.safety_checker_path())


def _quiet_unless_seen() -> None:
    """Silence the libraries' progress bars unless they go to a terminal: a bar whose pipe breaks, as of `2>&1 | head`,
    keeps tqdm's lock, and the process would wait for that for ever at its end."""
    from klora.models import silence_progress_bars

    if not (sys.stderr and sys.stderr.isatty()):
        silence_progress_bars()


def _saved(images: Mapping[int | str, Image.Image], out: Path, request: Request) -> list[Path]:
    from klora.studio import save_images

    return kept(lambda folder: save_images(images, folder, request), out)


def _bases() -> dict[str, tuple[str, Path]]:
    """{installed base: (family, folder)}, for what loads their shapes."""
    _quiet_unless_seen()
    return {name: weights.find_base(name)[1:] for name in weights.installed_bases()}


def _command(verb: Callable[..., None], *forms: type, without: Collection[str] = ()) -> None:
    """Add a verb to the command, with its own options and those of forms, handed over when given. without: fields."""

    def run(**given: Any) -> None:
        try:
            if out := given.get("out"):
                check_writable(out)
            weights.use_toys_if_no_bases()
            verb(**{name: value for name, value in given.items() if value is not None})
        except (KLoRAError, OSError) as error:
            if isinstance(error, OSError) and error.errno in (None, errno.EPIPE):  # no file's: a mistake, or a pipe
                raise
            typer.echo(f"Error: {_sentence(error)}", err=True)
            raise typer.Exit(1) from error

    run.__signature__ = options_of(verb, *forms, without=without)  # type: ignore[attr-defined]
    app.command(verb.__name__, help=verb.__doc__)(run)


def _sentence(error: KLoRAError | OSError) -> str:
    if isinstance(error, KLoRAError):
        return str(error)
    return f"{error.filename or 'A file'} cannot be read or written: {error.strerror}. Expected a path that can be."


_command(fuse, Request)
_command(reproduce)
_command(train, TrainConfig, Publishing)
_command(generate, Bulk, Request, without=("prompt", *ALONE))
_command(inspect)
_command(report, Question)
_command(export, Export)
