"""Laws of the width solver, and the demands it starts from."""

import itertools
import math
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcov.spectra.spectrum import Spectrum
from fastcov.widths import (
    RULES,
    Rule,
    WidthGroup,
    demand,
    find_rule,
    power_widths,
    random_widths,
    solve_widths,
    suggest_widths,
    uniform_widths,
)

TOLERANCE = 0.005


@dataclass(frozen=True)
class Chain:
    """Convolutions in a row: MACs are positions times width in times width out."""

    groups: list[WidthGroup]
    positions: list[int]

    def macs(self, widths: dict[str, int]) -> float:
        channels = [3] + [widths[group.name] for group in self.groups] + [10]
        return sum(
            spots * above * below
            for spots, (above, below) in zip(
                self.positions, itertools.pairwise(channels), strict=True
            )
        )

    def params(self, widths: dict[str, int]) -> float:
        channels = [3] + [widths[group.name] for group in self.groups] + [10]
        return sum(a * b for a, b in itertools.pairwise(channels))

    def current(self) -> dict[str, int]:
        return {group.name: group.width for group in self.groups}


HALF = Spectrum((torch.arange(64) < 32).float(), count=4096, total=32.0)
FULL = Spectrum(torch.ones(64), count=4096, total=64.0)
PAIR = [WidthGroup("a", ("half",), 64), WidthGroup("b", ("full",), 64)]


def plan_of_pair(**options):
    options.setdefault("mac_fn", lambda widths: widths["a"] * widths["b"])
    return suggest_widths({"half": HALF, "full": FULL}, PAIR, **options)


@pytest.mark.parametrize("power", [1e-300, 1e-9, 1e3, 1e6, 1e300])
def test_powers_of_any_size_give_a_plan(power: float) -> None:
    plan = plan_of_pair(power=power)
    expected = {"a": 64, "b": 64} if power < 1 else {"a": 8, "b": 512}
    assert plan.widths == expected
    assert plan.macs <= 4096


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"power": None}, TypeError, "power is None"),
        ({"power": "1"}, TypeError, "power is '1'"),
        ({"power": 1j}, TypeError, "power is 1j"),
        ({"power": torch.tensor([1.0, 2.0])}, TypeError, "power is tensor"),
        ({"power": 10**400}, ValueError, "power is inf"),
        ({"budget": "5"}, TypeError, "budget is '5'"),
        ({"budget": 10**400}, ValueError, "budget is inf"),
        ({"budget": 1e300}, ValueError, r"stays below the budget of 1e\+300 "),
        ({"budget": 1e-9}, ValueError, "above the budget of 1e-09"),
        ({"tolerance": None}, TypeError, "tolerance is None"),
        ({"max_params": "x", "param_fn": len}, TypeError, "max_params is 'x'"),
        (
            {"mac_fn": lambda widths: None},
            TypeError,
            r"cost of widths .* is None",
        ),
        ({"rule": lambda spectrum: "x"}, TypeError, "demand of 'half' is 'x'"),
        ({"rule": 5}, TypeError, "rule is 5"),
    ],
)
def test_arguments_that_are_no_numbers_are_named(options, error, message: str) -> None:
    with pytest.raises(error, match=message):
        plan_of_pair(**options)


def test_groups_and_spectra_of_another_type_are_named() -> None:
    full = Spectrum(torch.ones(64), count=4096, total=64.0)
    groups = [WidthGroup("a", ("conv1",), 64)]
    with pytest.raises(TypeError, match=r"members is the text 'conv1'; give a tuple, \('conv1',\)"):
        WidthGroup("a", "conv1", 64)
    with pytest.raises(
        TypeError, match=r"groups holds 'a'; give a sequence of fastcov\.WidthGroup"
    ):
        suggest_widths({"conv1": full}, {"a": ("conv1",)}, lambda widths: widths["a"])
    with pytest.raises(TypeError, match=r"spectra is a list; .* as tracker\.spectra\(\) is"):
        suggest_widths([full], groups, lambda widths: widths["a"])


@st.composite
def chains(draw: st.DrawFn, multiples: tuple[int, ...] = (1, 2, 8)) -> Chain:
    count = draw(st.integers(2, 9))
    multiple = draw(st.sampled_from(multiples))
    groups = [
        WidthGroup(f"g{i}", (f"m{i}",), draw(st.integers(2, 40)) * multiple, multiple, multiple)
        for i in range(count)
    ]
    positions = draw(st.lists(st.integers(1, 900), min_size=count + 1, max_size=count + 1))
    return Chain(groups, positions)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Chain, dict[str, float]]:
    chain = draw(chains())
    # Whole numbers make ties common, which real demands hardly ever have.
    values = st.one_of(st.integers(1, 12).map(float), st.floats(0.5, 300.0))
    return chain, {group.name: draw(values) for group in chain.groups}


@given(problems())
@settings(max_examples=150, deadline=None)
def test_macs_never_exceed_the_budget_and_are_near_it_where_a_step_fits(problem):
    chain, demands = problem
    plan = solve_widths(chain.groups, demands, chain.macs)
    assert plan.budget == chain.macs(chain.current())
    assert chain.macs(plan.widths) == plan.macs <= plan.budget
    if plan.macs < (1 - TOLERANCE) * plan.budget:
        assert any("below the budget" in note for note in plan.notes)
        for group in chain.groups:
            raised = plan.widths | {group.name: plan.widths[group.name] + group.multiple}
            target = plan.alpha * demands[group.name]
            stray = raised[group.name] - group.nearest(target)
            assert (
                chain.macs(raised) > plan.budget
                or stray > max(group.multiple, 0.05 * target)
                or not _is_ordered(chain, demands, raised)
            )


@pytest.mark.parametrize("share", [0.2, 0.25, 1 / 3, 0.5, 0.7])
@pytest.mark.parametrize("multiple", [4, 8])
@pytest.mark.parametrize("own", ["a", "b", "c"])
def test_a_group_with_a_floor_of_its_own_is_not_traded_away(own, multiple, share):
    """The widths 16, 64, 64 at a third of their cost were 32, 40, 8: they are 8, 40, 32."""
    chain = Chain(
        [
            WidthGroup(name, (name,), width, multiple, 2 * multiple if name == own else multiple)
            for name, width in {"a": 16, "b": 64, "c": 64}.items()
        ],
        [1, 1, 1, 1],
    )
    plan = uniform_widths(chain.groups, chain.macs, share * chain.macs(chain.current()))
    for group in chain.groups:
        wanted = group.nearest(plan.alpha * group.width)
        assert abs(plan.widths[group.name] - wanted) <= multiple


def _is_ordered(chain: Chain, demands: dict[str, float], widths: dict[str, int]) -> bool:
    multiple = chain.groups[0].multiple
    for a in demands:
        for b in demands:
            if demands[a] > demands[b] and widths[a] < widths[b]:
                return False
            if demands[a] == demands[b] and abs(widths[a] - widths[b]) > multiple:
                return False
    return True


@given(problems())
@settings(max_examples=150, deadline=None)
def test_larger_demand_is_never_narrower_and_equal_demands_stay_within_a_step(problem):
    chain, demands = problem
    assert _is_ordered(chain, demands, solve_widths(chain.groups, demands, chain.macs).widths)


@given(chains(multiples=(1,)), st.floats(0.5, 2.0))
@settings(max_examples=60, deadline=None)
def test_fine_rounding_always_reaches_the_tolerance(chain, factor):
    wide = [
        WidthGroup(group.name, group.members, group.width * 400, 1, 1) for group in chain.groups
    ]
    fine = Chain(wide, chain.positions)
    demands = {group.name: float(index + 1) for index, group in enumerate(wide)}
    budget = factor * fine.macs(fine.current())
    plan = solve_widths(wide, demands, fine.macs, budget)
    assert (1 - TOLERANCE) * budget <= plan.macs <= budget


@given(chains(), st.floats(1.0, 100.0))
@settings(max_examples=60, deadline=None)
def test_equal_demand_gives_equal_widths_unless_only_one_step_meets_the_budget(chain, value):
    plan = solve_widths(chain.groups, dict.fromkeys(chain.current(), value), chain.macs)
    widths = set(plan.widths.values())
    multiple = chain.groups[0].multiple
    assert max(widths) - min(widths) <= multiple
    if len(widths) == 2:
        equal = dict.fromkeys(plan.widths, min(widths))
        assert chain.macs(equal) < (1 - TOLERANCE) * plan.budget


@given(problems(), st.integers(-20, 20), st.sampled_from([3.0, 0.7, 1e-6]))
@settings(max_examples=80, deadline=None)
def test_widths_depend_on_ratios_of_demands_alone(problem, exponent, factor):
    chain, demands = problem
    plan = solve_widths(chain.groups, demands, chain.macs)
    doubled = {name: value * 2.0**exponent for name, value in demands.items()}
    assert solve_widths(chain.groups, doubled, chain.macs).widths == plan.widths
    # Other factors round each product anew, so only ties that were exact may move by one step.
    scaled = solve_widths(chain.groups, {n: v * factor for n, v in demands.items()}, chain.macs)
    assert scaled.macs <= plan.budget
    if len(set(demands.values())) == len(demands):
        assert math.isclose(scaled.alpha * factor, plan.alpha, rel_tol=1e-6)


@given(problems(), st.floats(1.05, 3.0))
@settings(max_examples=60, deadline=None)
def test_a_larger_budget_never_lowers_alpha(problem, factor):
    chain, demands = problem
    plan = solve_widths(chain.groups, demands, chain.macs)
    larger = solve_widths(chain.groups, demands, chain.macs, factor * plan.budget)
    assert larger.alpha >= plan.alpha
    assert larger.macs >= plan.macs - TOLERANCE * plan.budget


@given(problems(), st.floats(0.5, 0.98))
@settings(max_examples=80, deadline=None)
def test_cap_on_parameters_holds_together_with_the_budget(problem, share):
    chain, demands = problem
    free = solve_widths(chain.groups, demands, chain.macs, param_fn=chain.params)
    floors = {group.name: group.least for group in chain.groups}
    cap = max(share * free.params, chain.params(floors))
    plan = solve_widths(chain.groups, demands, chain.macs, param_fn=chain.params, max_params=cap)
    assert plan.params == chain.params(plan.widths) <= cap
    assert plan.macs <= plan.budget
    assert 0 <= plan.power <= 1


def test_cap_flattens_the_demand_and_says_so():
    # Late layers hold the parameters, early ones the MACs: the cap moves width forward.
    groups = [WidthGroup(f"g{i}", (f"m{i}",), 64 * 2**i, 8, 8) for i in range(4)]
    chain = Chain(groups, [4096, 1024, 256, 64, 1])
    demands = {f"g{i}": 64.0 * 2**i for i in range(4)}
    free = solve_widths(groups, demands, chain.macs, param_fn=chain.params)
    capped = solve_widths(
        groups, demands, chain.macs, param_fn=chain.params, max_params=0.8 * free.params
    )
    assert capped.power < 1
    assert capped.widths["g0"] > free.widths["g0"]
    assert capped.widths["g3"] < free.widths["g3"]
    assert capped.macs >= 0.995 * free.budget
    assert "lowered the exponent" in capped.notes[0]


def test_unchanged_demand_returns_the_baseline():
    groups = [WidthGroup(f"g{i}", (f"m{i}",), width, 8, 8) for i, width in enumerate((16, 32, 64))]
    chain = Chain(groups, [100, 50, 25, 1])
    demands = {group.name: 0.37 * group.width for group in groups}
    assert solve_widths(groups, demands, chain.macs).widths == chain.current()


def test_floor_holds_and_is_noted():
    groups = [WidthGroup("a", ("a",), 64, 8, 20), WidthGroup("b", ("b",), 64, 8, 8)]
    chain = Chain(groups, [1, 1, 1])
    plan = solve_widths(groups, {"a": 1.0, "b": 1000.0}, chain.macs)
    assert plan.widths["a"] == 24
    assert plan.widths["b"] > 64
    assert "held at their floor: a" in plan.notes


def _spectrum(*eigenvalues: float) -> Spectrum:
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    return Spectrum(values, 1000, float(values.sum()))


def test_demand_follows_the_four_rules_and_averages_over_members():
    spectra = {
        # dof at lam = 1e-3 * 1: 1/1.001 + 0.001/0.002 = 0.99900 + 0.5; share 99 %: 1.
        "a": _spectrum(1.0, 1e-3, 0.0),
        # Three equal directions: dof 3/1.001, rank 3, all above 1e-3.
        "b": _spectrum(2.0, 2.0, 2.0),
    }
    group = [WidthGroup("g", ("a", "b"), 8)]
    expected_dof = (1 / 1.001 + 0.5 + 3 / 1.001) / 2
    assert demand(spectra, group, "dof")["g"] == pytest.approx(expected_dof, rel=1e-12)
    assert demand(spectra, group, "share") == {"g": (1 + 3) / 2}
    assert demand(spectra, group, "relative") == {"g": (1 + 3) / 2}
    assert demand(spectra, group, "absolute") == {"g": (1 + 3) / 2}
    scaled = {name: _spectrum(*(100 * s.eigenvalues).tolist()) for name, s in spectra.items()}
    assert demand(scaled, group, "relative") == {"g": 2.0}
    assert demand(scaled, group, "absolute") == {"g": (2 + 3) / 2}
    assert demand(spectra, group, lambda s: s.stable_rank())["g"] == pytest.approx((1.001 + 3) / 2)


def test_gradient_demand_has_one_threshold_for_all_groups():
    spectra = {"a": _spectrum(8.0, 8e-3), "b": _spectrum(8e-3, 8e-3, 0.0), "c": _spectrum(0.0)}
    groups = [WidthGroup(name, (name,), 8) for name in spectra]
    found = demand(spectra, groups, "gradient")
    # lam = 1e-3 * 8 everywhere, so an eigenvalue of 8e-3 counts for one half.
    assert found["a"] == pytest.approx(1 / 1.001 + 0.5, rel=1e-12)
    assert found["b"] == pytest.approx(1.0, rel=1e-12)
    assert found["c"] == 0
    # By its own largest eigenvalue, the map that the loss hardly feels is full.
    assert demand(spectra, groups, "dof")["b"] == pytest.approx(2 / 1.001, rel=1e-12)
    # A spectrum that no group reads does not move the threshold, and the unit does not matter.
    scaled = {name: _spectrum(*(1e-9 * s.eigenvalues).tolist()) for name, s in spectra.items()}
    again = demand(scaled | {"unread": _spectrum(100.0)}, groups, "gradient")
    assert again == pytest.approx(found, rel=1e-9)
    assert demand({"c": spectra["c"]}, groups[2:], "gradient") == {"c": 0.0}


def test_a_rule_is_found_by_its_name_and_knows_which_spectra_it_is_for():
    assert [name for name, rule in RULES.items() if rule.reads == "sensitivity"] == ["gradient"]
    assert all(rule.name == name and find_rule(name) is rule for name, rule in RULES.items())
    # A rule of one's own needs no entry: its name stands in the plan.
    total = Rule("total", lambda spectrum, largest: float(spectrum.eigenvalues.sum()) / largest)
    groups = [WidthGroup("g", ("m",), 64)]
    plan = suggest_widths({"m": _spectrum(2.0, 1.0)}, groups, lambda w: w["g"], rule=total)
    assert (plan.rule, plan.demand) == ("total", {"g": 1.5})
    plan = suggest_widths({"m": _spectrum(2.0)}, groups, lambda w: w["g"], rule=Spectrum.dof)
    assert plan.rule == "dof"


def test_suggest_widths_gives_room_to_the_layer_that_uses_it():
    groups = [WidthGroup("used", ("u",), 64), WidthGroup("idle", ("i",), 64)]
    spectra = {"u": _spectrum(*[1.0] * 64), "i": _spectrum(*[1.0] * 8, *[0.0] * 56)}
    chain = Chain(groups, [100, 10, 10])
    plan = suggest_widths(spectra, groups, chain.macs)
    assert plan.rule == "dof"
    assert plan.demand["used"] == pytest.approx(8 * plan.demand["idle"])
    assert plan.widths["used"] > 64 > plan.widths["idle"]
    assert plan.macs <= plan.budget == chain.macs(chain.current())
    scaled = plan.alpha * plan.demand["used"]
    assert abs(scaled - plan.widths["used"]) <= 8


@given(chains(), st.integers(0, 2**31))
@settings(max_examples=50, deadline=None)
def test_random_control_meets_the_budget_and_is_a_new_draw_per_seed(chain, seed):
    plan = random_widths(chain.groups, chain.macs, None, seed)
    again = random_widths(chain.groups, chain.macs, None, seed)
    other = random_widths(chain.groups, chain.macs, None, seed + 1)
    assert plan == again
    assert plan.macs <= plan.budget
    assert plan.demand != other.demand
    for group in chain.groups:
        assert 0.5 <= plan.demand[group.name] / group.width <= 2.0


@given(chains(), st.floats(0.4, 1.0))
@settings(max_examples=50, deadline=None)
def test_uniform_control_scales_to_the_parameters(chain, share):
    floors = {group.name: group.least for group in chain.groups}
    target = max(share * chain.params(chain.current()), chain.params(floors))
    plan = uniform_widths(chain.groups, chain.params, target)
    assert chain.params(plan.widths) <= target
    assert _is_ordered(chain, {g.name: float(g.width) for g in chain.groups}, plan.widths)


def test_uniform_control_keeps_the_shape_and_costs_fewer_macs():
    groups = [WidthGroup(f"g{i}", (f"m{i}",), 64 * 2**i, 8, 8) for i in range(4)]
    chain = Chain(groups, [4096, 1024, 256, 64, 1])
    target = 0.8 * chain.params(chain.current())
    plan = uniform_widths(groups, chain.params, target)
    assert 0.995 * target <= plan.macs == chain.params(plan.widths) <= target
    for group in groups:
        assert plan.widths[group.name] == pytest.approx(math.sqrt(0.8) * group.width, abs=8)
    assert chain.macs(plan.widths) < 0.9 * chain.macs(chain.current())


def test_power_control_finds_the_power_that_matches_the_parameters():
    groups = [WidthGroup(f"g{i}", (f"m{i}",), 64 * 2**i, 8, 8) for i in range(4)]
    chain = Chain(groups, [4096, 1024, 256, 64, 1])
    direct = power_widths(groups, chain.macs, None, 0.75, param_fn=chain.params)
    assert direct.power == 0.75
    assert direct.params < 0.9 * chain.params(chain.current())
    found = power_widths(groups, chain.macs, None, params=direct.params, param_fn=chain.params)
    assert found.params == pytest.approx(direct.params, rel=0.03)
    assert found.power == pytest.approx(0.75, abs=0.08)
    assert found.macs <= found.budget
    far = power_widths(groups, chain.macs, None, params=1e9, param_fn=chain.params)
    assert "no power brings the parameters nearer to 1,000,000,000" in far.notes[-1]


BAD = [
    ({"budget": 10.0}, "no plan can exist: the floors alone cost 64, above the budget of 10"),
    ({"budget": -1.0}, "give a positive number"),
    ({"tolerance": 1.5}, "tolerance is 1.5"),
    ({"max_params": 5.0}, "needs param_fn"),
    ({"rule": "degrees"}, "unknown rule 'degrees'"),
    ({"rule": "dofs"}, "unknown rule 'dofs'; closest names: dof"),
    (
        {"spectra": {"mm": _spectrum(1.0)}},
        "spectrum of 'm', which was not measured; closest names: mm; measure it",
    ),
    ({"groups": []}, "no width groups"),
    ({"groups": [WidthGroup("g", ("m",), 8)] * 2}, "named twice: g"),
    ({"groups": [WidthGroup("g", (), 8)]}, "has no members"),
    ({"spectra": {"m": _spectrum(0.0, 0.0)}}, "every width group has demand 0"),
    ({"rule": lambda spectrum: float("nan")}, "its demand is nan"),
    ({"mac_fn": lambda widths: float("inf")}, "must be finite"),
    ({"mac_fn": lambda widths: 5.0, "budget": 9.0}, "no plan can exist: the cost stays below"),
    ({"power": 0.0}, "power is 0.0; give a positive, finite exponent"),
    ({"power": -1.0}, "power is -1.0"),
    ({"power": float("nan")}, "power is nan"),
    ({"power": float("inf")}, "power is inf"),
    ({"max_params": float("nan"), "param_fn": lambda widths: 1.0}, "max_params is nan"),
    (
        {"max_params": 7.0, "param_fn": lambda widths: widths["g"]},
        "no plan can exist: the floors alone need 8 parameters, above max_params = 7",
    ),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_names_the_thing_its_value_and_the_remedy(change, message):
    arguments = {
        "spectra": {"m": _spectrum(1.0, 0.5)},
        "groups": [WidthGroup("g", ("m",), 64)],
        "mac_fn": lambda widths: widths["g"] ** 2,
    } | change
    with pytest.raises(ValueError, match=re.escape(message)):
        suggest_widths(**arguments)


@pytest.mark.parametrize("field", ["width", "multiple", "floor"])
@pytest.mark.parametrize("value", [0, -8, 2.5, True])
def test_width_group_rejects_impossible_numbers(field, value):
    values = {"width": 8, "multiple": 8, "floor": 8} | {field: value}
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        WidthGroup("g", ("m",), **values)
