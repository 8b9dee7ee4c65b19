"""Where a model's blocks and linear layers are, found from structure, and from a table where structure does not tell.

The blocks are the largest list of modules that hold linear layers, in the decoder that transformers names or, where an
encoder feeds it, in both; every linear layer in them is quantized unless the user excludes it. Which linears see the
same input (and so share one Hessian), and in what order they run, is observed when a block first runs (`llmq.stream`),
not declared. What a model does not show of itself is a row of `FAMILIES`: docs/families.md tells how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmq.errors import SpecError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmq.recipe import Recipe

# Classes of transformers that make a model with a head, tried in this order; the first two predict the next token.
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
_AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", _SEQ2SEQ, "AutoModelForMaskedLM")
_CAUSAL = _AUTO[:2]


@dataclass(frozen=True)
class Family:
    """What the structure of some models does not tell; every field but the first has the answer for all others."""

    model_types: tuple[str, ...]  # as config.json has them
    auto: str = ""  # class of transformers that makes the model; "": the one that makes config.json's architecture
    stacks: tuple[str, ...] = ()  # names of the block lists in the order in which they run; (): they are found
    shared: bool = False  # whether what the first block of a stack returns beside hidden states goes to all others
    linears: tuple[str, ...] = ()  # classes derived from torch.nn.Linear that compute the same


FAMILIES = (
    Family(("falcon",), linears=("FalconLinear",)),
    Family(("longt5", "mt5", "switch_transformers", "t5"), shared=True),  # position biases
)
UNUSED = torch.empty(0)  # stands for what blocks return beside their hidden states

_DEFAULT = Family(())
_LINEAR_CLASSES = {name for family in FAMILIES for name in family.linears}


@dataclass(frozen=True)
class Linear:
    """One linear layer that will be packed."""

    name: str  # in the module tree, e.g. model.layers.0.self_attn.q_proj
    module: nn.Module
    transposed: bool  # whether the module keeps its weight as [K, N] (Conv1D of GPT-2)

    @property
    def weight(self) -> Tensor:
        """The weight as [N, K]: a view outside autograd, so that writing to it changes the module."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        weight = weight.detach()
        return weight.T if self.transposed else weight

    @property
    def shape(self) -> tuple[int, int]:
        """Outputs N and inputs K."""
        n, k = self.weight.shape
        return n, k


@dataclass(frozen=True)
class Structure:
    """The parts of a model that the driver walks through."""

    names: list[str]  # of the blocks in the order in which they run, e.g. model.layers.0
    blocks: list[nn.Module]
    linears: list[list[Linear]]  # per block, in module order
    ignored: dict[str, str]  # linears in the blocks that stay dense, and why
    starts: tuple[int, ...] = (0,)  # the first block of each stack: an encoder's, then the decoder's that it feeds
    family: Family = _DEFAULT
    # by class of block, how many values it returns in a tuple; None: hidden states alone; filled as blocks are replaced
    outputs: dict[type[nn.Module], int | None] = field(default_factory=dict, compare=False)

    @property
    def all_linears(self) -> list[Linear]:
        """All linears that will be packed, block by block."""
        return [linear for block in self.linears for linear in block]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """The names of the blocks, each with a dot behind it."""
        return tuple(f"{name}." for name in self.names)

    @property
    def ends(self) -> tuple[int, ...]:
        """The last block of each stack but the last: the next stack begins behind it."""
        return tuple(start - 1 for start in self.starts[1:])

    def around(self, index: int) -> str:
        """Return the name of the module whose list block number `index` is in."""
        return ".".join(self.names[index].split(".")[:-2])


def family_of(config: Any) -> Family:
    """Return the row of a transformers `config`, or one that leaves everything to structure."""
    return next((family for family in FAMILIES if config.model_type in family.model_types), _DEFAULT)


def auto_class(config: Any) -> Any:
    """Return the class of transformers that makes models with a head of a `config`, such as AutoModelForCausalLM.

    Raises:
        SpecError: there is none for this type of model.
    """
    import transformers

    if name := family_of(config).auto:
        return getattr(transformers, name)
    made = {name: _made_by(getattr(transformers, name), config) for name in _AUTO}
    known = [name for name in _AUTO if made[name]]
    if config.is_encoder_decoder:  # some have heads for the decoder alone as well
        known.sort(key=_SEQ2SEQ.__ne__)
    if not known:
        raise SpecError(
            f"model type {config.model_type!r}: transformers makes no model with a head of it; looked for it in "
            f"{', '.join(_AUTO)}; docs/families.md tells how to add a Family"
        )
    named = config.architectures  # whatever config.json has there
    wanted = named[0] if isinstance(named, list) and named and isinstance(named[0], str) else ""
    return getattr(transformers, next((name for name in known if wanted in made[name]), known[0]))


def is_causal(config: Any) -> bool:
    """Return whether the model of a `config` predicts, at each token of its one input, the next."""
    return not config.is_encoder_decoder and auto_class(config).__name__ in _CAUSAL


def check_causal(config: Any, what: str) -> None:
    """Check that the model of a `config` predicts the next token, which `what` works on.

    Raises:
        SpecError: it does not.
    """
    if not is_causal(config):
        raise SpecError(
            f"{what} works on predictions of the next token, which a model of type {config.model_type!r} does not "
            "make; do without it"
        )


def check_stages(config: Any, recipe: Recipe) -> None:
    """Check that the model of a `config` is of a kind that all stages of `recipe` can work with.

    Raises:
        SpecError: it is not.
    """
    for stage in ("tune_epochs", "guidance_groups", "response_only"):
        if getattr(recipe, stage):
            check_causal(config, stage)
    for stage in ("tune_steps", "rotation", "scaling"):
        if config.is_encoder_decoder and getattr(recipe, stage) not in (0, "none"):
            raise SpecError(
                f"{stage} works on one stack of blocks, models of type {config.model_type!r} have two; do without it"
            )
    if recipe.rotation != "none" and config.get_text_config() is not config:
        raise SpecError(
            "rotation turns the space that images are projected to as well, and llmq does not follow them there; "
            f"quantize a model of type {config.model_type!r} without rotation"
        )


def skeleton(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """Return the model of a transformers `config`, with its head, with all parameters on the meta device.

    Buffers are real: rotary frequencies and the like are computed, not stored.

    Raises:
        SpecError: transformers has no model with a head for this configuration.
    """
    from accelerate import init_empty_weights

    auto = auto_class(config)
    try:
        with init_empty_weights(include_buffers=False):
            model: PreTrainedModel = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # for sizes in config.json that do not fit each other there is no common class
        raise SpecError(
            f"model type {config.model_type!r}: transformers makes no {auto.__name__.removeprefix('AutoModelFor')} "
            f"model of this config.json: {' '.join(str(error).split())[:200]}"
        ) from error
    model.eval()
    # as transformers marks what it loads packed: Jamba calls a linear then, of which it takes the weight otherwise
    model.config._is_quantized = True
    return model


def find_structure(model: PreTrainedModel, ignore: Iterable[str] = ()) -> Structure:
    """Return the blocks of `model` and the linears in them.

    Raises:
        SpecError: there is no list of modules with linear layers, or `ignore` leaves nothing to quantize.
    """
    family = family_of(model.config)
    patterns = [re.compile(pattern) for pattern in ignore]
    structure = Structure([], [], [], {}, (), family)
    starts: list[int] = []
    for name, stack in _stacks(model, family):
        if not starts or model.config.is_encoder_decoder:  # else lists that run one after the other are one stack
            starts.append(len(structure.blocks))
        for index, block in enumerate(stack):
            structure.names.append(f"{name}.{index}")
            structure.blocks.append(block)
            structure.linears.append([])
            prefix = f"{name}.{index}."
            structure.ignored.update(_odd_linears(block, prefix))
            for linear in linears_of(block, prefix):
                pattern = next((pattern.pattern for pattern in patterns if pattern.search(linear.name)), None)
                if pattern is None:
                    structure.linears[-1].append(linear)
                else:
                    structure.ignored[linear.name] = f"--ignore {pattern}"
    if not any(structure.linears):
        raise SpecError(f"--ignore matches all {len(structure.ignored)} linear layers; nothing is left to quantize")
    return replace(structure, starts=tuple(starts))


def linears_of(block: nn.Module, prefix: str) -> list[Linear]:
    """Return all linear layers of a block, in module order; `prefix` is the block's name and a dot."""
    return [
        Linear(prefix + name, child, transposed=not isinstance(child, nn.Linear))
        for name, child in block.named_modules()
        if _is_linear(child)
    ]


def same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two live tensors are the same numbers in the same place, perhaps in another shape."""
    if a.is_meta and b.is_meta:  # no numbers, but places all the same
        here, there = ((t.untyped_storage()._cdata, t.storage_offset()) for t in (a, b))
        return here == there and a.numel() == b.numel() and a.is_contiguous() == b.is_contiguous()
    return a.data_ptr() == b.data_ptr() and a.numel() == b.numel() and a.is_contiguous() == b.is_contiguous()


@contextmanager
def blocks_replaced(structure: Structure, forward: Callable[..., Any]) -> Iterator[None]:
    """Let ``forward(hidden, *args, **kwargs)`` stand for every block's own for the duration of the context.

    It returns hidden states, which are handed on in the way of the model's blocks, beside `UNUSED` if they return more,
    or such a tuple as they return.
    """

    def replacement(block: nn.Module) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop("hidden_states"),)
            out = forward(*args, **kwargs)
            if isinstance(out, tuple):
                return out
            if type(block) not in structure.outputs:
                del block.forward
                structure.outputs[type(block)] = _outputs(block, args, kwargs)
                block.forward = call
            count = structure.outputs[type(block)]
            return out if count is None else (out, *[UNUSED] * (count - 1))

        return call

    for block in structure.blocks:
        block.forward = replacement(block)
    try:
        yield
    finally:
        for block in structure.blocks:
            del block.forward


@torch.no_grad()
def _outputs(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Return how many values a block returns in a tuple; None if it returns its hidden states alone.

    It runs on the meta device, where tensors have shapes and no values, whether it is loaded or not. Where it cannot,
    None is a guess, and what the next block gets shows whether it was right.
    """
    state = {name: t.to("meta") for name, t in (*block.named_parameters(), *block.named_buffers())}
    try:
        out = torch.func.functional_call(block, state, _to_meta(args), _to_meta(kwargs))
    except Exception:  # code that looks at values fails in its own ways
        return None
    return len(out) if isinstance(out, tuple) else None


def _to_meta(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.to("meta")
    if isinstance(x, tuple):
        return tuple(_to_meta(item) for item in x)
    if isinstance(x, dict):
        return {name: _to_meta(item) for name, item in x.items()}
    return x


def _made_by(auto: Any, config: Any) -> list[str]:
    """Return the names of the classes that a class of transformers like AutoModelForCausalLM makes of a `config`."""
    if type(config) not in auto._model_mapping:
        return []
    made = auto._model_mapping[type(config)]
    return [cls.__name__ for cls in (made if isinstance(made, tuple | list) else (made,))]


def _stacks(model: PreTrainedModel, family: Family) -> list[tuple[str, nn.ModuleList]]:
    """Return the lists of blocks in the order in which they run, with their names."""
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    if absent := [name for name in family.stacks if name not in lists]:
        raise SpecError(
            f"{type(model).__name__}: its Family names {absent[0]}, which is no ModuleList of it; there are "
            f"{', '.join(lists) or 'none'}"
        )
    if family.stacks:
        return [(name, lists[name]) for name in family.stacks]
    found = []
    for tower in _towers(model):
        inside = set(tower.modules())
        fit = [(name, m) for name, m in lists.items() if m in inside and len(m) and all(map(_holds_linears, m))]
        if not fit:
            odd = {type(m).__name__ for m in inside if isinstance(m, nn.Linear) and not _is_linear(m)}
            raise SpecError(
                f"{type(model).__name__}: no transformer blocks found; looked in {type(tower).__name__} for a "
                "torch.nn.ModuleList of modules that contain torch.nn.Linear or transformers Conv1D layers, found "
                f"{', '.join(name for name, m in lists.items() if m in inside) or 'no ModuleList'}"
                f"{' and layers of ' + ', '.join(sorted(odd)) if odd else ''}; "
                "docs/families.md tells how to add a Family"
            )
        # blocks come before lists inside them (experts), and are more than anything beside them
        found.append(max(fit, key=lambda item: (sum(p.numel() for p in item[1].parameters()), -item[0].count("."))))
    return found


def _towers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the parts of the model that each have a stack of blocks: a decoder, or an encoder and a decoder."""
    towers = [model.get_encoder()] if model.config.is_encoder_decoder else []
    decoder = model.get_decoder()  # ModernBERT has a head of that name
    return [*towers, decoder if any(isinstance(m, nn.ModuleList) for m in decoder.modules()) else model]


def _holds_linears(module: nn.Module) -> bool:
    return not _is_linear(module) and any(_is_linear(child) for child in module.modules())


def _odd_linears(block: nn.Module, prefix: str) -> dict[str, str]:
    """Return the layers of a block that are like linears, but may compute something else, and why they stay dense."""
    odd = [(n, m) for n, m in block.named_modules() if isinstance(m, nn.Linear) and not _is_linear(m)]
    return {prefix + n: f"{type(m).__name__} may compute something else than torch.nn.Linear" for n, m in odd}


def _is_linear(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D

    return type(module) in (nn.Linear, Conv1D) or type(module).__name__ in _LINEAR_CLASSES
