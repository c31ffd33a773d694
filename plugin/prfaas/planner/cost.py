"""What a request costs: instances by the hour, bytes by the gigabyte."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Prices:
    """In one currency, or in hours of a local instance."""

    prfaas_instance_hour: float
    local_instance_hour: float
    egress_per_gb: float = 0.0
    """Per 10⁹ bytes that leave the PrfaaS cluster."""
    unit: str = "local instance hours"

    @classmethod
    def implied(cls, prfaas_instances: int, local_instances: int, homogeneous_instances: int) -> Prices:
        """Prices in local instances, such that the homogeneous cluster costs what both clusters do: what
        "equal hardware" means in a case. Raises ValueError where that leaves nothing for PrfaaS instances."""
        left = homogeneous_instances - local_instances
        if prfaas_instances <= 0 or left <= 0:
            raise ValueError(
                f"{homogeneous_instances} homogeneous instances leave nothing for {prfaas_instances} PrfaaS "
                f"instances beside {local_instances} local ones"
            )
        return cls(left / prfaas_instances, 1.0)


def cost_per_request(
    prices: Prices,
    prfaas_instances: float,
    local_instances: float,
    rate_rps: float,
    egress_bps: float = 0.0,
) -> float:
    """(Σ instances · price an hour / 3600 + egress · price a GB) / λ, in the prices' unit."""
    hourly = prfaas_instances * prices.prfaas_instance_hour + local_instances * prices.local_instance_hour
    return (hourly / 3600 + egress_bps / 8e9 * prices.egress_per_gb) / rate_rps
