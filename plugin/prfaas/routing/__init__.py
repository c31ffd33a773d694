from prfaas.routing.base import (
    CostProfile,
    Fleet,
    Policy,
    PolicyFactory,
    create_policy,
    policy_names,
    register_policy,
)

__all__ = [
    "CostProfile",
    "Fleet",
    "Policy",
    "PolicyFactory",
    "create_policy",
    "policy_names",
    "register_policy",
]
