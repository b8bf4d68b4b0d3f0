"""Float models: the VAR transformer, its VQVAE, checkpoints, presets and generation. Knows no
quantization."""
