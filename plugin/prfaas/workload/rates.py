"""The same workload at another rate: what a search for capacity turns."""

from __future__ import annotations

from typing import Any

from prfaas.config.workload import Azure, Mooncake, Sessions, Synthetic


def scaled_rate(
    config: Synthetic | Sessions | Mooncake | Azure, factor: float
) -> Synthetic | Sessions | Mooncake | Azure:
    """`config` with `factor` times the arrivals a second; lengths and their order stay the same.

    Raises ValueError for a factor that isn't positive, and for arrivals all at once, which have no rate.
    """
    if not factor > 0:
        raise ValueError(f"factor {factor:g} must be above 0")
    if isinstance(config, (Mooncake, Azure)) and config.arrivals is None:
        if config.rate_rps is not None:
            return config.model_copy(update={"rate_rps": config.rate_rps * factor})
        return config.model_copy(update={"rate_scale": (config.rate_scale or 1.0) * factor})
    arrivals = config.arrivals
    assert arrivals is not None  # a trace without any has been dealt with
    rates = [name for name in ("rate_rps", "mean_rps", "on_rps", "off_rps") if hasattr(arrivals, name)]
    if not rates:
        raise ValueError("arrivals at once have no rate")
    update: dict[str, Any] = {name: getattr(arrivals, name) * factor for name in rates}
    return config.model_copy(update={"arrivals": arrivals.model_copy(update=update)})
