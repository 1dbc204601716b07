"""Routed decoders in float64, one row at a time, with a loop for everything: what routing.py is compared with.

Written from the formulas. A row is a list of ids without padding; `documents` gives each token's document.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Reference:
    def __init__(self, model, kind: str, layers: tuple[int, ...], *, capacity=0.5, gate="soft", window=100):
        self.cfg, self.kind, self.layers, self.capacity = model.cfg, kind, layers, capacity
        self.gate, self.window = gate, window
        self.w = {name: tensor.double() for name, tensor in model.state_dict().items()}

    # --- the decoder -----------------------------------------------------------------------------------------------

    def norm(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        x = x / math.sqrt(float((x * x).mean()) + self.cfg.rms_norm_eps)
        return x if weight is None else x * weight

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.w[f"{name}.weight"] @ x
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def turned(self, head: Tensor, position: int) -> Tensor:
        half = len(head) // 2
        out = head.clone()
        for i in range(half):
            angle = position * self.cfg.rope_theta ** (-2 * i / len(head))
            c, s = math.cos(angle), math.sin(angle)
            out[i] = head[i] * c - head[i + half] * s
            out[i + half] = head[i + half] * c + head[i] * s
        return out

    def qkv(self, layer: int, x: Tensor, position: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        name, size = f"model.layers.{layer}", self.cfg.head_size
        z = self.norm(x, self.w[f"{name}.input_layernorm.weight"])
        q, k, v = (list(self.linear(f"{name}.self_attn.{p}_proj", z).split(size)) for p in "qkv")
        return [self.turned(h, position) for h in q], [self.turned(h, position) for h in k], v

    def block(self, layer: int, x: Tensor, q: list[Tensor], seen: list[tuple[list[Tensor], list[Tensor]]]) -> Tensor:
        """The output of one token that sees these keys and values, its own among them."""
        name, heads = f"model.layers.{layer}", []
        for h, query in enumerate(q):
            group = h * self.cfg.num_key_value_heads // self.cfg.num_attention_heads
            scores = torch.stack([query @ k[group] for k, _ in seen]) / math.sqrt(len(query))
            weights = scores.softmax(0)
            heads.append(sum(p * v[group] for p, (_, v) in zip(weights, seen, strict=True)))
        x = x + self.linear(f"{name}.self_attn.o_proj", torch.cat(heads))
        z = self.norm(x, self.w[f"{name}.post_attention_layernorm.weight"])
        gate, up = self.linear(f"{name}.mlp.gate_proj", z), self.linear(f"{name}.mlp.up_proj", z)
        return x + self.linear(f"{name}.mlp.down_proj", gate * gate.sigmoid() * up)

    def among(self, layer: int, xs: dict[int, Tensor], position: list[int], document: list[int]) -> dict[int, Tensor]:
        """A block on some tokens of a row, each of which sees the earlier ones of them in its document."""
        made = {t: self.qkv(layer, x, position[t]) for t, x in xs.items()}
        out = {}
        for t, x in xs.items():
            seen = [made[s][1:] for s in made if s <= t and document[s] == document[t]]
            out[t] = self.block(layer, x, made[t][0], seen)
        return out

    def head(self, x: Tensor) -> Tensor:
        x = self.norm(x, self.w["model.norm.weight"])
        return self.w.get("lm_head.weight", self.w["model.embed_tokens.weight"]) @ x

    # --- routing ---------------------------------------------------------------------------------------------------

    def best(self, score: list[float]) -> list[bool]:
        count = len(score)
        k = min(count, max(1, math.floor(self.capacity * count + 1e-6)))
        order = sorted(range(count), key=lambda t: (-score[t], t))
        return [t in order[:k] for t in range(count)]

    def causal_logit(self, layer: int, now: Tensor, before: Tensor | None) -> float:
        before = torch.zeros_like(now) if before is None else before
        z = torch.cat([self.norm(now), self.norm(before)])
        name = f"routers.{layer}.causal_router"
        return float(self.w[f"{name}.weight"][0] @ z + self.w[f"{name}.bias"][0])

    def expectation(self, layer: int, state: Tensor) -> Tensor:
        name = f"routers.{layer}.{'prior_ffn' if self.kind == 'dtf' else 'transition_net'}"
        z = self.norm(state, self.w[f"{name}.norm.weight"])
        a = self.w[f"{name}.w1.weight"] @ z
        return self.w[f"{name}.w2.weight"] @ (a * a.sigmoid() * (self.w[f"{name}.w3.weight"] @ z))

    def surprise(self, layer: int, moved: Tensor, expected: Tensor, history: list[float]) -> tuple[float, float]:
        """(what is ranked, G); `history` are the document's D_st so far, to which this token's is added."""
        name = f"routers.{layer}.surprise_router"
        o_ce, m_cu, b_ce, b_cu = (
            math.log1p(math.exp(float(self.w[f"{name}.{key}"]))) for key in ("o_ce", "m_cu", "beta_ce", "beta_cu")
        )
        d_st, d_ch = float((moved**2).mean()), float(((moved - expected) ** 2).mean())
        history.append(d_st)
        recent = history[-self.window :]
        ce = d_st - d_ch + math.log(o_ce + 1e-10)
        cu = d_st - m_cu * sum(recent) / len(recent)
        s_ce, s_cu = 1 / (1 + math.exp(-b_ce * ce)), 1 / (1 + math.exp(-b_cu * cu))
        rank = math.log1p(math.exp(b_ce * ce)) + math.log1p(math.exp(b_cu * cu))
        return rank, s_ce + s_cu - s_ce * s_cu

    def factor(self, soft: float) -> float:
        return soft if self.gate in ("soft", "raw") else 1.0

    def topk(self, ids: list[int], documents: list[int] | None = None) -> tuple[Tensor, dict[int, list[bool]], dict]:
        """(logits [T, V], masks by layer, penalties) of a row in training."""
        document = documents or [0] * len(ids)
        position = [t - document.index(d) for t, d in enumerate(document)]
        x = [self.w["model.embed_tokens.weight"][i] for i in ids]
        before, masks, penalties = x, {}, {}

        def add(name: str, values: list[float]) -> None:
            penalties[name] = penalties.get(name, 0.0) + sum(values) / len(values) / len(self.layers)

        for layer in range(self.cfg.num_hidden_layers):
            after = self.among(layer, dict(enumerate(x)), position, document)
            if layer not in self.layers:
                before, x = x, [after[t] for t in range(len(x))]
                continue
            rank, soft, misses, histories = [], [], [], {}
            for t, h in enumerate(x):
                if self.kind == "mod":
                    r = float(self.w[f"routers.{layer}.mod_router.weight"][0] @ h)
                    rank.append(r), soft.append(r if self.gate == "raw" else 1 / (1 + math.exp(-r)))
                    continue
                if self.kind == "dtf":
                    moved, expected = h - before[t], self.expectation(layer, before[t])
                else:
                    earlier = after[t - 1] if position[t] else torch.zeros_like(h)
                    moved, expected = after[t] - h, self.expectation(layer, earlier)
                misses.append(float(((expected - moved) ** 2).mean()))
                found = self.surprise(layer, moved, expected, histories.setdefault(document[t], []))
                rank.append(found[0]), soft.append(found[1])
            chosen = masks[layer] = self.best(rank)
            logits = [self.causal_logit(layer, h, x[t - 1] if position[t] else None) for t, h in enumerate(x)]
            add("causal_loss", [cross_entropy(z, m) for z, m in zip(logits, chosen, strict=True)])
            if self.kind == "mod":
                add("mod_aux_loss", [cross_entropy(r, m) for r, m in zip(rank, chosen, strict=True)])
                add("mod_z_loss", [r * r for r in rank])
            else:
                add("prior_loss" if self.kind == "dtf" else "tpn_loss", misses)
            made = self.among(layer, {t: h for t, h in enumerate(x) if chosen[t]}, position, document)
            out = [h + self.factor(soft[t]) * (made[t] - h) if chosen[t] else h for t, h in enumerate(x)]
            before, x = x, out
        return torch.stack([self.head(h) for h in x]), masks, penalties

    def causal(self, ids: list[int], thresholds: dict[int, float]) -> tuple[Tensor, dict[int, list[bool]]]:
        """(logits [T, V], masks by layer) of a request, token by token: each sees what earlier ones have left."""
        kept: dict[int, list] = {layer: [] for layer in range(self.cfg.num_hidden_layers)}
        last: dict[int, Tensor | None] = dict.fromkeys(self.layers)
        histories: dict[int, list[float]] = {layer: [] for layer in self.layers}
        masks: dict[int, list[bool]] = {layer: [] for layer in self.layers}
        out = []
        for position, token in enumerate(ids):
            x = before = self.w["model.embed_tokens.weight"][token]
            for layer in range(self.cfg.num_hidden_layers):
                factor = 1.0
                if layer in self.layers:
                    logit = self.causal_logit(layer, x, last[layer])
                    last[layer] = x
                    masks[layer].append(1 / (1 + math.exp(-logit)) > thresholds[layer])
                    if self.kind == "dtf":  # noted for every token, computed or not
                        expected = self.expectation(layer, before)
                        factor = self.factor(self.surprise(layer, x - before, expected, histories[layer])[1])
                    if self.kind == "mod":
                        r = float(self.w[f"routers.{layer}.mod_router.weight"][0] @ x)
                        factor = self.factor(r if self.gate == "raw" else 1 / (1 + math.exp(-r)))
                    if not masks[layer][-1]:
                        before = x
                        continue
                q, k, v = self.qkv(layer, x, position)
                kept[layer].append((k, v))
                y = self.block(layer, x, q, kept[layer])
                before, x = x, x + factor * (y - x)
            out.append(self.head(x))
        return torch.stack(out), masks


def cross_entropy(logit: float, target: bool) -> float:
    return math.log1p(math.exp(-logit if target else logit))
