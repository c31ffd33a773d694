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
from prfaas.routing.hashing import block_hashes
from prfaas.routing.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    EventFeed,
    KvEvent,
    Received,
    decode_batch,
)
from prfaas.routing.paper import PaperPolicy
from prfaas.routing.prefix_index import IndexStatistics, PrefixIndex
from prfaas.routing.prices import PricesPolicy
from prfaas.routing.slow_loop import Proposal, SlowLoop, Stage, StageLoad, Step, StepKind
from prfaas.routing.stages import StageMeter

__all__ = [
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "CollocatedPolicy",
    "CostProfile",
    "EventFeed",
    "Fleet",
    "HomogeneousPolicy",
    "IndexStatistics",
    "KvEvent",
    "NaivePolicy",
    "PaperPolicy",
    "Policy",
    "PolicyFactory",
    "PrefixIndex",
    "PricesPolicy",
    "Proposal",
    "Received",
    "SlowLoop",
    "Stage",
    "StageLoad",
    "StageMeter",
    "Step",
    "StepKind",
    "block_hashes",
    "create_policy",
    "decode_batch",
    "policy_names",
    "register_policy",
]
