"""Whether a weight chooses which experts read a row."""

import torch
from torch import Tensor, fx

from lrc.program.sites import Site

aten = torch.ops.aten
CHOICES = {aten.topk.default, aten.argmax.default, aten.sort.default, aten.argsort.default}


def routes(site: Site) -> bool:
    """Say whether the outputs of a bare parameter, one by one, are what a `topk` or `argmax` chooses among."""
    if site.has_module or site.kind != "linear":
        return False
    waiting = [site.program.nodes[use.node] for use in site.uses]
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop()
        for user in node.users:
            if user.target in CHOICES:
                return True
            value = user.meta.get("val")
            if user not in seen and isinstance(value, Tensor) and value.ndim and value.shape[-1] == site.out_features:
                seen.add(user)
                waiting.append(user)
    return False
