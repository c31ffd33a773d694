"""Programs of ours that native code ended (SIGSEGV, an abort), by the word that their faulthandler left.

A pump that crashed is started again by the servers that miss it, and where servers are killed on purpose
nobody asks after the dead: without this a crash would only look like one more pause.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prfaas.model.errors import PrfaasError

if TYPE_CHECKING:
    from prfaas_testbed.experiment.fleet import Fleet

K_WORD = "Fatal Python error: "


def crash_in(text: str) -> str | None:
    """What ended the program whose log this is, and the innermost place that it names. Pure."""
    _, found, after = text.partition(K_WORD)
    if not found:
        return None
    what, *lines = after.splitlines()
    place = next((line.strip() for line in lines if line.startswith("  File ")), "nowhere that it names")
    return f"{what}, {place}"


def require_none(fleet: Fleet) -> None:
    """Raises PrfaasError with the first crash in the logs of the fleet's programs, and of the pumps that its
    servers started."""
    for path in sorted(fleet.folder.glob("*.log")):
        if (crash := crash_in(path.read_text(errors="replace"))) is not None:
            raise PrfaasError(f"{path.stem} crashed: {crash}; log: {path}")
    for name in fleet.pumps:
        log = f"{fleet.control_socket(name)}.log"  # in a /run that goes with the site
        said = fleet.net.sites[name].run(["cat", log])
        if said.returncode == 0 and (crash := crash_in(said.stdout)) is not None:
            raise PrfaasError(f"a pump that a server of {name} started crashed: {crash}")
