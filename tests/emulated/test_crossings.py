"""What counts as crossing from the host to the device, or back, where all memory is the CPU's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from no_values import Crossings, NoValues


def test_a_copy_inside_a_capture_is_refused():
    made = np.ones(3, dtype=np.float32)
    with pytest.raises(AssertionError, match="add_ cannot be captured"), NoValues():
        torch.zeros(3).add_(torch.from_numpy(made).to("cpu"))
    with pytest.raises(AssertionError, match="cpu cannot be captured"), NoValues():
        torch.zeros(3).cpu()
    with NoValues():
        torch.zeros(3).add_(torch.ones(3)).to(torch.float64)
    assert torch.zeros(3).add_(torch.from_numpy(made)).tolist() == [1, 1, 1], "outside nothing is refused"


def test_what_crosses_is_written_down_in_order():
    with Crossings() as seen:
        there, here = torch.zeros(2), torch.from_numpy(np.ones(4, dtype=np.float32))
        there.copy_(here[:2], non_blocking=True)
        here[2:].copy_(there)
        assert there.tolist() == here.tolist()[:2]
        there[0].item()
    assert seen.log == ["copy_", "copy_", "tolist", "item", "_local_scalar_dense"]
