"""MiniCPM3."""

from sglang.srt.models.minicpm3 import EntryClass as EntryClass
