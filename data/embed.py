"""Stage 1, first half: the CLIP embeddings of a dataset's images, computed once for every stage that needs them.

    python data/embed.py --data data/digits-0.95 --clip base/miniature/clip --out runs/digits-0.95/embeddings

cluster.py clusters them, generate.py compares synthetic images with their means, and evaluation/images.py measures with them.

Reads DATA, all splits. Writes OUT/embeddings.npz (file_name, and embedding: (N, D) float32 of unit length) and
OUT/config.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository, which this script is run from anywhere
from common import files, imagefolder, models, pixels, stage


def main(argv=None):
    args = parse(argv)
    inputs = stage.begin(args)
    rows = imagefolder.read_metadata(args.data)
    key = files.digest([row["file_name"] for row in rows], files.file_digests(args.data, [row["file_name"] for row in rows]),
                       files.model_digest(args.encoder or args.clip),
                       stage.code_digest(__file__, models.__file__, imagefolder.load_image))
    if stage.is_made(args, key, inputs):
        return print(f"{args.out}: up to date")
    encoder = (models.Encoder if args.encoder else models.Clip)(args.encoder or args.clip, models.pick_device(args.device))
    embeddings = models.embed_images(encoder, args.data, rows, args.batch, args.cache)
    with files.replacing(args.out) as out:
        out.mkdir()
        models.save_embeddings(out, rows, embeddings)
        stage.finish(out, args, key, inputs)
    print(f"{args.data}: {len(rows)} images embedded")


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    parser.add_argument("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    parser.add_argument("--clip", required=True, help="folder or hub id of a CLIP model")
    parser.add_argument("--encoder", help="folder or hub id of another image encoder, such as facebook/dinov2-base, to cluster "
                        "with; generate.py and evaluation/images.py need CLIP's embeddings")
    parser.add_argument("--batch", type=stage.number(int, 1), default=64, help="images embedded at once")
    pixels.add_flag(parser)
    models.add_device_flags(parser, precision=False)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main)
