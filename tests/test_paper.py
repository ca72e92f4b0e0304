"""evaluation/paper.py: our results beside the paper's, and verdicts on its claims."""

import pytest
from conftest import run

from common import files

REFERENCES = ("vanilla", "groupdro", "dreambooth")


def intervals(path, **recipes):
    """An intervals.csv as evaluate.py writes it;
    recipes: {name: (worst_group, {reference: (difference, low, high)})}.
    """
    rows = []
    for recipe, (worst, differences) in recipes.items():
        row = {"recipe": recipe, "group_labels": "train, val for selection", "worst_group": worst,
               "low": worst - 0.05, "high": worst + 0.05, "average_group": worst + 0.1}
        for reference in REFERENCES:
            values = differences.get(reference, ("", "", ""))
            row |= dict(zip((f"vs_{reference}", f"vs_{reference}_low", f"vs_{reference}_high"),
                            values))
        rows.append(row)
    files.write_csv(path / "results" / "intervals.csv", rows)
    return path / "results"


BETTER, LEVEL, WORSE = (0.1, 0.05, 0.15), (0.01, -0.02, 0.04), (-0.1, -0.15, -0.05)


def table(text, head):
    """The rows of the markdown table whose first column has this head: lists of cells."""
    lines = text[text.index(f"| {head} |"):].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")]
            for line in lines if line.startswith("|")]


def test_each_claim_gets_a_verdict_from_the_interval_of_its_difference(tmp_path):
    first = intervals(tmp_path / "digits-0.95", lora=(0.7, {"vanilla": BETTER}),
                      dreambooth=(0.7, {"vanilla": LEVEL}),
                      clustered=(0.8, {"vanilla": WORSE, "groupdro": LEVEL, "dreambooth": LEVEL}))
    last = intervals(tmp_path / "digits-0.99",
                     clustered=(0.6, {"groupdro": BETTER, "dreambooth": WORSE}), lora=(0.65, {}))
    text = run("evaluation/paper.py", "--results", first, last, "--out", tmp_path / "paper")
    assert (tmp_path / "paper" / "paper.md").read_text().strip() in text
    fine_tuned, clusters = ("fine-tuned models beat the base model",
                            "clusters beat one DreamBooth per group")
    assert table(text, "claim") == [
        [fine_tuned, "digits-0.95", "lora - vanilla", "+0.100 [+0.050, +0.150]", "yes"],
        [fine_tuned, "digits-0.95", "dreambooth - vanilla", "+0.010 [-0.020, +0.040]",
         "not significant"],
        [fine_tuned, "digits-0.95", "clustered - vanilla", "-0.100 [-0.150, -0.050]",
         "no: significantly worse"],
        ["level with Group-DRO on the original bias", "digits-0.95", "clustered - groupdro",
         "+0.010 [-0.020, +0.040]", "yes"],
        ["ahead of Group-DRO as the bias grows", "digits-0.99", "clustered - groupdro",
         "+0.100 [+0.050, +0.150]", "yes"],
        [clusters, "digits-0.95", "clustered - dreambooth", "+0.010 [-0.020, +0.040]",
         "not significant"],
        [clusters, "digits-0.99", "clustered - dreambooth", "-0.100 [-0.150, -0.050]",
         "no: significantly worse"]]


@pytest.mark.parametrize("difference, verdict", (
    (BETTER, "no: significantly better"), (WORSE, "no: significantly worse")))
def test_a_recipe_that_is_said_to_be_level_must_not_differ_significantly(
        tmp_path, difference, verdict):
    results = intervals(tmp_path / "digits-0.95", clustered=(0.8, {"groupdro": difference}))
    text = run("evaluation/paper.py", "--results", results, "--out", tmp_path / "paper")
    assert [row[-1] for row in table(text, "claim") if row[0].startswith("level")] == [verdict]


def test_recipes_stand_beside_the_papers_numbers_best_first_at_the_severe_bias(tmp_path):
    first = intervals(tmp_path / "digits-0.95", erm=(0.5, {}), clustered=(0.8, {}), ours=(0.7, {}))
    last = intervals(tmp_path / "digits-0.99", erm=(0.3, {}), clustered=(0.6, {}), lora=(0.65, {}))
    rows = table(run("evaluation/paper.py", "--results", first, last, "--out", tmp_path / "paper"),
                 "recipe")
    # ours was not run at the severe bias
    assert [row[0] for row in rows] == ["lora", "clustered", "erm", "ours"]
    assert rows[1][1:5] == ["0.800 / 0.900 [0.750, 0.850]", "0.600 / 0.700 [0.550, 0.650]",
                            "train, val for selection", "88.1 / 90.2"]
    assert rows[0][1] == rows[3][2] == "" and rows[3][4:] == [""] * 6


def test_missing_results_and_those_of_something_else_are_one_line_errors(tmp_path):
    run("evaluation/paper.py", "--results", tmp_path, "--out", tmp_path / "p",
        fails="intervals.csv: cannot be read")
    results = intervals(tmp_path / "digits-0.95", clustered=(0.8, {"groupdro": BETTER}))
    for row in ({"recipe": "erm", "worst_group": "0.5"},
                files.read_csv(results / "intervals.csv")[0] | {"vs_groupdro_low": "x"}):
        files.write_csv(results / "intervals.csv", [row])
        run("evaluation/paper.py", "--results", results, "--out", tmp_path / "p",
            fails="intervals.csv: was not written by evaluate")
    assert not (tmp_path / "p").exists()
    files.write_csv(results / "intervals.csv",
                    [{"recipe": "erm", "worst_group": "x", "low": "0", "high": "1"}])
    run("evaluation/sweep.py", "--results", results, "--out", tmp_path / "s",
        fails="intervals.csv: was not written by evaluate")
