"""Holds every touch point against the SGLang that is installed, and says its version."""

import sys

from prfaas.sglang import compat

compat.check_backend()
sys.stdout.write(compat.installed_version() + "\n")
