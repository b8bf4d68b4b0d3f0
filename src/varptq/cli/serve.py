"""`varptq serve`: the studio in the browser, or with --api images over HTTP.

The studio opens files under the given folders, the artifacts on the hub that are named, and the
published models on this machine; its results go to --out. The API serves the models that are named.
Both run until Ctrl-C or SIGTERM.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from varptq.cli import options
from varptq.cli.model_choice import ModelChoice
from varptq.errors import InputError
from varptq.web.api import defaults

if TYPE_CHECKING:
    from varptq.models.pipeline import Pipeline

VARIABLES = {"auth": "VARPTQ_AUTH", "token": "VARPTQ_TOKEN"}
OUT = Path("out/studio")
STUDIO_PORT = 7860
STUDIO, API = "only for the studio", "only for the API, --api"
API_PACKAGES = ("starlette", "uvicorn", "python_multipart", "prometheus_client")


Sources = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[FOLDER|MODEL]...",
        help="Folders with artifacts, checkpoints and reports to open, or artifacts by their names "
        "on the hub. With --api: models to serve, folders of artifacts or names.",
    ),
]
Api = Annotated[
    bool, typer.Option("--api", help="Serve images in the shape of the OpenAI images API.")
]
Out = Annotated[
    Path | None,
    typer.Option(help=f"Folder for new artifacts and reports, {STUDIO}; default: {OUT}."),
]
Host = Annotated[
    str, typer.Option(help="Address to listen on; 0.0.0.0 requires --auth or --token.")
]
Port = Annotated[
    int | None,
    typer.Option(
        min=0,
        max=65535,
        help="Port to listen on; 0 takes a free one; default: "
        f"{STUDIO_PORT}, with --api {defaults.PORT}.",
    ),
]
Auth = Annotated[
    str | None,
    typer.Option(
        metavar="USER:PASSWORD", envvar=VARIABLES["auth"], help=f"Require this login, {STUDIO}."
    ),
]
Token = Annotated[
    str | None,
    typer.Option(envvar=VARIABLES["token"], help=f"Require this bearer token, {API}."),
]
Queue = Annotated[
    int | None,
    typer.Option(
        min=1,
        help=f"Requests under way at a time, others get 429, {API}; default: {defaults.QUEUE}.",
    ),
]
Deadline = Annotated[
    float | None,
    typer.Option(
        min=1,
        help=f"Seconds after which a request is given up, {API}; default: {defaults.DEADLINE:g}.",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Images of several requests computed at a time, "
        f"{API}; default: {defaults.BATCH_SIZE}.",
    ),
]


def command(
    sources: Sources = None,
    api: Api = False,
    out: Out = None,
    host: Host = "127.0.0.1",
    port: Port = None,
    auth: Auth = None,
    token: Token = None,
    queue: Queue = None,
    deadline: Deadline = None,
    batch_size: BatchSize = None,
    encoder: options.Encoder = None,
    runtime: options.Runtime = options.RUNTIME,
    device: options.Device = options.DEVICE,
    dtype: options.Dtype = options.DTYPE,
) -> None:
    """Open the studio in the browser (generate, edit, quantize, read reports), or serve images."""
    limits = {"queue": queue, "deadline": deadline, "batch_size": batch_size}
    given = {"host": host, "port": port, **limits}
    place = {"device": device, "dtype": dtype}
    if api:
        _refuse(STUDIO, out=out, auth=auth)
        said = {name: value for name, value in given.items() if value is not None}
        _serve_api(sources or [], {**said, "token": token}, encoder, runtime, place)
        return
    _refuse(API, token=token, **limits)
    reached = (host, STUDIO_PORT if port is None else port, auth)
    _serve_studio(sources or [], out or OUT, reached, encoder, {**place, "runtime": runtime})


def _refuse(only_for: str, **given: Any) -> None:
    """Raise `InputError` for an option of the other server; a secret is not repeated."""
    for name, value in given.items():
        if value is not None:
            unset = f", or unset {VARIABLES[name]}" if name in VARIABLES else ""
            raise InputError(f"--{name.replace('_', '-')}: {only_for}; leave it out{unset}")


def _serve_studio(
    sources: list[str],
    out: Path,
    reached: tuple[str, int, str | None],
    encoder: str | None,
    computing: dict[str, Any],
) -> None:
    """reached: host, port and login."""
    if find_spec("gradio") is None:
        raise InputError("serve: needs gradio; install it with pip install 'varptq[web]'")
    from varptq.artifact.remote import artifact_folder
    from varptq.web.surroundings import without_proxies

    opened = [artifact_folder(source) for source in sources]
    with without_proxies():
        from varptq.web.loaded import LoadedModels
        from varptq.web.server import Options, make_studio, parse_auth, serve

    host, port, auth = reached
    served = Options(host, port, parse_auth(auth) if auth else None)
    served.check()
    reader = None
    if encoder is not None:
        from varptq.models.text_encoder import T5Encoder

        reader = T5Encoder(encoder, device=computing["device"])
    models = LoadedModels(**computing, encoder=reader)
    studio = make_studio(opened, out, models)
    serve(studio, served, lambda address: typer.echo(f"varptq studio: {address}", err=True))


def _serve_api(
    sources: list[str],
    given: dict[str, Any],
    encoder: str | None,
    runtime: str,
    place: dict[str, Any],
) -> None:
    """given: fields of `Options`."""
    if not all(map(find_spec, API_PACKAGES)):
        raise InputError("serve: --api needs more packages; pip install 'varptq[api]'")
    from varptq.runtime.resolve import asked_for
    from varptq.web.api.served import Served
    from varptq.web.api.server import Options, serve

    asked_for(runtime)  # float models have none, and would not ask
    if not sources:
        raise InputError("model: none given; name models to serve, or give folders of artifacts")
    served = Options(**given)
    served.check()
    choices = {_name(source): ModelChoice(source, **place) for source in sources}
    if len(choices) < len(sources):
        raise InputError(
            f"models {', '.join(sources)}: two have one name; rename the folder of one of them"
        )
    for choice in choices.values():
        choice.about()  # all are there, before the first is read
    models = [
        Served.of(name, _reading(_loaded(choice, runtime), encoder))
        for name, choice in choices.items()
    ]
    serve(models, served, lambda address: typer.echo(f"varptq api: {address}", err=True))


def _name(source: str) -> str:
    """What clients call a model: the name of its folder, or its own."""
    return Path(source).resolve().name if Path(source).is_dir() else source


def _loaded(choice: ModelChoice, runtime: str) -> Pipeline:
    """A float model has no runtime, and may be served beside an artifact."""
    return choice.load(runtime if choice.folder is not None else options.RUNTIME)


def _reading(pipe: Pipeline, encoder: str | None) -> Pipeline:
    """The model with its text encoder, or the one that is named; in either case texts of strangers
    leave nothing on disk."""
    from varptq.models.text_encoder import T5Encoder

    own = pipe.encoder.source if isinstance(pipe.encoder, T5Encoder) else None
    if pipe.var.READS_TEXTS and (source := encoder or own) is not None:
        pipe.encoder = T5Encoder(source, cache=False, device=pipe.device)
    return pipe
