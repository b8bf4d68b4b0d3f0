"""VAR (Tian et al., NeurIPS 2024): class labels, codebook ids, square scales."""
