"""The parts of a causal language model, independent of its architecture family.

Adapters, one function per architecture family, build a `ModelView`; nothing else depends on module
names. Of a block whose parts are unknown, a `CoarseBlock`, the residual stream is shown, and what
its sublayers add to it if they are known.
`without_unread_parameters` makes such a block of one with a parameter that no part includes, such
as that of a shared expert, a gate or an adapter. Its results would be missing from every sum.
Parameters of activation functions and of parts that a forward pass never calls add nothing of their
own.

Row convention: a linear map is `y = x W + b` with `W: [d_in, d_out]`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import nn
from transformers import PreTrainedModel

from januslens_server.capture import LinearOverlay, LowRank, Overlay, Rotation, Tap
from januslens_server.capture.hooks import rows
from januslens_server.errors import shortlist
from januslens_server.graph.weights import Finish, HeadMap, HeadNorm, Scoring
from januslens_server.lens.head import LensHead
from januslens_server.models.expert_overlays import ExpertChanges, ExpertOverlay
from januslens_server.models.experts import ExpertMatrices, Experts
from januslens_server.models.matrices import Linear, MatrixKey, ModuleMap
from januslens_server.results import (
    LayerLevel,
    Level,
    LinearMap,
    MatrixKind,
    ModelFacts,
    NodeKind,
    SublayerKind,
)

# Tokens of the pass that shows which parts of a block are called.
PROMPT_LENGTH = 6

# The module of transformers that defines activation functions, some of them with parameters.
ACTIVATIONS = "transformers.activations"


@dataclass(frozen=True)
class AttentionGate:
    """A gate that multiplies the heads' results before W_O.

    It is `function` of what `linear` returns: a number for each head, or for each dimension.
    """

    linear: Linear
    function: Callable[[torch.Tensor], torch.Tensor]

    def __call__(self, tapped: torch.Tensor, n_heads: int) -> torch.Tensor:
        """Return the gate `[pos, n_heads, d_head or 1]`, given what `linear` returned."""
        gate: torch.Tensor = self.function(rows(tapped).float()).unflatten(-1, (n_heads, -1))
        return gate


@dataclass(frozen=True)
class LatentAttention:
    """Latent vectors between the residual stream and queries, keys and values (DeepSeek).

    `key_down` computes the latent vector of keys and values, `query_down` that of queries or is
    None. Each is normed, then read by the maps of `Attention`, of which `key` gives the dimensions
    of a key that are not rotated. `rotated_key` gives the others, the same for all heads.
    """

    key_down: Linear
    rotated_key: Linear
    key_norm: HeadNorm
    query_down: Linear | None = None
    query_norm: HeadNorm | None = None

    @property
    def linears(self) -> list[Linear]:
        """The linear maps that are not those of `Attention`."""
        queries = [] if self.query_down is None else [self.query_down]
        return [self.key_down, self.rotated_key, *queries]

    @property
    def taps(self) -> dict[str, Tap]:
        """Taps that `complete` needs, by name."""
        taps = {"key_latent": self.key_down.output, "rotated_key": self.rotated_key.output}
        return taps if self.query_down is None else taps | {"query_latent": self.query_down.output}

    def complete(self, named: dict[str, torch.Tensor]) -> None:
        """Replace the tensors of `taps` by whole keys and the scales of both norms.

        `named` has `query` `[pos, n_heads, d_head]` and the part of `key` that is not rotated.
        """
        key, rotated = named["key"], named.pop("rotated_key")
        shared = rotated[:, None].expand(-1, key.shape[1], -1)
        named["key"] = torch.cat([key, shared], dim=-1)
        scale = self.key_norm.inverse_scale(named.pop("key_latent").float())
        fixed = torch.ones_like(scale).expand(-1, rotated.shape[-1])
        named["key_scale"] = torch.cat([scale.expand(-1, key.shape[-1]), fixed], dim=-1)
        if self.query_norm is not None:
            latent = named.pop("query_latent").float()
            named["query_scale"] = self.query_norm.inverse_scale(latent)

    def query(self, up: Linear) -> torch.Tensor:
        """Return W_Q `[d_model, features]` up to the scale of the norm, given the second map."""
        if self.query_down is None or self.query_norm is None:
            return up.weight.float()
        return self.query_down.weight.float() * self.query_norm.weight @ up.weight.float()

    def key(self, up: Linear, n_heads: int) -> torch.Tensor:
        """Return W_K `[d_model, n_heads, d_head]`, likewise."""
        own = self.key_down.weight.float() * self.key_norm.weight @ up.weight.float()
        shared = self.rotated_key.weight.float()[:, None].expand(-1, n_heads, -1)
        return torch.cat([own.unflatten(1, (n_heads, -1)), shared], dim=-1)


@dataclass(frozen=True)
class Attention:
    """The attention of one block.

    `rotation` returns the rotary matrices for a prompt's length. `query_map` and `key_map` are
    applied between the linear maps and the rotation; `query_norm` and `key_norm` are the taps of
    their norms' outputs, `value_norm` that of a norm of each head's values (Gemma 4), whose input
    may be the keys' map. `value_map` is applied to values. `finish` is applied to the result
    before it is added to the residual; `added` is the tap of a post-norm's output. A `gate`
    multiplies what the heads pass to `output`. With `latent` vectors, queries, keys and values are
    computed from those. `chosen` is the tap of the sources `[batch, pos, k]` that an indexer chose
    for each position (DeepSeek V3.2), in this block or in a lower one; positions attend to no
    others.
    """

    query: Linear
    key: Linear
    value: Linear
    output: Linear
    n_heads: int
    n_kv_heads: int
    scoring: Scoring
    rotation: Callable[[int], Rotation] | None = None
    query_map: HeadMap = field(default_factory=HeadMap)
    key_map: HeadMap = field(default_factory=HeadMap)
    query_norm: Tap | None = None
    key_norm: Tap | None = None
    value_norm: Tap | None = None
    value_map: HeadMap = field(default_factory=HeadMap)
    gate: AttentionGate | None = None
    latent: LatentAttention | None = None
    chosen: Tap | None = None
    finish: Finish | None = None
    added: Tap | None = None

    @property
    def input(self) -> Tap:
        """Tap of what attention reads `[batch, pos, d_model]`."""
        return self.query.input if self.latent is None else self.latent.key_down.input

    @property
    def matrices(self) -> dict[MatrixKind, Linear]:
        """Weight matrices by kind; behind latent vectors, only that of the output.

        If keys and values have one map, it is K.
        """
        if self.latent is not None:
            return {MatrixKind.O: self.output}
        found = {
            MatrixKind.Q: self.query,
            MatrixKind.K: self.key,
            MatrixKind.V: self.value,
            MatrixKind.O: self.output,
        }
        if self.value == self.key:
            del found[MatrixKind.V]
        return found

    @property
    def linears(self) -> list[Linear]:
        """All linear maps."""
        gate = [] if self.gate is None else [self.gate.linear]
        latent = [] if self.latent is None else self.latent.linears
        return [self.query, self.key, self.value, self.output, *gate, *latent]


@dataclass(frozen=True)
class Mlp:
    """The MLP of one block. In a gated MLP, `ff1` is the gate and `up` is set.

    `finish` and `added` are as in `Attention`.
    """

    ff1: Linear
    ff2: Linear
    up: Linear | None = None
    finish: Finish | None = None
    added: Tap | None = None

    @property
    def taps(self) -> dict[str, Tap]:
        """Taps that a forward pass captures, by field name of `LayerActivations`."""
        return {
            "mlp_input": self.ff1.input,
            "neurons": self.ff2.input,
            "mlp_sum": self.ff2.output,
        }

    @property
    def n_neurons(self) -> int:
        """Number of neurons."""
        return self.ff2.d_in

    @property
    def matrices(self) -> dict[MatrixKind, Linear]:
        """Weight matrices by kind."""
        if self.up is None:
            return {MatrixKind.FF1: self.ff1, MatrixKind.FF2: self.ff2}
        return {MatrixKind.GATE: self.ff1, MatrixKind.UP: self.up, MatrixKind.FF2: self.ff2}


@dataclass(frozen=True)
class Block:
    """One transformer block.

    A block has attention and an MLP, or one of them (Nemotron-H). `residual_mid` is the tap of the
    residual between them, or None if they are parallel or one is absent. Without a pre-norm, a
    sublayer reads the residual itself. `beside` are sublayers that are neither attention nor MLP,
    shown as one node: all of them read the block's input, as attention does (Falcon-H1), or a
    residual after the MLP (Gemma 4). The block returns `multiplier` times the sum of its input and
    its parts (Gemma 4). `maps` are the linear maps by the names of their modules, in the order of
    the pass.
    """

    module: nn.Module
    attention: Attention | None
    mlp: Mlp | Experts | None
    residual_mid: Tap | None
    attention_prenorm: bool = True
    mlp_prenorm: bool = True
    beside: tuple[Sublayer, ...] = ()
    multiplier: float = 1.0
    maps: Mapping[str, ModuleMap] = field(default_factory=dict, compare=False)

    @cached_property
    def matrices(self) -> dict[MatrixKind, Linear | ExpertMatrices]:
        """Weight matrices of attention and MLP by kind."""
        found: dict[MatrixKind, Linear | ExpertMatrices] = {}
        for sublayer in (self.attention, self.mlp):
            found |= {} if sublayer is None else sublayer.matrices
        return found


@dataclass(frozen=True)
class MixerHeads:
    """The heads of linear attention or a state space, whose results its output map reads.

    `output` is the map. Its input, after the mixer's gate and norm, has the results of `count`
    heads side by side.
    """

    output: Linear
    count: int


@dataclass(frozen=True)
class Sublayer:
    """A sublayer of a block without known parts; `name` is that of its module in the block.

    It adds `multiplier` times the tensor of `output` `[batch, pos, d_model]` to the residual
    stream. `after_mid` says whether it reads `CoarseBlock.residual_mid`. `maps` are linear maps of
    a sublayer that is no module of its own. `heads` are None if the tensor of `output` is not the
    result of a map that reads heads.
    """

    name: str
    kind: SublayerKind
    output: Tap
    multiplier: float = 1.0
    after_mid: bool = False
    maps: tuple[Linear, ...] = ()
    heads: MixerHeads | None = None

    @property
    def node(self) -> NodeKind:
        """The kind of the node that shows what the sublayer adds."""
        if self.kind is SublayerKind.ATTENTION:
            return NodeKind.ATTENTION_OUTPUT
        if self.kind in {SublayerKind.MLP, SublayerKind.EXPERTS}:
            return NodeKind.MLP_OUTPUT
        return NodeKind.MIXER_OUTPUT


@dataclass(frozen=True)
class CoarseBlock:
    """A block without known parts: the residual stream before and after it is shown.

    `reason` says which part of the block is unknown. `sublayers` are in the order of the pass;
    without any, nothing between the block's input and output is shown. `residual_mid` is the tap
    of the residual that the last of them read, or None if all read the block's input.
    `multiplier` and `maps` are as in `Block`.
    """

    module: nn.Module
    reason: str
    sublayers: tuple[Sublayer, ...] = ()
    residual_mid: Tap | None = None
    multiplier: float = 1.0
    maps: Mapping[str, ModuleMap] = field(default_factory=dict, compare=False)

    def adding(self, kind: NodeKind) -> list[Sublayer]:
        """Return the sublayers that a kind of node shows together."""
        return [sublayer for sublayer in self.sublayers if sublayer.node is kind]

    @property
    def mixer(self) -> Sublayer | None:
        """The sublayer that MIXER_OUTPUT shows, if it is the only one and its heads are known."""
        mixers = self.adding(NodeKind.MIXER_OUTPUT)
        return mixers[0] if len(mixers) == 1 and mixers[0].heads is not None else None

    @property
    def matrices(self) -> dict[MatrixKind, Linear | ExpertMatrices]:
        """Weight matrices by kind: none is known."""
        return {}


@dataclass(frozen=True)
class ModelView:
    """A whole model: its input embedding, blocks, lens and sizes.

    `normed` is the tap of the final norm's output; None means the output head's input.
    `cache_argument` is the argument of the model's `forward` that continues a sequence; None means
    that every token needs a pass over the whole sequence.
    """

    embedding: nn.Module
    blocks: tuple[Block | CoarseBlock, ...]
    lens: LensHead
    facts: ModelFacts
    normed: Tap | None = None
    cache_argument: str | None = "past_key_values"

    @property
    def known(self) -> dict[int, Block]:
        """The blocks whose parts are known, by layer."""
        return {i: block for i, block in enumerate(self.blocks) if isinstance(block, Block)}

    @property
    def n_neurons(self) -> int:
        """Number of neurons of the widest known layer, over all of its experts."""
        known = [block.mlp for block in self.known.values()]
        return max((mlp.n_neurons for mlp in known if mlp is not None), default=0)

    def parts(self, layer: int) -> Block:
        """Return the parts of a layer. Raises `KeyError` if they are unknown."""
        block = self.blocks[layer]
        if isinstance(block, CoarseBlock):
            raise KeyError(layer)
        return block

    def attention(self, layer: int) -> Attention:
        """Return the attention of a layer. Raises `KeyError` if it is unknown or absent."""
        found = self.parts(layer).attention
        if found is None:
            raise KeyError(layer)
        return found

    def mlp(self, layer: int) -> Mlp | Experts:
        """Return the MLP of a layer. Raises `KeyError` if it is unknown or absent."""
        found = self.parts(layer).mlp
        if found is None:
            raise KeyError(layer)
        return found

    def matrix(self, key: MatrixKey) -> Linear | ExpertMatrices:
        """Return the map that contains a matrix: those of routed experts share one parameter."""
        layer, kind, expert = key
        matrix = self.source(layer, kind)
        if isinstance(matrix, ExpertMatrices):
            return matrix.linear(expert) or matrix
        return matrix

    def source(self, layer: int, kind: MatrixKind | str) -> Linear | ExpertMatrices:
        """Return a matrix by its kind or by the name of its module, or those of all experts."""
        block = self.blocks[layer]
        return block.maps[kind].linear if isinstance(kind, str) else block.matrices[kind]

    def mixer_heads(self, layer: int) -> MixerHeads | None:
        """Return the heads that MIXER_HEAD shows of a layer, None if there are none."""
        block = self.blocks[layer]
        mixer = block.mixer if isinstance(block, CoarseBlock) else None
        return None if mixer is None else mixer.heads

    def level(self, layer: int) -> LayerLevel:
        """Return the level of a layer, and why it is not PARTS."""
        block = self.blocks[layer]
        if isinstance(block, CoarseBlock):
            level = Level.SUBLAYERS if block.sublayers else Level.STREAM
            sublayers = tuple((each.name, each.kind) for each in block.sublayers)
            return LayerLevel(layer, level, block.reason, sublayers)
        return LayerLevel(layer, Level.PARTS)

    @property
    def levels(self) -> tuple[LayerLevel, ...]:
        """The level of every layer, with its linear maps."""
        return tuple(
            self.level(layer)._replace(
                linear_maps=tuple(
                    LinearMap(name, found.linear.d_in, found.linear.d_out)
                    for name, found in block.maps.items()
                )
            )
            for layer, block in enumerate(self.blocks)
        )

    def limited(self, layers: Iterable[int]) -> tuple[LayerLevel, ...]:
        """Return the levels of those of the `layers` whose parts are not all shown."""
        levels = (self.level(layer) for layer in layers)
        return tuple(found for found in levels if found.level is not Level.PARTS)

    def coarsened(self, reasons: Mapping[int, str]) -> ModelView:
        """Return a view without the parts and sublayers of some layers.

        `reasons` has the reason for each of those layers, which replaces the one that its parts
        are unknown for, or is added to it.
        """

        def coarse_block(block: Block | CoarseBlock, reason: str) -> CoarseBlock:
            if isinstance(block, CoarseBlock):
                reason = f"{block.reason}; {reason}" if block.sublayers else block.reason
            return CoarseBlock(block.module, reason, maps=block.maps)

        blocks = tuple(
            coarse_block(block, reasons[i]) if i in reasons else block
            for i, block in enumerate(self.blocks)
        )
        coarse = replace(self, blocks=blocks)
        return coarse if coarse.known else replace(coarse, facts=without_parts(self.facts))

    def overlays(self, changes: Mapping[MatrixKey, LowRank]) -> list[Overlay]:
        """Overlays that apply changes of matrices.

        There is one for each linear map, and one for all routed experts of a layer.
        """
        overlays: list[Overlay] = []
        of_experts: dict[int, ExpertChanges] = {}
        for key, change in changes.items():
            matrix, (layer, kind, expert) = self.matrix(key), key
            if isinstance(matrix, ExpertMatrices) and isinstance(kind, MatrixKind):
                own = of_experts.setdefault(layer, {}).setdefault(matrix.number(expert), {})
                own[kind] = change
            elif isinstance(matrix, Linear):
                overlays.append(LinearOverlay(matrix.module, matrix.columns, change))
        for layer, expert_changes in of_experts.items():
            block = self.blocks[layer]
            if isinstance(block, Block) and isinstance(block.mlp, Experts):
                overlays.append(ExpertOverlay(layer, block.mlp, expert_changes))
        return overlays


def without_parts(facts: ModelFacts) -> ModelFacts:
    """Return the sizes of a model none of whose layers shows its parts."""
    return replace(facts, n_heads=0, n_kv_heads=0, d_head=0, d_mlp=0, n_experts=0)


def without_unread_parameters(network: PreTrainedModel, view: ModelView) -> ModelView:
    """Return a view without the parts of blocks that have parameters outside of all parts.

    Runs a short forward pass if there are any, to see which parts of a block are never called.
    """
    unread = {i: found for i, block in view.known.items() if (found := list(_unread(block)))}
    if not unread:
        return view
    unused = _unused_parts(network, view)
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    reasons: dict[int, str] = {}
    for layer, found in unread.items():
        used = [(name, p) for name, p in found if id(p) not in unused]
        if used:
            listed = shortlist([names.get(id(p), name) for name, p in used])
            reasons[layer] = (
                f"unknown parameters: {listed}; expected those of attention, MLP and norms"
            )
    return view.coarsened(reasons) if reasons else view


@torch.inference_mode()
def _unused_parts(network: PreTrainedModel, view: ModelView) -> set[int]:
    """Return the ids of parameters in children of blocks that a forward pass never calls.

    For example, a decoder without an encoder never calls its cross-attention. A skipped module
    inside a child that does run, such as an expert that no token is routed to, is not unused.
    """
    children = [child for block in view.blocks for child in block.module.children()]
    called: set[nn.Module] = set()
    with ExitStack() as hooks:
        for child in children:
            for module in child.modules():
                handle = module.register_forward_pre_hook(
                    lambda _module, _args, child=child: called.add(child)
                )
                hooks.callback(handle.remove)
        device = network.device if network.device.type != "meta" else None  # offloaded: it is moved
        ids = torch.arange(view.facts.vocab_size, device=device)[None, :PROMPT_LENGTH]
        network(input_ids=ids, use_cache=False)
    idle = [child for child in children if child not in called]
    return {id(parameter) for child in idle for parameter in child.parameters()}


def _unread(block: Block) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the block's parameters, with their names, that no part of it includes."""
    modules = [block.module.get_submodule(sublayer.name) for sublayer in block.beside]
    if block.attention is not None and block.attention.chosen is not None:
        modules.append(block.attention.chosen.module)
    shown = {parameter for module in modules for parameter in module.parameters()}
    matrices = [m for m in block.matrices.values() if isinstance(m, Linear)]
    matrices += [] if block.attention is None else block.attention.linears
    matrices += [each for sublayer in block.beside for each in sublayer.maps]
    experts = block.mlp if isinstance(block.mlp, Experts) else None
    matrices += [] if experts is None else experts.linears
    whole = {id(m.module) for m in matrices if _covered(m, matrices)}
    for path, module in block.module.named_modules():
        if id(module) in whole or _is_norm(module) or _is_activation(module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            full = f"{path}.{name}".lstrip(".")
            if parameter in shown:
                continue
            scoring = None if block.attention is None else block.attention.scoring
            if name == "sinks" and scoring is not None and scoring.sinks is not None:
                continue
            if experts is not None and _of_experts(experts, module, name, parameter):
                continue
            yield full, parameter


def _covered(matrix: Linear, matrices: list[Linear]) -> bool:
    """Whether the maps of a fused module cover all of its columns."""
    parts = [m.columns for m in matrices if m.module is matrix.module]
    if None in parts:
        return True
    weight = matrix.module.get_parameter("weight")
    width = weight.shape[1 if matrix.stored_as_rows else 0]
    return len({column for part in parts for column in part or ()}) == width


def _of_experts(experts: Experts, module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter belongs to the experts' stacked matrices or to their router.

    Parameters outside of a router that belong to it are inside the MLP's module and have one row
    or number per expert.
    """
    if module is experts.module:
        return name.removesuffix("_bias") in {experts.ff1_name, "down_proj"}
    if experts.router is not None and any(module is own for own in experts.router.modules()):
        return True
    inside = any(module is other for other in experts.block.modules())
    return inside and parameter.shape[0] == experts.count and parameter.dim() <= 2


def _is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation function."""
    return type(module).__module__ == ACTIVATIONS or isinstance(module, nn.PReLU)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm. A norm over heads has a row of weights for each head."""
    return "norm" in type(module).__name__.lower() and not list(module.children())
