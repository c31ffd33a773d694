"""The load: requests that leave at their time, whatever the system does with them."""

from prfaas_testbed.client.messages import Answer, Shot, Target, read_answers, read_shots, write_shots

__all__ = ["Answer", "Shot", "Target", "read_answers", "read_shots", "write_shots"]
