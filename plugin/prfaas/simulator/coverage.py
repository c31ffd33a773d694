"""Where a simulated run went beyond what its profiles were measured for."""

from __future__ import annotations

from prfaas.model.profiles import Profile
from prfaas.simulator.world import World


def extrapolations(world: World) -> list[str]:
    """One line for each profile and kind of figure that the run, once over, needed beyond its points.

    Prompts are counted at the site that prefilled them, batches by the limit that they may reach. A decode
    step that takes the same time at every batch holds at any.
    """
    record, profiles = world.record, _by_site(world)
    outside: dict[tuple[str, str], int] = {}
    prompts: dict[str, int] = {}
    for tokens, site_id in zip(record.prompt_tokens, record.site, strict=True):
        site = record.names[site_id]
        prompts[site] = prompts.get(site, 0) + 1
        for profile in profiles.get(site, {}).values():
            if not profile.covers(tokens):
                outside[site, profile.name] = outside.get((site, profile.name), 0) + 1
    lines = []
    for (site, name), count in outside.items():
        profile = profiles[site][name]
        first = max(profile.prefill.x[0], profile.kv.x[0])
        last = min(profile.prefill.x[-1], profile.kv.x[-1])
        lines.append(
            f"{count} of {prompts[site]} prompts at {site} lie outside {first:.0f} to {last:.0f} tokens, "
            f"where profile {name} was measured"
        )
    for name, (batch, most) in _batches(world).items():
        lines.append(f"batches of up to {batch}, where profile {name} has decode steps up to {most:.0f}")
    return lines


def _by_site(world: World) -> dict[str, dict[str, Profile]]:
    """Profiles of the engines that prefill."""
    found: dict[str, dict[str, Profile]] = {}
    for engine in world.engines.values():
        if engine.role != "decode":
            found.setdefault(engine.site, {})[engine.profile.name] = engine.profile
    return found


def _batches(world: World) -> dict[str, tuple[int, float]]:
    """Largest batch limit and last measured batch, of profiles whose steps aren't known that far."""
    found: dict[str, tuple[int, float]] = {}
    for engine in world.engines.values():
        decode = engine.profile.decode
        if engine.role == "prefill" or decode is None or decode.step.y[0] == decode.step.y[-1]:
            continue
        if engine.max_batch > decode.step.x[-1]:
            before = found.get(engine.profile.name, (0, 0.0))[0]
            found[engine.profile.name] = (max(before, engine.max_batch), decode.step.x[-1])
    return found
