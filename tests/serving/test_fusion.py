"""Layers that share an input as one product: the same numbers, whatever happens between their calls."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from fusion_cases import K, Products, exact, fused, random_input, random_layer
from native_cases import needs_compiler
from tolerance import assert_close_to_float64
from torch import Tensor, nn

from llmq import fusion
from llmq.fusion import Fused, unite_
from llmq.nn import QuantLinear


@pytest.fixture(autouse=True)
def no_gradients():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield
    assert fusion._waiting.x is None, "a test left something behind"


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


def trio(**options: bool) -> list[QuantLinear]:
    return [random_layer(n, seed=place, **options) for place, n in enumerate((40, 24, 33))]


def test_weights_are_held_once(products: Products) -> None:
    layers = trio(symmetric=False)
    size = sum(tensor.nbytes for layer in layers for tensor in layer.buffers())
    whole = fused(layers)
    assert sum(tensor.nbytes for tensor in whole.packed) <= size
    for layer in layers:
        for own, one in zip(layer.packed(), whole.packed, strict=True):
            assert own.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
    # or CUDA graphs of a compiled model would copy the weights each time
    assert all(tensor._dynamo_static_input_type == "unguarded" for tensor in whole.packed)  # type: ignore[attr-defined]


def test_a_tensor_of_a_class_of_its_own_is_left_to_each_layer(products: Products) -> None:
    """What it does when it is used is not known."""
    layers = trio()
    fused(layers)
    x = nn.Parameter(random_input(2), requires_grad=False)
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == [40, 24, 33]


def test_more_tokens_are_multiplied_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products(monkeypatch, tokens=2)
    layers = trio()
    fused(layers)
    for m, outputs in ((1, [97]), (2, [97]), (3, [40, 24, 33])):
        x = random_input(m)[None]
        assert [layer(x).shape for layer in layers] == [(1, m, n) for n in (40, 24, 33)]
        assert products.taken() == outputs


def test_a_gpu_is_given_more_tokens_at_once_than_a_cpu() -> None:
    assert fusion.TOKENS == {"cpu": 1, "cuda": 64}


def check(layers: list[QuantLinear], inputs: list[Tensor], found: list[Tensor]) -> None:
    for layer, x, y in zip(layers, inputs, found, strict=True):
        assert_close_to_float64(y, exact(layer, x), K)


def test_another_input_is_not_mistaken_for_the_same(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x, other = random_input(2), random_input(2, seed=1)
    check(layers, [x, other, x], [q(x), k(other), v(x)])
    assert products.taken() == [97, 24]
    check([k], [x], [k(x)])  # k's part had waited
    assert products.taken() == []
    check([k, v], [x, x], [k(x), v(x)])  # and is gone
    assert products.taken() == [24, 33]


def test_an_input_that_was_changed_is_another(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x = random_input(2)
    first, before = q(x), x.clone()
    x.mul_(2)
    check([q, k, v], [before, x, x], [first, k(x), v(x)])
    assert products.taken() == [97, 24, 33]
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == [97]


def test_two_groups_may_have_one_input(products: Products) -> None:
    """As attention and MLP have that run side by side."""
    layers, others = trio(), [random_layer(n, seed=7 + n) for n in (16, 24, 33)]
    fused(layers)
    fused(others)
    x = random_input(1)
    check([layers[0], others[1]], [x] * 2, [layers[0](x), others[1](x)])
    check(layers[1:], [x] * 2, [layer(x) for layer in layers[1:]])
    assert products.taken() == [97, 24]
    check([*layers, *others], [x] * 6, [layer(x) for layer in (*layers, *others)])
    assert products.taken() == [97, 73]


def test_equal_inputs_are_not_the_same(products: Products) -> None:
    """A view shares memory and count of changes, but may be anything."""
    q, k, v = layers = trio()
    fused(layers)
    x = random_input(2)
    check([q, k], [x, x.flip(0)], [q(x), k(x.flip(0))])
    check([v], [x[:1]], [v(x[:1])])
    check([k, v], [x, x], [k(x), v(x)])
    assert products.taken() == [97, 24, 33]


def test_calls_in_another_order_and_again_are_right(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x = random_input(1)
    check([v, k, q, k, k, v, v], [x] * 7, [v(x), k(x), q(x), k(x), k(x), v(x), v(x)])
    assert products.taken() == [33, 24, 97, 24, 33]


def test_nothing_is_kept_when_all_have_their_part(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x = random_input(2)
    outputs = q(x), k(x), v(x)
    assert fusion._waiting.parts is None
    assert fusion._waiting.owner is None
    dead = weakref.ref(x)
    del x, outputs
    gc.collect()
    assert dead() is None
    for seed in range(3):  # of calls of the first alone only the last is kept
        q(last := random_input(2, seed=seed))
    assert fusion._waiting.x is last
    q(x := random_input(2)), k(x), v(x)


def test_threads_do_not_see_each_other(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    inputs = [random_input(1), random_input(1, seed=1)]
    found: dict[int, list[Tensor]] = {}
    turn = threading.Barrier(2, timeout=10)

    def run(number: int) -> None:
        with torch.no_grad():
            found[number] = []
            for layer in layers:
                turn.wait()
                found[number].append(layer(inputs[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in (0, 1):
        check(layers, [inputs[number]] * 3, found[number])
    assert products.taken() == [97, 97]
    x = random_input(1)
    q(x)
    other = threading.Thread(target=lambda: found.update({2: [k(x.detach())], 3: [k(x)]}))
    other.start()
    other.join()
    k(x), v(x)
    check([k, k], [x, x], [*found[2], *found[3]])


def test_gradients_are_recorded_by_each_layer_for_itself(products: Products) -> None:
    layers = trio(bias=True)
    fused(layers)
    x = random_input(2)
    with torch.enable_grad():
        x.requires_grad_()
        sum(layer(x).sum() for layer in layers).backward()
        assert products.taken() == [40, 24, 33]
    assert x.grad is not None
    weights = torch.cat([layer.quantized_weight().dequantize() for layer in layers])
    assert_close_to_float64(x.grad, weights.double().sum(0).expand(2, -1), 97)


def test_hooks_see_and_change_what_they_always_did(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x, seen = random_input(2), []
    handles = [layer.register_forward_hook(lambda m, args, out: seen.append((m, args[0], out))) for layer in layers]
    handles.append(k.register_forward_pre_hook(lambda _, args: (3 * args[0],)))
    found = [layer(x) for layer in layers]
    check(layers, [x, 3 * x, x], found)
    assert [m for m, _, _ in seen] == layers
    assert all(out is y for (_, _, out), y in zip(seen, found, strict=True))
    for handle in handles:
        handle.remove()
    q(x), k(x), v(x)


def test_inference_mode_counts_no_changes_so_that_hooks_are_not_trusted(products: Products) -> None:
    layers = trio()
    fused(layers)
    with torch.inference_mode():
        x = random_input(2)
        check(layers, [x] * 3, [layer(x) for layer in layers])
        assert products.taken() == [97]

        def double(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
            args[0].mul_(2)

        handle = layers[0].register_forward_hook(double)
        before = x.clone()
        check(layers, [before, 2 * before, 2 * before], [layer(x) for layer in layers])
        assert products.taken() == [40, 24, 33]
        handle.remove()


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_layer_that_is_restored_leaves_the_others_whole(place: int, products: Products) -> None:
    layers = trio(symmetric=False)
    before = [dict(layer.state_dict()) for layer in layers]
    whole = fused(layers)
    layers[place].restore_()
    assert whole.packed == []
    x = random_input(1)
    for layer, tensors in zip(layers, before, strict=True):
        assert all(torch.equal(tensors[name], tensor) for name, tensor in layer.state_dict().items())
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == ([40, 24, 33] if place else [97])
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == [97]
    layers[place].to("meta")
    check(others := [layer for layer in layers if layer is not layers[place]], [x] * 2, [layer(x) for layer in others])


def test_what_waits_is_not_of_weights_that_were_replaced(products: Products) -> None:
    q, k, v = layers = trio()
    fused(layers)
    x = random_input(1)
    q(x)
    k.load_state_dict(random_layer(24, seed=9).state_dict())
    check([k, v], [x, x], [k(x), v(x)])
    assert products.taken() == [97, 24, 33]
    q(x), k(x), v(x)


@needs_compiler
def test_another_dtype_takes_the_same_tensors(products: Products) -> None:
    layers = trio()
    whole = fused(layers)
    places = [tensor.data_ptr() for tensor in whole.packed]
    for dtype in (torch.float16, torch.float32):
        x = random_input(1, dtype)
        for _ in range(2):
            check(layers, [x] * 3, [layer(x) for layer in layers])
        assert [tensor.data_ptr() for tensor in whole.packed] == places
        assert products.taken() == [40, 24, 33, 97]
    for layer in layers:
        layer.half()
    check(layers, [x] * 3, [layer(x) for layer in layers])


def test_a_copy_is_whole_and_its_own(products: Products) -> None:
    layers = trio(bias=True)
    fused(layers)
    parent = nn.ModuleList(layers)
    twin = copy.deepcopy(parent)
    whole = twin[0].fused
    assert isinstance(whole, Fused)
    assert whole.members == tuple(twin)
    assert whole.packed[0].data_ptr() == twin[0].packed()[0].data_ptr() != layers[0].packed()[0].data_ptr()
    for layer in twin:
        layer.bias.zero_()
    layers[1].get_buffer("packed_1").mul_(2)  # scales, of the whole as well
    x = random_input(1)
    for own in (list(twin), layers):
        products.taken()
        check(own, [x] * 3, [layer(x) for layer in own])
        assert products.taken() == [97]


def test_biases_are_those_of_now(products: Products) -> None:
    layers = trio(bias=True)
    fused(layers)
    layers[1].bias = nn.Parameter(torch.ones(24), requires_grad=False)
    layers[2].bias.data = torch.full((33,), 2.0)
    x = random_input(1)
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == [97]


def test_a_weight_that_somebody_replaces_is_used(products: Products) -> None:
    layers = trio()
    fused(layers)
    codes = layers[0].packed()[0]
    layers[0]._buffers["packed_0"] = codes ^ 1
    x = random_input(1)
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == [40, 24, 33]


def permutation(seed: int) -> Tensor:
    return torch.cat(
        [torch.sort(part).values for part in torch.randperm(K, generator=torch.Generator().manual_seed(seed)).split(64)]
    )


@pytest.mark.parametrize("tokens", [64, 0], ids=["one product", "many tokens"])
def test_columns_in_one_order_are_gathered_once(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    products = Products(monkeypatch, tokens)
    layers = [random_layer(n, columns=permutation(0), seed=place) for place, n in enumerate((40, 24, 32))]
    whole = fused(layers)
    assert layers[1].columns() is layers[0].columns() is not None
    gathered = []
    inner = QuantLinear.in_order
    monkeypatch.setattr(QuantLinear, "in_order", lambda self, x: gathered.append(self) or inner(self, x))
    x = random_input(3)
    check(layers, [x] * 3, [layer(x) for layer in layers])
    assert products.taken() == ([96] if tokens else [40, 24, 32])
    assert gathered == layers[:1]
    check([layers[2]], [x], [layers[2](x)])
    assert whole.kernel is not None


def test_layers_that_differ_are_not_one(products: Products) -> None:
    layer, x = random_layer(40), random_input(1)
    other = random_layer(24, seed=1)
    other._buffers["scales"] = 1.001 * other.get_buffer("scales").float()  # not of the dtype of the first's
    orders = [random_layer(40, columns=permutation(0)), random_layer(24, columns=permutation(1))]
    plain = [random_layer(40, columns=torch.arange(K)), random_layer(24, columns=permutation(1))]
    for pair in ([layer, other], orders, plain, plain[::-1]):
        whole = fused(pair)
        assert whole.kernel is None
        products.taken()
        check(pair, [x] * 2, [member(x) for member in pair])
        assert products.taken() == [member.out_features for member in pair]


@pytest.mark.usefixtures("no_native")
def test_outputs_that_a_kernel_arranges_together_stay_together(products: Products) -> None:
    layers = [random_layer(n, group_size=32) for n in (64, 80)]
    assert fused(layers, torch.bfloat16).kernel is None
    assert layers[0].kernel == "cpu_int4pack"
    x = random_input(1, torch.bfloat16)
    check(layers, [x] * 2, [layer(x) for layer in layers])


def test_of_layers_of_some_bits_those_alike_are_one(products: Products) -> None:
    parent = nn.Module()
    for place, bits in enumerate((4, 8, 4, 3)):
        parent.add_module(f"l{place}", random_layer(8 + place, bits))
    names = [name for name, _ in parent.named_children()]
    for layer in parent.children():
        layer.prepare_(torch.float32)
    unite_(parent, [names])
    x = random_input(1)
    layers = list(parent.children())
    check(layers, [x] * 4, [layer(x) for layer in layers])
    assert products.taken() == [18, 9, 11]
    assert parent.l1.fused is parent.l3.fused is None


def test_layers_without_weights_wait_for_them(products: Products) -> None:
    layers = trio()
    Fused(layers)  # nobody has prepared them
    x = random_input(1)
    for outputs in ([40, 24, 33], [97]):
        check(layers, [x] * 3, [layer(x) for layer in layers])
        assert products.taken() == outputs
