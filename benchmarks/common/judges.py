"""The measuring networks and real images, by the names of their files in VARPTQ_WEIGHTS."""

from __future__ import annotations

REFERENCE = "cifar10_test_2000.npz"
CLASSIFIER = "resnet56_cifar10.safetensors"
LPIPS = "lpips_alex.safetensors"
RESNET56 = "resnet56"
INCEPTION = "inception.safetensors"
FEATURE_BATCH = 32
