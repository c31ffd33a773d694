from prfaas.admission.edf import Promise, finish_times
from prfaas.admission.estimator import EstimatorEvent, LinkCameUp, LinkEstimator, LinkWentDown, RateFell
from prfaas.admission.ledger import Admitted, Expired, Ledger, LedgerEvent, LedgerStatistics, PromiseBroken
from prfaas.admission.offers import OfferBook, Standing
from prfaas.admission.shares import Share, ShareBook, ShareHolder, overstep

__all__ = [
    "Admitted",
    "EstimatorEvent",
    "Expired",
    "Ledger",
    "LedgerEvent",
    "LedgerStatistics",
    "LinkCameUp",
    "LinkEstimator",
    "LinkWentDown",
    "OfferBook",
    "Promise",
    "PromiseBroken",
    "RateFell",
    "Share",
    "ShareBook",
    "ShareHolder",
    "Standing",
    "finish_times",
    "overstep",
]
