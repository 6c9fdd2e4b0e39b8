"""Modules as different people write them, each a factory for `rope-export module`."""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from rotary_embedding_torch import RotaryEmbedding as LucidrainsRotary


# 1. A video diffusion transformer.
def rope_params(max_len, dim, theta=10000.0):
    freqs = torch.outer(
        torch.arange(max_len),
        1.0 / torch.pow(theta, torch.arange(0, dim, 2).to(torch.float64).div(dim)),
    )
    return torch.polar(torch.ones_like(freqs), freqs)


def sinusoid(dim, t):
    half = dim // 2
    freqs = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    args = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(args), torch.sin(args)], dim=-1)


class DiTBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(dim, dim * 3)
        self.qn, self.kn = nn.RMSNorm(dim // heads), nn.RMSNorm(dim // heads)
        self.proj = nn.Linear(dim, dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 2 * dim), nn.GELU(approximate="tanh"), nn.Linear(2 * dim, dim)
        )
        self.ada = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x, c, freqs):
        s1, b1, g1, s2, b2, g2 = self.ada(c).unsqueeze(1).chunk(6, dim=-1)
        h = self.norm1(x) * (1 + s1) + b1
        q, k, v = rearrange(self.qkv(h), "b n (t h d) -> t b n h d", t=3, h=self.heads)
        q, k = self.qn(q), self.kn(k)

        def rot(u):
            z = torch.view_as_complex(u.to(torch.float64).reshape(*u.shape[:-1], -1, 2))
            return torch.view_as_real(z * freqs).flatten(3).type_as(u)

        o = F.scaled_dot_product_attention(
            rot(q).transpose(1, 2), rot(k).transpose(1, 2), v.transpose(1, 2)
        )
        x = x + g1 * self.proj(rearrange(o, "b h n d -> b n (h d)"))
        return x + g2 * self.mlp(self.norm2(x) * (1 + s2) + b2)


class VideoDiT(nn.Module):
    def __init__(self, dim=48, heads=2, layers=2):
        super().__init__()
        self.patch = nn.Conv3d(4, dim, kernel_size=(1, 2, 2), stride=(1, 2, 2))
        self.time = nn.Sequential(nn.Linear(32, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList([DiTBlock(dim, heads) for _ in range(layers)])
        self.head = nn.Linear(dim, 4 * 4)
        d = dim // heads
        self.split = [d // 2 - 2 * (d // 6), d // 6, d // 6]
        self.freqs = torch.cat(
            [
                rope_params(64, d - 4 * (d // 6)),
                rope_params(64, 2 * (d // 6)),
                rope_params(64, 2 * (d // 6)),
            ],
            dim=1,
        )

    def forward(self, latents, timestep):
        x = self.patch(latents)
        b, c, f, h, w = x.shape
        parts = self.freqs.split(self.split, dim=1)
        freqs = torch.cat(
            [
                parts[0][:f].view(f, 1, 1, -1).expand(f, h, w, -1),
                parts[1][:h].view(1, h, 1, -1).expand(f, h, w, -1),
                parts[2][:w].view(1, 1, w, -1).expand(f, h, w, -1),
            ],
            dim=-1,
        ).reshape(1, f * h * w, 1, -1)
        c = self.time(sinusoid(32, timestep))
        x = x.flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x, c, freqs)
        x = self.head(x)
        return rearrange(x, "b (f h w) (p q c) -> b c f (h p) (w q)", f=f, h=h, w=w, p=2, q=2)


def video_dit():
    D = torch.export.Dim
    return (
        VideoDiT().eval(),
        {"latents": torch.randn(1, 4, 3, 8, 12), "timestep": torch.tensor([500.0])},
        {
            "latents": {
                0: "batch",
                2: D("frames", max=16),
                3: 2 * D("h", max=16),
                4: 2 * D("w", max=16),
            },
            "timestep": {0: "batch"},
        },
    )


# 2. A streaming speech encoder: state goes in and out.
class StreamingLayer(nn.Module):
    def __init__(self, d=32, h=4, left=16, k=5):
        super().__init__()
        self.h, self.left, self.k = h, left, k
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.conv = nn.Conv1d(d, d, k, groups=d)
        self.n1, self.n2, self.n3 = nn.LayerNorm(d), nn.LayerNorm(d), nn.LayerNorm(d)
        self.ff = nn.Sequential(nn.Linear(d, 64), nn.SiLU(), nn.Dropout(0.1), nn.Linear(64, d))
        self.bias = nn.Parameter(torch.randn(h, 128) * 0.1)

    def forward(self, x, k_cache, v_cache, conv_cache):
        b, t, d = x.shape
        y = self.n1(x)
        q = self.q(y).view(b, t, self.h, -1).transpose(1, 2)
        k, v = self.kv(y).view(b, t, 2, self.h, -1).permute(2, 0, 3, 1, 4)
        k = torch.cat([k_cache, k], dim=2)
        v = torch.cat([v_cache, v], dim=2)
        T = k.shape[2]
        dist = (torch.arange(t, device=x.device)[:, None] + (T - t)) - torch.arange(
            T, device=x.device
        )[None]
        bias = self.bias[:, dist.clamp(0, 127)]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]) + bias
        scores = scores.masked_fill(dist < 0, float("-inf"))
        x = x + self.o((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, d))
        y = torch.cat([conv_cache, self.n2(x).transpose(1, 2)], dim=2)
        x = x + F.silu(self.conv(y)).transpose(1, 2)
        x = x + self.ff(self.n3(x))
        return x, k[:, :, -self.left :], v[:, :, -self.left :], y[:, :, -(self.k - 1) :]


class StreamingEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([StreamingLayer(), StreamingLayer()])

    def forward(self, chunk, k_cache, v_cache, conv_cache):
        ks, vs, cs = [], [], []
        for i, layer in enumerate(self.layers):
            chunk, k, v, c = layer(chunk, k_cache[i], v_cache[i], conv_cache[i])
            ks.append(k)
            vs.append(v)
            cs.append(c)
        return {
            "encoded": chunk,
            "new_k": torch.stack(ks),
            "new_v": torch.stack(vs),
            "new_conv": torch.stack(cs),
        }


def streaming():
    return (
        StreamingEncoder(),
        {
            "chunk": torch.randn(1, 8, 32),
            "k_cache": torch.zeros(2, 1, 4, 16, 8),
            "v_cache": torch.zeros(2, 1, 4, 16, 8),
            "conv_cache": torch.zeros(2, 1, 32, 4),
        },
        {"chunk": {1: "frames"}},
    )


# 3. A vision tower with 2-D rotary positions of any image size.
class VisionRope(nn.Module):
    def __init__(self, dim, base=100.0):
        super().__init__()
        self.register_buffer(
            "periods", base ** (2 * torch.arange(dim // 4) / (dim // 2)), persistent=False
        )

    def forward(self, H, W):
        y = torch.arange(0.5, H, device=self.periods.device) / H
        x = torch.arange(0.5, W, device=self.periods.device) / W
        coords = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1) * 2 - 1
        angles = 2 * math.pi * coords[:, :, None] / self.periods[None, None]
        angles = angles.flatten(1, 2).tile(2)
        return angles.sin(), angles.cos()


def rope_rotate_half(x):
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat([-x2, x1], dim=-1)


class ViTBlock(nn.Module):
    def __init__(self, d=48, h=3):
        super().__init__()
        self.h = h
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 96), nn.GELU(), nn.Linear(96, d))
        self.ls = nn.Parameter(torch.ones(d) * 0.1)

    def forward(self, x, rope):
        B, N, C = x.shape
        q, k, v = (
            self.qkv(self.norm1(x))
            .reshape(B, N, 3, self.h, C // self.h)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        sin, cos = rope
        P = N - sin.shape[0]

        def apply(t):
            prefix, rest = t[:, :, :P], t[:, :, P:]
            return torch.cat((prefix, rest * cos + rope_rotate_half(rest) * sin), dim=-2)

        x = x + self.ls * self.proj(
            F.scaled_dot_product_attention(apply(q), apply(k), v).transpose(1, 2).reshape(B, N, C)
        )
        return x + self.ls * self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    def __init__(self, d=48):
        super().__init__()
        self.patch = nn.Conv2d(3, d, 8, 8)
        self.cls, self.reg = nn.Parameter(torch.randn(1, 1, d)), nn.Parameter(torch.randn(1, 4, d))
        self.rope = VisionRope(d // 3)
        self.blocks = nn.ModuleList([ViTBlock(d) for _ in range(2)])
        self.norm = nn.LayerNorm(d)

    def forward(self, pixel_values):
        x = self.patch(pixel_values)
        B, _, H, W = x.shape
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(B, -1, -1), self.reg.expand(B, -1, -1), x], dim=1)
        rope = self.rope(H, W)
        for blk in self.blocks:
            x = blk(x, rope)
        x = self.norm(x)
        return x[:, 0], x[:, 5:]


def vision():
    D = torch.export.Dim
    return (
        VisionTower(),
        {"pixel_values": torch.rand(2, 3, 32, 48)},
        {"pixel_values": {0: "batch", 2: 8 * D("rows", max=16), 3: 8 * D("cols", max=16)}},
    )


# 4. A protein language model (ESM).
class EsmRotary(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.register_buffer(
            "inv_freq", 1.0 / (10000 ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))
        )
        self._seq_len_cached = None
        self._cos_cached = None
        self._sin_cached = None

    def _update(self, x, seq_dimension=2):
        seq_len = x.shape[seq_dimension]
        if seq_len != self._seq_len_cached or self._cos_cached.device != x.device:
            self._seq_len_cached = seq_len
            t = torch.arange(x.shape[seq_dimension], device=x.device).type_as(self.inv_freq)
            freqs = torch.outer(t, self.inv_freq)
            emb = torch.cat((freqs, freqs), dim=-1).to(x.device)
            self._cos_cached = emb.cos()[None, None, :, :]
            self._sin_cached = emb.sin()[None, None, :, :]
        return self._cos_cached, self._sin_cached

    def forward(self, q, k):
        cos, sin = self._update(k, seq_dimension=-2)
        return q * cos[:, :, : q.shape[-2]] + rope_rotate_half(q) * sin[
            :, :, : q.shape[-2]
        ], k * cos + rope_rotate_half(k) * sin


class Protein(nn.Module):
    def __init__(self, d=32, h=4, layers=2):
        super().__init__()
        self.h = h
        self.embed = nn.Embedding(33, d, padding_idx=1)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    dict(
                        n=nn.LayerNorm(d),
                        qkv=nn.Linear(d, 3 * d),
                        o=nn.Linear(d, d),
                        rot=EsmRotary(d // h),
                        n2=nn.LayerNorm(d),
                        a=nn.Linear(d, 4 * d),
                        b=nn.Linear(4 * d, d),
                    )
                )
                for _ in range(layers)
            ]
        )
        self.head = nn.Linear(d, 33)

    def forward(self, tokens, attention_mask):
        x = self.embed(tokens)
        masked = (tokens == 32).unsqueeze(-1)
        x = x.masked_fill(masked, 0.0)
        ratio = (tokens == 32).sum(-1).float() / attention_mask.sum(-1)
        x = (x * (1 - 0.15 * 0.8) / (1 - ratio)[:, None, None]).to(x.dtype)
        x = x * attention_mask.unsqueeze(-1)
        bias = (1.0 - attention_mask[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for l in self.layers:
            b, n, d = x.shape
            q, k, v = (
                t.view(b, n, self.h, -1).transpose(1, 2) for t in l["qkv"](l["n"](x)).chunk(3, -1)
            )
            q, k = l["rot"](q * (d // self.h) ** -0.5, k)
            p = (q @ k.transpose(-1, -2) + bias).softmax(-1)
            x = x + l["o"]((p @ v).permute(0, 2, 1, 3).contiguous().view(b, n, d))
            x = x + l["b"](F.gelu(l["a"](l["n2"](x))))
        return self.head(x)


def protein():
    m = Protein().eval()
    tokens = torch.randint(4, 24, (2, 20))
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 14:] = 0
    tokens[1, 14:] = 1
    tokens[0, 3] = 32
    m(tokens, mask)  # warmed up, as people do
    return (
        m,
        {"tokens": tokens, "attention_mask": mask},
        {
            "tokens": {0: "batch", 1: torch.export.Dim("residues", max=1024)},
            "attention_mask": {0: "batch", 1: torch.export.Dim("residues", max=1024)},
        },
    )


# 5. A sentence embedder on PyTorch's own encoder.
class Embedder(nn.Module):
    def __init__(self, d=32):
        super().__init__()
        self.tok = nn.Embedding(100, d, padding_idx=0)
        self.pos = nn.Embedding(128, d)
        self.enc = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(d, 4, 64, batch_first=True, norm_first=False), 2
        )

    def forward(self, input_ids, attention_mask):
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.size(1), device=input_ids.device))
        x = self.enc(x, src_key_padding_mask=attention_mask == 0)
        m = attention_mask.unsqueeze(-1).float()
        return F.normalize((x * m).sum(1) / m.sum(1).clamp(min=1e-9), p=2, dim=1)


def embedder():
    ids = torch.randint(1, 100, (2, 10))
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, 6:] = 0
    return (
        Embedder().eval(),
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}},
    )


# 6. litgpt: a cache in buffers, positions as an input.
class LitAttention(nn.Module):
    def __init__(self, d=32, h=4, block=64):
        super().__init__()
        self.h = h
        self.attn, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)
        theta = 1.0 / (10000 ** (torch.arange(0, d // h, 2).float() / (d // h)))
        idx = torch.outer(torch.arange(block), theta).repeat(1, 2)
        self.register_buffer("cos", idx.cos(), persistent=False)
        self.register_buffer("sin", idx.sin(), persistent=False)
        self.register_buffer("k", torch.zeros(1, h, block, d // h), persistent=False)
        self.register_buffer("v", torch.zeros(1, h, block, d // h), persistent=False)

    def forward(self, x, input_pos):
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.h, -1).transpose(1, 2) for t in self.attn(x).chunk(3, -1))
        cos, sin = self.cos.index_select(0, input_pos), self.sin.index_select(0, input_pos)
        q, k = q * cos + rope_rotate_half(q) * sin, k * cos + rope_rotate_half(k) * sin
        k = self.k.index_copy_(2, input_pos, k)
        v = self.v.index_copy_(2, input_pos, v)
        mask = torch.tril(torch.ones(64, 64, dtype=torch.bool)).index_select(0, input_pos)
        return self.proj(
            F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(B, T, C)
        )


def litgpt():
    return (
        LitAttention(),
        {"x": torch.randn(1, 5, 32), "input_pos": torch.arange(5)},
        {"x": {1: "T"}, "input_pos": {0: "T"}},
    )


# 7. x-transformers: relative bias buckets, ALiBi, talking heads, einsum.
class XAttend(nn.Module):
    def __init__(self, dim=32, heads=4):
        super().__init__()
        self.heads = heads
        self.scale = (dim // heads) ** -0.5
        self.to_qkv = nn.Linear(dim, dim * 3, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.rel = nn.Embedding(32, heads)
        self.pre = nn.Conv2d(heads, heads, 1, bias=False)
        self.register_buffer(
            "slopes",
            torch.tensor([2 ** (-8 * (i + 1) / heads) for i in range(heads)]).view(-1, 1, 1),
        )

    def bucket(self, n, num_buckets=32, max_distance=128):
        n = torch.max(-n, torch.zeros_like(n))
        e = num_buckets // 2
        large = (
            e + (torch.log(n.float() / e) / math.log(max_distance / e) * (num_buckets - e)).long()
        )
        return torch.where(n < e, n, torch.min(large, torch.full_like(large, num_buckets - 1)))

    def forward(self, x, mask: torch.Tensor | None = None):
        n, device = x.shape[1], x.device
        q, k, v = map(
            lambda t: rearrange(t, "b n (h d) -> b h n d", h=self.heads),
            self.to_qkv(x).chunk(3, dim=-1),
        )
        dots = torch.einsum("b h i d, b h j d -> b h i j", q, k) * self.scale
        i, j = torch.arange(n, device=device), torch.arange(n, device=device)
        rel = rearrange(j, "j -> 1 j") - rearrange(i, "i -> i 1")
        dots = (
            dots + rearrange(self.rel(self.bucket(rel)), "i j h -> h i j") - self.slopes * rel.abs()
        )
        dots = self.pre(dots)
        neg = -torch.finfo(dots.dtype).max
        if mask is not None:
            dots = dots.masked_fill(~rearrange(mask, "b j -> b 1 1 j"), neg)
        causal = torch.ones((n, n), dtype=torch.bool, device=device).triu(1)
        dots = dots.masked_fill(causal, neg)
        out = torch.einsum(
            "b h i j, b h j d -> b h i d", dots.softmax(dim=-1, dtype=torch.float32), v
        )
        return self.to_out(rearrange(out, "b h n d -> b n (h d)"))


def xtransformers():
    return (
        XAttend(),
        {"x": torch.randn(2, 9, 32), "mask": torch.ones(2, 9).bool()},
        {"x": {0: "batch", 1: "seq"}, "mask": {0: "batch", 1: "seq"}},
    )


# 8. torchtune: a cache of cos and sin by position, gathered.
class TuneRope(nn.Module):
    def __init__(self, dim, max_seq_len=256, base=10_000):
        super().__init__()
        theta = 1.0 / (base ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
        idx = torch.einsum(
            "i, j -> ij", torch.arange(max_seq_len, dtype=theta.dtype), theta
        ).float()
        self.register_buffer(
            "cache", torch.stack([torch.cos(idx), torch.sin(idx)], dim=-1), persistent=False
        )

    def forward(self, x, *, input_pos=None):
        seq_len = x.size(1)
        rope_cache = self.cache[:seq_len] if input_pos is None else self.cache[input_pos]
        xshaped = x.float().reshape(*x.shape[:-1], -1, 2)
        rope_cache = rope_cache.view(-1, xshaped.size(1), 1, xshaped.size(3), 2)
        x_out = torch.stack(
            [
                xshaped[..., 0] * rope_cache[..., 0] - xshaped[..., 1] * rope_cache[..., 1],
                xshaped[..., 1] * rope_cache[..., 0] + xshaped[..., 0] * rope_cache[..., 1],
            ],
            -1,
        )
        return x_out.flatten(3).type_as(x)


class TuneAttention(nn.Module):
    def __init__(self, d=32, h=4, kv=2):
        super().__init__()
        self.h, self.kv = h, kv
        self.q_proj, self.k_proj, self.v_proj, self.output_proj = (
            nn.Linear(d, d),
            nn.Linear(d, kv * d // h),
            nn.Linear(d, kv * d // h),
            nn.Linear(d, d),
        )
        self.pos = TuneRope(d // h)

    def forward(self, x, input_pos):
        b, s, d = x.shape
        q = self.pos(self.q_proj(x).view(b, s, self.h, -1), input_pos=input_pos).transpose(1, 2)
        k = self.k_proj(x).view(b, s, self.kv, -1)
        v = self.v_proj(x).view(b, s, self.kv, -1)
        k = self.pos(k, input_pos=input_pos).transpose(1, 2)
        expand = (b, self.kv, self.h // self.kv, s, d // self.h)
        k = k.unsqueeze(2).expand(expand).flatten(1, 2)
        v = v.transpose(1, 2).unsqueeze(2).expand(expand).flatten(1, 2)
        return self.output_proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=True)
            .transpose(1, 2)
            .contiguous()
            .view(b, s, -1)
        )


def torchtune():
    return (
        TuneAttention(),
        {"x": torch.randn(2, 12, 32), "input_pos": torch.arange(12).expand(2, -1)},
        {"x": {0: "b", 1: "s"}, "input_pos": {0: "b", 1: "s"}},
    )


# 9. A conformer whose lengths come in.
class Conformer(nn.Module):
    def __init__(self, d=32, h=4):
        super().__init__()
        self.sub = nn.Conv1d(16, d, 3, stride=2, padding=1)
        self.mha = nn.MultiheadAttention(d, h, batch_first=True)
        self.pw, self.dw, self.bn = (
            nn.Conv1d(d, 2 * d, 1),
            nn.Conv1d(d, d, 7, padding=3, groups=d),
            nn.BatchNorm1d(d),
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, features, lengths):
        x = self.sub(features.transpose(1, 2)).transpose(1, 2)
        lengths = (lengths - 1) // 2 + 1
        pad = torch.arange(x.shape[1], device=x.device)[None] >= lengths[:, None]
        y = self.norm(x)
        x = x + self.mha(y, y, y, key_padding_mask=pad, need_weights=False)[0]
        y = F.glu(self.pw(self.norm(x).masked_fill(pad.unsqueeze(-1), 0.0).transpose(1, 2)), dim=1)
        x = x + F.silu(self.bn(self.dw(y))).transpose(1, 2)
        return x.masked_fill(pad.unsqueeze(-1), 0.0), lengths


def conformer():
    m = Conformer()
    for _ in range(3):
        m(torch.randn(2, 30, 16), torch.tensor([30, 20]))
    return (
        m.eval(),
        {"features": torch.randn(2, 30, 16), "lengths": torch.tensor([30, 18])},
        {
            "features": {0: "batch", 1: torch.export.Dim("frames", min=4, max=400)},
            "lengths": {0: "batch"},
        },
    )


# 10. Time series: RevIN, patches, rotary-embedding-torch.
class PatchTST(nn.Module):
    def __init__(self, d=32, h=4, patch=4):
        super().__init__()
        self.patch, self.h = patch, h
        self.embed = nn.Linear(patch, d)
        self.qkv = nn.Linear(d, 3 * d)
        self.out = nn.Linear(d, patch)
        self.rotary = LucidrainsRotary(dim=d // h)

    def forward(self, series):
        mean, std = (
            series.mean(1, keepdim=True).detach(),
            torch.sqrt(series.var(1, keepdim=True, unbiased=False) + 1e-5).detach(),
        )
        x = ((series - mean) / std).transpose(1, 2)
        x = x.unfold(-1, self.patch, self.patch)
        B, C, N, P = x.shape
        x = self.embed(x.reshape(B * C, N, P))
        q, k, v = rearrange(self.qkv(x), "b n (t h d) -> t b h n d", t=3, h=self.h)
        q, k = self.rotary.rotate_queries_or_keys(q), self.rotary.rotate_queries_or_keys(k)
        x = rearrange(
            F.scaled_dot_product_attention(q, k, v, is_causal=True), "b h n d -> b n (h d)"
        )
        y = rearrange(self.out(x), "(b c) n p -> b (n p) c", b=B)
        return y * std + mean


def patchtst():
    m = PatchTST().eval()
    m(torch.randn(2, 80, 3))
    return (
        m,
        {"series": torch.randn(2, 48, 3)},
        {"series": {0: "batch", 1: 4 * torch.export.Dim("patches", max=128)}},
    )


# 11. ModernBERT-like: windows and whole attention in turns, masks made in the model.
class Alternating(nn.Module):
    def __init__(self, d=32, h=4, layers=4, window=8):
        super().__init__()
        self.h, self.window = h, window
        self.emb = nn.Embedding(60, d)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    dict(
                        n=nn.LayerNorm(d, bias=False),
                        w=nn.Linear(d, 3 * d, bias=False),
                        o=nn.Linear(d, d, bias=False),
                    )
                )
                for _ in range(layers)
            ]
        )

    def rope(self, n, theta, device):
        inv = 1.0 / theta ** (torch.arange(0, 8, 2, device=device).float() / 8)
        f = torch.outer(torch.arange(n, device=device).float(), inv)
        e = torch.cat([f, f], -1)
        return e.cos(), e.sin()

    def forward(self, input_ids, attention_mask):
        x = self.emb(input_ids)
        n = x.shape[1]
        glob = torch.zeros(x.shape[0], 1, n, n, dtype=x.dtype).masked_fill(
            attention_mask[:, None, None, :] == 0, torch.finfo(x.dtype).min
        )
        rows = torch.arange(n).unsqueeze(0)
        dist = (rows - rows.T).abs()
        local = glob.masked_fill(
            (dist > self.window // 2).unsqueeze(0).unsqueeze(0), torch.finfo(x.dtype).min
        )
        for i, l in enumerate(self.layers):
            q, k, v = rearrange(l["w"](l["n"](x)), "b n (t h d) -> t b h n d", t=3, h=self.h)
            cos, sin = self.rope(n, 160000.0 if i % 3 == 0 else 10000.0, x.device)
            q, k = q * cos + rope_rotate_half(q) * sin, k * cos + rope_rotate_half(k) * sin
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=glob if i % 3 == 0 else local)
            x = x + l["o"](rearrange(o, "b h n d -> b n (h d)"))
        return x


def modernbert():
    ids = torch.randint(0, 60, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.long)
    mask[0, 20:] = 0
    return (
        Alternating(),
        {"input_ids": ids, "attention_mask": mask},
        {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "sequence"}},
    )
