"""Which part of each tensor one rank of several needs: rules by name, and what they mean for a tensor.

A rank loads only the byte ranges of its slices. Rules are tried in order and the first whose pattern fits
decides; `headrace.loader.tp_plan` makes rules from the tensor-parallel plans of transformers.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from headrace.cache.errors import UsageError
from headrace.cache.safetensors import TensorInfo
from headrace.loader.cuts import Cut, Span, cut

Unmatched = Literal["replicated", "error"]


@dataclass(frozen=True, slots=True)
class Replicated:
    """Every rank needs the whole tensor."""


@dataclass(frozen=True, slots=True)
class Split:
    """The ranks get equal parts of one dimension, in order.

    Attributes:
        dim: 0 for rows (a column-parallel linear layer's weight), -1 for columns (a row-parallel one's).
        heads: groups along this dimension that belong together. With fewer heads than ranks, neighbouring
            ranks get the same one (grouped-query attention); without, the parts are as many as the ranks.
        uneven: allow what does not divide: ranks get the quotient rounded up, the last ones less or nothing,
            as with `torch.chunk`.
    """

    dim: int = 0
    heads: int | None = None
    uneven: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A sub-block of a fused tensor: its size along the dimension, and its heads as in `Split`."""

    size: int
    heads: int | None = None


@dataclass(frozen=True, slots=True)
class Fused:
    """Several tensors in one, side by side along a dimension: of each the rank gets its part, and the parts
    stay fused in the same order.

    Attributes:
        dim: along which they lie side by side.
        parts: their sizes; or how many there are, if they are equal.
        uneven: as in `Split`, for each part.
    """

    dim: int
    parts: tuple[Part, ...] | int
    uneven: bool = False

    @staticmethod
    def qkv(heads: int, kv_heads: int, head_size: int, dim: int = 0) -> Fused:
        """All queries, then all keys, then all values. (Where each head's three lie together, `Split` with
        `heads` is right.)"""
        kv = Part(kv_heads * head_size, kv_heads)
        return Fused(dim, (Part(heads * head_size, heads), kv, kv))

    @staticmethod
    def gate_up(dim: int = 0) -> Fused:
        """Two equal halves."""
        return Fused(dim, 2)


@dataclass(frozen=True, slots=True)
class Experts:
    """Each expert belongs to one rank, which needs all of it.

    A name such as `layers.0.experts.7.up_proj.weight` is expert 7's own tensor: the other ranks do without
    it. In any other name the experts are stacked along the first dimension.

    Attributes:
        count: how many experts there are; may be left out where they are stacked.
        order: "linear" gives each rank a run of them, "round_robin" every world-th.
        after: the part of the name that the expert's number follows.
    """

    count: int | None = None
    order: Literal["linear", "round_robin"] = "linear"
    after: str = "experts"


@dataclass(frozen=True, slots=True)
class Shaped:
    """Another slicing for one-dimensional tensors (biases, scales) than for those of more dimensions. Single
    numbers are replicated."""

    vector: Replicated | Split | Fused | Experts
    matrix: Replicated | Split | Fused | Experts


Slicing = Replicated | Split | Fused | Experts | Shaped


@dataclass(frozen=True, slots=True)
class Rule:
    """How tensors are sliced whose names fit a pattern.

    Attributes:
        pattern: a glob over the whole name (case matters).
        numbered: `*` stands for a number and nothing else, as in transformers' plans, `?` for what lies
            between two dots, and any prefix that ends in a dot may come before.
    """

    pattern: str
    slicing: Slicing
    numbered: bool = False

    @property
    def expression(self) -> str:
        """The same as a regular expression."""
        if self.numbered:
            stands_for = {"*": r"\d+", "?": r"[^.]+"}
            return r"(?:.+\.)?" + "".join(stands_for.get(sign) or re.escape(sign) for sign in self.pattern)
        return fnmatch.translate(self.pattern)


@dataclass(frozen=True, slots=True)
class SlicePlan:
    """What one rank needs of a model.

    Attributes:
        rank, world: this rank, 0 to world - 1.
        rules: the first that fits decides.
        unmatched: what a tensor is that no rule fits: "replicated", or an "error".
        strict: a rule that fits no tensor is an error. If not, only a plan that slices none is one.

    Raises:
        UsageError: a rank outside the world, or a rule that cannot be meant.
    """

    rank: int
    world: int
    rules: tuple[Rule, ...]
    unmatched: Unmatched = "replicated"
    strict: bool = True
    _patterns: re.Pattern[str] = field(init=False, repr=False, compare=False)  # group i + 1 for rule i

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        expressions = "|".join(f"({rule.expression})" for rule in self.rules)
        object.__setattr__(self, "_patterns", re.compile(expressions if self.rules else "(?!)"))
        if self.world < 1:
            raise UsageError(f"world must be at least 1, not {self.world}")
        if not 0 <= self.rank < self.world:
            raise UsageError(f"rank {self.rank} is not one of 0 to {self.world - 1}")
        if self.unmatched not in get_args(Unmatched):
            raise UsageError(
                f"unmatched must be one of {', '.join(get_args(Unmatched))}, not {self.unmatched!r}"
            )
        for rule in self.rules:
            _check_rule(rule)

    def rule(self, name: str) -> Rule | None:
        """The rule that decides about a name; None if no rule fits and that means replicated.

        Raises:
            UsageError: no rule fits, and that is an error.
        """
        found = self._patterns.fullmatch(name)
        if found is not None:
            assert found.lastindex is not None  # every alternative is a group
            return self.rules[found.lastindex - 1]
        if self.unmatched == "error":
            raise UsageError(f"no slicing rule fits tensor {name!r}: add one, or let it be replicated")
        return None

    def needs(self, name: str) -> bool:
        """Whether this rank needs anything of a tensor, as far as its name says.

        Raises:
            UsageError: as `rule`; or the name has an expert's number that cannot be.
        """
        rule = self.rule(name)
        return rule is None or not isinstance(rule.slicing, Experts) or self._owns(name, rule.slicing)

    def cut(self, info: TensorInfo) -> Cut | None:
        """What this rank needs of a tensor; None: nothing, it does without.

        Raises:
            UsageError: the tensor cannot be sliced as its rule says.
        """
        rule = self.rule(info.name)
        slicing = Replicated() if rule is None else rule.slicing
        if isinstance(slicing, Shaped):
            dimensions = len(info.shape)
            slicing = (
                Replicated() if not dimensions else slicing.vector if dimensions == 1 else slicing.matrix
            )
        if isinstance(slicing, Replicated):
            return Cut(info)
        if isinstance(slicing, Experts):
            if _expert_number(info.name, slicing) is not None:
                return Cut(info) if self._owns(info.name, slicing) else None
            return cut(info, 0, self._expert_rows(info, slicing))
        dim = _dimension(info, slicing.dim)
        if isinstance(slicing, Split):
            return cut(
                info, dim, [self._share(info, dim, (0, info.shape[dim]), slicing.heads, slicing.uneven)]
            )
        spans, start = [], 0
        for part in _parts(info, dim, slicing):
            spans.append(self._share(info, dim, (start, start + part.size), part.heads, slicing.uneven))
            start += part.size
        return cut(info, dim, spans)

    def check(self, present: Iterable[str], where: str) -> None:
        """Compare the rules with all names of a checkpoint.

        Raises:
            UsageError: a rule fits none of them.
        """
        names = list(present)
        if self.strict:
            for rule in self.rules:
                if not _fits_any(rule, names):
                    raise UsageError(
                        f"{where} has no tensor that fits the slicing rule {rule.pattern!r}: check the pattern"
                    )
            return
        slicing = [rule for rule in self.rules if not isinstance(rule.slicing, Replicated)]
        if slicing and not any(self._slices(name) for name in names):
            raise UsageError(
                f"{where} has no tensor that fits any of the {len(slicing)} slicing rules "
                f"({slicing[0].pattern!r} and others): is the plan another model's?"
            )

    def _slices(self, name: str) -> bool:
        rule = self.rule(name)
        return rule is not None and not isinstance(rule.slicing, Replicated)

    def _owns(self, name: str, experts: Experts) -> bool:
        number = _expert_number(name, experts)
        return number is None or _owner(name, number, experts, self.world) == self.rank

    def _share(self, info: TensorInfo, dim: int, span: Span, heads: int | None, uneven: bool) -> Span:
        start, stop = span
        size = stop - start
        groups = self.world if heads is None else heads
        if uneven:
            group = -(-size // groups)
        elif size % groups:
            what = f"{groups} ranks" if heads is None else f"{groups} heads"
            raise UsageError(
                f"tensor {info.name!r} of shape {list(info.shape)} cannot be sliced along dimension {dim}: "
                f"{size} does not divide by {what}; use another number of ranks, or replicate it"
            )
        else:
            group = size // groups
        if groups >= self.world:
            if groups % self.world:
                raise UsageError(
                    f"tensor {info.name!r} has {groups} heads, which do not divide by {self.world} ranks: "
                    "use another number of ranks, or replicate it"
                )
            each = groups // self.world
            first, last = self.rank * each, (self.rank + 1) * each
        else:
            if self.world % groups:
                raise UsageError(
                    f"tensor {info.name!r} has {groups} heads, of which {self.world} ranks cannot have equal "
                    "shares: use another number of ranks, or replicate it"
                )
            first = self.rank * groups // self.world
            last = first + 1
        return min(stop, start + first * group), min(stop, start + last * group)

    def _expert_rows(self, info: TensorInfo, experts: Experts) -> Sequence[Span]:
        if not info.shape:
            raise UsageError(f"tensor {info.name!r} has no dimension along which experts could be stacked")
        count = info.shape[0]
        if experts.count is not None and count != experts.count:
            raise UsageError(
                f"tensor {info.name!r} of shape {list(info.shape)} does not stack {experts.count} experts along "
                "its first dimension: correct the rule's pattern or count"
            )
        each = _experts_each(info.name, count, self.world)
        if experts.order == "linear":
            return [(self.rank * each, (self.rank + 1) * each)]
        return [(number, number + 1) for number in range(self.rank, count, self.world)]


def _fits_any(rule: Rule, names: Iterable[str]) -> bool:
    fits = re.compile(rule.expression).fullmatch
    return any(fits(name) for name in names)


def _check_rule(rule: Rule) -> None:
    slicing = rule.slicing
    if isinstance(slicing, Shaped):
        _check_rule(Rule(rule.pattern, slicing.vector))
        _check_rule(Rule(rule.pattern, slicing.matrix))
    counts: list[int | None] = []
    if isinstance(slicing, Split):
        counts = [slicing.heads]
    elif isinstance(slicing, Experts):
        counts = [slicing.count]
    elif isinstance(slicing, Fused):
        if isinstance(slicing.parts, int):
            counts = [slicing.parts]
        else:
            counts = [number for part in slicing.parts for number in (part.size, part.heads)]
            counts.append(len(slicing.parts))
    if any(number is not None and number < 1 for number in counts):
        raise UsageError(f"the slicing rule for {rule.pattern!r} has a size or count below 1: {slicing}")


def _dimension(info: TensorInfo, dim: int) -> int:
    dimensions = len(info.shape)
    if not -dimensions <= dim < dimensions:
        raise UsageError(
            f"tensor {info.name!r} of shape {list(info.shape)} has no dimension {dim}: correct the slicing rule"
        )
    return dim % dimensions


def _parts(info: TensorInfo, dim: int, fused: Fused) -> Sequence[Part]:
    size = info.shape[dim]
    if isinstance(fused.parts, int):
        if size % fused.parts:
            raise UsageError(
                f"tensor {info.name!r} of shape {list(info.shape)} does not consist of {fused.parts} equal parts "
                f"along dimension {dim}: correct the slicing rule"
            )
        return [Part(size // fused.parts)] * fused.parts
    total = sum(part.size for part in fused.parts)
    if total != size:
        raise UsageError(
            f"tensor {info.name!r} of shape {list(info.shape)} has {size} along dimension {dim}, but the parts of "
            f"its slicing rule add up to {total}: correct the rule"
        )
    return fused.parts


@functools.cache
def _expert_pattern(after: str) -> re.Pattern[str]:
    return re.compile(rf"(?:^|\.){re.escape(after)}\.(\d+)(?:\.|$)")


def _expert_number(name: str, experts: Experts) -> int | None:
    found = _expert_pattern(experts.after).search(name)
    return None if found is None else int(found[1])


def _owner(name: str, number: int, experts: Experts, world: int) -> int:
    if experts.count is None:
        raise UsageError(
            f"tensor {name!r} is one expert's own: say in the slicing rule how many experts there are"
        )
    if number >= experts.count:
        raise UsageError(
            f"tensor {name!r} is of expert {number}, but the slicing rule counts {experts.count}"
        )
    each = _experts_each(name, experts.count, world)
    return number // each if experts.order == "linear" else number % world


def _experts_each(name: str, count: int, world: int) -> int:
    if count % world:
        raise UsageError(
            f"tensor {name!r}: {count} experts do not divide by {world} ranks; use another number of ranks"
        )
    return count // world
