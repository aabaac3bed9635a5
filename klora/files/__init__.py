"""LoRA files -> klora.lora.LoRA: exactly what their authors meant, or a refusal that says why.

container   one safetensors file, alone, in a tar or in a repository; its header held against bounds
factors     its tensors -> a pair for each module      lycoris   the pairs of LoHa, LoKr and weight differences
names       the file's names -> layers of the base     adapter   alphas that are stated beside the tensors
origin      which base a file was made for             report    what inspect and the log say of a file
embeddings  words that a file teaches                  shelf     the LoRAs read last, and their scores

A module is one layer as the file has it, called by the file's own name for it (stem); a layer is one of the base.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from klora.errors import LoRAError
from klora.files.adapter import with_alphas
from klora.files.container import opened
from klora.files.embeddings import taught_words
from klora.files.factors import converted_sides, effective, modules, pairs, weightless
from klora.files.names import Inventory, Rename, located
from klora.files.origin import foreign_origin
from klora.files.report import file_report, stated_triggers
from klora.lora import LoRA


def read_lora(path: Path | str, inventory: Inventory, rename: Rename, widths: Mapping[str, int]) -> LoRA:
    """Read a LoRA file for the base that the inventory describes. The file's trigger is then in metadata["trigger"],
    whatever key the file has for it. widths: {text encoder's component: width of its embeddings} of the base.
    Raises LoRAError: not a LoRA, damaged, of a kind that cannot be applied exactly, or for another base."""
    with opened(path) as contents:
        if foreign := foreign_origin(contents):
            raise LoRAError(f"is a LoRA for {foreign}. Expected one for the base of this request.")
        file_modules = modules(effective(contents))
        if sides := converted_sides(contents.specs, file_modules):  # small files may claim layers that no memory holds
            located({stem: weightless(*shape) for stem, shape in sides.items()}, inventory, rename)
        factors, error = pairs(contents, file_modules)
        found = with_alphas(located(factors, inventory, rename), contents)
        ordered = {part: {n: found[part, n] for n in names if (part, n) in found} for part, names in inventory.items()}
        layers = ordered.pop(next(iter(inventory)))
        text_encoders = {part: layers for part, layers in ordered.items() if layers}
        replaced = ("lora_adapter_metadata", "trigger")  # the alphas are folded in
        metadata = {key: text for key, text in contents.metadata.items() if key not in replaced}
        if triggers := stated_triggers(contents.metadata):
            metadata["trigger"] = triggers[0]
        lora = LoRA(layers, text_encoders, metadata, taught_words(contents, widths))
        return replace(lora, report=file_report(contents, file_modules, lora, error))
