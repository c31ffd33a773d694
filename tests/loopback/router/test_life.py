"""Start, reload, stop, replicas, TLS and pages of a running router."""

from __future__ import annotations

import asyncio
import json
import signal
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from prfaas.config.loading import check
from prfaas.config.router import RouterConfig, load_router_config
from prfaas.model.errors import ConfigError, MachineError, UsageError
from prfaas.model.ids import LinkId
from prfaas.router.service import Router
from prfaas.routing import BlockStored

K_COMMAND = """
import argparse, sys
from prfaas.cli import router
from prfaas.cli.main import run_command
parser = argparse.ArgumentParser()
router.register(parser.add_subparsers())
sys.exit(run_command("prfaas", lambda words: parser, sys.argv[1:]))
"""
"""The command alone: finding all the others costs seconds on a busy machine."""


K_LOCKED = {"name": "west-c", "role": "collocated", "url": "http://127.0.0.1:1", "key_file": "/nowhere"}


def test_a_reload_takes_servers_in_and_out_without_dropping_requests(stand: Any, long_text: str) -> None:
    async def main() -> None:
        async with stand({"west-p": "prefill", "west-d": "decode", "west-d2": "decode"}) as s:
            first = s.servers["west-d"]
            for decode in (first, s.servers["west-d2"]):
                decode.hold.clear()
            async with s.session.post(
                s.url + "/v1/completions", json={"prompt": "x", "stream": True}
            ) as running:
                assert await running.content.readany()
                old = s.router.servers.get("west-d")
                s.settings["sites"][0]["servers"] = [
                    server for server in s.settings["sites"][0]["servers"] if server["name"] != "west-d"
                ]
                s.settings["policy"] = {"name": "prices"}
                async with s.session.post(s.url + "/reload") as response:
                    assert response.status == 200
                assert s.router.servers.get("west-d") is None
                assert old.draining
                for decode in (first, s.servers["west-d2"]):
                    decode.hold.set()
                assert (await running.text()).endswith("data: [DONE]\n\n")
            count = len(first.seen)
            for _ in range(4):
                assert (await s.post())[0] == 200
            assert len(first.seen) == count
            await s.settle(lambda: old.session.closed)
            async with s.session.get(s.url + "/decisions", params={"limit": "2"}) as response:
                rows = (await response.json())["decisions"]
                assert [row["policy"] for row in rows] == ["prices", "prices"]

    asyncio.run(main())


def test_a_bad_reload_changes_nothing_and_says_why(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            sound = dict(s.settings)
            for field, value, word in (
                ("models", [], "models"),
                ("policy", {"name": "nobody"}, "nobody"),
                ("listen", {"port": 1}, "restart"),
                ("models", [{"name": "m", "tokenizer": "/nowhere"}], "tokenizer"),
                ("colour", "red", "colour"),
            ):
                s.settings.clear()
                s.settings.update({**sound, field: value})
                async with s.session.post(s.url + "/reload") as response:
                    assert response.status == 422
                    assert word in (await response.json())["error"]["message"]
                assert (await s.post())[0] == 200
            assert (await s.metrics())['prfaas_router_reloads_total{outcome="refused"}'] == 5

    asyncio.run(main())


async def reload(s: Any, **fields: Any) -> tuple[int, str]:
    """After a change of settings: the status, and the message where it was refused."""
    s.settings.update(fields)
    async with s.session.post(s.url + "/reload") as response:
        answer = await response.json()
        return response.status, answer["error"]["message"] if "error" in answer else ""


def model(folder: Path, **fields: Any) -> dict[str, Any]:
    return {"name": "m", "tokenizer": str(folder), **fields}


def test_a_server_whose_events_are_read_can_change_at_a_reload(stand: Any, model_folder: Path) -> None:
    async def main() -> None:
        async with stand() as s:
            rows = {row["name"]: row for site in s.settings["sites"] for row in site["servers"]}
            rows["west-p"]["kv_events"] = {"endpoint": "tcp://127.0.0.1:1"}
            assert await reload(s) == (200, "")
            book = s.router.prefixes
            for change in (
                {"endpoint": "tcp://127.0.0.1:2"},
                {"endpoint": "tcp://127.0.0.1:2", "topic": "x"},
            ):
                rows["west-p"]["kv_events"] = change
                assert await reload(s) == (200, "")
                assert set(book.index.statistics().holders) == {"west-p"}
                assert (await s.post())[0] == 200
            assert s.router.scheduler.records[-1].cached_tokens == {"west-p": 0}
            # Its blocks are cut otherwise from now on: what was known of it is forgotten.
            book.on_events("west-p", [BlockStored([1], 1)])
            assert book.index.statistics().holders == {"west-p": 1}
            assert await reload(s, models=[model(model_folder, page_tokens=4)]) == (200, "")
            book.on_events("west-p", [BlockStored([1, 2], 4)])
            assert book.index.statistics().holders == {"west-p": 2}
            assert (await s.post())[0] == 200

    asyncio.run(main())


def test_a_refused_reload_leaves_nothing_of_itself(stand: Any, model_folder: Path) -> None:
    async def main() -> None:
        async with stand() as s:
            both = [model(model_folder), {"name": "n", "page_tokens": 16, "tokenizer": "/nowhere"}]
            assert (await reload(s, models=both))[0] == 422
            both[1] = {"name": "n", "page_tokens": 64}
            assert await reload(s, models=both) == (200, "")
            assert (await s.post(model="n", path="/v1/completions", prompt="x"))[0] == 200

    asyncio.run(main())


def test_a_reload_is_taken_over_whole_though_who_asked_for_it_leaves(
    stand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with stand() as s:
            begun, may_end = asyncio.Event(), asyncio.Event()
            end = s.router._end

            async def slowly(owner: str) -> None:
                begun.set()
                await may_end.wait()
                await end(owner)

            monkeypatch.setattr(s.router, "_end", slowly)
            for site in s.settings["sites"]:
                for server in site["servers"]:
                    server["name"] += "-again"
            asking = asyncio.ensure_future(s.router.reload())
            await begun.wait()
            asking.cancel()  # as aiohttp does with a handler whose client is gone
            may_end.set()
            await s.settle(lambda: all(one.reported.at_s > 0 for one in s.router.servers))
            assert [one.name for one in s.router.servers] == ["west-p-again", "west-d-again", "east-p-again"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("section", "value", "word"),
    [
        ("limits", {"idle_timeout_s": 3.0}, "limits.idle_timeout_s"),
        ("limits", {"max_header_bytes": 2048}, "limits.max_header_bytes"),
        ("limits", {"tokenise_threads": 3}, "limits.tokenise_threads"),
        ("logs", {"events": "/tmp/elsewhere.jsonl"}, "logs.events"),
        ("listen", {"port": 0, "tls": {"certificate": "c", "key": "k"}}, "listen"),
        ("listen", {"port": 0, "reuse_port": True}, "listen"),
        ("seed", 7, "seed"),
    ],
)
def test_what_only_a_restart_can_change_is_refused_at_a_reload(
    stand: Any, section: str, value: Any, word: str
) -> None:
    async def main() -> None:
        async with stand() as s:
            status, message = await reload(s, **{section: value})
            assert (status, word in message, "needs a restart" in message) == (422, True, True)

    asyncio.run(main())


def test_a_limit_on_bodies_holds_from_the_reload_on_however_they_come(stand: Any) -> None:
    async def main() -> None:
        async with stand(limits={"max_body_bytes": 2048}) as s:

            async def ask(size: int) -> int:
                async def bits() -> AsyncIterator[bytes]:
                    yield b'{"prompt": "'
                    await asyncio.sleep(0.05)  # so that it doesn't come with its head
                    yield b"x" * size
                    yield b'"}'

                async with s.session.post(s.url + "/v1/completions", data=bits()) as response:
                    return int(response.status)

            assert await ask(4000) == 413
            assert await reload(s, limits={"max_body_bytes": 1 << 20}) == (200, "")
            assert await ask(4000) == 200
            assert await reload(s, limits={"max_body_bytes": 2048}) == (200, "")
            assert await ask(4000) == 413

    asyncio.run(main())


def test_a_profile_that_was_written_anew_is_taken_over_and_one_that_was_not_keeps_the_policy(
    stand: Any, tmp_path: Path
) -> None:
    file = tmp_path / "profile.yaml"

    def write(seconds: float) -> None:
        columns = {"tokens": [1000, 10_000], "prefill_s": [seconds, 10 * seconds], "kv_mib": [1, 10]}
        file.write_text(yaml.safe_dump({"name": "p", "description": "p", "source": "made up", **columns}))

    async def main() -> None:
        async with stand() as s:
            write(1.0)
            for site in s.settings["sites"]:
                site["cost"] = {"profile": str(file)}
            assert await reload(s) == (200, "")
            first = s.router.scheduler.policy
            assert await reload(s) == (200, "")
            assert s.router.scheduler.policy is first
            write(2.0)
            assert await reload(s) == (200, "")
            await s.post("/v1/completions", prompt=[5] * 1000)
            assert s.router.scheduler.records[-1].decision.chosen.prefill_s == pytest.approx(2.0, rel=0.01)

    asyncio.run(main())


def test_a_servers_key_is_read_again_at_reload_and_one_that_cant_be_read_changes_nothing(
    stand: Any, tmp_path: Path
) -> None:
    file = tmp_path / "key"

    async def main() -> None:
        async with stand() as s:
            heard: list[str | None] = []

            async def listen(fake: Any, request: web.Request, body: dict[str, Any]) -> None:
                heard.append(request.headers.get("Authorization"))

            s.servers["west-d"].fault = listen
            rows = [row for site in s.settings["sites"] for row in site["servers"] if row["name"] == "west-d"]
            for key in ("sk-1", "sk-2", None):
                rows[0]["key_file"] = str(file)
                if key is None:
                    file.unlink()
                else:
                    file.write_text(key + "\n")
                async with s.session.post(s.url + "/reload") as response:
                    assert response.status == (200 if key else 422)
                    assert key or "west-d.key_file" in (await response.json())["error"]["message"]
                assert (await s.post())[0] == 200
            assert heard == ["Bearer sk-1", "Bearer sk-2", "Bearer sk-2"]
            for wrong in ("", "two words", "two\nlines", "\x01"):
                file.write_text(wrong)
                assert (await reload(s))[0] == 422

    asyncio.run(main())


def test_two_routers_share_the_servers_and_nothing_else(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            other = Router(check(s.settings, RouterConfig, "test.yaml"))
            host, port = await other.start()
            try:
                urls = [s.url, f"http://{host}:{port}"]

                async def ask(number: int) -> int:
                    async with s.session.post(
                        urls[number % 2] + "/v1/completions", json={"prompt": "x", "stream": True}
                    ) as response:
                        return (await response.text()).count("data: ")

                answers = await asyncio.gather(*(ask(number) for number in range(40)))
                assert answers == [6] * 40
                seen = s.servers["west-d"].seen
                assert len(seen) == 40
                assert len({body["bootstrap_room"] for body in seen}) == 40
                assert len({body["rid"] for body in seen}) == 40
                assert len(s.router.scheduler.records) == len(other.scheduler.records) == 20
                # Limits are each router's own: what one refuses the other takes.
                s.router.clients.in_flight += 4096
                assert (await s.post())[0] == 429
                async with s.session.post(urls[1] + "/v1/completions", json={"prompt": "x"}) as response:
                    assert response.status == 200
                s.router.clients.in_flight -= 4096
                # What one sends, the other sees by the servers' own reports.
                s.servers["west-p"].load["num_waiting_uncached_tokens"] = 700
                handles = [router.servers.get("west-p") for router in (s.router, other)]
                await s.settle(lambda: all(one.reported.waiting_uncached_tokens == 700 for one in handles))
            finally:
                await other.stop()
            assert (await s.post())[0] == 200, "none needs another to live"

    asyncio.run(main())


def test_stopping_lets_running_requests_end_and_takes_no_new_ones(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            s.servers["west-d"].hold.clear()
            async with s.session.post(
                s.url + "/v1/completions", json={"prompt": "x", "stream": True}
            ) as running:
                assert await running.content.readany()
                stopping = asyncio.ensure_future(s.router.stop())
                await asyncio.sleep(0.1)
                assert not stopping.done()
                async with aiohttp.ClientSession() as fresh:
                    with pytest.raises(aiohttp.ClientConnectionError):
                        await fresh.get(s.url + "/health")
                s.servers["west-d"].hold.set()
                assert (await running.text()).endswith("data: [DONE]\n\n")
            await stopping

    asyncio.run(main())


def test_decisions_are_kept_filtered_and_logged(stand: Any, long_text: str, tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"

    async def main() -> None:
        async with stand(logs={"events": str(events), "decisions": 3}) as s:
            for text in (long_text, "x", long_text, "y"):
                await s.post("/v1/completions", prompt=text)
            for query, wanted in (
                ({}, 3),
                ({"site": "east"}, 1),
                ({"site": "west", "model": "m"}, 2),
                ({"min_tokens": "100"}, 1),
                ({"limit": "1"}, 1),
                ({"reason": "threshold"}, 3),
                ({"policy": "prices"}, 0),
                ({"action": "shed"}, 0),
                ({"since": "99999999999"}, 0),
            ):
                async with s.session.get(s.url + "/decisions", params=query) as response:
                    rows = (await response.json())["decisions"]
                    assert len(rows) == wanted, query
                    assert all(row["reason"] and row["alternatives"] is not None for row in rows)
                    ages_s = [row["at_s"] for row in rows]
                    assert ages_s == sorted(ages_s, reverse=True), "the newest is first"
            for query in ({"colour": "red"}, {"limit": "many"}):
                async with s.session.get(s.url + "/decisions", params=query) as response:
                    assert response.status == 400

    asyncio.run(main())
    lines = [json.loads(line) for line in events.read_text().splitlines()]
    assert [line["event"] for line in lines].count("decision") == 4
    outcomes = [line for line in lines if line["event"] == "outcome"]
    assert [line["status"] for line in outcomes] == [200] * 4
    assert [line["site"] for line in outcomes] == ["east", "west", "east", "west"]
    assert all(line["ttft_s"] > 0 and line["prompt_tokens"] > 0 for line in outcomes)


def test_metrics_tell_what_happened(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            await s.post()
            found = await s.metrics()
            assert found['prfaas_router_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 1
            assert found['prfaas_router_server_up{role="decode",server="west-d",site="west"}'] == 1
            assert found['prfaas_router_link_up{link="east>west"}'] == 1
            assert found["prfaas_router_in_flight"] == 0

    asyncio.run(main())


def test_https_is_served_and_the_certificate_is_read_again_at_reload(stand: Any, tmp_path: Path) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    def write(serial: int) -> None:
        import datetime

        secret = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "router")])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(secret.public_key())
            .serial_number(serial)
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .sign(secret, hashes.SHA256())
        )
        (tmp_path / "cert.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        (tmp_path / "key.pem").write_bytes(
            secret.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )

    def serial(port: int) -> int:
        pem = ssl.get_server_certificate(("127.0.0.1", port))
        return x509.load_pem_x509_certificate(pem.encode()).serial_number

    async def main() -> None:
        write(11)
        tls = {"certificate": str(tmp_path / "cert.pem"), "key": str(tmp_path / "key.pem")}
        async with stand(listen={"tls": tls}) as s:
            port = int(s.url.rpartition(":")[2])
            url = f"https://127.0.0.1:{port}/v1/completions"
            async with s.session.post(url, json={"prompt": "x"}, ssl=False) as response:
                assert response.status == 200
            assert await asyncio.to_thread(serial, port) == 11
            write(12)
            await s.router.reload()
            assert await asyncio.to_thread(serial, port) == 12
            kept = (tmp_path / "key.pem").read_bytes()
            write(13)
            (tmp_path / "key.pem").write_bytes(kept)
            with pytest.raises(ConfigError, match=r"listen\.tls"):
                await s.router.reload()
            assert await asyncio.to_thread(serial, port) == 12, "a key that doesn't fit changes nothing"

    asyncio.run(main())


def test_a_port_that_is_taken_is_a_machine_error(stand: Any) -> None:
    async def main() -> None:
        async with stand() as s:
            port = int(s.url.rpartition(":")[2])
            other = Router(check({**s.settings, "listen": {"port": port}}, RouterConfig, "test.yaml"))
            with pytest.raises(MachineError, match=r"can't listen on [0-9.:]+: Address already in use$"):
                await other.start()

    asyncio.run(main())


@pytest.mark.parametrize("second_signal", [None, signal.SIGINT])
def test_the_command_serves_reloads_on_sighup_and_ends_on_sigterm(
    stand: Any, tmp_path: Path, second_signal: signal.Signals | None
) -> None:
    async def main() -> None:
        async with stand() as s:
            path = tmp_path / "router.yaml"
            path.write_text(yaml.safe_dump(s.settings))
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", K_COMMAND, "router", "--config", str(path)),
                stderr=asyncio.subprocess.PIPE,
            )
            assert process.stderr is not None

            async def line_with(word: str) -> str:
                assert process.stderr is not None
                async with asyncio.timeout(50):
                    while True:
                        line = (await process.stderr.readline()).decode()
                        assert line, "it ended"
                        if word in line:
                            return line.strip()

            try:
                address = (await line_with("listening on")).rpartition(" ")[2]
                async with s.session.post(
                    f"http://{address}/v1/completions", json={"prompt": "x"}
                ) as response:
                    assert response.status == 200
                process.send_signal(signal.SIGHUP)
                await line_with("reloaded")
                path.write_text("models: 3")
                process.send_signal(signal.SIGHUP)
                assert "models" in await line_with("reload refused")
                s.servers["west-d"].hold.clear()
                body = {"prompt": "x", "stream": True}
                async with s.session.post(f"http://{address}/v1/completions", json=body) as running:
                    assert await running.content.readany()
                    process.send_signal(signal.SIGTERM)
                    assert "1 under way" in await line_with("stopping")
                    again = second_signal is not None
                    if again:
                        process.send_signal(second_signal)
                        with pytest.raises(aiohttp.ClientError):
                            await running.read()
                    s.servers["west-d"].hold.set()
                    if not again:
                        assert (await running.text()).endswith("data: [DONE]\n\n")
                async with asyncio.timeout(50):
                    assert await process.wait() == (130 if again else 0)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()

    asyncio.run(main())


def test_a_bad_file_names_itself_its_field_and_what_is_allowed(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "router.yaml"
    with pytest.raises(UsageError, match="no such file"):
        load_router_config(path)
    path.write_text("models: [{name: m, tokenizer: t}]\nsites: [{name: west, servers: [{name: p, role: x}]}]")
    with pytest.raises(ConfigError, match=r"router.yaml: sites.0.servers.0.role: found 'x'"):
        load_router_config(path)
    path.write_text("models: [{name: m, tokenizer: t}]\nsites: [{name: west}]")
    with pytest.raises(ConfigError, match=r"tokenizer\.json"):
        Router(load_router_config(path))
    sound = {"models": [{"name": "m"}], "sites": [{"name": "west"}]}
    latin = tmp_path / "latin.jinja"
    latin.write_bytes(b"\xff{{ x }}")
    for change, word in (
        ({"logs": {"events": str(tmp_path / "nowhere" / "x")}}, "logs.events"),
        ({"listen": {"tls": {"certificate": "/nowhere", "key": "/k"}}}, r"listen.tls: found 'No such.*/k"),
        ({"listen": {"tls": {"certificate": __file__, "key": "/k"}}}, "found 'no PEM'; expected a PEM .*/k"),
        (
            {"models": [{"name": "m", "tokenizer": str(model_folder), "chat_template": str(latin)}]},
            "expected UTF-8",
        ),
        ({"sites": [{"name": "west", "servers": [K_LOCKED]}]}, "west-c.key_file"),
    ):
        with pytest.raises(ConfigError, match=word):
            Router(check(sound | change, RouterConfig, "test.yaml"))
    with pytest.raises(ConfigError, match="found fields that don't fit together; home 'mars'"):
        check(sound | {"home": "mars"}, RouterConfig, "test.yaml")
    assert load_router_config(path).models[0].tokenizer == str(tmp_path / "t")


def test_a_pumps_page_moves_the_links_estimate(stand: Any) -> None:
    async def main() -> None:
        estimate = {"rate_bps": 3e6, "low_bps": 1e6, "high_bps": 5e6, "rtt_s": 0.08, "up": False}
        app = web.Application()

        async def links(request: web.Request) -> web.Response:
            return web.json_response([{"link": "east>west", "estimate": estimate}])

        app.router.add_get("/links", links)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port = runner.addresses[0][1]
        try:
            link = {"source": "east", "target": "west", "status_url": f"http://127.0.0.1:{port}/links"}
            async with stand(links=[link]) as s:
                clock = s.router.clock
                await s.settle(lambda: not s.router.links.estimates(clock())[LinkId("east", "west")].up)
                found = s.router.links.estimates(clock())[LinkId("east", "west")]
                assert (found.rate_bps, found.rtt_s) == (3e6, 0.08)
                # A link that is down takes nothing: the long prompt stays.
                _, headers, _ = await s.post("/v1/completions", prompt="the fox " * 300)
                assert headers["x-prfaas-site"] == "west"
                s.settings["links"] = [{"source": "east", "target": "west"}]
                await s.router.reload()
                assert not [name for name in s.router._tasks if name.startswith("link ")]
        finally:
            await runner.cleanup()

    asyncio.run(main())
