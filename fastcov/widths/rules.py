r"""Rules of demand: measures of a spectrum that say how many channels a feature map asks for.

A new rule is one more entry of :data:`RULES`; nothing else knows a rule by its name.

A spectrum of features alone says how many directions a map has, but not if anything reads them: a
map that a norm has just scaled to unit variance is full, whatever the next layer makes of it. The
rule ``gradient`` is for spectra of :math:`S^{1/2} G S^{1/2}`, where :math:`S` is a map's
covariance and :math:`G` that of the loss's gradient with respect to the map. An eigenvalue is then
the squared change of the loss, to first order, if its direction went: a unit that all maps share,
so that one threshold holds for the whole network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from fastcov.names import closest
from fastcov.spectra.spectrum import Spectrum

_THRESHOLD = 1e-3
_SHARE = 0.99


@dataclass(frozen=True)
class Rule:
    """Measure of demand, in channels.

    Args:
        name: Word by which users choose the rule.
        demand: Channels that a feature map asks for, given its spectrum and the largest eigenvalue
            of all spectra that are read.
        reads: Spectra that the rule is made for: of "features", or of "sensitivity", which is
            S^(1/2) G S^(1/2).
    """

    name: str
    demand: Callable[[Spectrum, float], float]
    reads: Literal["features", "sensitivity"] = "features"


def _shared_dof(spectrum: Spectrum, largest: float) -> float:
    return spectrum.dof(_THRESHOLD * largest) if largest > 0 else 0.0


RULES = {
    rule.name: rule
    for rule in (
        # Degrees of freedom at 1e-3 of the map's own largest eigenvalue.
        Rule("dof", lambda spectrum, _: spectrum.dof()),
        # Rank that holds 99 % of the variance.
        Rule("share", lambda spectrum, _: spectrum.rank_at(_SHARE)),
        # Eigenvalues above 1e-3 of the map's own largest.
        Rule("relative", lambda spectrum, _: spectrum.dim(_THRESHOLD, True)),
        # Eigenvalues above 1e-3 itself.
        Rule("absolute", lambda spectrum, _: spectrum.dim(_THRESHOLD, False)),
        # Degrees of freedom at 1e-3 of the largest eigenvalue of all maps.
        Rule("gradient", _shared_dof, reads="sensitivity"),
    )
}
"""Every rule by its name."""


def find_rule(rule: str | Rule | Callable[[Spectrum], float]) -> Rule:
    """Rule object for a rule's name, or for a function of one spectrum.

    Args:
        rule: A key of :data:`RULES`, a rule, or a function that gives the demand of one spectrum.

    Returns:
        The rule.

    Raises:
        TypeError: If ``rule`` is none of these.
        ValueError: If the name is unknown.

    Example:
        >>> find_rule("gradient").reads, find_rule(lambda spectrum: 8.0).name
        ('sensitivity', 'custom')
    """
    if isinstance(rule, Rule):
        return rule
    if not isinstance(rule, str):
        if not callable(rule):
            raise TypeError(f"rule is {rule!r}; give a name, a Rule or a function of one spectrum")
        name = getattr(rule, "__name__", "<lambda>")
        return Rule("custom" if name == "<lambda>" else name, lambda spectrum, _: rule(spectrum))
    if rule not in RULES:
        raise ValueError(
            f"unknown rule {rule!r}{closest(rule, RULES)}; choose from {', '.join(RULES)}"
        )
    return RULES[rule]
