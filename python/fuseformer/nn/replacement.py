"""Turning modules of `torch.nn` into ours and back, in place and without touching a weight."""

import torch


def replace_classes(module: torch.nn.Module, classes: dict[type, type]) -> None:
    """Give `module` and everything below it the class that `classes` has for its exact class.

    Our classes add no state to those they derive from, so that weights, buffers, hooks and every
    reference to a module stay what they were.
    """
    for child in module.modules():
        wanted = classes.get(type(child))
        if wanted is not None:
            child.__class__ = wanted
