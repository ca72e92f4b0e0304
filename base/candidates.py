"""The images drawn of a unit, on disk: its candidates, from which generate.py selects.

    <unit>/<index>.png       each that is sound
    <unit>/candidates.csv    a row for each: index, clip_score, fault
    .<unit>.partial/         an unfinished unit, where every process has a table of its own
"""

from common import compute, files, made

TABLE = f"candidates-{compute.RANK}.csv"  # of this process


def image_name(index):
    return f"{index:05}.png"


def begin(out, name, key):
    """Makes the hidden folder of a unit: empty, or with what is there for the same key."""
    path, work = out / name, made.unfinished(out, name)
    if files.read_json(work / "config.json").get("key") == key:
        return
    files.remove(work)
    if files.read_json(path / "config.json").get("key") == key:  # more images are wanted
        for lost in made.changed_files(path):
            (path / lost).unlink(missing_ok=True)
        path.rename(work)
    else:
        work.mkdir(parents=True)
        files.write_json(work / "config.json", {"key": key})


def read(folder, table="candidates*.csv"):
    """{index: row} of the candidates of a folder whose images are there, in order."""
    rows = {}
    for path in folder.glob(table):
        for row in files.read_csv(path, "remove its folder to draw it again"):
            index = int(row["index"])
            if row["fault"] or (folder / image_name(index)).is_file():
                rows[index] = row | {"index": index}
    return dict(sorted(rows.items()))


def write(folder, rows):
    """rows: {index: row}, all that this process has drawn of a unit."""
    files.write_csv(folder / TABLE, [rows[index] for index in sorted(rows)])


def publish(out, name, args, key, **spent):
    """Makes an unfinished unit a finished one. Returns the number of its candidates."""
    work = made.unfinished(out, name)
    rows = read(work)
    files.write_csv(work / "candidates.csv", list(rows.values()))
    for table in work.glob("candidates-*.csv"):
        table.unlink()
    made.finish(work, args, key, **spent)
    files.remove(out / name)
    work.rename(out / name)
    return len(rows)
