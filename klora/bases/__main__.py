"""Fetch base models: what `python -m klora.bases` does in the image's build, and script/download-weights on a laptop.

It needs no torch, and of klora only this package and what that imports: the build has a wheel of these alone.
"""

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from klora.bases.hub import how_to_open
from klora.bases.install import check_room, listed, setup_note
from klora.bases.pget import find_pget
from klora.bases.table import BASES, INDICES, base_of
from klora.errors import BaseModelError

logger = logging.getLogger(__name__)

SECRET = Path("/run/secrets/hf_token")  # where a build has its secret of this name
IN_A_BUILD = (
    "In a build: cog build --secret id=hf_token,env=HF_TOKEN, with --no-cache after one without it; or "
    "--or-at-setup in cog.yaml."
)
NOTE = """{name} is not here: the build had no token for it, and --or-at-setup left it to the server's set-up.
{how} Set-up then fetches it and takes this note away.
"""


def parsed(arguments: Sequence[str], folder: Path | None) -> argparse.Namespace:
    """The command line. folder: the default one, if there is any."""
    table = "\n".join(
        f"  {name:16}{base.repository}, {base.licence}{', gated' * base.gated}" for name, base in BASES.items()
    )
    parser = argparse.ArgumentParser(
        prog="download-weights" if folder else "python -m klora.bases",
        description="Fetch base models, or what is missing of them, and check what comes.",
        epilog=f"bases:\n{table}\n\nHF_TOKEN: a Hugging Face token, for gated bases. KLORA_PGET_SHA256: of the pget "
        "that may fetch public ones.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bases", nargs="+", metavar="BASE")
    where = f"where each base has a folder; default: {folder}" if folder else "where each base has a folder"
    parser.add_argument("--folder", type=Path, default=folder, required=folder is None, help=where)
    parser.add_argument(
        "--or-at-setup", action="store_true", help="without a token leave gated bases to set-up, with a note of it"
    )
    return parser.parse_args(arguments)


def main(
    arguments: Sequence[str], environment: Mapping[str, str], folder: Path | None = None, secret: Path = SECRET
) -> int:
    """Fetch the bases of a command line. Returns the exit status; what went wrong is a sentence on standard error."""
    options = parsed(arguments, folder)
    logging.basicConfig(format="%(message)s", stream=sys.stdout)
    logging.getLogger("klora").setLevel(logging.INFO)
    try:
        fetch(options.bases, options.folder, _token(environment, secret), environment, or_at_setup=options.or_at_setup)
    except BaseModelError as error:
        sys.stderr.write(f"Error: {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"Error: {options.folder} cannot be written into: {error.strerror}. Expected one that can.\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("Stopped. What has come stays; the same command goes on from there.\n")
        return 130
    return 0


def fetch(
    names: Sequence[str], folder: Path, token: str | None, environment: Mapping[str, str], *, or_at_setup: bool = False
) -> None:
    """Fetch bases into a folder, once it is sure that there is room for all of them. Raises BaseModelError.

    or_at_setup: where there is no token for a gated base, leave a note in its place instead of raising.
    """
    wanted = {name: base_of(name) for name in names}
    closed = [name for name, base in wanted.items() if base.gated and not token]
    if closed and not or_at_setup:
        raise BaseModelError(f"{how_to_open(closed[0], wanted[closed[0]])} {IN_A_BUILD}")
    pget = find_pget(environment.get("KLORA_PGET_SHA256"))
    listings = [listed(name, base, folder, token) for name, base in wanted.items() if name not in closed]
    for listing in listings:
        size, missing = listing.size / 1e9, listing.missing / 1e9
        licence = listing.base.licence
        logger.info("%s: %.2f GB, of which %.2f are missing; licence: %s.", listing.name, size, missing, licence)
    check_room([listing.name for listing in listings], folder, sum(listing.missing for listing in listings))
    for listing in listings:
        listing.distrust()
        logger.info("%s is in %s.", listing.name, listing.install(pget))
    for name in closed:
        if not any((folder / name / index).is_file() for index in INDICES):
            _leave_note(name, folder)


def _leave_note(name: str, folder: Path) -> None:
    """Write the note by which set-up knows that it has to fetch a base, and log so."""
    note = setup_note(folder, name)
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(NOTE.format(name=name, how=how_to_open(name, BASES[name])))
    logger.warning("%s is NOT fetched: there is no token. Set-up is to fetch it, says %s.", name, note)


def _token(environment: Mapping[str, str], secret: Path) -> str | None:
    """The token in HF_TOKEN, else that in the build's secret, None where both are blank."""
    token = environment.get("HF_TOKEN") or (secret.read_text() if secret.is_file() else "")
    return token.strip() or None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
