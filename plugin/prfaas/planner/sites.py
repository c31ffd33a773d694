"""Several PrfaaS clusters, several local clusters, links between them: the highest rate, and who sends where.

A mixed-integer linear programme over cells of equal probability of each local cluster's lengths (HiGHS, by
scipy). Unlike the two-cluster model, which is evaluated at l_long and l_short, times and sizes are averaged
over the cells, and any choice by length is allowed, not one threshold alone: the answer bounds every policy
that looks at lengths. Thresholds that the optimum implies are reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from prfaas.model.lengths import Lengths
from prfaas.model.profiles import Curve, DecodeProfile
from prfaas.planner.equations import decode_rps

if TYPE_CHECKING:
    from scipy.sparse import csr_array

K_CELLS = 48
K_SCALE_BPS = 1e9  # link rows in Gbit/s, so that the solver's tolerances suit every row


@dataclass(frozen=True)
class PrfaasCluster:
    """A cluster that only prefills."""

    name: str
    instances: int
    prefill: Curve
    kv: Curve
    egress_bps: float | None = None
    """Over all its links; None: its links alone limit it."""


@dataclass(frozen=True)
class LocalCluster:
    """A cluster where requests arrive, and where all of them are decoded."""

    name: str
    instances: int
    prefill: Curve
    decode: DecodeProfile
    lengths: Lengths
    output_tokens: float
    rate_share: float
    """Of all requests."""
    prefill_instances: int | None = None
    """N_p where roles are fixed; None: chosen."""


@dataclass(frozen=True)
class Link:
    """One direction, from a PrfaaS cluster to a local one."""

    source: str
    target: str
    rate_bps: float


@dataclass(frozen=True)
class LocalPlan:
    """What a local cluster does at the optimum."""

    name: str
    prefill: int
    decode: int
    rate_rps: float
    offloaded_share: float
    """Of its requests."""
    threshold_tokens: float | None
    """The length above which more than half is offloaded, wherever to; None where nothing is."""
    to: dict[str, float]
    """Of its requests, by PrfaaS cluster."""


@dataclass(frozen=True)
class SitesPlan:
    """The optimum over all clusters."""

    throughput_rps: float
    locals: tuple[LocalPlan, ...]
    prfaas_utilisation: dict[str, float]
    link_gbps: dict[tuple[str, str], float]
    worth: dict[str, float]
    """What Λ gains from a little more of each: `prfaas NAME` and `prefill NAME` an instance, `decode NAME` an
    instance, `link A>B` and `egress NAME` a Gbit/s. Roles are held; 0: more of it alone is of no use."""


@dataclass(frozen=True)
class _Columns:
    """Where each variable stands: λ, then n_i, then local cells, then offloaded cells by link."""

    locals: Sequence[LocalCluster]
    links: Sequence[tuple[int, int]]
    cells: int

    @property
    def count(self) -> int:
        return 1 + len(self.locals) * (1 + self.cells) + len(self.links) * self.cells

    def prefill(self, i: int) -> int:
        return 1 + i

    def local(self, i: int, cell: int) -> int:
        return 1 + len(self.locals) + i * self.cells + cell

    def sent(self, link: int, cell: int) -> int:
        return 1 + len(self.locals) * (1 + self.cells) + link * self.cells + cell


class _Rows:
    """Linear rows under construction."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.bound: list[float] = []
        self._row: list[int] = []
        self._column: list[int] = []
        self._value: list[float] = []

    def add(self, name: str, terms: Sequence[tuple[int, float]], bound: float) -> None:
        self._row += [len(self.bound)] * len(terms)
        self._column += [column for column, _ in terms]
        self._value += [value for _, value in terms]
        self.names.append(name)
        self.bound.append(bound)

    def matrix(self, columns: int) -> csr_array:
        from scipy.sparse import csr_array

        return csr_array((self._value, (self._row, self._column)), shape=(len(self.bound), columns))


def _names_fit(
    prfaas: Sequence[PrfaasCluster], locals_: Sequence[LocalCluster], links: Sequence[Link]
) -> None:
    names = [one.name for one in prfaas] + [one.name for one in locals_]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two clusters are named {name}")
    for link in links:
        if link.source not in {one.name for one in prfaas}:
            raise ValueError(f"link from {link.source}: not a PrfaaS cluster")
        if link.target not in {one.name for one in locals_}:
            raise ValueError(f"link to {link.target}: not a local cluster")
    if not locals_ or not sum(one.rate_share for one in locals_) > 0:
        raise ValueError("needs a local cluster with a share of the requests")


def plan_sites(
    prfaas: Sequence[PrfaasCluster],
    locals_: Sequence[LocalCluster],
    links: Sequence[Link],
    cells: int = K_CELLS,
) -> SitesPlan:
    """The highest rate Λ of the whole, roles and routes chosen for it. Raises ValueError for names that don't
    fit and for a system that serves nothing."""
    # Here, not above: half a second and 60 MB that the planner's other users needn't pay.
    from scipy.optimize import Bounds, LinearConstraint, linprog, milp

    _names_fit(prfaas, locals_, links)
    place = {one.name: i for i, one in enumerate(prfaas)}
    home = {one.name: i for i, one in enumerate(locals_)}
    ends = [(place[link.source], home[link.target]) for link in links]
    columns = _Columns(locals_, ends, cells)
    shares = np.array([one.rate_share for one in locals_]) / sum(one.rate_share for one in locals_)
    lengths = [one.lengths.cells(cells) for one in locals_]

    equal, most = _Rows(), _Rows()
    _add_demand(equal, columns, shares)
    _add_local_limits(most, columns, shares, lengths)
    _add_far_limits(most, columns, lengths, prfaas, links)

    cost = np.zeros(columns.count)
    cost[0] = -1.0
    whole, low, high = _roles(columns)
    equal_rows, most_rows = equal.matrix(columns.count), most.matrix(columns.count)
    found = milp(
        cost,
        integrality=whole,
        bounds=Bounds(low, high),
        constraints=[
            LinearConstraint(equal_rows, equal.bound, equal.bound),
            LinearConstraint(most_rows, -np.inf, most.bound),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    if not found.success or found.x[0] <= 0:
        raise ValueError(f"this system serves nothing: {found.message}")
    # The same with roles held is a plain LP, whose dual values say what more of each resource is worth.
    roles = np.round(found.x[1 : 1 + len(locals_)])
    low[1 : 1 + len(locals_)] = high[1 : 1 + len(locals_)] = roles
    held = linprog(
        cost,
        A_ub=most_rows,
        b_ub=most.bound,
        A_eq=equal_rows,
        b_eq=equal.bound,
        bounds=np.column_stack([low, high]),
        method="highs",
    )
    if not held.success:
        raise ValueError(f"this system serves nothing: {held.message}")
    rate = float(held.x[0])
    # Of all optima the one that sends least: long prompts go out, and nothing crosses a link needlessly.
    low[0] = rate * (1 - 1e-9)
    frugal = linprog(
        _bytes_sent(columns, lengths, prfaas),
        A_ub=most_rows,
        b_ub=most.bound,
        A_eq=equal_rows,
        b_eq=equal.bound,
        bounds=np.column_stack([low, high]),
        method="highs",
    )
    x = frugal.x if frugal.success else held.x
    used = most_rows @ x
    worth = {name: float(-dual) for name, dual in zip(most.names, held.ineqlin.marginals, strict=True)}
    return SitesPlan(
        throughput_rps=rate,
        locals=tuple(
            _local_plan(columns, i, x, rate * float(shares[i]), lengths[i], prfaas)
            for i in range(len(locals_))
        ),
        prfaas_utilisation={
            cluster.name: float(used[most.names.index(f"prfaas {cluster.name}")]) / max(cluster.instances, 1)
            for cluster in prfaas
        },
        link_gbps={
            (link.source, link.target): float(used[most.names.index(f"link {link.source}>{link.target}")])
            for link in links
        },
        worth=worth,
    )


def _roles(columns: _Columns) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which variables are whole numbers (the n_i), and the bounds of all; a fixed role has one value."""
    whole = np.zeros(columns.count)
    low, high = np.zeros(columns.count), np.full(columns.count, np.inf)
    for i, one in enumerate(columns.locals):
        at = columns.prefill(i)
        whole[at] = 1
        if one.prefill_instances is None:
            high[at] = one.instances
        else:
            low[at] = high[at] = one.prefill_instances
    return whole, low, high


def _add_demand(rows: _Rows, columns: _Columns, shares: np.ndarray) -> None:
    """Each cell of each local cluster's requests is prefilled there, or sent for by one of its links."""
    for i in range(len(columns.locals)):
        for cell in range(columns.cells):
            terms = [(columns.local(i, cell), 1.0), (0, -shares[i] / columns.cells)]
            terms += [
                (columns.sent(k, cell), 1.0) for k, (_, target) in enumerate(columns.links) if target == i
            ]
            rows.add("all served", terms, 0.0)


def _add_local_limits(
    rows: _Rows, columns: _Columns, shares: np.ndarray, lengths: Sequence[Sequence[float]]
) -> None:
    """Local prefill takes no more than n_i instances, decode no more than what is left of N_i."""
    for i, one in enumerate(columns.locals):
        times = [(columns.local(i, cell), one.prefill(lengths[i][cell])) for cell in range(columns.cells)]
        rows.add(f"prefill {one.name}", [*times, (columns.prefill(i), -1.0)], 0.0)
        per_instance = decode_rps(1, one.decode.max_batch, one.decode.step_s(), one.output_tokens)
        # In instances: λ w_i / d_i + n_i ≤ N_i.
        rows.add(
            f"decode {one.name}", [(0, shares[i] / per_instance), (columns.prefill(i), 1.0)], one.instances
        )


def _add_far_limits(
    rows: _Rows,
    columns: _Columns,
    lengths: Sequence[Sequence[float]],
    prfaas: Sequence[PrfaasCluster],
    links: Sequence[Link],
) -> None:
    """PrfaaS instances' seconds, and the Gbit/s of each link and of each cluster's way out."""
    for j, cluster in enumerate(prfaas):
        own = [(k, target) for k, (source, target) in enumerate(columns.links) if source == j]
        times = [
            (columns.sent(k, cell), cluster.prefill(lengths[target][cell]))
            for k, target in own
            for cell in range(columns.cells)
        ]
        rows.add(f"prfaas {cluster.name}", times, cluster.instances)
        sizes = {
            k: [
                (columns.sent(k, cell), 8 * cluster.kv(lengths[target][cell]) / K_SCALE_BPS)
                for cell in range(columns.cells)
            ]
            for k, target in own
        }
        for k, terms in sizes.items():
            rows.add(f"link {links[k].source}>{links[k].target}", terms, links[k].rate_bps / K_SCALE_BPS)
        if cluster.egress_bps is not None:
            everything = [term for terms in sizes.values() for term in terms]
            rows.add(f"egress {cluster.name}", everything, cluster.egress_bps / K_SCALE_BPS)


def _bytes_sent(
    columns: _Columns, lengths: Sequence[Sequence[float]], prfaas: Sequence[PrfaasCluster]
) -> np.ndarray:
    """Gbit/s over all links, as a cost row."""
    cost = np.zeros(columns.count)
    for k, (source, target) in enumerate(columns.links):
        for cell in range(columns.cells):
            cost[columns.sent(k, cell)] = 8 * prfaas[source].kv(lengths[target][cell]) / K_SCALE_BPS
    return cost


def _local_plan(
    columns: _Columns,
    i: int,
    x: np.ndarray,
    rate_rps: float,
    lengths: Sequence[float],
    prfaas: Sequence[PrfaasCluster],
) -> LocalPlan:
    one = columns.locals[i]
    by_cluster: dict[str, float] = {}
    out = np.zeros(columns.cells)
    for k, (source, target) in enumerate(columns.links):
        if target == i:
            sent = np.array([x[columns.sent(k, cell)] for cell in range(columns.cells)])
            out += sent
            name = prfaas[source].name
            by_cluster[name] = by_cluster.get(name, 0.0) + float(sent.sum()) / max(rate_rps, 1e-12)
    of_cell = rate_rps / columns.cells
    threshold: float | None = None
    for cell in range(columns.cells - 1, -1, -1):
        if out[cell] <= of_cell / 2:
            break
        threshold = lengths[cell]
    prefill = round(float(x[columns.prefill(i)]))
    return LocalPlan(
        name=one.name,
        prefill=prefill,
        decode=one.instances - prefill,
        rate_rps=rate_rps,
        offloaded_share=float(out.sum()) / max(rate_rps, 1e-12),
        threshold_tokens=threshold,
        to=by_cluster,
    )
