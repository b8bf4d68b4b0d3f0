"""What quantization does to tokens and images."""
