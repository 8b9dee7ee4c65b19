"""A tiny random model of every family that llmq is verified on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from tiny_models import make_tokenizer
from torch import Tensor

COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "initializer_range": 0.3,  # far from a uniform output, so that damage shows
}
GLU = {**COMMON, "hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
HEADS = {**GLU, "head_dim": 16}
LOCAL = {**HEADS, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
VISION = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}

SPLIT = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
GATED = [*SPLIT, ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]
PARALLEL = [[*SPLIT[0], "mlp.gate_proj", "mlp.up_proj"], *SPLIT[1:], ["mlp.down_proj"]]

T5 = [
    [f"layer.0.SelfAttention.{name}" for name in "qkv"],
    ["layer.0.SelfAttention.o"],
    ["layer.1.DenseReluDense.wi_0", "layer.1.DenseReluDense.wi_1"],
    ["layer.1.DenseReluDense.wo"],
    ["layer.1.EncDecAttention.q"],
    ["layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"],
    ["layer.1.EncDecAttention.o"],
    ["layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"],
    ["layer.2.DenseReluDense.wo"],
]


@dataclass(frozen=True)
class Family:
    """A model to be made, and what is to be found in it."""

    config: tf.PretrainedConfig
    stages: list[list[str]]  # linears of a block that share an input, in the order in which they run
    auto: Any = tf.AutoModelForCausalLM

    def make(self, folder: Path) -> Path:
        """Write the model with random weights, a tokenizer and files that a processor would need to `folder`."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.auto.from_config(self.config, dtype=torch.float32).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"do_resize": true}', encoding="utf-8")
        (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
        return folder

    @torch.no_grad()
    def logits(self, model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return what `model` makes of tokens [B, L], which an encoder and its decoder both get."""
        more = {"decoder_input_ids": ids, "decoder_attention_mask": mask} if self.config.is_encoder_decoder else {}
        found: Tensor = model(input_ids=ids, attention_mask=mask, **more).logits
        return found


def _qwen3_next() -> tf.PretrainedConfig:
    """Return a model with linear attention in its first block and no experts."""
    return tf.Qwen3NextConfig(
        **HEADS, layer_types=["linear_attention", "full_attention"], mlp_only_layers=[0, 1], num_experts=0,
        linear_num_value_heads=16, linear_num_key_heads=8, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip


def _jamba() -> tf.PretrainedConfig:
    """Return a model whose blocks are of two classes, and without experts."""
    return tf.JambaConfig(
        **GLU, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=16, mamba_dt_rank=32
    )


def _mamba2() -> tf.PretrainedConfig:
    return tf.Mamba2Config(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_heads=32, head_dim=4, state_size=16, n_groups=2,
        expand=2, chunk_size=16, initializer_range=0.3, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip


def _t5() -> tf.PretrainedConfig:
    return tf.T5Config(
        vocab_size=128, d_model=64, d_kv=16, d_ff=96, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        pad_token_id=0, eos_token_id=1, decoder_start_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip


def _bart() -> tf.PretrainedConfig:
    return tf.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=96, decoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=64, pad_token_id=0,
        bos_token_id=0, eos_token_id=0, decoder_start_token_id=0, forced_eos_token_id=0, init_std=0.3,
    )  # fmt: skip


def _bert() -> tf.PretrainedConfig:
    config = tf.BertConfig(**COMMON, hidden_size=64, intermediate_size=96, max_position_embeddings=64)
    config.architectures = ["BertForMaskedLM"]
    return config


def _qwen2_5_vl() -> tf.PretrainedConfig:
    return tf.Qwen2_5_VLConfig(
        text_config={**GLU, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 4, "out_hidden_size": 64,
            "fullatt_block_indexes": [1], "patch_size": 4, "window_size": 16,
        },
        image_token_id=120, video_token_id=121, vision_start_token_id=122, vision_end_token_id=123,
    )  # fmt: skip


def _gemma3() -> tf.PretrainedConfig:
    return tf.Gemma3Config(
        text_config=LOCAL, vision_config={**VISION, "image_size": 16, "patch_size": 4}, mm_tokens_per_image=4,
        image_token_index=120, boi_token_index=121, eoi_token_index=122,
    )  # fmt: skip


def _mistral3() -> tf.PretrainedConfig:
    vision = {**VISION, "model_type": "pixtral", "image_size": 16, "patch_size": 4, "head_dim": 8}
    text = {**HEADS, "model_type": "mistral"}
    return tf.Mistral3Config(text_config=text, vision_config=vision, image_token_index=120)


def _families() -> dict[str, Family]:
    """Return the cases by name; what is not in a block's stages stays dense."""
    attention = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.out_proj"]]
    fused = [["self_attn.qkv_proj"], ["self_attn.o_proj"], ["mlp.gate_up_proj"], ["mlp.down_proj"]]
    half_fused = [*SPLIT, ["mlp.gate_up_proj"], ["mlp.down_proj"]]
    mlp = [["mlp.dense_h_to_4h"], ["mlp.dense_4h_to_h"]]
    small = {"vocab_size": 128, "hidden_size": 64}
    return {
        "llama": Family(tf.LlamaConfig(**GLU), GATED),
        "mistral": Family(tf.MistralConfig(**GLU, sliding_window=8), GATED),
        "ministral": Family(tf.MinistralConfig(**LOCAL), GATED),
        "ministral3": Family(tf.Ministral3Config(**HEADS), GATED),
        "qwen2": Family(tf.Qwen2Config(**GLU), GATED),
        "qwen3": Family(tf.Qwen3Config(**HEADS), GATED),
        "gemma2": Family(tf.Gemma2Config(**HEADS, sliding_window=8, query_pre_attn_scalar=16), GATED),
        "gemma3": Family(tf.Gemma3TextConfig(**LOCAL), GATED),
        "phi3": Family(tf.Phi3Config(**GLU), fused),
        "falcon": Family(
            tf.FalconConfig(**COMMON, hidden_size=64),
            [["self_attention.query_key_value", "mlp.dense_h_to_4h"], ["self_attention.dense"], mlp[1]],
        ),
        "bloom": Family(
            tf.BloomConfig(**small, n_layer=2, n_head=4, initializer_range=0.3),
            [["self_attention.query_key_value"], ["self_attention.dense"], *mlp],
        ),
        "opt": Family(
            tf.OPTConfig(
                **small,
                ffn_dim=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=64,
                max_position_embeddings=64,
                init_std=0.3,
            ),
            [*attention, ["fc1"], ["fc2"]],
        ),
        "gpt2": Family(
            tf.GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3),
            [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
        ),
        "gpt_neox": Family(
            tf.GPTNeoXConfig(**COMMON, hidden_size=64, intermediate_size=96),
            [["attention.query_key_value"], ["attention.dense"], *mlp],
        ),
        "stablelm": Family(tf.StableLmConfig(**GLU), GATED),
        "granite": Family(tf.GraniteConfig(**GLU, attention_multiplier=0.25), GATED),
        "olmo2": Family(tf.Olmo2Config(**GLU), GATED),
        "cohere": Family(tf.CohereConfig(**GLU), PARALLEL),
        "cohere2": Family(tf.Cohere2Config(**LOCAL), PARALLEL),
        "glm4": Family(tf.Glm4Config(**HEADS), half_fused),
        "qwen3_next": Family(
            _qwen3_next(),
            [["linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"], ["linear_attn.out_proj"], *GATED[2:], *SPLIT],
        ),
        "jamba": Family(
            _jamba(),
            [
                *[[f"mamba.{name}_proj"] for name in ("in", "x", "dt", "out")],
                ["feed_forward.gate_proj", "feed_forward.up_proj"],
                ["feed_forward.down_proj"],
                *SPLIT,
            ],
        ),
        "mamba2": Family(_mamba2(), [["mixer.in_proj"], ["mixer.out_proj"]]),
        "t5": Family(_t5(), T5, tf.AutoModelForSeq2SeqLM),
        "bart": Family(
            _bart(),
            [
                *attention,
                ["fc1"],
                ["fc2"],
                ["encoder_attn.q_proj"],
                ["encoder_attn.k_proj", "encoder_attn.v_proj"],
                ["encoder_attn.out_proj"],
            ],
            tf.AutoModelForSeq2SeqLM,
        ),
        "bert": Family(
            _bert(),
            [
                [f"attention.self.{name}" for name in ("query", "key", "value")],
                ["attention.output.dense"],
                ["intermediate.dense"],
                ["output.dense"],
            ],
            tf.AutoModelForMaskedLM,
        ),
        "qwen2_5_vl": Family(_qwen2_5_vl(), GATED, tf.AutoModelForImageTextToText),
        "gemma3_vl": Family(_gemma3(), GATED, tf.AutoModelForImageTextToText),
        "mistral3_vl": Family(_mistral3(), GATED, tf.AutoModelForImageTextToText),
    }


FAMILIES = _families()
