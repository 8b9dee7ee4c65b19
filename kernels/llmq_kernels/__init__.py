"""Matrix products with quantized weights: their meaning (`naive`), Triton kernels, PyTorch's CPU operators.

Nothing is imported here, so that `llmq_kernels.naive` and `llmq_kernels.cpu` work where Triton does not.
"""
