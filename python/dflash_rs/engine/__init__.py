"""The engine behind `LLM`: who runs, on which backend, and what comes of it.

    build ──> Engine ──> loop:  decide ──> plan ──> launch ──> resolve ──> commit ──> route
                                policy     core     backend    backend     core       requests

`loop.py` is a step, read aloud. `policy.py` says how much to draft, `requests.py` keeps what callers asked for, and a backend
(`backend.py`: `host.py`, `device/`) takes the step. Nothing here knows a kind of model: see `dflash_rs.models`.
"""
