"""Kimi-Linear."""

from sglang.srt.models.kimi_linear import EntryClass as EntryClass
