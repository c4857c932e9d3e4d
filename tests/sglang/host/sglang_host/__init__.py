"""An out-of-tree SGLang platform that runs on plain torch on the host: no CUDA, no build of sgl-kernel.

Chosen with ``SGLANG_PLATFORM=host``. For tests: correct, not fast.
"""
