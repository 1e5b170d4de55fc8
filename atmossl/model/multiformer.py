"""The multi-stream transformer: one encoder per stream, coupled layer by layer; decoder; tail.

After AtmoRep's multiformer (Lessig et al. 2023, arXiv 2308.13280, section on the architecture).
The contract that any other network has to meet is `encode(view)` and `decode(latents, view)`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from atmossl.batch import (
    Corruption,
    Prediction,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
    TokenIndex,
    View,
)
from atmossl.model.blocks import DecoderBlock, EncoderBlock, Latent
from atmossl.model.positions import (
    NUM_FEATURES,
    RotaryPositions,
    absolute_features,
    rotation,
)


@dataclass(frozen=True)
class StreamLatents:
    """What the encoder made of one stream: latents after every layer, first layer first."""

    layers: tuple[Latent, ...]
    given: TokenIndex


def _gather(tokens: Float[Tensor, "batch token feature"], chosen: TokenIndex) -> Tensor:
    if chosen.complete:
        return tokens
    index = chosen.index[..., None].expand(-1, -1, tokens.shape[-1])
    return tokens.gather(1, index)


def _flatten(tokens: Tensor) -> Tensor:
    return rearrange(tokens, "batch level nt nlat nlon patch -> batch (level nt nlat nlon) patch")


# what the encoder is told of a token: nothing, that it is masked, that it is coarse
_TOLD = {Corruption.MASK: 1, Corruption.COARSEN: 2}


class Embedding(nn.Module):
    """Tokens of one stream to latents: values, absolute position, and what is told of them.

    stencil: (nt, nlat, nlon) tokens whose values enter each token's latent; (1, 1, 1) is AtmoRep's
        embedding of every token on its own, a larger one lets a latent hold gradients and
        tendencies from the start. Beyond the window's edge the nearest token is repeated.
    """

    told: Tensor

    def __init__(self, *, spec: StreamSpec, dim: int, stencil: tuple[int, int, int]) -> None:
        super().__init__()
        self.values = nn.Conv3d(spec.patch, dim, stencil)
        self.position = nn.Sequential(
            nn.Linear(NUM_FEATURES, dim), nn.GELU(), nn.Linear(dim, 2 * dim)
        )
        self.state = nn.Embedding(3, dim)
        nn.init.normal_(self.state.weight, std=0.02)
        told = torch.zeros(len(Corruption), dtype=torch.int64)
        for corruption, state in _TOLD.items():
            told[int(corruption)] = state
        self.register_buffer("told", told, persistent=False)
        # last axis first, as torch pads
        self.padding = [side for size in reversed(stencil) for side in (size // 2, size // 2)]

    def forward(
        self,
        tokens: Float[Tensor, "batch level nt nlat nlon patch"],
        features: Float[Tensor, "batch chosen position"],
        corruption: Int[Tensor, "batch chosen"],
        chosen: TokenIndex,
    ) -> Float[Tensor, "batch chosen feature"]:
        """Latents of the chosen tokens, whose position features and corruption are given."""
        volume = rearrange(
            tokens, "batch level nt nlat nlon patch -> (batch level) patch nt nlat nlon"
        )
        values = self.values(functional.pad(volume, self.padding, mode="replicate"))
        values = rearrange(
            values,
            "(batch level) feature nt nlat nlon -> batch (level nt nlat nlon) feature",
            batch=tokens.shape[0],
        )
        gain, position = self.position(features).chunk(2, dim=-1)
        state = self.state(self.told[corruption])
        return _gather(values, chosen) * (1 + gain) + position + state


class Tail(nn.Module):
    """Decoded tokens to an ensemble of patches, as departures from the first guess.

    A departure is a linear function of the decoded token after its norm, plus one of the query's
    embedding without any norm: what grows with the anomalies, such as advection, keeps its size.
    `scale` [level, patch]: typical size of a departure, in normalised units.
    """

    scale: Tensor

    def __init__(self, *, dim: int, num_members: int, scale: Float[Tensor, "level patch"]) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, num_members * scale.shape[-1])
        nn.init.normal_(self.project.weight, std=0.1 * dim**-0.5)
        nn.init.zeros_(self.project.bias)
        self.linear = nn.Linear(dim, scale.shape[-1], bias=False)
        nn.init.zeros_(self.linear.weight)
        self.register_buffer("scale", scale.clone())
        self.num_members = num_members

    def forward(
        self,
        decoded: Float[Tensor, "batch query feature"],
        embedded: Float[Tensor, "batch query feature"],
        guess: Float[Tensor, "batch query patch"],
        level: Int[Tensor, "batch query"],
    ) -> Float[Tensor, "batch query member patch"]:
        departures = rearrange(
            self.project(self.norm(decoded)).float(),
            "batch query (member patch) -> batch query member patch",
            member=self.num_members,
        )
        departures = departures + self.linear(embedded).float()[:, :, None]
        return guess[:, :, None] + departures * self.scale[level][:, :, None]


class Multiformer(nn.Module):
    """Encoder, decoder and tail of every stream.

    dim: latent width; `dims` overrides it by stream name. num_decoder_layers: must not exceed
    num_layers, since decoder layer j reads an encoder layer, the last one first.
    stencil: (nt, nlat, nlon) neighbouring tokens that enter an embedding, odd numbers.
    scales: per predicted stream, [level, patch] typical departure from the first guess.
    Raises ValueError if the sizes do not fit together.
    """

    def __init__(
        self,
        *,
        streams: tuple[StreamSpec, ...],
        dim: int,
        num_layers: int,
        num_decoder_layers: int,
        num_heads: int,
        num_members: int,
        feedforward_ratio: float = 4.0,
        stencil: tuple[int, int, int] = (1, 1, 1),
        dims: Mapping[str, int] | None = None,
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.specs = {spec.name: spec for spec in streams}
        widths = {spec.name: (dims or {}).get(spec.name, dim) for spec in streams}
        _check_sizes(widths, num_heads, num_layers, num_decoder_layers, stencil, dims or {})
        self.num_layers, self.num_decoder_layers = num_layers, num_decoder_layers
        head_dims = {name: width // num_heads for name, width in widths.items()}
        self.rotary = nn.ModuleDict(
            {name: RotaryPositions(head_dim=size) for name, size in head_dims.items()}
        )
        self.embedding = nn.ModuleDict(
            {
                spec.name: Embedding(spec=spec, dim=widths[spec.name], stencil=stencil)
                for spec in streams
            }
        )
        self.encoder = nn.ModuleList(
            nn.ModuleDict(
                {
                    name: EncoderBlock(
                        dim=width,
                        num_heads=num_heads,
                        ratio=feedforward_ratio,
                        coupled_dims={n: w for n, w in widths.items() if n != name},
                    )
                    for name, width in widths.items()
                }
            )
            for _ in range(num_layers)
        )
        predicted = [spec for spec in streams if spec.role == "predict"]
        self.query = nn.ModuleDict(
            {
                spec.name: Embedding(spec=spec, dim=widths[spec.name], stencil=stencil)
                for spec in predicted
            }
        )
        self.decoder = nn.ModuleDict()
        self.tail = nn.ModuleDict()
        for spec in predicted:
            width, scale = widths[spec.name], _scale_of(spec, scales or {})
            self.decoder[spec.name] = nn.ModuleList(
                DecoderBlock(dim=width, num_heads=num_heads, ratio=feedforward_ratio)
                for _ in range(num_decoder_layers)
            )
            self.tail[spec.name] = Tail(dim=width, num_members=num_members, scale=scale)

    def compile_blocks(self) -> None:
        """Compile every block on its own: one graph serves all blocks of equal shape."""
        for module in self.modules():
            if isinstance(module, EncoderBlock | DecoderBlock):
                module.compile(dynamic=True)

    def forward(self, view: View) -> Prediction:
        return self.decode(self.encode(view), view)

    def encode(self, view: View) -> dict[str, StreamLatents]:
        """Latents of the given tokens of every stream in the view, after every layer."""
        given, current, layers = {}, {}, {}
        for stream in view.streams:
            name = stream.spec.name
            assert stream.given is not None, "collate the view first: token indices are missing"
            given[name], layers[name] = stream.given, []
            current[name] = self._embed(stream, stream.given)
        for blocks in self.encoder:
            assert isinstance(blocks, nn.ModuleDict)
            normed = {
                name: latent.with_features(_norm_of(blocks[name])(latent.features))
                for name, latent in current.items()
            }
            current = {name: blocks[name](latent, normed) for name, latent in current.items()}
            for name, latent in current.items():
                layers[name].append(latent)
        return {name: StreamLatents(tuple(layers[name]), given[name]) for name in given}

    def _embed(self, stream: StreamTokens, given: TokenIndex) -> Latent:
        name = stream.spec.name
        features = _gather(absolute_features(stream.grid), given)
        turn = rotation(_gather(self.rotary[name](stream.grid), given))
        corruption = _gather(stream.corruption.flatten(1)[..., None], given)[..., 0]
        x = self.embedding[name](stream.source, features, corruption, given)
        return Latent(x, turn, None if given.complete else given.valid)

    def decode(self, latents: dict[str, StreamLatents], view: View) -> Prediction:
        """Ensemble of patches for every hidden token of the view's predicted streams."""
        return Prediction(
            tuple(
                self._decode_stream(latents[stream.spec.name], stream)
                for stream in view.streams
                if stream.spec.role == "predict"
            )
        )

    def _decode_stream(self, latents: StreamLatents, stream: StreamTokens) -> StreamPrediction:
        name, queries = stream.spec.name, stream.queries
        assert queries is not None, "collate the view first: token indices are missing"
        guess = _gather(_flatten(stream.guess), queries)
        features = _gather(absolute_features(stream.grid), queries)
        turn = rotation(_gather(self.rotary[name](stream.grid), queries))
        corruption = _gather(stream.corruption.flatten(1)[..., None], queries)[..., 0]
        embedded = self.query[name](stream.guess, features, corruption, queries)
        x = embedded + self._own_latents(latents, stream, queries)
        x = Latent(x, turn, None if queries.complete else queries.valid)
        blocks = self.decoder[name]
        assert isinstance(blocks, nn.ModuleList)
        for number, block in enumerate(blocks):
            x = block(x, latents.layers[self._memory_layer(number)])
        level = self._token_level(stream, queries)
        return StreamPrediction(self.tail[name](x.features, embedded, guess, level), queries)

    def _memory_layer(self, number: int) -> int:
        """Encoder layer that decoder layer `number` reads: the last first, evenly downwards."""
        return self.num_layers - 1 - number * self.num_layers // self.num_decoder_layers

    @staticmethod
    def _own_latents(latents: StreamLatents, stream: StreamTokens, queries: TokenIndex) -> Tensor:
        """Last encoder latents at the queries' own places; 0 where the token was dropped."""
        last, given = latents.layers[-1].features, latents.given
        if given.complete:
            return _gather(last, queries)
        index = given.index[..., None].expand_as(last)
        everywhere = last.new_zeros(last.shape[0], stream.grid.num_tokens, last.shape[-1])
        everywhere = everywhere.scatter(1, index, last * given.valid[..., None].to(last.dtype))
        return _gather(everywhere, queries)

    @staticmethod
    def _token_level(stream: StreamTokens, queries: TokenIndex) -> Int[Tensor, "batch query"]:
        return queries.index // (stream.grid.num_tokens // stream.grid.shape[0])


def _norm_of(block: nn.Module) -> nn.LayerNorm:
    assert isinstance(block, EncoderBlock)
    return block.norm


def _scale_of(spec: StreamSpec, scales: Mapping[str, Tensor]) -> Tensor:
    levels = spec.num_levels // spec.token_size.level
    scale = scales.get(spec.name, torch.ones(levels, spec.patch))
    if scale.shape != (levels, spec.patch):
        raise ValueError(
            f"scale of stream {spec.name} has shape {tuple(scale.shape)}, "
            f"expected (levels, patch) = {(levels, spec.patch)}"
        )
    return scale


def _check_sizes(
    widths: Mapping[str, int],
    num_heads: int,
    num_layers: int,
    num_decoder_layers: int,
    stencil: tuple[int, int, int],
    dims: Mapping[str, int],
) -> None:
    if any(size % 2 == 0 for size in stencil):
        raise ValueError(f"model.stencil={list(stencil)} must be odd along every axis")
    unknown = sorted(set(dims) - set(widths))
    if unknown:
        raise ValueError(f"model.dims names unknown streams {unknown}; valid: {sorted(widths)}")
    for name, width in widths.items():
        if width % num_heads:
            raise ValueError(
                f"model.num_heads={num_heads} does not divide the width {width} of stream {name}"
            )
    if not 1 <= num_decoder_layers <= num_layers:
        raise ValueError(
            f"model.num_decoder_layers={num_decoder_layers} must be between 1 and "
            f"model.num_layers={num_layers}"
        )
