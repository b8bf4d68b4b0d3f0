"""A checkpoint quantized block by block from its shards: the artifact that it gives in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file

import varptq
from helpers.infinity_states import SCALES, prompts, states, theirs, wrapped
from varptq.calibrate.config import CalibrationConfig
from varptq.distributed import Ranks
from varptq.errors import ConfigError, InputError, NonFiniteError
from varptq.models.on_demand import OnDemand
from varptq.models.pipeline import Pipeline
from varptq.models.seams import block_of
from varptq.streamed import Streamed, larger_than_memory, quantize_streamed, stream
from varptq.work import Piece, Work

ASKED = prompts(3, 5, 1, 3)
FEW = CalibrationConfig(num_samples=2)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Three shards in bfloat16 under upstream's names, and an autoencoder in float32."""
    folder = tmp_path_factory.mktemp("checkpoint")
    state, vae = states()
    tensors = {name: t.bfloat16().contiguous() for name, t in theirs(state, 2).items()}
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(3):
        shard = f"model-{number + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[number::3]}, folder / shard)
        weight_map |= dict.fromkeys(names[number::3], shard)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    save_file(
        {n: t for n, t in wrapped(vae).items() if "alias" not in n and "quantize." not in n},
        folder.parent / "vae.safetensors",
    )
    return {"var": index, "vae": folder.parent / "vae.safetensors"}


def streamed(files: dict[str, Any], config: str, folder: Path, **options: Any) -> Path:
    chosen = varptq.QuantConfig.preset(config)
    pipe = varptq.load_model(**files, mapped=True).sized(SCALES)
    given: dict[str, Any] = {"method": "rtn", "calibration": FEW, "prompts": ASKED, **options}
    return quantize_streamed(pipe, chosen, folder, **given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "config", "dtype"),
    [
        ("rtn", "w4a4", torch.bfloat16),
        # The head and layers of every block stay in float.
        ("rtn", "w8a8+skip-head+litevar", torch.float32),
        ("gptq", "w4a8+paper", torch.bfloat16),
        # Here the closed form chooses scales, too.
        ("gptq", "w4a4+codebook", torch.float32),
    ],
)
def test_it_is_the_artifact_of_the_whole_model(
    files: dict[str, Any], method: str, config: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    path = streamed(files, config, tmp_path / "streamed", method=method, dtype=dtype)
    pipe = varptq.load_model(**files, dtype=dtype).sized(SCALES)
    chosen = varptq.QuantConfig.preset(config)
    q = varptq.quantize(pipe, chosen, method=method, calibration=FEW, prompts=ASKED)
    whole = varptq.save(q, tmp_path / "whole")
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (path, whole))
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    documents = [json.loads((folder / "config.json").read_text()) for folder in (path, whole)]
    for document in documents:
        del document["files"]
    assert documents[0] == documents[1]
    loaded = varptq.load(path, runtime="simulated")
    assert varptq.generate(loaded, ASKED, seed=1).images is not None


@pytest.mark.slow
def test_the_files_stay_as_they_are_and_memory_holds_a_block(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No tensor of the transformer is copied while the model is read."""
    before = {path: path.read_bytes() for path in files["var"].parent.iterdir()}
    pipe = varptq.load_model(**files, mapped=True)
    again = varptq.load_model(**files, dtype=pipe.dtype)
    pairs = zip(pipe.var.state_dict().items(), again.var.state_dict().values(), strict=True)
    assert all(torch.equal(ours, theirs) for (_, ours), theirs in pairs)
    streamed(files, "w4a4", tmp_path / "artifact")
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.slow
def test_what_cannot_be_streamed(files: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tune_steps"):
        streamed(files, "w4a4", tmp_path / "a", calibration=FEW.replace(tune_steps=2))
    with pytest.raises(ConfigError, match=r"correct_targets: .* set it to false"):
        streamed(files, "w2a8", tmp_path / "a", method="gptq")
    state, _ = states()
    tensors = {name: t.bfloat16().contiguous() for name, t in theirs(state, 2).items()}
    name = next(name for name in tensors if name.endswith("fc1.weight"))
    tensors[name][3, 3] = torch.nan
    save_file(tensors, tmp_path / "broken.safetensors")
    broken = {"var": tmp_path / "broken.safetensors", "vae": files["vae"]}
    with pytest.raises(NonFiniteError, match=r"ffn\.fc1"):
        streamed(broken, "w4a4+paper", tmp_path / "b")
    with pytest.raises(InputError, match="already quantized"):
        whole = streamed(files, "w4a4+paper", tmp_path / "c")
        quantize_streamed(
            varptq.load(whole, runtime="simulated"),
            varptq.QuantConfig.preset("w4a4"),
            tmp_path / "d",
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("shared", "config"), [(True, "w4a4"), (False, "w4a4")])
def test_a_model_of_classes_goes_the_same_way(
    make_tiny: Callable[..., Pipeline], shared: bool, config: str, tmp_path: Path
) -> None:
    pipe, chosen = make_tiny(shared_adaln=shared), varptq.QuantConfig.preset(config)
    settings: dict[str, Any] = {"method": "gptq", "calibration": FEW, "seed": 1}
    before = {name: tensor.clone() for name, tensor in pipe.var.state_dict().items()}
    path = quantize_streamed(pipe, chosen, tmp_path / "streamed", **settings)
    varptq.save(varptq.quantize(pipe, chosen, **settings), tmp_path / "whole")
    assert weights_of(path) == weights_of(tmp_path / "whole")
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.var.state_dict().items())
    assert not any(vars(m)["_forward_pre_hooks"] for m in pipe.var.modules())


def weights_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_one_block_is_in_memory(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices of the others are on their files, whatever passes and steps there were."""
    pipe = varptq.load_model(**files, mapped=True).sized(SCALES)
    stored = {parameter.data_ptr() for parameter in pipe.var.parameters()}
    most = 0
    bring = OnDemand.bring

    def watched(blocks: OnDemand, block: int | None) -> None:
        nonlocal most
        bring(blocks, block)
        named = blocks.var.named_parameters()
        matrices = {n: p for n, p in named if block_of(n) is not None and p.dim() == 2}
        present = {block_of(n) for n, p in matrices.items() if p.data_ptr() not in stored}
        assert present == {block} if block is not None else len(present) <= 1
        most = max(most, len(present))

    monkeypatch.setattr(OnDemand, "bring", watched)
    config = varptq.QuantConfig.preset("w4a4")
    made = stream(pipe, config, method="gptq", calibration=FEW, prompts=ASKED, dtype=pipe.dtype)
    assert most == 1 and made.quantized.report["units"]


class KilledError(Exception):
    """Stands for a signal."""


@pytest.mark.slow
def test_it_goes_on_after_kills(files: dict[str, Any], tmp_path: Path) -> None:
    """While units are rounded, and while blocks are packed. Pieces that are finished are not made
    again, and the bytes are those of an uninterrupted run."""
    settings: dict[str, Any] = {"method": "gptq", "calibration": FEW, "prompts": ASKED}
    config = varptq.QuantConfig.preset("w4a4")
    places = ["unit-blocks.1.cross", "packed-2"]

    class Dying(Work):
        dies_at: str | None = None
        written: ClassVar[list[str]] = []

        def write(self, name: str, piece: Piece) -> None:
            if name == self.dies_at:
                raise KilledError
            self.written.append(name)
            super().write(name, piece)

    def run(work: Work | None, out: Path) -> bytes:
        pipe = varptq.load_model(**files, mapped=True).sized(SCALES)
        return weights_of(stream(pipe, config, **settings, work=work).save(out))

    for place in places:
        with pytest.raises(KilledError), Dying(tmp_path / "work") as work:
            work.dies_at = place
            run(work, tmp_path / "a")
    with Dying(tmp_path / "work") as work:
        found = run(work, tmp_path / "a")
    assert len(Dying.written) == len(set(Dying.written)) and {*places} <= {*Dying.written}
    assert found == run(None, tmp_path / "b")


@pytest.mark.slow
def test_processes_share_units_and_blocks(
    files: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    meeting = threading.Barrier(2)
    monkeypatch.setattr(Ranks, "barrier", lambda self: self.size > 1 and meeting.wait(60))
    config = varptq.QuantConfig.preset("w4a4+paper")
    settings: dict[str, Any] = {"method": "gptq", "calibration": FEW, "prompts": ASKED}

    def make(rank: int, size: int) -> Streamed:
        pipe = varptq.load_model(**files, mapped=True).sized(SCALES)
        with Work(tmp_path / f"work-{size}", Ranks(rank, size)) as work:
            made = stream(pipe, config, **settings, work=work)
            if work.ranks.first:
                made.save(tmp_path / f"out-{size}")
            work.ranks.barrier()
            return made

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(make, range(2), (2, 2)))
    make(0, 1)
    assert weights_of(tmp_path / "out-2") == weights_of(tmp_path / "out-1")


def test_what_fits_is_not_streamed(files: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = varptq.load_model(**files, mapped=True)
    weights = 4 * sum(parameter.numel() for parameter in pipe.var.parameters())

    def asked(method: str, free: int | None, limit: int | None = None) -> bool:
        monkeypatch.setattr("varptq.streamed.free_bytes", lambda _: free)
        settings: dict[str, Any] = {"device": "cpu", "dtype": "float32", "limit": limit}
        return larger_than_memory(pipe, method, FEW, **settings)

    assert not asked("gptq", 4 * weights) and asked("gptq", 4 * weights - 1)
    assert not asked("gptq", None) and asked("rtn", None, 4 * weights - 1)
    # Whether another method fits is for the machine to say, as long as the weights do.
    assert not asked("brecq", weights, 1)
    for method in ("brecq", "sas", "rtn+shift"):
        with pytest.raises(ConfigError, match=r"rtn and gptq"):
            asked(method, weights - 1)
