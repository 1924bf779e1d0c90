"""Brute-force edge patching, in two ways that share no code.

`oracle_circuit_logits` runs any set of edges: it builds the input of every reader by itself, one writer after the
other, on the hand-written forward pass of `eap.py`.

`oracle_patch_edge` replaces one writer's output on one edge in a plain run of the Hugging Face model, with forward
hooks on that model's own modules. It needs a model as `AutoModelForCausalLM` loads it, in evaluation mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .eap import (
    at_last,
    head_contributions,
    mlp_contribution,
    read_decoder,
    reader_heads,
    run,
    unembed,
    writer_names,
)

Ablation = str | Tensor


# --- any circuit, on the hand-written forward pass ---------------------------------------------------------------


@torch.no_grad()
def writer_outputs(hf_model: Any, tokens: Tensor) -> Tensor:
    """What every writer adds to the residual stream in a plain run: [U, B, P, D]."""
    decoder = read_decoder(hf_model)
    return run(decoder, decoder.embed(tokens))[1].permute(2, 0, 1, 3)


def mean_over_real_positions(outputs: Tensor, last: Tensor) -> Tensor:
    """Mean over positions 0 .. last of each example, then over the examples, spread to the shape [..., B, P, D]."""
    total = torch.zeros_like(outputs[..., 0, 0, :])
    for example, end in enumerate(last.tolist()):
        total = total + outputs[..., example, : end + 1, :].mean(dim=-2)
    return (total / len(last))[..., None, None, :].expand(outputs.shape)


@torch.no_grad()
def oracle_circuit_logits(
    hf_model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    last: Tensor,
    mask: Tensor,
    ungrouped: bool = False,
    ablation: Ablation = "patching",
) -> Tensor:
    """Logits [B, vocab] at `last` of the clean prompts with only the edges in `mask` [U, V] left in place.

    Every reader's input is the sum over the earlier writers of this run's output if the edge is in the mask, else of
    the ablation value, plus the output biases of the earlier attention layers. Ablation values: "patching" (the
    writer's output in the corrupted run), "zero", "mean" (the writer's clean output averaged over positions
    0 .. last and over the examples) or a tensor [U, B, P, D].
    """
    decoder = read_decoder(hf_model)
    if isinstance(ablation, Tensor):
        ablated = ablation
    elif ablation == "patching":
        ablated = writer_outputs(hf_model, corrupted_tokens)
    elif ablation == "zero":
        ablated = torch.zeros_like(writer_outputs(hf_model, clean_tokens))
    elif ablation == "mean":
        ablated = mean_over_real_positions(writer_outputs(hf_model, clean_tokens), last)
    else:
        raise ValueError(f"unknown ablation {ablation}")

    own = [decoder.embed(clean_tokens)]  # outputs of the writers in this run, in row order
    biases = torch.zeros_like(own[0])  # output biases of the attention layers passed so far
    column = 0

    def next_reader_input() -> Tensor:
        """The input of the reader in the current column, from all writers that have run."""
        nonlocal column
        total = biases.clone()
        for row in range(len(own)):
            total = total + (own[row] if mask[row, column] else ablated[row])
        column += 1
        return total

    for layer in decoder.layers:
        q_in = torch.stack([next_reader_input() for _ in range(decoder.heads)], dim=2)
        k_in = torch.stack([next_reader_input() for _ in range(reader_heads(hf_model, ungrouped))], dim=2)
        v_in = torch.stack([next_reader_input() for _ in range(reader_heads(hf_model, ungrouped))], dim=2)
        heads = head_contributions(layer, q_in, k_in, v_in)
        if decoder.parallel:
            mlp_in = next_reader_input()
            own += [heads[:, :, head] for head in range(decoder.heads)]
            biases = biases + layer.b_o
        else:
            own += [heads[:, :, head] for head in range(decoder.heads)]
            biases = biases + layer.b_o
            mlp_in = next_reader_input()
        own.append(mlp_contribution(layer, mlp_in))
    return unembed(decoder, next_reader_input(), last)


# --- one edge, with hooks on the Hugging Face model --------------------------------------------------------------


@dataclass
class Block:
    """The modules of one Hugging Face block that the hooks go to."""

    module: nn.Module  # its first argument is the residual stream
    pre_attention: nn.Module | None
    projections: dict[str, nn.Module]  # by "q", "k", "v"
    offsets: dict[str, Callable[[int], int]]  # by "q", "k", "v": first output column of a head
    head_width: int
    output_projection: nn.Module
    post_attention: nn.Module | None
    mlp_entry: nn.Module  # the norm before the MLP, or the MLP where no norm of its own comes before it
    mlp_shared_norm: nn.Module | None  # the norm before attention and MLP both
    mlp_exit: nn.Module  # its output is what reaches the residual stream


def find_blocks(hf_model: Any) -> tuple[list[Block], nn.Module]:
    """The blocks of a Hugging Face model and its final norm."""
    config, family = hf_model.config, hf_model.config.model_type
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def offsets(**of: Callable[[int], int]) -> dict[str, Callable[[int], int]]:
        return of

    separate = offsets(q=lambda h: h * head_width, k=lambda h: h * head_width, v=lambda h: h * head_width)
    blocks = []
    if family == "gpt2":
        width = config.hidden_size
        joint = offsets(
            q=lambda h: h * head_width,
            k=lambda h: width + h * head_width,
            v=lambda h: 2 * width + h * head_width,
        )
        for block in hf_model.transformer.h:
            qkv = dict.fromkeys("qkv", block.attn.c_attn)
            output = block.attn.c_proj
            blocks.append(Block(block, block.ln_1, qkv, joint, head_width, output, None, block.ln_2, None, block.mlp))
        return blocks, hf_model.transformer.ln_f
    if family == "gpt_neox":
        joint = offsets(
            q=lambda h: 3 * h * head_width,
            k=lambda h: (3 * h + 1) * head_width,
            v=lambda h: (3 * h + 2) * head_width,
        )
        for block in hf_model.gpt_neox.layers:
            qkv = dict.fromkeys("qkv", block.attention.query_key_value)
            first, second, output = block.input_layernorm, block.post_attention_layernorm, block.attention.dense
            blocks.append(Block(block, first, qkv, joint, head_width, output, None, second, None, block.mlp))
        return blocks, hf_model.gpt_neox.final_layer_norm

    body = hf_model.transformer if family == "gptj" else hf_model.model
    for block in body.h if family == "gptj" else body.layers:
        attention = block.attn if family == "gptj" else block.self_attn
        qkv = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj}
        mlp = block.mlp
        if family == "gptj":
            norm, output = block.ln_1, attention.out_proj
            blocks.append(Block(block, norm, qkv, separate, head_width, output, None, mlp, norm, mlp))
        elif family == "phi":
            norm, output = block.input_layernorm, attention.dense
            blocks.append(Block(block, norm, qkv, separate, head_width, output, None, mlp, norm, mlp))
        elif family in ("llama", "mistral", "qwen2", "qwen3"):
            first, second = block.input_layernorm, block.post_attention_layernorm
            blocks.append(Block(block, first, qkv, separate, head_width, attention.o_proj, None, second, None, mlp))
        elif family in ("gemma2", "gemma3_text"):
            first, second = block.input_layernorm, block.pre_feedforward_layernorm
            third, fourth = block.post_attention_layernorm, block.post_feedforward_layernorm
            blocks.append(Block(block, first, qkv, separate, head_width, attention.o_proj, third, second, None, fourth))
        elif family == "olmo2":
            third, fourth = block.post_attention_layernorm, block.post_feedforward_layernorm
            blocks.append(Block(block, None, qkv, separate, head_width, attention.o_proj, third, mlp, None, fourth))
        else:
            raise ValueError(f"the oracle knows no hooks for {family}")
    final_norm = {"gptj": "ln_f", "phi": "final_layernorm"}.get(family, "norm")
    return blocks, getattr(body, final_norm)


class Hooks:
    """Hooks on modules that go away at the end of a `with` block."""

    def __init__(self) -> None:
        """Start with no hooks."""
        self.handles: list[Any] = []

    def __enter__(self) -> "Hooks":
        """Start the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()

    def on_input(self, module: nn.Module, function: Callable[[Tensor], Tensor | None]) -> None:
        """Call `function` with the first argument of a module; what it returns, if anything, replaces it."""

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
            replaced = function(arguments[0])
            return None if replaced is None else (replaced, *arguments[1:])

        self.handles.append(module.register_forward_pre_hook(hook))

    def on_output(self, module: nn.Module, function: Callable[[Tensor, Tensor], Tensor | None]) -> None:
        """Call `function` with the first argument and the output; what it returns replaces the output."""
        self.handles.append(module.register_forward_hook(lambda _, arguments, out: function(arguments[0], out)))


def store(place: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """A hook function that keeps a tensor under a name."""

    def keep(value: Tensor) -> None:
        place[name] = value.detach().clone()

    return keep


def layer_and_head(name: str) -> tuple[int, int | None]:
    """Layer and head of a writer or reader: "a3.h2<q>" gives (3, 2), "m3" gives (3, None)."""
    if name[0] == "m":
        return int(name[1:]), None
    layer, head = name[1:].split("<")[0].split(".h")
    return int(layer), int(head)


@torch.no_grad()
def hooked_writer_output(hf_model: Any, tokens: Tensor, writer: str) -> Tensor:
    """What a writer adds to the residual stream in a run of the Hugging Face model: [B, P, D]."""
    blocks, _ = find_blocks(hf_model)
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks:
        if writer == "input":
            hooks.on_input(blocks[0].module, store(seen, "output"))
            hf_model(tokens, use_cache=False)
            return seen["output"]
        layer, head = layer_and_head(writer)
        block = blocks[layer]
        if head is None:
            keep = store(seen, "output")
            hooks.on_output(block.mlp_exit, lambda _, output: keep(output))
            hf_model(tokens, use_cache=False)
            return seen["output"]
        hooks.on_input(block.output_projection, store(seen, "z"))
        if block.post_attention is not None:
            hooks.on_input(block.post_attention, store(seen, "all heads"))
        hf_model(tokens, use_cache=False)
    columns = slice(head * block.head_width, (head + 1) * block.head_width)
    weight = block.output_projection.weight
    into_stream = weight[columns] if hf_model.config.model_type == "gpt2" else weight[:, columns].T
    output = seen["z"][..., columns] @ into_stream
    if block.post_attention is not None:
        norm_weight = block.post_attention.weight
        if hf_model.config.model_type in ("gemma2", "gemma3_text"):
            norm_weight = 1.0 + norm_weight
        mean_square = seen["all heads"].pow(2).mean(dim=-1, keepdim=True)
        output = output * norm_weight / torch.sqrt(mean_square + hf_model.config.rms_norm_eps)
    return output


def shift_projection(hooks: Hooks, block: Block, kind: str, head: int, shift: Tensor) -> None:
    """Make the q, k or v of one head read the residual stream plus `shift`."""
    seen: dict[str, Tensor] = {}
    hooks.on_input(block.module, store(seen, "stream"))
    projection = block.projections[kind]
    start = block.offsets[kind](head)

    def overwrite(_: Tensor, output: Tensor) -> Tensor:
        shifted = seen["stream"] + shift
        normed = shifted if block.pre_attention is None else block.pre_attention.forward(shifted)
        columns = slice(start, start + block.head_width)
        output = output.clone()
        output[..., columns] = projection.forward(normed)[..., columns]
        return output

    hooks.on_output(projection, overwrite)


@torch.no_grad()
def oracle_patch_edge(
    hf_model: Any,
    clean_tokens: Tensor,
    corrupted_tokens: Tensor,
    last: Tensor,
    writer: str,
    reader: str,
    ungrouped: bool = False,
    ablation: Ablation = "patching",
) -> Tensor:
    """Logits [B, vocab] at `last` of a clean run in which one reader sees one writer's ablation value instead.

    The run is the Hugging Face model's own. Only the reader's input changes, by the ablation value minus the writer's
    clean output; ablation values are those of `oracle_circuit_logits`. An ungrouped k or v takes two runs: the one
    that shifts the key-value head gives the output of the query head, which then replaces this head's output in an
    otherwise clean run.
    """
    blocks, final_norm = find_blocks(hf_model)
    clean = hooked_writer_output(hf_model, clean_tokens, writer)
    if isinstance(ablation, Tensor):
        shift = ablation[writer_names(hf_model).index(writer)] - clean
    elif ablation == "patching":
        shift = hooked_writer_output(hf_model, corrupted_tokens, writer) - clean
    elif ablation == "zero":
        shift = -clean
    elif ablation == "mean":
        shift = mean_over_real_positions(clean, last) - clean
    else:
        raise ValueError(f"unknown ablation {ablation}")

    with Hooks() as hooks:
        if reader == "logits":
            hooks.on_input(final_norm, lambda stream: stream + shift)
            return at_last(hf_model(clean_tokens, use_cache=False).logits, last)

        layer, head = layer_and_head(reader)
        block = blocks[layer]
        if head is None and block.mlp_shared_norm is None:
            hooks.on_input(block.mlp_entry, lambda stream: stream + shift)
        elif head is None:
            seen: dict[str, Tensor] = {}
            hooks.on_input(block.module, store(seen, "stream"))
            norm = block.mlp_shared_norm
            hooks.on_input(block.mlp_entry, lambda _: norm.forward(seen["stream"] + shift))
        else:
            kind = reader[-2]
            group = hf_model.config.num_attention_heads // reader_heads(hf_model, ungrouped=False)
            if kind != "q" and ungrouped and group > 1:
                return patch_ungrouped(hf_model, clean_tokens, last, block, kind, head, group, shift)
            shift_projection(hooks, block, kind, head, shift)
        return at_last(hf_model(clean_tokens, use_cache=False).logits, last)


def patch_ungrouped(
    hf_model: Any, tokens: Tensor, last: Tensor, block: Block, kind: str, head: int, group: int, shift: Tensor
) -> Tensor:
    """The logits when one query head's own copy of a shared k or v reads the residual stream plus `shift`."""
    if kind == "k" and hf_model.config.model_type == "olmo2":
        raise ValueError("OLMo 2 norms the keys of all heads together: an ungrouped k has no counterpart in the model")
    seen: dict[str, Tensor] = {}
    with Hooks() as hooks:
        shift_projection(hooks, block, kind, head // group, shift)
        hooks.on_input(block.output_projection, store(seen, "z"))
        hf_model(tokens, use_cache=False)
    columns = slice(head * block.head_width, (head + 1) * block.head_width)

    def take_head(z: Tensor) -> Tensor:
        z = z.clone()
        z[..., columns] = seen["z"][..., columns]
        return z

    with Hooks() as hooks:
        hooks.on_input(block.output_projection, take_head)
        return at_last(hf_model(tokens, use_cache=False).logits, last)
