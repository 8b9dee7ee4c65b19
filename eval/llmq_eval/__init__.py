"""What quantization cost: perplexity on a text, and divergence from the original model on the same text."""
