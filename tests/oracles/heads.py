"""Head scores written out slowly, on TransformerLens's hooks and plain loops, with none of the library's kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kc_lib.models.model import Model


def oracle_copied(model: Model, layer: int, head: int, vectors: Tensor) -> Tensor:
    """What a head adds to the stream when a one-token sequence has these streams before its layer, bias left out."""

    def written(keep: int | None) -> Tensor:
        def only(z: Tensor, hook: Any) -> Tensor:
            kept = torch.zeros_like(z)
            if keep is not None:
                kept[:, :, keep] = z[:, :, keep]
            return kept

        found: dict[str, Tensor] = {}
        hooks: list[tuple[str, Callable]] = [
            (f"blocks.{layer}.hook_resid_pre", lambda x, hook: vectors[:, None].clone()),
            (f"blocks.{layer}.attn.hook_z", only),
            (f"blocks.{layer}.hook_attn_out", lambda x, hook: found.update(out=x.detach().clone())),
        ]
        tokens = torch.zeros(len(vectors), 1, dtype=torch.long)
        with torch.no_grad():
            model.bridge.run_with_hooks(tokens, fwd_hooks=hooks)
        return found["out"][:, 0]

    return written(head) - written(None)


def oracle_readout(model: Model, stream: Tensor, scale_of: Tensor) -> Tensor:
    """Logits of a final stream, the norm's scale being that of another one."""
    inner = model.bridge.ln_final.original_component
    cfg = model.cfg
    x, like = stream.double(), scale_of.double()
    if getattr(cfg, "uses_rms_norm", False):
        weight = inner.weight.double() + (1.0 if getattr(cfg, "rmsnorm_uses_offset", False) else 0.0)
        eps = getattr(inner, "variance_epsilon", getattr(inner, "eps", None))
        y = x / (like.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight
    else:
        centred, like = x - x.mean(-1, keepdim=True), like - like.mean(-1, keepdim=True)
        y = centred / (like.pow(2).mean(-1, keepdim=True) + inner.eps).sqrt() * inner.weight.double() + inner.bias.double()
    logits = y @ model.bridge.unembed.W_U.double()
    if model.bridge.unembed.b_U is not None:
        logits = logits + model.bridge.unembed.b_U.double()
    cap = getattr(cfg, "output_logits_soft_cap", None)
    return cap * torch.tanh(logits / cap) if cap is not None and cap > 0 else logits


def oracle_unembedding(model: Model, token: int) -> Tensor:
    """Unit vector along which the final norm and the unembedding read a token's logit."""
    inner = model.bridge.ln_final.original_component
    weight = inner.weight.double() + (1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0)
    direction = model.bridge.unembed.W_U[:, token].double() * weight
    if not getattr(model.cfg, "uses_rms_norm", False):
        direction = direction - direction.mean()
    return direction / direction.norm()


def oracle_result(model: Model, cache: Any, layer: int, head: int, row: int, place: int) -> list[Tensor]:
    """What a head brings from each source to one place, as it arrives in the stream."""
    attn = model.bridge.blocks[layer].attn
    pattern = cache[f"blocks.{layer}.attn.hook_pattern"][row]
    values = cache[f"blocks.{layer}.attn.hook_v"][row]
    if values.ndim == 2:
        values = values.view(len(values), -1, attn.W_O.shape[1])
    n_heads = attn.W_O.shape[0]
    per_head = n_heads // values.shape[1]
    results = [pattern[head, place, s] * values[s, head // per_head] @ attn.W_O[head] for s in range(place + 1)]
    if not hasattr(model.bridge.blocks[layer], "ln1_post"):
        return [result.double() for result in results]
    every = sum(
        pattern[h, place, s] * values[s, h // per_head] @ attn.W_O[h] for h in range(n_heads) for s in range(place + 1)
    )
    norm = model.bridge.blocks[layer].ln1_post.original_component
    weight = norm.weight + (1.0 if getattr(model.cfg, "rmsnorm_uses_offset", False) else 0.0)
    scale = 1.0 / (every.pow(2).mean() + norm.eps).sqrt()
    return [(result * scale * weight).double() for result in results]


def oracle_cspa(
    model: Model, text: Tensor, scored: Tensor, layer: int, head: int, sources: Tensor, share: float
) -> tuple[float, float]:
    """Mean KL(full || mean-ablated) and mean KL(full || copy suppression preserved) of one head."""
    with torch.no_grad():
        total, count = torch.zeros(model.cfg.d_model, dtype=torch.float64), 0
        for window in text:
            _, cache = model.bridge.run_with_cache(window[None])
            for place in range(1, len(window)):
                total += sum(oracle_result(model, cache, layer, head, 0, place))
                count += 1
        mean = total / count
        ablated, preserved = [], []
        for window in scored:
            _, cache = model.bridge.run_with_cache(window[None])
            last = cache[f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"][0]
            before = cache[f"blocks.{layer}.hook_resid_pre"][0]
            for place in range(1, len(window)):
                brought = oracle_result(model, cache, layer, head, 0, place)
                pattern = cache[f"blocks.{layer}.attn.hook_pattern"][0, head, place]
                lens = oracle_readout(model, before[place], before[place])
                candidates = sorted({int(t) for t in window[: place + 1] if sources[t]}, key=lambda t: -lens[t])
                kept = candidates[: math.ceil(share * (place + 1))]
                new = mean.clone()
                for s, result in enumerate(brought):
                    if int(window[s]) in kept:
                        direction = oracle_unembedding(model, int(window[s]))
                        component = float((result - float(pattern[s]) * mean) @ direction)
                        new += min(component, 0.0) * direction
                stream = last[place].double()
                full = oracle_readout(model, stream, stream).log_softmax(-1)
                for found, output in ((ablated, mean), (preserved, new)):
                    changed = oracle_readout(model, stream + output - sum(brought), stream).log_softmax(-1)
                    found.append(float((full.exp() * (full - changed)).sum()))
    return sum(ablated) / len(ablated), sum(preserved) / len(preserved)


def oracle_path_patch(
    model: Model,
    clean: Tensor,
    contribution: Tensor,
    sender: tuple[int, int],
    receivers: list[tuple[int, int]],
    start: int,
    through_mlps: bool,
) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
    """Last logits and receivers' attention of path patching, by two runs of the model under hooks.

    ``contribution``: what the sender adds to the stream in the other prompts less what it adds in the clean ones.
    """
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
    with torch.no_grad():
        _, cache = model.bridge.run_with_cache(clean)
        hooks: list[tuple[str, Callable]] = []

        def frozen(name: str, add: bool) -> Callable:
            def hook_fn(x: Tensor, hook: Any) -> Tensor:
                kept = cache[name].clone()
                if add:
                    kept[:, start:] += contribution[:, start:]
                return kept

            return hook_fn

        for layer in range(n_layers):
            name = f"blocks.{layer}.hook_attn_out"
            hooks.append((name, frozen(name, layer == sender[0])))
            if not through_mlps:
                hooks.append((f"blocks.{layer}.hook_mlp_out", frozen(f"blocks.{layer}.hook_mlp_out", False)))
        queries: dict[int, Tensor] = {}
        for layer in {layer for layer, _ in receivers}:
            name = f"blocks.{layer}.attn.hook_q"
            hooks.append((name, lambda x, hook, layer=layer: queries.update({layer: x.detach().clone()})))
        model.bridge.run_with_hooks(clean, fwd_hooks=hooks)

        def given(layer: int) -> Callable:
            def hook_fn(q: Tensor, hook: Any) -> Tensor:
                shape = q.shape
                own, new = (x.clone().reshape(*shape[:2], n_heads, -1) for x in (q, queries[layer]))
                for head in (head for at, head in receivers if at == layer):
                    own[:, start:, head] = new[:, start:, head]
                return own.reshape(shape)

            return hook_fn

        patterns: dict[int, Tensor] = {}
        final: list[tuple[str, Callable]] = []
        for layer in queries:
            final.append((f"blocks.{layer}.attn.hook_q", given(layer)))
            name = f"blocks.{layer}.attn.hook_pattern"
            final.append((name, lambda x, hook, layer=layer: patterns.update({layer: x.detach().clone()})))
        logits = model.bridge.run_with_hooks(clean, fwd_hooks=final)
    return logits[:, -1], {(layer, head): patterns[layer][:, head, -1] for layer, head in receivers}
