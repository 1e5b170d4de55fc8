"""The multi-stream transformer: one encoder per stream, coupled layer by layer; a decoder and a
tail per predicted stream.

After AtmoRep's multiformer (Lessig et al. 2023, arXiv 2308.13280, section on the architecture).
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import (
    PRIMARY,
    Corruption,
    Prediction,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
    TokenIndex,
    View,
)
from atmossl.model.blocks import (
    Attend,
    Attention,
    BlockSizes,
    DecoderBlock,
    EncoderLayer,
    Feedforward,
    GatedConvolution,
    Steps,
    attend_by,
    rotation,
)
from atmossl.model.embedding import (
    COORDINATES,
    Coordinate,
    Embedding,
    RotaryPositions,
    Tail,
    absolute_features,
    told_features,
)
from atmossl.model.network import (
    EVALUATED_MEMBERS,
    Latent,
    Latents,
    Network,
    StreamLatents,
    TokenPlace,
    gather,
    joined,
    scatter,
)
from atmossl.model.noise import CHANNELS_PER_LENGTH, noise_field
from atmossl.settings import Positive, PositiveFloat
from atmossl.value_faults import as_written, listed


def _flatten(tokens: Tensor) -> Tensor:
    return rearrange(tokens, "batch level nt nlat nlon patch -> batch (level nt nlat nlon) patch")


_LAYER = re.compile(r"encoder\.(\d+)\.")
# Axis of a parameter over the values of a token; by the first part and the end of its name.
_PATCH_AXES = {
    ("embedding", "values.weight"): 1,
    ("embedding", "details.weight"): 1,
    ("query", "values.weight"): 1,
    ("query", "details.weight"): 1,
    ("tail", "project.weight"): 0,
    ("tail", "project.bias"): 0,
    ("tail", "linear.weight"): 0,
}


class Multiformer(Network):
    """Encoder, decoder and tail of every stream; the keywords are those of `model` in a
    configuration.

    dim: features of a latent, an even multiple of num_heads. dims: other widths, by stream.
    num_layers: of the encoder. num_decoder_layers: of the decoder, each of which reads a layer of
        the encoder. The first reads the last one, the others those below, evenly spread.
    num_heads: of attention, in every layer.
    num_members: of the ensemble; with ensemble=noise those that are drawn in training.
    feedforward_ratio: width of a feedforward layer over dim.
    attention: among which tokens: all, those of an axis in turn, those of a column in time, those
        of a box around. attention_window: (time, lat, lon) tokens of that box.
    kernel_size: tokens that a feedforward layer sees along latitude and longitude (`BlockSizes`).
    embedding_stencil: (nt, nlat, nlon) neighbouring tokens that enter an embedding, odd numbers.
    gradient_features: embed tendencies and spatial gradients as well (`Embedding`).
    ensemble: `tail` gives `num_members` fixed functions of the input, whose values in every cell
        are a distribution (AtmoRep); a member of `noise` is one draw of noise that conditions the
        decoder, one field from cell to cell, and there may be any number of them.
    noise_lengths_km: correlation lengths of that noise (`model.noise`).
    told: what the encoder is told of a token's absolute place and time (`told_features`).
    causal: every token sees its own time step and those before it alone, and a prediction what
        lies before its step, so that one pass predicts every step from those before. Streams must
        have tokens of one duration.
    scales: per stream, [level, patch] typical residual, the truth minus the first guess.

    Raises:
        ValueError: sizes that do not fit together.
    """

    ends = ("tail",)
    tells_embedding = True
    told: Tensor

    def __init__(
        self,
        *,
        streams: tuple[StreamSpec, ...],
        dim: Positive,
        dims: Mapping[str, Positive] | None = None,
        num_layers: Positive,
        num_decoder_layers: Positive,
        num_heads: Positive,
        num_members: Positive,
        feedforward_ratio: PositiveFloat = 4.0,
        attention: Attention = "full",
        attention_window: tuple[Positive, Positive, Positive] = (4, 4, 4),
        kernel_size: Positive = 1,
        embedding_stencil: tuple[Positive, Positive, Positive] = (1, 1, 1),
        gradient_features: bool = False,
        ensemble: Literal["tail", "noise"] = "tail",
        noise_lengths_km: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (),
        told: tuple[Coordinate, ...] = COORDINATES,
        causal: bool = False,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.any_member, self.num_members = ensemble == "noise", num_members
        self.noise_lengths_km, num_tails = noise_lengths_km, 1 if self.any_member else num_members
        channels = CHANNELS_PER_LENGTH * len(noise_lengths_km) if self.any_member else 0
        self.specs = {spec.name: spec for spec in streams}
        widths = {spec.name: (dims or {}).get(spec.name, dim) for spec in streams}
        _check_sizes(widths, num_heads, (*embedding_stencil, kernel_size), dims or {})
        self.widths, self.causal, self.attention = widths, causal, (attention, attention_window)
        attends = _attends(streams, attention, attention_window, causal=causal)
        sizes = BlockSizes(num_heads, feedforward_ratio, attends[0], kernel_size, *attends[1:])
        self.register_buffer("told", told_features(told), persistent=False)
        self.num_layers, self.num_decoder_layers = num_layers, num_decoder_layers
        head_dims = sorted({width // num_heads for width in widths.values()})
        scale_of = {spec.name: _scale_of(spec, scales or {}) for spec in streams}

        shared = {"stencil": embedding_stencil, "gradient_features": gradient_features}

        def embedding(spec: StreamSpec) -> Embedding:
            of_stream = {"spec": spec, "dim": widths[spec.name], "scale": scale_of[spec.name]}
            return Embedding(**shared, causal=causal, **of_stream)

        rotary = {str(size): RotaryPositions(head_dim=size) for size in head_dims}
        self.rotary = nn.ModuleDict(rotary)
        self.embedding = nn.ModuleDict({spec.name: embedding(spec) for spec in streams})
        self.encoder = nn.ModuleList(EncoderLayer(widths, sizes) for _ in range(num_layers))
        predicted = [spec for spec in streams if spec.role == "predict"]
        self.query = nn.ModuleDict({spec.name: embedding(spec) for spec in predicted})
        self.decoder, self.tail = nn.ModuleDict(), nn.ModuleDict()
        for spec in predicted:
            self.decoder[spec.name] = nn.ModuleList(
                DecoderBlock(dim=widths[spec.name], sizes=sizes, num_channels=channels)
                for _ in range(num_decoder_layers)
            )
            of_tail = {"num_members": num_tails, "scale": scale_of[spec.name]}
            self.tail[spec.name] = Tail(dim=widths[spec.name], **of_tail)
        self.absent = nn.ModuleDict(
            {s.name: nn.Linear(s.patch, widths[s.name], bias=False) for s in _gappy(streams)}
        )

    @classmethod
    def faults_of(cls, arguments: Mapping[str, Any], streams: Sequence[StreamSpec]) -> list[str]:
        stencil, kernel_size = arguments["embedding_stencil"], arguments["kernel_size"]
        attention, num_heads = arguments["attention"], arguments["num_heads"]
        faults = []
        if any(size % 2 == 0 for size in stencil):
            faults.append(
                f"model.embedding_stencil={as_written(stencil)} must be odd along every axis"
            )
        if kernel_size % 2 == 0:
            faults.append(f"model.kernel_size={kernel_size} must be odd")
        if attention in ("factorised", "windowed") and num_heads % 2:
            faults.append(
                f"model.num_heads={num_heads} must be even for model.attention={attention}: its "
                "two kinds of heads share them"
            )
        if attention == "temporal" and kernel_size == 1:
            faults.append(
                "model.attention=temporal leaves space to the convolutions of model.kernel_size, "
                "which is 1; set it to 3 or more, or choose full or factorised attention"
            )
        for stream in streams:
            width = (arguments["dims"] or {}).get(stream.name, arguments["dim"])
            if width % num_heads or (width // num_heads) % 2:
                faults.append(
                    f"model.dim={width} of stream {stream.name} must be an even multiple of "
                    f"model.num_heads={num_heads}"
                )
        if arguments["ensemble"] == "noise" and arguments["num_members"] < 2:
            faults.append(
                f"model.ensemble=noise with model.num_members={arguments['num_members']}: training "
                "compares members, so it needs at least 2"
            )
        return faults + (_causal_faults(streams, attention) if arguments["causal"] else [])

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Compile every block and tail on its own: one graph serves all blocks of equal shape.
        The second batch shows which numbers of tokens differ; then one graph serves any of them.
        Shapes that are always the same make faster kernels, and compile several times as fast."""
        for module in self.modules():
            if isinstance(module, EncoderLayer | DecoderBlock | Tail):
                module.compile(backend=backend)

    @property
    def num_encoder_layers(self) -> int:
        return self.num_layers

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        kinds = (EncoderLayer, DecoderBlock)
        return tuple(module for module in self.modules() if isinstance(module, kinds))

    @property
    def wide_parts(self) -> tuple[nn.Module, ...]:
        kinds = (Feedforward, GatedConvolution)
        return tuple(module for module in self.modules() if isinstance(module, kinds))

    def without_position(self) -> Network:
        network = copy.deepcopy(self)
        network.told.copy_(told_features(()))
        return network

    def depth(self, name: str) -> int | None:
        layer = _LAYER.match(name)
        if layer is not None:
            return self.num_layers - 1 - int(layer[1])
        return self.num_layers if name.startswith("embedding.") else None

    def patch_axis(self, name: str) -> int | None:
        part = name.split(".")[0]
        axes = (axis for (p, end), axis in _PATCH_AXES.items() if p == part and name.endswith(end))
        return next(axes, None)

    def encode(self, view: View) -> Latents:
        """The latents of every stream's encoder tokens, after every layer."""
        latents, indices, layers = {}, {}, {}
        for stream in view.streams:
            name = stream.spec.name
            assert stream.encoder_tokens is not None, (
                "collate the view first: token indices are missing"
            )
            indices[name], layers[name] = stream.encoder_tokens, []
            latents[name] = self._embed(stream, stream.encoder_tokens)
        features = {name: latent.features for name, latent in latents.items()}
        places = {name: latent.place for name, latent in latents.items()}
        for layer in self.encoder:
            features = layer(features, places)
            for name, x in features.items():
                # a view, so that the gradients of all decoder layers that read a layer are summed
                # before that of the next layer is added: sums depend on their order
                layers[name].append(Latent(x.view_as(x), places[name]))
        return {
            name: StreamLatents(tuple(layers[name]), indices[name], grid, latents[name])
            for name, grid in ((stream.spec.name, stream.grid) for stream in view.streams)
        }

    def _embed(self, stream: StreamTokens, chosen: TokenIndex) -> Latent:
        name = stream.spec.name
        features = absolute_features(stream.grid) * self.told
        x = self.embedding[name](stream.source, features, stream.corruption, stream.grid, chosen)
        if name in self.absent and stream.valid is not None:
            x = x + self.absent[name](gather(_flatten(_absent(stream)), chosen))
        return Latent(x, self._place(stream, chosen))

    def _place(self, stream: StreamTokens, chosen: TokenIndex) -> TokenPlace:
        grid = stream.grid
        turns = {
            int(width): rotation(gather(rotary(grid), chosen))
            for width, rotary in self.rotary.items()
        }
        return TokenPlace(turns, chosen, grid.shape, grid.periodic)

    def reconstruct(
        self, latents: Latents, view: View, members: Sequence[int | Tensor] | None = None
    ) -> Prediction:
        """An ensemble of patches for every hidden token of the view's predicted streams."""
        predictions = []
        for stream in _predicted(view):
            name, queries = stream.spec.name, _queries(stream)
            guess, level = gather(_flatten(stream.guess), queries), stream.query_level
            start, embedded = self._ask(latents[name], stream)
            drawn = []
            for noise in self._noise(view, stream, members):
                decoded = self._decode(name, start, latents[name], noise)
                drawn.append(self.tail[name](decoded, embedded, guess, level))
            predictions.append(StreamPrediction(joined(drawn, dim=2), queries))
        return Prediction(tuple(predictions))

    def _noise(
        self, view: View, stream: StreamTokens, members: Sequence[int | Tensor] | None
    ) -> Iterator[Float[Tensor, "batch query channel"] | None]:
        """The noise of every member at the hidden tokens. A network without noise gets a single
        None, since one pass gives all its members."""
        if not self.any_member:
            yield None
            return
        assert view.noise_seed is not None, "noise-conditioned members need View.noise_seed"
        if members is None:
            least = 0 if self.training else EVALUATED_MEMBERS
            members = range(max(self.num_members or 0, least))
        for member in members:
            noise = noise_field(stream.grid, view.noise_seed, member, self.noise_lengths_km)
            yield gather(noise, _queries(stream))

    def predict(self, latents: Latents, view: View) -> Latents:
        """The latents of every hidden token of the view's predicted streams, as wide as the
        encoder's."""
        predicted = {}
        for stream in _predicted(view):
            nothing = torch.zeros_like(stream.guess)
            blank = replace(stream, guess=nothing, source=nothing)
            name = stream.spec.name
            start, _ = self._ask(latents[name], blank)
            decoded = Latent(self._decode(name, start, latents[name], noise=None), start.place)
            predicted[name] = StreamLatents((decoded,), start.place.chosen, stream.grid)
        return predicted

    def _ask(self, latents: StreamLatents, stream: StreamTokens) -> tuple[Latent, Tensor]:
        """The decoder's input at the hidden tokens, and their embedded first guess; both are the
        same for all members."""
        name, queries = stream.spec.name, _queries(stream)
        features = absolute_features(stream.grid)
        tokens, corruption = stream.guess, stream.corruption
        at_tokens = scatter(latents.last, latents.chosen)
        if self.causal:  # what the step before shows, of which it is told nothing but that
            tokens = _step_before(stream.source)
            corruption = torch.zeros_like(corruption)
            at_tokens = _step_before(at_tokens.unflatten(1, stream.grid.shape)).flatten(1, 4)
        embedded = self.query[name](tokens, features, corruption, stream.grid, queries)
        at_tokens = gather(at_tokens, queries)
        return Latent(embedded + at_tokens, self._place(stream, queries)), embedded

    def _decode(
        self, name: str, start: Latent, latents: StreamLatents, noise: Tensor | None
    ) -> Float[Tensor, "batch query feature"]:
        """The decoder's last latents of one stream's hidden tokens."""
        blocks, x = self.decoder[name], start.features
        assert isinstance(blocks, nn.ModuleList)
        for number, block in enumerate(blocks):
            memory = latents.layers[self._memory_layer(number)]
            x = block(x, memory.features, start.place, memory.place, noise)
        return x

    def _memory_layer(self, number: int) -> int:
        """The encoder layer that decoder layer `number` reads: the last one first, then evenly
        downwards."""
        return self.num_layers - 1 - number * self.num_layers // self.num_decoder_layers


def _step_before(
    tokens: Float[Tensor, "batch level nt nlat nlon feature"],
) -> Float[Tensor, "batch level nt nlat nlon feature"]:
    """For every token what lies one time step before it; 0 at the first step."""
    return functional.pad(tokens[:, :, :-1], (0, 0, 0, 0, 0, 0, 1, 0))


def _attends(
    streams: Sequence[StreamSpec],
    attention: Attention,
    window: tuple[int, int, int],
    *,
    causal: bool,
) -> tuple[Attend, ...]:
    """The attention functions of encoders, among the queries of decoders, and from these queries
    to an encoder."""
    for fault in _causal_faults(streams, attention) if causal else ():
        raise ValueError(fault)
    kinds: tuple[Steps, ...] = ("until", "same", "before") if causal else ("any",) * 3
    return tuple(attend_by(attention, window, steps) for steps in kinds)


def _causal_faults(streams: Sequence[StreamSpec], attention: Attention) -> list[str]:
    """What keeps tokens from seeing their own and earlier steps alone: an attention, or streams
    whose steps differ."""
    faults = []
    if attention == "windowed":
        faults.append(
            "model.causal=true with model.attention=windowed, which sees later steps; valid: full, "
            "factorised, temporal"
        )
    steps = {spec.name: spec.token_size.time for spec in streams}
    if len(set(steps.values())) > 1 or any(spec.data != PRIMARY for spec in streams):
        faults.append(
            f"model.causal=true needs streams of one store whose tokens have one duration; "
            f"stream.*.token_size.time is {as_written(steps)}"
        )
    return faults


def _predicted(view: View) -> list[StreamTokens]:
    return [stream for stream in view.streams if stream.spec.role == "predict"]


def _queries(stream: StreamTokens) -> TokenIndex:
    assert stream.queries is not None, "collate the view first: token indices are missing"
    return stream.queries


def _gappy(streams: tuple[StreamSpec, ...]) -> list[StreamSpec]:
    return [spec for spec in streams if spec.missing == "mask"]


def _absent(stream: StreamTokens) -> Tensor:
    """1 where a shown token [batch level nt nlat nlon patch] has no observed value."""
    assert stream.valid is not None
    shown = (stream.corruption != Corruption.MASK) & (stream.corruption != Corruption.DROP)
    return (~stream.valid & shown[..., None]).to(stream.source)


def _scale_of(spec: StreamSpec, scales: Mapping[str, Tensor]) -> Tensor:
    levels = spec.num_levels // spec.token_size.level
    scale = scales.get(spec.name, torch.ones(levels, spec.patch))
    if scale.shape != (levels, spec.patch):
        raise ValueError(
            f"scale of stream {spec.name} has shape {tuple(scale.shape)}, "
            f"expected (levels, patch) = ({levels}, {spec.patch})"
        )
    return scale


def _check_sizes(
    widths: Mapping[str, int], num_heads: int, odd: tuple[int, ...], dims: Mapping[str, int]
) -> None:
    if any(size % 2 == 0 for size in odd):
        raise ValueError(
            f"model.embedding_stencil={as_written(odd[:3])} and model.kernel_size={odd[3]} must "
            "be odd"
        )
    unknown = sorted(set(dims) - set(widths))
    if unknown:
        raise ValueError(
            f"model.dims names unknown streams {listed(unknown)}; valid: {listed(sorted(widths))}"
        )
    for name, width in widths.items():
        if width % num_heads:
            raise ValueError(
                f"model.num_heads={num_heads} does not divide the width {width} of stream {name}"
            )
