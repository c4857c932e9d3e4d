"""Lets torchvision's ordinary wheel be imported beside a CPU build of torch; imported from a .pth file, so before anything else.

The wheel declares its operators in a library that needs CUDA's, and describes them to torch whether that library could be loaded or
not. Declaring the two operators that it describes is enough.
"""

import importlib.abc
import sys


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        if torch.version.cuda is None:
            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                try:
                    self.library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                except RuntimeError:  # a build for the CPU that brings its own
                    pass
            torch.library.dflash_rs_keeps = self.library
        return None


sys.meta_path.insert(0, _BeforeTorchvision())
