"""What authorities say of a file beforehand: of which family it surely is, and words that may stand in a prompt."""

import pytest

from klora.bases.table import BASES
from klora.models import FAMILIES
from klora.sources.authority import MAX_WORD, MAX_WORDS, plain_words
from klora.sources.download import base_of, family_of

NAMED = {
    "sdxl": ("SDXL 1.0", "SDXL 0.9", "SDXL Turbo", "SDXL Lightning", "SDXL 1.0 LCM", "Pony", "Illustrious", "NoobAI"),
    "flux": ("Flux.1 D", "Flux.1 S", "Flux.1 Krea", "Flux.1 Kontext"),
    "": ("SD 1.4", "SD 1.5", "SD 1.5 LCM", "SD 2.1 768", "SD 3", "SD 3.5 Large", "Flux.2 D", "Wan Video 14B t2v",
         "Qwen", "Hunyuan Video", "HiDream", "SVD XT", "LTXV", "CogVideoX", "PixArt a", "AuraFlow", "Pony V7",
         "Kolors", "Chroma", "Flux.2 Klein 9B-base", "LTXV2", "LTXV 2.3", "ZImageTurbo", "ZImageBase", "Krea 2",
         "Anima", "Lumina", "Mochi", "Qwen 2", "lodestones/Chroma", "lodestones/Chroma1-HD",
         "Qwen/Qwen-Image-Edit-2509", "Tongyi-MAI/Z-Image-Turbo", "black-forest-labs/FLUX.2-klein-4B", "briaai/FIBO",
         "ostris/Flex.1-alpha", "Kwai-Kolors/Kolors-diffusers", "meituan-longcat/LongCat-Image"),
    None: (None, "", "Other", "SDXL", "stabilityai/stable-diffusion-xl-base-1.0",
           "black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-Krea-dev", "me/Chroma", "Animagine", "sd 1.5",
           "my SDXL 1.0", "SD 1.5\nPony"),
}  # fmt: skip


@pytest.mark.parametrize(("family", "said"), [(family, said) for family, names in NAMED.items() for said in names])
def test_a_family_is_known_by_civitais_words_and_by_models_own_repositories(
    family: str | None, said: str | None
) -> None:
    assert family_of(said) == family
    assert family in (None, "", *FAMILIES)


@pytest.mark.parametrize(
    ("base", "said"),
    [
        *(("sdxl", said) for said in ("SDXL 1.0", "SDXL Lightning", BASES["sdxl"].repository)),
        *(("illustrious-xl", said) for said in ("Illustrious", BASES["illustrious-xl"].repository)),
        ("illustrious-xl", "OnomaAIResearch/Illustrious-xl-early-release-v0"),
        *(("flux-dev", said) for said in ("Flux.1 D", BASES["flux-dev"].repository)),
        *(("flux-schnell", said) for said in ("Flux.1 S", BASES["flux-schnell"].repository)),
        *(("", said) for said in (None, "", "Other", "Pony", "NoobAI", "Flux.1 Kontext", "SD 1.5", "me/Illustrious")),
        *(("", said) for said in ("OnomaAIResearch/Illustrious-Lumina-v0.03", "black-forest-labs/FLUX.1-Krea-dev")),
    ],
)
def test_a_base_of_ours_is_known_by_civitais_word_and_by_its_own_repository(base: str, said: str | None) -> None:
    assert base_of(said) == base
    assert not base or BASES[base].family == (family_of(said) or BASES[base].family)


def test_words_are_those_that_can_stand_in_a_prompt() -> None:
    said = [" zork style, ", "zork style", "", " , ", "a\nb", "\x1b[31m", None, 3, ["x"], "é 猫", "x" * (MAX_WORD + 1)]
    assert plain_words(said) == ("zork style", "é 猫")
    assert plain_words([str(n) for n in range(99)]) == tuple(str(n) for n in range(MAX_WORDS))
