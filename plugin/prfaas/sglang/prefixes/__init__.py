"""Prefixes that cross sites: a server keeps what it computed in host memory too, gives it to other sites'
servers and takes what they have, by our pumps.

SGLang's seam for it is its cache linker. Rooms: `store` is the memory, `pools` copies between it and the
caches, `exchange` is what servers ask each other and the router asks them, `face` answers it by HTTP,
`linker` is what SGLang calls.
"""
