"""Mellum."""

from sglang.srt.models.mellum import EntryClass as EntryClass
