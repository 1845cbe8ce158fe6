"""Offline quantization: GPTQ from a 16-bit model to a packed checkpoint."""
