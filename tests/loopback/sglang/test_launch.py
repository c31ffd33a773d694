"""What ends a launch of SGLang with the backend before its model loads. Without SGLang: its plugin alone."""

from __future__ import annotations

import re
import socket
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from prfaas.config.backend import load_backend_config
from prfaas.model.errors import MachineError, UsageError
from prfaas.pump_client.launch import connect
from prfaas.sglang import compat, plugin


@pytest.mark.parametrize("mode", ["prefill", "decode"])
def test_a_pump_that_cannot_start_ends_a_launch_before_its_model_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str
) -> None:
    config = tmp_path / "east.yaml"
    config.write_text(
        "pump: {site: east, control_socket: p.sock, tls: {site_file: s.pem, authorities: [a.crt]}}"
    )
    monkeypatch.setenv("PRFAAS_CONFIG", str(config))
    monkeypatch.setattr(compat, "check_backend", lambda with_http: None)
    said = ["--disaggregation-transfer-backend", "prfaas", "--disaggregation-mode", mode]
    monkeypatch.setattr(sys, "argv", ["x", *said])
    with pytest.raises(SystemExit) as caught:
        plugin.load_plugin()
    [line] = str(caught.value).splitlines()
    assert f"prfaas: the pump didn't start: prfaas pump: {tmp_path / 's.pem'}: no such file" in line


K_LINKER = """{"linker": "PrefixLinker", "linker_module_path": "prfaas.sglang.prefixes.linker"}"""
K_LINKED = ["--enable-unified-cache-external-linker", "--unified-cache-external-linker-config", K_LINKER]
K_SECTION = "prefixes: {listen: 127.0.0.1:9400, store_bytes: 1048576}"


@pytest.mark.parametrize(
    ("mode", "section", "flags", "lacking"),
    [
        ("prefill", K_SECTION, [], "found without the flags"),
        ("prefill", "", K_LINKED, "found without the section"),
        ("decode", "", K_LINKED, "found without the section"),
        ("prefill", K_SECTION, K_LINKED, None),
        # A decode server beside reads the same file.
        ("decode", K_SECTION, [], None),
        ("prefill", "", [], None),
    ],
)
def test_keeping_prefixes_takes_a_section_of_the_file_and_flags_of_sglang(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mode: str, section: str, flags: list[str],
    lacking: str | None,
) -> None:  # fmt: skip
    config = tmp_path / "east.yaml"
    config.write_text(f"pump: {{site: east, control_socket: p.sock}}\n{section}")
    monkeypatch.setattr(compat, "check", lambda points: None)
    monkeypatch.setattr(sys, "argv", ["x", *flags])
    check = partial(plugin._check_prefixes, load_backend_config(str(config)), mode, False)
    if lacking is None:
        check()
        return
    with pytest.raises(UsageError, match=lacking) as caught:
        check()
    assert "--unified-cache-external-linker-backend dynamic" in str(caught.value)
    assert f"'{K_LINKER}'" in str(caught.value), "what is told is what works"


@pytest.mark.parametrize("listen", ["127.0.0.1:PORT", "192.0.2.1:9400"])
def test_a_port_of_prefixes_that_is_taken_or_elsewhere_s_ends_a_launch_before_its_model_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, listen: str
) -> None:
    monkeypatch.setattr(compat, "check", lambda points: None)
    monkeypatch.setattr(sys, "argv", ["x", *K_LINKED])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = listen.replace("PORT", str(taken.getsockname()[1]))
        config = tmp_path / "east.yaml"
        config.write_text(f"pump: {{site: east}}\nprefixes: {{listen: {listen}, store_bytes: 1048576}}")
        with pytest.raises(MachineError, match=re.escape(f"prefixes.listen: {listen}: ")):
            plugin._check_prefixes(load_backend_config(str(config)), "prefill", True)


def test_the_pump_that_a_launch_started_waits_for_a_model_that_loads_for_long(tmp_path: Path) -> None:
    """It ends without a client; the schedulers are clients once the model is loaded, minutes later."""
    config = tmp_path / "east.yaml"
    config.write_text("pump: {site: east, control_socket: p.sock, idle_exit_s: 0.3}")
    path = load_backend_config(str(config)).pump.control_path
    try:
        plugin._find_pump(load_backend_config(str(config)))
        time.sleep(1.0)
        waiting = connect(path)
        assert waiting is not None, "the pump ended"
        waiting.close()
    finally:
        if plugin._pump is not None:
            plugin._pump.close()
    for _ in range(1000):
        if not path.exists():
            break
        time.sleep(0.02)
    assert not path.exists(), "it waits for nobody"
