"""Rules of operators that compute: entry by entry, over a dimension, by the weights of a site, by attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from lrc.maps import LinearMap, Patches
from lrc.maps.kept import keep_inputs, keep_outputs
from lrc.program.absorb import ELEMENTWISE
from lrc.program.dependency.flow import SITE_RULES, Flow, Value, rule
from lrc.program.dependency.labels import Array, Axes, Part, meet
from lrc.program.dependency.moves import unknown
from lrc.program.sites import Site, Use

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default


@rule(
    "pointwise", aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default, aten.clone.default,
    aten.contiguous.default, aten.detach.default, aten.alias.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device,
    aten._to_copy.default, aten.lift_fresh_copy.default, aten.type_as.default, aten.relu6.default, aten.selu.default,
    aten.rrelu.default, aten.masked_fill.Scalar, aten.where.self, aten.where.ScalarOther,
    aten.where.ScalarSelf, aten.where.Scalar, aten.zeros_like.default,
    aten.ones_like.default, aten.hardswish_.default, aten.hardsigmoid.default, *ELEMENTWISE,
)  # fmt: skip
def pointwise(flow: Flow, node: fx.Node) -> Value:
    """Work on every entry alone."""
    values = [flow.axes(read) for read in node.all_input_nodes if isinstance(flow.values.get(read), Axes)]
    if not values or not isinstance(node.meta.get("val"), torch.Tensor):
        return flow.plain(node)
    return meet(flow.ledger, values, flow.shape(node), f"{flow.named(node)} meets it with what cannot be cut")


@rule(
    aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default, aten.var.correction, aten.std.correction,
    aten.var.dim, aten.std.dim, aten.prod.dim_int, aten.any.dim, aten.all.dim, aten.logsumexp.default, aten.max.dim,
    aten.min.dim, aten.argmax.default, aten.argmin.default, aten.norm.ScalarOpt_dim, aten.linalg_vector_norm.default,
)  # fmt: skip
def reduce(flow: Flow, node: fx.Node) -> Value:
    """Sum, or the like, over dimensions, along which nothing may be cut alone."""
    value = flow.axes(node.args[0])
    rank = len(value.shape)
    given = flow.arguments(node, ["dim", "keepdim"])
    asked = given["dim"]
    dims = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    gone = sorted(int(dim) % rank for dim in dims)
    value = flow.ledger.collapsed(value, gone, f"{flow.named(node)} is taken over it")
    if given["keepdim"]:
        return _like(flow, node, value.parts)
    shift = {dim: dim - sum(g < dim for g in gone) for dim in range(rank) if dim not in gone}
    return _like(flow, node, tuple(Part(tuple(shift[d] for d in p.dims), p.labels, p.drawn) for p in value.parts))


def _like(flow: Flow, node: fx.Node, parts: tuple[Part, ...]) -> Value:
    given = node.meta["val"]
    if isinstance(given, torch.Tensor):
        return Axes(tuple(given.shape), parts)
    return [Axes(tuple(one.shape), parts) for one in given]


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.glu.default,
)
def over_one(flow: Flow, node: fx.Node) -> Value:
    """Work along one dimension, along which nothing may be cut alone."""
    value = flow.axes(node.args[0])
    dim = int(flow.arguments(node, ["dim"])["dim"]) % len(value.shape)
    return _like(flow, node, flow.ledger.collapsed(value, [dim], f"{flow.named(node)} is taken over it").parts)


@rule(aten.layer_norm.default, aten.rms_norm.default)
def layer_norm(flow: Flow, node: fx.Node) -> Value:
    """Normalise over the last dimensions, none of whose features may go without a change of all others."""
    value = flow.axes(node.args[0])
    given: Any = node.args[1]
    dims = range(len(value.shape) - len(given), len(value.shape))
    for other in node.all_input_nodes[1:]:
        flow.ledger.fixed(flow.axes(other), f"{flow.named(node)} scales by it")
    return Axes(flow.shape(node), flow.ledger.collapsed(value, dims, f"{flow.named(node)} normalises over it").parts)


def follow(flow: Flow, reads: Sequence[Any], channels: Array | None) -> None:
    """Let stored numbers of channels go with them, or stay where no channel can go (None)."""
    for read in reads:
        for part in flow.axes(read).parts:
            if channels is None:
                flow.ledger.fix(part.labels, "it scales channels that cannot be cut")
            else:
                flow.ledger.tie(channels, part.labels)


@rule(aten.batch_norm.default)
def batch_norm(flow: Flow, node: fx.Node) -> Value:
    """Normalise every channel alone; its stored numbers go with it."""
    value = flow.axes(node.args[0])
    value, channels = flow.ledger.along(value, 1, f"{flow.named(node)} normalises it by channels")
    follow(flow, node.args[1:5], channels)
    return Axes(flow.shape(node), value.parts)


@rule(aten.group_norm.default)
def group_norm(flow: Flow, node: fx.Node) -> Value:
    """Normalise over the channels of a group together, which go together: there are fewer groups then, of the same size."""
    value = flow.axes(node.args[0])
    given = flow.arguments(node, ["num_groups", "weight", "bias"])
    reason = f"{flow.named(node)} normalises over it"
    value = flow.ledger.collapsed(value, range(2, len(value.shape)), reason)
    value, channels = flow.ledger.along(value, 1, reason)
    if channels is not None and given["num_groups"] == 1:
        value, channels = flow.ledger.collapsed(value, [1], reason), None
    if channels is not None:
        groups = channels.reshape(given["num_groups"], -1)
        flow.ledger.tie(groups, groups[:, :1])
    follow(flow, [given["weight"], given["bias"]], channels)
    return Axes(flow.shape(node), value.parts)


@rule(aten.prelu.default)
def prelu(flow: Flow, node: fx.Node) -> Value:
    """Work on every entry alone, with one stored slope, or one for each channel."""
    value, slopes = flow.axes(node.args[0]), node.args[1]
    if flow.axes(slopes).parts:
        value, channels = flow.ledger.along(value, 1, f"{flow.named(node)} has a slope for every channel of it")
        follow(flow, [slopes], channels)
    return Axes(flow.shape(node), value.parts)


POOLS: dict[int, tuple[Any, ...]] = {
    1: (aten.max_pool1d.default, aten.avg_pool1d.default, aten.adaptive_avg_pool1d.default),
    2: (
        aten.max_pool2d.default, aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_max_pool2d.default,
        aten.max_pool2d_with_indices.default, aten.upsample_nearest2d.vec, aten.upsample_bilinear2d.vec,
        aten.upsample_nearest2d.default, aten.upsample_bilinear2d.default,
    ),
    3: (aten.max_pool3d.default, aten.avg_pool3d.default, aten.adaptive_avg_pool3d.default),
}  # fmt: skip
POOLED = {target: dims for dims, targets in POOLS.items() for target in targets}


@rule(*POOLED)
def pool(flow: Flow, node: fx.Node) -> Value:
    """Work on every channel of an image alone: over the last dimensions, whether images are in a batch or not."""
    value = flow.axes(node.args[0])
    over = range(len(value.shape) - POOLED[node.target], len(value.shape))
    return _like(flow, node, flow.ledger.collapsed(value, over, f"{flow.named(node)} is taken over it").parts)


@rule(aten.matmul.default, aten.bmm.default)
def product(flow: Flow, node: fx.Node) -> Value:
    """Multiply two computed values; what is summed over is cut in both, where both have labels of their own for it."""
    left, right = (flow.axes(read) for read in node.args)
    if min(len(left.shape), len(right.shape)) < 2:
        return unknown(flow, node)
    reason = f"{flow.named(node)} multiplies it with what cannot be cut"
    i, j = len(left.shape) - 1, len(right.shape) - 2
    (left, a), (right, b) = flow.ledger.along(left, i, reason), flow.ledger.along(right, j, reason)
    if a is not None and b is not None:
        flow.ledger.tie(a, b)
    else:
        left, right = flow.ledger.collapsed(left, [i], reason), flow.ledger.collapsed(right, [j], reason)
    shape = flow.shape(node)
    rank = len(shape)
    sides = [
        Axes((*left.shape[:-2], left.shape[-2], 1), left.without([i])),
        Axes((*right.shape[:-2], 1, right.shape[-1]), right.without([j])),
    ]
    met = meet(flow.ledger, sides, shape, reason)
    for part in met.parts:
        if part.dims == ((1,) if rank > 3 else (0,)):  # of three dimensions heads are in the first, within the batch
            flow.ledger.heads.append(part.labels)
    return met


@rule(SDPA)
def attention(flow: Flow, node: fx.Node) -> Value:
    """Attend: heads are cut together in queries, keys and values, with the queries that share a key."""
    given = flow.arguments(node, ["query", "key", "value", "attn_mask", "enable_gqa"])
    reason = f"{flow.named(node)} is taken over it"
    values = []
    for name in ("query", "key", "value"):
        axes = flow.axes(given[name])
        axes = flow.ledger.collapsed(axes, [len(axes.shape) - 2, len(axes.shape) - 1], reason)
        values.append(Axes((*axes.shape[:-2], 1, 1), axes.parts))
    heads = len(values[0].shape) - 3
    if given["enable_gqa"] and heads >= 0:
        many = values[0].shape[heads]
        values[1:] = [_repeated(flow, value, heads, many) for value in values[1:]]
    mask = flow.axes(given["attn_mask"])
    if mask.shape:
        mask = flow.ledger.collapsed(mask, range(len(mask.shape) - 2, len(mask.shape)), reason)
        values.append(Axes((*mask.shape[:-2], 1, 1), mask.parts))
    met = meet(flow.ledger, values, (*values[0].shape[:-2], 1, 1), f"{flow.named(node)} meets it with what cannot be cut")
    flow.ledger.heads += [part.labels for part in met.parts]
    return Axes(flow.shape(node), met.parts)


def _repeated(flow: Flow, value: Axes, dim: int, size: int) -> Axes:
    """Return keys or values as if every head stood there for all queries that read it."""
    part = value.part(dim)
    shape = (*value.shape[:dim], size, *value.shape[dim + 1 :])
    if part is None or len(part.dims) > 1:
        return Axes(shape, flow.ledger.collapsed(value, [dim], "queries share it").parts)
    labels = part.labels.repeat(size // len(part.labels))
    return Axes(shape, (*value.without([dim]), Part((dim,), labels)))


def rows(flow: Flow, site: Site, use: Use, made: LinearMap, size: int) -> Array:
    """Return the labels of what a site gives, fixed where its map cannot leave any out."""
    labels = flow.ledger.of(("site", site.fqn, "out"), size)
    reason = None
    if site.tied or site.joint:
        reason = "something else reads its weight too"
    elif len({other.bias for other in site.uses}) > 1:
        reason = "its uses add different biases"
    elif keep_outputs(made, torch.arange(made.out_features), _one_a_channel(site)) is None:
        reason = f"{made!r} cannot give fewer features"
    if reason:
        flow.ledger.fix(labels, reason)
    return labels


def columns(flow: Flow, site: Site, made: LinearMap, size: int, given: Array | None) -> None:
    """Tie what a site reads with the columns of its weight."""
    labels = flow.ledger.of(("site", site.fqn, "in"), size)
    if site.tied or site.joint:
        flow.ledger.fix(labels, "something else reads its weight too")
    elif keep_inputs(made, torch.arange(size)) is None:
        flow.ledger.fix(labels, f"{made!r} cannot read fewer features")
    if given is None:
        flow.ledger.fix(labels, "what it reads cannot be cut")
    else:
        flow.ledger.tie(labels, given)


def _one_a_channel(site: Site) -> int | None:
    return site.layout.groups if site.layout.groups > 1 else None


def linear(flow: Flow, node: fx.Node, site: Site, use: Use, made: LinearMap) -> Axes:
    """Sum over the last dimension by the columns of a weight, which gives its rows."""
    value = flow.axes(node.args[0])
    last = len(value.shape) - 1
    value, given = flow.ledger.along(value, last, f"{site.fqn} reads it in all heads alike")
    columns(flow, site, made, site.in_features, given)
    if len(node.all_input_nodes) > 1:
        flow.fix_inputs(node, f"{site.fqn} reads it as a context")
    out = flow.ledger.joined((last,), rows(flow, site, use, made, site.out_features))
    return Axes(flow.shape(node), (*value.without([last]), *([out] if out else [])))


def lookup(flow: Flow, node: fx.Node, site: Site, use: Use, made: LinearMap) -> Axes:
    """Read rows of a table."""
    flow.fix_inputs(node, f"{site.fqn} reads it")
    shape = flow.shape(node)
    out = flow.ledger.joined((len(shape) - 1,), rows(flow, site, use, made, site.out_features))
    return Axes(shape, (out,) if out else ())


def conv(flow: Flow, node: fx.Node, site: Site, use: Use, made: LinearMap) -> Axes:
    """Convolve: channels in are columns, channels out rows; in groups, those of the same place in every group go together."""
    layout = site.layout
    assert isinstance(layout, Patches), "a convolution has patches"
    ledger, groups = flow.ledger, layout.groups
    value = flow.axes(node.args[0])
    value = ledger.collapsed(value, range(2, len(value.shape)), f"{site.fqn} convolves over it")
    channels = int(value.shape[1])
    value, given = ledger.along(value, 1, f"{site.fqn} reads it by channels")
    out = rows(flow, site, use, made, site.out_features)
    if groups == 1:
        columns(flow, site, made, channels, given)
    elif groups == channels:
        if given is None:
            ledger.fix(out, "what it reads cannot be cut")
        else:
            ledger.tie(out.reshape(channels, -1), given[:, None])
    else:
        columns(flow, site, made, channels // groups, None if given is None else given.reshape(groups, -1)[0])
        if given is not None:
            ledger.tie(given.reshape(groups, -1), given.reshape(groups, -1)[:1])
        ledger.tie(out.reshape(groups, -1), out.reshape(groups, -1)[:1])
    part = ledger.joined((1,), out)
    return Axes(flow.shape(node), (*value.without([1]), *([part] if part else [])))


def bag(flow: Flow, node: fx.Node, site: Site, use: Use, made: LinearMap) -> Axes:
    """Sum rows of a table."""
    flow.fix_inputs(node, f"{site.fqn} reads it")
    return Axes(flow.shape(node))


SITE_RULES.update({"linear": linear, "conv": conv, "embedding": lookup, "embedding_bag": bag})
