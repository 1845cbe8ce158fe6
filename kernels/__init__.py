"""Low-bit linear layers, paged attention and fused elementwise kernels: tensors only."""
