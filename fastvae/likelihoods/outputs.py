"""Decoder outputs that name their parameters: mappings, objects with attributes, and torch distributions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch import distributions as td

from ..core.checks import shape_of
from ..core.deferred import LastLayer
from ..distributions.base import Distribution
from .natural import Natural

if TYPE_CHECKING:
    from .base import Likelihood

# Synonyms of parameters, those that encoders' outputs have as well.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "mean": ("mu", "loc"),
    "location": ("loc", "mu"),
    "logvar": ("log_var", "log_covariance"),
}
# Names of a decoder's only output: in diffusers and in pythae.
WHOLE = ("sample", "reconstruction")
# Other forms of a parameter. They are not converted, but contradict one that the likelihood itself has.
_SCALES = ("scale", "std", "stddev", "sigma", "var", "variance", "log_scale", "log_std", "log_sigma")
_FORMS: dict[str, tuple[str, ...]] = {
    "logvar": _SCALES,
    "log_scale": ("logvar", *SYNONYMS["logvar"], *_SCALES),
    "log_df": ("df",),
    "log_inverse_dispersion": ("inverse_dispersion", "dispersion", "theta", "px_r"),
}
# Names of parameters, in a fixed order, to which each declared likelihood adds its own.
KNOWN: dict[str, None] = dict.fromkeys(
    (
        "logits", "probs", "rate", "location", "log_scale", "coefficients",
        *(name for names in (*SYNONYMS.values(), *_FORMS.values()) for name in names),
    )
)  # fmt: skip


def by_name(likelihood: Likelihood, output: Any) -> Any:
    """Return a decoder's output as the tensor or the tuple of tensors that the likelihood reads.

    Tensors, last layers, lists and tuples pass as they are, except for a single parameter in a tuple of one,
    and so does anything in which no parameter is named: the likelihood refuses it where it validates its
    parameters.

    Raises:
        TypeError: if parameters are named, but not those that the likelihood reads.
    """
    if isinstance(output, Tensor) or type(output) is LastLayer:
        return output
    if type(output) in (tuple, list):
        return output[0] if len(output) == 1 and len(likelihood.expected_names) == 1 else output
    if not likelihood.expected_names:
        return output
    if isinstance(output, td.Distribution):
        return _of_distribution(likelihood, output)
    if isinstance(output, Distribution):
        raise TypeError(
            f"the decoder returned a fastvae.distributions.{type(output).__name__}, a distribution over z; "
            f"{_shown(likelihood)} reads {_looked_for(likelihood)}"
        )
    entries = _entries(output)
    found = {name: value for name, value in entries.items() if _is_output(value)}
    named = [name for name in found if name in KNOWN or name in WHOLE]
    # A tuple with field names of the user's own is read by position.
    if not (named or isinstance(output, Mapping)):
        one = isinstance(output, tuple) and len(output) == 1 and len(likelihood.expected_names) == 1
        return output[0] if one and type(output) is not Natural else output
    selected = _selected(likelihood, output, entries, found)
    return selected[0] if len(selected) == 1 else tuple(selected)


def _is_output(value: Any) -> bool:
    return isinstance(value, Tensor) or type(value) is LastLayer


def _entries(output: Any) -> dict[str, Any]:
    """Return what a mapping or a named tuple contains, or the parameters among an object's attributes."""
    if isinstance(output, Mapping):
        return dict(output.items())
    if hasattr(output, "_fields"):
        return {name: getattr(output, name) for name in output._fields}
    found = {name: getattr(output, name, None) for name in (*KNOWN, *WHOLE)}
    return {name: value for name, value in found.items() if _is_output(value)}


def _selected(
    likelihood: Likelihood, output: Any, entries: dict[str, Any], found: dict[str, Any]
) -> list[Any]:
    """Return the parameters that the likelihood reads, in its order."""
    names = likelihood.expected_names
    selected, missing = [], []
    for name in (*names, *likelihood.optional_names):
        there = [n for n in (name, *SYNONYMS.get(name, ())) if n in found]
        if not there and name in names:
            missing.append(name)
        elif there:
            selected.append(_only(likelihood, output, entries, found, there))
    if len(names) == 1 and missing and not any([n in KNOWN for n in found]):
        there = [n for n in WHOLE if n in found]
        if there:
            return [_only(likelihood, output, entries, found, there)]
    if missing:
        raise TypeError(_mismatch(likelihood, output, entries) + _hint(likelihood, entries, missing))
    for own in likelihood.own_names:
        for name in (own, *SYNONYMS.get(own, ()), *_FORMS.get(own, ())):
            if name in found and name not in names:
                raise TypeError(
                    f"{_mismatch(likelihood, output, entries)}: the likelihood has its own {own}, so the "
                    f"decoder's {name!r} would be ignored. Leave {name!r} out of the output, or use a "
                    "likelihood that reads it"
                )
    return selected


def _only(
    likelihood: Likelihood, output: Any, entries: dict[str, Any], found: dict[str, Any], names: list[str]
) -> Any:
    """Return the tensor of these synonyms, of which one, or the same under several names, may be there."""
    first = found[names[0]]
    if any([found[name] is not first for name in names[1:]]):
        raise TypeError(
            f"{_mismatch(likelihood, output, entries)}, but {' and '.join(map(repr, names))} are different "
            "tensors for one parameter; leave out all but one"
        )
    return first


def _mismatch(likelihood: Likelihood, output: Any, entries: dict[str, Any]) -> str:
    """Return the names that were read and those that the likelihood looks for, for error messages."""
    return (
        f"the decoder returned {named_entries(output, entries)}; {_shown(likelihood)} reads "
        f"{_looked_for(likelihood)}, tensors by these names"
    )


def _looked_for(likelihood: Likelihood) -> str:
    looks = []
    for name in likelihood.expected_names:
        others = SYNONYMS.get(name, ()) + (WHOLE if len(likelihood.expected_names) == 1 else ())
        looks.append(repr(name) + (f" (or {', '.join(map(repr, others))})" if others else ""))
    return " and ".join(looks)


def named_entries(output: Any, entries: dict[str, Any] | None = None) -> str:
    """Describe a mapping, or an object with attributes, by the names in it."""
    entries = _entries(output) if entries is None else entries
    shown = [repr(n) if _is_output(v) else f"{n!r} ({type(v).__name__})" for n, v in entries.items()]
    return f"a {type(output).__name__} with {', '.join(shown) or 'nothing'}"


def _shown(likelihood: Likelihood) -> str:
    """Return the likelihood with its options, such as ``Gaussian(scale=0.1)``."""
    return f"the likelihood {type(likelihood).__name__}({likelihood.extra_repr()})"


def _hint(likelihood: Likelihood, entries: dict[str, Any], missing: list[str]) -> str:
    kind, option = type(likelihood).__name__, likelihood.option
    lacks = f". Missing: {', '.join(map(repr, missing))}"
    if option and missing == [option]:
        return f"{lacks}; {kind}({option}=True) reads {option!r} alone, so leave the option out for others"
    if option in entries:
        return f"{lacks}; for {option!r} use likelihood=fastvae.likelihoods.{kind}({option}=True)"
    forms = [n for name in missing for n in _FORMS.get(name, ()) if n in entries]
    if forms:
        return f"{lacks}, which is not computed from {forms[0]!r}: return it, or a torch.distributions object"
    names = likelihood.expected_names
    there = len(names) - len(missing)
    if missing == list(names[there:]):
        lacks += likelihood.completion(there or sum([name in WHOLE for name in entries]))
    return lacks


def _of_distribution(likelihood: Likelihood, output: td.Distribution) -> Any:
    """Return the parameters of a torch.distributions object of the likelihood's family.

    Raises:
        TypeError: if it is of another family, or if the likelihood was constructed with a parameter.
        ValueError: if its batch axis is part of the event.
    """
    d, family = output, likelihood.family
    while type(d) is td.Independent:
        d = d.base_dist
    name = _name(output)
    as_it_is = "fastvae.likelihoods.from_distribution(lambda d: d), which evaluates any distribution as it is"
    if not _is_of(d, family):
        reads = "no distribution" if family is None else f"torch.distributions.{family.__name__}"
        raise TypeError(
            f"the decoder returned {name}, but {_shown(likelihood)} reads {reads}; use "
            f"{_likelihood_of(d)}likelihood={as_it_is}"
        )
    if own := likelihood.own_names:
        raise TypeError(
            f"the decoder returned {name}, which has all of its parameters, but {_shown(likelihood)} has its "
            f"own {' and '.join(own)}; use {_likelihood_of(d)}likelihood={as_it_is}"
        )
    if not output.batch_shape:
        raise ValueError(
            f"the decoder returned {name} of event shape {list(output.event_shape)}, whose event includes "
            "the batch axis; reinterpret one axis less"
        )
    parameters = likelihood.parameters_of(d)
    return Natural(parameters) if likelihood.expected_names == (likelihood.option,) else parameters


def _name(d: td.Distribution) -> str:
    if isinstance(d, td.Independent):
        return f"Independent({_name(d.base_dist)}, {d.reinterpreted_batch_ndims})"
    if type(d).__module__.startswith("torch.distributions."):
        return f"torch.distributions.{type(d).__name__}"
    return f"a {type(d).__name__}, a distribution of your own,"


def _is_of(d: td.Distribution, family: type[td.Distribution] | None) -> bool:
    """Return True if d has the density of the family, as a subclass has that does not override it."""
    return family is not None and isinstance(d, family) and type(d).log_prob is family.log_prob


def _likelihood_of(d: td.Distribution) -> str:
    from .base import NAMED

    return "".join(f"likelihood={name!r}, or " for name, kind in NAMED.items() if _is_of(d, kind.family))


def describe(value: Any) -> str:
    """Describe a decoder's output, for error messages."""
    if isinstance(value, Tensor):
        return f"a tensor {shape_of(value)}"
    if type(value) is LastLayer:
        return "the output of a FusedHead"
    if isinstance(value, td.Distribution):
        return _name(value)
    if isinstance(value, Mapping):
        return named_entries(value)
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__
