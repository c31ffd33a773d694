"""In FlashInfer's place, on CPU servers. It is for NVIDIA's GPUs alone, and importing it takes each of a
server's three processes a seventh of its start; SGLang does without one that can't be imported.
"""

raise ImportError("FlashInfer is for NVIDIA's GPUs: the testbed's CPU servers do without it")
