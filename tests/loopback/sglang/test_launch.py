"""What ends a launch of SGLang with the backend before its model loads. Without SGLang: its plugin alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

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
