"""A hybrid of a target: three of four of its attentions become gated delta rules (Qwen3.5's).

Embeddings, norms, MLPs and every fourth attention keep the target's weights. The delta rules start
from the projections of the attentions that they replace (queries, keys, values and output) and are
all that is trained: first to give what these attentions give for the same input, then to predict
the target's tokens.

Shape letters: B rows, T tokens of a row, H heads, D size of a head, N chunks, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models import llama, qwen3_5, qwen3_next
from mlx_lm.models.base import create_attention_mask

from redrafter_mlx.machine import device

EVERY = 4
"""One layer in so many keeps its attention."""
CHUNK = 32
"""C, while training."""
SMALL = 1e-6
"""Factor of queries and keys with which a norm leaves them almost unchanged, see `_attention`."""
STEPS = 1e-3, 1e-1
"""Range of the decay's initial step, as in the layer's publication (arXiv 2412.06464)."""


def hybrid_config(args: llama.ModelArgs, layers: int) -> dict[str, Any]:
    """The configuration of a hybrid of `layers` layers."""
    heads = args.num_attention_heads
    size = args.head_dim or args.hidden_size // heads
    return {
        "model_type": "qwen3_5",
        "hidden_size": args.hidden_size,
        "num_hidden_layers": layers,
        "intermediate_size": args.intermediate_size,
        "num_attention_heads": heads,
        "num_key_value_heads": args.num_key_value_heads,
        "head_dim": size,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": size,
        "linear_value_head_dim": size,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": EVERY,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.rms_norm_eps,
        "max_position_embeddings": args.max_position_embeddings,
        "rope_parameters": {
            "type": "default",
            "rope_theta": args.rope_theta,
            "partial_rotary_factor": 1.0,
        },
        "tie_word_embeddings": args.tie_word_embeddings,
    }


def make_hybrid(model: nn.Module, chosen: list[int]) -> nn.Module:
    """A hybrid of the chosen layers of a Llama; only its gated delta rules are to be trained.

    Raises ValueError for any other model.
    """
    args = getattr(model, "args", None)
    if not isinstance(model, llama.Model) or args.rope_scaling or args.attention_bias:
        raise ValueError("a hybrid can only be made of a plain Llama")
    hybrid = qwen3_5.Model(qwen3_5.ModelArgs.from_dict(hybrid_config(args, len(chosen))))
    hybrid.model.embed_tokens.update(model.model.embed_tokens.parameters())
    hybrid.model.norm.update(model.model.norm.parameters())
    if "lm_head" in model:
        hybrid.language_model.lm_head.update(model.lm_head.parameters())
    for own, i in zip(hybrid.layers, chosen, strict=True):
        theirs = model.model.layers[i]
        for part in ("mlp", "input_layernorm", "post_attention_layernorm"):
            own[part].update(theirs[part].parameters())
        if own.is_linear:
            _delta_rule(own.linear_attn, theirs.self_attn)
        else:
            _attention(own.self_attn, theirs.self_attn, args)
    hybrid.freeze()
    for layer in hybrid.layers:
        if layer.is_linear:
            layer.linear_attn.unfreeze()
    mx.eval(hybrid.parameters())
    return hybrid


def _attention(own: nn.Module, theirs: nn.Module, args: llama.ModelArgs) -> None:
    """The same attention, though `own` has gates and norms of queries and keys: they do nothing.

    A norm divides by sqrt(mean square + eps). So for numbers whose squares are far below eps it is
    almost linear, and its weight can undo the factor that made them small. A gate of zeros is 1/2.
    """
    size = own.head_dim
    halves = [*range(0, size, 2), *range(1, size, 2)] if args.rope_traditional else [*range(size)]
    heads = lambda layer: layer.weight.reshape(-1, size, args.hidden_size)[:, mx.array(halves)]
    flat = lambda x: x.reshape(-1, args.hidden_size)
    queries = SMALL * heads(theirs.q_proj)
    own.q_proj.weight = flat(mx.concatenate([queries, mx.zeros_like(queries)], axis=1))
    own.k_proj.weight = flat(SMALL * heads(theirs.k_proj))
    own.v_proj.weight = theirs.v_proj.weight
    own.o_proj.weight = 2 * theirs.o_proj.weight
    own.q_norm.weight = own.k_norm.weight = mx.full((size,), args.rms_norm_eps**0.5 / SMALL)


def _delta_rule(own: nn.Module, theirs: nn.Module) -> None:
    """Start with the attention's projections, a convolution that does nothing, and slow decays."""
    size, draw = own.head_k_dim, np.random.default_rng(0)
    group = theirs.n_heads // theirs.n_kv_heads
    spread = lambda w: mx.repeat(w.reshape(-1, size, w.shape[-1]), group, axis=0)
    shared = [spread(p.weight).reshape(-1, own.hidden_size) for p in (theirs.k_proj, theirs.v_proj)]
    own.in_proj_qkv.weight = mx.concatenate([theirs.q_proj.weight, *shared])
    own.out_proj.weight = theirs.o_proj.weight
    taps = np.zeros(own.conv1d.weight.shape, np.float32)
    taps[:, -1] = 1
    own.conv1d.weight = mx.array(taps)
    step = np.exp(draw.uniform(*np.log(STEPS), own.num_v_heads))
    own.dt_bias = mx.array(np.log(np.expm1(step)).astype(np.float32))
    own.A_log = mx.array(np.log(draw.uniform(1, 16, own.num_v_heads)).astype(np.float32))


@mx.custom_function
def inverse(lower: mx.array) -> mx.array:
    """(I + lower)^-1 of strictly lower triangles (..., C, C), by blocks that double in each step.

    The inverse of [[A, 0], [B, D]] is [[A^-1, 0], [-D^-1 B A^-1, D^-1]].
    """
    rows = np.arange(lower.shape[-1])
    found, block = mx.eye(len(rows)), 1
    while block < len(rows):
        of = rows // block
        beside = mx.array((of[:, None] % 2 == 1) & (of[None] == of[:, None] - 1))
        found = found - found @ mx.where(beside, lower, 0.0) @ found
        block *= 2
    return found


@inverse.vjp
def _inverse_vjp(lower: mx.array, cotangent: mx.array, found: mx.array) -> mx.array:
    turned = found.swapaxes(-1, -2)
    return -(turned @ cotangent @ turned)


def gated_delta_update(q, k, v, a, b, A_log, dt_bias, state=None, mask=None, **_):
    """mlx-lm's function of this name for whole texts, in chunks (arXiv 2406.06484).

    Token by token it takes seven times as long, and its gradient fourteen times.

    q, k, v (B, T, H, D), a, b (B, T, H), no state or mask. Returns y (B, T, H, D) and None for the
    last state.
    """
    if state is not None or mask is not None:
        raise ValueError("only whole texts are supported: no state and no mask")
    rows, length, heads, _ = q.shape
    size = min(CHUNK, length)
    pad = [(0, 0), (0, -length % size), (0, 0), (0, 0)]
    cut = lambda x: mx.pad(x, pad).reshape(rows, -1, size, heads, x.shape[-1]).swapaxes(2, 3)
    q, k, v = cut(q), cut(k), cut(v)  # (B, N, H, C, D)
    beta = cut(mx.sigmoid(b)[..., None])
    log_decay = -mx.exp(A_log) * nn.softplus(a + dt_bias)
    total = mx.cumsum(cut(log_decay[..., None]), axis=-2)
    past = mx.tri(size, k=-1)
    decay = mx.exp(mx.minimum(total - total.swapaxes(-1, -2), 0.0))
    solved = inverse((k @ k.swapaxes(-1, -2)) * decay * beta * past)
    wanted, seen = solved @ (beta * v), solved @ (beta * mx.exp(total) * k)
    likeness = (q @ k.swapaxes(-1, -2)) * decay * mx.tri(size)
    asked = mx.exp(total) * q
    last = total[..., -1:, :]
    kept, held = (mx.exp(last - total) * k).swapaxes(-1, -2), mx.exp(last)
    state, found = mx.zeros((rows, heads, k.shape[-1], v.shape[-1])), []
    for n in range(q.shape[1]):
        added = wanted[:, n] - seen[:, n] @ state
        found.append(asked[:, n] @ state + likeness[:, n] @ added)
        state = held[:, n] * state + kept[:, n] @ added
    y = mx.stack(found, axis=1).swapaxes(2, 3)
    return y.reshape(rows, -1, heads, v.shape[-1])[:, :length], None


@mx.custom_function
def sigmoid(x: mx.array) -> mx.array:
    """The same as mx.sigmoid, with the faster exponentials of `device.fused` on a CPU."""
    power = device.exp(-mx.abs(x))
    return mx.where(x > 0, 1.0, power) / (1.0 + power)


@sigmoid.vjp
def _sigmoid_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * y * (1.0 - y)


@contextmanager
def quick() -> Iterator[None]:
    """In the block, mlx-lm's llama and qwen3_5 models use the functions above: whole texts only."""
    silu = lambda x: x * sigmoid(x)
    swiglu = lambda gate, x: silu(gate) * x
    instead = (
        (qwen3_5, "gated_delta_update", gated_delta_update),
        (qwen3_next, "precise_swiglu", lambda h, gate, x: swiglu(gate, x)),
        (qwen3_next, "swiglu", swiglu),
        (llama, "swiglu", swiglu),
        (nn, "silu", silu),
    )
    with ExitStack() as stack:
        for module, name, function in instead:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def lessons(
    teacher: nn.Module, chosen: list[int], tokens: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    """Inputs and outputs of the L attentions that are replaced, (B, L, T, E) each.

    tokens  (B, T), 0 where there are none

    And (B, T) bool: where tokens are.
    """
    inputs, outputs = [], []
    x = teacher.model.embed_tokens(tokens)
    mask = create_attention_mask(x, None)
    for i, layer in enumerate(teacher.model.layers[: max(chosen) + 1]):
        normed = layer.input_layernorm(x)
        given = layer.self_attn(normed, mask)
        if i in chosen and (chosen.index(i) + 1) % EVERY:
            inputs.append(normed)
            outputs.append(given)
        x = x + given
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return mx.stack(inputs, axis=1), mx.stack(outputs, axis=1), tokens > 0


def imitation(
    student: nn.Module, inputs: mx.array, outputs: mx.array, is_there: mx.array
) -> mx.array:
    """How far the delta rules' outputs are from those of the attentions, given `lessons`.

    Mean over layers of the squared error, relative to the attention's mean square.
    """
    is_there, errors = is_there[..., None], []
    rules = [layer.linear_attn for layer in student.layers if layer.is_linear]
    for i, rule in enumerate(rules):
        wanted = mx.where(is_there, outputs[:, i], 0.0)
        off = mx.where(is_there, rule(inputs[:, i]), 0.0) - wanted
        errors.append((off**2).mean() / (wanted**2).mean())
    return mx.stack(errors).mean()
