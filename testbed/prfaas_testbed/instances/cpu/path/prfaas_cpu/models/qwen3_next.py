"""Qwen3-Next."""

from sglang.srt.models.qwen3_next import EntryClass as EntryClass
