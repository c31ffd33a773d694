"""Kimi delta attention (KDA) in plain torch, in the places of SGLang 0.5.23's Triton kernels, which have no
CPU form: the convolution before it, prefill, decode, and the gated norm after it.

The rule for a head and token (Kimi Linear, arXiv 2510.26692): S = diag(e^g) S, then S = S + k (beta (v - k
S))^T and o = q S, with g = -e^A softplus(a + bias) for each channel of K. Prefill takes chunks, in which the
rule is a triangular system. States are kept as SGLang keeps them, [slot, head, V, K]; here K comes before V.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from sgl_kernel.mamba import causal_conv1d_fn_cpu
from torch import Tensor
from torch.nn import functional

K_CHUNK_TOKENS = 64
K_NORM_EPS = 1e-6


def register(registry: Any, replace: Any, around: Any) -> None:
    """Put them in their places. `registry` is SGLang's, `replace` and `around` kinds of its hooks."""
    backend = "sglang.srt.layers.attention.linear.kda_backend"
    kernel = "sglang.srt.layers.attention.linear.kernels.kda_triton.TritonKDAKernel"
    registry.register(f"{backend}.causal_conv1d_fn", causal_conv1d_fn_cpu, replace)
    registry.register(f"{kernel}.extend", extend, replace)
    registry.register(f"{kernel}.decode", decode, replace)
    registry.register(
        "sglang.kernels.ops.attention.fla.fused_norm_gate.FusedRMSNormGated.forward", gated_norm, around
    )
    registry.register(
        "sglang.srt.models.deepseek_common.attention_backend_handler.AttentionBackendRegistry.get_handler",
        absorbed,
        replace,
    )


def absorbed(*unused: Any) -> Any:
    """How the model's full-attention layers, which are latent ones, choose how to attend: the other way
    writes its cache by a Triton kernel.
    """
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    return lambda attention, forward_batch: AttnForwardMethod.MLA


def decays(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """The logarithm of each channel's decay, [tokens, heads, K], of gates of any shape with as many
    values.
    """
    heads = A_log.numel()
    gates = a.float().reshape(-1, heads, dt_bias.numel() // heads) + dt_bias.float().reshape(heads, -1)
    return -A_log.float().exp().reshape(heads, 1) * functional.softplus(gates)


def normed(t: Tensor) -> Tensor:
    t = t.float()
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + K_NORM_EPS)


def extend(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    lower_bound: float | None = None,
    beta_is_raw: bool = False,
    return_intermediate_states: bool = False,
    **unused: Any,
) -> Tensor:
    """Prefill. q, k, v: [1, tokens of all sequences, heads, size]; g and beta as the gates give them; states
    in place.
    """
    assert lower_bound is None
    assert beta_is_raw
    assert not return_intermediate_states
    out = torch.empty_like(v)
    decay, rate = decays(g, A_log, dt_bias), torch.sigmoid(beta.float())[0]
    for i, (start, end) in enumerate(itertools.pairwise(query_start_loc.tolist())):
        slot, these = int(cache_indices[i]), slice(start, end)
        state = ssm_states[slot].float().transpose(-1, -2)
        result, state = over_sequence(q[0, these], k[0, these], v[0, these], decay[these], rate[these], state)
        out[0, these] = result.to(out.dtype)
        ssm_states[slot] = state.transpose(-1, -2).to(ssm_states.dtype)
    return out


def over_sequence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """What a sequence attends to, and the state after it. q, k, v, g: [tokens, heads, size]; beta: [tokens,
    heads]; state: [heads, K, V].
    """
    q, k = normed(q).transpose(0, 1) * q.shape[-1] ** -0.5, normed(k).transpose(0, 1)
    v, g, beta = v.float().transpose(0, 1), g.transpose(0, 1), beta.transpose(0, 1)[..., None]
    results = []
    for start in range(0, q.shape[1], K_CHUNK_TOKENS):
        some = slice(start, start + K_CHUNK_TOKENS)
        result, state = over_chunk(q[:, some], k[:, some], v[:, some], g[:, some], beta[:, some], state)
        results.append(result)
    return torch.cat(results, dim=1).transpose(0, 1), state


def over_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The same of a chunk, heads first."""
    total = g.cumsum(1)
    tokens = q.shape[1]
    later = torch.ones(tokens, tokens, dtype=torch.bool).tril()  # [i, j]: j isn't after i
    between = (total[:, :, None] - total[:, None]).masked_fill(~later[..., None], float("-inf")).exp()
    weighed = k[:, None] * between  # what is left at i of the key at j, [heads, i, j, K]
    keys = (k[:, :, None] * weighed).sum(-1).tril(-1)
    system = torch.eye(tokens) + beta * keys
    wanted = beta * (v - (k * total.exp()) @ state)
    written = torch.linalg.solve_triangular(system, wanted, upper=False, unitriangular=True)
    result = (q * total.exp()) @ state + (q[:, :, None] * weighed).sum(-1) @ written
    last = total[:, -1:]
    state = last.exp().transpose(-1, -2) * state + (k * (last - total).exp()).transpose(-1, -2) @ written
    return result, state


def decode(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    lower_bound: float | None = None,
    **unused: Any,
) -> Tensor:
    """One token a sequence. q, k, v: [1, sequences, heads, size]; states in place."""
    assert lower_bound is None
    slots = cache_indices.long()
    q, k, rate = normed(q[0]) * q.shape[-1] ** -0.5, normed(k[0]), torch.sigmoid(b.float())[0][..., None]
    state = ssm_states[slots].float().transpose(-1, -2) * decays(a, A_log, dt_bias).exp()[..., None]
    written = rate * (v[0].float() - (state * k[..., None]).sum(-2))
    state = state + k[..., None] * written[..., None, :]
    ssm_states[slots] = state.transpose(-1, -2).to(ssm_states.dtype)
    return (state * q[..., None]).sum(-2).to(v.dtype)[None]


def gated_norm(original: Any, norm: Any, x: Tensor, g: Tensor, *more: Any, **options: Any) -> Any:
    """RMSNorm of x, scaled by weight and by the sigmoid of the gate; other activations are SGLang's."""
    if norm.activation != "sigmoid":
        return original(norm, x, g, *more, **options)
    y = x.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + norm.eps) * norm.weight.float()
    return (y * torch.sigmoid(g.float()).view_as(y)).to(x.dtype)
