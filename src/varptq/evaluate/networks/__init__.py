"""Networks that measure images: feature networks, LPIPS, CLIP, and the files of their weights."""
