"""`prfaas keys`: a site's authority and certificates for mutual TLS between sites."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path

from prfaas.cli._places import place
from prfaas.model.errors import EXIT_FELL_SHORT, EXIT_OK, EXIT_USAGE, UsageError
from prfaas.pump import keys

K_CERTIFICATE_DAYS = 90.0
K_AUTHORITY_DAYS = 3650.0


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser("keys", help="make, rotate and show a site's certificates")
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    create = actions.add_parser("create", help="a new authority and its first certificate for a site")
    create.add_argument("--site", required=True, help="the site's name, as configurations use it")
    create.add_argument("--out", type=place, metavar="DIR", help="folder for the files (default: keys/SITE)")
    create.add_argument(
        "--days", type=float, default=K_CERTIFICATE_DAYS, help="certificate's life (%(default)g)"
    )
    create.add_argument(
        "--authority-days", type=float, default=K_AUTHORITY_DAYS, help="authority's life (%(default)g)"
    )
    create.set_defaults(run=run_create)
    rotate = actions.add_parser("rotate", help="a new key and certificate under the same authority")
    rotate.add_argument("--out", type=place, required=True, metavar="DIR", help="the site's folder")
    rotate.add_argument(
        "--authority", type=Path, metavar="DIR", help="where authority.key is (default: --out)"
    )
    rotate.add_argument(
        "--days", type=float, default=K_CERTIFICATE_DAYS, help="certificate's life (%(default)g)"
    )
    rotate.set_defaults(run=run_rotate)
    trust = actions.add_parser("trust", help="let the sites of these authorities connect")
    trust.add_argument("--out", type=place, required=True, metavar="DIR", help="this site's folder")
    trust.add_argument("authorities", type=Path, nargs="+", metavar="AUTHORITY.crt", help="from the peers")
    trust.set_defaults(run=run_trust)
    show = actions.add_parser("show", help="site, kind and days left of certificate files")
    show.add_argument("files", type=Path, nargs="+", metavar="FILE")
    show.set_defaults(run=run_show)


def run_create(args: argparse.Namespace) -> int:
    folder = args.out or Path("keys") / args.site
    keys.create_site(folder, args.site, days=args.days, authority_days=args.authority_days, now=_now())
    sys.stdout.write(
        f"site {args.site}\n"
        f"  {folder / keys.K_SITE_FILE}: this site's key and certificate ({args.days:g} days); stays here\n"
        f"  {folder / keys.K_AUTHORITY_CERTIFICATE}: give it to every peer, for `prfaas keys trust`\n"
        f"  {folder / keys.K_AUTHORITY_KEY}: signs new certificates; keep it offline\n"
    )
    return EXIT_OK


def run_rotate(args: argparse.Namespace) -> int:
    keys.rotate_site(args.out, days=args.days, now=_now(), authority_folder=args.authority)
    identity = keys.read_identity(args.out / keys.K_SITE_FILE)
    sys.stdout.write(
        f"site {identity.site}: {args.out / keys.K_SITE_FILE} is new, in force until "
        f"{identity.not_after:%Y-%m-%d %H:%M} UTC; peers need no change\n"
    )
    return EXIT_OK


def run_trust(args: argparse.Namespace) -> int:
    for authority in args.authorities:
        identity = keys.trust(args.out, authority)
        sys.stdout.write(f"{args.out / keys.K_TRUSTED}: site {identity.site} may connect\n")
    return EXIT_OK


def run_show(args: argparse.Namespace) -> int:
    """Every file is told of. Exit 2 when one holds no certificate, else 1 when one has run out."""
    status, now = EXIT_OK, _now()
    for file in args.files:
        try:
            identities = keys.read_identities(file)
        except UsageError as error:
            sys.stderr.write(f"prfaas keys show: {error}\n")
            status = EXIT_USAGE
            continue
        for identity in identities:
            days = identity.days_left(now)
            life = f"{days:.1f} days left" if days > 0 else f"expired {-days:.1f} days ago"
            sys.stdout.write(
                f"{file}: site {identity.site}, {identity.kind}, until {identity.not_after:%Y-%m-%d %H:%M} "
                f"UTC ({life}), sha256 {identity.fingerprint_sha256}\n"
            )
            status = max(status, EXIT_OK if days > 0 else EXIT_FELL_SHORT)
    return status


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
