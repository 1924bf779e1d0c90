"""Edge attribution patching the published way, on a plain forward pass written out by hand.

EAP is Syed et al. 2023 (arXiv:2310.10348). EAP-IG is Hanna et al. 2024 (arXiv:2403.17806). Every reader gets its own
copy of the residual stream, before the norm; a backward hook on the copy contracts its gradient at once with the
difference between the corrupted and the clean outputs of all earlier writers. One interpolation point is run at a
time, for the whole batch.

The forward pass reads its weights from a Hugging Face causal language model as `AutoModelForCausalLM` loads it and
works in that model's dtype. Families: GPT-2, GPT-NeoX, GPT-J, Phi, Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3
(text) and OLMo 2.

Writers (rows of the scores) are `input`, then for each layer every `a{l}.h{h}` and `m{l}`. Readers (columns) are for
each layer every `a{l}.h{h}<q>`, `a{l}.h{j}<k>`, `a{l}.h{j}<v>` and `m{l}`, then `logits`. k and v have one reader for
each key-value head, or one for each query head with `ungrouped`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]
ReaderCallback = Callable[[Tensor, int, int], None]

LLAMA_LIKE = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "olmo2")


@dataclass
class Layer:
    """Weights and maps of one block; H query heads, J key-value heads, D model width, E head width."""

    w_q: Tensor  # [H, D, E]
    b_q: Tensor  # [H, E]
    w_k: Tensor  # [J, D, E]
    b_k: Tensor  # [J, E]
    w_v: Tensor  # [J, D, E]
    b_v: Tensor  # [J, E]
    w_o: Tensor  # [H, E, D]
    b_o: Tensor  # [D]
    pre_attention: Map  # norm before the attention
    pre_mlp: Map  # norm before the MLP
    mlp: Map
    query_norm: Map  # on [B, P, H, E], before the rotation
    key_norm: Map  # on [B, P, J, E] or, ungrouped, [B, P, H, E]
    rotate: Map  # rotary positions, on [B, P, heads, E]
    scale: float  # factor on the attention scores
    softcap: float | None  # tanh cap on the attention scores
    window: int | None  # positions visible to a sliding-window layer
    post_attention_factor: Map | None  # weight / rms of the norm on the attention output
    post_mlp: Map  # norm on the MLP output
    value_norm: Map = lambda v: v  # on [B, P, J, E]
    softmax: Map = lambda scores: scores.softmax(dim=-1)


@dataclass
class Decoder:
    """A whole decoder, ready for the hand-written forward pass."""

    heads: int
    kv_heads: int
    parallel: bool
    layers: list[Layer]
    embed: Map  # tokens [B, P] to the residual stream [B, P, D] before block 0
    final_norm: Map
    w_u: Tensor  # [vocab, D]
    b_u: Tensor | None
    final_softcap: float | None


# --- names and edges ---------------------------------------------------------------------------------------------


def is_parallel(hf_model: Any) -> bool:
    """Whether attention and MLP of a block read the same residual stream."""
    if hf_model.config.model_type == "gpt_neox":
        return bool(hf_model.config.use_parallel_residual)
    return hf_model.config.model_type in ("gptj", "phi")


def reader_heads(hf_model: Any, ungrouped: bool) -> int:
    """The number of k readers (and of v readers) of one layer."""
    heads = hf_model.config.num_attention_heads
    return heads if ungrouped else getattr(hf_model.config, "num_key_value_heads", None) or heads


def writer_names(hf_model: Any) -> list[str]:
    """Names of the writers in row order."""
    names = ["input"]
    for layer in range(hf_model.config.num_hidden_layers):
        names += [f"a{layer}.h{head}" for head in range(hf_model.config.num_attention_heads)]
        names.append(f"m{layer}")
    return names


def reader_names(hf_model: Any, ungrouped: bool = False) -> list[str]:
    """Names of the readers in column order."""
    names = []
    for layer in range(hf_model.config.num_hidden_layers):
        names += [f"a{layer}.h{head}<q>" for head in range(hf_model.config.num_attention_heads)]
        names += [f"a{layer}.h{head}<k>" for head in range(reader_heads(hf_model, ungrouped))]
        names += [f"a{layer}.h{head}<v>" for head in range(reader_heads(hf_model, ungrouped))]
        names.append(f"m{layer}")
    return [*names, "logits"]


def edge_exists(hf_model: Any, ungrouped: bool = False) -> Tensor:
    """Boolean [U, V]: which writers come before which readers."""
    writers = writer_names(hf_model)
    readers = reader_names(hf_model, ungrouped)
    exists = torch.zeros(len(writers), len(readers), dtype=torch.bool)
    for u, writer in enumerate(writers):
        for v, reader in enumerate(readers):
            if writer == "input" or reader == "logits":
                exists[u, v] = True
                continue
            writer_layer = int(writer.split(".")[0][1:])
            reader_layer = int(reader.split(".")[0][1:])
            same_block = writer[0] == "a" and reader[0] == "m" and not is_parallel(hf_model)
            exists[u, v] = writer_layer < reader_layer or (writer_layer == reader_layer and same_block)
    return exists


# --- small maps --------------------------------------------------------------------------------------------------


def identity(x: Tensor) -> Tensor:
    """Nothing to do here."""
    return x


def rms_factor(weight: Tensor, eps: float) -> Map:
    """x to weight / rms(x)."""
    return lambda x: weight * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rms_norm(weight: Tensor, eps: float) -> Map:
    """x to x * weight / rms(x)."""
    factor = rms_factor(weight, eps)
    return lambda x: x * factor(x)


def all_heads_rms_norm(weight: Tensor, eps: float) -> Map:
    """RMS norm over all heads at once, as OLMo 2 has it; repeats the weight for repeated key heads."""

    def norm(x: Tensor) -> Tensor:
        per_head = weight.view(-1, x.shape[-1])
        per_head = per_head.repeat_interleave(x.shape[2] // per_head.shape[0], dim=0)
        return rms_norm(per_head.flatten(), eps)(x.flatten(2)).view(x.shape)

    return norm


def layer_norm(module: Any) -> Map:
    """LayerNorm with the weights of a module."""
    weight, bias = module.weight.detach(), module.bias.detach()
    return lambda x: F.layer_norm(x, weight.shape, weight, bias, module.eps)


def linear(module: Any) -> Map:
    """An affine map with the weights of an `nn.Linear`."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return lambda x: F.linear(x, weight, bias)


def plain_mlp(first: Map, activation: Map, second: Map) -> Map:
    """The two-matrix MLP."""
    return lambda x: second(activation(first(x)))


def gated_mlp(gate: Map, up: Map, down: Map, activation: Map) -> Map:
    """The gated MLP of the Llama family."""
    return lambda x: down(activation(gate(x)) * up(x))


def rotary_angles(x: Tensor, inv_freq: Tensor) -> Tensor:
    """Angles [1, P, 1, frequencies] for positions 0 .. P-1."""
    positions = torch.arange(x.shape[1], device=x.device, dtype=inv_freq.dtype)
    return (positions[:, None] * inv_freq)[None, :, None, :]


def half_rotation(inv_freq: Tensor, factor: float) -> Map:
    """Rotary positions on the first 2 * len(inv_freq) dimensions, pairing i with i + half (GPT-NeoX, Llama)."""

    def rotate(x: Tensor) -> Tensor:
        half = inv_freq.shape[0]
        angles = rotary_angles(x, inv_freq)
        cos, sin = (factor * angles.cos()).to(x.dtype), (factor * angles.sin()).to(x.dtype)
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    return rotate


def interleaved_rotation(inv_freq: Tensor) -> Map:
    """Rotary positions on the first 2 * len(inv_freq) dimensions, pairing 2i with 2i + 1 (GPT-J)."""

    def rotate(x: Tensor) -> Tensor:
        width = 2 * inv_freq.shape[0]
        angles = rotary_angles(x, inv_freq)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        even, odd = x[..., 0:width:2], x[..., 1:width:2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
        return torch.cat([turned, x[..., width:]], dim=-1)

    return rotate


# --- reading the weights -----------------------------------------------------------------------------------------


def heads_in(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Split a [heads * E, D] projection and its bias into [heads, D, E] and [heads, E]."""
    weight = weight.detach()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
    return weight.view(heads, -1, weight.shape[1]).transpose(1, 2), bias.view(heads, -1)


def heads_out(weight: Tensor, bias: Tensor | None, heads: int) -> tuple[Tensor, Tensor]:
    """Split a [D, heads * E] output projection into [heads, E, D], with its bias [D]."""
    weight = weight.detach()
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias.detach()
    return weight.view(weight.shape[0], heads, -1).permute(1, 2, 0), bias


def read_gpt2(hf_model: Any) -> Decoder:
    """GPT-2: learned positions, one joint Conv1D for q, k and v."""
    config, body = hf_model.config, hf_model.transformer
    heads, width = config.n_head, config.n_embd

    def conv(module: Any) -> Map:
        weight, bias = module.weight.detach(), module.bias.detach()
        return lambda x: x @ weight + bias

    def embed(tokens: Tensor) -> Tensor:
        return (body.wte.weight[tokens] + body.wpe.weight[: tokens.shape[1]]).detach()

    layers = []
    for block in body.h:
        joint_weight, joint_bias = block.attn.c_attn.weight.T, block.attn.c_attn.bias
        w_q, b_q = heads_in(joint_weight[:width].contiguous(), joint_bias[:width], heads)
        w_k, b_k = heads_in(joint_weight[width : 2 * width].contiguous(), joint_bias[width : 2 * width], heads)
        w_v, b_v = heads_in(joint_weight[2 * width :].contiguous(), joint_bias[2 * width :], heads)
        w_o, b_o = heads_out(block.attn.c_proj.weight.T.contiguous(), block.attn.c_proj.bias, heads)
        layers.append(
            Layer(
                w_q=w_q,
                b_q=b_q,
                w_k=w_k,
                b_k=b_k,
                w_v=w_v,
                b_v=b_v,
                w_o=w_o,
                b_o=b_o,
                pre_attention=layer_norm(block.ln_1),
                pre_mlp=layer_norm(block.ln_2),
                mlp=plain_mlp(conv(block.mlp.c_fc), block.mlp.act, conv(block.mlp.c_proj)),
                query_norm=identity,
                key_norm=identity,
                rotate=identity,
                scale=block.attn.scaling,
                softcap=None,
                window=None,
                post_attention_factor=None,
                post_mlp=identity,
            )
        )
    head = hf_model.lm_head
    return Decoder(heads, heads, False, layers, embed, layer_norm(body.ln_f), head.weight.detach(), None, None)


def read_gpt_neox(hf_model: Any) -> Decoder:
    """GPT-NeoX (Pythia): q, k and v joined head by head, partial rotary positions, usually parallel blocks."""
    config, body = hf_model.config, hf_model.gpt_neox
    heads = config.num_attention_heads
    rotate = half_rotation(body.rotary_emb.inv_freq, body.rotary_emb.attention_scaling)
    layers = []
    for block in body.layers:
        joint = block.attention.query_key_value
        per_head_weight = joint.weight.view(heads, 3, -1, config.hidden_size)
        per_head_bias = None if joint.bias is None else joint.bias.view(heads, 3, -1)
        parts = [
            heads_in(
                per_head_weight[:, part].flatten(0, 1),
                None if per_head_bias is None else per_head_bias[:, part].flatten(),
                heads,
            )
            for part in range(3)
        ]
        w_o, b_o = heads_out(block.attention.dense.weight, block.attention.dense.bias, heads)
        mlp = plain_mlp(linear(block.mlp.dense_h_to_4h), block.mlp.act, linear(block.mlp.dense_4h_to_h))
        layers.append(
            Layer(
                w_q=parts[0][0],
                b_q=parts[0][1],
                w_k=parts[1][0],
                b_k=parts[1][1],
                w_v=parts[2][0],
                b_v=parts[2][1],
                w_o=w_o,
                b_o=b_o,
                pre_attention=layer_norm(block.input_layernorm),
                pre_mlp=layer_norm(block.post_attention_layernorm),
                mlp=mlp,
                query_norm=identity,
                key_norm=identity,
                rotate=rotate,
                scale=block.attention.head_size**-0.5,
                softcap=None,
                window=None,
                post_attention_factor=None,
                post_mlp=identity,
            )
        )
    return Decoder(
        heads,
        heads,
        is_parallel(hf_model),
        layers,
        lambda tokens: body.embed_in.weight[tokens].detach(),
        layer_norm(body.final_layer_norm),
        hf_model.lm_head.weight.detach(),
        None,
        None,
    )


def read_gptj(hf_model: Any) -> Decoder:
    """GPT-J: parallel blocks with one norm for both branches, interleaved rotary positions."""
    config, body = hf_model.config, hf_model.transformer
    heads = config.n_head
    rotary_width = config.rotary_dim or config.n_embd
    dtype, device = body.wte.weight.dtype, body.wte.weight.device
    inv_freq = 1.0 / 10000 ** (torch.arange(0, rotary_width, 2, dtype=dtype, device=device) / rotary_width)
    layers = []
    for block in body.h:
        w_q, b_q = heads_in(block.attn.q_proj.weight, block.attn.q_proj.bias, heads)
        w_k, b_k = heads_in(block.attn.k_proj.weight, block.attn.k_proj.bias, heads)
        w_v, b_v = heads_in(block.attn.v_proj.weight, block.attn.v_proj.bias, heads)
        w_o, b_o = heads_out(block.attn.out_proj.weight, block.attn.out_proj.bias, heads)
        layers.append(
            Layer(
                w_q=w_q,
                b_q=b_q,
                w_k=w_k,
                b_k=b_k,
                w_v=w_v,
                b_v=b_v,
                w_o=w_o,
                b_o=b_o,
                pre_attention=layer_norm(block.ln_1),
                pre_mlp=layer_norm(block.ln_1),
                mlp=plain_mlp(linear(block.mlp.fc_in), block.mlp.act, linear(block.mlp.fc_out)),
                query_norm=identity,
                key_norm=identity,
                rotate=interleaved_rotation(inv_freq),
                scale=block.attn.head_dim**-0.5,
                softcap=None,
                window=None,
                post_attention_factor=None,
                post_mlp=identity,
            )
        )
    return Decoder(
        heads,
        heads,
        True,
        layers,
        lambda tokens: body.wte.weight[tokens].detach(),
        layer_norm(body.ln_f),
        hf_model.lm_head.weight.detach(),
        hf_model.lm_head.bias.detach(),
        None,
    )


def read_phi(hf_model: Any) -> Decoder:
    """Phi: parallel blocks with one norm for both branches, partial rotary positions."""
    config, body = hf_model.config, hf_model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rotate = half_rotation(body.rotary_emb.inv_freq, body.rotary_emb.attention_scaling)
    layers = []
    for block in body.layers:
        attention = block.self_attn
        w_q, b_q = heads_in(attention.q_proj.weight, attention.q_proj.bias, heads)
        w_k, b_k = heads_in(attention.k_proj.weight, attention.k_proj.bias, kv_heads)
        w_v, b_v = heads_in(attention.v_proj.weight, attention.v_proj.bias, kv_heads)
        w_o, b_o = heads_out(attention.dense.weight, attention.dense.bias, heads)
        layers.append(
            Layer(
                w_q=w_q,
                b_q=b_q,
                w_k=w_k,
                b_k=b_k,
                w_v=w_v,
                b_v=b_v,
                w_o=w_o,
                b_o=b_o,
                pre_attention=layer_norm(block.input_layernorm),
                pre_mlp=layer_norm(block.input_layernorm),
                mlp=plain_mlp(linear(block.mlp.fc1), block.mlp.activation_fn, linear(block.mlp.fc2)),
                query_norm=layer_norm(attention.q_layernorm) if attention.qk_layernorm else identity,
                key_norm=layer_norm(attention.k_layernorm) if attention.qk_layernorm else identity,
                rotate=rotate,
                scale=attention.scaling,
                softcap=None,
                window=None,
                post_attention_factor=None,
                post_mlp=identity,
            )
        )
    return Decoder(
        heads,
        kv_heads,
        True,
        layers,
        lambda tokens: body.embed_tokens.weight[tokens].detach(),
        layer_norm(body.final_layernorm),
        hf_model.lm_head.weight.detach(),
        hf_model.lm_head.bias.detach(),
        None,
    )


def read_llama_like(hf_model: Any) -> Decoder:
    """Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3 and OLMo 2: RMS norms, rotary positions, gated MLP."""
    config, body = hf_model.config, hf_model.model
    family, eps = config.model_type, config.rms_norm_eps
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    gemma = family in ("gemma2", "gemma3_text")

    def norm_weight(module: Any) -> Tensor:
        return 1.0 + module.weight.detach() if gemma else module.weight.detach()

    def norm(module: Any) -> Map:
        return rms_norm(norm_weight(module), eps)

    def embed(tokens: Tensor) -> Tensor:
        return body.embed_tokens(tokens).detach()

    layers = []
    for index, block in enumerate(body.layers):
        attention = block.self_attn
        layer_types = getattr(config, "layer_types", None)
        if family == "gemma3_text":
            inv_freq = getattr(body.rotary_emb, f"{layer_types[index]}_inv_freq")
            factor = getattr(body.rotary_emb, f"{layer_types[index]}_attention_scaling")
        else:
            inv_freq, factor = body.rotary_emb.inv_freq, body.rotary_emb.attention_scaling
        sliding = family == "mistral" or (layer_types is not None and layer_types[index] == "sliding_attention")
        query_norm, key_norm = identity, identity
        if family == "olmo2":
            query_norm = all_heads_rms_norm(norm_weight(attention.q_norm), eps)
            key_norm = all_heads_rms_norm(norm_weight(attention.k_norm), eps)
        elif family in ("qwen3", "gemma3_text"):
            query_norm, key_norm = norm(attention.q_norm), norm(attention.k_norm)
        if gemma:
            pre_attention, pre_mlp = norm(block.input_layernorm), norm(block.pre_feedforward_layernorm)
        elif family == "olmo2":
            pre_attention, pre_mlp = identity, identity
        else:
            pre_attention, pre_mlp = norm(block.input_layernorm), norm(block.post_attention_layernorm)
        post_attention_factor, post_mlp = None, identity
        if gemma or family == "olmo2":
            post_attention_factor = rms_factor(norm_weight(block.post_attention_layernorm), eps)
            post_mlp = norm(block.post_feedforward_layernorm)
        w_q, b_q = heads_in(attention.q_proj.weight, attention.q_proj.bias, heads)
        w_k, b_k = heads_in(attention.k_proj.weight, attention.k_proj.bias, kv_heads)
        w_v, b_v = heads_in(attention.v_proj.weight, attention.v_proj.bias, kv_heads)
        w_o, b_o = heads_out(attention.o_proj.weight, attention.o_proj.bias, heads)
        if post_attention_factor is not None and attention.o_proj.bias is not None:
            raise ValueError("an output bias in front of a norm on the attention output is not covered")
        mlp = block.mlp
        layers.append(
            Layer(
                w_q=w_q,
                b_q=b_q,
                w_k=w_k,
                b_k=b_k,
                w_v=w_v,
                b_v=b_v,
                w_o=w_o,
                b_o=b_o,
                pre_attention=pre_attention,
                pre_mlp=pre_mlp,
                mlp=gated_mlp(linear(mlp.gate_proj), linear(mlp.up_proj), linear(mlp.down_proj), mlp.act_fn),
                query_norm=query_norm,
                key_norm=key_norm,
                rotate=half_rotation(inv_freq, factor),
                scale=attention.scaling,
                softcap=getattr(config, "attn_logit_softcapping", None),
                window=config.sliding_window if sliding else None,
                post_attention_factor=post_attention_factor,
                post_mlp=post_mlp,
            )
        )
    return Decoder(
        heads,
        kv_heads,
        False,
        layers,
        embed,
        norm(body.norm),
        hf_model.lm_head.weight.detach(),
        None,
        getattr(config, "final_logit_softcapping", None),
    )


def read_decoder(hf_model: Any) -> Decoder:
    """Read the weights of a Hugging Face causal language model for the hand-written forward pass."""
    readers = {"gpt2": read_gpt2, "gpt_neox": read_gpt_neox, "gptj": read_gptj, "phi": read_phi}
    readers.update(dict.fromkeys(LLAMA_LIKE, read_llama_like))
    if hf_model.config.model_type not in readers:
        raise ValueError(f"the oracle has no forward pass for {hf_model.config.model_type}")
    return readers[hf_model.config.model_type](hf_model)


# --- the forward pass --------------------------------------------------------------------------------------------


def project(copies: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Each head's projection of its own copy: [B, P, N, D] to [B, P, N, E]; repeats weights for repeated heads."""
    times = copies.shape[2] // weight.shape[0]
    if times > 1:
        weight, bias = weight.repeat_interleave(times, dim=0), bias.repeat_interleave(times, dim=0)
    return torch.einsum("bpnd,nde->bpne", copies, weight) + bias


def attend(layer: Layer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal softmax attention: q [B, P, H, E], k and v [B, P, N, E] to z [B, P, H, E]."""
    times = q.shape[2] // k.shape[2]
    k, v = k.repeat_interleave(times, dim=2), v.repeat_interleave(times, dim=2)
    scores = torch.einsum("bihe,bjhe->bhij", q, k) * layer.scale
    if layer.softcap is not None:
        scores = layer.softcap * torch.tanh(scores / layer.softcap)
    position = torch.arange(q.shape[1], device=q.device)
    age = position[:, None] - position[None, :]
    hidden = age < 0
    if layer.window is not None:
        hidden = hidden | (age >= layer.window)
    pattern = layer.softmax(scores.masked_fill(hidden, float("-inf")))
    return torch.einsum("bhij,bjhe->bihe", pattern, v)


def head_contributions(layer: Layer, q_in: Tensor, k_in: Tensor, v_in: Tensor) -> Tensor:
    """What each head adds to the residual stream, from the copies its q, k and v read: [B, P, H, D]."""
    q = layer.rotate(layer.query_norm(project(layer.pre_attention(q_in), layer.w_q, layer.b_q)))
    k = layer.rotate(layer.key_norm(project(layer.pre_attention(k_in), layer.w_k, layer.b_k)))
    v = layer.value_norm(project(layer.pre_attention(v_in), layer.w_v, layer.b_v))
    heads = torch.einsum("bphe,hed->bphd", attend(layer, q, k, v), layer.w_o)
    if layer.post_attention_factor is not None:
        heads = heads * layer.post_attention_factor(heads.sum(dim=2)).unsqueeze(2)
    return heads


def mlp_contribution(layer: Layer, mlp_in: Tensor) -> Tensor:
    """What the MLP adds to the residual stream, from the copy it reads: [B, P, D]."""
    return layer.post_mlp(layer.mlp(layer.pre_mlp(mlp_in)))


def unembed(decoder: Decoder, final_in: Tensor, last: Tensor | None = None) -> Tensor:
    """Logits [B, P, vocab] from the final residual stream, or [B, vocab] at the positions `last`."""
    final = decoder.final_norm(final_in)
    if last is not None:
        final = at_last(final, last)
    logits = F.linear(final, decoder.w_u, decoder.b_u)
    if decoder.final_softcap is not None:
        logits = decoder.final_softcap * torch.tanh(logits / decoder.final_softcap)
    return logits


def at_last(values: Tensor, last: Tensor) -> Tensor:
    """Pick position last[b] of example b: [B, P, ...] to [B, ...]."""
    return values[torch.arange(values.shape[0], device=values.device), last.to(values.device)]


def fork(stream: Tensor, copies: int) -> Tensor:
    """Separate copies of the residual stream for the readers: [B, P, D] to [B, P, copies, D]."""
    return stream.unsqueeze(2).expand(-1, -1, copies, -1).clone()


def run(
    decoder: Decoder,
    stream: Tensor,
    ungrouped: bool = False,
    last: Tensor | None = None,
    on_reader: ReaderCallback | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the decoder from its embedded input, with a copy of the residual stream for every reader.

    `on_reader(copies, column, rows)` sees the copies [B, P, N, D] of the readers `column .. column + N - 1`, whose
    writers are the rows before `rows`. Returns the logits (at every position, or at `last`) and the outputs of all
    writers [B, P, U, D].
    """
    writers = [stream.unsqueeze(2)]
    rows, column = 1, 0

    def read(source: Tensor, copies: int) -> Tensor:
        nonlocal column
        forked = fork(source, copies)
        if on_reader is not None:
            on_reader(forked, column, rows)
        column += copies
        return forked

    kv_copies = decoder.heads if ungrouped else decoder.kv_heads
    for layer in decoder.layers:
        q_in, k_in, v_in = read(stream, decoder.heads), read(stream, kv_copies), read(stream, kv_copies)
        heads = head_contributions(layer, q_in, k_in, v_in)
        writers.append(heads)
        after_attention = stream + heads.sum(dim=2) + layer.b_o
        if decoder.parallel:
            mlp_in = read(stream, 1)
            rows += decoder.heads
        else:
            rows += decoder.heads
            mlp_in = read(after_attention, 1)
        mlp = mlp_contribution(layer, mlp_in.squeeze(2))
        writers.append(mlp.unsqueeze(2))
        rows += 1
        stream = after_attention + mlp
    final_in = read(stream, 1)
    return unembed(decoder, final_in.squeeze(2), last), torch.cat(writers, dim=2)


# --- edge scores -------------------------------------------------------------------------------------------------


def metric_values(logits: Tensor, answers: Tensor, distractors: Tensor | None, metric: str) -> Tensor:
    """The metric of each example from its logits [B, vocab] at the answer position.

    For "probability_difference" answers and distractors are sets [B, k], those of all examples of one size.
    """
    if metric == "logit_difference":
        if distractors is None:
            raise ValueError("logit_difference needs distractors")
        return (logits.gather(1, answers[:, None]) - logits.gather(1, distractors[:, None])).squeeze(1)
    if metric == "log_probability":
        return logits.log_softmax(dim=-1).gather(1, answers[:, None]).squeeze(1)
    if metric == "probability":
        return logits.softmax(dim=-1).gather(1, answers[:, None]).squeeze(1)
    if metric == "probability_difference" and distractors is not None:
        p = logits.softmax(dim=-1)
        return p.gather(1, answers).sum(1) - p.gather(1, distractors).sum(1)
    raise ValueError(f"unknown metric {metric}")


def oracle_edge_scores(
    hf_model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    last: Tensor,
    answers: Tensor,
    distractors: Tensor | None,
    alphas: Sequence[float] = (1.0,),
    ungrouped: bool = False,
    metric: str = "logit_difference",
    all_positions: bool = True,
    decoder: Decoder | None = None,
    only: Tensor | None = None,
) -> Tensor:
    """EAP-IG edge scores [U, V] (Hanna et al. 2024); with alphas (1.0,) these are EAP scores at the clean input.

    score(u -> v) is the mean over the alphas and the examples of the sum over positions and model dimensions of
    (corrupted_u - clean_u) * d(-metric) / d(input of v), the gradient taken where the input writer puts out
    corrupted + alpha * (clean - corrupted). Pairs that are no edge get 0. The published code computes logits at
    every position; `all_positions=False` computes them at `last` only, with the same scores. `decoder` is the model with
    other backward passes (`oracles.rules`); `only` [B, P] is true where the sum over positions is taken.
    """
    decoder = decoder or read_decoder(hf_model)
    logits_at = None if all_positions else last
    with torch.no_grad():
        _, corrupted = run(decoder, decoder.embed(corrupted_tokens), ungrouped, logits_at)
        _, clean = run(decoder, decoder.embed(clean_tokens), ungrouped, logits_at)
        activation_difference = corrupted - clean
        if only is not None:
            activation_difference = activation_difference * only[:, :, None, None]
    corrupted_input, clean_input = corrupted[:, :, 0], clean[:, :, 0]

    shape = (len(writer_names(hf_model)), len(reader_names(hf_model, ungrouped)))
    scores = torch.zeros(shape, dtype=clean.dtype, device=clean.device)

    def contract_on_backward(copies: Tensor, column: int, rows: int) -> None:
        def contract(gradient: Tensor) -> None:
            scores[:rows, column : column + copies.shape[2]] += torch.einsum(
                "bpud,bpnd->un", activation_difference[:, :, :rows], gradient
            )

        copies.register_hook(contract)

    for alpha in alphas:
        stream = (corrupted_input + alpha * (clean_input - corrupted_input)).requires_grad_(True)
        logits, _ = run(decoder, stream, ungrouped, logits_at, contract_on_backward)
        if all_positions:
            logits = at_last(logits, last)
        loss = -metric_values(logits, answers, distractors, metric).mean()
        loss.backward()
    return scores / len(alphas)
