"""evaluation/report.py: one page, whole and escaped."""

import re

from conftest import run
from test_evaluate import predictions_of

from evaluation.report import conclude, interval


def test_the_conclusion_names_the_best_recipe_and_what_is_significant():
    best = {"recipe": "lora", "worst_group": "0.9", "low": "0.8", "high": "0.95",
            "vs_erm": "0.2", "vs_erm_low": "0.1", "vs_erm_high": "0.3",
            "vs_groupdro": "0.01", "vs_groupdro_low": "-0.1", "vs_groupdro_high": "0.1"}
    erm = {"recipe": "erm", "worst_group": "0.7", "low": "0.6", "high": "0.8"}
    text = conclude([best, erm])
    assert text.startswith("lora has the best worst-group accuracy, 0.900 [0.800, 0.950].")
    assert "Difference from erm: +0.200 [+0.100, +0.300], significant." in text
    assert ("Difference from groupdro: +0.010 [-0.100, +0.100], not significant." in text
            and "intervals" not in text)
    assert interval(erm, "worst_group", ".1f") == "0.7 [0.6, 0.8]"


def test_a_page_needs_no_network_escapes_every_text_and_flags_a_collapsed_classifier(
        dataset, tmp_path):
    evil = tmp_path / "run" / "classifiers" / "<script>alert(1)<"
    predictions_of(tmp_path / "run" / "classifiers" / "erm" / "seed0", {})
    predictions_of(evil / "seed0", {(0, 0): 4, (0, 1): 4})  # says class 1 of everything
    run("evaluate.py", "--data", dataset, "--classifiers", evil,
        tmp_path / "run" / "classifiers" / "erm", "--out", tmp_path / "run" / "results")
    run("evaluate.py", "--data", dataset, "--classifiers", evil,
        "--out", tmp_path / "run" / "ablations" / "k<script>")
    run("evaluation/report.py", "--run", tmp_path / "run", "--data", dataset,
        "--out", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;" in page and "Collapsed" in page
    assert "<h3>k&lt;script&gt;</h3>" in page
    assert ("<td>even digit on a green background (y0-a1)</td><td>3</td>"
            "<td>&lt;script&gt;alert(1)&lt;</td><td>0.000</td>") in page
    assert not re.search('(src|href)=(?!"data:)', page) and "http" not in page
    run("evaluation/report.py", "--run", tmp_path, "--data", dataset, "--out", tmp_path / "r",
        fails="intervals.csv: cannot be")
