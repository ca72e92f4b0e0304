"""Stage 1, first half: the CLIP embeddings of a dataset's images, computed once for all stages.

    python data/embed.py --data data/digits-0.95 --clip base/miniature/clip \\
        --out runs/digits-0.95/embeddings

cluster.py clusters them, generate.py compares synthetic images with their means, and
evaluation/images.py measures with them.

Reads DATA, all splits. Writes OUT/embeddings.npz (file_name, and embedding: (N, D) float32 of unit
length) and OUT/config.json.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the repository
from common import clip, compute, files, imagefolder, made, models, pixels, stage

np = stage.lazy("numpy")


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    rows = imagefolder.read_metadata(args.data)
    names = [row["file_name"] for row in rows]
    code = made.code_digest(__file__, clip.__file__, models.__file__, imagefolder.load_image)
    key = files.digest(names, files.file_digests(args.data, names),
                       files.model_digest(args.clip), code)
    if compute.agreed(lambda: stage.is_made(args, key)):
        return
    device = compute.accelerator(args.device).device
    mine = clip.embed_images(clip.Clip(args.clip, device), args.data, rows, args.batch, args.cache)
    embeddings = np.concatenate([part for part in compute.gather([mine]) if len(part)])
    if compute.FIRST:
        with files.replacing(args.out) as out:
            out.mkdir()
            clip.save_embeddings(out, rows, embeddings)
            stage.finish(out, args, key)
        print(f"{args.data}: {len(rows)} images embedded")


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    add = parser.add_argument
    add("--data", type=Path, required=True, help="real images: a prepared dataset folder")
    add("--clip", required=True, help="folder or hub id of a CLIP model")
    add("--batch", type=stage.number(int, 1), default=64, help="images embedded at once")
    pixels.add_flag(parser)
    compute.add_flags(parser, precision=False)
    add("--out", type=Path, required=True, help="folder to write")
    return parser.parse_args(argv)


if __name__ == "__main__":
    stage.run(main, shared=True)
