"""What rotary-embedding-torch computes, as it is and in float64, at random configurations.

Theirs is made anew for each call with its cache off, and has seen no other. Its angles are float32
products, so it may be off by their rounding; float64 truth, written here by complex multiplication,
holds ours much closer, and holds it alone where theirs is wrong.
"""

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import rotary_embedding_torch
import torch
from hypothesis import settings

laws = settings(derandomize=True, deadline=None, max_examples=30)
ROUNDING = 2.0**-24  # of float32, relative
LAYOUTS = ("interleaved", "half")
NARROW = (torch.bfloat16, torch.float16)
seeds = st.integers(0, 2**32 - 1)
layouts = st.sampled_from(LAYOUTS)
flags = st.booleans()
offsets = st.integers(0, 5000)
interpolations = st.one_of(st.just(1.0), st.floats(1, 8))


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).to(dtype)


# Truth, in float64 and apart from both


def base_of(dim, theta=10000.0, theta_rescale_factor=1.0, **_):
    if theta_rescale_factor == 1:
        return float(theta)
    return theta * theta_rescale_factor ** (dim / (dim - 2))


def frequencies(dim, custom_freqs=None, freqs_for="lang", max_freq=10, num_freqs=1, **others):
    """Radians per position, before interpolation."""
    if custom_freqs is not None:
        return custom_freqs.double().numpy()
    if freqs_for == "constant":
        return np.ones(num_freqs)
    if freqs_for == "pixel":
        return np.pi * np.linspace(1, max_freq / 2, dim // 2)
    return base_of(dim, **others) ** (-np.arange(0, dim, 2) / dim)


def in_its_place(per_token, axis):
    """``[S, r / 2]``, broadcastable to a tensor whose tokens lie along ``axis``."""
    return np.asarray(per_token)[(slice(None), *(None,) * (-2 - axis))]


def channels_of_pairs(x, half, start, layout):
    block = x[..., start : start + 2 * half]
    if layout == "half":
        return block[..., :half], block[..., half:]
    return block[..., 0::2], block[..., 1::2]


def turned(x, angles, *, start=0, growth=1.0, layout="interleaved"):
    x = x.detach().double().numpy().copy()
    first, second = channels_of_pairs(x, angles.shape[-1], start, layout)
    z = (first + 1j * second) * (growth * np.exp(1j * angles))
    first[...], second[...] = z.real, z.imag
    return x


def allowed(x, angles, *, start=0, growth=1.0, layout="interleaved", relative=0.0, floor=1e-6):
    """How far each channel may be off by angles ``relative`` off, and by ``floor`` of its pair."""
    slack = np.zeros(x.shape)
    pairs = channels_of_pairs(x.detach().double().numpy(), angles.shape[-1], start, layout)
    off = np.hypot(*pairs) * growth * (np.minimum(2, np.abs(angles) * relative) + floor)
    for channels in channels_of_pairs(slack, angles.shape[-1], start, layout):
        channels[...] = off
    return slack


def assert_within(actual, expected, slack):
    actual, expected = (
        t.detach().double().numpy() if isinstance(t, torch.Tensor) else t
        for t in (actual, expected)
    )
    assert actual.shape == expected.shape
    excess = np.abs(actual - expected) - slack
    assert np.all(excess <= 0), f"{excess.max():.2e} beyond what is allowed"


# Random configurations


@st.composite
def configurations(draw, *, smallest_dim=4, learned=flags, for_xpos=False):
    """Arguments of both classes. Theirs divides by ``dim - 2``."""
    dim = 2 * draw(st.integers(smallest_dim // 2, 32))
    kind = draw(st.sampled_from(["lang", "lang", "pixel", "constant", "custom"]))
    config = {"dim": dim, "freqs_for": "lang" if kind == "custom" else kind}
    if kind == "lang":
        config["theta"] = draw(st.one_of(st.just(10000), st.floats(2, 1e7)))
        if dim > 2:
            config["theta_rescale_factor"] = draw(st.sampled_from([1.0, 1.0, 2.0, 7.5]))
    elif kind == "pixel":
        config["max_freq"] = draw(st.one_of(st.just(10), st.floats(1, 300)))
    elif kind == "constant":
        config["num_freqs"] = dim // 2 if for_xpos else draw(st.integers(1, 16))
    else:
        count = dim // 2 if for_xpos else draw(st.integers(1, 16))
        some = st.floats(-2, 2, width=32, allow_subnormal=False)
        config["custom_freqs"] = torch.tensor(draw(st.lists(some, min_size=count, max_size=count)))
    config["learned_freq"] = draw(learned)
    config["interpolate_factor"] = draw(interpolations)
    config["seq_before_head_dim"] = draw(flags)
    config["cache_if_possible"] = draw(flags)
    config["cache_max_seq_len"] = draw(st.sampled_from([1, 16, 8192]))
    if for_xpos:
        config |= {"use_xpos": True, "xpos_scale_base": draw(st.sampled_from([8, 64, 512, 100.5]))}
    return config


@dataclass(frozen=True)
class Case:
    """A configuration and heads of 3 to 5 axes; ``given`` is ``axis`` as a caller may state it."""

    config: dict
    shape: tuple
    axis: int
    given: "int | None"
    seed: int

    @property
    def freqs(self):
        return frequencies(**self.config)

    @property
    def length(self):
        return self.shape[self.axis]

    def angles(self, positions, freqs=None):
        freqs = self.freqs if freqs is None else freqs
        positions = np.asarray(positions, dtype=np.float64)
        angles = np.outer(positions / self.config["interpolate_factor"], freqs)
        return in_its_place(angles, self.axis)

    def heads(self, length=None, *, seed=0, dtype=torch.float32):
        shape = list(self.shape)
        shape[self.axis] = length or self.length
        return normal(*shape, seed=self.seed + seed, dtype=dtype)

    def theirs(self, method, *heads, **arguments):
        """By their method, the sequence moved to where it is surest of it, and back."""
        moved = [x.movedim(self.axis, -2) for x in heads]
        rotate = getattr(theirs(**self.config), method)
        found = rotate(*moved, seq_dim=-2, **arguments)
        if isinstance(found, torch.Tensor):
            return found.movedim(-2, self.axis).detach()
        return [x.movedim(-2, self.axis).detach() for x in found]

    @property
    def relative(self):
        """By how much their angles may be off: eight roundings, and a power taken in float32."""
        base = base_of(**self.config) if self.config["freqs_for"] == "lang" else 1.0
        return (8 + abs(math.log(base))) * ROUNDING


def theirs(**config):
    return rotary_embedding_torch.RotaryEmbedding(**config | {"cache_if_possible": False})


@st.composite
def cases(draw, **options):
    config = draw(configurations(**options))
    width, rank = 2 * len(frequencies(**config)), draw(st.integers(3, 5))
    given = draw(st.one_of(st.none(), st.integers(-rank, rank - 2).filter(lambda i: i != -1)))
    axis = -3 if config["seq_before_head_dim"] else -2
    if given is not None:
        axis = given if given < 0 else given - rank
    shape = [draw(st.integers(1, 3)) for _ in range(rank - 1)]
    shape.append(width + draw(st.sampled_from([0, 0, 1, 4])))
    shape[axis] = draw(st.integers(1, 9))
    return Case(config, tuple(shape), axis, given, draw(seeds))


def angles_of_grid(config, sizes, offsets):
    """``[(rows,) *sizes, len(sizes) * r / 2]``, and how large the factors of each product are."""
    freqs, angles, factors = frequencies(**config), [], []
    for axis, size in enumerate(sizes):
        pixel = config["freqs_for"] == "pixel"
        places = np.linspace(-1, 1, size) if pixel else np.arange(size)
        if offsets is not None:
            places = places + np.asarray(offsets[axis], dtype=np.float64)
        after = (None,) * (len(sizes) - 1 - axis)
        index = (Ellipsis, *(None,) * axis, slice(None), *after, slice(None))
        angles.append((places[..., None] * freqs)[index])
        factors.append(((1 + np.abs(places))[..., None] * np.abs(freqs))[index])
    return [
        np.concatenate(np.broadcast_arrays(*parts), axis=-1) if len(parts) > 1 else parts[0]
        for parts in (
            [_same_rank(a, angles) for a in angles],
            [_same_rank(f, factors) for f in factors],
        )
    ]


def _same_rank(part, parts):
    shape = np.broadcast_shapes(*(p.shape[:-1] for p in parts))
    return np.broadcast_to(part, (*shape, part.shape[-1]))
