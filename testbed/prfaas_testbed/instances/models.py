"""Tiny models with random weights from fixed seeds, one a kind of attention, and what their requests must
weigh.

As a script, with a Python that has torch and transformers (SGLang's environment): `python models.py DIR`
makes DIR/dense, DIR/hybrid, DIR/kda, DIR/mla and DIR/window: weights, configuration, tokenizer and chat
template. The same seed gives the same bytes with the same torch.
As a module it needs neither: names, and the bytes that the architecture predicts.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

K_BYTES_PER_VALUE = 2  # bfloat16
K_VOCABULARY = 1024  # entries in the embedding; the tokenizer uses fewer
K_FIRST_PLAIN_TOKEN = 4  # ids below are <unk>, <s>, </s>, <pad>
K_PLAIN_TOKENS = 996  # ids 4 … 999 are words and bytes: what random prompts are drawn from

_COMMON: dict[str, Any] = {
    "vocab_size": K_VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32768,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class TinyModel:
    """One tiny model and what a request of it moves between sites.

    `kv_bytes_per_token` sums over the layers with a growing cache; `state_bytes` is what crosses once a
    request whatever its length (recurrent state); `window_bytes_per_token` is what each of the last
    `window_tokens` tokens weighs in the sliding layers.
    """

    name: str
    kind: str
    kv_bytes_per_token: int
    state_bytes: int = 0
    window_tokens: int = 0
    window_bytes_per_token: int = 0
    server_args: tuple[str, ...] = ()
    """Flags that each of its servers needs."""
    server_env: tuple[tuple[str, str], ...] = ()
    decode_args: tuple[str, ...] = ()
    """Flags that its decode servers need in addition; later flags win."""
    longest_prompt_tokens: int = 8192
    """What a CPU server takes."""


# K and V (2), by KV heads, by head size, by layers with a cache.
K_MODELS: dict[str, TinyModel] = {
    model.name: model
    for model in (
        TinyModel(
            name="dense",
            kind="full attention, GQA (Llama)",
            kv_bytes_per_token=2 * 2 * 32 * 4 * K_BYTES_PER_VALUE,
        ),
        TinyModel(
            name="hybrid",
            kind="gated delta net and full attention, 3:1 (Qwen3-Next)",
            kv_bytes_per_token=2 * 2 * 32 * 1 * K_BYTES_PER_VALUE,
            # A layer: convolution (2 K heads and 2 Q heads and 4 V heads of 32) x (kernel 4 - 1), bfloat16,
            # and the recurrent matrix, 4 V heads x 32 x 32, float32.
            state_bytes=3 * (((2 + 2 + 4) * 32) * 3 * K_BYTES_PER_VALUE + 4 * 32 * 32 * 4),
            server_args=("--max-mamba-cache-size", "32"),
            decode_args=("--max-mamba-cache-size", "64"),
        ),
        TinyModel(
            name="kda",
            kind="Kimi delta attention and multi-head latent attention, 3:1 (Kimi-Linear)",
            # A latent of 48 and 16 more of the key, in one layer.
            kv_bytes_per_token=(48 + 16) * 1 * K_BYTES_PER_VALUE,
            # A layer: convolution (Q, K and V of 4 heads of 32) x (kernel 4 - 1), bfloat16, and the recurrent
            # matrix, 4 heads x 32 x 32, float32.
            state_bytes=3 * ((3 * 4 * 32) * 3 * K_BYTES_PER_VALUE + 4 * 32 * 32 * 4),
            server_args=("--max-mamba-cache-size", "32"),
            server_env=(("PRFAAS_CPU_KDA", "1"),),
            decode_args=("--max-mamba-cache-size", "64"),
        ),
        TinyModel(
            name="mla",
            kind="multi-head latent attention, as DeepSeek's (MiniCPM3)",
            # A latent of 48 and a rotary key of 16, by layers; no heads, no V.
            kv_bytes_per_token=(48 + 16) * 4 * K_BYTES_PER_VALUE,
        ),
        TinyModel(
            name="window",
            kind="sliding window of 128 and full attention, 3:1 (Mellum)",
            kv_bytes_per_token=2 * 2 * 32 * 1 * K_BYTES_PER_VALUE,
            # The next token sees itself and 127 before it.
            window_tokens=127,
            window_bytes_per_token=2 * 2 * 32 * 3 * K_BYTES_PER_VALUE,
            server_env=(("TORCHDYNAMO_DISABLE", "1"),),
            # Beyond, decode's torch_native attention reads outside of the pool of windows.
            longest_prompt_tokens=1024,
        ),
        TinyModel(
            name="wide",
            kind="full attention, 2 of 4 heads, 8 wide layers (Llama)",
            kv_bytes_per_token=2 * 2 * 32 * 8 * K_BYTES_PER_VALUE,
            # A long prompt is computed, and handed over, in pieces.
            server_args=("--chunked-prefill-size", "1024"),
        ),
    )
}


def make_all(directory: Path, names: Sequence[str] = tuple(K_MODELS)) -> None:
    """Make these models afresh; each appears whole or not at all."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        make(name, directory)


def make(name: str, directory: Path) -> Path:
    """Make one model afresh as `directory`/`name`."""
    import torch

    target, unfinished = directory / name, directory / f".{name}.{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        _MAKERS[name](unfinished)
        _save_tokenizer(unfinished)
        shutil.rmtree(target, ignore_errors=True)
        unfinished.rename(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
        torch.set_default_dtype(torch.float32)
    return target


def _save(config: Any, model_class: Any, seed: int, directory: Path) -> None:
    import torch

    torch.manual_seed(seed)
    config.dtype = torch.bfloat16
    model_class(config).to(torch.bfloat16).save_pretrained(directory, safe_serialization=True)


def _make_dense(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    # A wide initialiser, so that tokens depend on far context and a missing page shows.
    config = LlamaConfig(**_COMMON, num_key_value_heads=2, initializer_range=0.3)
    _save(config, LlamaForCausalLM, 0, directory)


def _make_wide(directory: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    # Most of a token's cost is the same at every length: so is KV's share of the time.
    shape = {**_COMMON, "num_hidden_layers": 8, "intermediate_size": 2048}
    _save(LlamaConfig(**shape, num_key_value_heads=2, initializer_range=0.3), LlamaForCausalLM, 4, directory)


def _make_hybrid(directory: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=64,
        full_attention_interval=4,
        initializer_range=0.2,
    )
    _save(config, Qwen3NextForCausalLM, 1, directory)
    # transformers 5 leaves these out or folds them into rope_parameters; SGLang reads them at the top level.
    _amend(directory, full_attention_interval=4, rope_theta=10000.0, partial_rotary_factor=0.25)


def _make_kda(directory: Path) -> None:
    """By hand, under the names of the published checkpoint: transformers' own are others."""
    import torch
    from safetensors.torch import save_file  # type: ignore[import-not-found]

    heads, size, width = 4, 32, _COMMON["hidden_size"]
    nope, rope, latent, inner = 16, 16, 48, _COMMON["intermediate_size"]
    drawn = torch.Generator().manual_seed(4)

    def matrix(*shape: int, scale: float = 0.2) -> Any:
        return (torch.randn(*shape, generator=drawn) * scale).to(torch.bfloat16)

    def ones(n: int) -> Any:
        return torch.ones(n, dtype=torch.bfloat16)

    def uniform(low: float, high: float, *shape: int) -> Any:
        return low + (high - low) * torch.rand(*shape, generator=drawn)

    weights = {
        "model.embed_tokens.weight": matrix(K_VOCABULARY, width),
        "model.norm.weight": ones(width),
        "lm_head.weight": matrix(K_VOCABULARY, width),
    }
    for i in range(4):
        layer: dict[str, Any] = {
            "input_layernorm": ones(width),
            "post_attention_layernorm": ones(width),
            "mlp.gate_proj": matrix(inner, width),
            "mlp.up_proj": matrix(inner, width),
            "mlp.down_proj": matrix(width, inner),
            "self_attn.o_proj": matrix(width, heads * size),
        }
        if i < 3:
            layer |= {f"self_attn.{name}_proj": matrix(heads * size, width) for name in "qkv"}
            layer |= {f"self_attn.{name}_conv1d": matrix(heads * size, 1, 4, scale=0.5) for name in "qkv"}
            for gate in "fg":
                layer[f"self_attn.{gate}_a_proj"] = matrix(size, width)
                layer[f"self_attn.{gate}_b_proj"] = matrix(heads * size, size)
            layer |= {"self_attn.b_proj": matrix(heads, width), "self_attn.o_norm": ones(size)}
            # Slow decays, so that tokens depend on far context.
            weights[f"model.layers.{i}.self_attn.A_log"] = uniform(-4.0, -1.0, 1, 1, heads, 1)
            weights[f"model.layers.{i}.self_attn.dt_bias"] = uniform(-6.0, -2.0, heads * size)
        else:
            layer |= {
                "self_attn.q_proj": matrix(heads * (nope + rope), width),
                "self_attn.kv_a_proj_with_mqa": matrix(latent + rope, width),
                "self_attn.kv_a_layernorm": ones(latent),
                "self_attn.kv_b_proj": matrix(heads * (nope + size), latent),
            }
        weights |= {f"model.layers.{i}.{name}.weight": values for name, values in layer.items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    config = {
        **_COMMON,
        "architectures": ["KimiLinearForCausalLM"],
        "model_type": "kimi_linear",
        "dtype": "bfloat16",
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "kv_lora_rank": latent,
        "q_lora_rank": None,
        "qk_nope_head_dim": nope,
        "qk_rope_head_dim": rope,
        "v_head_dim": size,
        "mla_use_nope": True,
        # Counted from 1.
        "linear_attn_config": {
            "kda_layers": [1, 2, 3],
            "full_attn_layers": [4],
            "head_dim": size,
            "num_heads": heads,
            "short_conv_kernel_size": 4,
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _make_mla(directory: Path) -> None:
    from transformers import MiniCPM3Config, MiniCPM3ForCausalLM

    config = MiniCPM3Config(
        **_COMMON,
        num_key_value_heads=4,
        q_lora_rank=64,
        kv_lora_rank=48,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        scale_emb=1,
        scale_depth=2.0,  # by the root of the layers: 1
        dim_model_base=128,
        initializer_range=0.3,
    )
    _save(config, MiniCPM3ForCausalLM, 3, directory)
    _amend(directory, num_experts=0, rope_theta=10000.0)


def _make_window(directory: Path) -> None:
    from transformers import MellumConfig, MellumForCausalLM

    config = MellumConfig(
        **_COMMON,
        num_key_value_heads=2,
        head_dim=32,
        sliding_window=128,
        layer_types=["sliding_attention"] * 3 + ["full_attention"],
        mlp_layer_types=["dense"] * 4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        initializer_range=0.2,
    )
    _save(config, MellumForCausalLM, 2, directory)


def _amend(directory: Path, **fields: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}, indent=2) + "\n")


def _save_tokenizer(directory: Path) -> None:
    """A byte-level BPE of 1,000 entries trained on a fixed corpus, with a plain chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None, byte_fallback=False))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [" ".join(f"word{i} token{j} the quick brown fox" for i in range(50)) for j in range(50)]
    trainer = trainers.BpeTrainer(
        vocab_size=K_FIRST_PLAIN_TOKEN + K_PLAIN_TOKENS,
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(directory)


_MAKERS: dict[str, Callable[[Path], None]] = {
    "dense": _make_dense,
    "hybrid": _make_hybrid,
    "kda": _make_kda,
    "mla": _make_mla,
    "window": _make_window,
    "wide": _make_wide,
}


def main(argv: list[str]) -> int:
    names = argv[2:] or list(K_MODELS)
    if len(argv) < 2 or not set(names) <= set(K_MODELS):
        sys.stderr.write(f"usage: models.py DIR [NAME…]; names: {', '.join(K_MODELS)}\n")
        return 2
    make_all(Path(argv[1]), names)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
