"""LPIPS: its arithmetic by hand, and published numbers where the weights are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from helpers.measuring import weight_file
from varptq.errors import CheckpointError, InputError
from varptq.evaluate.networks import lpips
from varptq.evaluate.networks.lpips import Lpips


def random_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in lpips._shapes().items():
        noise = torch.randn(shape, generator=generator)
        scale = (2 / noise[0].numel()) ** 0.5 if noise.ndim > 1 else 0.1
        state[name] = noise.abs() if name.startswith("lin") else noise * scale
    return state


def pixels(count: int, side: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=generator)


def alexnet(state: dict[str, Tensor]) -> nn.Sequential:
    """The trunk as everyone builds it."""
    layers: list[nn.Module] = [
        *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU()),
        *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()),
    ]
    trunk = nn.Sequential(*layers)
    prefix = "features."
    trunk.load_state_dict(
        {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
    )
    return trunk


def by_hand(state: dict[str, Tensor], first: np.ndarray, second: np.ndarray) -> float:
    """One pair of images, position by position."""
    mean, std = np.array([-0.030, -0.088, -0.188]), np.array([0.458, 0.448, 0.450])
    taps: list[list[np.ndarray]] = []
    for image in (first, second):
        scaled = (image / 127.5 - 1 - mean) / std
        x = torch.from_numpy(scaled).float().permute(2, 0, 1).unsqueeze(0)
        seen = []
        with torch.no_grad():
            for layer in alexnet(state):
                x = layer(x)
                if isinstance(layer, nn.ReLU):
                    seen.append(x[0].double().numpy())
        taps.append(seen)
    total = 0.0
    for number, (a, b) in enumerate(zip(*taps, strict=True)):
        weights = state[f"lin{number}.model.1.weight"].double().numpy().reshape(-1)
        cells = [
            float(weights @ np.square(_unit(a[:, y, x]) - _unit(b[:, y, x])))
            for y in range(a.shape[1])
            for x in range(a.shape[2])
        ]
        total += float(np.mean(cells))
    return total


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / (np.sqrt(np.square(vector).sum()) + 1e-10)


@pytest.mark.parametrize("side", [31, 37, 64])
def test_it_is_its_definition(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lpips, "AT_ONCE", 1)
    state = random_state()
    first, second = pixels(2, side, 1), pixels(2, side, 2)
    found = Lpips(state)(first, second)
    assert found.shape == (2,) and found.dtype == torch.float32
    expected = [by_hand(state, a, b) for a, b in zip(first.numpy(), second.numpy(), strict=True)]
    assert min(expected) > 0.01
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4)


def test_equal_images_are_at_distance_0_and_order_does_not_matter() -> None:
    distance = Lpips(random_state())
    a, b = pixels(3, 37, 1), pixels(3, 37, 2)
    assert torch.equal(distance(a, a), torch.zeros(3))
    torch.testing.assert_close(distance(a, b), distance(b, a))


@pytest.mark.parametrize("dead", [False, True])
def test_it_can_be_a_loss(dead: bool) -> None:
    """Its gradient is the slope, and finite where no channel of a layer is active."""
    state = random_state()
    if dead:
        state["features.3.bias"] -= 1e3
    distance = Lpips(state)
    first, second = (
        x.permute(0, 3, 1, 2) / 127.5 - 1 for x in (pixels(1, 37, 1), pixels(1, 37, 2))
    )
    first = first.requires_grad_()
    (slope,) = torch.autograd.grad(distance.between(first, second).sum(), first)
    assert slope.isfinite().all() and slope.abs().sum() > 0
    with torch.no_grad():
        step = 1e-3 * slope / slope.norm()
        there, back = (distance.between(first + sign * step, second).sum() for sign in (1, -1))
    # Float32 differences of a function with kinks.
    assert float(there - back) == pytest.approx(2e-3 * float(slope.norm()), rel=0.1)


@pytest.mark.network
def test_the_published_weights_rank_what_people_rank() -> None:
    """A shift by one pixel looks like less than noise of the same energy."""
    distance = Lpips.load(weight_file("lpips_alex.safetensors"))
    with np.load(weight_file("cifar10_test_2000.npz")) as data:
        images = torch.from_numpy(data["images"][:20]).repeat_interleave(2, 1)
    images = images.repeat_interleave(2, 2)
    shifted = images.roll(1, 2)
    energy = (shifted.float() - images.float()).square().mean((1, 2, 3), keepdim=True).sqrt()
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0)) * energy
    noisy = (images.float() + noise).round().clamp(0, 255).to(torch.uint8)
    near, far = distance(images, shifted), distance(images, noisy)
    assert (near < far).double().mean() > 0.9 and 0 < near.mean() < far.mean() < 1


def test_mistakes_are_named(tmp_path: Path) -> None:
    state = random_state()
    distance = Lpips(state)
    with pytest.raises(InputError, match=r"at least 31 x 31"):
        distance(pixels(1, 30, 0), pixels(1, 30, 0))
    with pytest.raises(InputError, match=r"expected equal ones"):
        distance(pixels(1, 37, 0), pixels(2, 37, 0))
    del state["lin4.model.1.weight"]
    path = tmp_path / "alex.safetensors"
    save_file(state, path)
    with pytest.raises(CheckpointError, match=r"alex\.safetensors: has no tensor 'lin4\.model"):
        Lpips.load(path)
