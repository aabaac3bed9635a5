"""LoRA files -> klora.lora.LoRA: exactly what their authors meant, or a refusal that says why.

container   one safetensors file, alone, in a tar or in a repository; its header held against bounds
factors     its tensors -> a pair for each module      lycoris   the pairs of LoHa, LoKr and weight differences
names       modules as spelled -> layers of the base   adapter   alphas that are stated beside the tensors
origin      which base a file was made for             report    what there is to say of a file
embeddings  words that a file teaches                  shelf     the LoRAs read last, and what they scored
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from klora.errors import LoRAError
from klora.files.adapter import with_alphas
from klora.files.container import opened
from klora.files.embeddings import taught
from klora.files.factors import acting, converted_sides, modules, pairs, weightless
from klora.files.names import Inventory, Rename, located
from klora.files.origin import stranger
from klora.files.report import report, stated
from klora.lora import LoRA


def read_lora(path: Path | str, inventory: Inventory, rename: Rename, widths: Mapping[str, int]) -> LoRA:
    """Read a LoRA file for the base that the inventory describes, or raise LoRAError: not a LoRA, damaged, of a kind
    that cannot be applied exactly, or not of this base. widths: of the base's text encoders' vectors, by component.
    What calls the LoRA is its metadata's "trigger", under whatever key the file states it."""
    with opened(path) as contents:
        if made_for := stranger(contents):
            raise LoRAError(f"is a LoRA for {made_for}. Expected one for the base of this request.")
        spelled = modules(acting(contents))
        if sides := converted_sides(contents.specs, spelled):  # small files may claim layers that no memory holds
            located({stem: weightless(*shape) for stem, shape in sides.items()}, inventory, rename)
        factors, error = pairs(contents, spelled)
        found = with_alphas(located(factors, inventory, rename), contents)
        ordered = {part: {n: found[part, n] for n in names if (part, n) in found} for part, names in inventory.items()}
        layers = ordered.pop(next(iter(inventory)))
        texts = {part: layers for part, layers in ordered.items() if layers}
        own = ("lora_adapter_metadata", "trigger")
        metadata = {key: text for key, text in contents.metadata.items() if key not in own}
        if said := stated(contents.metadata):
            metadata["trigger"] = said[0]
        lora = LoRA(layers, texts, metadata, taught(contents, widths))
        return replace(lora, report=report(contents, spelled, lora, error))
