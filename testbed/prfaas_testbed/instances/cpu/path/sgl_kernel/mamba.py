"""The kernels of linear attention that SGLang's CPU code imports by name."""

from sgl_kernel import missing_names
from sgl_kernel._torch_kernels import (
    causal_conv1d_fn_cpu,
    causal_conv1d_update_cpu,
    chunk_gated_delta_rule_cpu,
)

__getattr__ = missing_names("sgl_kernel.mamba")
__all__ = ["causal_conv1d_fn_cpu", "causal_conv1d_update_cpu", "chunk_gated_delta_rule_cpu"]
