"""An image decoder in OpenVINO, in 8 bits: what it takes beside ours.

`pip install openvino nncf` brings what this wants; nothing else of the project uses them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Speed does not depend on the ranges, so few decodes find them.
CALIBRATION_DECODES = 2


class Decoding(nn.Module):
    """The decoder of an autoencoder as a module's forward, which is what OpenVINO traces."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, features: Tensor) -> Tensor:
        decode: Callable[[Tensor], Tensor] = self.vae.decode_features  # pyright: ignore[reportAssignmentType]
        return decode(features)


def openvino_decoder(vae: nn.Module, features: Tensor) -> Callable[[], object] | str:
    """A call that decodes `features` (B, C, h, w) with `nncf.quantize`'s 8 bits on one thread, or
    why there is none."""
    try:
        import nncf
        import openvino
    except ImportError as error:
        return f"{error.name} is not installed"
    given = features.numpy()
    with torch.inference_mode(False), torch.no_grad():
        model = openvino.convert_model(Decoding(vae).eval(), example_input=features.clone())
    batches = [given] * CALIBRATION_DECODES
    quantized = nncf.quantize(model, nncf.Dataset(batches), subset_size=CALIBRATION_DECODES)
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(quantized, "CPU", settings).create_infer_request()
    return lambda: request.infer({0: given})
