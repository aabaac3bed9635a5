"""Every way in which LoRA files are written, made by code from the naming rules, and what each means.

`python -m test_folder.variants` prints the table of docs/loras.md; files/test_variants.py holds it to be true.
"""

import io
import json
import math
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save, save_file
from torch import Tensor

from klora.models import load_model
from klora.models.family import Family
from test_folder import tiny
from test_folder.files.spelling import KOHYA, LEGACY, PEFT, XLABS, attention, bfl_modules, sgm

Shapes = dict[str, tuple[int, int]]
Meant = dict[str, Tensor]  # {module, or component:module of a text encoder: dW, float64}
Content = tuple[dict[str, Tensor], Meant]
Write = Callable[[Family, Path], tuple[Path, Meant]]

PROCESSOR = ("_lora.down.weight", "_lora.up.weight")
ALPHAS = (None, 1.0, 0.3, 16.0)
RANK = 2


class Variant(NamedTuple):
    """A row of the table. example: a key; write(model, folder) -> (what to read, what it means)."""

    family: str
    name: str
    example: str
    write: Write


# What files hold.


def linears(model: Family) -> Shapes:
    return tiny.linear_shapes(model.denoiser)


def three(model: Family) -> Shapes:
    return dict(list(linears(model).items())[:3])


def flat(name: str) -> str:
    return name.replace(".", "_")


def spelled(template: str, name: str) -> str:
    """template: has {name}, {flat} or {processor} of it, or Stability's {sgm} or {flat_sgm}."""
    processor = re.sub(r"\.(to_\w+?)(\.0)?$", r".processor.\1", name)
    theirs = sgm(name) if "sgm" in template else ""
    return template.format(name=name, flat=flat(name), processor=processor, sgm=theirs, flat_sgm=flat(theirs))


def content(modules: Mapping[str, tuple[str, ...]], shapes: Shapes, endings: tuple[str, str], alphas: bool) -> Content:
    """modules: {stem: the layers that share its rows}. Mixed ranks and alphas, of which one in four is missing."""
    tensors: dict[str, Tensor] = {}
    meant: Meant = {}
    for number, (stem, names) in enumerate(modules.items()):
        generator, rank, heights = torch.Generator().manual_seed(number), 1 + number % 4, [shapes[n][0] for n in names]
        A = torch.randn(rank, shapes[names[0]][1], generator=generator)
        B = torch.randn(sum(heights), rank, generator=generator)
        tensors |= {stem + endings[0]: A, stem + endings[1]: B}
        scale = 1.0
        if alphas and (alpha := ALPHAS[number % 4]):
            tensors[f"{stem}.alpha"] = torch.tensor(alpha)
            scale = float(torch.tensor(alpha)) / rank
        meant |= dict(zip(names, (scale * B.double() @ A.double()).split(heights), strict=True))
    return tensors, meant


def plain(
    template: str,
    endings: tuple[str, str],
    model: Family,
    *,
    alphas: bool = True,
    layers: Callable[[Family], Shapes] = linears,
) -> Content:
    """One module of the file for each layer."""
    shapes = layers(model)
    return content({spelled(template, name): (name,) for name in shapes}, shapes, endings, alphas)


def fused(template: str, endings: tuple[str, str], model: Family, *, alphas: bool = True, only: str = "") -> Content:
    """FLUX.1's first names, some of which stand for several layers."""
    shapes = linears(model)
    shared = {bfl: tuple(names) for bfl, names in bfl_modules(shapes).items() if re.search(only, bfl)}
    return content({spelled(template, bfl): names for bfl, names in shared.items()}, shapes, endings, alphas)


def xlabs(model: Family) -> Content:
    modules: dict[str, tuple[str, ...]] = {}
    for block in (0, 1):
        own, one = f"transformer_blocks.{block}.attn.", f"single_transformer_blocks.{block}."
        modules |= {
            f"double_blocks.{block}.processor.qkv_lora1": tuple(f"{own}to_{part}" for part in "qkv"),
            f"double_blocks.{block}.processor.qkv_lora2": tuple(f"{own}add_{part}_proj" for part in "qkv"),
            f"double_blocks.{block}.processor.proj_lora1": (f"{own}to_out.0",),
            f"double_blocks.{block}.processor.proj_lora2": (f"{own}to_add_out",),
            f"single_blocks.{block}.processor.qkv_lora": tuple(f"{one}attn.to_{part}" for part in "qkv"),
            f"single_blocks.{block}.processor.proj_lora": (f"{one}proj_out",),
        }
    return content(modules, linears(model), XLABS, alphas=False)


def with_encoders(template: str, endings: tuple[str, str], encoders: Mapping[str, str], model: Family) -> Content:
    """Three layers of the denoiser, and those of text encoders; encoders: {component: template}."""
    tensors, meant = plain(template, endings, model, layers=three)
    for component, spelling in encoders.items():
        shapes = tiny.linear_shapes(model.text_encoders[component])
        names = {f"{component}:{name}": shape for name, shape in shapes.items() if name != "text_projection"}
        stems = {name: spelled(spelling, name.split(":")[1].removeprefix("text_model.")) for name in names}
        more, said = content({stems[name]: (name,) for name in names}, names, endings, alphas=True)
        tensors, meant = tensors | more, meant | said
    return tensors, meant


def lycoris(kind: str, template: str, model: Family) -> Content:
    """LoHa, LoKr with a whole and a thin factor, or whole differences of low rank."""
    tensors: dict[str, Tensor] = {}
    meant: Meant = {}
    for number, (name, (outputs, inputs)) in enumerate(attention(model).items()):
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(number))
        stem, alpha = spelled(template, name), 1.5 if number % 2 else None
        thin = [draw(outputs, RANK), draw(RANK, inputs), draw(outputs, RANK), draw(RANK, inputs)]
        if kind == "LoHa":
            parts = dict(zip(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), thin, strict=True))
            whole = (thin[0].double() @ thin[1].double()) * (thin[2].double() @ thin[3].double())
        elif kind == "LoKr":
            parts = {"lokr_w1": draw(4, 4), "lokr_w2_a": thin[0][::4].clone(), "lokr_w2_b": thin[1][:, ::4].clone()}
            whole = torch.kron(parts["lokr_w1"].double(), parts["lokr_w2_a"].double() @ parts["lokr_w2_b"].double())
        else:
            parts, alpha = {"diff": thin[0] @ thin[1]}, None
            whole = parts["diff"].double()
        tensors |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        tensors |= {f"{stem}.alpha": torch.tensor(alpha)} if alpha else {}
        meant[name] = whole * (alpha / RANK if alpha else 1.0)
    return tensors, meant


def embeddings(model: Family, *keys: str) -> dict[str, Tensor]:
    """Two tokens for each text encoder."""
    widths = [encoder.get_input_embeddings().weight.shape[1] for encoder in model.text_encoders.values()]
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(2, width, generator=generator) for key, width in zip(keys, widths, strict=True)}


def bundled(second: str, template: str, endings: tuple[str, str], model: Family) -> Content:
    tensors, meant = plain(template, endings, model)
    return tensors | embeddings(model, "bundle_emb.zork.clip_l", f"bundle_emb.zork.{second}"), meant


# How they lie on a disk.


def file(make: Callable[..., Content], *given: object, **options: object) -> Write:
    def write(model: Family, folder: Path) -> tuple[Path, Meant]:
        tensors, meant = make(*given, model, **options)
        save_file(tensors, folder / "lora.safetensors")
        return folder / "lora.safetensors", meant

    return write


def with_header(model: Family, folder: Path) -> tuple[Path, Meant]:
    """One alpha for all, in diffusers' metadata."""
    tensors, meant = plain("unet.{name}", PEFT, model, alphas=False)
    save_file(tensors, folder / "lora.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 3.0, "unet.r": 4}'})
    return folder / "lora.safetensors", {name: 3 / (1 + i % 4) * dW for i, (name, dW) in enumerate(meant.items())}


def peft_repository(model: Family, folder: Path, rslora: bool = False) -> tuple[Path, Meant]:
    tensors, meant = plain("base_model.model.{name}", PEFT, model, alphas=False)
    special = list(meant)[1]
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 3, "use_rslora": rslora, "alpha_pattern": {special: 5}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    ranks = {name: 1 + number % 4 for number, name in enumerate(meant)}
    scales = {n: (5 if n == special else 3) / (math.sqrt(rank) if rslora else rank) for n, rank in ranks.items()}
    return folder, {name: scales[name] * dW for name, dW in meant.items()}


def tar(folder: Path, made: Content, member: str, beside: Mapping[str, bytes]) -> tuple[Path, Meant]:
    with tarfile.open(folder / "trained.tar", "w") as archive:
        for name, data in {member: save(made[0]), **beside}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return folder / "trained.tar", made[1]


def cog_sdxl(model: Family, folder: Path) -> tuple[Path, Meant]:
    made = plain("{processor}", PROCESSOR, model, alphas=False, layers=attention)
    vectors = save(embeddings(model, "text_encoders_0", "text_encoders_1"))
    beside = {"embeddings.pti": vectors, "special_params.json": b'{"TOK": "<s0><s1>"}'}
    return tar(folder, made, "lora.safetensors", beside)


def advanced(model: Family, folder: Path, second: str) -> tuple[Path, Meant]:
    folder = folder / "advanced"
    folder.mkdir()
    made = plain(f"{model.component}.{{name}}", PEFT, model, alphas=False)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(save(made[0]))
    (folder / "zork_emb.safetensors").write_bytes(save(embeddings(model, "clip_l", second)))
    return folder, made[1]


def flux_fine_tuner(model: Family, folder: Path) -> tuple[Path, Meant]:
    made = plain("transformer.{name}", PEFT, model, alphas=False)
    return tar(folder, made, "output/flux_train_replicate/lora.safetensors", {"output/config.yaml": b"job: train"})


TE = "lora_te{}_text_model_{{flat}}"
KOHYA_ENCODERS = {"text_encoder": TE.format(1), "text_encoder_2": TE.format(2)}
PEFT_ENCODERS = {part: f"{part}.text_model.{{name}}" for part in ("text_encoder", "text_encoder_2")}
FLUX_ENCODERS = {"text_encoder": TE.format(1), "text_encoder_2": "lora_te3_{flat}"}
VARIANTS = [
    Variant("sdxl", name, example, write) for name, example, write in (
        ("kohya, Stability's names", "lora_unet_input_blocks_4_1_….lora_down.weight",
         file(plain, "lora_unet_{flat_sgm}", KOHYA)),
        ("kohya, diffusers' names", "lora_unet_down_blocks_1_….lora_down.weight",
         file(plain, "lora_unet_{flat}", KOHYA)),
        ("kohya with text encoders", "lora_te1_…, lora_te2_…",
         file(with_encoders, "lora_unet_{flat}", KOHYA, KOHYA_ENCODERS)),
        ("kohya with a bundled embedding", "bundle_emb.WORD.clip_g",
         file(bundled, "clip_g", "lora_unet_{flat}", KOHYA)),
        ("diffusers", "unet.….to_q.lora_A.weight", with_header),
        ("diffusers with text encoders", "text_encoder_2.text_model.….lora_A.weight",
         file(with_encoders, "unet.{name}", PEFT, PEFT_ENCODERS)),
        ("diffusers, legacy", "unet.….to_q.lora.down.weight", file(plain, "unet.{name}", LEGACY)),
        ("diffusers, legacy, prefix twice", "unet.unet.….to_q.lora.down.weight",
         file(plain, "unet.unet.{name}", LEGACY)),
        ("diffusers, attention processors", "unet.….processor.to_q_lora.down.weight",
         file(plain, "unet.{processor}", PROCESSOR, layers=attention)),
        ("PEFT repository", "base_model.model.….lora_A.weight, adapter_config.json", peft_repository),
        ("PEFT repository, rsLoRA", "the same, use_rslora", partial(peft_repository, rslora=True)),
        ("OneTrainer", "lora_unet.down_blocks.….lora_down.weight", file(plain, "lora_unet.{name}", KOHYA)),
        ("OneTrainer, Stability's names", "unet.output_blocks.5.1.….lora_down.weight",
         file(plain, "unet.{sgm}", KOHYA)),
        ("cog-sdxl's tar", "lora.safetensors, embeddings.pti, special_params.json", cog_sdxl),
        ("diffusers' advanced trainer", "pytorch_lora_weights.safetensors, NAME_emb.safetensors",
         partial(advanced, second="clip_g")),
        ("LoHa", "lora_unet_….hada_w1_a", file(lycoris, "LoHa", "lora_unet_{flat}")),
        ("LoKr", "lycoris_….lokr_w1", file(lycoris, "LoKr", "lycoris_{flat}")),
        ("weight differences of low rank", "lora_unet_….diff", file(lycoris, "diff", "lora_unet_{flat}")),
    )
] + [
    Variant("flux", name, example, write) for name, example, write in (
        ("kohya, BFL's names", "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight",
         file(fused, "lora_unet_{flat}", KOHYA, only="blocks")),
        ("kohya, BFL's names, every layer", "lora_unet_img_in…, lora_unet_final_layer_linear…",
         file(fused, "lora_unet_{flat}", KOHYA)),
        ("kohya with text encoders", "lora_te1_…, lora_te3_…",
         file(with_encoders, "lora_unet_{flat}", KOHYA, FLUX_ENCODERS)),
        ("ComfyUI", "diffusion_model.double_blocks.0.….lora_down.weight", file(fused, "diffusion_model.{name}", KOHYA)),
        ("ai-toolkit for ComfyUI", "diffusion_model.double_blocks.0.….lora_A.weight",
         file(fused, "diffusion_model.{name}", PEFT, alphas=False)),
        ("BFL's names alone", "double_blocks.0.img_attn.qkv.lora_A.weight", file(fused, "{name}", PEFT, alphas=False)),
        ("diffusers, ai-toolkit", "transformer.….attn.to_q.lora_A.weight",
         file(plain, "transformer.{name}", PEFT, alphas=False)),
        ("diffusers with alphas", "the same, and ….alpha", file(plain, "transformer.{name}", PEFT)),
        ("CivitAI's mixture", "transformer.….lora_down.weight, ….alpha", file(plain, "transformer.{name}", KOHYA)),
        ("PEFT repository", "base_model.model.….lora_A.weight, adapter_config.json", peft_repository),
        ("OneTrainer", "lora_transformer_….lora_down.weight", file(plain, "lora_transformer_{flat}", KOHYA)),
        ("OneTrainer with a bundled embedding", "bundle_emb.WORD.t5",
         file(bundled, "t5", "lora_transformer_{flat}", KOHYA)),
        ("XLabs", "double_blocks.0.processor.qkv_lora1.down.weight", file(xlabs)),
        ("diffusers' advanced trainer", "pytorch_lora_weights.safetensors, NAME_emb.safetensors",
         partial(advanced, second="t5")),
        ("flux-fine-tuner's tar", "output/flux_train_replicate/lora.safetensors", flux_fine_tuner),
        ("LoKr", "lycoris_….lokr_w1", file(lycoris, "LoKr", "lycoris_{flat}")),
    )
]  # fmt: skip


def largest_error(variant: Variant, model: Family, folder: Path) -> tuple[int, float]:
    """(modules, the largest error of a dW, relative to its largest element) of what klora reads. Raises AssertionError
    where it reads other modules than are meant."""
    path, meant = variant.write(model, folder)
    lora = model.read_lora(path)
    seen = dict(lora.layers)
    seen |= {f"{part}:{name}": pair for part, layers in lora.text_encoders.items() for name, pair in layers.items()}
    assert seen.keys() == meant.keys(), sorted(seen.keys() ^ meant.keys())
    products = {name: pair.B.double() @ pair.A.double() for name, pair in seen.items()}
    return len(meant), max(float((products[n] - dW).abs().max() / dW.abs().max()) for n, dW in meant.items())


def table(models: Mapping[str, Family]) -> str:
    """In Markdown."""
    lines = ["| base | LoRA | what is in it | modules | largest error |", "|---|---|---|---|---|"]
    for variant in VARIANTS:
        with tempfile.TemporaryDirectory() as folder:
            count, error = largest_error(variant, models[variant.family], Path(folder))
        cells = (
            models[variant.family].name,
            variant.name,
            f"`{variant.example}`",
            count,
            "< 1e-6" if error < 1e-6 else f"{error:.0e}",
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        bases = tiny.build_bases(Path(folder))
        families = {"sdxl": bases / "sdxl", "flux": bases / "flux-dev"}
        sys.stdout.write(table({name: load_model(name, path, torch.device("cpu")) for name, path in families.items()}))


if __name__ == "__main__":
    main()
