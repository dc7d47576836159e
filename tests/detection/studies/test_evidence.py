"""Tables of committed results: made from them, and in the README as they are."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcov import Spectrum
from fastcov_detection.cli import main
from fastcov_detection.config import preset
from fastcov_detection.detector.build import build_model
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.errors import ConfigError, DataError
from fastcov_detection.search.folder import load_spectra
from fastcov_detection.search.results import SCHEMA_VERSION
from fastcov_detection.search.verdicts import compare_paired, mean_and_error
from fastcov_detection.studies.compare import permutation_test, read_families
from fastcov_detection.studies.evidence import BEGIN, END, evidence, write_evidence
from fastcov_detection.studies.primary import PLAN

DETECTION = Path(__file__).resolve().parents[3] / "detection"


def _keep(root, aps, **peer):
    arms = {
        name: {
            "params": 2_000_000 - cut,
            "backbone_params": 1_000_000 - cut,
            "macs": 130_000_000,
            "widths": {},
            "latency_ms": None,
            "runs": [
                {
                    "seed": s,
                    "ap": ap,
                    "ap50": ap + 0.2,
                    "segm_ap": None,
                    "train_s": 9.0,
                    "cpu_s": 4.0,
                }
                for s, ap in enumerate(values)
            ],
            **peer.get(name, {}),
        }
        for (name, values), cut in zip(aps.items(), (0, 250_000), strict=True)
    }
    one, other = aps
    found = compare_paired(
        other, one, "ap", dict(enumerate(aps[other])), dict(enumerate(aps[one])), "no loss"
    )
    result = {
        "schema_version": SCHEMA_VERSION,
        "macs_input": {},
        "commit": "x",
        "arms": arms,
        "comparisons": [found.as_dict()],
    }
    (root / "try").mkdir(parents=True)
    (root / "try" / "result.json").write_text(json.dumps(result), encoding="utf-8")


def test_tables_hold_costs_spreads_and_verdicts(tmp_path):
    _keep(tmp_path, {"baseline": [0.50, 0.56, 0.53], "searched": [0.51, 0.57, 0.55]})
    text = evidence(tmp_path)
    assert "| searched | 1,750,000 | 750,000 (-25 %) | 130.0 | 0.543 ± 0.018 |" in text
    # Differences 0.01, 0.01, 0.02: see test_report.
    assert "| searched | baseline | AP | +0.013 ± 0.003 | 3 | better |" in text
    assert "Shown: 1 of 1." in text


def test_families_stand_beside_searches_without_layers_at_their_ceiling(tmp_path):
    _keep(tmp_path, {"baseline": [0.5], "searched": [0.6]})
    shares = (0.5, 0.51, 0.7, 0.71)
    spectra = [Spectrum(torch.tensor([a, 1 - a], dtype=torch.float64), 9, 1.0, "x") for a in shares]
    found = permutation_test({"full": spectra, "free": spectra}, 2, {"full": 2, "free": 3})
    named = replace(
        found, label_a="scratch", label_b="pretrained", scores_a=[0.5, 0.6], scores_b=[0.5] * 2
    )
    folder = tmp_path / "families"
    folder.mkdir()
    (folder / "families.json").write_text(json.dumps(named.as_dict()), encoding="utf-8")
    assert read_families(folder) == named
    text = evidence(tmp_path)
    assert "### families" in text
    assert "- scratch: AP 0.550 ± 0.050 (2 seeds); pretrained: AP 0.500 ± 0.000 (2 seeds)" in text
    assert "- 1 of 2 layers are at their ceiling" in text
    assert "| `free` | 3 | 2, 2 | 2, 2 | 0.2000 | 0.0100 | 0.333 |" in text
    assert "`full`" not in text


def test_a_damaged_comparison_of_families_is_named(tmp_path):
    _keep(tmp_path, {"baseline": [0.5], "searched": [0.6]})
    (tmp_path / "families").mkdir()
    (tmp_path / "families" / "families.json").write_text('{"layers": []}', encoding="utf-8")
    with pytest.raises(DataError, match=r"families.json holds no comparison .* run the families"):
        evidence(tmp_path)


def test_one_seed_claims_nothing_and_the_peer_has_its_version(tmp_path):
    made = {"made_with": "torch-pruning 1.6.1"}
    _keep(tmp_path, {"baseline": [0.5], "torch-pruning": [0.6]}, **{"torch-pruning": made})
    text = evidence(tmp_path)
    assert "| torch-pruning 1.6.1 | 1,750,000 |" in text
    assert "which network is more accurate is not shown" in text
    assert "better" not in text


def test_pruned_widths_from_scratch_are_a_row_of_their_own(tmp_path):
    made = {"made_with": "torch-pruning 1.6.1"}
    name = "torch-pruning-scratch"
    _keep(tmp_path, {"baseline": [0.5], name: [0.6]}, **{name: made})
    assert f"| {name} (torch-pruning 1.6.1) | 1,750,000 |" in evidence(tmp_path)


def _planned_result(lead):
    """Every arm of the plan at four seeds; searched ones lead by ``lead`` on average."""
    noise = (0.0, 0.01, -0.01, 0.0)
    arms = {}
    for name in PLAN.arms():
        gain = lead if name.startswith("searched") else 0.0
        runs = [
            {"seed": seed, "ap": 0.5 + gain + (n if gain else 0.0), "ap50": 0.7, "segm_ap": None}
            for seed, n in enumerate(noise)
        ]
        costs = {"params": 200, "backbone_params": 60 if gain else 100, "macs": 130_000_000}
        arms[name] = {**costs, "widths": {}, "latency_ms": None, "runs": runs}
    return {"schema_version": SCHEMA_VERSION, "arms": arms, "comparisons": []}


def test_the_plans_searches_have_corrected_tables_and_one_question(tmp_path):
    for name, lead in (("early", 0.02), ("late", 0.03)):
        (tmp_path / name).mkdir()
        result = json.dumps(_planned_result(lead))
        (tmp_path / name / "result.json").write_text(result, encoding="utf-8")
    text = evidence(tmp_path)
    # See test_primary: p of 0.0081 is four times that among the four that are not the smallest.
    assert "| dof | uniform | +0.020 ± 0.004 | 4 | 0.0081 | 0.0326 | better |" in text
    assert "| gradient | baseline | +0.020 ± 0.004 | 4 | 0.0026 | 0.0130 | no loss |" in text
    assert "This search is unfinished: 8 seeds wanted." in text
    assert "| dof | w^0.75, both tasks together | +0.025 ± 0.004 | 4 |" in text
    assert "- gradient does all of it: beat each fixed exponent" in text
    (tmp_path / "late" / "result.json").write_text(json.dumps(_planned_result(-0.03)))
    assert "- dof is not shown to do all of it" in evidence(tmp_path)


def test_tuning_runs_have_their_criteria(tmp_path):
    result = _planned_result(0.0)
    arms = dict.fromkeys(("baseline", "quarter", "exponent-0.5"), result["arms"]["baseline"])
    for name in ("early-tuning", "early-tuning-twice"):
        (tmp_path / name).mkdir()
        content = json.dumps({**result, "arms": arms})
        (tmp_path / name / "result.json").write_text(content, encoding="utf-8")
    text = evidence(tmp_path)
    assert "| twice the steps gain less than 0.02 AP | +0.000 ± 0.000 | 4 | met |" in text
    assert text.count("not met") == 2
    assert "one seed" not in text.lower()


def test_only_the_marked_part_is_replaced(tmp_path):
    _keep(tmp_path / "results", {"baseline": [0.5, 0.6], "searched": [0.5, 0.5]})
    readme = tmp_path / "README.md"
    readme.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    for _ in range(2):
        assert main(["evidence", str(tmp_path / "results"), str(readme)]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"above\n{BEGIN}\n### try\n")
        assert text.endswith(f"{END}\nbelow\n")
        assert "old" not in text
    readme.write_text("no marks", encoding="utf-8")
    with pytest.raises(ConfigError, match="put both where the tables belong"):
        write_evidence(tmp_path / "results", readme)
    with pytest.raises(ConfigError, match=r"no NAME/result\.json in"):
        evidence(tmp_path)


def test_readme_has_the_tables_of_the_committed_results():
    text = (DETECTION / "README.md").read_text(encoding="utf-8")
    part = text.partition(BEGIN)[2].partition(END)[0]
    assert part == "\n" + evidence(DETECTION / "results")


def test_committed_results_hold_no_weights_and_no_absolute_path():
    files = [path for path in (DETECTION / "results").rglob("*") if path.is_file()]
    assert files
    for path in files:
        assert path.suffix in {".json", ".jsonl", ".npz", ".png", ".html", ".md"}, path
        if path.suffix in {".json", ".jsonl"}:
            text = path.read_text(encoding="utf-8")
            assert '"/' not in text, path


def test_the_readme_says_how_far_the_families_lie_apart():
    found = read_families(DETECTION / "results" / "families")
    told = [layer for layer in found.layers if not layer.is_at_ceiling]
    full = len(found.layers) - len(told)
    assert f"{full} of {len(found.layers)} layers end at their structural ceiling" in _readme()
    assert f"In the other {len(told)}, final spectra" in _readme()
    assert f"(p = {round(found.p * found.divisions)}/{found.divisions}," in _readme()
    assert f"{sum(layer.p <= 0.05 for layer in told)} of the layers alone have p" in _readme()
    for scores in (found.scores_a, found.scores_b):
        mean, error = mean_and_error(scores)
        assert f"{mean:.3f} ± {error:.3f}" in _readme()


def test_the_readme_says_how_far_classifiers_lie_from_detectors():
    found = read_families(DETECTION / "results" / "classifier-detector")
    told = [layer for layer in found.layers if not layer.is_at_ceiling]
    alone = sum(layer.p <= 0.05 for layer in told)
    share = f"{round(found.p * found.divisions)}/{found.divisions}"
    assert f"p = {share} again, and {alone} of {len(told)} layers alone" in _readme()


def _readme(name="README.md"):
    return " ".join((DETECTION / name).read_text(encoding="utf-8").split())


def _of_groups():
    """Spectra of the trained baseline by group: features, before training, and of gradients."""
    config = preset("mini-harder").model
    with torch.device("meta"):
        groups = width_groups(build_model(replace(config, num_classes=11)))
    files = (
        "mini-harder/spectra/baseline.npz",
        "mini-harder/spectra/untrained.npz",
        "mini-harder-gradient/spectra/baseline-gradient.npz",
        "mini-harder-gradient/spectra/untrained-gradient.npz",
    )
    read = [load_spectra(DETECTION / "results" / name) for name in files]
    return {
        group.name: [[spectra[member] for member in group.members] for spectra in read]
        for group in groups
    }


def test_records_are_explained_by_what_the_spectra_hold():
    found, text = _of_groups(), _readme("results/README.md")
    inside = [maps for name, maps in found.items() if "." in name]
    trained = [spectrum for maps in inside for spectrum in maps[0]]
    power = sorted(one.total / one.channels for one in trained)
    first = sorted(100 * float(one.eigenvalues[0]) / one.total for one in trained)
    assert f"{power[0]:.2f} to {power[-1]:.2f} of power per channel" in text
    assert f"{first[0]:.0f} to {first[-1]:.0f} % of it in one direction" in text
    full = sorted(100 * one.dof() / one.channels for one in trained)
    before = sorted(100 * one.dof() / one.channels for maps in inside for one in maps[1])
    assert f"its dof is {full[0]:.0f} to {full[-1]:.0f} % of its width" in text
    assert f"leave {before[0]:.0f} to {before[-1]:.0f} %" in text
    stage = [one.dof() for one in found["layer3"][0]]
    assert f"(layer3: {stage[0]:.1f} to {stage[-1]:.1f} over six)" in text
    times = []
    for stage_name in ("layer1", "layer2", "layer3", "layer4"):
        of_blocks = [maps for name, maps in found.items() if name.startswith(f"{stage_name}.")]
        felt = [one.total for maps in of_blocks for one in maps[2]]
        handed_on = [one.total for one in found[stage_name][2]]
        times.append(f"{_mean(handed_on) / _mean(felt):,.0f}")
        # Before training, the loss feels nothing inside a block.
        assert all(one.total == 0 for maps in of_blocks for one in maps[3])
    assert f"{', '.join(times[:-1])} and {times[-1]} times less" in text


def _mean(values):
    return sum(values) / len(values)


def _against_baseline(folder, arm):
    """The comparison of an arm's AP with the baseline's, and both arms, of a kept search."""
    path = DETECTION / "results" / folder / "result.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    wanted = (arm, "baseline", "ap")
    (found,) = (
        one for one in result["comparisons"] if (one["arm"], one["versus"], one["metric"]) == wanted
    )
    assert result["arms"][arm]["macs"] <= result["arms"]["baseline"]["macs"]
    return found, result["arms"][arm], result["arms"]["baseline"]


def test_the_main_page_says_what_the_records_say():
    text = " ".join((DETECTION.parent / "README.md").read_text(encoding="utf-8").split())
    gain, _, _ = _against_baseline("mini-harder-gradient", "searched")
    assert (gain["n"], gain["verdict"]) == (4, "better")
    said = "Over four paired seeds of a small detection task, the rule `gradient` gained"
    assert f"{said} {gain['mean']:.3f} ± {gain['se']:.3f} AP" in text
    cells, searched, baseline = _against_baseline("bccd", "searched")
    assert (cells["n"], cells["verdict"]) == (8, "no loss")
    saved = 1 - searched["backbone_params"] / baseline["backbone_params"]
    said = f"the default rule removes {100 * saved:.0f} % of a detector's backbone parameters"
    assert said in text
    assert f"without a loss of AP ({cells['mean']:+.3f} ± {cells['se']:.3f})" in text
    assert _against_baseline("bccd", "uniform")[0]["verdict"] == "no loss"
    masks, _, _ = _against_baseline("mini-mask", "searched")
    assert masks["mean"] + masks["se"] < 0
    families = read_families(DETECTION / "results" / "families")
    told = [layer for layer in families.layers if not layer.is_at_ceiling]
    alone = sum(layer.p <= 0.05 for layer in told)
    assert f"in {alone} of {len(told)} layers they differ by more than seeds do" in text
