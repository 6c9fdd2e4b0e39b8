"""`Plan`: an export request, checked once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from rope_export.attention import Attention
from rope_export.errors import BadInputError
from rope_export.lowering import rules

_DEFAULT_LONGEST = 4096
PADDINGS = ("right", "left")


@dataclass(frozen=True)
class Plan:
    """What is exported, for where, and over which shapes.

    Attributes:
        target: one of `rules.TARGETS`.
        providers: providers the graph must be legal on.
        dtype: of weights and activations.
        longest: longest sequence served.
        position_ids: whether positions are a graph input.
        cache: whether past keys and values come in and present ones go out.
        attention_mask: whether a mask comes in, as it always does with ``cache``.
        padding: the side on which prompts are padded.
        form: name of the form taken, or None: the best one that is legal.
        static: one batch and length instead of dynamic ones.
        batch: rows of a static graph.
        seed: of the inputs of the proof.
    """

    target: str
    providers: tuple[str, ...]
    dtype: str
    longest: int
    position_ids: bool
    static: bool
    batch: int
    seed: int
    cache: bool = False
    attention_mask: bool = False
    padding: str = "right"
    form: str | None = None

    @classmethod
    def checked(
        cls,
        block: Attention,
        *,
        target: str,
        providers: Sequence[str],
        max_seq_len: int | None,
        position_ids: bool,
        static: bool,
        batch: int,
        seed: int,
        cache: bool = False,
        attention_mask: bool = False,
        padding: str = "right",
        form: str | None = None,
    ) -> Plan:
        """Check a request against the block.

        Raises:
            BadInputError: an argument is not acceptable.
        """
        chosen = checked_providers(target, providers)
        refuse_what_weights_do_not_say(block)
        weights = {n: p for n, p in block.named_parameters() if not n.startswith("rope.")}
        dtypes = {str(p.dtype).removeprefix("torch.") for p in weights.values()}
        if len(dtypes) != 1 or not dtypes <= set(rules.DTYPES):
            raise BadInputError(
                f"all weights must share one dtype of {', '.join(rules.DTYPES)}, "
                f"got {', '.join(sorted(dtypes))}"
            )
        served = None if block.rope is None else block.rope.max_seq_len
        longest = (served or _DEFAULT_LONGEST) if max_seq_len is None else max_seq_len
        if longest < 1:
            raise BadInputError(f"max_seq_len must be at least 1, got {longest}")
        if block.rope is not None and longest > block.rope.positions:
            raise BadInputError(
                f"max_seq_len must be at most the {block.rope.positions} positions of the block's "
                f"RotaryEmbedding, got {longest}"
            )
        if batch < 1:
            raise BadInputError(f"batch must be at least 1, got {batch}")
        if batch != 1 and not static:
            raise BadInputError(
                f"batch is for static graphs: pass static=True too, got batch={batch}"
            )
        if position_ids and block.rope is None:
            raise BadInputError("position_ids needs a block with a RotaryEmbedding, got rope=None")
        if not position_ids and block.rope is not None and not block.rope.found.one_position:
            raise BadInputError(
                f"position_ids must be an input: tokens have {block.rope.axes} axes with scaling "
                f"{block.rope.scaling}"
            )
        if cache and not block.causal:
            raise BadInputError(
                "cache needs causal attention: an earlier token would have to see later ones, "
                "got causal=False"
            )
        if cache and static:
            raise BadInputError(
                "cache needs dynamic lengths, one graph for prefill and decode: got static=True"
            )
        if cache and longest < 2:
            raise BadInputError(f"max_seq_len must be at least 2 with cache, got {longest}")
        if padding not in PADDINGS:
            raise BadInputError(f"padding must be one of {', '.join(PADDINGS)}, got {padding!r}")
        if padding == "left" and not (cache or attention_mask):
            raise BadInputError(
                "padding needs cache or attention_mask, got padding='left' without either"
            )
        plan = cls(
            target,
            chosen,
            dtypes.pop(),
            longest,
            position_ids,
            static,
            batch,
            seed,
            cache,
            attention_mask or cache,
            padding,
            form,
        )
        plan.choose(block)
        return plan

    def situations(self, block: Attention, providers: Sequence[str]) -> list[rules.Situation]:
        """Describe ``block`` to the rules, once for each of ``providers``."""
        return rules.situations(
            block,
            providers,
            dtype=self.dtype,
            implied_positions=not self.position_ids,
            longest=self.longest,
            cache=self.cache,
            mask=self.attention_mask,
            padding=self.padding,
        )

    def choose(self, block: Attention) -> rules.Choice:
        """Choose the form.

        Raises:
            BadInputError: the target has none that is legal.
        """
        return rules.choose(self.target, self.situations(block, self.providers), self.form)

    def runs_on(self, block: Attention) -> dict[str, str | None]:
        """For every provider, why it lacks the chosen form's operators, or None."""
        form = self.choose(block).form
        verdicts = {}
        for provider in rules.PROVIDERS:
            broken = rules.broken_limits(form, self.situations(block, [provider]), to_run=True)
            verdicts[provider] = broken[0] if broken else None
        return verdicts

    def to_json(self) -> dict[str, Any]:
        """The plan as ``config.json`` has it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Plan:
        """Read a plan back from ``config.json``."""
        return cls(**content | {"providers": tuple(content["providers"])})


def checked_providers(target: str, providers: Sequence[str]) -> tuple[str, ...]:
    """Providers, each once, of a target that exists.

    Raises:
        BadInputError: the target or a provider is unknown, or there is none.
    """
    if target not in rules.TARGETS:
        raise BadInputError(f"target must be one of {', '.join(rules.TARGETS)}, got {target!r}")
    chosen = tuple(dict.fromkeys([providers] if isinstance(providers, str) else providers))
    unknown = [p for p in chosen if p not in rules.PROVIDERS]
    if unknown or not chosen:
        got = repr(unknown[0]) if unknown else "none"
        raise BadInputError(f"providers must be some of {', '.join(rules.PROVIDERS)}, got {got}")
    return chosen


def refuse_what_weights_do_not_say(block: Attention, prefix: str = "") -> None:
    """Graph and float64 truth are made from weights: what acts beside them would be left out.

    Args:
        block: the attention.
        prefix: its name within a model.

    Raises:
        BadInputError: a projection is no plain linear layer, or a module has forward hooks.
    """
    for name, module in block.named_modules(prefix=prefix):
        last = name.rpartition(".")[2]
        plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        if last.endswith("_proj") and not plain:
            raise BadInputError(
                f"{name} must be a plain nn.Linear, whose weight is all it does, got "
                f"{type(module).__name__}: merge adapters into the weights before exporting"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise BadInputError(
                f"{name or type(block).__name__} must have no forward hooks, which a graph would "
                "not have: remove them before exporting"
            )
