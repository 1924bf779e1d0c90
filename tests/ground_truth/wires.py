"""Setting the weights of a GPT-2 by hand: named spaces of the residual stream, heads, neurons, and noise elsewhere.

**Spaces.** The stream holds named sets of orthonormal directions, one direction per token or position: "token" (what the
embedding writes), "position", "answer" (what the logits read), and those a circuit needs in between. The directions are
random, so that no space lies along the coordinates. Weights that read or write a space are products with its directions.

**Norms.** LayerNorm cannot be switched off in GPT-2; it is made harmless. Every direction sums to zero over the
coordinates, so centring does nothing, and a *constant* direction is so large that the standard deviation hardly depends
on the rest: norms pass the stream on as it is, to a relative 1e-4 (``CONSTANT``, above the first attention layer). The
constant is the output bias of the first attention layer, which belongs to no writer, so no intervention removes it. That
first layer itself sees the embedding alone, whose length is the same for every token at every position; its norm is the
identity on real prompts and, through a small constant in the embedding, within 3% of it on interpolated ones.

**Noise.** Heads and MLPs without work have random weights: they attend, read and write everywhere, the answer directions
among them, but little (``NOISE``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from kc_lib.errors import ModelError
from kc_lib.models.model import Model

BOS = "<s>"
D_MODEL, N_LAYERS, N_HEADS, N_POSITIONS = 96, 4, 4, 8
CONSTANT, CONSTANT_OF_EMBEDDING = 300.0, 4.0  # length of the constant direction above and below the first attention
LOGIT_SCALE = 10.0  # logit of a token whose answer direction has length 1
NOISE = 0.1  # length of what a random head or MLP writes, as a rough share of a token's direction


@dataclass(frozen=True)
class Wires:
    """A GPT-2 in the making: its weights by Hugging Face's names, its words, and the directions of each space as rows."""

    weights: dict[str, Tensor]
    words: tuple[str, ...]
    spaces: Mapping[str, Float[Tensor, "direction d_model"]]

    @property
    def d_model(self) -> int:
        return self.weights["transformer.wte.weight"].shape[1]

    @property
    def d_head(self) -> int:
        return self.d_model // N_HEADS

    @property
    def n_positions(self) -> int:
        return self.weights["transformer.wpe.weight"].shape[0]

    def token_ids(self, words: Sequence[str]) -> tuple[int, ...]:
        return tuple(self.words.index(word) for word in words)


@dataclass(frozen=True)
class Reading:
    """What a projection of a head, or a neuron, reads: ``weight`` times the stream plus ``bias``."""

    weight: Float[Tensor, "d_model n"]
    bias: Float[Tensor, " n"]


def noisy_gpt2(
    words: Sequence[str],
    spaces: Sequence[str],
    seed: int,
    d_model: int = D_MODEL,
    n_positions: int = N_POSITIONS,
    positions_in: Sequence[str] = (),
) -> Wires:
    """A GPT-2 of random heads and MLPs whose embedding writes "token" and "position", and whose logits read "answer".

    Args:
        words: the vocabulary; the first word is the BOS token.
        spaces: spaces with one direction per word, beside "token" and "answer".
        positions_in: spaces with one direction per position, beside "position".
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = {name: n_positions for name in ("position", *positions_in)}
    sizes |= {name: len(words) for name in ("token", *spaces, "answer")}
    if len(words) > d_model // N_HEADS or sum(sizes.values()) > d_model - 3:
        raise ModelError(f"{len(words)} words in {len(sizes) - 1} spaces do not fit into {d_model} dimensions")
    constant, directions = _directions(sum(sizes.values()), d_model, generator)
    by_space = dict(zip(sizes, directions.split(list(sizes.values())), strict=True))
    wires = Wires(_blank_weights(len(words), d_model, n_positions), tuple(words), by_space)
    wires.weights["transformer.wte.weight"][:] = by_space["token"]
    wires.weights["transformer.wpe.weight"][:] = by_space["position"] + CONSTANT_OF_EMBEDDING * constant
    wires.weights["lm_head.weight"][:] = LOGIT_SCALE * by_space["answer"]
    _fill_with_noise(wires, directions, generator)
    _neutralise_norms(wires, constant)
    return wires


def set_head(
    wires: Wires, layer: int, head: int, query: Reading, key: Reading, value: str, output: str, gain: float, sharpness: float
) -> None:
    """Give a head its work: attend where query and key agree, and copy ``value`` there to ``gain`` times ``output`` here.

    Its attention scores are ``sharpness`` times the inner product of query and key.
    """
    attention = f"transformer.h.{layer}.attn"
    d_head = wires.d_head
    own = slice(head * d_head, (head + 1) * d_head)
    scaled = Reading(query.weight * sharpness * math.sqrt(d_head), query.bias * sharpness * math.sqrt(d_head))
    copied = Reading(wires.spaces[value].T, torch.zeros(len(wires.spaces[value])))
    for part, reading in enumerate((scaled, key, copied)):
        columns = slice(part * wires.d_model + own.start, part * wires.d_model + own.stop)
        wires.weights[f"{attention}.c_attn.weight"][:, columns] = _widened(reading.weight, d_head)
        wires.weights[f"{attention}.c_attn.bias"][columns] = _widened(reading.bias, d_head)
    wires.weights[f"{attention}.c_proj.weight"][own] = _widened(gain * wires.spaces[output].T, d_head).T


def set_neurons(wires: Wires, layer: int, reading: Reading, writing: Float[Tensor, "neuron d_model"]) -> None:
    """Give an MLP its work: neurons that write ``GELU(reading)`` times their rows of ``writing``; its others are off."""
    mlp = f"transformer.h.{layer}.mlp"
    off = 4 * wires.d_model - len(writing)
    wires.weights[f"{mlp}.c_fc.weight"][:] = F.pad(reading.weight, (0, off))
    wires.weights[f"{mlp}.c_fc.bias"][:] = F.pad(reading.bias, (0, off))
    wires.weights[f"{mlp}.c_proj.weight"][:] = F.pad(writing, (0, 0, 0, off))


def read_space(wires: Wires, space: str, shift: int = 0) -> Reading:
    """Which of a space's directions is there; with ``shift``, direction i is read as i + shift."""
    directions = wires.spaces[space].roll(shift, 0).clone()
    directions[:shift] = 0.0
    return Reading(directions.T, torch.zeros(len(directions)))


def read_any(wires: Wires, words: Sequence[str]) -> Reading:
    """Whether the token is one of the words: one number, 1 or 0."""
    return Reading(wires.spaces["token"][list(wires.token_ids(words))].sum(0)[:, None], torch.zeros(1))


def joined(first: Reading, second: Reading) -> Reading:
    """Two readings side by side."""
    return Reading(torch.cat([first.weight, second.weight], 1), torch.cat([first.bias, second.bias]))


def with_rest(wires: Wires, query: Reading, key: Reading, score: float) -> tuple[Reading, Reading]:
    """Query and key that also match BOS, by ``score`` at every position: a head without a match then rests there."""
    always = Reading(torch.zeros(wires.d_model, 1), torch.ones(1))
    bos = read_any(wires, [BOS])
    return joined(query, always), joined(key, Reading(score * bos.weight, bos.bias))


def boot(wires: Wires, name: str) -> Model:
    """The finished model as the suite has models: booted by TransformerLens, frozen, in evaluation mode; on the CPU."""
    tokenizer = _tokenizer(wires.words, name)
    with torch.random.fork_rng(devices=[]):  # modules are initialised before they are overwritten; the caller's seed stays
        gpt2 = GPT2LMHeadModel(_config(len(wires.words), wires.d_model, wires.n_positions))
        gpt2.load_state_dict(wires.weights)
        model = Model.from_hf(gpt2, tokenizer, name)
    model.bridge.requires_grad_(False)
    return model


def _tokenizer(words: Sequence[str], name: str) -> PreTrainedTokenizerFast:
    """One token a word, BOS in front; TransformerLens reads ``name_or_path`` and asks a hub if BOS is not promised."""
    bos = words[0]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=bos))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        name_or_path=name,
        add_bos_token=True,
        bos_token=bos,
        eos_token=bos,
        pad_token=bos,
        unk_token=bos,
    )


def _directions(
    n: int, d_model: int, generator: torch.Generator
) -> tuple[Float[Tensor, " d_model"], Float[Tensor, "n d_model"]]:
    """The constant direction, on two coordinates of its own, and ``n`` random ones; each sums to 0 over coordinates."""
    constant = torch.zeros(d_model)
    constant[:2] = torch.tensor([1.0, -1.0]) / math.sqrt(2)
    draw = torch.randn(d_model - 2, n + 1, generator=generator)
    draw[:, 0] = 1.0  # orthogonal to this column means a sum of zero
    orthonormal = torch.linalg.qr(draw)[0][:, 1:]
    return constant, torch.cat([torch.zeros(2, n), orthonormal]).T.contiguous()


def _config(n_words: int, d_model: int, n_positions: int) -> GPT2Config:
    return GPT2Config(
        vocab_size=n_words,
        n_positions=n_positions,
        n_embd=d_model,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def _blank_weights(n_words: int, d_model: int, n_positions: int) -> dict[str, Tensor]:
    """A zero for every weight."""
    with torch.device("meta"):
        shapes = GPT2LMHeadModel(_config(n_words, d_model, n_positions)).state_dict()
    return {name: torch.zeros(weight.shape) for name, weight in shapes.items()}


def _fill_with_noise(wires: Wires, directions: Tensor, generator: torch.Generator) -> None:
    """Random heads and MLPs that read all directions and write ``NOISE`` along all of them."""
    n, d_model, width = len(directions), wires.d_model, 4 * wires.d_model

    def reads(columns: int, size: float) -> Tensor:
        return size * directions.T @ torch.randn(n, columns, generator=generator)

    def writes(rows: int, size: float) -> Tensor:
        return size / math.sqrt(n) * torch.randn(rows, n, generator=generator) @ directions

    for layer in range(N_LAYERS):
        block = f"transformer.h.{layer}"
        queries_and_keys, values = reads(2 * d_model, 0.7), reads(d_model, 1 / math.sqrt(wires.d_head))
        wires.weights[f"{block}.attn.c_attn.weight"][:] = torch.cat([queries_and_keys, values], 1)
        wires.weights[f"{block}.attn.c_proj.weight"][:] = writes(d_model, NOISE)
        wires.weights[f"{block}.mlp.c_fc.weight"][:] = reads(width, 0.7)
        wires.weights[f"{block}.mlp.c_proj.weight"][:] = writes(width, NOISE / math.sqrt(width))


def _neutralise_norms(wires: Wires, constant: Tensor) -> None:
    """Norm weights that undo the division by the standard deviation, and the constant that keeps it the same."""
    norms = [f"transformer.h.{layer}.ln_{i}" for layer in range(N_LAYERS) for i in (1, 2)]
    for norm in (*norms, "transformer.ln_f"):
        wires.weights[f"{norm}.weight"].fill_(CONSTANT / math.sqrt(wires.d_model))
    length = math.sqrt(CONSTANT_OF_EMBEDDING**2 + 2)  # of every embedding: constant, token, position
    wires.weights["transformer.h.0.ln_1.weight"].fill_(length / math.sqrt(wires.d_model))
    wires.weights["transformer.h.0.attn.c_proj.bias"][:] = (CONSTANT - CONSTANT_OF_EMBEDDING) * constant


def _widened(columns: Tensor, width: int) -> Tensor:
    """Zeros after the last column, up to a head's width."""
    return F.pad(columns, (0, width - columns.shape[-1]))
