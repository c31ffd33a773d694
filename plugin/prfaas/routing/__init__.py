from prfaas.routing.base import (
    CostProfile,
    Fleet,
    Policy,
    PolicyFactory,
    create_policy,
    policy_names,
    register_policy,
)
from prfaas.routing.baselines import CollocatedPolicy, HomogeneousPolicy, NaivePolicy
from prfaas.routing.paper import PaperPolicy
from prfaas.routing.prices import PricesPolicy

__all__ = [
    "CollocatedPolicy",
    "CostProfile",
    "Fleet",
    "HomogeneousPolicy",
    "NaivePolicy",
    "PaperPolicy",
    "Policy",
    "PolicyFactory",
    "PricesPolicy",
    "create_policy",
    "policy_names",
    "register_policy",
]
