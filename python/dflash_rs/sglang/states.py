"""Targets that keep a state beside their KV: what it has to be like.

SGLang verifies a block without moving the states of its recurrent layers. It writes down what they would be after every token of the
block, and once the tokens are accepted copies the state after the last one, the convolutions' last inputs with it. A state is therefore
rounded to the type it is kept in once a block, where SGLang without speculation rounds it after every token; and within a block nothing
is rounded. The texts are the same if there is nothing to round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dflash_rs.errors import InvalidArgument


def check(inputs: Sequence[torch.dtype], states: Sequence[torch.dtype], model: torch.dtype) -> None:
    """Raises InvalidArgument unless states are kept without rounding.

    `inputs`: what the last inputs of convolutions are kept in. `states`: what recurrent states are kept in, which are computed in
    float32. `model`: what the target computes in.
    """
    for kept in inputs:
        if torch.promote_types(kept, model) != kept:
            raise InvalidArgument(
                f"SGLANG_MAMBA_CONV_DTYPE: got {_name(kept)}, expected {_name(model)}, which the target computes in: SGLang rounds the last "
                f"inputs of its convolutions after every plain step and not within a block, so the texts may differ. Set "
                f"SGLANG_MAMBA_CONV_DTYPE={_name(model)} in the server's environment"
            )
    for kept in states:
        if kept != torch.float32:
            raise InvalidArgument(
                f"--mamba-ssm-dtype: got {_name(kept)}, expected float32, which recurrent states are computed in: SGLang rounds them after "
                "every plain step and not within a block, so the texts may differ. Give --mamba-ssm-dtype float32"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
