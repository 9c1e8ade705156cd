"""Likelihood of a table, whose columns have likelihoods of several kinds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.checks import as_int64, check_data, check_same_device, check_tensor, shape_of
from ..core.nested import Conditioning
from ..core.numbers import as_tensor
from ..ops.categorical import Classes, column_rows
from ..ops.op import accumulator
from .base import Likelihood
from .categorical import Categorical
from .declared import Declared
from .optimal_gaussian import OptimalGaussian
from .outputs import describe
from .read import as_likelihood

Column = tuple[str, str | Likelihood] | tuple[str, str | Likelihood, int]


class _Place(NamedTuple):
    """Column of x, and its columns of the decoder's output."""

    name: str
    likelihood: Likelihood
    column: int
    first: int
    width: int


class _Selection:
    """Columns of a matrix: a view where their distance is constant, a copy elsewhere."""

    def __init__(self, columns: Sequence[int]):
        steps = {b - a for a, b in zip(columns, columns[1:], strict=False)}
        regular = len(steps) <= 1 and min(steps, default=1) > 0
        self._slice = slice(columns[0], columns[-1] + 1, min(steps, default=1)) if regular else None
        self._index = torch.tensor(columns)

    def of(self, matrix: Tensor) -> Tensor:
        if self._slice is not None:
            return matrix[:, self._slice]
        if self._index.device != matrix.device:
            self._index = self._index.to(matrix.device)
        return matrix.index_select(1, self._index)


class _Group:
    """Columns that one op evaluates together."""

    def __init__(self, places: list[_Place], weight: float):
        self.places, self.weight = places, weight
        self.likelihood = places[0].likelihood
        self.data = _Selection([p.column for p in places])
        if isinstance(self.likelihood, Categorical):
            self.outputs = [_Selection([p.first + c for p in places for c in range(p.width)])]
            self.begins = (0, *itertools.accumulate(p.width for p in places))
            # Of a mask of the columns, for each output.
            self.repeated = _Selection([i for i, p in enumerate(places) for _ in range(p.width)])
        else:
            width = places[0].width
            self.outputs = [_Selection([p.first + j for p in places]) for j in range(width)]

    def log_likelihood(self, x: Tensor, parameters: Tensor, samples: int, mask: Tensor | None) -> Tensor:
        """Return the sum of the columns' log p [K, B]."""
        data, outputs = self.data.of(x), tuple([o.of(parameters) for o in self.outputs])
        seen = None if mask is None else self.data.of(mask)
        try:
            value = self._value(data, outputs, samples, seen)
        except (TypeError, ValueError) as error:
            names = ", ".join(repr(p.name) for p in self.places)
            raise type(error)(f"columns {names}: {error}") from error
        return value if self.weight == 1 else value * self.weight

    def _value(self, x: Tensor, outputs: tuple[Tensor, ...], samples: int, mask: Tensor | None) -> Tensor:
        likelihood = self.likelihood
        if isinstance(likelihood, Categorical):
            if mask is not None:
                # In a dtype that represents ignore_index.
                x = torch.where(mask, as_int64(x), likelihood.ignore_index)
            seen = None if mask is None or not likelihood.probs else self.repeated.of(mask)
            logits = likelihood._logits(outputs[0], seen)
            return column_rows(x, self.begins, logits, likelihood.ignore_index).reshape(samples, x.shape[0])
        assert isinstance(likelihood, Declared)
        if len(self.places) == 1 or type(likelihood).log_likelihood is not Declared.log_likelihood:
            given = outputs if len(outputs) > 1 else outputs[0]
            return likelihood.log_likelihood(x, given, samples, Conditioning.of(mask, None, None))
        natural = likelihood._natural(outputs if len(outputs) > 1 else outputs[0], mask)
        returned = natural if isinstance(natural, tuple) else (natural,)
        spread = [p.unflatten(0, (samples, x.shape[0])) for p in returned]
        return likelihood._op(x, *likelihood._arranged(spread, self._given(x, outputs[0])), mask=mask)

    def _given(self, x: Tensor, output: Tensor) -> tuple[float | Tensor, ...]:
        """Return the parameters of the columns' likelihoods themselves: a number, or a row of them."""
        each = [p.likelihood._given(x[:, :1]) for p in self.places if isinstance(p.likelihood, Declared)]
        return tuple([self._row(values, output) for values in zip(*each, strict=True)])

    def _row(self, values: tuple[float | Tensor, ...], output: Tensor) -> float | Tensor:
        if all(isinstance(v, float) and v == values[0] for v in values):
            return values[0]
        dtype, device = accumulator(output.dtype), output.device
        return torch.stack([as_tensor(v, dtype, device).reshape(()) for v in values])


class Columns(Likelihood):
    r"""Likelihood of a table p(x|z), whose columns have likelihoods of several kinds, independent given z.

    x is one tensor [B, n], a number per column. The decoder returns one tensor [N, W] with the outputs of
    each column, side by side in the order of the columns: (mean, logvar) of a ``"gaussian"``, the mean of a
    ``Gaussian(scale=...)``, one logit of a ``"bernoulli"``, C logits of a ``"categorical"`` of C classes.

    .. math:: \log p(x|z_k) = \sum_{\text{columns } j} w_j \log p_j(x_j|z_k)

    Columns of one kind are evaluated by one op, however many there are. A ``mask`` [B, n] leaves out missing
    values. For parts of other shapes use :class:`fastvae.likelihoods.Joint`.

    Args:
        columns: the name and the likelihood of each column, a name or an object; of a categorical one, and of
            no other, also its number of classes.
        weights: factors of columns' log p, by name; default 1.

    Attributes:
        width: W, the number of the decoder's outputs.

    Raises:
        TypeError, ValueError: for unknown or repeated names, or a likelihood of another form; when called,
            for an x or a decoder's output of another shape.

    References:
        Xu, Skoularidou, Cuesta-Infante & Veeramachaneni, Modeling Tabular Data using Conditional GAN, 2019,
        sec. 4.4 (TVAE), for the use.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.likelihoods import Columns, Gaussian
        >>> columns = [("age", "gaussian"), ("income", Gaussian(scale=0.1)), ("city", "categorical", 8)]
        >>> table = Columns(columns)
        >>> table.width
        11
        >>> x = torch.tensor([[0.3, -1.2, 5.0], [0.1, 0.4, 0.0]])
        >>> fastvae.elbo(x, torch.zeros(2, 2 * 4), torch.nn.Linear(4, table.width), likelihood=table).shape
        torch.Size([])
    """

    reads = "columns"
    takes_integers = True
    differentiable = False

    def __init__(self, columns: Sequence[Column], *, weights: Mapping[str, float] | None = None):
        super().__init__()
        if not isinstance(columns, (list, tuple)) or not columns:
            raise TypeError(
                'columns must be a list such as [("age", "gaussian"), ("city", "categorical", 8)]; got '
                f"{describe(columns)}"
            )
        places: list[_Place] = []
        first = 0
        for index, column in enumerate(columns):
            name, likelihood, width = _read(column)
            if name in [p.name for p in places]:
                raise ValueError(f"columns has two of the name {name!r}; names must differ")
            places.append(_Place(name, likelihood, index, first, width))
            first += width
        self.width = first
        self.names = tuple(p.name for p in places)
        self.parts = nn.ModuleList([p.likelihood for p in places])
        weight = read_weights(weights, self.names)
        self._places = places
        groups: dict[Hashable, list[_Place]] = {}
        for place in places:
            groups.setdefault((_settings(place), weight[place.name]), []).append(place)
        self._groups = [_Group(g, weight[g[0].name]) for g in groups.values()]

    def check(self, x: Any, name: str = "x") -> None:
        x = check_data(x, Classes, name)
        if x.dim() != 2 or x.shape[1] != len(self.names):
            raise ValueError(
                f"{name} has shape {shape_of(x)}; expected [B, {len(self.names)}], a number of each column "
                f"of {self.names}"
            )
        for place in self._places:
            if type(place.likelihood).check not in (Declared.check, Likelihood.check):
                place.likelihood.check(
                    x[:, place.column : place.column + 1], f"column {place.name!r} of {name}"
                )

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        mask, size_factor, _ = conditioning or Conditioning()
        if size_factor is not None:
            raise self.no_size()
        self._check_output(x, parameters, samples)
        total: Any = 0
        for group in self._groups:
            total = total + group.log_likelihood(x, parameters, samples, mask)
        return total  # type: ignore[no-any-return]

    def log_prob(self, x: Tensor, parameters: Tensor) -> Tensor:
        """Return log p(x|z) [N] of N rows, the weighted sum over the columns.

        Args:
            x: data [N, n].
            parameters: the decoder's output [N, W].
        """
        return self.log_likelihood(x, parameters, 1)[0]

    def split(self, parameters: Tensor) -> dict[str, Any]:
        """Return the outputs of each column: a tensor [N, 1], a tuple of them, or logits [N, C].

        Args:
            parameters: the decoder's output [N, W].
        """
        return {place.name: outputs for place, outputs in self._each(parameters)}

    def mean(self, parameters: Tensor) -> Tensor:
        """Return the mean of each column [N, n], and the most probable class of a categorical one."""
        found = []
        for place, outputs in self._each(parameters):
            if isinstance(place.likelihood, Categorical):
                found.append(outputs.argmax(1, keepdim=True).to(parameters.dtype))
            else:
                found.append(place.likelihood.mean(outputs).to(parameters.dtype))
        return torch.cat(found, 1)

    def sample(self, parameters: Tensor, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw each column, [N, n]."""
        dtype = accumulator(parameters.dtype)
        drawn = [place.likelihood.sample(o, generator=generator) for place, o in self._each(parameters)]
        return torch.cat([d.reshape(parameters.shape[0], 1).to(dtype) for d in drawn], 1)

    def extra_repr(self) -> str:
        return f"{len(self.names)} columns, width={self.width}"

    def _each(self, parameters: Tensor) -> Iterator[tuple[_Place, Any]]:
        for place in self._places:
            part = parameters[:, place.first : place.first + place.width]
            several = not isinstance(place.likelihood, Categorical) and place.width > 1
            yield place, tuple(part.split(1, 1)) if several else part

    def _check_output(self, x: Tensor, parameters: Any, samples: int) -> None:
        if not isinstance(parameters, Tensor):
            raise TypeError(
                "the decoder of a Columns likelihood must return one tensor, the outputs of all columns side "
                f"by side; got {describe(parameters)}"
            )
        check_tensor("the decoder's output", parameters)
        check_same_device("the decoder's output", parameters, "x", x)
        if parameters.shape != (samples * x.shape[0], self.width):
            raise ValueError(
                f"the decoder's output has shape {shape_of(parameters)}; expected K·B = "
                f"{samples}·{x.shape[0]} rows of {self.width} numbers, the outputs of {len(self.names)} "
                "columns (the likelihood's .width and .split)"
            )


def _read(column: Any) -> tuple[str, Likelihood, int]:
    """Return the name, likelihood and number of outputs of a column."""
    if not isinstance(column, (list, tuple)) or len(column) not in (2, 3) or not isinstance(column[0], str):
        raise TypeError(
            f'a column must be (name, likelihood), or (name, "categorical", classes); got {column!r}'
        )
    name, likelihood, *classes = column
    part = as_likelihood(likelihood)
    own = type(part)
    if isinstance(part, Categorical) and own.log_likelihood is Categorical.log_likelihood:
        if own.log_prob is not Categorical.log_prob:
            raise TypeError(f"column {name!r}: {own.__name__} overrides log_prob; use Joint")
        if len(classes) != 1 or type(classes[0]) is not int or classes[0] < 1:
            raise TypeError(
                f'column {name!r} of classes needs their number, as in ({name!r}, "categorical", 8); got '
                f"{column!r}"
            )
        return name, part, classes[0]
    if not isinstance(part, Declared) or not part.is_declared or isinstance(part, OptimalGaussian):
        raise TypeError(
            f"column {name!r} has a {own.__name__} likelihood; Columns takes those of one number with an op "
            "of their own, such as 'gaussian', and 'categorical'. Use Joint for others"
        )
    if classes:
        raise TypeError(
            f"column {name!r} has no classes: expected ({name!r}, {likelihood!r}); got {column!r}"
        )
    given = part._given(torch.zeros(1, 1))
    if any(isinstance(v, Tensor) and v.numel() != 1 for v in given):
        raise ValueError(f"column {name!r} is one number, but its likelihood has a parameter of several")
    return name, part, len(part.outputs) - len(given)


def _settings(place: _Place) -> Hashable:
    """Return what the columns of a group have in common."""
    part = place.likelihood
    if isinstance(part, Declared) and type(part).log_likelihood is not Declared.log_likelihood:
        return place.column  # reads x in its own way
    own = {
        n: v
        for n, v in vars(part).items()
        if isinstance(v, (bool, int, float, str)) and n != "training" and not n.startswith("fixed_")
    }
    return type(part), place.width if not isinstance(part, Categorical) else 0, tuple(sorted(own.items()))


def read_weights(weights: Mapping[str, float] | None, names: Sequence[str]) -> dict[str, float]:
    """Validate weights by name, and return one for each."""
    found = dict.fromkeys(names, 1.0)
    for name, value in (weights or {}).items():
        if name not in found:
            raise ValueError(f"weights has {name!r}, which is not one of {', '.join(map(repr, names))}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError(f"weights[{name!r}] must be a finite number; got {value!r}")
        found[name] = float(value)
    return found
