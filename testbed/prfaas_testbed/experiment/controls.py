"""Controls: the comparisons of a run once more, with a fault planted. They must notice it."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

from prfaas.config.experiment import Control
from prfaas.config.run import Row
from prfaas.model.errors import PrfaasError
from prfaas_testbed.client import Answer
from prfaas_testbed.experiment.fleet import Fleet
from prfaas_testbed.experiment.load import Planned, direct_shots, one_server_shots
from prfaas_testbed.experiment.transfers import Moved, read_moved

if TYPE_CHECKING:
    from prfaas_testbed.experiment.runner import Runner
    from prfaas_testbed.network import Network

K_CONTROL_TOKENS = 600
K_CONTROL_OUTPUT_TOKENS = 16


def try_control(runner: Runner, net: Network, fleet: Fleet, control: Control) -> None:
    """The same comparisons with a fault planted: they must notice."""
    runner.tell(f"{fleet.model.name}: control {control.name}: prefill starts again with a planted fault")
    fleet.restart_prefill(control.fault)
    rng = Random(f"{runner.experiment.seed}/{control.name}")
    low, high = (4, 1000) if runner.real else (0, 32000)
    requests = [
        Planned(
            f"{control.name}{i}",
            0.3 * i,
            [rng.randrange(low, high) for _ in range(K_CONTROL_TOKENS)],
            K_CONTROL_OUTPUT_TOKENS,
        )
        for i in range(control.requests)
    ]
    shots, where = direct_shots(requests, fleet, runner.real, rng, runner.experiment.request_timeout_s)
    plain: dict[str, Answer] = {}
    if fleet.plain is not None:
        limit_s = runner.experiment.request_timeout_s
        to_plain = one_server_shots(requests, fleet.plain.url, runner.real, limit_s)
        found, _, _ = runner.send(net, fleet, to_plain, f"{control.name}-plain", quiet=True)
        failed = [answer.error for answer in found if answer.error]
        if failed:
            raise PrfaasError(f"the plain server didn't answer a control's prompt: {failed[0]}")
        plain = {answer.id: answer for answer in found}
    answers, _, _ = runner.send(net, fleet, shots, control.name, quiet=True)
    moved = read_moved(fleet.digests)
    for answer in answers:
        room = where[answer.id][0]
        seen = moved.get(room, Moved())
        right = plain[answer.id].output_ids if answer.id in plain else []
        tokens_caught = answer.error is None and bool(right) and answer.output_ids != right
        digest_caught = None not in (seen.source_digest, seen.landed_digest) and (
            seen.source_digest != seen.landed_digest
        )
        row = {
            "model": fleet.model.name, "control": control.name, "fault": control.fault, "id": answer.id,
            "prompt_tokens": K_CONTROL_TOKENS, "output_ids": answer.output_ids, "plain_output_ids": right,
            "source_digest": seen.source_digest, "landed_digest": seen.landed_digest,
            "error": answer.error, "tokens_caught": tokens_caught, "digest_caught": digest_caught,
        }  # fmt: skip
        runner.results.controls.append(Row.model_validate(row))
        verdict = "caught" if tokens_caught and digest_caught else "NOT CAUGHT"
        why = f"tokens {tokens_caught}, digest {digest_caught}, error {answer.error}"
        runner.tell(f"  {answer.id}: {verdict} ({why})")
