"""The experiment file's timeline on virtual time: the events that the testbed plays on a real network."""

from __future__ import annotations

from prfaas.config.experiment import (
    CrossTraffic,
    CutStream,
    Event,
    FillDisk,
    Flap,
    Hostile,
    Kill,
    LinkDown,
    ReplaceCertificate,
    SetLink,
    StepClock,
    directed,
)
from prfaas.config.topology import LinkChange
from prfaas.model.errors import UsageError
from prfaas.simulator.world import World


def play_timeline(world: World, events: tuple[Event, ...]) -> list[str]:
    """Put all events on the agenda. Answers what this world can't show, one line each. Raises UsageError for
    a link or a site that isn't there.
    """
    unsupported = []
    for event in events:
        _check(world, event)
        match event:
            case SetLink():
                _set_link(world, event)
            case LinkDown():
                for link_id in directed(event.link):
                    _down(world, link_id, event.at_s, event.for_s)
            case Flap():
                for link_id in directed(event.link):
                    for i in range(event.times):
                        start_s = event.at_s + i * (event.on_s + event.off_s)
                        _down(world, link_id, start_s, event.off_s)
            case CrossTraffic():
                _cross_traffic(world, event)
            case Kill():
                if event.what == "pump" or event.signal == "freeze" or event.instance not in world.engines:
                    what = event.what if event.instance in world.engines else event.instance
                    unsupported.append(f"at {event.at_s:g} s: {event.signal} of a {what} isn't simulated")
                    continue
                world.agenda.at(event.at_s, lambda now, name=event.instance: world.kill(name, now))  # type: ignore[misc]
                if event.restart_after_s is not None:
                    world.agenda.at(
                        event.at_s + event.restart_after_s,
                        lambda now, name=event.instance: world.restart(name, now),  # type: ignore[misc]
                    )
            case CutStream():
                unsupported.append(f"at {event.at_s:g} s: a cut stream costs a fluid nothing")
            case FillDisk() | StepClock():
                unsupported.append(f"at {event.at_s:g} s: {event.do} isn't simulated")
            case ReplaceCertificate():
                unsupported.append(f"at {event.at_s:g} s: certificates aren't simulated")
            case Hostile():
                unsupported.append(f"at {event.at_s:g} s: hostile packets aren't simulated")
    return unsupported


def _check(world: World, event: Event) -> None:
    said = f"timeline: {event.do} at {event.at_s:g} s"
    links, pipes = world.network.links, world.network.pipes
    if isinstance(event, SetLink | LinkDown | Flap):
        for link_id in directed(event.link):
            if link_id not in links:
                raise UsageError(f"{said}: no link {link_id!r}; there are {', '.join(links)}")
    elif isinstance(event, CrossTraffic) and (event.source, event.target) not in pipes:
        ways = ", ".join(f"{a}->{b}" for a, b in pipes)
        raise UsageError(f"{said}: no way {event.source}->{event.target}; there are {ways}")


def apply(world: World, link_id: str, change: LinkChange, now: float) -> None:
    """The link changes now."""
    network = world.network
    network.before_change(now)
    link = network.links[link_id]
    link.state = link.state.changed(change)
    network.changed(now)
    said = ", ".join(f"{name} {getattr(change, name)}" for name in sorted(change.model_fields_set))
    world.record.event(now, f"{link_id}: {said}")


def _set_link(world: World, event: SetLink) -> None:
    for link_id in directed(event.link):

        def do(now: float, link_id: str = link_id) -> None:
            undo = world.network.links[link_id].state.undoing(event.set)
            apply(world, link_id, event.set, now)
            if event.for_s is not None:
                world.agenda.at(now + event.for_s, lambda at_s: apply(world, link_id, undo, at_s))

        world.agenda.at(event.at_s, do)


def _down(world: World, link_id: str, at_s: float, for_s: float) -> None:
    world.agenda.at(at_s, lambda now: apply(world, link_id, LinkChange(down=True), now))
    world.agenda.at(at_s + for_s, lambda now: apply(world, link_id, LinkChange(down=False), now))


def _cross_traffic(world: World, event: CrossTraffic) -> None:
    pipe = world.network.pipes[event.source, event.target]

    def add(sign: int, now: float) -> None:
        world.network.before_change(now)
        for link in pipe.links:
            if event.kind == "udp":
                link.cross_bps += sign * (event.rate_mbps or 0.0) * 1e6
            else:
                link.cross_streams += sign * event.streams
        world.network.changed(now)
        world.record.event(now, f"cross traffic {event.kind} {'begins' if sign > 0 else 'ends'}")

    world.agenda.at(event.at_s, lambda now: add(1, now))
    world.agenda.at(event.at_s + event.for_s, lambda now: add(-1, now))
