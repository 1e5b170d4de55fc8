"""AtmoRep's published network (Lessig et al. 2023, arXiv 2308.13280), quirks included.

Every field has an encoder; in each layer some heads attend to the coupled fields. Predicted fields
have a decoder, whose layers attend to the encoder's outputs, and a tail of several members. The
published weights were trained with some oddities of the public code, so they are kept here and
named where they stand. `atmossl.model.atmorep_files` reads settings and weights.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from atmossl.model.blocks import merge_heads
from atmossl.model.network import Linear, linear


@dataclass(frozen=True)
class AtmoRepField:
    """One field of the network: the width of its latents, its coupled fields in their order, its
    model levels, and its window in tokens and points, each (time, lat, lon). local: whether it was
    normalised by statistics of every grid point rather than of the globe."""

    name: str
    width: int
    coupled: tuple[str, ...]
    levels: tuple[int, ...]
    num_tokens: tuple[int, int, int]
    token_size: tuple[int, int, int]
    local: bool = False

    @property
    def values_in_token(self) -> int:
        return math.prod(self.token_size)


@dataclass(frozen=True)
class AtmoRepSettings:
    """The settings that the network is built from.

    info_entries: numbers that describe a token; info_width: latent channels that they become.
        normed: whether encoder layers have norms. normed_heads: whether encoder heads norm queries
        and keys; decoder_normed_heads: whether decoder heads do. cross_rate: encoder layers that
        one decoder layer steps back; cross_heads: heads of a decoder layer that attend to the
        encoder.
    """

    fields: tuple[AtmoRepField, ...]
    predicted: tuple[str, ...]
    info_entries: int
    info_width: int
    encoder_layers: int
    encoder_heads: int
    encoder_mlp_layers: int
    decoder_layers: int
    decoder_heads: int
    decoder_mlp_layers: int
    cross_heads: int
    cross_rate: float
    members: int
    tail_layers: int
    normed: bool = True
    normed_heads: bool = False
    decoder_normed_heads: bool = True

    def field(self, name: str) -> AtmoRepField:
        return next(field for field in self.fields if field.name == name)

    def encoder_layer_read_by(self, decoder_layer: int) -> int:
        """Index of the encoder layer whose output a decoder layer attends to."""
        return self.encoder_layers - 1 - int(self.cross_rate * decoder_layer)


@dataclass(frozen=True)
class AtmoRepInput:
    """One field as the network takes it: normalised, with masked values already replaced."""

    values: Float[Tensor, "batch level nt nlat nlon time lat lon"]
    token_info: Float[Tensor, "batch level token entry"]


@dataclass(frozen=True)
class AtmoRepOutput:
    """Members of all tokens of one predicted field."""

    members: Float[Tensor, "batch level token member value"]

    def of_tokens(self, index: Mapping[int, Tensor]) -> Float[Tensor, "hidden member value"]:
        """The members of chosen tokens, level after level. index: for each level the positions
        of tokens among the tokens of all samples of the batch."""
        by_level = rearrange(
            self.members, "batch level token member value -> level (batch token) member value"
        )
        return torch.cat([by_level[level][index[level]] for level in sorted(index)])


def positions(
    field: AtmoRepField, device: torch.device | None = None
) -> Float[Tensor, "level token width"]:
    """The position encoding that is added to the latents of every token, by the indices of its
    level, time and place.

    The row of a token is its place in the plane divided by the number of *rows*: wrong unless there
    are as many rows as columns, but the published weights were trained with it.
    """
    steps, rows, columns = field.num_tokens
    place = torch.arange(rows * columns, device=device)
    row, column = place // rows, place % columns
    half = field.width // 2
    frequency = 2 * math.pi * (2 * torch.arange(half, device=device)) / field.width
    level = torch.arange(len(field.levels), device=device)
    step = torch.arange(steps, device=device)
    sines = 0.5 * torch.sin(8 * row[:, None] * frequency)  # [place half]
    sines = sines + torch.sin(step[:, None] * frequency)[:, None]  # [time place half]
    cosines = 0.5 * torch.cos(8 * column[:, None] * frequency)
    cosines = cosines + torch.cos(level[:, None] * frequency)[:, None]  # [level place half]
    shape = (len(field.levels), steps, len(place), half)
    both = torch.stack([sines[None].expand(shape), cosines[:, None].expand(shape)], dim=-1)
    return rearrange(both, "level time place half two -> level (time place) (half two)")


class Perceptron(nn.Module):
    """Residual layers of linear maps and GELU; the last map has a GELU, too."""

    def __init__(self, *, width: int, num_layers: int, normed: bool = True) -> None:
        super().__init__()
        widths = [width, *[2 * width] * (num_layers - 1), width]
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(Linear(before, after) for before, after in pairs)
        self.normed = normed

    def forward(self, x: Float[Tensor, "batch token width"]) -> Float[Tensor, "batch token width"]:
        hidden = _norm(x) if self.normed else x
        for layer in self.layers:
            hidden = F.gelu(layer(hidden))
        return x + hidden


class FieldAttention(nn.Module):
    """Attention of one field to itself and, with one head each, to its coupled fields. widths: of
    the coupled fields.

    widths: of the coupled fields.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        widths: tuple[int, ...],
        normed: bool,
        normed_heads: bool,
    ) -> None:
        super().__init__()
        self.num_heads, self.normed, self.normed_heads = num_heads, normed, normed_heads
        size = width // num_heads
        self.own = Linear(width, 3 * num_heads * size, bias=False)
        self.queries = Linear(width, len(widths) * size, bias=False) if widths else None
        self.coupled = nn.ModuleList(Linear(other, 2 * size, bias=False) for other in widths)
        self.out = Linear((num_heads + len(widths)) * size, width, bias=False)

    def forward(
        self, x: Float[Tensor, "batch token width"], other_fields: list[Tensor]
    ) -> Float[Tensor, "batch token width"]:
        parts = self.projected(x, other_fields)
        attended = [merge_heads(F.scaled_dot_product_attention(*part)) for part in parts]
        return x + self.out(torch.cat(attended, dim=-1))

    def projected(
        self, x: Float[Tensor, "batch token width"], other_fields: list[Tensor]
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Queries, keys and values [batch head token feature] of the field itself, then of every
        coupled field."""
        normed = _norm(x) if self.normed else x
        query, key, value = _heads(self.own(normed), 3, self.num_heads)
        parts = [(self._normed_head(query), self._normed_head(key), value)]
        if self.queries is not None:
            queries = _heads(self.queries(normed), 1, len(other_fields))[0].split(1, dim=1)
            for query, project, other in zip(queries, self.coupled, other_fields, strict=True):
                key, value = _heads(project(_norm(other) if self.normed else other), 2, 1)
                # the query is not normed: so in the public code
                parts.append((query, self._normed_head(key), value))
        return parts

    def _normed_head(self, x: Tensor) -> Tensor:
        return _norm(x) if self.normed_heads else x


class DecoderAttention(nn.Module):
    """Attention of one field to itself and to a layer of its encoder, by separate heads."""

    def __init__(self, *, width: int, num_heads: int, cross_heads: int, normed_heads: bool) -> None:
        super().__init__()
        self.self_heads, self.cross_heads = num_heads - cross_heads, cross_heads
        size = width // num_heads
        self.own = (
            Linear(width, 3 * self.self_heads * size, bias=False) if self.self_heads else None
        )
        self.queries = Linear(width, cross_heads * size, bias=False)
        self.encoded = Linear(width, 2 * cross_heads * size, bias=False)
        self.query_norm = nn.LayerNorm(size) if normed_heads else nn.Identity()
        self.key_norm = nn.LayerNorm(size) if normed_heads else nn.Identity()
        self.out = Linear(num_heads * size, width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch token width"],
        encoded: Float[Tensor, "batch token width"],
        chosen: Int[Tensor, "batch query"] | None = None,
    ) -> Float[Tensor, "batch query width"]:
        """chosen: the tokens whose latents are wanted, None for all. They attend to all tokens."""
        normed, keys_of_encoder = _norm(x), _norm(encoded)
        outputs = []
        if self.own is not None:
            query, key, value = _heads(self.own(normed), 3, self.self_heads)
            if chosen is not None:
                size = (-1, query.shape[1], -1, query.shape[3])
                query = query.gather(2, chosen[:, None, :, None].expand(size))
            outputs.append(self._attend(query, key, value))
        x, normed = picked(x, chosen), picked(normed, chosen)
        (query,) = _heads(self.queries(normed), 1, self.cross_heads)
        key, value = _heads(self.encoded(keys_of_encoder), 2, self.cross_heads)
        outputs.append(self._attend(query, key, value))
        return x + self.out(torch.cat(outputs, dim=-1))

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key = self.query_norm(query), self.key_norm(key)
        return merge_heads(F.scaled_dot_product_attention(query, key, value))


class Tail(nn.Module):
    """Members of a token's values from its latents: each has a norm and linear maps of its own,
    stacked along the first axis."""

    def __init__(self, *, width: int, num_values: int, num_layers: int, members: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(members, width))
        self.shift = nn.Parameter(torch.zeros(members, width))
        widths = [width] * (num_layers + 1) + [num_values]
        sizes = list(zip(widths[:-1], widths[1:], strict=True))
        self.weights = nn.ParameterList(
            torch.randn(members, after, before) / math.sqrt(before) for before, after in sizes
        )
        self.biases = nn.ParameterList(torch.zeros(members, after) for _, after in sizes)

    def forward(
        self, x: Float[Tensor, "batch token width"]
    ) -> Float[Tensor, "batch token member value"]:
        # scale and shift of the norm go into the first map, so that all members share one product
        # with the normed latents: W (scale x + shift) + b = (W scale) x + (W shift + b)
        weight = self.weights[0] * self.scale[:, None]
        bias = self.biases[0] + (self.weights[0] * self.shift[:, None]).sum(dim=-1)
        hidden = linear(_norm(x), weight.flatten(0, 1), bias.flatten())
        hidden = hidden.unflatten(-1, bias.shape)
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            hidden = torch.einsum("btmi,moi->btmo", F.gelu(hidden), weight) + bias
        return hidden.float()  # losses need more digits than half precision has


class FieldEncoder(nn.Module):
    """The embedding and the encoder layers of one field. The layers run in step with those of
    coupled fields."""

    def __init__(self, settings: AtmoRepSettings, field: AtmoRepField) -> None:
        super().__init__()
        self.embed = Linear(field.values_in_token, field.width - settings.info_width)
        self.embed_info = Linear(settings.info_entries, settings.info_width)
        self.attentions = nn.ModuleList(
            FieldAttention(
                width=field.width,
                num_heads=settings.encoder_heads,
                widths=tuple(settings.field(name).width for name in field.coupled),
                normed=settings.normed,
                normed_heads=settings.normed_heads,
            )
            for _ in range(settings.encoder_layers)
        )
        self.perceptrons = nn.ModuleList(
            Perceptron(
                width=field.width, num_layers=settings.encoder_mlp_layers, normed=settings.normed
            )
            for _ in range(settings.encoder_layers)
        )

    def embedded(self, tokens: AtmoRepInput) -> Float[Tensor, "batch level token width"]:
        values = rearrange(
            tokens.values,
            "batch level nt nlat nlon time lat lon -> batch level (nt nlat nlon) (time lat lon)",
        )
        with torch.autocast(values.device.type, enabled=False):
            info = self.embed_info(tokens.token_info)  # half precision would round year and day
        return torch.cat([self.embed(values), info], dim=-1)


class FieldDecoder(nn.Module):
    """Decoder layers and tail of one predicted field."""

    def __init__(self, settings: AtmoRepSettings, field: AtmoRepField) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(
            DecoderAttention(
                width=field.width,
                num_heads=settings.decoder_heads,
                cross_heads=settings.cross_heads,
                normed_heads=settings.decoder_normed_heads,
            )
            for _ in range(settings.decoder_layers)
        )
        self.perceptrons = nn.ModuleList(
            Perceptron(width=field.width, num_layers=settings.decoder_mlp_layers)
            for _ in range(settings.decoder_layers)
        )
        self.tail = Tail(
            width=field.width,
            num_values=field.values_in_token,
            num_layers=settings.tail_layers,
            members=settings.members,
        )


class AtmoRep(nn.Module):
    """Encoders of all fields, decoders and tails of the predicted ones."""

    def __init__(self, settings: AtmoRepSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoders = nn.ModuleDict({f.name: FieldEncoder(settings, f) for f in settings.fields})
        self.decoders = nn.ModuleDict(
            {name: FieldDecoder(settings, settings.field(name)) for name in settings.predicted}
        )

    def _encoder(self, name: str) -> FieldEncoder:
        return cast(FieldEncoder, self.encoders[name])

    def _decoder(self, name: str) -> FieldDecoder:
        return cast(FieldDecoder, self.decoders[name])

    def encode(self, inputs: Mapping[str, AtmoRepInput]) -> dict[str, list[Tensor]]:
        """Latents [batch, level x token, width] of every field after every layer."""
        states: dict[str, Tensor] = {}
        for field in self.settings.fields:
            x = self._encoder(field.name).embedded(inputs[field.name])
            x = x + positions(field, x.device).to(x.dtype)
            states[field.name] = rearrange(
                x, "batch level token width -> batch (level token) width"
            )
        outputs: dict[str, list[Tensor]] = {name: [] for name in states}
        for number in range(self.settings.encoder_layers):
            # all fields attend to the states before this layer, then all pass their perceptrons
            attended = {}
            for field in self.settings.fields:
                attention = self._encoder(field.name).attentions[number]
                other_fields = [states[name] for name in field.coupled]
                attended[field.name] = attention(states[field.name], other_fields)
            for name, x in attended.items():
                states[name] = self._encoder(name).perceptrons[number](x)
                outputs[name].append(states[name])
        return outputs

    def decode(self, name: str, latents: list[Tensor]) -> AtmoRepOutput:
        """Members of all tokens of a predicted field from the latents of its encoder's layers."""
        num_levels = len(self.settings.field(name).levels)
        return AtmoRepOutput(
            rearrange(
                self.members(name, latents),
                "batch (level token) member value -> batch level token member value",
                level=num_levels,
            )
        )

    def members(
        self, name: str, latents: list[Tensor], chosen: Int[Tensor, "batch query"] | None = None
    ) -> Float[Tensor, "batch query member value"]:
        """Members of the chosen tokens of a predicted field, of all without a choice."""
        return self._decoder(name).tail(self.decoded(name, latents, chosen))

    def decoded(
        self, name: str, latents: list[Tensor], chosen: Int[Tensor, "batch query"] | None = None
    ) -> Float[Tensor, "batch query width"]:
        """Latents of the chosen tokens of a predicted field after the last layer of its decoder.

        latents: of its encoder's layers. The decoder's last layer computes the chosen tokens alone;
        the layers before it compute all, whose keys and values it needs.
        """
        decoder = self._decoder(name)
        x, last = latents[-1], len(decoder.attentions) - 1
        for number, (attention, perceptron) in enumerate(
            zip(decoder.attentions, decoder.perceptrons, strict=True)
        ):
            encoded = latents[self.settings.encoder_layer_read_by(number)]
            x = perceptron(attention(x, encoded, chosen if number == last else None))
        return x if len(decoder.attentions) else picked(x, chosen)

    def forward(self, inputs: Mapping[str, AtmoRepInput]) -> dict[str, AtmoRepOutput]:
        latents = self.encode(inputs)
        return {name: self.decode(name, latents[name]) for name in self.settings.predicted}


def picked(
    x: Float[Tensor, "batch token width"], chosen: Int[Tensor, "batch query"] | None
) -> Float[Tensor, "batch query width"]:
    """The latents of the chosen tokens; all without a choice."""
    return x if chosen is None else x.gather(1, chosen[..., None].expand(-1, -1, x.shape[-1]))


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def _heads(x: Tensor, kinds: int, num_heads: int) -> list[Tensor]:
    """Queries, keys and values, as many kinds as there are, [batch head token feature]: the
    channels run head after head, in each kind after kind."""
    split = rearrange(
        x, "batch token (head kind feature) -> kind batch head token feature",
        head=num_heads, kind=kinds,
    )  # fmt: skip
    return list(split)
