"""Matrix products with quantized weights and GPTQ's column loop: what they mean (`naive`), and kernels that do it.

Nothing is imported here, so that `llmq_kernels.naive` and `llmq_kernels.cpu` work where Triton does not.
"""
