"""`python -m prfaas_testbed.client --shots F --out F --start SECONDS`: run inside a site's namespaces."""

from __future__ import annotations

import argparse
import asyncio
import resource
import sys
from pathlib import Path

from prfaas_testbed.client.load import Load
from prfaas_testbed.client.messages import Answer, read_shots, to_line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="prfaas_testbed.client")
    parser.add_argument("--shots", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=float, required=True, help="the load's zero on CLOCK_MONOTONIC")
    args = parser.parse_args(argv)
    with args.out.open("w", encoding="utf-8", buffering=1) as out:

        def report(answer: Answer) -> None:
            out.write(to_line(answer))

        asyncio.run(Load(read_shots(args.shots), report).run(args.start))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    args.out.with_suffix(".cpu").write_text(f"{usage.ru_utime + usage.ru_stime:.3f}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
