"""`Pipeline`, a float model ready to use, and how it is loaded or built."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import torch

from varptq.errors import InputError, NonFiniteError
from varptq.models import presets
from varptq.models.alphabet import Alphabet
from varptq.models.autoencoder import Autoencoder
from varptq.models.class_names import checked_names
from varptq.models.families import family, family_of
from varptq.models.graphs import Graphs
from varptq.models.placement import checked_device, checked_dtype
from varptq.models.prompts import Prompts, listed
from varptq.models.sampling import LOGITS, DrawPlan, Sampler, SamplingSettings, per_scale
from varptq.models.scales import Scales
from varptq.models.shards import INDEX_SUFFIX
from varptq.models.state_file import source_sha256
from varptq.models.texts import TextEncoder
from varptq.models.transformer import Transformer
from varptq.torch_state import plain_torch


@dataclass
class Pipeline:
    """`var(prompts, inputs_BLc) -> logits_BLV` and `vae.encode / decode / teacher_inputs`, on one
    device.

    class_names: names of the prompts in the pool, where they have any: of classes, or the texts
    that a model which reads texts comes with. sources: sha256 of the files
    the weights came from, or the seed of random ones. sampler: what draws symbols. family: a name
    of `families.FAMILIES`. encoder: what makes features of strings, for a model that reads texts.
    chosen: the prompts there are to draw images for, where somebody has said which. graphs: what
    `generate(cuda_graphs=True)` has recorded; a copy of a pipeline records its own.
    """

    var: Transformer
    vae: Autoencoder
    name: str
    class_names: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)
    sampler: Sampler = field(default_factory=Sampler)
    family: str = "var"
    encoder: TextEncoder | None = None
    chosen: Prompts | None = None
    graphs: Graphs = field(default_factory=Graphs, init=False, repr=False, compare=False)

    @property
    def scales(self) -> Scales:
        return self.var.scales

    @property
    def alphabet(self) -> Alphabet:
        return self.var.alphabet

    @property
    def device(self) -> torch.device:
        return self.var.device

    @property
    def dtype(self) -> torch.dtype:
        return self.var.dtype

    @property
    def image_by_image(self) -> bool:
        """Whether images are decoded one after another, so that none depends on its batch."""
        return False

    @plain_torch()
    def to(
        self,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
    ) -> Self:
        """Move and/or cast both networks in place; codes and index buffers keep their integer
        types.

        Raises `ConfigError` for a device that is not here or a dtype no model computes in, and
        `NonFiniteError` for a weight beyond the range of the dtype, before anything has changed.
        """
        device = None if device is None else checked_device(device)
        dtype = None if dtype is None else checked_dtype(dtype)
        if dtype == torch.float16:
            self._check_range(torch.float16)
        self.var.to(device=device, dtype=dtype)
        self.vae.to(device=device, dtype=dtype)
        return self

    def _check_range(self, dtype: torch.dtype) -> None:
        largest = torch.finfo(dtype).max
        for part in (self.var, self.vae):
            for name, tensor in part.named_parameters():
                if not tensor.is_meta and float(tensor.detach().abs().max()) > largest:
                    raise NonFiniteError(
                        f"model {self.name!r}: tensor {name!r} holds numbers above {largest:g}, "
                        f"the largest of {dtype}: use bfloat16 or float32"
                    )

    @contextmanager
    def _named(self) -> Iterator[None]:
        """What is refused is refused by this model."""
        try:
            yield
        except InputError as error:
            raise InputError(f"model {self.name!r}: {error}") from None

    def prompts(self, values: Any, negative: Any = None) -> Prompts:
        """Prompts from what a caller writes. For a class-conditional model these are class ids and
        names; "unconditional" is a name in every model. For one that reads texts they are strings,
        features, or what `read_prompts` gives. negative: what takes the place of nothing in
        guidance, one for all or one each. Raises `InputError` naming the first that cannot be
        used."""
        with self._named():
            asked = self.var.prompts(values, self.class_names, self.encoder)
            if negative is None:
                return asked
            if not asked.NEGATIVE:
                raise InputError("negative: this model takes no negative prompts; leave it out")
            several = self.var.prompts(listed(negative), self.class_names, self.encoder)
            return asked.instead_of(several)

    def filled(self, settings: SamplingSettings | None = None) -> SamplingSettings:
        """These settings, with the model's own value for each that is None."""
        return (settings or SamplingSettings()).filled(self.var.sampling)

    def plan(
        self,
        settings: SamplingSettings,
        guide_at: Sequence[int] = (LOGITS,),
        *,
        negative: bool = False,
    ) -> DrawPlan:
        """These settings as numbers per scale for this model. negative: whether there is a negative
        prompt. Raises `InputError` for another number of values than of scales, for more guided
        scales, and for a negative prompt where none is guided, `ConfigError` for a place that it
        cannot be guided at."""
        filled = self.filled(settings)
        assert filled.cfg is not None and filled.tau is not None
        assert filled.top_k is not None and filled.top_p is not None
        places, count = tuple(guide_at), self.scales.num_scales
        guided = count if filled.guided_scales is None else filled.guided_scales
        if guided > count:
            raise InputError(f"guided_scales {guided}: expected 0 to {count}, the model's scales")
        with self._named():
            self.var.check_guidance(places)
        strengths = self.var.strengths(filled.cfg)
        plan = DrawPlan(
            (*strengths[:guided], *(0.0,) * (count - guided)),
            per_scale("tau", filled.tau, self.scales),
            filled.top_k,
            filled.top_p,
            filled.temperature,
            filled.more_smooth,
            places,
        )
        if negative and not plan.is_guided:
            said = f"guided_scales {guided}" if any(strengths) else f"cfg {filled.cfg}"
            raise InputError(
                f"negative: with {said} no scale is guided, so nothing would be drawn differently; "
                "guide one, or leave the negative prompt out"
            )
        return plan

    def over(self, scales: Scales) -> Self:
        """The same model over another schedule; its networks are shared. Raises `InputError` where
        it draws at its own only."""
        with self._named():
            var = self.var.over(scales)
            return replace(self, var=var, vae=self.vae.over(scales))

    def sized(self, size: Any) -> Self:
        """The same model for images of `size`: a `Scales`, or what its family calls a size; None
        is its own. Raises `InputError` for a size it does not know."""
        if size is None:
            return self
        with self._named():
            scales = self.var.schedule(size)
        return self.over(scales)

    def pool(self) -> Prompts:
        """The prompts there are to draw images for: those of `drawing_for`, else every class once,
        or the texts that come with the package. Raises `InputError` where there are none."""
        if self.chosen is not None:
            return self.chosen
        with self._named():
            return self.var.pool(self.class_names, self.encoder)

    def drawing_for(self, prompts: Any) -> Self:
        """The same model with these prompts as its pool; None is the pool it has, texts of which
        are encoded now and not again. Raises `InputError` as `prompts` and `pool` do."""
        if prompts is not None:
            return replace(self, chosen=self.prompts(prompts))
        return self if self.var.num_prompts else replace(self, chosen=self.pool())

    def named(self, class_names: Sequence[str]) -> Self:
        """The same model with names for its classes, in the order of their ids: each an entry of a
        name and then its synonyms, after commas (class_names.py). An artifact keeps them. Raises
        `InputError` for a model that has no classes, for another number of names, and for names
        that cannot be told apart."""
        checked = checked_names(class_names, "class_names: entry")
        if not self.var.num_prompts:
            raise InputError("class_names: this model reads texts and has no classes")
        if len(checked) != self.var.num_prompts:
            raise InputError(
                f"class_names: {len(checked)} names, expected one for each of "
                f"{self.var.num_prompts} classes"
            )
        return replace(self, class_names=checked)


@plain_torch()
def load_model(
    name: str | None = None,
    *,
    var: str | Path | None = None,
    vae: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
    download: bool = False,
    cache_dir: str | Path | None = None,
    mapped: bool = False,
) -> Pipeline:
    """A float model by preset name ("demo", "demo-text", "var-d16" .. "infinity-2b" ..) or from two
    checkpoint files.

    Family and architecture are read off the tensors. Files are `.pth` (weights only) or
    `.safetensors`, or the index of one in shards, or the folder of one; `checkpoint.read_state`
    says what else is taken out of them.
    mapped: leave both networks on their mapped files, in the dtypes that they have, so that a model
    larger than memory can be read block by block (streamed.py, which is told device and dtype).
    All presets but the demos come from the local hub cache, or from the hub with `download=True`.
    Raises `InputError` for contradicting arguments, `ConfigError` for a device that is not here or
    a dtype no model computes in, `CheckpointError` for files that cannot be used.
    """
    device, dtype = checked_device(device), checked_dtype(dtype)
    if name is not None:
        if var is not None or vae is not None:
            raise InputError(f"model {name!r}: give either a name or the two files var= and vae=")
        preset = presets.preset(name)
        var_path, vae_path = presets.resolve(name, download=download, cache_dir=cache_dir)
        class_names, chosen = tuple(preset.class_names or ()), preset.family
    else:
        if var is None or vae is None:
            raise InputError("model: give a preset name, or both files var= and vae=")
        preset, var_path, vae_path, class_names = None, Path(var), Path(vae), ()
        chosen = family_of(var_path)
        name = Path(var_path.name.removesuffix(INDEX_SUFFIX)).stem
    # bfloat16 has the range of float32, and a large model need not be there in both. What another
    # dtype cannot hold is found out when the model is cast.
    reading = dtype if dtype == torch.bfloat16 else torch.float32
    transformer, autoencoder = family(chosen).read(var_path, vae_path, None if mapped else reading)
    sources = {"var": source_sha256(var_path), "vae": source_sha256(vae_path)}
    pipeline = Pipeline(transformer, autoencoder, name, class_names, sources, family=chosen)
    if preset is not None:
        pipeline = pipeline.sized(preset.size)
        pipeline.encoder = presets.encoder_of(name, download)
    return _frozen(pipeline if mapped else pipeline.to(device=device, dtype=dtype))


@plain_torch()
def build_model(
    name: str,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = torch.float32,
) -> Pipeline:
    """A preset's architecture with random weights, for trials without a checkpoint. Raises as
    `load_model`."""
    device, dtype = checked_device(device), checked_dtype(dtype)
    preset = presets.preset(name)
    row = family(preset.family)
    generator = torch.Generator().manual_seed(seed)
    # torch's constructors draw from the global state, which is the caller's.
    with torch.random.fork_rng(devices=[]):
        transformer, autoencoder = row.build(preset.transformer_arch, preset.autoencoder_arch)
    # In their dtype before there are values, so that a large model is not there in two.
    transformer.to(dtype=dtype)
    autoencoder.to(dtype=dtype)
    row.randomize(transformer, autoencoder, generator)
    sources = {"var": f"random, seed {seed}", "vae": f"random, seed {seed}"}
    names = tuple(preset.class_names or ())
    pipeline = Pipeline(transformer, autoencoder, name, names, sources, family=row.name)
    pipeline.encoder = presets.encoder_of(name)
    return _frozen(pipeline.to(device=device, dtype=dtype))


def _frozen(pipeline: Pipeline) -> Pipeline:
    pipeline.var.eval().requires_grad_(False)
    pipeline.vae.eval().requires_grad_(False)
    return pipeline
