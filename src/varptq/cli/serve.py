"""`varptq serve`: the studio in the browser, on this machine.

Opens files under the given folders, the artifacts on the hub that are named, and the published
models on this machine; results go to --out. Runs until Ctrl-C.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from varptq.cli import options
from varptq.errors import InputError


def command(
    folders: Annotated[
        list[str] | None,
        typer.Argument(
            help="Folders with artifacts, checkpoints and reports to open, or artifacts by their "
            "names on the hub."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for new artifacts and reports.")] = Path(
        "out/studio"
    ),
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 requires --auth.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")
    ] = 7860,
    auth: Annotated[
        str | None,
        typer.Option(metavar="USER:PASSWORD", envvar="VARPTQ_AUTH", help="Require this login."),
    ] = None,
    encoder: options.Encoder = None,
    runtime: options.Runtime = options.RUNTIME,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
) -> None:
    """Open the studio in the browser: generate, edit, quantize, read reports."""
    if find_spec("gradio") is None:
        raise InputError("serve: needs gradio; install it with pip install 'varptq[web]'")
    from varptq.artifact.remote import artifact_folder
    from varptq.web.surroundings import without_proxies

    opened = [artifact_folder(folder) for folder in folders or []]
    with without_proxies():
        from varptq.web.loaded import LoadedModels
        from varptq.web.server import Options, make_studio, parse_auth, serve

    served = Options(host, port, parse_auth(auth) if auth else None)
    served.check()
    reader = None
    if encoder is not None:
        from varptq.models.text_encoder import T5Encoder

        reader = T5Encoder(encoder, device=device)
    models = LoadedModels(device=device, dtype=dtype, runtime=runtime, encoder=reader)
    studio = make_studio(opened, out, models)
    serve(studio, served, lambda address: typer.echo(f"varptq studio: {address}", err=True))
