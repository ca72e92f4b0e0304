"""Stage 1, first half: the CLIP embeddings of a dataset's images, computed once for every stage that needs them.

    python data/embed.py --data data/digits-0.95 --clip base/miniature/clip --out runs/digits-0.95/embeddings

cluster.py clusters them, generate.py compares synthetic images with their means, and evaluation/images.py measures with them.

Reads DATA, all splits. Writes OUT/embeddings.npz (file_name, and embedding: (N, D) float32 of unit length) and
OUT/config.json.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which this script is run from anywhere
from common import files, imagefolder, models, pixels, stage

np = stage.lazy("numpy")


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    stage.claim(args, [f"part {args.shard[0]}"])
    rows = imagefolder.read_metadata(args.data)
    key = files.digest([row["file_name"] for row in rows], files.file_digests(args.data, [row["file_name"] for row in rows]),
                       files.model_digest(args.encoder or args.clip),
                       stage.code_digest(__file__, models.__file__, imagefolder.load_image))
    if args.shard[1] > 1:
        return embed_part(rows, key, args)
    if stage.is_made(args, key, inputs):
        return print(f"{args.out}: up to date")
    embeddings = joined(parts_of(args.out, key), rows, args)
    with files.replacing(args.out) as out:
        out.mkdir()
        models.save_embeddings(out, rows, embeddings)
        stage.finish(out, args, key, inputs)
    print(f"{args.data}: {len(rows)} images embedded")


def embed(rows, args):
    """(len(rows), D) float32 array."""
    encoder = (models.Encoder if args.encoder else models.Clip)(args.encoder or args.clip, models.pick_device(args.device))
    return models.embed_images(encoder, args.data, rows, args.batch, args.cache)


def embed_part(rows, key, args):
    """Embeds a shard's images and leaves them in OUT. Its batches are those of a single process: others would round otherwise."""
    (shard, shards), batches = args.shard, math.ceil(len(rows) / args.batch)
    first, last = (min(len(rows), i * batches // shards * args.batch) for i in (shard, shard + 1))
    path = args.out / f".{key}-{first}-{last}.partial"
    if first == last or path.is_file() or files.read_json(args.out / "config.json").get("key") == key:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    with files.replacing(path) as hidden, open(hidden, "wb") as file:
        np.save(file, embed(rows[first:last], args))
    print(f"{args.data}: {last - first} images embedded by shard {shard}")


def parts_of(out, key):
    """{(first, last): embeddings} that shards have left."""
    return {tuple(map(int, path.stem.split("-")[1:])): np.load(path) for path in out.glob(f".{key}-*.partial")}


def joined(parts, rows, args):
    """The embeddings of all rows: those of the parts, and what no shard has left."""
    pieces = [(range(*part), embeddings) for part, embeddings in parts.items()]
    missing = sorted(set(range(len(rows))).difference(*(indices for indices, _ in pieces)))
    if missing:
        pieces.append((missing, embed([rows[i] for i in missing], args)))
    embeddings = np.empty((len(rows), pieces[0][1].shape[1]), np.float32)
    for indices, piece in pieces:
        embeddings[indices] = piece
    return embeddings


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--clip", required=True, help="folder or hub id of a CLIP model")
    parser.add_argument("--encoder", help="folder or hub id of another image encoder, such as facebook/dinov2-base, to cluster "
                        "with; generate.py and evaluation/images.py need CLIP's embeddings")
    parser.add_argument("--batch", type=stage.number(int, 1), default=64, help="images embedded at once")
    pixels.add_flag(parser)
    models.add_device_flags(parser, precision=False)
    parser.add_argument("--shard", type=stage.shard_of, default="0/1", help="i/n: embed the i-th of n parts")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
