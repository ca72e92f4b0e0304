"""Measures speed: each row compares one of our scripts with what one would run instead.

    python tools/bench.py --peers ~/peers --out runs/bench
    python tools/bench.py --rows generation --out runs/bench

PEERS holds train_dreambooth.py and train_dreambooth_lora.py (of diffusers' examples/dreambooth, tag
v0.40.0). They run as they are; rows whose peer is missing are skipped. Ours and the peer take
turns, --repeats times, with the same images, steps and threads, each as a process of its own.

Writes OUT/bench.csv and OUT/bench.md; rows of an earlier run stay until they are measured again.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import namedtuple
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from common import files, imagefolder, stage
from common.files import InputError
from evaluation import figures

np = stage.lazy("numpy")

BASE = ROOT / "base" / "miniature"
LORA, DREAMBOOTH = "train_dreambooth_lora.py", "train_dreambooth.py"
SIZES = {"batch": 16, "steps": 200, "units": 12, "unit_steps": 50, "images": 256, "width": 320}
TRIAL = {"batch": 4, "steps": 2, "units": 2, "unit_steps": 1, "images": 8, "width": 32}
PLAIN_GENERATION = """
import sys, torch
from pathlib import Path
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
base, out, images, batch, *prompts = sys.argv[1:]
gpu = torch.cuda.is_available()
pipe = StableDiffusionPipeline.from_pretrained(base, dtype=torch.bfloat16 if gpu else torch.float32)
pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
pipe.to("cuda" if gpu else "cpu")
for prompt in prompts:
    Path(out, prompt).mkdir(parents=True)
    for first in range(0, int(images), int(batch)):
        generators = [torch.Generator().manual_seed(first + i) for i in range(int(batch))]
        found = pipe(prompt, num_images_per_prompt=int(batch), num_inference_steps=10,
                     guidance_scale=1, generator=generators).images
        for i, image in enumerate(found, first):
            image.save(Path(out, prompt, f"{i:05}.png"))
"""
Measured = namedtuple("Measured", "seconds mb")

# --------------------------------------------------------------------------------- how it measures


def measured(*command):
    """Runs a command to its end: its seconds, and the peak resident memory of its process in MB."""
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stderr=errors,
                                   stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds, process.returncode = time.monotonic() - begin, status
        errors.seek(0)
        if status:
            last = (errors.read().strip().splitlines() or ["no message"])[-1]
            raise InputError(" ".join(map(str, command))[:400], f"failed: {last[:200]}",
                             "run this command by hand")
    return Measured(seconds, usage.ru_maxrss / 1024)


def entry(row, what, found, repeats, threads):
    """A row of bench.csv; found: [(Measured, Measured or None)], a pair for each turn."""
    ours, peers = zip(*found)
    peers = [peer for peer in peers if peer]
    ratios = [peer.seconds / own.seconds for own, peer in found if peer]

    def median(runs):
        return f"{statistics.median(run.seconds for run in runs):.4g}" if runs else ""

    def most(runs):
        return round(max(run.mb for run in runs)) if runs else ""

    spread = [f"{value(ratios):.2f}" if ratios else "" for value in (statistics.median, min, max)]
    return {"row": row, "what": what, "seconds": median(ours), "peer_seconds": median(peers),
            **dict(zip(("ratio", "lowest", "highest"), spread)), "peak_mb": most(ours),
            "peer_peak_mb": most(peers), "repeats": repeats, "threads": threads}


# ------------------------------------------------------------------------------------------- rows
# Each takes the arguments and returns (what it measures, ours, the peer's), two functions that
# return a Measured; the peer's may be None. Or None, to skip the row.


def new_folder(args):
    return Path(tempfile.mkdtemp(dir=args.work)) / "out"


def ours(args, script, *flags):
    return measured(sys.executable, script, *flags, "--out", new_folder(args))


def units_of(args, count, images, split="train"):
    """A folder of `count` units (clusters, spread over the groups) of `images` digits each."""
    digits, data = args.work / "digits", new_folder(args)
    if not digits.is_dir():
        measured(sys.executable, "data/prepare.py", "digits", "--bias", 0.5, "--out", digits)
    rows, chosen = imagefolder.read_metadata(digits, split), []
    groups = list(imagefolder.group_counts(rows))
    for unit in range(count):
        members = [rows[i] for i in imagefolder.members_of(groups[unit % 4], rows)]
        first = unit // 4 * images
        chosen += [row | {"split": "train", "cluster": unit // 4}
                   for row in members[first:first + images]]
    data.mkdir()
    (data / "images").symlink_to(digits / "images")
    files.write_csv(data / "metadata.csv", chosen)
    return data


def flat_folders(args, data):
    """[(a folder of the images of a unit, its prompt)], as diffusers' scripts take them."""
    found = {}
    for row in imagefolder.read_metadata(data):
        unit = imagefolder.group_of(row), row["cluster"]
        folder, _ = found.setdefault(unit, (new_folder(args), row["text"]))
        folder.mkdir(exist_ok=True)
        (folder / Path(row["file_name"]).name).symlink_to((data / row["file_name"]).resolve())
    return list(found.values())


def finetuned(args, data, method, steps, *flags, base=BASE):
    return ours(args, "finetune.py", "--method", method, "--per", "cluster", "--base", base,
                "--data", data, "--steps", steps, "--batch", args.batch, "--rank", 16,
                "--learning-rate", 1e-3, "--schedule", "cosine", *flags)


def by_diffusers(args, script, units, steps, *flags, base=BASE, pixels=32):
    """The peer's fine-tuning: one process per unit of flat_folders()."""
    runs = []
    for folder, text in units:
        runs.append(measured(
            sys.executable, args.peers / script, "--pretrained_model_name_or_path", base,
            "--instance_data_dir", folder, "--instance_prompt", f"{text} sks", "--resolution",
            pixels, "--train_batch_size", args.batch, "--max_train_steps", steps, "--learning_rate",
            1e-3, "--lr_scheduler", "cosine", "--lr_warmup_steps", 0, "--seed", 0, *flags,
            "--output_dir", new_folder(args), *["--mixed_precision", "bf16"] * args.gpu))
    return Measured(sum(run.seconds for run in runs), max(run.mb for run in runs))


def lora(args, count=1, steps=None):
    steps = steps or args.steps
    data = units_of(args, count, (15 if count == 1 else 5) * args.batch)
    units = flat_folders(args, data)
    return (f"{count} LoRA unit(s) of {steps} steps of {args.batch}, miniature: finetune.py once "
            f"against {LORA} {count} x", lambda: finetuned(args, data, "lora", steps),
            lambda: by_diffusers(args, LORA, units, steps, "--rank", 16))


def lora_units(args):
    return lora(args, args.units, args.unit_steps)


def dreambooth(args):
    count = 15 * args.batch
    data, prior = units_of(args, 1, count), units_of(args, 1, count, "test")
    units, [(folder, text)] = flat_folders(args, data), flat_folders(args, prior)
    return (f"DreamBooth with prior preservation, one unit, {args.steps} steps of {args.batch}, "
            f"miniature, against {DREAMBOOTH}",
            lambda: finetuned(args, data, "dreambooth", args.steps, "--prior", prior),
            lambda: by_diffusers(args, DREAMBOOTH, units, args.steps, "--with_prior_preservation",
                                 "--class_data_dir", folder, "--class_prompt", text,
                                 "--num_class_images", count))


def large(args):
    base, data = new_folder(args), new_folder(args)
    (data / "images").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data / "images/0.png")
    files.write_csv(data / "metadata.csv", [
        {"file_name": "images/0.png", "split": "train", "y": 0, "a": 0, "cluster": 0,
         "text": "a photo"}])
    measured(sys.executable, "-c", "import sys; from tools import random_model as m; "
             "m.stable_diffusion(int(sys.argv[1])).save_pretrained(sys.argv[2])", args.width, base)
    units, args.batch = flat_folders(args, data), 1

    def per_step(run):  # start-up and the first encoding of the image cancel out
        short, long = run(1), run(4)
        return Measured((long.seconds - short.seconds) / 3, max(short.mb, long.mb))

    return ("a LoRA step of one image of 512 pixels, Stable Diffusion 1.5's shapes (difference of "
            f"1 and 4 steps), against {LORA}",
            lambda: per_step(lambda steps: finetuned(args, data, "lora", steps, base=base)),
            lambda: per_step(lambda steps: by_diffusers(args, LORA, units, steps, "--rank", 16,
                                                        base=base, pixels=512)))


def generation(args):
    data, images = units_of(args, 4, 1), args.images // 4
    batch = min(32, images)
    prompts = imagefolder.group_prompts(imagefolder.read_metadata(data)).values()
    return (f"{args.images} images, 10 steps of DPM-Solver++, {batch} at once, miniature: "
            "generate.py with CLIP scores against StableDiffusionPipeline, a prompt per call",
            lambda: ours(args, "generate.py", "--base", BASE, "--clip", BASE / "clip", "--data",
                         data, "--images", images, "--steps", 10, "--guidance-scale", 1, "--batch",
                         batch, "--keep", 1, "--alpha", 1),
            lambda: measured(sys.executable, "-c", PLAIN_GENERATION, BASE, new_folder(args), images,
                             batch, *prompts))


def nothing(args):
    without = [f"-u{name}" for name in os.environ if name.startswith(("MAKE", "MFLAGS"))]
    make = ("env", *without, "make", "-C", ROOT)
    plan = subprocess.run([*map(str, make), "-n"], capture_output=True, text=True).stdout
    if "--out" in plan:
        print("nothing: skipped, make has something to do (run make first)", flush=True)
        return None
    return "make with nothing to do", lambda: measured(*make), None


ROWS = {"lora": (lora, LORA), "lora-units": (lora_units, LORA), "large": (large, LORA),
        "dreambooth": (dreambooth, DREAMBOOTH), "generation": (generation, None),
        "nothing": (nothing, None)}

# -------------------------------------------------------------------------------------------- run


def main(argv=None):
    args = parse(argv)
    stage.begin(args)
    stage.start(args, {})
    args.work = args.out.resolve() / ".work.partial"
    files.remove(args.work)
    args.work.mkdir()
    vars(args).update(TRIAL if args.trial else SIZES)
    code = "import sys, torch; sys.exit(torch.cuda.is_available())"
    args.gpu = subprocess.run([sys.executable, "-c", code]).returncode
    os.environ.update(OMP_NUM_THREADS=str(args.threads), XDG_CACHE_HOME=str(args.work / "cache"))
    for row in args.rows or [row for row in ROWS if row != "large"]:
        make_row, peer = ROWS[row]
        if peer and not (args.peers and (args.peers / peer).exists()):
            print(f"{row}: skipped, --peers holds no {peer}", flush=True)
            continue
        row_to_measure = make_row(args)
        if not row_to_measure:
            continue
        what, own, other = row_to_measure
        found = [(own(), other and other()) for _ in range(args.repeats)]
        publish(args.out, entry(row, what, found, args.repeats, args.threads))
    files.remove(args.work)
    stage.finish(args.out, args, files.digest(args.rows))


def publish(out, found):
    """Puts a row into bench.csv and bench.md, in the place of an earlier one of the same name."""
    path = out / "bench.csv"
    rows = [row for row in (files.read_csv(path) if path.is_file() else [])
            if row["row"] != found["row"]] + [found]
    files.write_csv(path, rows)
    table = figures.markdown_table(list(found), [row.values() for row in rows])
    files.write_text(out / "bench.md", f"{table}\nMedian seconds, median of the ratios of each "
                     "turn, peak resident memory of the largest process in MB.")
    print(*found.values(), sep=" | ", flush=True)


def parse(argv=None):
    parser = stage.Parser(__file__, __doc__)
    count, add = stage.number(int, 1), parser.add_argument
    add("--rows", choices=tuple(ROWS), nargs="+", metavar="ROW", help=f"rows to measure: "
        f"{', '.join(ROWS)}; default: all but large (10 GB of memory, an hour)")
    add("--peers", type=Path, help="folder of the peers' scripts; default: their rows are skipped")
    add("--repeats", type=count, default=3, help="turns of ours and the peer")
    add("--threads", type=count, default=os.cpu_count(), help="threads of ours and of the peer")
    add("--trial", action=stage.Flag, default=False, help="tiny sizes: shows that it runs")
    add("--out", type=Path, required=True, help="folder to write")
    args = parser.parse_args(argv)
    if args.peers and not args.peers.is_dir():
        raise InputError(f"--peers {args.peers}", "is not a folder",
                         "get the scripts from diffusers, see --help")
    return args


if __name__ == "__main__":
    stage.run(main)
