"""Each attribute alone, where groups are the combinations of several (data/prepare.py --a)."""

from statistics import mean

from common import files
from evaluation import figures


def columns_of(data):
    """The columns of metadata.csv of whose combinations the groups consist; [] if it is one."""
    columns = files.read_json(data / "config.json").get("arguments", {}).get("a")
    return columns if isinstance(columns, list) and len(columns) > 1 else []


def table_of(predictions, rows, columns):
    """A table in markdown: of each recipe and attribute the lowest accuracy of a class and value.

    predictions: {recipe: {seed: rows with file_name, y, prediction}}; rows: of metadata. An
    accuracy is the mean over seeds.
    """
    known = {row["file_name"]: row for row in rows}
    lines = []
    for recipe, seeds in predictions.items():
        line = [recipe]
        for column in columns:
            shares = {}
            for predicted in seeds.values():
                correct = {}
                for row in predicted:
                    part = f"class {row['y']}, {column} {known[row['file_name']][column]}"
                    correct.setdefault(part, []).append(row["prediction"] == row["y"])
                for part, hits in correct.items():
                    shares.setdefault(part, []).append(mean(hits))
            worst = min(shares, key=lambda part: mean(shares[part]))
            line.append(f"{mean(shares[worst]):.3f} ({worst})")
        lines.append(line)
    heads = ["recipe", *(f"worst by {column} alone" for column in columns)]
    return figures.markdown_table(heads, lines)
