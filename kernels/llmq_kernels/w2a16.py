"""2-bit weights times 16-bit activations, on the kernels for 4 bits: see `narrow`."""

from llmq_kernels import narrow, w4a16

_narrow = narrow.Narrow(2)
refuses, pack, unpack = _narrow.refuses, _narrow.pack, _narrow.unpack
matmul = w4a16.matmul
