"""Where the error of a quantized model comes from, and which tensors deserve more bits."""
