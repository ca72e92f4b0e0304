"""Measures speed: each row of a table compares one of our scripts with what one would run instead, on this machine.

    python evaluation/bench.py --peers ~/peers --out runs/bench
    python evaluation/bench.py --rows clustering size --out runs/bench

PEERS holds diffusers/train_dreambooth.py and train_dreambooth_lora.py (of diffusers' examples/dreambooth, tag v0.40.0) and
group_DRO/ (github.com/kohpangwei/group_DRO). They run as they are, with the Python that runs this script; rows whose peer is
missing are skipped. Ours and the peer take turns, --repeats times, with the same images, steps and threads.

Writes OUT/bench.csv and OUT/bench.md (rows of an earlier run stay until they are measured again); for the row `size`
OUT/size.csv and OUT/size.png, the seconds of our scripts against units and images; last OUT/config.json.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections import namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the repository, which this script is run from anywhere
from common import files, imagefolder, stage
from common.files import InputError
from evaluation import bench_jobs, figures

np = stage.lazy("numpy")

BASE = ROOT / "base" / "miniature"
SIZES = {"batch": 16, "steps": 200, "units": 12, "unit_steps": 50, "width": 320, "images": 256, "jpegs": 5000,
         "embeddings": 200_000, "k_max": 10, "last_layer_epochs": 30, "size_units": 2, "size_steps": 25, "size_images": 128,
         "size_training": 300, "size_epochs": 10}
TRIAL = {"batch": 4, "steps": 2, "units": 2, "unit_steps": 1, "width": 32, "images": 8, "jpegs": 12, "embeddings": 400,
         "k_max": 3, "last_layer_epochs": 2, "size_units": 1, "size_steps": 1, "size_images": 4, "size_training": 20,
         "size_epochs": 1}
STEPS, GUIDANCE, GENERATED = 10, 1, 32  # of generation: steps, guidance scale and batch of data/digits.mk

# ------------------------------------------------------------------------------------------- how it is measured

Measured = namedtuple("Measured", "seconds mb report")


def measured(*command):
    """Runs a command to its end: its seconds, the peak resident memory of its largest process, and what it printed.

    A process inherits the peak of the one that starts it, so this one imports no large library.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        begin = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.monotonic() - begin, os.waitstatus_to_exitcode(status)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise InputError(" ".join(map(str, command))[:400], f"failed: {last[:200]}", "run this command by hand")
        return Measured(seconds, usage.ru_maxrss / 1024, out.read())


def job(function, *values):
    """Measures a function of bench_jobs in a process of its own; report: what it returned."""
    code = ("import json, sys\nfrom evaluation import bench_jobs\n"
            "print(json.dumps(getattr(bench_jobs, sys.argv[1])(*json.loads(sys.argv[2]))))")
    found = measured(sys.executable, "-c", code, function.__name__, json.dumps(values, default=str))
    return found._replace(report=json.loads(found.report.splitlines()[-1]))


def ours(args, script, *flags):
    """Measures a script of ours that writes a new folder."""
    return measured(sys.executable, script, *flags, "--out", new_folder(args))


def in_turn(args, ours, peer):
    """[(ours, peer)], as often as --repeats says."""
    return [(ours(), peer()) for _ in range(args.repeats)]


def entry(args, row, what, aim, found, note=""):
    """A row of bench.csv; found: [(Measured, Measured or None)]."""
    ours, peer = zip(*found)
    ratios = [theirs.seconds / own.seconds for own, theirs in found if theirs]

    def summary(runs):
        if runs[0] is None:
            return "", ""
        return f"{statistics.median(run.seconds for run in runs):.4g}", round(max(run.mb for run in runs))

    (seconds, mb), (peer_seconds, peer_mb) = summary(ours), summary(peer)
    ratio, low, high = (f"{value(ratios):.2f}" if ratios else "" for value in (statistics.median, min, max))
    return {"row": row, "what": what, "seconds": seconds, "peer_seconds": peer_seconds, "ratio": ratio, "lowest": low,
            "highest": high, "aim": aim, "peak_mb": mb, "peer_peak_mb": peer_mb, "note": note, "repeats": len(found),
            "threads": args.threads, "machine": args.machine}


# ---------------------------------------------------------------------------------------------------- the images


def new_folder(args):
    """A path for the output of one process."""
    return Path(tempfile.mkdtemp(dir=args.work)) / "out"


def data_of(args, rows):
    """A folder in the one format with these rows of the digits, whose images are linked."""
    data = new_folder(args)
    data.mkdir()
    (data / "images").symlink_to(digits(args) / "images")
    files.write_csv(data / "metadata.csv", rows)
    return data


def digits(args):
    """The prepared folder of 5,000 digits, 250 training images per group."""
    if not (args.work / "digits" / "config.json").is_file():
        measured(sys.executable, "data/prepare.py", "digits", "--bias", 0.5, "--out", args.work / "digits")
    return args.work / "digits"


def units_of(args, count, images, split="train"):
    """A folder of `count` units (clusters, spread over the groups) of `images` digits each."""
    rows, chosen = imagefolder.read_metadata(digits(args), split), []
    groups = list(imagefolder.group_counts(rows))
    for unit in range(count):
        members = [rows[i] for i in imagefolder.members_of(groups[unit % 4], rows)]
        chosen += [dict(row, split="train", cluster=unit // 4) for row in members[unit // 4 * images:][:images]]
    return data_of(args, chosen)


def flat_folders(args, data):
    """[(a folder of the images of a unit, its prompt)], as diffusers' scripts take them."""
    found = {}
    for row in imagefolder.read_metadata(data):
        folder, _ = found.setdefault((imagefolder.group_of(row), row["cluster"]), (new_folder(args), row["text"]))
        folder.mkdir(exist_ok=True)
        (folder / Path(row["file_name"]).name).symlink_to((data / row["file_name"]).resolve())
    return list(found.values())


# ------------------------------------------------------------------------------------------------------- the rows


def finetuned(args, data, method, steps, *flags, base=BASE):
    """Our fine-tuning: all units of `data` in one process."""
    return ours(args, "finetune.py", "--method", method, "--per", "cluster", "--base", base, "--data", data, "--steps",
                steps, "--batch", args.batch, "--rank", 16, "--learning-rate", 1e-3, "--schedule", "cosine", *flags)


def finetuned_by_diffusers(args, script, units, steps, *flags, base=BASE, pixels=32):
    """The peer's fine-tuning: one process per unit of flat_folders()."""
    flags += ("--mixed_precision", "bf16") * bool(args.gpu) + ("--rank", 16) * (script == LORA)
    runs = [measured(sys.executable, args.peers / script, "--pretrained_model_name_or_path", base, "--instance_data_dir",
                     folder, "--instance_prompt", f"{text} sks", "--resolution", pixels, "--train_batch_size", args.batch,
                     "--max_train_steps", steps, "--learning_rate", 1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 0,
                     "--seed", 0, *flags, "--output_dir", new_folder(args)) for folder, text in units]
    return Measured(sum(run.seconds for run in runs), max(run.mb for run in runs), None)


def lora(args, peer):
    return lora_units(args, peer, "lora", 1, 15, args.steps, "2 x")


def lora_units(args, peer, row="lora-units", count=None, batches=5, steps=None, aim="4 x"):
    """`count` units with `batches` batches of images each, in one process of ours and one process each of the peer."""
    count, steps = count or args.units, steps or args.unit_steps
    data = units_of(args, count, batches * args.batch)
    units = flat_folders(args, data)
    found = in_turn(args, lambda: finetuned(args, data, "lora", steps),
                    lambda: finetuned_by_diffusers(args, peer, units, steps))
    return [entry(args, row, f"{count} LoRA unit{'s' * (count > 1)} of {steps} steps of {args.batch}, miniature, whole "
                  f"process: finetune.py once against diffusers' train_dreambooth_lora.py {count} x", aim, found)]


def dreambooth(args, peer):
    """Other digits of the group serve as class images: what they show does not change the time."""
    count = 15 * args.batch
    data, prior = units_of(args, 1, count), units_of(args, 1, count, "test")
    units, [(folder, text)] = flat_folders(args, data), flat_folders(args, prior)
    found = in_turn(args, lambda: finetuned(args, data, "dreambooth", args.steps, "--prior", prior),
                    lambda: finetuned_by_diffusers(args, peer, units, args.steps, "--with_prior_preservation",
                                                   "--class_data_dir", folder, "--class_prompt", text,
                                                   "--num_class_images", count))
    return [entry(args, "dreambooth", f"DreamBooth with prior preservation, one unit, {args.steps} steps of {args.batch} "
                  "and as many class images (there already), miniature, whole process, against train_dreambooth.py",
                  "1.5 x, no more memory", found)]


def large(args, peer):
    args = Namespace(**vars(args) | {"batch": 8 if args.gpu else 1})
    few, many = (10, 60) if args.gpu else (1, 4)
    base, data = new_folder(args), new_folder(args)
    job(bench_jobs.stable_diffusion, base, args.width)
    job(bench_jobs.photographs, data, args.batch, 512, 512)  # as many as a step draws: more steps encode no more of them
    rows = [row | {"y": 0, "a": 0, "text": "a photo"} for row in imagefolder.read_metadata(data)]
    files.write_csv(data / "metadata.csv", rows)
    units = flat_folders(args, data)

    def per_step(run):  # start-up and the first encoding of the images cancel out
        short, long = run(few), run(many)
        return Measured((long.seconds - short.seconds) / (many - few), max(short.mb, long.mb), None)

    found = in_turn(args, lambda: per_step(lambda steps: finetuned(args, data, "lora", steps, base=base)),
                    lambda: per_step(lambda steps: finetuned_by_diffusers(args, peer, units, steps, base=base, pixels=512)))
    note = "ours encodes each image once, the peer at each step"
    if args.gpu:
        flops, rate = job(bench_jobs.flops_and_rate, base, data, args.batch).report
        share = flops / statistics.median(run.seconds for run, _ in found) / rate
        note += f"; {flops / 1e12:.2f} TFLOP a step, {share:.0%} of the {rate / 1e12:.0f} TFLOP/s of a bf16 product"
    return [entry(args, "large", f"a LoRA step of {args.batch} x 512 pixels, Stable Diffusion 1.5's shapes, random weights, "
                  f"{'bf16' if args.gpu else 'fp32'} (difference of {few} and {many} steps), against "
                  "train_dreambooth_lora.py", "3 x" + "; 40 %" * bool(args.gpu), found, note)]


def generated(args, data, images):
    """Our generation: images of four groups. --alpha 1 --keep 1: all are scored, by their prompts, and kept."""
    return ours(args, "generate.py", "--base", BASE, "--clip", BASE / "clip", "--data", data, "--images", images // 4,
                "--steps", STEPS, "--guidance-scale", GUIDANCE, "--batch", min(GENERATED, images // 4), "--keep", 1,
                "--alpha", 1)


def generation(args, peer):
    data, batch = units_of(args, 4, 1), min(GENERATED, args.images // 4)
    prompts = imagefolder.group_prompts(imagefolder.read_metadata(data))
    found = in_turn(args, lambda: generated(args, data, args.images), lambda: job(
        bench_jobs.plain_generation, prompts, args.images // 4, batch, bool(args.gpu), STEPS, GUIDANCE, new_folder(args)))
    difference = job(bench_jobs.generation_difference, prompts, batch, STEPS, GUIDANCE).report
    return [entry(args, "generation", f"{args.images} images, {STEPS} steps of DPM-Solver++, {batch} at once, miniature, "
                  "whole process: generate.py, CLIP scores included, against StableDiffusionPipeline, one prompt per call, "
                  "num_images_per_prompt", "1.5 x, same images to float noise", found,
                  f"with the same generators, values in [0, 1] differ by at most {difference:.1e}")]


def classifier(args, peer):
    data, batch = new_folder(args), min(128, args.jpegs // 2)
    job(bench_jobs.photographs, data, args.jpegs, 500, 375)
    found = in_turn(args, lambda: job(bench_jobs.our_epoch, data, batch),
                    lambda: job(bench_jobs.group_dro_epoch, args.peers / peer, data, batch, args.threads))
    what = (f"epoch of {args.jpegs:,} JPEGs of 500 x 375, ResNet-18 at 224 pixels, batch {batch}, no augmentation, against "
            f"group_DRO's dataset and DataLoader, {args.threads} workers")
    later = [tuple(run._replace(seconds=run.report["epoch"]) for run in pair) for pair in found]
    first = [(own._replace(seconds=own.seconds + own.report["reading"]), theirs) for own, theirs in later]
    return [entry(args, "classifier", f"first {what}; ours decodes all images before it", "2 x", first),
            entry(args, "classifier-later", f"later {what}; ours reads the decoded images", "2 x", later)]


def last_layer(args, peer):
    data = data_of(args, [row for row in imagefolder.read_metadata(digits(args)) if row["split"] != "test"])
    found = in_turn(args, *(lambda cached=cached: job(bench_jobs.last_layer, data, cached, args.last_layer_epochs)
                            for cached in (True, False)))
    found = [tuple(run._replace(seconds=run.report["epochs"]) for run in pair) for pair in found]
    return [entry(args, "last-layer", f"last layer on 1,000 real images of 32 pixels, {args.last_layer_epochs} epochs, 600 "
                  "val images after each: features computed once, against the same loop through the frozen network", "20 x",
                  found)]


def clustering(args, peer):
    def clustered(count):
        folder = args.work / f"embeddings-{count}"
        if not folder.is_dir():
            job(bench_jobs.random_embeddings, folder, count)
        return ours(args, "cluster.py", "--data", folder / "data", "--embeddings", folder / "embeddings", "--k", "auto",
                    "--k-max", args.k_max)

    tenth = clustered(args.embeddings // 10)
    found = in_turn(args, lambda: clustered(args.embeddings), lambda: None)
    return [entry(args, "clustering", f"cluster.py on {args.embeddings:,} random embeddings of 768 numbers in 4 groups, k "
                  f"auto to {args.k_max}, whole process", "under 300 s, memory linear", found,
                  f"a tenth of them: {tenth.seconds:.3g} s, {tenth.mb:.0f} MB")]


def nothing(args, peer):
    without = [f"-u{name}" for name in os.environ if name.startswith(("MAKE", "MFLAGS"))]  # of the make that runs this
    make = ("env", *without, "make", "-C", ROOT)
    if "--out" in measured(*make, "-n").report:
        print("nothing: skipped, make has something to do (run make first)", flush=True)
        return []
    found = in_turn(args, lambda: measured(*make), lambda: None)
    return [entry(args, "nothing", "make with nothing to do", "0.25 s", found)]


def size(args, peer):
    """Seconds at 1, 2, 5 and 10 times a size, and the line through them. Writes size.csv and size.png."""
    rows = imagefolder.read_metadata(digits(args))
    drawn, held_out = ([row for row in rows if (row["split"] == "val") == held] for held in (False, True))
    four = units_of(args, 4, 1)

    def trained(count):
        data = data_of(args, [dict(row, split="train") for row in drawn[:count]] + held_out[:40]
                       + [dict(row, split="test") for row in held_out[40:80]])
        return ours(args, "train_classifier.py", "--recipe", "erm", "--data", data, "--seeds", 0, "--epochs",
                    args.size_epochs)

    found = []
    for what, least, run in (
            ("units of finetune.py", args.size_units,
             lambda count: finetuned(args, units_of(args, count, 3 * args.batch), "lora", args.size_steps)),
            ("images of generate.py", args.size_images, lambda count: generated(args, four, count)),
            ("training images of train_classifier.py", args.size_training, trained)):
        sizes = [least * times for times in (1, 2, 5, 10)]
        seconds = [run(count).seconds for count in sizes]
        slope, start = np.polyfit(sizes, seconds, 1)
        line = {"seconds_at_0": f"{start:.3f}", "seconds_each": f"{slope:.6f}",
                "r2": f"{np.corrcoef(sizes, seconds)[0, 1] ** 2:.5f}"}
        found += [{"what": what, "size": count, "seconds": f"{value:.3f}"} | line for count, value in zip(sizes, seconds)]
        print("size: {what}: {seconds_at_0} s + {seconds_each} s each, R2 {r2}".format(**found[-1]), flush=True)
    files.write_csv(args.out / "size.csv", found)
    figures.cost_against_size(args.out / "size.png", found)
    return []


LORA, DREAMBOOTH, GROUP_DRO = "diffusers/train_dreambooth_lora.py", "diffusers/train_dreambooth.py", "group_DRO"
ROWS = {"lora": (lora, LORA), "lora-units": (lora_units, LORA), "dreambooth": (dreambooth, DREAMBOOTH),
        "large": (large, LORA), "generation": (generation, None), "classifier": (classifier, GROUP_DRO),
        "last-layer": (last_layer, None), "clustering": (clustering, None), "nothing": (nothing, None), "size": (size, None)}
DIFFUSERS = "https://github.com/huggingface/diffusers/tree/v0.40.0/examples/dreambooth"
SOURCES = {LORA: DIFFUSERS, DREAMBOOTH: DIFFUSERS, GROUP_DRO: "https://github.com/kohpangwei/group_DRO"}

# --------------------------------------------------------------------------------------------------------- the run


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    stage.start(args, {})
    args.work = args.out.resolve() / ".work.partial"
    files.remove(args.work)
    args.work.mkdir()
    os.environ.update(OMP_NUM_THREADS=str(args.threads), XDG_CACHE_HOME=str(args.work / "cache"))
    args.gpu, args.machine = job(bench_jobs.machine).report
    args.machine += ", trial sizes" * args.trial
    vars(args).update((TRIAL if args.trial else SIZES) | ({"jpegs": args.jpegs} if args.jpegs else {}))
    default = ["large", "lora", "generation"] if args.gpu else [row for row in ROWS if row not in ("large", "size")]
    for row in args.rows or default:
        run, peer = ROWS[row]
        if peer and not (args.peers and (args.peers / peer).exists()):
            print(f"{row}: skipped, --peers holds no {peer} (get it from {SOURCES[peer]})", flush=True)
            continue
        for found in run(args, peer):
            publish(args.out, found)
            print(*cells(found), sep=" | ", flush=True)
    files.remove(args.work)
    stage.finish(args.out, args, files.digest(args.rows))


def publish(out, found):
    """Puts a row into bench.csv and bench.md, in the place of an earlier one of the same name."""
    path, names = out / "bench.csv", [*ROWS]
    names.insert(names.index("classifier") + 1, "classifier-later")
    rows = [row for row in (files.read_csv(path) if path.is_file() else []) if row["row"] != found["row"]] + [found]
    rows.sort(key=lambda row: names.index(row["row"]))
    files.write_csv(path, rows)
    files.write_text(out / "bench.md", figures.markdown_table(
        ["row", "what", "ours, s", "peer, s", "peer / ours", "aim", "ours, MB", "peer, MB", "note"],
        [cells(row) for row in rows]) + "\nMedian seconds, the median of the ratios of each turn "
        "[lowest, highest], peak resident memory of the largest process. Measured with:\n\n" + "".join(
            f"- {machine}: {', '.join(row['row'] for row in rows if machine_of(row) == machine)}\n"
            for machine in dict.fromkeys(map(machine_of, rows))))


def cells(row):
    """A row of bench.md."""
    ratio = f"{row['ratio']} [{row['lowest']}, {row['highest']}]" if row["ratio"] else ""
    return [row["row"], row["what"], row["seconds"], row["peer_seconds"], ratio, row["aim"], row["peak_mb"],
            row["peer_peak_mb"], row["note"]]


def machine_of(row):
    return f"{row['machine']}; {row['threads']} threads, {row['repeats']} repeats"


def parse(argv=None):
    parser, count = stage.Parser(__file__, __doc__), stage.number(int, 1)
    parser.add_argument("--rows", choices=tuple(ROWS), nargs="+", metavar="ROW", help=f"rows to measure: {', '.join(ROWS)}; "
                        "default: all but large (10 GB of memory, an hour) and size; on a GPU large, lora and generation, "
                        "where large is in bf16 and tells the share of the chip's matrix rate that a step reaches")
    parser.add_argument("--peers", type=Path, help="folder of the peers' scripts, see above; default: rows with such peers "
                        "are skipped")
    parser.add_argument("--repeats", type=count, default=3, help="turns of ours and the peer")
    parser.add_argument("--threads", type=count, default=os.cpu_count(), help="threads of ours and of the peer")
    parser.add_argument("--jpegs", type=count, help="JPEGs of the row classifier; default: 5000")
    parser.add_argument("--trial", action=stage.Flag, default=False, help="tiny sizes: shows that everything runs")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.peers and not args.peers.is_dir():
        raise InputError(f"--peers {args.peers}", "is not a folder", f"get the scripts from {DIFFUSERS}")
    args.peers = args.peers and args.peers.resolve()
    return args


if __name__ == "__main__":
    stage.run(main)
