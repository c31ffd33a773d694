"""What our two sides add to the messages of SGLang's control channel: frames after its own."""

K_GRANT_TAG = b"PRFAAS1"
K_NO_GRANT = b"none: "
"""In a grant's place: why there is none."""
K_METADATA_FRAMES = 10
"""Frames of SGLang's own message about a room's pages; ours follow: tag, grant, places, bytes."""
K_REGISTRATION_FRAMES = 20
"""Frames of SGLang's own registration; ours follow: tag, layout."""
