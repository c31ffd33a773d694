"""The disaggregation backend inside SGLang. Only `compat` imports sglang; `plugin` is what SGLang loads."""

__all__: list[str] = []
