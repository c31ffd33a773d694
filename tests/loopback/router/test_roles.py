"""The slow loop acted on: thresholds set, servers drained and converted one at a time, and what may fail."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from prfaas.routing import StageMeter

K_ROLES = {"west-p": "prefill", "west-d": "decode", "west-e": "decode", "east-p": "prefill"}
K_LOOP = {
    "dry_run": False,
    "look_every_s": 0.1,
    "patience": 2,
    "settle_s": 600.0,
    "drain_limit_s": 60.0,
    "least_requests": 8,
    "switch_timeout_s": 5.0,
}
K_SETTINGS: dict[str, Any] = {"slow_loop": K_LOOP}
K_SAFE = {"success": False, "message": "", "safe_to_restore": True}
K_LINK = [{"source": "east", "target": "west", "rate_mbps": 1, "rtt_ms": 1}]
"""So slow that long prompts are better prefilled at home, by more instances."""


def prepare(s: Any) -> None:
    for server in s.servers.values():
        server.load["max_running_requests"] = 64


async def traffic(s: Any, count: int = 10, **fields: Any) -> None:
    answers = await asyncio.gather(*(s.post(**fields) for _ in range(count)))
    assert [status for status, _, _ in answers] == [200] * count


async def roles(s: Any) -> dict[str, Any]:
    async with s.session.get(s.url + "/roles") as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


def converted(s: Any) -> list[Any]:
    return [one for one in s.servers.values() if one.switches]


def test_a_decode_server_turns_to_prefill_and_serves_as_such(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, links=K_LINK, **K_SETTINGS) as s:
            prepare(s)
            await traffic(s)
            await s.settle(lambda: converted(s), 20)
            (server,) = converted(s)
            assert server.switches == [{"new_role": "prefill", "decode_cuda_graph_memory_gb": 0.0}]
            await s.settle(lambda: not any(one.draining for one in s.router.servers))
            before = len(server.seen)
            await traffic(s, 20)
            assert len(server.seen) > before, "it prefills"
            page = await roles(s)
            assert page["sites"]["west"]["converting"] is None
            assert [step["step"] for step in page["steps"]] == ["resume", "switch", "drain"]
            assert sorted(one["role"] for one in page["servers"].values()) == ["decode"] + ["prefill"] * 3
            metrics = await s.metrics()
            done = 'prfaas_router_conversions_total{outcome="switched",role="prefill",site="west"}'
            assert metrics[done] == 1
            await s.router.reload()
            await traffic(s)
            assert sum(one.role == "prefill" for one in s.router.servers) == 3, "a reload keeps roles"

    asyncio.run(main())


def test_a_server_is_drained_first_and_gets_nothing_new_meanwhile(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, links=K_LINK, **K_SETTINGS) as s:
            prepare(s)
            decodes = [s.servers["west-d"], s.servers["west-e"]]
            for one in decodes:
                one.hold.clear()
            streams = [asyncio.ensure_future(s.post(stream=True)) for _ in range(8)]
            await s.settle(lambda: sum(len(one.seen) for one in decodes) == 8)
            assert all(one.seen for one in decodes)
            await traffic(s)
            await s.settle(lambda: s.router.roles.page()["sites"]["west"]["converting"], 20)
            name = s.router.roles.page()["sites"]["west"]["converting"]
            draining = s.servers[name]
            before = len(draining.seen)
            await traffic(s)
            assert len(draining.seen) == before
            assert not draining.switches
            async with s.session.get(s.url + "/health") as response:
                assert (await response.json())["servers"][name]["draining"]
            for one in decodes:
                one.hold.set()
            assert [status for status, _, _ in await asyncio.gather(*streams)] == [200] * 8
            await s.settle(lambda: draining.switches, 20)
            await traffic(s)

    asyncio.run(main())


def test_a_drain_that_never_ends_is_given_up_though_no_traffic_comes_to_be_planned_for(stand: Any) -> None:
    loop = K_LOOP | {"drain_limit_s": 1.0, "window_s": 2.0}

    async def main() -> None:
        async with stand(K_ROLES, links=K_LINK, slow_loop=loop) as s:
            prepare(s)
            decodes = [s.servers["west-d"], s.servers["west-e"]]
            for one in decodes:
                one.hold.clear()
            streams = [asyncio.ensure_future(s.post(stream=True)) for _ in range(8)]
            await s.settle(lambda: sum(len(one.seen) for one in decodes) == 8)
            await traffic(s)
            steps = s.router.roles.steps
            await s.settle(lambda: steps and steps[-1].step == "resume", 20)
            await s.settle(lambda: not any(one.draining for one in s.router.servers), 20)
            assert [one.reason for one in steps][1:] == ["not drained in time"]
            assert not converted(s)
            for one in decodes:
                one.hold.set()
            assert [status for status, _, _ in await asyncio.gather(*streams)] == [200] * 8

    asyncio.run(main())


def test_a_dry_run_says_what_it_would_do_and_without_the_section_nothing_is_planned(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, links=K_LINK, slow_loop=K_LOOP | {"dry_run": True}) as s:
            prepare(s)
            await traffic(s)
            await s.settle(lambda: s.router.roles.steps, 20)
            page = await roles(s)
            assert page["dry_run"]
            assert page["steps"][0]["dry_run"]
            assert page["sites"]["west"]["threshold_tokens"] is None
            assert not converted(s)
            _, _, _ = await s.post()
            assert s.router.scheduler.records[-1].decision.threshold_tokens == 100
        async with stand(K_ROLES) as s:
            page = await roles(s)
            assert (page["enabled"], page["sites"]) == (False, {})

    asyncio.run(main())


def test_the_planned_threshold_is_the_papers(stand: Any) -> None:
    async def main() -> None:
        async with stand(**K_SETTINGS) as s:
            prepare(s)
            await traffic(s)
            for words in (1, 10, 100):
                await traffic(s, path="/v1/completions", prompt="the quick " * words)

            def planned() -> float | None:
                found: float | None = s.router.roles.page()["sites"]["west"]["threshold_tokens"]
                return found

            await s.settle(lambda: planned() is not None, 20)
            await traffic(s, 1)
            assert s.router.scheduler.records[-1].decision.threshold_tokens == planned() != 100
            metrics = await s.metrics()
            assert 'prfaas_router_planned_threshold_tokens{site="west"}' in metrics
            assert 'prfaas_router_stage_utilisation{site="west",stage="decode"}' in metrics

    asyncio.run(main())


@pytest.mark.parametrize(
    ("answers", "outcome"),
    [
        ([K_SAFE | {"message": "instance is not idle; drain all requests"}] * 2, "switched"),
        ([K_SAFE | {"message": "--enable-pd-role-switch is not set"}], "refused"),
        ([{"error": {"message": "no such thing"}}], "refused"),
        ([K_SAFE | {"message": "restart required", "safe_to_restore": False}], "broken"),
        ([None], "switched"),
    ],
)
def test_what_a_server_may_say_to_a_change_of_role(
    stand: Any, answers: list[dict[str, Any] | None], outcome: str
) -> None:
    async def main() -> None:
        async with stand(K_ROLES, links=K_LINK, **K_SETTINGS) as s:
            prepare(s)
            for one in s.servers.values():
                one.switch_answers = list(answers)
                one.tells_role = True
            await traffic(s)
            await s.settle(lambda: converted(s), 20)
            (server,) = converted(s)
            handle = next(one for one in s.router.servers if one.url.endswith(f":{server.port}"))
            await s.settle(lambda: not handle.converting, 20)
            counted = f'prfaas_router_conversions_total{{outcome="{outcome}",role="prefill",site="west"}}'
            assert (await s.metrics())[counted] == 1
            assert handle.role == ("prefill" if outcome == "switched" else "decode")
            assert handle.draining == (outcome == "broken")
            await traffic(s)
            if outcome == "broken":
                assert handle.broken == "restart required"
                await server.stop()
                await s.settle(lambda: not handle.broken, 20)
                await server.start()
                await s.settle(lambda: handle.up(s.router.clock()), 20)
                await traffic(s)

    asyncio.run(main())


def test_a_role_that_another_router_or_a_restart_has_changed_is_followed(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_ROLES, slow_loop=K_LOOP | {"dry_run": True}) as s:
            for one in s.servers.values():
                one.tells_role = True
            s.servers["west-e"].role = "prefill"
            await s.settle(lambda: sum(one.role == "prefill" for one in s.router.servers) == 3)
            await traffic(s)
            s.servers["east-p"].role = "decode"  # not convertible: not believed
            await asyncio.sleep(0.3)
            assert s.router.servers.get("east-p").role == "prefill"

    asyncio.run(main())


K_TWO = K_ROLES | {"south-p": "prefill", "south-d": "decode", "south-e": "decode"}


def test_two_clusters_convert_at_once_each_its_own(stand: Any) -> None:
    async def main() -> None:
        async with stand(K_TWO, links=[*K_LINK, K_LINK[0] | {"target": "south"}], **K_SETTINGS) as s:
            prepare(s)
            for one in s.servers.values():
                one.hold.clear()
            streams = [asyncio.ensure_future(s.post(stream=True)) for _ in range(32)]
            await s.settle(
                lambda: sum(one.seen != [] for one in s.servers.values() if one.role == "decode") == 4
            )
            await traffic(s, 40)

            def converting() -> list[str | None]:
                return [one["converting"] for one in s.router.roles.page()["sites"].values()]

            await s.settle(lambda: None not in converting(), 20)
            assert [str(name).partition("-")[0] for name in converting()] == ["south", "west"]
            for one in s.servers.values():
                one.hold.set()
            assert [status for status, _, _ in await asyncio.gather(*streams)] == [200] * 32
            await s.settle(lambda: len(converted(s)) == 2, 20)
            await s.settle(lambda: not any(one.draining for one in s.router.servers))
            assert sorted(one.switches[0]["new_role"] for one in converted(s)) == ["prefill", "prefill"]
            for site in ("south", "west"):
                steps = [step.step for step in s.router.roles.steps if step.site == site]
                assert steps == ["drain", "switch", "resume"]
            await traffic(s)

    asyncio.run(main())


def test_a_plan_that_cannot_be_made_is_told_once_and_holds_no_other_cluster_up(
    stand: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sound = StageMeter.system

    def system(meter: StageMeter, *words: Any) -> Any:
        if meter.home == "south":  # looked at before west
            raise ValueError("no such curve")
        return sound(meter, *words)

    monkeypatch.setattr(StageMeter, "system", system)

    async def main() -> None:
        async with stand(K_TWO, links=[*K_LINK, K_LINK[0] | {"target": "south"}], **K_SETTINGS) as s:
            prepare(s)
            await traffic(s, 40)
            await s.settle(lambda: converted(s), 20)
            assert [step.site for step in s.router.roles.steps] == ["west"] * len(s.router.roles.steps)
            assert caplog.text.count("no such curve") == 1
            assert "south" in next(line for line in caplog.text.splitlines() if "no such curve" in line)

    asyncio.run(main())
