"""The model classes of the testbed's tiny models, SGLang's own. Named to it as its external model package
(SGLANG_EXTERNAL_MODEL_PACKAGE), so that a server of one of them doesn't import the two hundred others first.
"""
