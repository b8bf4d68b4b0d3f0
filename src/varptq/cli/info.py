"""`varptq info`: the parts of a float model or an artifact, and their cost.

Architecture, sizes, bits of every kind of tensor, bit operations (BOPs) per image by kind, and for
an artifact theta with the tokens it duplicates. A model given by name is described from its
architecture, without reading weights; nothing is computed with the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from varptq.cli import common, options
from varptq.cli.model_choice import ModelChoice

if TYPE_CHECKING:
    from varptq.models.pipeline import Pipeline
    from varptq.models.transformer import Transformer
    from varptq.quant.bops import LayerShape
    from varptq.quant.config import InputTransform, QuantConfig, TensorSpec
    from varptq.quant.pipeline import QuantizedPipeline


def command(
    source: options.Source = None,
    var: options.VarFile = None,
    vae: options.VaeFile = None,
    random: options.RandomModel = None,
    runtime: Annotated[
        bool,
        typer.Option("--runtime", help="Which runtime would execute the artifact here, and why."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Describe a model or an artifact: architecture, sizes, bits, bit operations, theta."""
    if runtime:
        show_runtimes(source, json)
        return
    document = describe(_open(ModelChoice(source, var, vae, random)))
    if json:
        common.print_json(document)
        return
    common.print_rows(f"{document['name']}, {document['kind']}", overview(document))
    if "config" in document:
        common.print_table(bits_table(document))
    common.print_table(bops_table(document))
    for key, title, keys in (
        ("duplicated", "Tokens duplicated by shift-and-sum", "cached tokens"),
        ("text_duplicated", "Tokens of the text duplicated by shift-and-sum", "text tokens"),
    ):
        if document.get(key):
            common.print_table(copies_table(document[key], title, keys))


def _open(choice: ModelChoice) -> Pipeline:
    name = choice.random or choice.source
    if name is None or choice.folder is not None:
        return choice.load("auto" if choice.folder is None else "simulated")
    from varptq.models import presets
    from varptq.models.families import family
    from varptq.models.meta import on_meta
    from varptq.models.pipeline import Pipeline

    preset = presets.preset(name)
    with on_meta():
        row = family(preset.family)
        networks = row.build(preset.transformer_arch, preset.autoencoder_arch)
        return Pipeline(*networks, name, family=row.name)


def show_runtimes(source: str | None, json: bool) -> None:
    folder = ModelChoice(source).folder if source is not None else None
    document = runtimes(folder)
    if json:
        common.print_json(document)
        return
    threads = f"{document['threads']} of {document['cores']} cores"
    rows = [("auto", f"{document['auto']}: {document['reason']}")] if document["auto"] else []
    rows += [(name, f"cannot: {why}" if why else "can") for name, why in document["cannot"].items()]
    native = document["native"]
    found = f"{native['isa']}, of {', '.join(native['features'])}" if native["isa"] else "not there"
    rows += [("native core", native["reason"] or found), ("threads", threads)]
    common.print_rows(f"runtimes for {source}" if source else "runtimes", rows)


def runtimes(folder: Path | None) -> dict[str, Any]:
    """Which runtime "auto" takes for an artifact, why others cannot execute it, and what the
    machine offers. Without an artifact, only what depends on the machine."""
    import warnings

    import torch

    from varptq.artifact.load import read_blank
    from varptq.native import binding
    from varptq.runtime.resolve import resolve, survey

    var = None if folder is None else read_blank(folder).var
    with warnings.catch_warnings():
        # The result says whether the core is missing.
        warnings.simplefilter("ignore")
        choice = None if var is None else resolve(var)
        cannot = survey(var)
    there = binding.core() is not None
    return {
        "auto": choice and choice.name,
        "reason": choice and choice.reason,
        "cannot": cannot,
        "native": {
            "isa": binding.isa() if there else None,
            "features": binding.features() if there else [],
            "reason": binding.reason(),
        },
        "threads": torch.get_num_threads(),
        "cores": common.usable_cores(),
    }


def describe(pipe: Pipeline) -> dict[str, Any]:
    """Everything `info` knows, as plain JSON values."""
    from varptq.quant.describe import bops_account
    from varptq.quant.pipeline import QuantizedPipeline

    config = pipe.config if isinstance(pipe, QuantizedPipeline) else None
    account = bops_account(pipe.var, config)
    document: dict[str, Any] = {
        "name": pipe.name,
        "kind": "float" if config is None else f"quantized {config.name}",
        "family": pipe.family,
        "architecture": architecture(pipe),
        "facts": pipe.var.facts(),
        "sources": pipe.sources,
        "sizes": common.sizes(pipe),
        "bits": bits(pipe.var, config),
        "bops": {
            "total": account.total,
            "float_total": account.float_total,
            "by_kind": account.by_kind(),
        },
    }
    return document | (quantization(pipe) if isinstance(pipe, QuantizedPipeline) else {})


def architecture(pipe: Pipeline) -> dict[str, Any]:
    from varptq.models.families import family

    document = family(pipe.family).document.of(pipe.var.arch, pipe.vae.arch).to_dict()
    return {
        **document["transformer"],
        "num_tokens": pipe.scales.num_tokens,
        "image_size": pipe.vae.image_size,
    }


def quantization(pipe: QuantizedPipeline) -> dict[str, Any]:
    """How an artifact was made, and the effect of theta."""
    found = pipe.report.get("theta") or {}
    return {
        "config": pipe.config.to_dict(),
        "runs_on": common.runs_on(pipe),
        "method": pipe.method,
        "seed": pipe.seed,
        "calibration": pipe.calibration,
        "theta": common.theta_summary(pipe),
        "duplicated": duplicated_per_scale(found.get("copies", ())),
        "text_duplicated": duplicated_per_scale(found.get("text_copies", ())),
    }


def duplicated_per_scale(copies: Sequence[dict[str, Any]]) -> list[dict[str, float]]:
    """Means over the blocks: at every scale `duplicated` of `keys` tokens have copies."""
    rows = []
    for scale in sorted({copy["scale"] for copy in copies}):
        blocks = [copy for copy in copies if copy["scale"] == scale]
        means = {
            key: sum(block[key] for block in blocks) / len(blocks)
            for key in ("keys", "duplicated", "mean_copies")
        }
        rows.append({"scale": scale, **means})
    return rows


def bits(var: Transformer, config: QuantConfig | None) -> dict[str, dict[str, str]]:
    """Kind of layer -> operand -> what it is stored as; layers of a kind that differ are joined."""
    from varptq.models.transformer import float_layout
    from varptq.quant.describe import describe_linears, describe_products

    found: dict[str, dict[str, list[str]]] = {}

    def note(kind: str, operand: str, text: str) -> None:
        texts = found.setdefault(kind, {}).setdefault(operand, [])
        if text not in texts:
            texts.append(text)

    foldable = float_layout(var).folds()
    for layer in describe_linears(var, config):
        spec = config.linear_for(layer.name) if config else None
        for operand in ("weight", "input"):
            text = stored_as(getattr(spec, operand, None), layer.in_features, layer.name)
            if operand == "input" and spec is not None and spec.input is not None:
                text += transformed(spec.input_transform, layer, layer.name in foldable)
            note(layer.kind, operand, text)
    for product in describe_products(var, config):
        spec = config.attention_for(product.name) if config else None
        for operand in ("query", "key", "probability", "value"):
            note("attention", operand, stored_as(getattr(spec, operand, None)))
    return {
        kind: {operand: "; ".join(texts) for operand, texts in operands.items()}
        for kind, operands in found.items()
    }


def stored_as(spec: TensorSpec | None, row: int | None = None, layer: str = "") -> str:
    """A spec in words, e.g. "4 bits, groups of 128", after the fallback of its groups."""
    from varptq.quant.config import USUAL_TYPE

    if spec is None:
        return "float"
    words = [f"{spec.num_bits} bits"]
    if spec.type != USUAL_TYPE:
        words.append(spec.type.replace("_", "-"))
    group = spec.group_for(row, layer) if row is not None else None
    if group:
        words.append(f"groups of {group}")
    else:
        words.append("whole rows" if spec.strategy == "group" else f"per {spec.strategy}")
    return ", ".join(words)


def transformed(transform: InputTransform | None, layer: LayerShape, foldable: bool) -> str:
    """How an input is transformed first, e.g. ", smoothed, centred, rotated by 128"."""
    if transform is None:
        return ""
    block = transform.block_for(layer.in_features, layer.name)
    words = [
        "smoothed" if transform.smooth and foldable else "",
        "centred" if transform.center else "",
        f"rotated by {block}" if block else "",
    ]
    return "".join(f", {word}" for word in words if word)


def overview(document: dict[str, Any]) -> list[tuple[str, str]]:
    arch = document["architecture"]
    rows = [
        *document["facts"].items(),
        ("image", "{} x {}".format(*arch["image_size"])),
        *common.size_rows(document["sizes"]),
        bops_row(document["bops"]),
    ]
    if "theta" in document:
        rows += [
            ("method", f"{document['method']}, seed {document['seed']}"),
            ("runs on", document["runs_on"]),
            ("theta", common.theta_text(document["theta"])),
        ]
    return rows


def bops_row(bops: dict[str, Any]) -> tuple[str, str]:
    ratio = bops["float_total"] / bops["total"]
    compared = f"{ratio:.2f}x fewer than in 16-bit float" if ratio > 1 else "16-bit float"
    return "BOPs per image", f"{bops['total']:.3e}, {compared}"


def bits_table(document: dict[str, Any]) -> Table:
    table = Table("layers", "operand", "stored as", title="Bits", title_justify="left")
    for kind, operands in document["bits"].items():
        for index, (operand, text) in enumerate(operands.items()):
            table.add_row("" if index else kind, operand, text)
    return table


def bops_table(document: dict[str, Any]) -> Table:
    bops = document["bops"]
    table = Table("product", "BOPs", "share", title="Bit operations", title_justify="left")
    for kind, value in sorted(bops["by_kind"].items(), key=lambda item: -item[1]):
        table.add_row(kind, f"{value:.3e}", f"{value / bops['total']:.1%}")
    return table


def copies_table(found: Sequence[dict[str, float]], title: str, keys: str) -> Table:
    table = Table("scale", keys, "with copies", "mean copies", title=title, title_justify="left")
    for row in found:
        share = row["duplicated"] / row["keys"]
        table.add_row(
            f"{row['scale'] + 1:.0f}",
            f"{row['keys']:.0f}",
            f"{row['duplicated']:.1f} ({share:.0%})",
            f"{row['mean_copies']:.2f}",
        )
    return table
