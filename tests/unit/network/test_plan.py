from prfaas.config.topology import load_topology, network_names
from prfaas_testbed.network.plan import next_hops, path_links, plan_network


def test_every_directed_link_gets_its_own_device_with_its_own_disciplines() -> None:
    for name in network_names():
        topology = load_topology(name)
        states = topology.emulated()
        plan = plan_network(topology, states)
        assert set(plan.links) == set(states)
        places = {(place.node, place.device) for place in plan.links.values()}
        assert len(places) == len(states)
        for place in plan.links.values():
            lines = [line for line in plan.tc_lines[place.node] if f" {place.device} " in line]
            assert [line.split()[line.split().index("handle") + 1] for line in lines][:2] == ["1:", "2:"]


def test_every_router_knows_the_way_to_every_site() -> None:
    for name in network_names():
        topology = load_topology(name)
        plan = plan_network(topology, topology.emulated())
        for node in plan.nodes:
            routes = [line for line in plan.node_lines[node] if line.startswith("route add")]
            others = [other for site, other in topology.site_pairs() if site == node]
            if node in topology.hubs:
                assert len(routes) == len(topology.sites)
            else:
                assert len(routes) == len(others)


def test_the_hops_follow_the_topology_s_own_paths() -> None:
    for name in network_names():
        topology = load_topology(name)
        hops = next_hops(topology, topology.emulated())
        for a, b in topology.site_pairs():
            assert path_links(hops, a, b) == topology.path(a, b)


def test_addresses_are_distinct_and_inside_the_subnet() -> None:
    topology = load_topology("three-sites")
    plan = plan_network(topology, topology.emulated())
    addresses = [site.address for site in plan.sites.values()]
    assert addresses == ["10.77.1.2", "10.77.2.2", "10.77.3.2"]
    macs = {site.mac for site in plan.sites.values()} | {site.gateway_mac for site in plan.sites.values()}
    assert len(macs) == 6


def test_no_address_is_resolved_over_a_link() -> None:
    topology = load_topology("hub")
    plan = plan_network(topology, topology.emulated())
    for place in plan.links.values():
        written = [
            line for line in plan.node_lines[place.node] if line.startswith("neigh") and place.device in line
        ]
        assert written
        assert written[0].endswith("nud permanent")


def test_interface_names_fit_the_kernel_s_15_characters() -> None:
    for name in network_names():
        plan = plan_network(load_topology(name), load_topology(name).emulated())
        assert all(len(place.device) <= 15 for place in plan.links.values())
