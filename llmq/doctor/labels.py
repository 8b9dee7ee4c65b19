"""Checks of quantization_config: against itself, against quantize_config.json, and against the tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from llmq.checkpoint import LEGACY_CONFIG, read_json
from llmq.doctor.findings import ERROR, NOTE, WARNING, Finding, Repair
from llmq.doctor.patient import Patient
from llmq.errors import LlmqError
from llmq.formats import auto_round, gptq
from llmq.formats import bits as bitstream
from llmq.formats.naming import Rules
from llmq.formats.stored import shown

_SAME = (("bits", "w_bit", "wbits"), ("group_size", "q_group_size", "groupsize"), ("checkpoint_format", "format"))
_WRITTEN_BY_ALL = {"quant_method", "meta", "quantizer", "version", "model_name_or_path", "model_file_base_name"}
_AUTO_ROUND = {
    *("act_bits", "act_data_type", "act_dynamic", "act_group_size", "act_sym", "amp", "autoround_version", "backend"),
    *("batch_size", "bits", "block_name_to_quantize", "data_type", "dataset", "desc_act", "enable_minmax_tuning"),
    *("enable_norm_bias_tuning", "enable_quanted_input", "extra_config", "gradient_accumulate_steps", "group_size"),
    *("iters", "low_gpu_mem_usage", "lr", "minmax_lr", "model_free", "nsamples", "packing_format", "provider"),
    *("quant_lm_head", "scale_dtype", "seqlen", "sym", "to_quant_block_names"),
}  # fmt: skip
_KNOWN = {
    "gptq": {
        *("bits", "w_bit", "wbits", "group_size", "groupsize", "desc_act", "sym", "lm_head", "checkpoint_format"),
        *("format", "pack_dtype", "dynamic", "modules_in_block_to_quantize", "damp_percent"),
        *("damp_auto_increment", "loss_filter"),
        *("true_sequential", "static_groups", "mse", "act_group_aware", "is_marlin_format", "pack_impl"),
        *("offload_to_disk",),
        *("batch_size", "block_name_to_quantize", "cache_block_outputs", "dataset", "exllama_config"),
        *("max_input_length",),
        *("model_seqlen", "module_name_preceding_first_block", "pad_token_id", "tokenizer", "use_cuda_fp16", "backend"),
        *("use_exllama", "disable_exllama", "hyb_act", "method", "rotation", "adapter", "modules_to_not_convert"),
        *("foem", "hessian", "failsafe", "gptaq", "weight_only", "fallback", "runtime_format", "moe"),
    },
    "awq": {
        *("bits", "w_bit", "group_size", "q_group_size", "zero_point", "format", "modules_to_not_convert", "backend"),
        *("dynamic", "checkpoint_format", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse", "sym"),
        *("desc_act", "lm_head", "pack_dtype", "method", "act_group_aware", "runtime_format"),
    },
    "compressed-tensors": {
        *("format", "quantization_status", "config_groups", "ignore", "kv_cache_scheme", "global_compression_ratio"),
        *("sparsity_config", "transform_config", "run_compressed"),
    },
    "auto-round": _AUTO_ROUND,
    "intel/auto-round": _AUTO_ROUND,
}  # fmt: skip
_SCHEME = {
    *("num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}  # fmt: skip


def mislabelled(patient: Patient) -> Iterator[Finding]:
    """Report zeros of the other version of gptq, or zeros that are not symmetric, under a label."""
    wrong: dict[str, list[tuple[str, str]]] = {}
    for layer in patient.layers.values():
        if layer.stored is None or "qzeros" not in layer.header:
            continue
        qzeros, spec = patient.read(f"{layer.module}.qzeros"), layer.spec
        if spec.format == "awq":
            if spec.symmetric and not bool((bitstream.unpack(qzeros, 4, qzeros.shape[1] * 8) == 8).all()):
                wrong.setdefault("zeros-not-symmetric", []).append((layer.module, "zero_point is false, not all are 8"))
        elif (said := gptq.mislabelled(qzeros, spec)) is not None:
            kind = "zeros-of-other-version" if "stores them" in said else "zeros-not-symmetric"
            wrong.setdefault(kind, []).append((layer.module, said.partition(";")[0]))
    for kind, found in wrong.items():
        whole = len(found) == len(patient.layers)
        settings: dict[str, Any] = {"sym": False}
        if patient.quantization["quant_method"] == "awq":
            settings = {"zero_point": True}
        elif kind == "zeros-of-other-version":
            label = "gptq" if patient.layers[found[0][0]].spec.format == "gptq_v2" else "gptq_v2"
            settings = {"checkpoint_format": label, "format": label}
            if "auto-round" in patient.quantization["quant_method"]:
                settings = {"packing_format": auto_round.PACKING_OF[label]}
        advice = f"set {shown(settings)}" if whole else "quantize again: the layers differ"
        yield Finding(
            kind, ERROR, tuple(module for module, _ in found), found[0][1], advice, Repair(settings) if whole else None
        )


def contradictions(patient: Patient) -> Iterator[Finding]:
    """Report settings that say two things, and such that a format's readers need."""
    config = patient.quantization
    for names in _SAME:
        given = {name: config[name] for name in names if config.get(name) is not None}
        if config["quant_method"] == "gptq" and len({str(value).lower() for value in given.values()}) > 1:
            yield Finding(
                "config-contradicts-itself", ERROR, tuple(given), f"{shown(given)}", "readers differ in which they take"
            )
    if config["quant_method"] == "gptq":
        symmetric = {layer.spec.symmetric for layer in patient.layers.values()}
        ordered = all("g_idx" not in layer.header for layer in patient.layers.values()) or not _shuffled(patient)
        for key, value in (("sym", all(symmetric)), ("desc_act", False)):
            if key not in config:
                exact = ordered if key == "desc_act" else True
                yield Finding(
                    "config-key-missing", WARNING, (key,), "is not in quantization_config", "vLLM wants it",
                    Repair({key: value}) if exact else None,
                )  # fmt: skip
    status = config.get("quantization_status")
    if config["quant_method"] == "compressed-tensors" and status not in ("compressed", "frozen"):
        yield Finding(
            "status-not-compressed", ERROR, ("quantization_status",), f"is {shown(status)}",
            "loaders expect dense weights then; set compressed", Repair({"quantization_status": "compressed"}),
        )  # fmt: skip


def unknown_keys(patient: Patient) -> Iterator[Finding]:
    """Report settings that no known tool writes."""
    config = patient.quantization
    method = config["quant_method"]
    if method == "llmq":
        return  # its reader refuses them
    unknown = sorted(set(config) - _KNOWN[method] - _WRITTEN_BY_ALL)
    if unknown:
        yield Finding(
            "config-key-unknown", NOTE, tuple(unknown), f"is {shown(config[unknown[0]])}", "readers pass over it"
        )
    groups = config.get("config_groups")
    if method != "compressed-tensors" or not isinstance(groups, Mapping):
        return
    for name, group in groups.items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        strange = sorted(set(weights) - _SCHEME) if isinstance(weights, Mapping) else []
        if strange and isinstance(weights, Mapping):
            yield Finding(
                "scheme-key-unknown", ERROR, tuple(strange), f"is {shown(weights[strange[0]])} in weights of {name}",
                "compressed-tensors refuses it; remove it",
                Repair({"config_groups": _stripped(groups)}),
            )  # fmt: skip


def stale_legacy(patient: Patient) -> Iterator[Finding]:
    """Report a quantize_config.json that says something else than config.json."""
    file = patient.path / LEGACY_CONFIG
    if not file.is_file():
        return
    old = read_json(file)
    for names in (*_SAME, ("sym",), ("desc_act",), ("zero_point",)):
        here = next((patient.quantization[name] for name in names if patient.quantization.get(name) is not None), None)
        there = next((old[name] for name in names if old.get(name) is not None), None)
        if here is not None and there is not None and here != there:
            yield Finding(
                "legacy-config-stale", ERROR, (LEGACY_CONFIG,),
                f"{names[0]} is {shown(there)}, in config.json {shown(here)}",
                "readers differ in which they take; write what config.json says", Repair(),
            )  # fmt: skip
            return


def bits_and_groups(patient: Patient) -> Iterator[Finding]:
    """Report bits or a group size that the shapes contradict."""
    found: Counter[tuple[int, int]] = Counter()
    wrong = []
    for layer in patient.layers.values():
        if layer.stored is not None or "qweight" not in layer.header:
            continue
        header = layer.header
        if not {"qweight", "scales", "qzeros"} <= set(header) or any(
            len(shape) != 2 for shape, _ in (header["qweight"], header["scales"], header["qzeros"])
        ):
            continue
        (rows, n), groups = header["qweight"][0], header["scales"][0][0]
        words = header["qzeros"][0][1]
        bits, rest = divmod(words * 32, n) if layer.spec.format != "awq" else (4, 0)
        if rest or not bits or not groups:
            continue
        k = rows * 32 // bits if layer.spec.format != "awq" else rows
        size = -(-k // groups)
        spec = replace(layer.spec, bits=bits, group_size=size)
        try:
            patient.method.recognize(spec, header, lambda local: patient.read(f"{layer.module}.{local}"))  # noqa: B023
        except LlmqError:
            continue
        found[bits, size] += 1
        wrong.append((layer, bits, size))
    for key, position in (("bits", 1), ("group_size", 2)):
        off = [entry for entry in wrong if entry[position] != getattr(entry[0].spec, key)]
        if off:
            whole = len(found) == 1 and len(wrong) == len(patient.layers) and not _varied(patient)
            value = off[0][position]
            yield Finding(
                f"{key.replace('_', '-')}-wrong", ERROR, tuple(layer.module for layer, *_ in off),
                f"the label says {key} {getattr(off[0][0].spec, key)}, the shapes {value}",
                f"set {key} to {value}", Repair({key: value}) if whole else None,
            )  # fmt: skip


def dense_but_packed(patient: Patient) -> Iterator[Finding]:
    """Report packed layers that the configuration calls dense: readers expect a weight there."""
    config = patient.quantization
    named: list[str] = []
    try:
        if config["quant_method"] == "compressed-tensors":
            if patient.refusal is not None and "ignore names" in patient.refusal:
                named = [module for module in patient.modules if _refused(patient, module)]
        else:
            rules = Rules(config.get("dynamic"))
            first = {module: rules.first(module) for module in patient.modules}
            named = [module for module, rule in first.items() if rule is not None and rule.settings is None]
            kept = config.get("modules_to_not_convert") or []
            kept = kept if isinstance(kept, list) and config["quant_method"] == "awq" else []
            named += [m for m in patient.modules if any(f".{name}." in f".{m}." for name in kept) and m not in named]
    except LlmqError:
        return  # said by `unreadable`
    if named:
        yield Finding(
            "dense-but-packed", ERROR, tuple(named), "is packed, but the configuration leaves it out",
            "readers look for its weight and leave it random; take it out of ignore, dynamic or modules_to_not_convert",
        )  # fmt: skip


def _varied(patient: Patient) -> bool:
    """Whether the configuration has settings for single modules."""
    rules = patient.quantization.get("dynamic")
    return isinstance(rules, Mapping) and any(not key.startswith("-:") for key in rules)


def _refused(patient: Patient, module: str) -> bool:
    try:
        patient.method.specs(patient.quantization, [module])
    except LlmqError as error:
        return "ignore names" in str(error)
    return False


def _stripped(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {**group, "weights": {k: v for k, v in group["weights"].items() if k in _SCHEME}}
        if isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)
        else group
        for name, group in groups.items()
    }


def _shuffled(patient: Patient) -> bool:
    """Whether an index of groups is not in order."""
    from llmq.doctor.indices import shuffled

    return bool(shuffled(patient))
