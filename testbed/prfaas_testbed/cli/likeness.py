"""`prfaas-testbed likeness [MODEL]`: a profiled instance, and the simulator's, against the real server that
the profile was measured from.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prfaas.cli._places import place
from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas.config.run import stamp
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, UsageError
from prfaas_testbed.cli._waiting import add_wait
from prfaas_testbed.experiment.likeness import K_ROUNDS
from prfaas_testbed.experiment.machine import K_CHECKOUT, K_RESULTS, commit, machine, versions
from prfaas_testbed.experiment.pairs import K_EXPERIMENT, at_its_pace, compared, pair_set, tell_compared
from prfaas_testbed.experiment.place import own
from prfaas_testbed.experiment.profiling import measure, undisturbed
from prfaas_testbed.experiment.served import against_simulator, rounds_of_record
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.instances.models import K_MODELS

K_WITHIN = 0.10
K_FILE = "likeness.json"
K_THERE = "profile-there.yaml"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "likeness", help="hold a profiled instance and the simulator's against the real server they stand for"
    )
    parser.add_argument("model", nargs="?", default="dense", help=f"one of {', '.join(K_MODELS)}")
    parser.add_argument("--out", type=place, metavar="DIR", help="results go to DIR/likeness/STAMP")
    parser.add_argument(
        "--rounds", type=int, default=K_ROUNDS, metavar="N", help=f"on one machine (default {K_ROUNDS})"
    )
    parser.add_argument(
        "--turns", type=int, default=1, metavar="N", help="between two emulated sites (default 1; 0: none)"
    )
    parser.add_argument(
        "--again", type=Path, metavar="DIR",
        help="measure nothing: the simulator anew against what the real server did in this earlier run",
    )  # fmt: skip
    add_wait(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.model not in K_MODELS:
        raise UsageError(f"no model {args.model!r}; known: {', '.join(K_MODELS)}")
    if args.rounds < 1 or args.turns < 0:
        raise UsageError("--rounds is at least 1, --turns 0 or more")
    if args.again is not None:
        return again(args.again)
    if args.turns:
        # Not at the top: it needs mininet. Else minutes of measuring would end in what it says now.
        from prfaas_testbed.network.opening import check_machine

        check_machine()
    folder = ((args.out or K_RESULTS) / K_EXPERIMENT / stamp()).resolve()
    with own(folder) as place:
        record: dict[str, Any] = {
            "model": args.model, "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "commit": commit(), "versions": versions(K_CHECKOUT / ".venv-sglang"), "machine": machine(),
        }  # fmt: skip
        found = measure(K_MODELS[args.model], f"cpu-{args.model}", folder / "server.log", tell, args.rounds)
        check(found.profile, ProfileConfig, "the measured profile")
        assert found.likeness is not None
        profile = write_json(folder / "profile.yaml", found.profile)
        record |= {"profile": found.profile, "looks": [asdict(look) for look in found.looks]}
        record["alone"] = {
            "ratios": found.likeness.ratios(),
            "ratios_as_measured": found.likeness.ratios(at_its_speed=False),
            "slowness": found.likeness.slowness,
            "requests": found.likeness.rows(),
        }
        ratios = {f"profiled, {name}": ratio for name, ratio in record["alone"]["ratios"].items()}
        record["simulated"] = against_simulator(profile, args.model, found.served)
        ratios |= simulated_ratios(record["simulated"])
        write_json(folder / K_FILE, record)
        if args.turns:
            # Not before: it needs mininet.
            from prfaas_testbed.experiment.sets import SetRun, real_conduct

            there = write_json(folder / K_THERE, found.profile)
            choice, parts = pair_set(args.model, there, args.turns)
            whole = SetRun(choice, parts, folder, tell, (), place.keep)
            paces: list[float] = []
            each = real_conduct(place, tell, args.wait_s)
            with undisturbed(tell):
                run = whole.go(at_its_pace(each, folder, found.profile, there, paces))
            record["between_sites"], record["slowness_there"] = compared(run), paces
            tell(f"there the real prefill server took {paces} of its time alone, profiled instances with it")
            tell_compared(record["between_sites"], tell)
            ratios |= {
                f"profiled, between sites, {name}": row["ratio"]
                for name, row in record["between_sites"].items()
            }
            write_json(folder / K_FILE, record)
    tell(f"results: {folder}")
    return judged(ratios)


def again(folder: Path) -> int:
    """Raises UsageError where there is no such run."""
    try:
        record = json.loads((folder / K_FILE).read_text(encoding="utf-8"))
        rounds = rounds_of_record(record["simulated"]["rounds"])
        profile = write_json(folder / "profile.yaml", record["profile"])
        model = record["model"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(f"--again {folder}: no record of a run with its rounds there ({error})") from None
    record["simulated"] = against_simulator(profile, model, rounds)
    write_json(folder / K_FILE, record)
    return judged(simulated_ratios(record["simulated"]))


def simulated_ratios(found: Mapping[str, Any]) -> dict[str, float]:
    """By the looks' speed, and by each round's own: what that is fitted to isn't told again."""
    told = {"simulated": found["ratios"], "simulated, own speed": found["own_speed"]["ratios"]}
    return {
        f"{side}, {kind}, {name}": ratio
        for side, kinds in told.items()
        for kind, each in kinds.items()
        for name, ratio in each.items()
        if side == "simulated" or not name.startswith("e2e")
    }


def judged(ratios: Mapping[str, float]) -> int:
    """All of them told; the exit status."""
    outside = {name for name, ratio in ratios.items() if abs(ratio - 1) > K_WITHIN}
    for name, ratio in ratios.items():
        word = "outside" if name in outside else "within"
        sys.stdout.write(f"{name:42} over real {ratio:.3f}  {word} {K_WITHIN:.0%}\n")
    return EXIT_FELL_SHORT if outside else EXIT_OK


def tell(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
