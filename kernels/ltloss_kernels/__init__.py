"""Fused Triton kernels for large-class margin softmax: tensors in, tensors out."""
