"""Floating-point operations of a model: what a token needs, dense or routed. Only matrix products count."""

from __future__ import annotations

from collections.abc import Sequence

from model import ModelConfig
from nanoqwen.routing import ResidualPrior, RoutingConfig, routed_layers


def dense_flops_per_token(
    cfg: ModelConfig,
    seq_len: int,
    *,
    causal: bool = True,
    training: bool = True,
    used: Sequence[float] | None = None,
) -> float:
    """Floating-point operations for one token of a row of `seq_len`: matrix products only, two a multiply-add.

    causal    count the half of the attention scores that causality needs; False counts all seq_len x seq_len
    training  forward and backward (three times the forward)
    used      fraction of the tokens that each layer computes, and that they attend to; None: all
    """
    q_size, kv_size = cfg.num_attention_heads * cfg.head_size, cfg.num_key_value_heads * cfg.head_size
    projections = cfg.hidden_size * (2 * q_size + 2 * kv_size)
    mlp = (3 if cfg.mlp == "swiglu" else 2) * cfg.hidden_size * cfg.intermediate_size
    layers = 0.0
    for fraction in [1.0] * cfg.num_hidden_layers if used is None else used:
        keys = fraction * seq_len
        scores = 2 * q_size * ((keys + 1) / 2 if causal else keys)  # q k and p v
        layers += fraction * (projections + mlp + scores)
    forward = 2 * (layers + cfg.hidden_size * cfg.vocab_size)
    return forward * (3 if training else 1)


def flops_per_token(
    cfg: ModelConfig, routing: RoutingConfig | None, seq_len: int, *, causal: bool = True, training: bool = True
) -> float:
    """As dense_flops_per_token, with routed layers at their capacity; priors and teachers count, scores do not."""
    layers = routed_layers(cfg, routing) if routing else ()
    if not layers:
        return dense_flops_per_token(cfg, seq_len, causal=causal, training=training)
    fractions = [routing.share if layer in layers else 1.0 for layer in range(cfg.num_hidden_layers)]
    flops = dense_flops_per_token(cfg, seq_len, causal=causal, training=training, used=fractions)
    inner = ResidualPrior.width(cfg, routing.prior_factor)
    prior = 6 * cfg.hidden_size * inner * len(layers) * (3 if training else 1)
    if routing.kind == "dtf":
        return flops + prior
    if routing.kind == "tdtf" and training:  # the teacher: a forward of each routed layer over all tokens
        all_layers = dense_flops_per_token(cfg, seq_len, causal=causal, training=False)
        fractions = [0.0 if layer in layers else 1.0 for layer in range(cfg.num_hidden_layers)]
        dense_layers = dense_flops_per_token(cfg, seq_len, causal=causal, training=False, used=fractions)
        return flops + prior + (all_layers - dense_layers) * (3 if routing.through_surprise else 1)
    return flops
