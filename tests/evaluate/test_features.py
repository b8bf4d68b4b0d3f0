"""Feature networks: what they read, what they give, and what they refuse."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.measuring import weight_file
from varptq.errors import CheckpointError, InputError, NonFiniteError
from varptq.evaluate import features
from varptq.evaluate.features import (
    Features,
    InceptionFeatures,
    ModuleFeatures,
    load_network,
)
from varptq.evaluate.networks import inception, weights
from varptq.evaluate.networks.resnet import ResNet56

State = dict[str, Tensor]
# Two float32 evaluations of the same convolutions in another order; features are about 1.
SAME_FEATURES = 1e-4
# float32 places of up to 320 pixels are off by 3e-5, times a step of up to 255.
RESIZE_ROUNDING = 1e-2


def random_state(build: Callable[[], nn.Module], seed: int = 0) -> State:
    """Lively random tensors for a module: signals neither die nor explode on the way."""
    with torch.device("meta"):
        module = build()
    generator = torch.Generator().manual_seed(seed)
    state: State = {}
    for name, like in module.state_dict().items():
        if name.endswith("num_batches_tracked"):
            continue
        noise = torch.randn(like.shape, generator=generator)
        if name.endswith(("running_var", "bn.weight", "bn1.weight", "bn2.weight")):
            state[name] = 0.5 + noise.abs()
        else:
            fan_in = like[0].numel() if like.ndim > 1 else 25
            state[name] = noise * (2 / fan_in) ** 0.5
    return state


def pixels(count: int, side: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def full_state() -> State:
    state = random_state(lambda: inception.Inception(with_fc=True))
    # The TorchScript release has no gain.
    return {k: torch.ones_like(v) if k.endswith("bn.weight") else v for k, v in state.items()}


@pytest.fixture(scope="module")
def full_file(full_state: State, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "inception.safetensors"
    save_file(full_state, path)
    return path


@pytest.fixture(scope="module")
def full_features(full_file: Path) -> Features:
    return load_network(f"inception:{full_file}")(pixels(1, 37))


def script_names(state: State) -> State:
    """The tensors under the names of the TorchScript release, written out by hand where it can."""
    renamed: State = {}
    for ours, theirs in inception._conv_names():
        renamed[f"net.layers.{theirs}.weight"] = state[f"{ours}.conv.weight"]
        renamed[f"net.layers.{theirs}.beta"] = state[f"{ours}.bn.bias"]
        renamed[f"net.layers.{theirs}.mean"] = state[f"{ours}.bn.running_mean"]
        renamed[f"net.layers.{theirs}.var"] = state[f"{ours}.bn.running_var"]
    renamed["net.output.weight"] = state["fc.weight"]
    renamed["net.output.bias"] = torch.ones(inception.NUM_CLASSES)
    return renamed


class Holder(nn.Module):
    """A tree of modules with the given tensors as buffers, to be scripted."""

    def __init__(self, tensors: State) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            node: nn.Module = self
            for step in path:
                if step not in dict(node.named_children()):
                    node.add_module(step, Holder({}))
                node = node.get_submodule(step)
            node.register_buffer(leaf, tensor)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.slow
def test_the_inception_gives_pooled_spatial_and_probabilities(full_features: Features) -> None:
    pooled, spatial, probabilities = full_features
    assert pooled.shape == (1, 2048)
    assert spatial is not None and spatial.shape == (1, 2023)
    assert probabilities is not None and probabilities.shape == (1, 1008)
    assert pooled.dtype == spatial.dtype == probabilities.dtype == torch.float32
    assert pooled.std() > 0.01 and spatial.std() > 0.01, "a dead network tests nothing"
    torch.testing.assert_close(probabilities.sum(1), torch.ones(1))


@pytest.mark.slow
def test_probabilities_leave_out_the_bias(full_features: Features, full_state: State) -> None:
    expected = (full_features.pooled @ full_state["fc.weight"].T).softmax(-1)
    torch.testing.assert_close(full_features.probabilities, expected)


@pytest.mark.slow
def test_spatial_features_and_pools_are_those_of_the_fid_network(full_file: Path) -> None:
    """Of the first branch, channels last. In a corner a window of a pool holds 4 pixels: their
    mean, in the last block their maximum."""
    network = load_network(f"inception:{full_file}")
    assert isinstance(network, InceptionFeatures)
    seen: list[Tensor] = []
    branch = network.network.get_submodule("Mixed_6d.branch1x1")
    branch.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    inputs: dict[str, Tensor] = {}
    names = [f"{block}{part}" for block in inception.BLOCKS for part in ("", ".branch_pool")]
    for name, module in network.network.named_modules():
        if name in names:
            module.register_forward_pre_hook(
                lambda _module, args, name=name: inputs.update({name: args[0]})
            )
    spatial = network(pixels(1, 37)).spatial
    assert spatial is not None and spatial.std() > 0.01
    expected = [seen[0][0, c, y, x] for y in range(17) for x in range(17) for c in range(7)]
    assert torch.equal(spatial[0], torch.stack(expected))
    pooled = [name for name in inception.BLOCKS if f"{name}.branch_pool" in inputs]
    assert len(pooled) == 9
    for name in pooled:
        corner, found = inputs[name][0, :, :2, :2], inputs[f"{name}.branch_pool"][0, :, 0, 0]
        expected = corner.amax((1, 2)) if name == "Mixed_7c" else corner.mean((1, 2))
        torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_folding_the_norms_moves_features_by_rounding_only(
    full_state: State, full_features: Features
) -> None:
    network = inception.Inception(with_fc=True)
    weights.fill(network, full_state, "state")
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) == 94 and {norm.eps for norm in norms} == {0.001}
    expected = InceptionFeatures(network)(pixels(1, 37))
    for ours, theirs in zip(full_features, expected, strict=True):
        assert ours is not None and theirs is not None
        assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


@pytest.mark.slow
def test_torchscript_and_plain_tensors_agree(
    full_state: State, full_features: Features, tmp_path: Path
) -> None:
    path = tmp_path / "trunk.pt"
    torch.jit.script(Holder(script_names(full_state))).save(str(path))
    found = load_network(f"inception:{path}")(pixels(1, 37))
    for ours, theirs in zip(full_features, found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_published_names_of_a_few_tensors() -> None:
    names = dict(inception._conv_names())
    assert names["Conv2d_4a_3x3"] == "conv_4"
    assert names["Mixed_5b.branch5x5_2"] == "mixed.tower.conv_1"
    assert names["Mixed_6d.branch7x7dbl_5"] == "mixed_6.tower_1.conv_4"
    assert names["Mixed_7c.branch3x3dbl_3b"] == "mixed_10.tower_1_mixed_conv_1"
    assert len(names) == 94


@pytest.mark.network
def test_the_released_trunk_computes_what_its_own_program_computes() -> None:
    path = weight_file("default_1.pt")
    program = weights.read_script(path)
    network = load_network(f"inception:{path}")
    images = pixels(1, 64)
    planes = features.planes(images, torch.device("cpu"))
    resized = nn.functional.interpolate(planes, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        expected = program((resized - 128) / 128)
    found = network(images)
    torch.testing.assert_close(found.pooled, expected, rtol=0, atol=SAME_FEATURES)
    assert found.spatial is not None and found.probabilities is None


def test_what_a_network_does_not_give_is_named() -> None:
    trunk = Features(torch.ones(1, 2048), torch.ones(1, 2023))
    assert features.part_of(trunk, "spatial", "inception") is trunk.spatial
    with pytest.raises(InputError, match=r"'inception' gives no probabilities.*fc\.weight"):
        features.part_of(trunk, "probabilities", "inception")
    with pytest.raises(InputError, match=r"'resnet56' gives no spatial, which sFID needs"):
        features.part_of(Features(torch.ones(1, 64)), "spatial", "resnet56")


class Recorder(nn.Module):
    """Stands for the Inception and keeps what it is shown."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        self.shown = x
        return x.mean((2, 3)), x.mean((2, 3)), None


def bilinear(plane: np.ndarray, side: int, centred: bool) -> np.ndarray:
    """Brute force: pixel by pixel, pixels as areas (centred) or as points from the corner."""
    height, width = plane.shape
    result = np.zeros((side, side))
    for row in range(side):
        for column in range(side):
            shift = 0.5 if centred else 0.0
            y = min(max((row + shift) * height / side - shift, 0), height - 1)
            x = min(max((column + shift) * width / side - shift, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            upper = plane[top, left] + (x - left) * (plane[top, right] - plane[top, left])
            lower = plane[bottom, left] + (x - left) * (plane[bottom, right] - plane[bottom, left])
            result[row, column] = upper + (y - top) * (lower - upper)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shape", [(37, 32), (1, 3), (320, 130)])
def test_images_are_resized_to_299_as_stated(shape: tuple[int, int], legacy: bool) -> None:
    images = pixels(1, 320)[:, : shape[0], : shape[1]]
    recorder = Recorder()
    InceptionFeatures(recorder, legacy_resize=legacy)(images)
    expected = bilinear(images[0, :, :, 1].double().numpy(), 299, centred=not legacy)
    found = recorder.shown[0, 1] * 128 + 128
    np.testing.assert_allclose(found.numpy(), expected, atol=RESIZE_ROUNDING)


def test_an_image_of_the_right_size_is_only_scaled() -> None:
    recorder = Recorder()
    images = pixels(1, 299)
    InceptionFeatures(recorder)(images)
    torch.testing.assert_close(recorder.shown.permute(0, 2, 3, 1) * 128 + 128, images.float())


def test_resnet56_shortcuts_keep_every_second_pixel_and_pad_both_sides() -> None:
    with torch.device("meta"):
        network = ResNet56()
    state = random_state(ResNet56)
    weights.fill(network, state, "random")
    block = network.get_submodule("layer2.0")
    block.load_state_dict({"bn2.weight": torch.zeros(32), "bn2.bias": torch.zeros(32)}, False)
    x = torch.rand(1, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(1, 32, 3, 3)
    expected[:, 8:24] = x[:, :, ::2, ::2]
    torch.testing.assert_close(block(x), expected)


@pytest.mark.network
def test_resnet56_recognises_cifar() -> None:
    network = load_network(f"resnet56:{weight_file('resnet56_cifar10.safetensors')}")
    with np.load(weight_file("cifar10_test_2000.npz")) as data:
        images, labels = torch.from_numpy(data["images"]), torch.from_numpy(data["labels"])
    found = [network(batch) for batch in images.split(200)]
    assert found[0].pooled.shape == (200, 64) and found[0].spatial is None
    predicted = torch.cat([f.probabilities.argmax(1) for f in found if f.probabilities is not None])
    # Published: 93.39% of all 10,000; of 2000 the standard error is 0.6%.
    assert abs((predicted == labels).double().mean() - 0.9339) < 0.012


class Means(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3))


def test_any_module_is_a_network(tmp_path: Path) -> None:
    images = pixels(3, 5)
    expected = images.float().mean((1, 2)) / 255
    by_hand = ModuleFeatures(Means(), "means")
    torch.testing.assert_close(by_hand(images).pooled, expected)
    path = tmp_path / "means.pt"
    torch.jit.script(Means()).save(str(path))
    from_file = load_network(f"module:{path}")
    assert (by_hand.name, from_file.name) == ("means", "means")
    torch.testing.assert_close(from_file(images).pooled, expected)


def test_a_module_may_give_more_parts_but_only_rows() -> None:
    class Parts(nn.Module):
        def forward(self, images: Tensor) -> Features:
            return Features(images.mean((2, 3)), None, images.mean((2, 3)).softmax(1))

    found = ModuleFeatures(Parts(), "parts")(pixels(3, 5))
    assert found.spatial is None and found.probabilities is not None
    with pytest.raises(InputError, match=r"'maps': returned shape \(3, 3, 5, 5\), expected \(3, f"):
        ModuleFeatures(nn.Identity(), "maps")(pixels(3, 5))


@pytest.mark.parametrize(
    "images", [torch.zeros(1, 5, 5, 3), torch.zeros(1, 3, 5, 5, dtype=torch.uint8)]
)
def test_images_of_another_kind_are_refused(images: Tensor) -> None:
    with pytest.raises(InputError, match=r"expected \(B, H, W, 3\) uint8"):
        ModuleFeatures(Means(), "means")(images)


@pytest.mark.parametrize("spec", ["vgg:file.pt", "inception", "inception:", ""])
def test_an_unknown_network_lists_the_known(spec: str) -> None:
    with pytest.raises(InputError, match=r"inception:FILE, inception-adm:FILE, resnet56:FILE"):
        load_network(spec)


def broken(state: State, change: str) -> State:
    state = dict(state)
    if change == "missing":
        del state["layer3.8.bn2.bias"]
    elif change == "shape":
        state["layer1.0.conv1.weight"] = torch.zeros(16, 16, 1, 1)
    elif change == "unknown":
        state["layer4.0.conv1.weight"] = torch.zeros(1)
    else:
        state["linear.bias"] = torch.full((10,), torch.nan)
    return state


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("missing", r"has no tensor 'layer3\.8\.bn2\.bias'"),
        (
            "shape",
            r"'layer1\.0\.conv1\.weight' has shape \(16, 16, 1, 1\), expected \(16, 16, 3, 3",
        ),
        ("unknown", r"unknown tensor 'layer4\.0\.conv1\.weight'"),
        ("nan", r"'linear\.bias' holds NaN"),
    ],
)
def test_a_file_of_another_network_is_refused(change: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file(broken(random_state(ResNet56), change), path)
    with pytest.raises((CheckpointError, NonFiniteError), match=message):
        load_network(f"resnet56:{path}")


def test_torchvisions_inception_is_not_taken_for_the_fid_one(tmp_path: Path) -> None:
    path = tmp_path / "torchvision.safetensors"
    save_file({"AuxLogits.fc.bias": torch.zeros(1000), "fc.bias": torch.zeros(1000)}, path)
    with pytest.raises(CheckpointError, match=r"torchvision's Inception"):
        load_network(f"inception:{path}")


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    path = tmp_path / "trunk.pt"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match=r"not TorchScript"):
        load_network(f"inception:{path}")
    with pytest.raises(CheckpointError, match=r"plain tensors in a \.safetensors file"):
        load_network(f"resnet56:{path}")
    with pytest.raises(CheckpointError, match=r"no such file"):
        load_network(f"module:{tmp_path}/none.pt")


def test_a_download_is_kept_only_with_the_right_checksum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source.pt"
    source.write_bytes(b"trunk" * 1000)
    monkeypatch.setattr(weights, "TRUNK_URL", source.as_uri())
    with pytest.raises(CheckpointError, match=r"SHA-256 \w+, expected 7ff4"):
        weights.download_inception(tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setattr(weights, "TRUNK_SHA256", digest)
    steps: list[tuple[int, int]] = []
    path = weights.download_inception(
        tmp_path / "cache", lambda _stage, done, total, info="": steps.append((done, total))
    )
    assert path.read_bytes() == source.read_bytes()
    assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1]
    source.unlink()
    assert weights.download_inception(tmp_path / "cache") == path
    with pytest.raises(CheckpointError, match=r"cannot be downloaded"):
        weights.download_inception(tmp_path / "other")
