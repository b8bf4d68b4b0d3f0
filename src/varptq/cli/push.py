"""`varptq push`: an artifact to a repository of the Hugging Face hub.

Without --yes it shows what would go, the files and the card, and nothing leaves this machine. With
it everything goes as one commit; the repository is made if it is not there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq import readable
from varptq.cli import common, options
from varptq.cli.quoted import quoted

if TYPE_CHECKING:
    from varptq.artifact.publish import Parcel

# Where an evaluation is looked for if none is named.
EVALUATION = "evaluation"
MESSAGE = "varptq push"


def command(
    artifact: Annotated[str, typer.Argument(metavar="ARTIFACT", help="Folder of the artifact.")],
    name: Annotated[
        str,
        typer.Argument(metavar="ORG/NAME", help="The repository; org/name@branch for a branch."),
    ],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder that varptq evaluate has filled, for figures and a picture in the card; "
            "default: ARTIFACT/evaluation, where there is one.",
        ),
    ] = None,
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    private: Annotated[
        bool, typer.Option("--private", help="A new repository is private.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Send; without it nothing is sent.")] = False,
    json: options.Json = False,
) -> None:
    """Show what of an artifact would go to the hub, or send it with --yes."""
    parcel = packed(artifact, name, evaluation)
    document = describe(parcel, private)
    if yes:
        title = message or MESSAGE
        document |= {"sent": True, "commit": parcel.send(message=title, private=private)}
    if json:
        common.print_json(document)
        return
    common.print_rows("varptq push", rows(document))
    if not yes:
        typer.echo(f"README.md would be:\n\n{parcel.card}")
        typer.echo("nothing was sent; the same command with --yes sends it")


def packed(artifact: str, name: str, evaluation: Path | None) -> Parcel:
    from varptq.artifact import publish
    from varptq.artifact.load import read_config
    from varptq.artifact.remote import artifact_folder

    folder = artifact_folder(artifact)
    if evaluation is None and (folder / EVALUATION).is_dir():
        evaluation = folder / EVALUATION
    if evaluation is None:
        return publish.packed(folder, name)
    return publish.packed(folder, name, *quoted(evaluation, read_config(folder)[0]))


def describe(parcel: Parcel, private: bool) -> dict[str, Any]:
    """What would be sent, as plain JSON values."""
    sizes = parcel.sizes()
    return {
        "repository": parcel.repo.name,
        "revision": parcel.repo.revision,
        "private": private,
        "files": sizes,
        "bytes": sum(sizes.values()),
        "card": parcel.card,
        "sent": False,
        "commit": None,
    }


def rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    kind = "private" if document["private"] else "public"
    found = [
        ("repository", f"{document['repository']}, {kind} if it is new"),
        ("branch", document["revision"] or "main"),
        *((name, readable.megabytes(size)) for name, size in document["files"].items()),
        ("in all", readable.megabytes(document["bytes"])),
    ]
    return [*found, ("commit", document["commit"])] if document["sent"] else found
