"""dflash_rs inside SGLang: the speculative algorithm ``DFLASH_RS``.

SGLang finds ``plugin.register`` through the entry point group ``sglang.srt.plugins``; nothing else imports this package.

    plugin --> algorithm --> worker --> sampling    the target's own token at every place of the block
                                    \\-> planning    KV room for the next step
                                    \\-> metrics     what was drafted and accepted

``compat`` holds what depends on SGLang's version, one file for each, ``config`` the options of ``DFLASH_RS_CONFIG``, ``requests`` what a request may
ask for, ``grammar`` where one ends it. Importing this package imports neither SGLang nor torch.
"""

ALGORITHM = "DFLASH_RS"
