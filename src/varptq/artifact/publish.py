"""What of an artifact goes to a repository of the hub, and sending it.

    config.json, model.safetensors    as they are, after every check that reading them makes
    README.md                         the card, with the repository's name and what was measured
    samples.png                       where there is a picture

Other files of the folder stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from varptq import hub
from varptq.artifact.card import CARD_FILE, PICTURE_FILE, Quality, card, is_edited
from varptq.artifact.format import CONFIG_FILE, WEIGHTS_FILE
from varptq.artifact.load import check_files, read_config
from varptq.errors import InputError
from varptq.hub import Repo


@dataclass(frozen=True)
class Parcel:
    """Files by their name in the repository, and what becomes of them."""

    repo: Repo
    files: dict[str, Path | bytes]

    @property
    def card(self) -> str:
        content = self.files[CARD_FILE]
        assert isinstance(content, bytes)
        return content.decode()

    def sizes(self) -> dict[str, int]:
        """Bytes of every file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }

    def send(self, *, message: str, private: bool = False) -> str:
        """Send everything as one commit, and return its address. Raises as `hub.send`."""
        return hub.send(self.repo, self.files, message=message, private=private)


def packed(
    folder: Path, name: str, quality: Quality | None = None, picture: bytes | None = None
) -> Parcel:
    """What would be sent of the artifact in `folder` to the repository `name`; nothing is.

    A README.md that is not as `save` wrote it is somebody's own and goes as it is. picture: a PNG
    file. Raises `ArtifactError` for an artifact that could not be loaded, `InputError` for what
    names no repository, and for an evaluation or a picture beside a README.md of one's own.
    """
    repo = Repo.parse(name)
    if repo is None:
        raise InputError(
            f"repository {name!r}: expected org/name or org/name@branch, letters, digits, -, _ "
            "and . alone"
        )
    document, _ = read_config(folder)
    check_files(folder)
    own = _own_card(folder / CARD_FILE)
    if own is not None and (quality is not None or picture is not None):
        raise InputError(
            f"{folder / CARD_FILE}: was edited, so nothing is added to it; put the figures into "
            "it, or delete it"
        )
    text = own if own is not None else card(document, str(repo), quality)
    files: dict[str, Path | bytes] = {
        CARD_FILE: text.encode(),
        CONFIG_FILE: folder / CONFIG_FILE,
        WEIGHTS_FILE: folder / WEIGHTS_FILE,
    }
    return Parcel(repo, files if picture is None else {**files, PICTURE_FILE: picture})


def _own_card(path: Path) -> str | None:
    """The text of a README.md that `save` did not write. Raises `InputError`."""
    try:
        text = path.read_text(encoding="utf-8") if path.exists() else None
    except (OSError, UnicodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); write it again as UTF-8") from None
    return text if text is not None and is_edited(text) else None
