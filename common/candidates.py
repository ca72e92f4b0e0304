"""The images drawn of a unit, on disk: its candidates, <index>.png and a row each in candidates.csv, from which some are selected.

A unit is drawn in a hidden folder, .<unit>.partial, and several shards that draw one unit in a folder each, .<unit>.<i>.partial.
"""

from common import files, stage


def image_name(row):
    return f"{row['index']:05}.png"


def read(folder):
    """The rows of candidates.csv, in the order of their indices: dicts with index, clip_score and fault."""
    path = folder / "candidates.csv"
    rows = files.read_csv(path, "remove its folder to draw it again") if path.is_file() else []
    return [dict(row, index=int(row["index"])) for row in rows]


def write(folder, rows):
    """rows: {index: row}."""
    files.write_csv(folder / "candidates.csv", [rows[index] for index in sorted(rows)])


def that_are_there(folder, key):
    """{index: row} of the candidates of a folder that was drawn with this key, whose images were not lost."""
    rows = read(folder) if files.read_json(folder / "config.json").get("key") == key else []
    return {row["index"]: row for row in rows if row["fault"] or (folder / image_name(row)).is_file()}


def unfinished(out, name, key, part=None):
    """The hidden folder in which a unit, or a shard's part of it, is drawn; it begins with what is there for the same key."""
    path, work = out / name, hidden(out, name, part)
    if files.read_json(work / "config.json").get("key") != key:
        files.remove(work)
        if part is None and files.read_json(path / "config.json").get("key") == key:  # damaged, or more images are wanted
            for lost in stage.changed_files(path):
                (path / lost).unlink(missing_ok=True)
            path.rename(work)
        else:
            work.mkdir(parents=True)
            files.write_json(work / "config.json", {"key": key})
    if part is None:
        _adopt(work, out.glob(f".{name}.*.partial"), key)
    return work


def hidden(out, name, part=None):
    return out / f".{name}{'' if part is None else f'.{part}'}.partial"


def _adopt(work, parts, key):
    """Moves what shards have drawn of a unit into its folder."""
    for part in sorted(parts):
        if files.read_json(part / "config.json").get("key") == key:
            rows = that_are_there(part, key) | that_are_there(work, key)
            for path in part.glob("*.png"):
                path.rename(work / path.name)
            if rows:
                write(work, rows)
        files.remove(part)
