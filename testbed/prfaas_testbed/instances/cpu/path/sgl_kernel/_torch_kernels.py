"""Kernels in plain torch, with the names and arguments by which SGLang 0.5.23 calls their CPU versions.

Right, not fast: one Python loop over sequences. Recurrent states are kept as SGLang keeps them, [slot, head,
V, K]; transformers' reference, which does the arithmetic, has K before V.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _activate(x: Tensor, activation: str | bool | None) -> Tensor:
    return functional.silu(x) if activation in ("silu", "swish", True) else x


def causal_conv1d_fn_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = "silu",
    conv_states: Tensor | None = None,
    has_initial_state: Tensor | None = None,
    cache_indices: Tensor | None = None,
    query_start_loc: Tensor | None = None,
    seq_lens_cpu: Any = None,
    **unused: Any,
) -> Tensor:
    """Depthwise causal convolution of packed sequences.

    x: [channels, tokens of all sequences]; weight: [channels, width]; conv_states: [slot, channels, width -
    1], read where `has_initial_state` and always rewritten with the last width - 1 inputs.
    """
    assert conv_states is not None
    assert cache_indices is not None
    assert query_start_loc is not None
    out = torch.empty_like(x)
    width, channels = weight.shape[-1], x.shape[0]
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        slot = int(cache_indices[i])
        if has_initial_state is not None and bool(has_initial_state[i]):
            before = conv_states[slot][:, -(width - 1) :].float()
        else:
            before = torch.zeros(channels, width - 1)
        padded = torch.cat([before, x[:, start:end].float()], dim=1)
        y = functional.conv1d(
            padded[None], weight.float()[:, None, :], None if bias is None else bias.float(), groups=channels
        )[0]
        out[:, start:end] = _activate(y, activation).to(x.dtype)
        conv_states[slot].copy_(padded[:, -(width - 1) :].to(conv_states.dtype))
    return out


def causal_conv1d_update_cpu(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | bool | None = None,
    conv_state_indices: Tensor | None = None,
    **unused: Any,
) -> Tensor:
    """One token a sequence. x: [sequences, channels]; conv_state: [slot, channels, width - 1], updated in
    place.
    """
    assert conv_state_indices is not None
    slots, width = conv_state_indices.long(), weight.shape[-1]
    window = torch.cat([conv_state[slots].float(), x.float()[:, :, None]], dim=2)
    y = (window * weight.float()[None]).sum(-1)
    if bias is not None:
        y = y + bias.float()
    conv_state[slots] = window[:, :, -(width - 1) :].to(conv_state.dtype)
    return _activate(y, activation).to(x.dtype)


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The decay g (a logarithm) and beta of the gated delta rule, each [1, tokens, V heads]."""
    g = -A_log.float().exp() * functional.softplus(a.float() + dt_bias.float())
    return g[None], torch.sigmoid(b.float())[None]


def _spread_heads(t: Tensor, v_heads: int) -> Tensor:
    """[1, tokens, K heads, size] with each K head repeated for the V heads it serves."""
    return t.repeat_interleave(v_heads // t.shape[2], dim=2)


def chunk_gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    head_first: bool = False,
    use_qk_l2norm_in_kernel: bool = True,
    initial_state_indices: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None, None]:
    """Prefill. q, k, v: [1, tokens of all sequences, heads, size]; initial_state: [slot, V heads, V, K], in
    place.
    """
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    assert initial_state_indices is not None
    v_heads = v.shape[2]
    q, k = _spread_heads(q, v_heads), _spread_heads(k, v_heads)
    out = torch.empty_like(v)
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        if start == end:
            continue
        slot = int(initial_state_indices[i])
        result, last = torch_chunk_gated_delta_rule(
            q[:, start:end],
            k[:, start:end],
            v[:, start:end],
            g[:, start:end].float(),
            beta[:, start:end].float(),
            initial_state=initial_state[slot].float().transpose(-1, -2)[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
        )
        out[:, start:end] = result.to(out.dtype)
        initial_state[slot] = last[0].transpose(-1, -2).to(initial_state.dtype)
    return out, None, None


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor | None = None,
    use_qk_l2norm_in_kernel: bool = True,
    **unused: Any,
) -> Tensor:
    """Decode, one token a sequence. q, k, v: [1, sequences, heads, size]; states updated in place."""
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    def by_sequence(t: Tensor) -> Tensor:
        return t.transpose(0, 1)  # [1, sequences, …] to [sequences, 1, …]

    v_heads = v.shape[2]
    g, beta = fused_gdn_gating_cpu(A_log, a, b, dt_bias)
    slots = initial_state_indices.long()
    result, last = torch_recurrent_gated_delta_rule(
        by_sequence(_spread_heads(q, v_heads)),
        by_sequence(_spread_heads(k, v_heads)),
        by_sequence(v),
        by_sequence(g),
        by_sequence(beta),
        initial_state=initial_state_source[slots].float().transpose(-1, -2),
        output_final_state=True,
        use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel,
    )
    initial_state_source[slots] = last.transpose(-1, -2).to(initial_state_source.dtype)
    return by_sequence(result).to(v.dtype)


def fused_rmsnorm_gated_cpu(x: Tensor, weight: Tensor, z: Tensor, eps: float) -> Tensor:
    """RMSNorm of x, scaled by weight and by SiLU of the gate z."""
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (y * functional.silu(z.float())).to(x.dtype)


def topk_softmax_cpu(
    hidden_states: Tensor,
    gating_output: Tensor,
    topk: int,
    renormalize: bool,
    correction_bias: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, Tensor]:
    """The experts of each token: weights [tokens, topk] and ids, int32."""
    weights, ids = torch.topk(torch.softmax(gating_output.float(), -1), topk, dim=-1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids.to(torch.int32)


K_OPS = (
    fused_gdn_gating_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
    fused_rmsnorm_gated_cpu,
    topk_softmax_cpu,
)


def register() -> None:
    """Make the kernels that SGLang reaches as torch.ops.sgl_kernel.NAME answer by that name."""
    for op in K_OPS:
        setattr(torch.ops.sgl_kernel, op.__name__, op)
