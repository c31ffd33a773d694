"""The exception tree. Every error a user can meet carries the exit status its command ends with.

* PrfaasError                     exit status 1: ran and fell short
  * UsageError                    2: bad usage or an unknown name
    * ConfigError                 2: a file a person wrote is wrong: which file, field, value; what is allowed
  * MachineError                  3: this machine lacks something: root, a package, a port, disk, quiet cores
  * LocalProtocolError            1: our side asked the protocol core for something illegal; nothing changed
  * RemoteProtocolError           1: the peer sent something illegal; its connection ends, nothing else
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_FELL_SHORT = 1
EXIT_USAGE = 2
EXIT_MACHINE = 3
EXIT_INTERRUPTED = 130


class PrfaasError(Exception):
    """What went wrong, in one line that a person can act on."""

    exit_status = EXIT_FELL_SHORT


class UsageError(PrfaasError):
    """The command or a name given to it is unknown or contradictory."""

    exit_status = EXIT_USAGE


class ConfigError(UsageError):
    """A file is wrong. The message names the file, the field, what was found and what is allowed."""

    def __init__(self, file: str, field: str, found: object, allowed: str) -> None:
        self.file, self.field, self.found, self.allowed = file, field, found, allowed
        super().__init__(f"{file}: {field}: found {found!r}; {allowed}")


class MachineError(PrfaasError):
    """This machine lacks something. The message says what, and what to do."""

    exit_status = EXIT_MACHINE


class LocalProtocolError(PrfaasError):
    """Our own side broke a rule of the protocol; the call changed nothing."""


class RemoteProtocolError(PrfaasError):
    """The peer broke a rule of the protocol; its connection is to be closed."""
