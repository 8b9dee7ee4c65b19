"""With every stage off, GPTQ gives the very codes that it gave before there were stages."""

from hashlib import sha256

import pytest
import torch
from solver_cases import correlated

from llmq.grids.uniform import UniformGrid
from llmq.solvers.gptq import gptq

# N, K, group size, bits, symmetric, order, scale search: the start of the SHA-256 of codes, scales and zeros, as commit
# 2cc4687 gave them (act_order and scale_search were switches there). No weight of these is so near to a tie that the
# order of a sum decides, so other processors and thread counts give the same.
GOLDEN = {
    (24, 96, 32, 4, True, "natural", "none"): "e4cc2fba361feaaf",
    (24, 96, 32, 4, True, "act", "none"): "ab60ef68bb0bef19",
    (24, 96, 32, 4, True, "act", "hessian"): "82ee78bf9e3a2e26",
    (24, 96, 32, 4, True, "natural", "hessian"): "5f84030a9b62db12",
    (24, 96, 32, 3, False, "natural", "none"): "ea3d96f64a93f5f6",
    (24, 96, 32, 3, False, "act", "none"): "c24e6ef785151ec0",
    (24, 96, 32, 3, False, "act", "hessian"): "273b3caa43500a15",
    (24, 96, 32, 3, False, "natural", "hessian"): "6122b40513fca3d1",
    (33, 100, 32, 2, False, "natural", "none"): "f4c91f39f28f8776",
    (33, 100, 32, 2, False, "act", "none"): "603c7de260475078",
    (33, 100, 32, 2, False, "act", "hessian"): "36fad9812ae92740",
    (33, 100, 32, 2, False, "natural", "hessian"): "9e6374ed9383147e",
    (64, 256, 128, 4, False, "natural", "none"): "8199b0adf1fc16e6",
    (64, 256, 128, 4, False, "act", "none"): "cb84665eb0828b70",
    (64, 256, 128, 4, False, "act", "hessian"): "ccdbed921704e538",
    (64, 256, 128, 4, False, "natural", "hessian"): "142b5a2a7f521f8d",
    (16, 160, 160, 3, True, "natural", "none"): "d59eec73b612976e",
    (16, 160, 160, 3, True, "act", "none"): "a78f4279809df931",
    (16, 160, 160, 3, True, "act", "hessian"): "0db300dbe69c60ff",
    (16, 160, 160, 3, True, "natural", "hessian"): "59b3775a198511e6",
    (96, 300, 40, 3, True, "natural", "none"): "4a21c47afcf6b405",
    (96, 300, 40, 3, True, "act", "none"): "3c68084b30b9f76f",
    (96, 300, 40, 3, True, "act", "hessian"): "54d2a884edc4ed08",
    (96, 300, 40, 3, True, "natural", "hessian"): "ae6f39616d4d9398",
}


@pytest.mark.parametrize("case", GOLDEN, ids=str)
def test_codes_are_those_of_the_first_version(case: tuple[int, int, int, int, bool, str, str]) -> None:
    n, k, group_size, bits, symmetric, order, search = case
    w, h = correlated(n, k, seed=k)
    found = gptq(w, h, UniformGrid(bits, symmetric), group_size, order=order, scale_search=search).weight
    digest = sha256()
    for part in (found.codes, found.scales, found.zeros):
        digest.update(part.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == GOLDEN[case]


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_does_not_matter(threads: int) -> None:
    case = (64, 256, 128, 4, False, "natural", "none")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_codes_are_those_of_the_first_version(case)
    finally:
        torch.set_num_threads(before)
